//! Token-by-token decoding on plain slices, with a key-value cache for each sequence.
//!
//! A step of a tiny model takes a millisecond, of which tensors, autograd graphs and allocations would be the larger
//! part. So buffers are allocated once, and a finished sequence leaves the batch without any copy.

mod packed_linear;
pub mod sample;
pub mod token_sampler;

use std::ops::Range;
use std::sync::Arc;

use rayon::prelude::*;
use temper_gemm::buffer::{CHUNK, for_each_chunk};
use temper_gemm::matmul::matmul_transposed_rhs;
use temper_gemm::simd::{LANES, add_assign, exp, fma, max, sum_map};
use temper_gemm::{Mat, PackedRhs, Rhs, Threads, WriteMode, matmul, simd};

use self::packed_linear::PackedLinear;
use crate::exec::train::attention::{self, AttentionShape};
use crate::exec::train::linear::OutputColumns;
use crate::exec::train::norm::{RowNorm, norm_heads};
use crate::exec::train::{Direction, LmHead, RotaryTable};
use crate::model::block::{Attention, Block};
use crate::model::transformer::Transformer;
use crate::tensor::candle_interop::CpuSlice;
use crate::{Precision, Result};

/// A block with its weights rounded or rearranged once.
type PackedBlock<'a> = Block<PackedLinear<'a>, RowNorm<CpuSlice<'a>>>;

/// The model's weights in memory, and how threads share the work.
pub(crate) struct Decoder<'a> {
    d: usize,
    vocab: usize,
    /// Sizes of one sequence, with `time` 0.
    size: AttentionShape,
    embedding: CpuSlice<'a>,
    positions: Option<CpuSlice<'a>>,
    blocks: Vec<PackedBlock<'a>>,
    norm: RowNorm<CpuSlice<'a>>,
    /// The output layer as stored, `[vocab, d]`.
    lm_head: CpuSlice<'a>,
    /// The output layer packed for matrix products, `[d, vocab]`; None in f32 if it is [`LARGE_LM_HEAD`].
    packed_lm_head: Option<PackedRhs>,
    lm_head_bias: Option<CpuSlice<'a>>,
    rotary: Option<RotaryTable>,
    /// `One` if groups of rows run in parallel, `Pool` if the work within a group does.
    pub threads: Threads,
}

/// From this many elements on, an f32 output layer gets no second, packed copy: for the few rows of a step it is read
/// from memory in either form, and in a small model with a large vocabulary it is most of the weights.
const LARGE_LM_HEAD: usize = 1 << 24;

/// The key-value cache of one sequence.
pub(crate) struct KvCache {
    /// Positions stored.
    len: usize,
    /// Capacity in positions, a multiple of `LANES`.
    capacity: usize,
    layers: Vec<LayerCache>,
    scores: Vec<f32>,
}

/// Keys and values of one layer. Each layer has its own allocation, which the allocator can reuse for a cache of
/// another size.
struct LayerCache {
    /// `[kv_head, capacity / LANES, width, LANES]`: a score is a sum over `width`, computed for `LANES` positions at
    /// once, and memory is read sequentially.
    keys: Vec<f32>,
    /// `[kv_head, capacity, width]`.
    values: Vec<f32>,
}

/// Buffers that every step reuses.
#[derive(Default)]
pub(crate) struct Workspace {
    x: Vec<f32>,
    h: Vec<f32>,
    qkv: Vec<f32>,
    attended: Vec<f32>,
    inner: Vec<f32>,
    active: Vec<f32>,
}

/// The first `len` elements, with arbitrary contents.
fn scratch_slice(buffer: &mut Vec<f32>, len: usize) -> &mut [f32] {
    if buffer.len() < len {
        buffer.resize(len, 0.0);
    }
    &mut buffer[..len]
}

impl<'a> Decoder<'a> {
    /// For sequences of at most `positions` tokens; `lm_head` is the model's. Errors: a tensor that is not contiguous
    /// f32.
    pub fn new(model: &'a Transformer, lm_head: &'a LmHead, positions: usize, threads: Threads) -> Result<Self> {
        let heads = model.architecture.block.attention.heads;
        let pack = |block: &'a Arc<Block>| -> Result<PackedBlock<'a>> {
            // The last block is asked separately for queries, and for keys and values: the first columns and the rest.
            let mut split = heads.columns(heads.query);
            block.parts().try_map(
                &mut split,
                |split, linear| {
                    let packed = PackedLinear::new(linear, model.precision, *split)?;
                    *split = split.saturating_sub(packed.d_out());
                    Ok(packed)
                },
                |_, norm| Ok(RowNorm::new(norm)?),
            )
        };
        let (vocab, d) = lm_head.weight.dims2()?;
        let weight = CpuSlice::new(&lm_head.weight)?;
        let is_packed = model.precision == Precision::Bf16 || vocab * d < LARGE_LM_HEAD;
        Ok(Self {
            d,
            vocab,
            size: AttentionShape {
                batch: 1,
                time: 0,
                heads: heads.query,
                kv_heads: heads.key_value,
                width: heads.width,
            },
            embedding: CpuSlice::new(&model.embedding)?,
            positions: model.positions.as_ref().map(CpuSlice::new).transpose()?,
            blocks: model.blocks.iter().map(pack).collect::<Result<_>>()?,
            norm: RowNorm::new(&model.norm)?,
            packed_lm_head: is_packed.then(|| PackedRhs::new(Mat::new(&weight, vocab, d).t(), None, model.precision)),
            lm_head: weight,
            lm_head_bias: lm_head.bias.as_ref().map(CpuSlice::new).transpose()?,
            rotary: model.rotary(positions),
            threads,
        })
    }

    /// An empty cache with capacity for `positions`.
    pub fn cache(&self, positions: usize) -> KvCache {
        let capacity = positions.next_multiple_of(LANES);
        let len = self.size.kv_heads * self.size.width * capacity;
        let layers = self.blocks.iter().map(|_| LayerCache { keys: vec![0.0; len], values: vec![0.0; len] }).collect();
        KvCache { len: 0, capacity, layers, scores: vec![0.0; capacity] }
    }

    /// Reads whole prompts into empty caches. Appends to `last` the state before the final norm at each prompt's last
    /// token, `[prompts, d]`.
    pub fn prefill(
        &self,
        caches: &mut [&mut KvCache],
        prompts: &[&[u32]],
        workspace: &mut Workspace,
        last: &mut Vec<f32>,
    ) {
        let n: usize = prompts.iter().map(|p| p.len()).sum();
        let (rows, d, size) = (prompts.len(), self.d, self.size);
        let (queries, keys, qkv_width) = (size.out_width(), size.kv_heads * size.width, size.qkv_width());
        let mut x = std::mem::take(&mut workspace.x);
        let x_all = scratch_slice(&mut x, n * d);
        let tokens = prompts.iter().flat_map(|p| p.iter().enumerate());
        for (x, (position, &id)) in x_all.chunks_exact_mut(d).zip(tokens) {
            self.embed(x, id, position);
        }
        let ends: Vec<usize> = prompts
            .iter()
            .scan(0, |end, p| {
                *end += p.len();
                Some(*end)
            })
            .collect();
        let positions = || prompts.iter().flat_map(|p| 0..p.len());
        let (last_block, blocks) = self.blocks.split_last().expect("a checked architecture has layers");
        for (l, block) in blocks.iter().enumerate() {
            self.norm_rows(scratch_slice(&mut workspace.h, n * d), x_all, &block.norm_1);
            let qkv = scratch_slice(&mut workspace.qkv, n * qkv_width);
            self.linear(qkv, &workspace.h[..n * d], &block.attention.qkv, 0..qkv_width);
            self.normalise_and_rotate(&block.attention, qkv, [queries, keys], qkv_width, positions());
            let attended = scratch_slice(&mut workspace.attended, n * queries);
            for ((cache, prompt), &end) in caches.iter_mut().zip(prompts).zip(&ends) {
                let start = end - prompt.len();
                let prompt_qkv = &qkv[start * qkv_width..end * qkv_width];
                let attended = &mut attended[start * queries..end * queries];
                for (t, token) in prompt_qkv.chunks_exact(qkv_width).enumerate() {
                    cache.store(self, l, t, &token[queries..]);
                }
                match self.threads {
                    // Not the parallel kernel: a thread that waits in it would start on another group.
                    Threads::One => {
                        let tokens = prompt_qkv.chunks_exact(qkv_width).zip(attended.chunks_exact_mut(queries));
                        for (t, (token, out)) in tokens.enumerate() {
                            cache.len = t + 1;
                            cache.attend(self, l, &token[..queries], out);
                        }
                    }
                    Threads::Pool => {
                        let size = AttentionShape { time: prompt.len(), ..size };
                        attended.copy_from_slice(&attention::forward(prompt_qkv, size));
                    }
                }
            }
            self.finish_block(block, x_all, n, workspace);
        }

        // The last layer's only later uses are its keys, its values and the state of each prompt's last token.
        let l = blocks.len();
        self.norm_rows(scratch_slice(&mut workspace.h, n * d), x_all, &last_block.norm_1);
        let kv_width = qkv_width - queries;
        let kv = scratch_slice(&mut workspace.qkv, n * kv_width);
        self.linear(kv, &workspace.h[..n * d], &last_block.attention.qkv, queries..qkv_width);
        self.normalise_and_rotate(&last_block.attention, kv, [0, keys], kv_width, positions());
        for ((cache, prompt), &end) in caches.iter_mut().zip(prompts).zip(&ends) {
            let start = end - prompt.len();
            for (t, token) in kv[start * kv_width..end * kv_width].chunks_exact(kv_width).enumerate() {
                cache.store(self, l, t, token);
            }
            cache.len = prompt.len();
        }
        for (i, end) in ends.iter().enumerate() {
            let last_token = (end - 1) * d..end * d;
            x_all.copy_within(last_token.clone(), i * d);
            workspace.h.copy_within(last_token, i * d);
        }
        let q = scratch_slice(&mut workspace.qkv, rows * queries);
        self.linear(q, &workspace.h[..rows * d], &last_block.attention.qkv, 0..queries);
        self.normalise_and_rotate(&last_block.attention, q, [queries, 0], queries, prompts.iter().map(|p| p.len() - 1));
        self.attend(caches, l, queries, rows, workspace);
        self.finish_block(last_block, &mut x_all[..rows * d], rows, workspace);
        last.extend_from_slice(&x_all[..rows * d]);
        workspace.x = x;
    }

    /// Appends one token to each sequence. `x` receives the states before the final norm, `[rows, d]`.
    pub fn step(&self, caches: &mut [&mut KvCache], tokens: &[u32], workspace: &mut Workspace, x: &mut Vec<f32>) {
        let (n, d, size) = (tokens.len(), self.d, self.size);
        let (queries, keys, qkv_width) = (size.out_width(), size.kv_heads * size.width, size.qkv_width());
        x.resize(n * d, 0.0);
        for ((x, cache), &id) in x.chunks_exact_mut(d).zip(caches.iter_mut()).zip(tokens) {
            self.embed(x, id, cache.len);
            cache.len += 1;
        }
        for (l, block) in self.blocks.iter().enumerate() {
            self.norm_rows(scratch_slice(&mut workspace.h, n * d), x, &block.norm_1);
            let qkv = scratch_slice(&mut workspace.qkv, n * qkv_width);
            self.linear(qkv, &workspace.h[..n * d], &block.attention.qkv, 0..qkv_width);
            let positions = caches.iter().map(|cache| cache.len - 1);
            self.normalise_and_rotate(&block.attention, qkv, [queries, keys], qkv_width, positions);
            self.attend(caches, l, qkv_width, n, workspace);
            self.finish_block(block, x, n, workspace);
        }
    }

    /// Logits of the next token from states before the final norm, `[rows, d]`: one slice of `vocab` elements per row.
    pub fn logits<'l>(
        &self,
        logits: &'l mut Vec<f32>,
        x: &[f32],
        workspace: &mut Workspace,
    ) -> impl Iterator<Item = &'l mut [f32]> + use<'l> {
        let (d, vocab) = (self.d, self.vocab);
        let n = x.len() / d;
        self.norm_rows(scratch_slice(&mut workspace.h, n * d), x, &self.norm);
        let out = scratch_slice(logits, n * vocab);
        let mut mode = WriteMode::Overwrite;
        if let Some(bias) = &self.lm_head_bias {
            out.chunks_exact_mut(vocab).for_each(|row| row.copy_from_slice(bias));
            mode = WriteMode::Add;
        }
        let h = Mat::new(&workspace.h, n, d);
        match &self.packed_lm_head {
            Some(lm_head) => matmul(out, mode, 1.0, h, Rhs::Packed(lm_head), self.threads),
            None => matmul_transposed_rhs(out, mode, 1.0, h, Mat::new(&self.lm_head, vocab, d), self.threads),
        }
        out.chunks_exact_mut(vocab)
    }

    fn embed(&self, x: &mut [f32], id: u32, position: usize) {
        let d = self.d;
        x.copy_from_slice(&self.embedding[id as usize * d..][..d]);
        if let Some(positions) = &self.positions {
            add_assign(x, &positions[position * d..][..d]);
        }
    }

    fn norm_rows(&self, y: &mut [f32], x: &[f32], norm: &RowNorm<CpuSlice>) {
        self.for_each_part(y, self.d, |start, y| norm.forward(y, &x[start..start + y.len()]));
    }

    /// Normalises heads if the block does, and rotates them for the rows' positions. Rows of `stride` begin with the
    /// given numbers of columns of queries and of keys.
    fn normalise_and_rotate(
        &self,
        attention: &Attention<PackedLinear, RowNorm<CpuSlice>>,
        rows: &mut [f32],
        [queries, keys]: [usize; 2],
        stride: usize,
        positions: impl Iterator<Item = usize>,
    ) {
        if let Some(norms) = &attention.qk_norm {
            norm_heads(norms, rows, stride, [queries, keys]);
        }
        let Some(rotary) = &self.rotary else { return };
        for (row, position) in rows.chunks_exact_mut(stride).zip(positions) {
            rotary.rotate(&mut row[..queries + keys], self.size.width, position, Direction::Forward);
        }
    }

    /// `out` = the given columns of the concatenated outputs of `linears` for `x [n, d]`.
    fn linear(&self, out: &mut [f32], x: &[f32], linears: &[PackedLinear], columns: Range<usize>) {
        let mut first = 0;
        for linear in linears {
            let from = columns.start.max(first).min(columns.end);
            let to = columns.end.min(first + linear.d_out()).max(from);
            if from < to {
                let destination = OutputColumns { stride: columns.len(), offset: from - columns.start };
                linear.apply(out, destination, WriteMode::Overwrite, x, from - first..to - first, self.threads);
            }
            first += linear.d_out();
        }
    }

    /// `x += linear(y)`.
    fn add_linear(&self, x: &mut [f32], y: &[f32], linear: &PackedLinear) {
        let d = self.d;
        linear.apply(x, OutputColumns { stride: d, offset: 0 }, WriteMode::Add, y, 0..d, self.threads);
    }

    /// The rest of a block after attention. Reads attention's output from `workspace.attended` and the output of
    /// `norm_1` from `workspace.h`.
    fn finish_block(&self, block: &PackedBlock, x: &mut [f32], n: usize, workspace: &mut Workspace) {
        let (d, inner, activation) = (self.d, block.mlp.down.d_in(), block.mlp.activation);
        self.add_linear(x, &workspace.attended[..n * self.size.out_width()], &block.attention.out);
        if let Some(norm_2) = &block.norm_2 {
            self.norm_rows(scratch_slice(&mut workspace.h, n * d), x, norm_2);
        }
        let input = activation.input_width(inner);
        let wide = scratch_slice(&mut workspace.inner, n * input);
        self.linear(wide, &workspace.h[..n * d], &block.mlp.up, 0..input);
        let active = scratch_slice(&mut workspace.active, n * inner);
        self.for_each_part(active, inner, |offset, y| {
            let (start, rows) = (offset / inner, y.len() / inner);
            activation.forward(y, &wide[start * input..(start + rows) * input], inner);
        });
        self.add_linear(x, active, &block.mlp.down);
    }

    /// Attention of one query per sequence over its cache. Each row of `workspace.qkv` has `stride` columns and begins
    /// with the query. Keys and values behind the query, if any, are first stored as those of the last position, by
    /// the thread that then reads them.
    fn attend(&self, caches: &mut [&mut KvCache], layer: usize, stride: usize, n: usize, workspace: &mut Workspace) {
        let queries = self.size.out_width();
        let attended = scratch_slice(&mut workspace.attended, n * queries);
        let rows = &workspace.qkv[..n * stride];
        let attend_one = |(cache, (out, row)): (&mut &mut KvCache, (&mut [f32], &[f32]))| {
            let (q, keys_and_values) = row.split_at(queries);
            if !keys_and_values.is_empty() {
                cache.store(self, layer, cache.len - 1, keys_and_values);
            }
            cache.attend(self, layer, q, out);
        };
        match self.threads {
            Threads::One => {
                caches
                    .iter_mut()
                    .zip(attended.chunks_exact_mut(queries).zip(rows.chunks_exact(stride)))
                    .for_each(attend_one);
            }
            Threads::Pool => {
                let rows = attended.par_chunks_exact_mut(queries).zip(rows.par_chunks_exact(stride));
                caches.par_iter_mut().zip(rows).for_each(attend_one);
            }
        }
    }

    /// Calls `f(index of its first element, part)` for parts of `out` whose lengths are multiples of `unit`.
    fn for_each_part(&self, out: &mut [f32], unit: usize, f: impl Fn(usize, &mut [f32]) + Sync) {
        match self.threads {
            Threads::One => f(0, out),
            Threads::Pool => for_each_chunk(out, (CHUNK / unit).max(1) * unit, f),
        }
    }
}

impl KvCache {
    /// Stores the keys and values of position `t`; `keys_and_values` holds them side by side.
    fn store(&mut self, decoder: &Decoder, layer: usize, t: usize, keys_and_values: &[f32]) {
        let (AttentionShape { kv_heads, width, .. }, capacity) = (decoder.size, self.capacity);
        let (keys, values) = keys_and_values.split_at(kv_heads * width);
        let block = width * capacity;
        let layer_cache = &mut self.layers[layer];
        for (h, (key, value)) in keys.chunks_exact(width).zip(values.chunks_exact(width)).enumerate() {
            let head_start = h * block;
            let lane = head_start + t / LANES * width * LANES + t % LANES;
            for (to, &k) in layer_cache.keys[lane..].iter_mut().step_by(LANES).zip(key) {
                *to = k;
            }
            layer_cache.values[head_start + t * width..][..width].copy_from_slice(value);
        }
    }

    /// Attention of the queries `q` over all stored positions; `q` and `out` are `[heads width]`.
    fn attend(&mut self, decoder: &Decoder, layer: usize, q: &[f32], out: &mut [f32]) {
        let AttentionShape { width, .. } = decoder.size;
        let block = width * self.capacity;
        let layer_cache = &self.layers[layer];
        let scale = 1.0 / (width as f32).sqrt();
        for (h, (q, out)) in q.chunks_exact(width).zip(out.chunks_exact_mut(width)).enumerate() {
            let head = h / decoder.size.queries_per_kv() * block;
            let (keys, values) = (&layer_cache.keys[head..head + block], &layer_cache.values[head..head + block]);
            attend_head(out, &mut self.scores, q, keys, values, self.len, scale);
        }
    }
}

simd! {
    /// Attention of one head over the first `len` positions: `q`, `out` `[width]`, `keys` `[capacity / LANES, width,
    /// LANES]`, `values` `[capacity, width]`. Loops use indices: an iterator call that is not inlined would keep the
    /// sums out of registers.
    fn attend_head(out: &mut [f32], scores: &mut [f32], q: &[f32], keys: &[f32], values: &[f32], len: usize, scale: f32) {
        let width = q.len();
        let (keys, _) = keys.as_chunks::<LANES>();
        let (blocks, _) = scores.as_chunks_mut::<LANES>();
        for b in 0..len.div_ceil(LANES) {
            let keys = &keys[b * width..][..width];
            let mut sums = [0f32; LANES];
            for i in 0..width {
                for j in 0..LANES {
                    sums[j] = fma::<FMA>(q[i], keys[i][j], sums[j]);
                }
            }
            for j in 0..LANES {
                blocks[b][j] = sums[j] * scale;
            }
        }
        // Scores of the last block beyond `len` are padding.
        let scores = &mut scores[..len];
        let m = max(scores);
        for s in scores.iter_mut() {
            *s = exp::<FMA>(*s - m);
        }
        let norm = 1.0 / sum_map(scores, |s| s);
        let mut first = 0;
        while first + 2 * LANES <= width {
            weighted_sum::<FMA, { 2 * LANES }>(out, scores, values, first, norm);
            first += 2 * LANES;
        }
        if first + LANES <= width {
            weighted_sum::<FMA, LANES>(out, scores, values, first, norm);
            first += LANES;
        }
        while first < width {
            weighted_sum::<FMA, 1>(out, scores, values, first, norm);
            first += 1;
        }
    }
}

/// `out[first .. first + N] = norm * sum_t scores_t values_t[first .. first + N]`, with rows of `values` as wide as
/// `out`. One pass over the rows for as many columns as fit into registers.
#[inline(always)]
fn weighted_sum<const FMA: bool, const N: usize>(
    out: &mut [f32],
    scores: &[f32],
    values: &[f32],
    first: usize,
    norm: f32,
) {
    let width = out.len();
    let mut sums = [0f32; N];
    for t in 0..scores.len() {
        let value = &values[t * width + first..][..N];
        for j in 0..N {
            sums[j] = fma::<FMA>(scores[t], value[j], sums[j]);
        }
    }
    let out = &mut out[first..][..N];
    for j in 0..N {
        out[j] = sums[j] * norm;
    }
}
