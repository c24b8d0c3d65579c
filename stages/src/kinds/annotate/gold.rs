//! `annotate.gold`: labels pairs with a reward model.

use engine::context::Context;
use engine::error::{Error, Result};
use engine::estimate::{Forecast, Scaling};
use engine::kind::{Kind, Signature};
use lm::Sequence;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::error::on_a_big_stack;
use crate::labels::pair_key::{PairKey, Text as Which};
use crate::labels::scores::Scores;
use crate::labels::{HeldOut, PreferenceWriter};
use crate::model::forecast::{Models, memory};
use crate::prompt::Parts;
use crate::reward::{load_reward_model, load_tokenizer, score};
use crate::train::encode::{Encoder, Text};
use crate::train::params::Faults;
use crate::types::{Outcome, Pair, Pairs, Posts, Preference, Side};

pub struct Gold;

/// How two scores determine a label.
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
    /// Probability of flipping a label; 0.25 in Coste et al. (2023, "Reward Model Ensembles Help Mitigate
    /// Overoptimization").
    pub label_noise: f64,
    /// Maximum difference of scores that counts as a tie.
    pub tie: f64,
}

impl Kind for Gold {
    type Params = Params;
    const NAME: &'static str = "annotate.gold";
    const VERSION: u32 = 3;
    const ABOUT: &'static str = "labels pairs with a reward model's scores";

    fn signature(&self, p: &Params) -> Signature {
        let signature = Signature::producing("Preferences").many("pairs", &["Pairs"]).one("reward", &["RewardModel"]);
        let signature = signature.optional("exclude", &[Posts::NAME]).numerics(lm::NUMERICS);
        if p.labels == Labels::Sampled || p.label_noise > 0.0 { signature.seeded() } else { signature }
    }

    fn check(&self, p: &Params) -> Vec<(String, String)> {
        let mut faults = Faults::default();
        faults.must((0.0..=0.5).contains(&p.label_noise), "label_noise", "must be in [0, 0.5]");
        faults.must(p.tie >= 0.0 && p.tie.is_finite(), "tie", "must not be negative");
        faults.0
    }

    fn scaling(&self, _: &Params, size: &dyn Fn(&str) -> Option<f64>) -> Option<Scaling> {
        let pairs = size("pairs")?;
        let reward = size("reward")?;
        Some(Scaling::new(pairs * reward, pairs))
    }

    fn forecast(&self, _: &Params, inputs: &dyn Fn(&str) -> Vec<Value>) -> Forecast {
        memory(Models::new(&inputs("reward")).map(|models| models.scoring(SCORED)))
    }

    fn run(&self, params: Params, ctx: &mut Context) -> Result<()> {
        lm::follow_threads(ctx.thread_limit().clone());
        on_a_big_stack(|| annotate(&params, ctx))
    }
}

/// Pairs in memory at once, and between two checks for a due checkpoint.
const CHUNK: usize = 128;
/// Sequences per forward pass.
const SCORED: usize = 32;

fn annotate(p: &Params, ctx: &mut Context) -> Result<()> {
    let folder = ctx.one("reward")?.folder.clone();
    let (reward, tokenizer) = (load_reward_model(&folder)?, load_tokenizer(&folder)?);
    let mut held_out = HeldOut::of(ctx)?;
    let scale = reward.scale;
    let mut drawn = LabelSampler {
        p,
        scale,
        noise: ctx.generator_key("noise"),
        labels: ctx.generator_key("labels"),
        counts: LabelCounts::default(),
    };
    let mut judged = PreferenceWriter::create(ctx.out())?;
    let tables = ctx.many("pairs").iter().map(|input| Pairs::open(&input.folder)).collect::<Result<Vec<_>>>()?;
    let total = tables.iter().map(|table| table.rows()).sum();
    let mut scores = Scores::of(ctx, total, 2)?;
    let mut encoder = Encoder::new(&tokenizer, reward.model.lm.config().window());
    let mut done = 0;
    for table in tables {
        let mut own = None;
        let mut rows = table.peekable();
        while rows.peek().is_some() {
            let chunk = rows.by_ref().take(CHUNK).collect::<Result<Vec<Pair>>>()?;
            done += chunk.len() as u64;
            let chunk: Vec<Pair> = chunk
                .into_iter()
                .filter(|pair| {
                    !held_out.holds(&pair.post_id, Parts::parse(&pair.prompt).map_or("", |parts| parts.post))
                })
                .collect();
            let found = scores.next(ctx, chunk.len(), (done, total), || {
                let sequences = sequences(&chunk, &mut encoder, &mut own)?;
                score(&reward, &sequences.iter().collect::<Vec<_>>(), SCORED)
            })?;
            for (pair, [a, b]) in chunk.into_iter().zip(found.as_chunks::<2>().0) {
                judged.push(drawn.label(pair, *a, *b)?)?;
            }
            ctx.progress(done, total, "pairs", None);
        }
    }
    encoder.truncation.warn(ctx, "prompts as the reward model reads them");
    let LabelCounts { turned, first, certainty } = drawn.counts;
    let labelled = judged.count(Outcome::Labelled).max(1) as f64;
    ctx.metric("turned", turned as f64);
    ctx.metric("first_chosen", first as f64 / labelled);
    ctx.metric("mean_confidence", certainty / labelled);
    ctx.metric("held_out_dropped", held_out.dropped as f64);
    judged.finish(ctx)
}

/// Prompt and response of both sides of each pair. `own` is whether the table's ids are those of this tokenizer,
/// determined at the table's first row.
fn sequences(pairs: &[Pair], encoder: &mut Encoder<'_>, own: &mut Option<bool>) -> Result<Vec<Sequence>> {
    let mut sequences = Vec::with_capacity(2 * pairs.len());
    for pair in pairs {
        let text = |text, ids| Text { text, ids: Some(ids) };
        let prompt = text(&pair.prompt, &pair.prompt_ids);
        let own = *own.get_or_insert_with(|| encoder.made(prompt));
        sequences.push(encoder.row(&pair.post_id, prompt, text(&pair.a_text, &pair.a_ids), pair.a_ended, own)?);
        sequences.push(encoder.row(&pair.post_id, prompt, text(&pair.b_text, &pair.b_ids), pair.b_ended, own)?);
    }
    Ok(sequences)
}

/// Draws labels from scores.
struct LabelSampler<'a> {
    p: &'a Params,
    /// What the reward model's scores were divided by.
    scale: f64,
    noise: [u8; 32],
    labels: [u8; 32],
    counts: LabelCounts,
}

#[derive(Default)]
struct LabelCounts {
    /// Number of labels flipped by noise.
    turned: u64,
    /// Number of labels for the first summary of a pair.
    first: u64,
    /// Sum of the probabilities of the chosen summaries.
    certainty: f64,
}

impl LabelSampler<'_> {
    /// The draws depend only on the pair's content, so neither the order of rows or sides nor other rows change them.
    fn label(&mut self, pair: Pair, a: f32, b: f32) -> Result<Preference> {
        let difference = f64::from(a) - f64::from(b);
        if !difference.is_finite() {
            return Err(Error::user(format!("pair `{}`: the reward model scores it {a} and {b}", pair.id))
                .help("look at the training of the reward model at port `reward`"));
        }
        // Bradley-Terry's scores are those before normalisation.
        let probability = 1.0 / (1.0 + (-difference * self.scale).exp());
        let tie = difference.abs() <= self.p.tie;
        let (key, which) = PairKey::of(&pair.prompt, &pair.a_text, &pair.b_text);
        let mut first = match self.p.labels {
            Labels::Hard => difference > 0.0,
            // The draw must select the same text on either side.
            Labels::Sampled if which == Some(Which::High) => key.share(&self.labels) >= 1.0 - probability,
            Labels::Sampled => key.share(&self.labels) < probability,
        };
        if !tie && key.share(&self.noise) < self.p.label_noise {
            first = !first;
            self.counts.turned += 1;
        }
        let confidence = if first { probability } else { 1.0 - probability };
        if !tie {
            self.counts.first += u64::from(first);
            self.counts.certainty += confidence;
        }
        let side = if first || tie { Side::A } else { Side::B };
        let outcome = if tie { Outcome::Tie } else { Outcome::Labelled };
        Ok(Preference { confidence: Some(confidence), ..Preference::of(pair, side, outcome, "gold") })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;
    use crate::testing::toys;
    use crate::types::Split;

    fn drawn(p: &Params, seed: u8) -> LabelSampler<'_> {
        LabelSampler { p, scale: 1.0, noise: [seed; 32], labels: [seed + 1; 32], counts: LabelCounts::default() }
    }

    fn pairs(n: usize) -> Vec<Pair> {
        toys::pairs(n, Split::Proxy)
    }

    fn turned(pair: &Pair) -> Pair {
        Pair { a_text: pair.b_text.clone(), b_text: pair.a_text.clone(), ..pair.clone() }
    }

    #[test]
    fn sampled_labels_fall_as_often_as_bradley_and_terry_say() {
        let p = Params { labels: Labels::Sampled, ..Params::default() };
        let mut drawn = drawn(&p, 1);
        // sigmoid(1.2) = 0.7685
        let first = pairs(2000)
            .into_iter()
            .filter(|pair| drawn.label(pair.clone(), 1.7, 0.5).unwrap().chosen_text == pair.a_text);
        let share = first.count() as f64 / 2000.0;
        assert!((share - 0.7685).abs() < 0.03, "{share}");
        assert!((drawn.counts.first as f64 / 2000.0 - share).abs() < 1e-9);
    }

    #[test]
    fn noise_turns_a_quarter_of_the_labels_and_never_a_tie() {
        let p = Params { label_noise: 0.25, tie: 0.1, ..Params::default() };
        let mut drawn = drawn(&p, 2);
        for pair in pairs(2000) {
            let row = drawn.label(pair.clone(), 1.0, 0.0).unwrap();
            assert_eq!(row.confidence.unwrap() > 0.5, row.chosen_text == pair.a_text);
        }
        let turned = drawn.counts.turned as f64 / 2000.0;
        assert!((turned - 0.25).abs() < 0.03, "{turned}");
        for pair in pairs(50) {
            assert_eq!(drawn.label(pair, 0.05, 0.0).unwrap().outcome, Outcome::Tie);
        }
        assert!((drawn.counts.turned as f64 / 2000.0 - turned).abs() < 1e-9);
    }

    #[test]
    fn scores_that_are_no_numbers_are_an_error_that_names_the_pair() {
        let p = Params::default();
        for (a, b) in [(f32::NAN, 0.0), (0.0, f32::INFINITY), (f32::INFINITY, f32::INFINITY)] {
            let error = drawn(&p, 1).label(pairs(1).remove(0), a, b).unwrap_err();
            assert!(error.message.starts_with("pair `proxy0:toy`: the reward model scores it"), "{error}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn a_draw_depends_on_the_pair_alone(by in 0usize..40, flip in any::<bool>(), difference in -2.0f32..2.0) {
            let p = Params { labels: Labels::Sampled, label_noise: 0.3, ..Params::default() };
            let straight = pairs(40);
            let mut other = straight.clone();
            other.rotate_left(by);
            if flip {
                other = other.iter().map(turned).collect();
            }
            let chosen = |pairs: &[Pair]| -> BTreeMap<String, String> {
                let mut drawn = drawn(&p, 3);
                // A text's score does not depend on its side.
                let score = |text: &str| if text.starts_with("zzz") { 0.0 } else { difference };
                let label = |pair: &Pair| drawn.label(pair.clone(), score(&pair.a_text), score(&pair.b_text)).unwrap();
                pairs.iter().map(label).map(|row| (row.post_id, row.chosen_text)).collect()
            };
            prop_assert_eq!(chosen(&straight), chosen(&other));
        }
    }
}
