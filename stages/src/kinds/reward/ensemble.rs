//! `reward.ensemble`: combines reward models of one tokenizer and measures how much they disagree.

use std::collections::BTreeSet;

use engine::context::{Context, Input};
use engine::error::{AtPath, Error, Result};
use engine::estimate::{Forecast, Scaling};
use engine::kind::{ConnectedInput, Kind, Signature};
use lm::{Eos, Sequence};
use rand_chacha::ChaCha12Rng;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::train::RewardTrain;
use crate::error::{IntoStageResult, on_a_big_stack};
use crate::model::forecast::Models;
use crate::model::{self, tokenizer_digest};
use crate::random::{below, fixed_generator, shuffle};
use crate::reward::calibration::{self, CalibrationOptions, calibration_posts, correlation};
use crate::reward::{LoadedReward, load_ensemble, load_tokenizer, score};
use crate::stats::{mean, moments};
use crate::train::params::Faults;
use crate::types::folder::write_json;
use crate::types::reward::{ADAPTER, BASE, ENSEMBLE, MEMBERS};
use crate::types::{EnsembleInfo, LEARNING, ModelOutline, RewardModel};

pub struct RewardEnsemble;

#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Params {
    /// Seed of the samples on which members are compared.
    pub calibration_seed: u64,
    /// Number of posts used from split `calibration`, if port `posts` is wired.
    pub calibration_posts: usize,
    /// Length of the samples, in tokens.
    pub min_new_tokens: usize,
    pub max_new_tokens: usize,
}

impl Default for Params {
    fn default() -> Self {
        Self { calibration_seed: 0, calibration_posts: 256, min_new_tokens: 5, max_new_tokens: 48 }
    }
}

impl Kind for RewardEnsemble {
    type Params = Params;
    const NAME: &'static str = "reward.ensemble";
    const VERSION: u32 = 2;
    const ABOUT: &'static str = "gathers reward models of one tokenizer and measures their disagreement";

    fn signature(&self, _: &Params) -> Signature {
        Signature::producing("Ensemble")
            .many("members", &["RewardModel"])
            .optional("posts", &["Posts"])
            .optional("sampler", &["Model"])
            .numerics(lm::NUMERICS)
    }

    fn check(&self, p: &Params) -> Vec<(String, String)> {
        let mut faults = Faults::default();
        faults.must(p.calibration_posts > 1, "calibration_posts", "must be at least 2");
        faults.must(
            p.max_new_tokens > 0 && p.min_new_tokens <= p.max_new_tokens,
            "max_new_tokens",
            "must be at least `min_new_tokens`, and 1",
        );
        faults.0
    }

    fn check_wiring(&self, _: &Params, inputs: &[ConnectedInput<'_>]) -> Vec<(&'static str, Error)> {
        let members: Vec<&ConnectedInput<'_>> = inputs.iter().filter(|input| input.port == "members").collect();
        let mut faults = Vec::from_iter((members.len() < 2).then(|| ("members", too_few())));
        // Members on different scales: the variance would be that of the scales.
        let trained = || members.iter().filter(|input| input.kind == RewardTrain::NAME);
        for field in ["centring", "normalise", "calibration_seed", "calibration_posts"] {
            let first = trained().next().map(|input| &input.params[field]);
            if trained().any(|input| Some(&input.params[field]) != first) {
                let what = format!("the members differ in `{field}`, so that their scores are on different scales");
                faults.push(("members", Error::user(what).help(format!("give them the same `{field}`"))));
            }
        }
        faults
    }

    fn scaling(&self, p: &Params, size: &dyn Fn(&str) -> Option<f64>) -> Option<Scaling> {
        let members = size("members")?;
        Some(Scaling::new(members * p.calibration_posts as f64, members))
    }

    fn forecast(&self, _: &Params, inputs: &dyn Fn(&str) -> Vec<Value>) -> Forecast {
        let outline = ModelOutline::ensemble(&inputs("members"));
        let models = Models::new([&outline].into_iter().chain(&inputs("sampler")));
        // Members are compared on samples for the posts, if there are any.
        let samples = !inputs("posts").is_empty();
        let memory = models.map(|models| if samples { models.sampling(SCORED) } else { models.loaded() });
        Forecast { memory, outline }
    }

    fn run(&self, params: Params, ctx: &mut Context) -> Result<()> {
        lm::follow_threads(ctx.thread_limit().clone());
        on_a_big_stack(|| ensemble(&params, ctx))
    }
}

fn ensemble(p: &Params, ctx: &mut Context) -> Result<()> {
    let inputs = ctx.many("members").to_vec();
    gather(ctx, &inputs)?;
    // Load the written files, so that the measurements describe the artifact.
    let members = load_ensemble(ctx.out())?;
    ctx.metric("members", members.len() as f64);
    ctx.activity("comparing the members");
    compare(p, ctx, &inputs, &members)
}

fn too_few() -> Error {
    Error::user("an ensemble needs at least two members: one has no variance").help("wire more at port `members`")
}

/// Fills the folder from the members' own files.
fn gather(ctx: &Context, inputs: &[Input]) -> Result<()> {
    let [first, _, ..] = inputs else {
        return Err(too_few());
    };
    let base_digest = RewardModel::info(&first.folder)?.base_digest;
    let tokenizer = tokenizer_digest(&first.folder.join(BASE))?;
    // Without an adapter the first member's base is what it learned, not what the others start from.
    let first_keeps_base = first.folder.join(ADAPTER).is_dir();
    let mut members = Vec::with_capacity(inputs.len());
    let mut labels = BTreeSet::new();
    for input in inputs {
        let info = RewardModel::info(&input.folder)?;
        if tokenizer_digest(&input.folder.join(BASE))? != tokenizer {
            return Err(Error::user(format!(
                "members `{}` and `{}` have different tokenizers",
                first.label, input.label
            ))
            .help("train all members from models of one tokenizer: they score the same token ids"));
        }
        // Labels of two stages may be equal, but folder names must differ.
        let label = (1..)
            .map(|n| if n == 1 { input.label.clone() } else { format!("{}-{n}", input.label) })
            .find(|label| labels.insert(label.clone()))
            .ok_or_else(|| Error::internal("no free label"))?;
        for file in files(&input.folder)? {
            // The shared base is stored once; a member with another base, or without an adapter, keeps its own.
            let shared = file.starts_with(&format!("{BASE}/"))
                && first_keeps_base
                && info.base_digest == base_digest
                && input.folder.join(ADAPTER).is_dir();
            if !shared && !["metrics.json", LEARNING].contains(&file.as_str()) {
                ctx.link_or_copy(&input.folder.join(&file), &format!("{MEMBERS}/{label}/{file}"))?;
            }
        }
        members.push(label);
    }
    // An Ensemble folder always has a base, even if the first member was fully trained and has its own.
    for file in files(&first.folder.join(BASE))? {
        ctx.link_or_copy(&first.folder.join(BASE).join(&file), &format!("{BASE}/{file}"))?;
    }
    let info = EnsembleInfo { members, base_digest, more: serde_json::Map::new() };
    write_json(&ctx.out().join(ENSEMBLE), &info)
}

/// The files below `folder`, sorted, with `/` as separator. Excludes the store's manifest.
fn files(folder: &std::path::Path) -> Result<Vec<String>> {
    let mut found = Vec::new();
    let mut folders = vec![String::new()];
    while let Some(below) = folders.pop() {
        let path = folder.join(&below);
        for entry in std::fs::read_dir(&path).at(&path)? {
            let entry = entry.at(&path)?;
            let name = format!("{below}{}", entry.file_name().to_string_lossy());
            if entry.file_type().at(entry.path())?.is_dir() {
                folders.push(format!("{name}/"));
            } else if name != "manifest.json" {
                found.push(name);
            }
        }
    }
    found.sort();
    Ok(found)
}

/// Sequences per scoring batch.
const SCORED: usize = 32;

/// Measures the members' correlation and variance on samples for calibration posts, on the same samples with shuffled
/// words, and on random tokens instead. A useful ensemble disagrees more on text that it has not seen.
fn compare(p: &Params, ctx: &mut Context, inputs: &[Input], members: &[LoadedReward]) -> Result<()> {
    let Some(input) = ctx.optional("posts") else { return Ok(()) };
    let posts = calibration_posts(&input.folder, p.calibration_posts)?;
    if posts.is_empty() {
        ctx.warn("no posts in split `calibration`: the members are not compared");
        return Ok(());
    }
    let folder = &inputs[0].folder;
    let tokenizer = load_tokenizer(folder)?;
    let sampler = ctx.optional("sampler").map(|input| model::load(&input.folder)).transpose()?;
    let base = members[0].model.lm.base();
    let (policy, policy_tokenizer) = sampler.as_ref().map_or((&base, &tokenizer), |(lm, tokenizer)| (lm, tokenizer));
    if policy_tokenizer.to_json().into_stage_result()? != tokenizer.to_json().into_stage_result()? {
        return Err(Error::user("the model at port `sampler` has another tokenizer than the members"));
    }
    let options = CalibrationOptions {
        seed: p.calibration_seed,
        min_new_tokens: p.min_new_tokens,
        max_new_tokens: p.max_new_tokens,
        batch: SCORED,
    };
    let samples: Vec<Sequence> = calibration::samples(ctx, policy, policy_tokenizer, &posts, &options)?
        .into_iter()
        .map(|s| s.sequence)
        .collect();
    let mut rng = fixed_generator(p.calibration_seed, "other text");
    // EOS of the samples' own tokenizer: they end with it even if the members use another EOS.
    let eos = policy_tokenizer.eos();
    let shuffled: Vec<Sequence> = samples.iter().map(|s| with_tokens(s, eos, &mut rng, shuffle)).collect();
    let vocabulary = tokenizer.vocab_size();
    let random: Vec<Sequence> = samples
        .iter()
        .map(|s| {
            with_tokens(s, eos, &mut rng, |tokens, rng| {
                tokens.iter_mut().for_each(|token| *token = random_token(vocabulary, eos, rng));
            })
        })
        .collect();
    for (name, sequences) in [("calibration", samples), ("shuffled", shuffled), ("random", random)] {
        let rows: Vec<&Sequence> = sequences.iter().collect();
        let scores = members.iter().map(|member| score(member, &rows, SCORED)).collect::<Result<Vec<_>>>()?;
        let (mu, s2) = moments(&scores);
        ctx.metric(format!("mean_{name}"), mean(&mu));
        ctx.metric(format!("s2_{name}"), mean(&s2));
        let mut correlations = Vec::new();
        for (i, a) in scores.iter().enumerate() {
            correlations.extend(scores[..i].iter().map(|b| correlation(a, b)));
        }
        ctx.metric(format!("correlation_{name}"), correlations.iter().sum::<f64>() / correlations.len() as f64);
        ctx.metric(format!("correlation_{name}_min"), correlations.iter().copied().fold(f64::INFINITY, f64::min));
    }
    Ok(())
}

/// The sequence with changed response tokens; a final EOS stays in place.
fn with_tokens(
    sequence: &Sequence,
    eos: &Eos,
    rng: &mut ChaCha12Rng,
    change: impl Fn(&mut [u32], &mut ChaCha12Rng),
) -> Sequence {
    let mut sequence = sequence.clone();
    let end = sequence.response.len() - usize::from(sequence.response.last().is_some_and(|&id| eos.contains(id)));
    change(&mut sequence.response[..end], rng);
    sequence
}

fn random_token(vocabulary: usize, eos: &Eos, rng: &mut ChaCha12Rng) -> u32 {
    loop {
        let token = below(rng, vocabulary) as u32;
        if !eos.contains(token) {
            return token;
        }
    }
}
