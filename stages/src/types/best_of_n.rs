//! The BestOfN artifact: several responses of one policy to each held-out prompt, scored by every reward model.

use std::path::Path;

use engine::artifact::{ArtifactType, Facts, FileSpec};
use engine::error::{Error, Result};
use engine::names::Digest;
use serde::{Deserialize, Serialize};

use super::Objective;
use super::policy::Half;
use super::{Split, folder, json_lines};
use crate::table;

crate::table! {
    /// One of the `n` responses to a prompt. Responses to the same prompt are adjacent, ordered by index.
    pub struct Candidate {
        /// The post that is summarised.
        pub post_id: String,
        /// Half of the prompts that the post belongs to.
        pub half: Half,
        /// Counts from 0 within the prompt.
        pub index: i64,
        /// Includes EOS if it was sampled.
        pub ids: Vec<u32>,
        /// The response as text.
        pub text: String,
        /// Whether EOS was sampled.
        pub ended: bool,
        /// Centred scores, in member order.
        pub scores: Vec<f32>,
        /// phi of each objective, in the order of `best_of_n.json`.
        pub phi: Vec<f64>,
    }
}

/// `best_of_n.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct BestOfNInfo {
    pub objectives: Vec<Objective>,
    /// Number of standard deviations that `mean_minus_std` subtracts from the mean.
    pub k: f64,
    pub beta: f64,
    /// Responses per prompt.
    pub n: usize,
    pub split: Split,
    pub seed: u64,
    /// Labels of the reward models, in order.
    pub members: Vec<String>,
    /// Digest of the policy's base model.
    pub base_digest: Digest,
    pub tokenizer_digest: Digest,
    pub min_new_tokens: usize,
    pub max_new_tokens: usize,
}

/// The artifact type: `samples.parquet`, `best_of_n.json`, `metrics.json`.
pub struct BestOfN;

impl BestOfN {
    pub const NAME: &'static str = "BestOfN";
    pub const INFO: &'static str = "best_of_n.json";
    pub const SAMPLES: &'static str = "samples.parquet";

    /// # Errors
    /// If `best_of_n.json` is missing or broken, or gives 0 responses per prompt.
    pub fn info(folder: &Path) -> Result<BestOfNInfo> {
        let file = folder::file(folder, Self::INFO)?;
        let info: BestOfNInfo = folder::read_json(&file)?;
        if info.n == 0 {
            return Err(Error::user(format!("{}: `n` is 0; expected at least 1", file.display())));
        }
        Ok(info)
    }

    /// # Errors
    /// If the table is missing or unreadable.
    pub fn samples(folder: &Path) -> Result<table::Reader<Candidate>> {
        table::Reader::open(&folder::file(folder, Self::SAMPLES)?)
    }
}

impl ArtifactType for BestOfN {
    fn name(&self) -> &'static str {
        Self::NAME
    }

    fn about(&self) -> &'static str {
        "several responses of one policy to each held-out prompt, scored by every reward model"
    }

    fn files(&self) -> Vec<FileSpec> {
        vec![
            FileSpec::new(
                Self::INFO,
                "the objectives, the sampling parameters, the reward models' labels and the base model's digest",
            ),
            json_lines::table::<Candidate>(Self::SAMPLES),
        ]
    }

    fn check(&self, folder: &Path) -> Result<Facts> {
        Self::info(folder)?;
        let mut facts = Facts::default();
        table::check::<Candidate>(&folder::file(folder, Self::SAMPLES)?, &mut facts)?;
        folder::metrics(folder, &mut facts)?;
        Ok(facts)
    }

    fn preview(&self, folder: &Path, rows: usize) -> Result<String> {
        let info = folder::show(folder, Self::INFO)?;
        Ok(info + &table::preview(&folder::file(folder, Self::SAMPLES)?, rows)?)
    }
}
