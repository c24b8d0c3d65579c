//! Sampling responses from a model.

use rayon::prelude::*;

use crate::decode::{Cache, Decoder, Export, Work};
use crate::kernels::gemm::Threads;
use crate::pick::Picker;
use crate::threads::in_pool;
use crate::{CausalLm, Draws, Eos, Error, Result, stats};

/// Sampling settings.
#[derive(Debug, Clone, PartialEq)]
pub struct SampleOptions {
    /// Divides the logits before sampling; above 0.
    pub temperature: f64,
    /// Restricts sampling to the fewest most probable tokens that together reach this probability; in (0, 1], 1 is off.
    pub top_p: f64,
    /// The first `min_new_tokens` tokens cannot be EOS.
    pub min_new_tokens: usize,
    pub max_new_tokens: usize,
    /// Any of these ids ends a response.
    pub eos: Eos,
    /// Take the most probable token (the smallest id among equals) instead of drawing.
    pub greedy: bool,
}

/// One response.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampled {
    /// Includes EOS if it was sampled.
    pub ids: Vec<u32>,
    /// log p of each id at temperature 1 over the whole vocabulary, EOS masked before the minimum, in nats.
    pub logprobs: Vec<f32>,
    /// Whether EOS was sampled.
    pub ended: bool,
}

/// Samples one response per prompt. The token at position t of the response to prompt i is a function of
/// `draws.uniform(rows[i], t)` and the distribution there, so that neither the batch nor the number of threads matters;
/// another batch may change the distribution by rounding errors. Errors: an empty prompt, ids above the vocabulary, a
/// prompt that leaves no room for `max_new_tokens` in the model's window, logits that are not finite.
pub fn sample(
    lm: &CausalLm,
    prompts: &[&[u32]],
    o: &SampleOptions,
    draws: &Draws,
    rows: &[u64],
) -> Result<Vec<Sampled>> {
    check(lm, prompts, o, rows)?;
    if o.max_new_tokens == 0 {
        return Ok(prompts.iter().map(|_| Sampled { ids: vec![], logprobs: vec![], ended: false }).collect());
    }
    let model = lm.frozen();
    let longest = prompts.iter().map(|p| p.len()).max().unwrap_or(0) + o.max_new_tokens;
    let export = Export::of(model.net(), longest)?;
    let plan = Plan::of(lm, prompts.len(), longest);
    let decoder = Decoder::new(&export, plan.threads);
    let group = |(n, (prompts, rows)): (usize, (&[&[u32]], &[u64]))| {
        generate(&decoder, prompts, o, draws, rows, n * plan.rows, plan.prefill_tokens)
    };
    let groups: Vec<Vec<Sampled>> = match plan.threads {
        Threads::One => {
            let chunks = prompts.par_chunks(plan.rows).zip(rows.par_chunks(plan.rows));
            chunks.enumerate().map(group).collect::<Result<_>>()?
        }
        Threads::Pool => {
            let chunks = prompts.chunks(plan.rows).zip(rows.chunks(plan.rows));
            chunks.enumerate().map(group).collect::<Result<_>>()?
        }
    };
    Ok(groups.into_iter().flatten().collect())
}

fn check(lm: &CausalLm, prompts: &[&[u32]], o: &SampleOptions, rows: &[u64]) -> Result<()> {
    let (vocab, window) = (lm.config().vocab_size(), lm.config().window());
    let bad = |what: String| Err(Error::input(what));
    if rows.len() != prompts.len() {
        return bad(format!("{} prompts and {} row numbers to sample for", prompts.len(), rows.len()));
    }
    if !(o.temperature > 0.0 && o.temperature.is_finite()) {
        return bad(format!("temperature {}; expected a positive number", o.temperature));
    }
    if !(o.top_p > 0.0 && o.top_p <= 1.0) {
        return bad(format!("top_p {}; expected above 0 and at most 1", o.top_p));
    }
    stats::check_eos(&o.eos, vocab)?;
    if vocab <= o.eos.ids().len() {
        return bad(format!("a vocabulary of {vocab} has nothing but EOS to sample"));
    }
    for (i, prompt) in prompts.iter().enumerate() {
        if prompt.is_empty() {
            return bad(format!("prompt {i} is empty"));
        }
        if let Some(id) = prompt.iter().find(|&&id| id as usize >= vocab) {
            return bad(format!("prompt {i} holds id {id}; the model's vocabulary is {vocab}"));
        }
        let needed = prompt.len().saturating_add(o.max_new_tokens);
        if needed > window {
            let (n, new) = (prompt.len(), o.max_new_tokens);
            return bad(format!("prompt {i} of {n} tokens and {new} new ones; the model has {window} positions"));
        }
    }
    Ok(())
}

/// How rows are grouped. Depends on shapes alone, so that the number of threads changes nothing.
struct Plan {
    /// Sequences decoded together.
    rows: usize,
    /// Prompt tokens read in one prefill.
    prefill_tokens: usize,
    threads: Threads,
}

impl Plan {
    /// For `n` sequences of at most `positions` tokens, in groups of about equal size.
    fn of(lm: &CausalLm, n: usize, positions: usize) -> Self {
        let even = |most: usize| n.div_ceil(n.div_ceil(most).max(1)).max(1);
        /// Bytes of a layer's weights that leave room for activations in a core's L2 cache.
        const SMALL_LAYER: usize = 2 << 20;
        const CACHE_BYTES: usize = 512 << 20;
        let spec = &lm.net().spec;
        if 4 * spec.layer_weights() <= SMALL_LAYER {
            // Each thread takes whole groups: no step ever waits for another thread.
            return Self { rows: even(32), prefill_tokens: 512, threads: Threads::One };
        }
        let row_bytes = 8 * spec.heads.key_value * spec.heads.width * spec.layers * positions;
        let most = (CACHE_BYTES / row_bytes.max(1)).clamp(16, 64);
        Self { rows: even(most), prefill_tokens: 512, threads: Threads::Pool }
    }
}

/// A sequence that has not ended.
struct Live {
    /// Index in the group.
    at: usize,
    /// Row number for [`Draws`].
    row: u64,
    cache: Cache,
}

/// The responses to a group of prompts; `first` is the group's offset in the batch.
fn generate(
    decoder: &Decoder,
    prompts: &[&[u32]],
    o: &SampleOptions,
    draws: &Draws,
    rows: &[u64],
    first: usize,
    prefill_tokens: usize,
) -> Result<Vec<Sampled>> {
    let start = |at: usize| Live { at, row: rows[at], cache: decoder.cache(prompts[at].len() + o.max_new_tokens) };
    let mut live: Vec<Live> = match decoder.threads {
        Threads::One => (0..prompts.len()).map(start).collect(),
        // In parallel, because the first access to new memory waits until the system has cleared it.
        Threads::Pool => (0..prompts.len()).into_par_iter().map(start).collect(),
    };
    let (mut work, mut states, mut logits) = (Work::default(), Vec::new(), Vec::new());
    let mut start = 0;
    while start < prompts.len() {
        let mut end = start + 1;
        let mut tokens = prompts[start].len();
        while end < prompts.len() && tokens + prompts[end].len() <= prefill_tokens {
            tokens += prompts[end].len();
            end += 1;
        }
        let mut caches: Vec<&mut Cache> = live[start..end].iter_mut().map(|l| &mut l.cache).collect();
        in_pool(|| decoder.prefill(&mut caches, &prompts[start..end], &mut work, &mut states));
        start = end;
    }

    let mut out = vec![Sampled { ids: vec![], logprobs: vec![], ended: false }; prompts.len()];
    let mut picker = Picker::new(o);
    let mut tokens = Vec::with_capacity(prompts.len());
    let mut next = |step: usize| -> Result<bool> {
        tokens.clear();
        let pick = |picker: &mut Picker, (live, logits): (&Live, &mut [f32])| {
            picker.pick(logits, step, draws.uniform(live.row, step as u32))
        };
        let rows = live.iter().zip(decoder.logits(&mut logits, &states, &mut work));
        let picked: Vec<_> = match decoder.threads {
            Threads::One => rows.map(|row| pick(&mut picker, row)).collect(),
            Threads::Pool => {
                let rows: Vec<_> = rows.collect();
                rows.into_par_iter().map_init(|| Picker::new(o), pick).collect()
            }
        };
        for (live, picked) in live.iter().zip(picked) {
            let (id, logprob) = picked.ok_or_else(|| Error::NonFinite {
                what: format!("the distribution of token {step} of response {} of the batch", first + live.at + 1),
            })?;
            let sampled = &mut out[live.at];
            sampled.ids.push(id);
            sampled.logprobs.push(logprob);
            sampled.ended = o.eos.contains(id);
            tokens.push(id);
        }
        let mut ids = tokens.iter();
        live.retain(|_| ids.next().is_some_and(|&id| !o.eos.contains(id)));
        tokens.retain(|&id| !o.eos.contains(id));
        let goes_on = !live.is_empty() && step + 1 < o.max_new_tokens;
        if goes_on {
            let mut caches: Vec<&mut Cache> = live.iter_mut().map(|l| &mut l.cache).collect();
            decoder.step(&mut caches, &tokens, &mut work, &mut states);
        }
        Ok(goes_on)
    };
    let mut step = 0;
    while in_pool(|| next(step))? {
        step += 1;
    }
    Ok(out)
}
