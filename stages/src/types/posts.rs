//! The Posts artifact: posts with their authors' summaries, one per row.

use std::path::Path;

use engine::artifact::{ArtifactType, Facts, FileSpec};
use engine::error::Result;

use super::{folder, json_lines};
use crate::table;

crate::words! {
    /// The use that a post is assigned to.
    pub enum Split {
        /// Supervised fine-tuning.
        Sft = "sft",
        /// The first set of pairs, used to train the gold model.
        Gold = "gold",
        /// The second set of pairs, labelled by the gold model for the proxies.
        Proxy = "proxy",
        /// Prompts for reinforcement learning.
        Rl = "rl",
        /// Prompts used to centre reward models.
        Calibration = "calibration",
        /// Held out for evaluation.
        Valid = "valid",
    }
}

crate::table! {
    /// A post and its author's summary.
    pub struct Post {
        /// Name of the post.
        pub id: String,
        /// As in the source data; may be empty.
        pub subreddit: String,
        /// May be empty.
        pub title: String,
        /// The text to summarise.
        pub post: String,
        /// The author's own summary.
        pub summary: String,
        /// Empty before `dataset.filter`.
        pub splits: Vec<Split>,
        /// The facts behind the post as JSON, if the post was generated from facts.
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
    /// If the table is missing or unreadable.
    pub fn open(folder: &Path) -> Result<table::Reader<Post>> {
        table::Reader::open(&folder::file(folder, Self::FILE)?)
    }

    /// # Errors
    /// If the table cannot be created.
    pub fn create(folder: &Path) -> Result<table::Writer<Post>> {
        table::Writer::create(&folder.join(Self::FILE))
    }

    /// The posts of one split, in table order.
    ///
    /// # Errors
    /// If the table is missing or unreadable.
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

    fn files(&self) -> Vec<FileSpec> {
        vec![json_lines::table::<Post>(Self::FILE)]
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
