//! The Pairs artifact: unjudged pairs of summaries of the same post.

use std::path::Path;

use engine::artifact::{ArtifactType, Facts};
use engine::error::Result;

use super::folder;
use crate::table;

crate::words! {
    /// How one summary of a contrast pair was corrupted.
    pub enum Corruption {
        /// Some facts are replaced by others.
        Swap = "swap",
        Shuffle = "shuffle",
        Truncate = "truncate",
        Repeat = "repeat",
    }
}

crate::words! {
    /// One of the two summaries of a pair.
    pub enum Side { A = "a", B = "b" }
}

crate::table! {
    /// Two summaries of one post.
    pub struct Pair {
        pub id: String,
        pub post_id: String,
        /// Prompt text (template A.1), already fitted to the model's window.
        pub prompt: String,
        pub prompt_ids: Vec<u32>,
        pub facts: Option<String>,
        pub a_model: String,
        pub a_text: String,
        /// Includes EOS if the summary ended.
        pub a_ids: Vec<u32>,
        /// Whether EOS was sampled (true for texts that were not sampled).
        pub a_ended: bool,
        pub b_model: String,
        pub b_text: String,
        pub b_ids: Vec<u32>,
        pub b_ended: bool,
        pub corruption: Option<Corruption>,
        /// The corrupted side.
        pub corrupted: Option<Side>,
    }
}

/// The artifact type: `pairs.parquet`.
pub struct Pairs;

impl Pairs {
    pub const NAME: &'static str = "Pairs";
    pub const FILE: &'static str = "pairs.parquet";

    /// # Errors
    /// If the table is missing or unreadable.
    pub fn open(folder: &Path) -> Result<table::Reader<Pair>> {
        table::Reader::open(&folder::file(folder, Self::FILE)?)
    }

    /// # Errors
    /// If the table cannot be created.
    pub fn create(folder: &Path) -> Result<table::Writer<Pair>> {
        table::Writer::create(&folder.join(Self::FILE))
    }
}

impl ArtifactType for Pairs {
    fn name(&self) -> &'static str {
        Self::NAME
    }

    fn about(&self) -> &'static str {
        "two summaries of one post each, not yet judged"
    }

    fn check(&self, folder: &Path) -> Result<Facts> {
        let mut facts = Facts::default();
        table::check::<Pair>(&folder::file(folder, Self::FILE)?, &mut facts)?;
        folder::metrics(folder, &mut facts)?;
        Ok(facts)
    }

    fn preview(&self, folder: &Path, rows: usize) -> Result<String> {
        table::preview(&folder::file(folder, Self::FILE)?, rows)
    }
}
