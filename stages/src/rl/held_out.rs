//! Samples held-out prompts during RL for `evaluate` to judge. Never sees the gold model.

use engine::error::Result;
use lm::{CounterRng, SampleOptions, Sequence, StatOptions};

use super::rollout::{score_members, score_tokens};
use super::update::Learner;
use crate::error::named;
use crate::reward::LoadedReward;
use crate::stats::{mean, variance};
use crate::types::{Half, Sample};

/// A held-out prompt.
pub struct Prompt {
    pub post_id: String,
    pub ids: Vec<u32>,
}

impl Prompt {
    /// Half of the validation set that contains the prompt: half A chooses the best step, half B gives the reported
    /// numbers.
    pub fn half(&self) -> Half {
        if blake3::hash(self.post_id.as_bytes()).as_bytes()[0] & 1 == 0 { Half::A } else { Half::B }
    }

    /// Row number for the evaluation's generator: derived from the post id, so that arm, step and order do not change
    /// the draws.
    fn row(&self) -> u64 {
        let hash = blake3::derive_key("temper evaluation row v1", self.post_id.as_bytes());
        u64::from_le_bytes(hash[..8].try_into().expect("eight of 32 bytes"))
    }
}

/// Everything that stays constant over a run's evaluations.
pub struct HeldOut<'a> {
    pub prompts: Vec<Prompt>,
    pub members: &'a [LoadedReward],
    /// Maps `[members][responses]` scores to the arm's own reward of each response.
    pub proxy: &'a dyn Fn(&[Vec<f64>]) -> Vec<f64>,
    pub sampling: SampleOptions,
    pub stats: StatOptions,
    pub draws: CounterRng,
    pub tokenizer: &'a lm::Tokenizer,
}

impl HeldOut<'_> {
    /// Draws one response per prompt from the current policy and scores it with every member.
    pub fn samples(&self, learner: &Learner, step: i64, greedy: bool, batch: usize) -> Result<Vec<Sample>> {
        let policy = learner.policy.frozen();
        let options = SampleOptions { greedy, ..self.sampling.clone() };
        let mut sequences = Vec::with_capacity(self.prompts.len());
        let mut ended = Vec::with_capacity(self.prompts.len());
        for chunk in self.prompts.chunks(batch) {
            let ids: Vec<&[u32]> = chunk.iter().map(|p| p.ids.as_slice()).collect();
            let rows: Vec<u64> = chunk.iter().map(Prompt::row).collect();
            let posts = || named("posts", chunk.iter().map(|p| &p.post_id));
            let sampled = learner.told(lm::sample(&policy, &ids, &options, &self.draws, &rows), posts)?;
            for (prompt, sample) in chunk.iter().zip(sampled) {
                sequences.push(Sequence { prompt: prompt.ids.clone(), response: sample.ids });
                ended.push(sample.ended);
            }
        }
        let scored = score_tokens(&learner.policy, None, &learner.reference, &sequences, &self.stats, batch)?;
        let scores = score_members(self.members, &sequences, batch)?;
        let proxy = (self.proxy)(&scores);
        Ok(self
            .prompts
            .iter()
            .zip(sequences)
            .enumerate()
            .map(|(i, (prompt, sequence))| {
                let phi: Vec<f64> = scores.iter().map(|member| member[i]).collect();
                Sample {
                    step,
                    post_id: prompt.post_id.clone(),
                    half: prompt.half(),
                    greedy,
                    text: self.tokenizer.decode(&sequence.response).trim().to_owned(),
                    ids: sequence.response,
                    ended: ended[i],
                    logp: scored.logprob[i].iter().sum(),
                    logp_ref: scored.reference[i].iter().sum(),
                    kl_exact: scored.divergence[i].iter().sum(),
                    scores: phi.iter().map(|&s| s as f32).collect(),
                    proxy: proxy[i],
                    mean: mean(&phi),
                    variance: (phi.len() > 1).then(|| variance(&phi)),
                }
            })
            .collect())
    }
}
