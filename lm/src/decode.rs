//! GPT-2 token by token on plain slices, with a key-value cache for each row; knows neither gradients nor sampling.
//!
//! A tiny model's step is a millisecond, of which tensors, graphs and allocations would be the larger part: here the
//! buffers are made once, and a row that has finished leaves without anything being copied.

use candle_core::Tensor;
use rayon::prelude::*;

use crate::gpt2::Gpt2;
use crate::kernels::attention::{self, Rows, Size};
use crate::kernels::buffer::{CHUNK, for_chunks};
use crate::kernels::gemm::{self, Into, Mat, Threads};
use crate::kernels::glue::View;
use crate::kernels::simd::{LANES, add_assign, exp, fma, max, simd, sum_map};
use crate::kernels::{gelu, layer_norm};
use crate::{Gpt2Config, Result};

/// Read access to a model's tensors, in file order.
pub(crate) struct Export<'a> {
    config: &'a Gpt2Config,
    views: Vec<View<'a>>,
    /// The output embedding as `[d, padded_vocab]`, so that no product with it has to rearrange it first.
    table: Vec<f32>,
}

impl<'a> Export<'a> {
    /// Errors: a tensor that is not contiguous f32.
    pub fn of(model: &'a Gpt2) -> Result<Self> {
        let views =
            model.tensors().into_iter().map(|(_, t): (_, &Tensor)| View::of(t)).collect::<candle_core::Result<_>>()?;
        let wte = View::of(&model.wte)?;
        let (d, padded) = (model.config.n_embd, padded(model.config.vocab_size));
        let mut table = vec![0.0; d * padded];
        // A block of tokens at a time, so that each line of the table is written whole.
        for (b, block) in wte.chunks(LANES * d).enumerate() {
            for (i, row) in table.chunks_exact_mut(padded).enumerate() {
                for (to, token) in row[b * LANES..].iter_mut().zip(block.chunks_exact(d)) {
                    *to = token[i];
                }
            }
        }
        Ok(Self { config: &model.config, views, table })
    }
}

/// The vocabulary rounded up to whole vectors.
fn padded(vocab: usize) -> usize {
    vocab.next_multiple_of(LANES)
}

#[derive(Clone, Copy)]
struct Affine<'a> {
    w: &'a [f32],
    b: &'a [f32],
}

struct Layer<'a> {
    ln_1: Affine<'a>,
    c_attn: Affine<'a>,
    attn_proj: Affine<'a>,
    ln_2: Affine<'a>,
    c_fc: Affine<'a>,
    mlp_proj: Affine<'a>,
}

/// The model's weights as slices, and how to share the work.
pub(crate) struct Decoder<'a> {
    d: usize,
    heads: usize,
    width: usize,
    inner: usize,
    vocab: usize,
    eps: f32,
    wte: &'a [f32],
    wpe: &'a [f32],
    /// `[d, padded_vocab]`.
    table: &'a [f32],
    layers: Vec<Layer<'a>>,
    ln_f: Affine<'a>,
    /// `One` where groups of rows run in parallel, `Pool` where the work within a group does.
    threads: Threads,
}

/// What one sequence leaves behind for its next token.
pub(crate) struct Cache {
    /// Positions held.
    len: usize,
    /// Positions there is room for, a multiple of `LANES`.
    capacity: usize,
    /// `[layer, head, width, capacity]`: a score is a sum over `width` for many positions at once.
    keys: Vec<f32>,
    /// `[layer, head, capacity, width]`.
    values: Vec<f32>,
    scores: Vec<f32>,
}

/// Buffers that every step uses again.
#[derive(Default)]
pub(crate) struct Work {
    x: Vec<f32>,
    h: Vec<f32>,
    qkv: Vec<f32>,
    mixed: Vec<f32>,
    inner: Vec<f32>,
    active: Vec<f32>,
}

/// The first `len` elements, whatever they hold.
fn room(buffer: &mut Vec<f32>, len: usize) -> &mut [f32] {
    if buffer.len() < len {
        buffer.resize(len, 0.0);
    }
    &mut buffer[..len]
}

impl<'a> Decoder<'a> {
    pub fn new(export: &'a Export, threads: Threads) -> Self {
        let config = export.config;
        let mut views = export.views.iter().map(|view| -> &'a [f32] { view });
        let mut next = || views.next().expect("a GPT-2 has 2 + 12 n_layer + 2 tensors");
        let (wte, wpe) = (next(), next());
        let mut affine = || Affine { w: next(), b: next() };
        let layers = (0..config.n_layer)
            .map(|_| Layer {
                ln_1: affine(),
                c_attn: affine(),
                attn_proj: affine(),
                ln_2: affine(),
                c_fc: affine(),
                mlp_proj: affine(),
            })
            .collect();
        Self {
            d: config.n_embd,
            heads: config.n_head,
            width: config.head_dim(),
            inner: config.inner(),
            vocab: config.vocab_size,
            eps: config.layer_norm_epsilon as f32,
            wte,
            wpe,
            table: &export.table,
            layers,
            ln_f: affine(),
            threads,
        }
    }

    /// An empty cache with room for `positions`.
    pub fn cache(&self, positions: usize) -> Cache {
        let capacity = positions.next_multiple_of(LANES);
        let len = self.layers.len() * self.d * capacity;
        Cache { len: 0, capacity, keys: vec![0.0; len], values: vec![0.0; len], scores: vec![0.0; capacity] }
    }

    /// Reads whole prompts into empty caches. `last` receives the state before the final norm at each prompt's last
    /// token, `[prompts, d]`.
    pub fn prefill(&self, caches: &mut [&mut Cache], prompts: &[&[u32]], work: &mut Work, last: &mut Vec<f32>) {
        let n: usize = prompts.iter().map(|p| p.len()).sum();
        let (rows, d) = (prompts.len(), self.d);
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
        let (final_layer, layers) = self.layers.split_last().expect("a checked config has layers");
        for (l, layer) in layers.iter().enumerate() {
            self.norm(room(&mut work.h, n * d), x_all, layer.ln_1);
            let qkv = room(&mut work.qkv, n * 3 * d);
            self.linear(qkv, &work.h[..n * d], layer.c_attn, d, 0..3 * d);
            let mixed = room(&mut work.mixed, n * d);
            for ((cache, prompt), &end) in caches.iter_mut().zip(prompts).zip(&ends) {
                let start = end - prompt.len();
                let (of_row, mixed) = (&qkv[start * 3 * d..end * 3 * d], &mut mixed[start * d..end * d]);
                for (t, token) in of_row.chunks_exact(3 * d).enumerate() {
                    cache.store(self, l, t, &token[d..2 * d], &token[2 * d..]);
                }
                match self.threads {
                    // Not the parallel kernel: a thread that waits in it would start on another group meanwhile.
                    Threads::One => {
                        for (t, (token, out)) in of_row.chunks_exact(3 * d).zip(mixed.chunks_exact_mut(d)).enumerate() {
                            cache.len = t + 1;
                            cache.attend(self, l, &token[..d], out);
                        }
                    }
                    Threads::Pool => {
                        let part = |offset| Rows { data: of_row, stride: 3 * d, offset };
                        let size = Size { batch: 1, time: prompt.len(), heads: self.heads, width: self.width };
                        mixed.copy_from_slice(&attention::forward(part(0), part(d), part(2 * d), size).0);
                    }
                }
            }
            self.finish_layer(layer, x_all, n, work);
        }

        // Of the last layer only keys, values and the last token's own state are ever used.
        let l = layers.len();
        self.norm(room(&mut work.h, n * d), x_all, final_layer.ln_1);
        let kv = room(&mut work.qkv, n * 2 * d);
        self.linear(kv, &work.h[..n * d], final_layer.c_attn, d, d..3 * d);
        for ((cache, prompt), &end) in caches.iter_mut().zip(prompts).zip(&ends) {
            let start = end - prompt.len();
            for (t, token) in kv[start * 2 * d..end * 2 * d].chunks_exact(2 * d).enumerate() {
                cache.store(self, l, t, &token[..d], &token[d..]);
            }
            cache.len = prompt.len();
        }
        for (i, end) in ends.iter().enumerate() {
            let at = (end - 1) * d..end * d;
            x_all.copy_within(at.clone(), i * d);
            work.h.copy_within(at, i * d);
        }
        let q = room(&mut work.qkv, rows * d);
        self.linear(q, &work.h[..rows * d], final_layer.c_attn, d, 0..d);
        self.attend(caches, l, d, rows, work);
        self.finish_layer(final_layer, &mut x_all[..rows * d], rows, work);
        last.extend_from_slice(&x_all[..rows * d]);
        work.x = x;
    }

    /// Appends one token to each sequence. `x` receives the states before the final norm, `[rows, d]`.
    pub fn step(&self, caches: &mut [&mut Cache], tokens: &[u32], work: &mut Work, x: &mut Vec<f32>) {
        let (n, d) = (tokens.len(), self.d);
        x.resize(n * d, 0.0);
        for ((x, cache), &id) in x.chunks_exact_mut(d).zip(caches.iter_mut()).zip(tokens) {
            self.embed(x, id, cache.len);
            cache.len += 1;
        }
        for (l, layer) in self.layers.iter().enumerate() {
            self.norm(room(&mut work.h, n * d), x, layer.ln_1);
            self.linear(room(&mut work.qkv, n * 3 * d), &work.h[..n * d], layer.c_attn, d, 0..3 * d);
            for (cache, token) in caches.iter_mut().zip(work.qkv.chunks_exact(3 * d)) {
                let t = cache.len - 1;
                cache.store(self, l, t, &token[d..2 * d], &token[2 * d..]);
            }
            self.attend(caches, l, 3 * d, n, work);
            self.finish_layer(layer, x, n, work);
        }
    }

    /// Logits of the next token from states before the final norm, `[rows, d]`: one slice of `vocab` a row.
    pub fn logits<'l>(
        &self,
        logits: &'l mut Vec<f32>,
        x: &[f32],
        work: &mut Work,
    ) -> impl Iterator<Item = &'l mut [f32]> + use<'l> {
        let (n, vocab, padded) = (x.len() / self.d, self.vocab, padded(self.vocab));
        self.norm(room(&mut work.h, n * self.d), x, self.ln_f);
        let out = room(logits, n * padded);
        let (h, table) = (Mat::new(&work.h, n, self.d), Mat::new(self.table, self.d, padded));
        gemm::gemm(out, Into::Overwrite, 1.0, h, table, self.threads);
        out.chunks_exact_mut(padded).map(move |row| &mut row[..vocab])
    }

    fn embed(&self, x: &mut [f32], id: u32, position: usize) {
        let d = self.d;
        x.copy_from_slice(&self.wte[id as usize * d..][..d]);
        add_assign(x, &self.wpe[position * d..][..d]);
    }

    fn norm(&self, y: &mut [f32], x: &[f32], p: Affine) {
        let d = self.d;
        self.share(y, d, |at, y| layer_norm::forward(y, &x[at..at + y.len()], p.w, p.b, self.eps));
    }

    /// `out = x W[:, columns] + b[columns]`, `x [n, rows of W]`.
    fn linear(&self, out: &mut [f32], x: &[f32], p: Affine, rows: usize, columns: std::ops::Range<usize>) {
        let (stride, wanted) = (p.b.len(), columns.len());
        for out in out.chunks_exact_mut(wanted) {
            out.copy_from_slice(&p.b[columns.clone()]);
        }
        let w = Mat::strided(&p.w[columns.start..], rows, wanted, stride);
        gemm::gemm(out, Into::Add, 1.0, Mat::new(x, out.len() / wanted, rows), w, self.threads);
    }

    /// `x += y W + b`.
    fn project(&self, x: &mut [f32], y: &[f32], p: Affine) {
        let n = x.len() / self.d;
        for x in x.chunks_exact_mut(self.d) {
            add_assign(x, p.b);
        }
        let rows = y.len() / n;
        gemm::gemm(x, Into::Add, 1.0, Mat::new(y, n, rows), Mat::new(p.w, rows, self.d), self.threads);
    }

    /// What follows attention, whose output lies in `work.mixed`.
    fn finish_layer(&self, layer: &Layer, x: &mut [f32], n: usize, work: &mut Work) {
        let (d, inner) = (self.d, self.inner);
        self.project(x, &work.mixed[..n * d], layer.attn_proj);
        self.norm(room(&mut work.h, n * d), x, layer.ln_2);
        let wide = room(&mut work.inner, n * inner);
        self.linear(wide, &work.h[..n * d], layer.c_fc, d, 0..inner);
        let active = room(&mut work.active, n * inner);
        self.share(active, 1, |at, y| gelu::forward(y, &wide[at..at + y.len()]));
        self.project(x, active, layer.mlp_proj);
    }

    /// Attention of one query a sequence over its cache: queries are the first `d` of every `stride` in `work.qkv`.
    fn attend(&self, caches: &mut [&mut Cache], layer: usize, stride: usize, n: usize, work: &mut Work) {
        let d = self.d;
        let mixed = room(&mut work.mixed, n * d);
        let queries = &work.qkv[..n * stride];
        let one = |(cache, (out, q)): (&mut &mut Cache, (&mut [f32], &[f32]))| cache.attend(self, layer, &q[..d], out);
        match self.threads {
            Threads::One => {
                caches.iter_mut().zip(mixed.chunks_exact_mut(d).zip(queries.chunks_exact(stride))).for_each(one);
            }
            Threads::Pool => {
                let rows = mixed.par_chunks_exact_mut(d).zip(queries.par_chunks_exact(stride));
                caches.par_iter_mut().zip(rows).for_each(one);
            }
        }
    }

    /// Calls `f(first element's index, part)` for parts of `out` that are whole multiples of `unit`.
    fn share(&self, out: &mut [f32], unit: usize, f: impl Fn(usize, &mut [f32]) + Sync) {
        match self.threads {
            Threads::One => f(0, out),
            Threads::Pool => for_chunks(out, (CHUNK / unit).max(1) * unit, f),
        }
    }
}

impl Cache {
    /// Keeps the key and value (`[d]` each) of position `t`.
    fn store(&mut self, decoder: &Decoder, layer: usize, t: usize, key: &[f32], value: &[f32]) {
        let (width, capacity) = (decoder.width, self.capacity);
        let block = width * capacity;
        let first = layer * decoder.heads * block;
        for (h, (key, value)) in key.chunks_exact(width).zip(value.chunks_exact(width)).enumerate() {
            let at = first + h * block;
            for (i, &k) in key.iter().enumerate() {
                self.keys[at + i * capacity + t] = k;
            }
            self.values[at + t * width..][..width].copy_from_slice(value);
        }
    }

    /// Mixes the values of all positions held for the query `q`; both `[d]`.
    fn attend(&mut self, decoder: &Decoder, layer: usize, q: &[f32], out: &mut [f32]) {
        let width = decoder.width;
        let block = width * self.capacity;
        let scale = 1.0 / (width as f32).sqrt();
        for (h, (q, out)) in q.chunks_exact(width).zip(out.chunks_exact_mut(width)).enumerate() {
            let at = (layer * decoder.heads + h) * block;
            let (keys, values) = (&self.keys[at..at + block], &self.values[at..at + block]);
            attend_head(out, &mut self.scores, q, keys, values, self.len, scale);
        }
    }
}

simd! {
    /// One head: `q`, `out` `[width]`, `keys` `[width, capacity]`, `values` `[capacity, width]`, the first `len`
    /// positions seen.
    fn attend_head(out: &mut [f32], scores: &mut [f32], q: &[f32], keys: &[f32], values: &[f32], len: usize, scale: f32) {
        let capacity = scores.len();
        let (blocks, _) = scores.as_chunks_mut::<LANES>();
        for (b, block) in blocks.iter_mut().take(len.div_ceil(LANES)).enumerate() {
            let mut acc = [0f32; LANES];
            for (&q, keys) in q.iter().zip(keys.chunks_exact(capacity)) {
                let keys = &keys[b * LANES..][..LANES];
                for (acc, &k) in acc.iter_mut().zip(keys) {
                    *acc = fma::<FMA>(q, k, *acc);
                }
            }
            for (s, acc) in block.iter_mut().zip(acc) {
                *s = acc * scale;
            }
        }
        // Positions of the last block beyond `len` hold nothing of this sequence.
        let scores = &mut scores[..len];
        let m = max(scores);
        for s in scores.iter_mut() {
            *s = exp::<FMA>(*s - m);
        }
        let norm = 1.0 / sum_map(scores, |s| s);
        let width = out.len();
        let (wide, rest) = out.as_chunks_mut::<LANES>();
        for (c, out) in wide.iter_mut().enumerate() {
            let mut acc = [0f32; LANES];
            for (&p, value) in scores.iter().zip(values.chunks_exact(width)) {
                let value = &value[c * LANES..][..LANES];
                for (acc, &v) in acc.iter_mut().zip(value) {
                    *acc = fma::<FMA>(p, v, *acc);
                }
            }
            for (o, acc) in out.iter_mut().zip(acc) {
                *o = acc * norm;
            }
        }
        let done = width - rest.len();
        for (i, o) in rest.iter_mut().enumerate() {
            let mut acc = 0.0;
            for (&p, value) in scores.iter().zip(values.chunks_exact(width)) {
                acc = fma::<FMA>(p, value[done + i], acc);
            }
            *o = acc * norm;
        }
    }
}
