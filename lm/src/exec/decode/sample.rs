//! Sampling responses from a model.

use rayon::prelude::*;
use temper_gemm::Threads;

use crate::exec::decode::token_sampler::{SampleOptions, TokenSampler};
use crate::exec::decode::{Decoder, KvCache, Workspace};
use crate::exec::portable;
use crate::model::architecture::Architecture;
use crate::tensor::device::is_portable;
use crate::tensor::threads::in_pool;
use crate::{CausalLm, CounterRng, Error, Result, token_stats};

/// One response.
#[derive(Debug, Clone, PartialEq)]
pub struct SampledResponse {
    /// Includes EOS if it was sampled.
    pub ids: Vec<u32>,
    /// log p of each id at temperature 1 over the whole vocabulary, EOS masked before the minimum, in nats.
    pub logprobs: Vec<f32>,
    /// Whether EOS was sampled.
    pub ended: bool,
}

/// Samples one response per prompt. The token at position t of the response to prompt i is a function of
/// `rng.uniform(rows[i], t)` and the distribution there, so that neither the batch nor the number of threads matters;
/// another batch may change the distribution by rounding errors. Errors: an empty prompt, ids above the vocabulary, a
/// prompt that leaves no room for `max_new_tokens` in the model's window, logits that are not finite.
pub fn sample(
    lm: &CausalLm,
    prompts: &[&[u32]],
    options: &SampleOptions,
    rng: &CounterRng,
    rows: &[u64],
) -> Result<Vec<SampledResponse>> {
    check(lm, prompts, options, rows)?;
    if options.max_new_tokens == 0 {
        return Ok(prompts.iter().map(|_| SampledResponse { ids: vec![], logprobs: vec![], ended: false }).collect());
    }
    let model = lm.frozen();
    let longest = prompts.iter().map(|p| p.len()).max().unwrap_or(0) + options.max_new_tokens;
    if is_portable() {
        let together = portable_rows(lm, longest);
        let chunks = prompts.chunks(together).zip(rows.chunks(together)).enumerate();
        let groups = chunks.map(|(n, (prompts, rows))| {
            in_pool(|| portable::generate(model.transformer(), prompts, options, rng, rows, n * together))
        });
        return Ok(groups.collect::<Result<Vec<_>>>()?.concat());
    }
    let lm_head = model.transformer().lm_head();
    let plan = SamplingPlan::new(&model.transformer().architecture, prompts.len(), longest);
    let decoder = Decoder::new(model.transformer(), &lm_head, longest, plan.threads)?;
    let group = |(n, (prompts, rows)): (usize, (&[&[u32]], &[u64]))| {
        generate(&decoder, prompts, options, rng, rows, n * plan.rows, plan.prefill_tokens)
    };
    let groups: Vec<Vec<SampledResponse>> = match plan.threads {
        Threads::One => {
            let chunks = prompts.par_chunks(plan.rows).zip(rows.par_chunks(plan.rows)).enumerate();
            in_pool(|| chunks.map(group).collect::<Result<_>>())?
        }
        Threads::Pool => {
            let chunks = prompts.chunks(plan.rows).zip(rows.chunks(plan.rows));
            chunks.enumerate().map(group).collect::<Result<_>>()?
        }
    };
    Ok(groups.into_iter().flatten().collect())
}

fn check(lm: &CausalLm, prompts: &[&[u32]], options: &SampleOptions, rows: &[u64]) -> Result<()> {
    let (vocab, window) = (lm.config().vocab_size(), lm.config().window());
    let invalid = |message: String| Err(Error::input(message));
    if rows.len() != prompts.len() {
        return invalid(format!("got {} prompts but {} row numbers", prompts.len(), rows.len()));
    }
    if !(options.temperature > 0.0 && options.temperature.is_finite()) {
        return invalid(format!("temperature is {}, expected a positive number", options.temperature));
    }
    if !(options.top_p > 0.0 && options.top_p <= 1.0) {
        return invalid(format!("top_p is {}, expected above 0 and at most 1", options.top_p));
    }
    token_stats::check_eos(&options.eos, vocab)?;
    if vocab <= options.eos.ids().len() {
        return invalid(format!("all {vocab} tokens of the vocabulary are EOS, so there is nothing to sample"));
    }
    for (i, prompt) in prompts.iter().enumerate() {
        if prompt.is_empty() {
            return invalid(format!("prompt {i} is empty"));
        }
        if let Some(id) = prompt.iter().find(|&&id| id as usize >= vocab) {
            return invalid(format!("prompt {i} has id {id}, which is not below the model's vocabulary of {vocab}"));
        }
        let needed = prompt.len().saturating_add(options.max_new_tokens);
        if needed > window {
            let (n, new) = (prompt.len(), options.max_new_tokens);
            return invalid(format!(
                "prompt {i} needs {n} tokens and {new} new ones, but the model has {window} positions"
            ));
        }
    }
    Ok(())
}

/// Sequences of at most `positions` tokens that are decoded together on a device. Depends on shapes alone.
fn portable_rows(lm: &CausalLm, positions: usize) -> usize {
    /// Memory for keys and values, and for the attention scores of a layer.
    const BYTES: usize = 2 << 30;
    let architecture = &lm.transformer().architecture;
    // The scores, the mask and two intermediate results of the softmax.
    let scores = 16 * architecture.block.attention.heads.query * positions * positions;
    (BYTES / (architecture.cache_bytes(positions) + scores).max(1)).clamp(1, 64)
}

/// How rows are grouped. Depends on shapes alone, so that the number of threads changes nothing.
pub struct SamplingPlan {
    /// Sequences decoded together.
    pub rows: usize,
    /// Prompt tokens read in one prefill.
    prefill_tokens: usize,
    /// `One`: each thread decodes a group of its own.
    pub threads: Threads,
}

impl SamplingPlan {
    /// For `n` sequences of at most `positions` tokens, in groups of about equal size.
    pub fn new(architecture: &Architecture, n: usize, positions: usize) -> Self {
        let even_rows = |max_rows: usize| n.div_ceil(n.div_ceil(max_rows).max(1)).max(1);
        /// Bytes of a layer's weights that leave room for activations in a core's L2 cache.
        const SMALL_LAYER: usize = 2 << 20;
        const CACHE_BYTES: usize = 512 << 20;
        if architecture.weights_per_block() <= SMALL_LAYER / 4 {
            // Each thread takes whole groups: no step ever waits for another thread.
            return Self { rows: even_rows(32), prefill_tokens: 512, threads: Threads::One };
        }
        let max_rows = (CACHE_BYTES / architecture.cache_bytes(positions).max(1)).clamp(16, 64);
        Self { rows: even_rows(max_rows), prefill_tokens: 512, threads: Threads::Pool }
    }
}

/// A sequence that has not ended.
struct ActiveSequence {
    /// Index in the group.
    index: usize,
    /// Row number for [`CounterRng`].
    row: u64,
    cache: KvCache,
}

/// The responses to a group of prompts; `first` is the group's offset in the batch.
fn generate(
    decoder: &Decoder,
    prompts: &[&[u32]],
    options: &SampleOptions,
    rng: &CounterRng,
    rows: &[u64],
    first: usize,
    prefill_tokens: usize,
) -> Result<Vec<SampledResponse>> {
    let new_sequence = |index: usize| ActiveSequence {
        index,
        row: rows[index],
        cache: decoder.cache(prompts[index].len() + options.max_new_tokens),
    };
    let mut active: Vec<ActiveSequence> = match decoder.threads {
        Threads::One => (0..prompts.len()).map(new_sequence).collect(),
        // In parallel, because the first access to new memory waits until the system has cleared it.
        Threads::Pool => (0..prompts.len()).into_par_iter().map(new_sequence).collect(),
    };
    let (mut workspace, mut states, mut logits) = (Workspace::default(), Vec::new(), Vec::new());
    let mut start = 0;
    while start < prompts.len() {
        let mut end = start + 1;
        let mut tokens = prompts[start].len();
        while end < prompts.len() && tokens + prompts[end].len() <= prefill_tokens {
            tokens += prompts[end].len();
            end += 1;
        }
        let mut caches: Vec<&mut KvCache> = active[start..end].iter_mut().map(|sequence| &mut sequence.cache).collect();
        in_pool(|| decoder.prefill(&mut caches, &prompts[start..end], &mut workspace, &mut states));
        start = end;
    }

    let mut out = vec![SampledResponse { ids: vec![], logprobs: vec![], ended: false }; prompts.len()];
    let mut sampler = TokenSampler::new(options);
    let mut tokens = Vec::with_capacity(prompts.len());
    let mut run_step = |step: usize| -> Result<bool> {
        tokens.clear();
        let sample_token = |sampler: &mut TokenSampler, (sequence, logits): (&ActiveSequence, &mut [f32])| {
            sampler.sample(logits, step, rng.uniform(sequence.row, step as u32))
        };
        let rows = active.iter().zip(decoder.logits(&mut logits, &states, &mut workspace));
        let sampled_tokens: Vec<_> = match decoder.threads {
            Threads::One => rows.map(|row| sample_token(&mut sampler, row)).collect(),
            Threads::Pool => {
                let rows: Vec<_> = rows.collect();
                rows.into_par_iter().map_init(|| TokenSampler::new(options), sample_token).collect()
            }
        };
        for (sequence, token) in active.iter().zip(sampled_tokens) {
            let (id, logprob) = token.ok_or_else(|| Error::NonFinite {
                quantity: format!(
                    "the distribution of token {step} of response {} of the batch",
                    first + sequence.index + 1
                ),
            })?;
            let response = &mut out[sequence.index];
            response.ids.push(id);
            response.logprobs.push(logprob);
            response.ended = options.eos.contains(id);
            tokens.push(id);
        }
        let mut ids = tokens.iter();
        active.retain(|_| ids.next().is_some_and(|&id| !options.eos.contains(id)));
        tokens.retain(|&id| !options.eos.contains(id));
        let continues = !active.is_empty() && step + 1 < options.max_new_tokens;
        if continues {
            let mut caches: Vec<&mut KvCache> = active.iter_mut().map(|sequence| &mut sequence.cache).collect();
            decoder.step(&mut caches, &tokens, &mut workspace, &mut states);
        }
        Ok(continues)
    };
    let mut step = 0;
    while in_pool(|| run_step(step))? {
        step += 1;
    }
    Ok(out)
}
