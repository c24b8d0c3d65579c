//! Posts: texts with their authors' summaries, one row each.

use std::path::Path;

use engine::artifact::{ArtifactType, Facts};
use engine::error::Result;

use super::folder;
use crate::table;

crate::words! {
    /// What a post may be used for.
    pub enum Split {
        /// Supervised fine-tuning.
        Sft = "sft",
        /// The first pairs, on which the gold model trains.
        Gold = "gold",
        /// The second pairs, which the gold model labels for the proxies.
        Proxy = "proxy",
        /// Prompts of reinforcement learning.
        Rl = "rl",
        /// Prompts on which reward models are centred.
        Calibration = "calibration",
        /// Held out for evaluation.
        Valid = "valid",
    }
}

crate::table! {
    /// A post and its author's summary.
    pub struct Post {
        pub id: String,
        /// As the data has it; may be empty.
        pub subreddit: String,
        /// May be empty.
        pub title: String,
        pub post: String,
        pub summary: String,
        /// Empty before `dataset.filter`.
        pub splits: Vec<Split>,
        /// JSON of the facts behind the post, where it was made from facts.
        pub facts: Option<String>,
    }
}

impl Post {
    pub fn is_in(&self, split: Split) -> bool {
        self.splits.contains(&split)
    }
}

/// The artifact type: `posts.parquet`.
pub struct Posts;

impl Posts {
    pub const NAME: &'static str = "Posts";
    pub const FILE: &'static str = "posts.parquet";

    /// # Errors
    /// If there is no such table.
    pub fn open(folder: &Path) -> Result<table::Reader<Post>> {
        table::Reader::open(&folder::file(folder, Self::FILE)?)
    }

    /// # Errors
    /// If the table cannot be created.
    pub fn create(folder: &Path) -> Result<table::Writer<Post>> {
        table::Writer::create(&folder.join(Self::FILE))
    }

    /// The posts of one split, in the order of the table.
    ///
    /// # Errors
    /// If there is no such table.
    pub fn load_split(folder: &Path, split: Split) -> Result<Vec<Post>> {
        Self::open(folder)?.filter(|post| post.as_ref().map_or(true, |post| post.is_in(split))).collect()
    }
}

impl ArtifactType for Posts {
    fn name(&self) -> &'static str {
        Self::NAME
    }

    fn about(&self) -> &'static str {
        "posts with their authors' summaries and, after the filter, their splits"
    }

    fn check(&self, folder: &Path) -> Result<Facts> {
        let mut facts = Facts::default();
        table::check::<Post>(&folder::file(folder, Self::FILE)?, &mut facts)?;
        folder::metrics(folder, &mut facts)?;
        Ok(facts)
    }

    fn preview(&self, folder: &Path, rows: usize) -> Result<String> {
        table::preview(&folder::file(folder, Self::FILE)?, rows)
    }
}
