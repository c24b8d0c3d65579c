//! The Pairs artifact: unjudged pairs of summaries of the same post.

use std::path::Path;

use engine::artifact::{ArtifactType, Facts, FileSpec};
use engine::error::Result;

use super::{folder, json_lines};
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
        /// Name of the pair.
        pub id: String,
        /// The post that both summarise.
        pub post_id: String,
        /// Prompt text (template A.1), already fitted to the model's window.
        pub prompt: String,
        /// Token ids of the prompt.
        pub prompt_ids: Vec<u32>,
        /// The facts behind the post as JSON, if the post was generated from facts.
        pub facts: Option<String>,
        /// The label of the model that wrote summary a; for a text that no model wrote, its origin.
        pub a_model: String,
        /// Summary a.
        pub a_text: String,
        /// Includes EOS if the summary ended.
        pub a_ids: Vec<u32>,
        /// Whether EOS was sampled (true for texts that were not sampled).
        pub a_ended: bool,
        /// As `a_model`.
        pub b_model: String,
        /// Summary b.
        pub b_text: String,
        /// As `a_ids`.
        pub b_ids: Vec<u32>,
        /// As `a_ended`.
        pub b_ended: bool,
        /// How one side was corrupted; absent for sampled pairs.
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

    fn files(&self) -> Vec<FileSpec> {
        vec![json_lines::table::<Pair>(Self::FILE)]
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
