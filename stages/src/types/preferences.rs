//! The Preferences artifact: judged pairs from any judge; the only table that reward models train on.

use std::path::Path;

use engine::artifact::{ArtifactType, Facts, FileSpec};
use engine::error::Result;

use super::pairs::{Corruption, Pair, Side};
use super::{folder, json_lines};
use crate::table;

crate::words! {
    /// The outcome of one judgement. Only `labelled` rows are trained on.
    pub enum Outcome {
        Labelled = "labelled",
        Tie = "tie",
        Refused = "refused",
        /// The answer was cut off.
        Truncated = "truncated",
        Unparsable = "unparsable",
        /// The request failed.
        Failed = "failed",
    }
}

crate::table! {
    /// A judged pair. If the outcome is not `labelled`, the order of chosen and rejected has no meaning.
    pub struct Preference {
        /// Name of the pair.
        pub id: String,
        /// The post that both summaries belong to.
        pub post_id: String,
        /// Prompt text (template A.1).
        pub prompt: String,
        /// Absent if the texts were written by people: encode them with the model's tokenizer.
        pub prompt_ids: Option<Vec<u32>>,
        /// The facts behind the post as JSON, if the post was generated from facts.
        pub facts: Option<String>,
        /// The preferred summary.
        pub chosen_text: String,
        /// Its token ids, with EOS if it ended. Absent like `prompt_ids`.
        pub chosen_ids: Option<Vec<u32>>,
        /// Whether EOS was sampled (true for texts that were not sampled).
        pub chosen_ended: bool,
        /// The other summary.
        pub rejected_text: String,
        /// As `chosen_ids`.
        pub rejected_ids: Option<Vec<u32>>,
        /// As `chosen_ended`.
        pub rejected_ended: bool,
        /// How one of the two was corrupted, if it was.
        pub corruption: Option<Corruption>,
        /// Only `labelled` rows are trained on.
        pub outcome: Outcome,
        /// Name of the judge.
        pub annotator: String,
        /// The judge's confidence in the label, on a scale of its own.
        pub confidence: Option<f64>,
        /// Whether the chosen summary came first: in the judge's view if it saw both, in the pair if it judged each by
        /// itself. Absent if unknown.
        pub chosen_first: Option<bool>,
        /// The judge's reason for giving no label, if it gave one.
        pub reason: Option<String>,
    }
}

impl Preference {
    /// The row of a judged pair; `chosen` is the preferred side (either side if the outcome is not `labelled`).
    pub fn of(pair: Pair, chosen: Side, outcome: Outcome, annotator: &str) -> Self {
        let a = (pair.a_text, pair.a_ids, pair.a_ended);
        let b = (pair.b_text, pair.b_ids, pair.b_ended);
        let first = chosen == Side::A;
        let (chosen, rejected) = if first { (a, b) } else { (b, a) };
        Self {
            id: pair.id,
            post_id: pair.post_id,
            prompt: pair.prompt,
            prompt_ids: Some(pair.prompt_ids),
            facts: pair.facts,
            chosen_text: chosen.0,
            chosen_ids: Some(chosen.1),
            chosen_ended: chosen.2,
            rejected_text: rejected.0,
            rejected_ids: Some(rejected.1),
            rejected_ended: rejected.2,
            corruption: pair.corruption,
            outcome,
            annotator: annotator.to_owned(),
            confidence: None,
            chosen_first: Some(first),
            reason: None,
        }
    }
}

/// The artifact type: `preferences.parquet`.
pub struct Preferences;

impl Preferences {
    pub const NAME: &'static str = "Preferences";
    pub const FILE: &'static str = "preferences.parquet";

    /// # Errors
    /// If the table is missing or unreadable.
    pub fn open(folder: &Path) -> Result<table::Reader<Preference>> {
        table::Reader::open(&folder::file(folder, Self::FILE)?)
    }

    /// # Errors
    /// If the table cannot be created.
    pub fn create(folder: &Path) -> Result<table::Writer<Preference>> {
        table::Writer::create(&folder.join(Self::FILE))
    }

    /// The `labelled` rows, in table order.
    ///
    /// # Errors
    /// If the table is missing or unreadable.
    pub fn load_labelled(folder: &Path) -> Result<Vec<Preference>> {
        Self::open(folder)?.filter(|row| row.as_ref().map_or(true, |row| row.outcome == Outcome::Labelled)).collect()
    }
}

impl ArtifactType for Preferences {
    fn name(&self) -> &'static str {
        Self::NAME
    }

    fn schema_version(&self) -> u32 {
        2
    }

    fn about(&self) -> &'static str {
        "judged pairs of summaries, whoever judged"
    }

    fn files(&self) -> Vec<FileSpec> {
        vec![json_lines::table::<Preference>(Self::FILE)]
    }

    fn check(&self, folder: &Path) -> Result<Facts> {
        let mut facts = Facts::default();
        table::check::<Preference>(&folder::file(folder, Self::FILE)?, &mut facts)?;
        folder::metrics(folder, &mut facts)?;
        Ok(facts)
    }

    fn preview(&self, folder: &Path, rows: usize) -> Result<String> {
        table::preview(&folder::file(folder, Self::FILE)?, rows)
    }
}
