//! `annotate.gold`: a reward model judges pairs. Knows no training.

use engine::context::Context;
use engine::error::Result;
use engine::kind::{Kind, Signature};
use lm::{Sequence, Tokenizer};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::annotate::Judged;
use crate::reward::{LoadedReward, load_reward_model, load_tokenizer, score};
use crate::train::encode::{Encoder, Text};
use crate::train::on_a_big_stack;
use crate::train::params::Faults;
use crate::train::random::share_of;
use crate::types::{Outcome, Pair, Pairs, Preference, Side};

pub struct AnnotateGold;

/// How a label follows from two scores.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Labels {
    /// The higher score wins.
    #[default]
    Hard,
    /// Drawn with the Bradley-Terry probability sigmoid(score a - score b).
    Sampled,
}

#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Params {
    /// `hard`, or `sampled` with the Bradley-Terry probability.
    pub labels: Labels,
    /// Share of the labels that are turned round.
    pub label_noise: f64,
    /// Scores that differ by no more than this are a tie.
    pub tie: f64,
}

impl Kind for AnnotateGold {
    type Params = Params;
    const NAME: &'static str = "annotate.gold";
    const VERSION: u32 = 1;
    const ABOUT: &'static str = "labels pairs with a reward model's scores";

    fn signature(&self, p: &Params) -> Signature {
        let signature = Signature::gives("Preferences").many("pairs", &["Pairs"]).one("reward", &["RewardModel"]);
        let signature = signature.numerics(lm::NUMERICS);
        if p.labels == Labels::Sampled || p.label_noise > 0.0 { signature.seeded() } else { signature }
    }

    fn check(&self, p: &Params) -> Vec<(String, String)> {
        let mut faults = Faults::default();
        faults.must((0.0..=0.5).contains(&p.label_noise), "label_noise", "must be in [0, 0.5]");
        faults.must(p.tie >= 0.0 && p.tie.is_finite(), "tie", "must not be negative");
        faults.0
    }

    fn run(&self, params: Params, ctx: &mut Context) -> Result<()> {
        lm::set_threads(ctx.threads());
        on_a_big_stack(|| annotate(&params, ctx))
    }
}

/// Pairs in memory at once.
const CHUNK: usize = 512;
/// Sequences scored at once.
const SCORED: usize = 32;

fn annotate(p: &Params, ctx: &mut Context) -> Result<()> {
    let folder = ctx.one("reward")?.folder.clone();
    let (reward, tokenizer) = (load_reward_model(&folder)?, load_tokenizer(&folder)?);
    let mut judge = Judge {
        p,
        reward,
        tokenizer: &tokenizer,
        noise: ctx.generator_key("noise"),
        labels: ctx.generator_key("labels"),
        turned: 0,
        first: 0,
        certainty: 0.0,
    };
    let mut judged = Judged::create(ctx.out())?;
    for input in ctx.many("pairs").to_vec() {
        let mut own = None;
        let mut chunk: Vec<Pair> = Vec::with_capacity(CHUNK);
        let mut rows = Pairs::open(&input.folder)?;
        let (total, mut done) = (rows.rows(), 0);
        loop {
            let row = rows.next().transpose()?;
            let last = row.is_none();
            chunk.extend(row);
            if chunk.len() == CHUNK || last {
                done += chunk.len() as u64;
                for preference in judge.judge(std::mem::take(&mut chunk), &mut own)? {
                    judged.push(preference)?;
                }
                ctx.progress(done, total, "pairs", None);
            }
            if last {
                break;
            }
        }
    }
    let Judge { turned, first, certainty, .. } = judge;
    let labelled = judged.count(Outcome::Labelled).max(1) as f64;
    ctx.metric("turned", turned as f64);
    ctx.metric("first_chosen", first as f64 / labelled);
    ctx.metric("mean_confidence", certainty / labelled);
    judged.finish(ctx)
}

struct Judge<'a> {
    p: &'a Params,
    reward: LoadedReward,
    tokenizer: &'a Tokenizer,
    noise: [u8; 32],
    labels: [u8; 32],
    /// Labels turned round by noise.
    turned: u64,
    /// Labels for the first summary of a pair.
    first: u64,
    /// Sum of the probabilities of the chosen summaries.
    certainty: f64,
}

impl Judge<'_> {
    /// `own`: whether the table's ids are this tokenizer's; found out at its first row.
    fn judge(&mut self, pairs: Vec<Pair>, own: &mut Option<bool>) -> Result<Vec<Preference>> {
        let mut encoder = Encoder::new(self.tokenizer, self.reward.model.lm.config().window());
        let mut sequences: Vec<Sequence> = Vec::with_capacity(2 * pairs.len());
        for pair in &pairs {
            let text = |text, ids| Text { text, ids: Some(ids) };
            let prompt = text(&pair.prompt, &pair.prompt_ids);
            let own = *own.get_or_insert_with(|| encoder.made(prompt));
            sequences.push(encoder.row(&pair.post_id, prompt, text(&pair.a_text, &pair.a_ids), pair.a_ended, own)?);
            sequences.push(encoder.row(&pair.post_id, prompt, text(&pair.b_text, &pair.b_ids), pair.b_ended, own)?);
        }
        let scores = score(&self.reward, &sequences.iter().collect::<Vec<_>>(), SCORED)?;
        Ok(pairs.into_iter().zip(scores.as_chunks::<2>().0).map(|(pair, &[a, b])| self.label(pair, a, b)).collect())
    }

    fn label(&mut self, pair: Pair, a: f32, b: f32) -> Preference {
        let difference = f64::from(a) - f64::from(b);
        let probability = 1.0 / (1.0 + (-difference).exp());
        let tie = difference.abs() <= self.p.tie;
        let mut first = match self.p.labels {
            Labels::Hard => difference > 0.0,
            Labels::Sampled => share_of(&self.labels, &pair.id) < probability,
        };
        if !tie && self.p.label_noise > 0.0 && share_of(&self.noise, &pair.id) < self.p.label_noise {
            first = !first;
            self.turned += 1;
        }
        let confidence = if first { probability } else { 1.0 - probability };
        if !tie {
            self.first += u64::from(first);
            self.certainty += confidence;
        }
        let side = if first || tie { Side::A } else { Side::B };
        let outcome = if tie { Outcome::Tie } else { Outcome::Labelled };
        Preference { confidence: Some(confidence), ..Preference::of(pair, side, outcome, "gold") }
    }
}
