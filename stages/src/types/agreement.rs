//! The Agreement artifact: how often judges of the same pairs agree, and the pairs on which they disagree.

use std::path::Path;

use engine::artifact::{ArtifactType, Facts, FileSpec};
use engine::error::Result;
use serde::{Deserialize, Serialize};

use super::{folder, json_lines};
use crate::table;

crate::table! {
    /// A pair on which judges prefer different summaries.
    pub struct Disagreement {
        /// Identifies the pair: a hash of its content.
        pub pair: String,
        /// The post that both summarise.
        pub post_id: String,
        /// Prompt text.
        pub prompt: String,
        /// Summary a.
        pub a_text: String,
        /// Summary b.
        pub b_text: String,
        /// Words in `a_text` minus words in `b_text`.
        pub longer_by: i64,
        /// The judges who prefer `a_text`.
        pub for_a: Vec<String>,
        /// The judges who prefer `b_text`.
        pub for_b: Vec<String>,
        /// Judges who judged the pair and prefer neither summary: ties, tied votes, answers without a label.
        pub for_neither: Vec<String>,
    }
}

/// A share of `of` cases with its 95% interval (Wilson 1927), adjusted for the variation between posts.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Share {
    pub of: u64,
    pub share: f64,
    pub low: f64,
    pub high: f64,
}

/// One Preferences table on its own.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Judge {
    /// The label of the instance that made the table.
    pub name: String,
    pub rows: u64,
    /// Distinct pairs; several labels of one pair are merged by majority.
    pub pairs: u64,
    /// Pairs with a preference.
    pub labelled: u64,
    /// Share of labels that prefer the summary shown first, among labels whose order is known.
    pub first_chosen: Option<Share>,
    /// Share of labels that prefer the summary with more words, among pairs whose lengths differ.
    pub longer_chosen: Option<Share>,
    /// How often two labels of the same pair in this table agree: in practice an upper bound on agreement with another
    /// judge.
    pub with_itself: Option<Share>,
}

/// Two judges compared. All numbers except `matched` count only pairs on which both judges have a preference.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Compared {
    pub first: String,
    pub second: String,
    /// Pairs in both tables.
    pub matched: u64,
    /// How often both prefer the same summary; `of` is the number of pairs.
    pub agreement: Option<Share>,
    /// Cohen's kappa. Absent if one of the judges always gives the same answer.
    pub kappa: Option<Kappa>,
    pub by_length: Vec<LengthBin>,
}

/// Agreement beyond chance (Cohen 1960), with its 95% interval (Fleiss, Cohen and Everitt 1969). A hash of the two
/// texts decides which of them counts as the first category and which as the second.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Kappa {
    pub kappa: f64,
    pub low: f64,
    pub high: f64,
}

/// The pairs whose summaries differ in length by `least` to `most` words.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LengthBin {
    pub least: u64,
    /// Inclusive; absent in the last bin.
    pub most: Option<u64>,
    pub agreement: Option<Share>,
    /// How often each judge prefers the longer summary.
    pub first_for_longer: Option<Share>,
    pub second_for_longer: Option<Share>,
}

/// `agreement.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AgreementInfo {
    pub judges: Vec<Judge>,
    /// Every pair of judges.
    pub compared: Vec<Compared>,
    /// The same for single questions, if two judges were asked the same ones.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub questions: Vec<QuestionAgreement>,
}

/// The judges that were asked one question, compared.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct QuestionAgreement {
    /// Name of the question.
    pub question: String,
    pub compared: Vec<Compared>,
}

/// The artifact type: `agreement.json`, `disagreements.parquet`, `metrics.json`.
pub struct Agreement;

impl Agreement {
    pub const NAME: &'static str = "Agreement";
    pub const INFO: &'static str = "agreement.json";
    pub const DISAGREEMENTS: &'static str = "disagreements.parquet";

    /// # Errors
    /// If `agreement.json` is missing or broken.
    pub fn info(folder: &Path) -> Result<AgreementInfo> {
        folder::read_json(&folder::file(folder, Self::INFO)?)
    }

    /// # Errors
    /// If there is no such table.
    pub fn disagreements(folder: &Path) -> Result<table::Reader<Disagreement>> {
        table::Reader::open(&folder::file(folder, Self::DISAGREEMENTS)?)
    }
}

impl ArtifactType for Agreement {
    fn name(&self) -> &'static str {
        Self::NAME
    }

    fn about(&self) -> &'static str {
        "how far judges of the same pairs say the same, and pairs on which they do not"
    }

    fn files(&self) -> Vec<FileSpec> {
        vec![
            FileSpec::new(
                Self::INFO,
                "the judges, and every two of them compared: agreement, kappa, agreement by length",
            ),
            json_lines::table::<Disagreement>(Self::DISAGREEMENTS),
        ]
    }

    fn check(&self, folder: &Path) -> Result<Facts> {
        Self::info(folder)?;
        let mut facts = Facts::default();
        table::check::<Disagreement>(&folder::file(folder, Self::DISAGREEMENTS)?, &mut facts)?;
        folder::metrics(folder, &mut facts)?;
        Ok(facts)
    }

    fn preview(&self, folder: &Path, rows: usize) -> Result<String> {
        let info = folder::show(folder, Self::INFO)?;
        Ok(info + &table::preview(&folder::file(folder, Self::DISAGREEMENTS)?, rows)?)
    }
}
