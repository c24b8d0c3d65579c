//! The Preferences artifact: judged pairs from any judge; the only table that reward models train on.

use std::path::Path;

use engine::artifact::{ArtifactType, Facts, FileSpec};
use engine::error::{Error, Result};

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

crate::table! {
    /// A judge's answer to one of several questions about a pair. Each row of `preferences.parquet` has the same number of
    /// rows here, in the same order.
    pub struct Aspect {
        /// Name of the pair.
        pub id: String,
        /// Name of the question.
        pub question: String,
        /// Its weight in the label.
        pub weight: f64,
        /// Whether the answer prefers `chosen_text` of the pair's row. Absent without an answer.
        pub for_chosen: Option<bool>,
        /// The probability of the answer, if the judge tells it.
        pub confidence: Option<f64>,
    }
}

/// A judged pair with its answers to single questions.
pub type WithAspects = (Preference, Vec<Aspect>);

/// The artifact type: `preferences.parquet`, and `aspects.parquet` if the judge was asked several questions.
pub struct Preferences;

impl Preferences {
    pub const NAME: &'static str = "Preferences";
    pub const FILE: &'static str = "preferences.parquet";
    pub const ASPECTS: &'static str = "aspects.parquet";

    /// Every judged pair with its answers to single questions; `None` if the judge was asked one question only.
    ///
    /// # Errors
    /// If a table is unreadable, or if the tables do not belong together.
    pub fn with_aspects(folder: &Path) -> Result<Option<impl Iterator<Item = Result<WithAspects>> + use<>>> {
        let path = folder.join(Self::ASPECTS);
        if !path.is_file() {
            return Ok(None);
        }
        let (rows, mut aspects) = (Self::open(folder)?, table::Reader::<Aspect>::open(&path)?);
        let per_row = aspects.rows().checked_div(rows.rows()).unwrap_or(0);
        let apart = move || {
            Error::user(format!("{}: its rows are not those of {}", path.display(), Self::FILE))
                .help("expected the same number of rows for each judged pair, in the same order")
        };
        if per_row * rows.rows() != aspects.rows() {
            return Err(apart());
        }
        Ok(Some(rows.map(move |row| {
            let row = row?;
            let own = aspects.by_ref().take(per_row as usize).collect::<Result<Vec<_>>>()?;
            if own.iter().any(|aspect| aspect.id != row.id) { Err(apart()) } else { Ok((row, own)) }
        })))
    }

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
        vec![json_lines::table::<Preference>(Self::FILE), json_lines::table::<Aspect>(Self::ASPECTS).optional()]
    }

    fn check(&self, folder: &Path) -> Result<Facts> {
        let mut facts = Facts::default();
        table::check::<Preference>(&folder::file(folder, Self::FILE)?, &mut facts)?;
        if let Some(mut rows) = Self::with_aspects(folder)? {
            table::check::<Aspect>(&folder.join(Self::ASPECTS), &mut facts)?;
            rows.try_for_each(|row| row.map(drop))?;
        }
        folder::metrics(folder, &mut facts)?;
        Ok(facts)
    }

    fn preview(&self, folder: &Path, rows: usize) -> Result<String> {
        table::preview(&folder::file(folder, Self::FILE)?, rows)
    }
}
