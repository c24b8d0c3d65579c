//! Token-by-token decoding on any device, with a key-value cache of fixed size. Prompts are padded on the left, so that
//! the next token has the same place in every row.

use candle_core::{DType, Device, Result as TensorResult, Tensor};

use super::{HIDDEN, attend, embedding, finish_block, linear_group, logits, norm, split_heads};
use crate::exec::decode::token_sampler::{SampleOptions, TokenSampler};
use crate::exec::train::BlockPass;
use crate::model::transformer::Transformer;
use crate::{CounterRng, Error, Result, SampledResponse};

/// Keys and values of one layer, `[rows, kv_heads, capacity, width]` each.
struct LayerCache {
    keys: Tensor,
    values: Tensor,
}

/// The state of a batch of sequences.
struct Decoding<'a> {
    model: &'a Transformer,
    device: &'a Device,
    caches: Vec<LayerCache>,
    /// Columns of padding before each prompt.
    padding: Vec<usize>,
    /// Columns stored.
    len: usize,
    /// Cosines and sines of every position, `[positions, pairs]` each.
    rotary: Option<(Tensor, Tensor)>,
}

/// The responses to `prompts`, as [`crate::sample`] gives them; `first` is the offset of `prompts` in the caller's
/// batch.
pub(crate) fn generate(
    model: &Transformer,
    prompts: &[&[u32]],
    options: &SampleOptions,
    rng: &CounterRng,
    rows: &[u64],
    first: usize,
) -> Result<Vec<SampledResponse>> {
    let device = crate::tensor::device::device();
    let longest = prompts.iter().map(|prompt| prompt.len()).max().unwrap_or(0);
    let mut decoding = Decoding::new(model, prompts, longest + options.max_new_tokens, &device)?;
    let mut out = vec![SampledResponse { ids: vec![], logprobs: vec![], ended: false }; prompts.len()];
    let mut sampler = TokenSampler::new(options);
    let padded: Vec<u32> = prompts
        .iter()
        .flat_map(|prompt| std::iter::repeat_n(0, longest - prompt.len()).chain(prompt.iter().copied()))
        .collect();
    let mut logits = decoding.step(&padded, longest)?;
    for step in 0..options.max_new_tokens {
        // Rows that have ended go on with an id that nobody reads.
        let mut ids = vec![0; prompts.len()];
        for (i, (response, logits)) in out.iter_mut().zip(&mut logits).enumerate() {
            if response.ended {
                continue;
            }
            let sampled = sampler.sample(logits, step, rng.uniform(rows[i], step as u32));
            let (id, logprob) = sampled.ok_or_else(|| Error::NonFinite {
                quantity: format!("the distribution of token {step} of response {} of the batch", first + i + 1),
            })?;
            response.ids.push(id);
            response.logprobs.push(logprob);
            response.ended = options.eos.contains(id);
            ids[i] = id;
        }
        if step + 1 == options.max_new_tokens || out.iter().all(|response| response.ended) {
            break;
        }
        logits = decoding.step(&ids, 1)?;
    }
    Ok(out)
}

impl<'a> Decoding<'a> {
    fn new(model: &'a Transformer, prompts: &[&[u32]], capacity: usize, device: &'a Device) -> TensorResult<Self> {
        let (architecture, rows) = (&model.architecture, prompts.len());
        let longest = prompts.iter().map(|prompt| prompt.len()).max().unwrap_or(0);
        let heads = architecture.block.attention.heads;
        let shape = (rows, heads.key_value, capacity, heads.width);
        let cache = |_| Tensor::zeros(shape, DType::F32, device);
        let caches = (0..architecture.layers).map(|i| Ok(LayerCache { keys: cache(i)?, values: cache(i)? }));
        let rotary = model.rotary(capacity).map(|rotary| rotary.tables(0..capacity, device));
        Ok(Self {
            model,
            device,
            caches: caches.collect::<TensorResult<_>>()?,
            padding: prompts.iter().map(|prompt| longest - prompt.len()).collect(),
            len: 0,
            rotary: rotary.transpose()?,
        })
    }

    /// Appends `columns` tokens to each row, `ids [rows, columns]`; returns the logits that follow each row's last one.
    fn step(&mut self, ids: &[u32], columns: usize) -> TensorResult<Vec<Vec<f32>>> {
        let (model, rows, at) = (self.model, self.padding.len(), self.len);
        let positions: Vec<u32> = self
            .padding
            .iter()
            .flat_map(|padding| (at..at + columns).map(move |column| column.saturating_sub(*padding) as u32))
            .collect();
        let positions = Tensor::from_vec(positions, rows * columns, self.device)?;
        let mut x = embedding(&Tensor::from_slice(ids, rows * columns, self.device)?, &model.embedding)?;
        if let Some(table) = &model.positions {
            x = (x + table.index_select(&positions, 0)?)?;
        }
        let angles = match &self.rotary {
            Some((cos, sin)) => {
                let of = |table: &Tensor| table.index_select(&positions, 0)?.reshape((rows, 1, columns, ()));
                Some((of(cos)?, of(sin)?))
            }
            None => None,
        };
        let (mask, pass) = (self.mask(columns)?, BlockPass::new(columns, model.precision));
        for (block, cache) in model.blocks.iter().zip(&self.caches) {
            let (attention, mut masks) = (&block.attention, pass.adapter_masks());
            let h = norm(&x, &block.norm_1)?;
            let qkv = linear_group(&attention.qkv, &h, &mut masks, pass.precision)?;
            let [q, k, v] = split_heads(&qkv, columns, attention, angles.as_ref())?;
            cache.keys.slice_set(&k.contiguous()?, 2, at)?;
            cache.values.slice_set(&v, 2, at)?;
            let stored = |cache: &Tensor| cache.narrow(2, 0, at + columns);
            let attended = attend(&q, &stored(&cache.keys)?, &stored(&cache.values)?, &mask, attention.heads)?;
            x = finish_block(&x, h, &attended, block, &pass, &mut masks)?;
        }
        self.len += columns;
        let last = x.reshape((rows, columns, ()))?.narrow(1, columns - 1, 1)?.squeeze(1)?.contiguous()?;
        logits(&norm(&last, &model.norm)?, &model.lm_head())?.to_vec2()
    }

    /// The mask of the next `columns` queries: `[rows, 1, columns, stored + columns]`.
    fn mask(&self, columns: usize) -> TensorResult<Tensor> {
        let (rows, stored) = (self.padding.len(), self.len + columns);
        let mut mask = Vec::with_capacity(rows * columns * stored);
        for padding in &self.padding {
            for query in self.len..stored {
                mask.extend((0..stored).map(|key| if key < *padding || key > query { HIDDEN } else { 0.0 }));
            }
        }
        Tensor::from_vec(mask, (rows, 1, columns, stored), self.device)
    }
}
