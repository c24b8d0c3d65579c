//! Token-by-token decoding on plain slices, with a key-value cache for each sequence.
//!
//! A step of a tiny model takes a millisecond, of which tensors, autograd graphs and allocations would be the larger
//! part. So buffers are allocated once, and a finished sequence leaves the batch without any copy.

mod affine;
mod export;

use std::ops::Range;

use rayon::prelude::*;

use self::affine::Affine;
pub(crate) use self::export::Export;
use self::export::Pair;
use crate::kernels::attention::{self, Size};
use crate::kernels::buffer::{CHUNK, for_each_chunk};
use crate::kernels::gemm::{WriteMode, Mat, Threads};
use crate::kernels::norm::RowNorm;
use crate::kernels::matmul::{Rhs, PackedRhs, multiply, matmul_transposed_rhs};
use crate::kernels::linear::At;
use crate::kernels::rotary::{Rotary, Direction};
use crate::kernels::simd::{LANES, add_assign, exp, fma, max, simd, sum_map};
use crate::spec::Spec;

struct Layer<'a> {
    norm_1: RowNorm<'a>,
    qkv: &'a [Affine<'a>],
    attn_out: &'a Affine<'a>,
    norm_2: Option<RowNorm<'a>>,
    up: &'a [Affine<'a>],
    down: &'a Affine<'a>,
}

/// The model's weights as slices, and how threads share the work.
pub(crate) struct Decoder<'a> {
    spec: &'a Spec,
    /// Sizes of one sequence, with `time` 0.
    size: Size,
    embedding: &'a [f32],
    positions: Option<&'a [f32]>,
    output: &'a [f32],
    table: Option<&'a PackedRhs>,
    output_bias: Option<&'a [f32]>,
    rotary: Option<&'a Rotary>,
    layers: Vec<Layer<'a>>,
    norm: RowNorm<'a>,
    /// `One` if groups of rows run in parallel, `Pool` if the work within a group does.
    pub threads: Threads,
}

/// The key-value cache of one sequence.
pub(crate) struct Cache {
    /// Positions stored.
    len: usize,
    /// Capacity in positions, a multiple of `LANES`.
    capacity: usize,
    layers: Vec<Held>,
    scores: Vec<f32>,
}

/// Keys and values of one layer. Each layer has its own allocation, which the allocator can reuse for a cache of
/// another size.
struct Held {
    /// `[kv_head, capacity / LANES, width, LANES]`: a score is a sum over `width`, computed for `LANES` positions at
    /// once, and memory is read sequentially.
    keys: Vec<f32>,
    /// `[kv_head, capacity, width]`.
    values: Vec<f32>,
}

/// Buffers that every step reuses.
#[derive(Default)]
pub(crate) struct Work {
    x: Vec<f32>,
    h: Vec<f32>,
    qkv: Vec<f32>,
    mixed: Vec<f32>,
    inner: Vec<f32>,
    active: Vec<f32>,
}

/// The first `len` elements, with arbitrary contents.
fn room(buffer: &mut Vec<f32>, len: usize) -> &mut [f32] {
    if buffer.len() < len {
        buffer.resize(len, 0.0);
    }
    &mut buffer[..len]
}

impl<'a> Decoder<'a> {
    pub fn new(export: &'a Export, threads: Threads) -> Self {
        let spec = export.spec;
        let eps = spec.eps as f32;
        let scale = |(w, b): &'a Pair| RowNorm { w, b: b.as_deref(), eps };
        let layers = export.layers.iter().map(|l| Layer {
            norm_1: scale(&l.norm_1),
            qkv: &l.qkv,
            attn_out: &l.attn_out,
            norm_2: l.norm_2.as_ref().map(scale),
            up: &l.up,
            down: &l.down,
        });
        let heads = spec.heads;
        Self {
            spec,
            size: Size { batch: 1, time: 0, heads: heads.query, kv_heads: heads.key_value, width: heads.width },
            embedding: &export.embedding,
            positions: export.positions.as_deref(),
            output: &export.output,
            table: export.table.as_ref(),
            output_bias: export.output_bias.as_deref(),
            rotary: export.rotary.as_ref(),
            layers: layers.collect(),
            norm: scale(&export.norm),
            threads,
        }
    }

    /// An empty cache with capacity for `positions`.
    pub fn cache(&self, positions: usize) -> Cache {
        let capacity = positions.next_multiple_of(LANES);
        let len = self.size.kv_heads * self.size.width * capacity;
        let layers = self.layers.iter().map(|_| Held { keys: vec![0.0; len], values: vec![0.0; len] }).collect();
        Cache { len: 0, capacity, layers, scores: vec![0.0; capacity] }
    }

    /// Reads whole prompts into empty caches. Appends to `last` the state before the final norm at each prompt's last
    /// token, `[prompts, d]`.
    pub fn prefill(&self, caches: &mut [&mut Cache], prompts: &[&[u32]], work: &mut Work, last: &mut Vec<f32>) {
        let n: usize = prompts.iter().map(|p| p.len()).sum();
        let (rows, d, size) = (prompts.len(), self.spec.d, self.size);
        let (queries, joint) = (size.d(), size.joint());
        let mut x = std::mem::take(&mut work.x);
        let x_all = room(&mut x, n * d);
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
        let (final_layer, layers) = self.layers.split_last().expect("a checked config has layers");
        for (l, layer) in layers.iter().enumerate() {
            self.normalise(room(&mut work.h, n * d), x_all, &layer.norm_1);
            let qkv = room(&mut work.qkv, n * joint);
            self.linear(qkv, &work.h[..n * d], layer.qkv, 0..joint);
            self.rotate(qkv, joint, 0..queries + size.kv_heads * size.width, positions());
            let mixed = room(&mut work.mixed, n * queries);
            for ((cache, prompt), &end) in caches.iter_mut().zip(prompts).zip(&ends) {
                let start = end - prompt.len();
                let of_row = &qkv[start * joint..end * joint];
                let mixed = &mut mixed[start * queries..end * queries];
                for (t, token) in of_row.chunks_exact(joint).enumerate() {
                    cache.store(self, l, t, &token[queries..]);
                }
                match self.threads {
                    // Not the parallel kernel: a thread that waits in it would start on another group.
                    Threads::One => {
                        let tokens = of_row.chunks_exact(joint).zip(mixed.chunks_exact_mut(queries));
                        for (t, (token, out)) in tokens.enumerate() {
                            cache.len = t + 1;
                            cache.attend(self, l, &token[..queries], out);
                        }
                    }
                    Threads::Pool => {
                        let size = Size { time: prompt.len(), ..size };
                        mixed.copy_from_slice(&attention::forward(of_row, size));
                    }
                }
            }
            self.finish_layer(layer, x_all, n, work);
        }

        // The last layer's only later uses are its keys, its values and the state of each prompt's last token.
        let l = layers.len();
        self.normalise(room(&mut work.h, n * d), x_all, &final_layer.norm_1);
        let kept = joint - queries;
        let kv = room(&mut work.qkv, n * kept);
        self.linear(kv, &work.h[..n * d], final_layer.qkv, queries..joint);
        self.rotate(kv, kept, 0..kept / 2, positions());
        for ((cache, prompt), &end) in caches.iter_mut().zip(prompts).zip(&ends) {
            let start = end - prompt.len();
            for (t, token) in kv[start * kept..end * kept].chunks_exact(kept).enumerate() {
                cache.store(self, l, t, token);
            }
            cache.len = prompt.len();
        }
        for (i, end) in ends.iter().enumerate() {
            let at = (end - 1) * d..end * d;
            x_all.copy_within(at.clone(), i * d);
            work.h.copy_within(at, i * d);
        }
        let q = room(&mut work.qkv, rows * queries);
        self.linear(q, &work.h[..rows * d], final_layer.qkv, 0..queries);
        self.rotate(q, queries, 0..queries, prompts.iter().map(|p| p.len() - 1));
        self.attend(caches, l, queries, rows, work);
        self.finish_layer(final_layer, &mut x_all[..rows * d], rows, work);
        last.extend_from_slice(&x_all[..rows * d]);
        work.x = x;
    }

    /// Appends one token to each sequence. `x` receives the states before the final norm, `[rows, d]`.
    pub fn step(&self, caches: &mut [&mut Cache], tokens: &[u32], work: &mut Work, x: &mut Vec<f32>) {
        let (n, d, size) = (tokens.len(), self.spec.d, self.size);
        let (queries, joint) = (size.d(), size.joint());
        x.resize(n * d, 0.0);
        for ((x, cache), &id) in x.chunks_exact_mut(d).zip(caches.iter_mut()).zip(tokens) {
            self.embed(x, id, cache.len);
            cache.len += 1;
        }
        for (l, layer) in self.layers.iter().enumerate() {
            self.normalise(room(&mut work.h, n * d), x, &layer.norm_1);
            let qkv = room(&mut work.qkv, n * joint);
            self.linear(qkv, &work.h[..n * d], layer.qkv, 0..joint);
            let positions = caches.iter().map(|cache| cache.len - 1);
            self.rotate(qkv, joint, 0..queries + size.kv_heads * size.width, positions);
            self.attend(caches, l, joint, n, work);
            self.finish_layer(layer, x, n, work);
        }
    }

    /// Logits of the next token from states before the final norm, `[rows, d]`: one slice of `vocab` elements per row.
    pub fn logits<'l>(
        &self,
        logits: &'l mut Vec<f32>,
        x: &[f32],
        work: &mut Work,
    ) -> impl Iterator<Item = &'l mut [f32]> + use<'l> {
        let (d, vocab) = (self.spec.d, self.spec.vocab);
        let n = x.len() / d;
        self.normalise(room(&mut work.h, n * d), x, &self.norm);
        let out = room(logits, n * vocab);
        let mut into = WriteMode::Overwrite;
        if let Some(bias) = self.output_bias {
            out.chunks_exact_mut(vocab).for_each(|row| row.copy_from_slice(bias));
            into = WriteMode::Add;
        }
        let h = Mat::new(&work.h, n, d);
        match self.table {
            Some(table) => multiply(out, into, 1.0, h, Rhs::Packed(table), self.threads),
            None => matmul_transposed_rhs(out, into, 1.0, h, Mat::new(self.output, vocab, d), self.threads),
        }
        out.chunks_exact_mut(vocab)
    }

    fn embed(&self, x: &mut [f32], id: u32, position: usize) {
        let d = self.spec.d;
        x.copy_from_slice(&self.embedding[id as usize * d..][..d]);
        if let Some(positions) = self.positions {
            add_assign(x, &positions[position * d..][..d]);
        }
    }

    fn normalise(&self, y: &mut [f32], x: &[f32], scale: &RowNorm) {
        self.share(y, self.spec.d, |at, y| scale.forward(y, &x[at..at + y.len()]));
    }

    /// Applies the rotary embedding to the heads in the given columns of rows of `stride`, at the rows' positions.
    fn rotate(&self, rows: &mut [f32], stride: usize, columns: Range<usize>, positions: impl Iterator<Item = usize>) {
        let Some(rotary) = self.rotary else { return };
        for (row, position) in rows.chunks_exact_mut(stride).zip(positions) {
            rotary.turn(&mut row[columns.clone()], self.size.width, position, Direction::Forward);
        }
    }

    /// `out` = the given columns of the concatenated outputs of `maps` for `x [n, d]`.
    fn linear(&self, out: &mut [f32], x: &[f32], maps: &[Affine], columns: Range<usize>) {
        let mut first = 0;
        for map in maps {
            let from = columns.start.max(first).min(columns.end);
            let to = columns.end.min(first + map.d_out()).max(from);
            if from < to {
                let place = At { stride: columns.len(), offset: from - columns.start };
                map.apply(out, place, WriteMode::Overwrite, x, from - first..to - first, self.threads);
            }
            first += map.d_out();
        }
    }

    /// `x += map(y)`.
    fn project(&self, x: &mut [f32], y: &[f32], map: &Affine) {
        let d = self.spec.d;
        map.apply(x, At { stride: d, offset: 0 }, WriteMode::Add, y, 0..d, self.threads);
    }

    /// The rest of a layer after attention. Reads attention's output from `work.mixed` and the output of `norm_1` from
    /// `work.h`.
    fn finish_layer(&self, layer: &Layer, x: &mut [f32], n: usize, work: &mut Work) {
        let (d, inner) = (self.spec.d, self.spec.inner);
        self.project(x, &work.mixed[..n * self.size.d()], layer.attn_out);
        if let Some(norm_2) = &layer.norm_2 {
            self.normalise(room(&mut work.h, n * d), x, norm_2);
        }
        let input = self.spec.activation.input_width(inner);
        let wide = room(&mut work.inner, n * input);
        self.linear(wide, &work.h[..n * d], layer.up, 0..input);
        let active = room(&mut work.active, n * inner);
        self.share(active, inner, |at, y| {
            let (start, rows) = (at / inner, y.len() / inner);
            self.spec.activation.forward(y, &wide[start * input..(start + rows) * input], inner);
        });
        self.project(x, active, layer.down);
    }

    /// Attention of one query per sequence over its cache. Each row of `work.qkv` has `stride` columns and begins with
    /// the query. Keys and values behind the query, if any, are first stored as those of the last position, by the
    /// thread that then reads them.
    fn attend(&self, caches: &mut [&mut Cache], layer: usize, stride: usize, n: usize, work: &mut Work) {
        let queries = self.size.d();
        let mixed = room(&mut work.mixed, n * queries);
        let rows = &work.qkv[..n * stride];
        let one = |(cache, (out, row)): (&mut &mut Cache, (&mut [f32], &[f32]))| {
            let (q, keys_and_values) = row.split_at(queries);
            if !keys_and_values.is_empty() {
                cache.store(self, layer, cache.len - 1, keys_and_values);
            }
            cache.attend(self, layer, q, out);
        };
        match self.threads {
            Threads::One => {
                caches.iter_mut().zip(mixed.chunks_exact_mut(queries).zip(rows.chunks_exact(stride))).for_each(one);
            }
            Threads::Pool => {
                let rows = mixed.par_chunks_exact_mut(queries).zip(rows.par_chunks_exact(stride));
                caches.par_iter_mut().zip(rows).for_each(one);
            }
        }
    }

    /// Calls `f(index of its first element, part)` for parts of `out` whose lengths are multiples of `unit`.
    fn share(&self, out: &mut [f32], unit: usize, f: impl Fn(usize, &mut [f32]) + Sync) {
        match self.threads {
            Threads::One => f(0, out),
            Threads::Pool => for_each_chunk(out, (CHUNK / unit).max(1) * unit, f),
        }
    }
}

impl Cache {
    /// Stores the keys and values of position `t`; `keys_and_values` holds them side by side.
    fn store(&mut self, decoder: &Decoder, layer: usize, t: usize, keys_and_values: &[f32]) {
        let (Size { kv_heads, width, .. }, capacity) = (decoder.size, self.capacity);
        let (keys, values) = keys_and_values.split_at(kv_heads * width);
        let block = width * capacity;
        let held = &mut self.layers[layer];
        for (h, (key, value)) in keys.chunks_exact(width).zip(values.chunks_exact(width)).enumerate() {
            let at = h * block;
            let lane = at + t / LANES * width * LANES + t % LANES;
            for (to, &k) in held.keys[lane..].iter_mut().step_by(LANES).zip(key) {
                *to = k;
            }
            held.values[at + t * width..][..width].copy_from_slice(value);
        }
    }

    /// Attention of the queries `q` over all stored positions; `q` and `out` are `[heads width]`.
    fn attend(&mut self, decoder: &Decoder, layer: usize, q: &[f32], out: &mut [f32]) {
        let Size { width, .. } = decoder.size;
        let block = width * self.capacity;
        let held = &self.layers[layer];
        let scale = 1.0 / (width as f32).sqrt();
        for (h, (q, out)) in q.chunks_exact(width).zip(out.chunks_exact_mut(width)).enumerate() {
            let at = h / decoder.size.group() * block;
            let (keys, values) = (&held.keys[at..at + block], &held.values[at..at + block]);
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
            mix::<FMA, { 2 * LANES }>(out, scores, values, first, norm);
            first += 2 * LANES;
        }
        if first + LANES <= width {
            mix::<FMA, LANES>(out, scores, values, first, norm);
            first += LANES;
        }
        while first < width {
            mix::<FMA, 1>(out, scores, values, first, norm);
            first += 1;
        }
    }
}

/// `out[first .. first + N] = norm * sum_t scores_t values_t[first .. first + N]`, with rows of `values` as wide as
/// `out`. One pass over the rows for as many columns as fit into registers.
#[inline(always)]
fn mix<const FMA: bool, const N: usize>(out: &mut [f32], scores: &[f32], values: &[f32], first: usize, norm: f32) {
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
