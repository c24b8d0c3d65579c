//! A pre-norm transformer block as one operation: y = x1 + mlp(norm(x1)), x1 = x + attention(norm(x)), or with both
//! branches on one normalised input, y = x + attention(h) + mlp(h), h = norm(x). The steps after attention can be
//! restricted to a subset of rows.
//!
//! A chunk of whole sequences goes through the block on one thread: each step finds its input in cache, and candle's
//! autograd graph holds one operation instead of ten. Chunks depend on the shape alone, and sums over chunks run in
//! order.

use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp1, CustomOp2, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use super::attention::{self, Head, Known, Size};
use super::buffer::{bands, build, cut_mut, scratch};
use super::factors::{Factors, OfMaps, Places};
use super::fan::{Fan, Maps};
use super::gemm::Into;
use super::glue::{Handover, View, expect, gradient, output, slice};
use super::norm::Scale;
use super::projection::{Views, Way, trained};
use super::rotary::{Rotary, Turn};
use super::simd::add_assign;
use super::sink::deliver_aside;
use super::wanted::{Part, Wanted};
use super::{Activation, Block, Mask, Norm};
use crate::Precision;

/// Least number of rows in a chunk, if there are as many.
const ROWS: usize = 128;

/// Indices of the maps in arrays of four.
const QKV: usize = 0;
const OUT: usize = 1;
const UP: usize = 2;
const DOWN: usize = 3;

struct NormParts {
    w: Tensor,
    b: Option<Tensor>,
}

impl NormParts {
    fn new(norm: &Norm, d: usize) -> Result<Self> {
        expect("a norm's weight", norm.weight, &[d])?;
        if let Some(bias) = norm.bias {
            expect("a norm's bias", bias, &[d])?;
        }
        Ok(Self { w: trained(norm.weight)?, b: norm.bias.map(trained).transpose()? })
    }

    fn tensors(&self) -> impl Iterator<Item = &Tensor> {
        [&self.w].into_iter().chain(&self.b)
    }

    /// Number of elements of its gradients; 0 if none of it is trained.
    fn small(&self) -> usize {
        if self.tensors().any(Tensor::track_op) { self.tensors().map(Tensor::elem_count).sum() } else { 0 }
    }

    fn views(&self) -> Result<(View<'_>, Option<View<'_>>)> {
        Ok((View::of(&self.w)?, self.b.as_ref().map(View::of).transpose()?))
    }

    fn deliver(&self, mut small: &[f32]) -> Result<()> {
        if small.is_empty() {
            return Ok(());
        }
        for tensor in self.tensors() {
            let (own, rest) = small.split_at(tensor.elem_count());
            if tensor.track_op() {
                deliver_aside(tensor, own.to_vec())?;
            }
            small = rest;
        }
        Ok(())
    }
}

pub struct TransformerBlock {
    /// One if both branches share a norm, else two.
    norms: Vec<NormParts>,
    /// The maps at indices `QKV`, `OUT`, `UP`, `DOWN`.
    maps: [Fan; 4],
    /// The rows kept after attention.
    wanted: Wanted,
    /// Dropout masks of the two branches, `[wanted rows, d]`.
    masks: [Option<Mask>; 2],
    rotary: Option<Arc<Rotary>>,
    activation: Activation,
    precision: Precision,
    eps: f32,
    d: usize,
    /// The width of the MLP.
    inner: usize,
    size: Size,
    /// Sequences per chunk.
    group: usize,
    tracked: bool,
    /// Whether the input has a gradient.
    passes_on: bool,
    saved: Handover<Vec<Saved>>,
}

/// Activations that one chunk saves for its backward pass, `[rows, ..]` each; `x1` and `up` have wanted rows only. All
/// activations not listed are quicker to recompute.
struct Saved {
    /// After rotation.
    qkv: Vec<f32>,
    lse: Vec<f32>,
    attended: Vec<f32>,
    /// The input of the second norm; empty if there is none.
    x1: Vec<f32>,
    /// Before the activation.
    up: Vec<f32>,
}

/// Inputs of one chunk's backward pass, and the destination of the factors of the weights' gradients.
struct Start<'a> {
    x: &'a [f32],
    g: &'a [f32],
    saved: Saved,
    part: Part<'a>,
    places: Option<Places<'a>>,
}

/// The weights and masks of a pass.
struct Pass<'a> {
    maps: [Maps<'a>; 4],
    norms: Vec<Scale<'a>>,
    masks: [Option<&'a Mask>; 2],
}

impl Pass<'_> {
    /// The norm in front of the MLP.
    fn norm_2(&self) -> Option<&Scale<'_>> {
        self.norms.get(1)
    }
}

impl TransformerBlock {
    pub fn new(x: &Tensor, block: &Block) -> Result<Self> {
        let (rows, d) = super::glue::rows(x)?;
        let size = block.size(rows)?;
        let norms = [Some(block.norm_1), block.norm_2].into_iter().flatten();
        let inner = block.down.w.dims2()?.0;
        if let Some(rotary) = &block.rotary {
            rotary.check(size.width, size.time)?;
        }
        let wanted = Wanted::new(rows, block.wanted)?;
        let n = wanted.len();
        let one = |p: &super::Projection, d_in, d_out| Fan::new(std::slice::from_ref(p), n, d_in, d_out);
        let maps = [
            Fan::new(&block.qkv, rows, d, size.joint())?,
            one(&block.attn_out, size.d(), d)?,
            Fan::new(&block.up, n, d, block.activation.input_width(inner))?,
            one(&block.down, inner, d)?,
        ];
        let mask = |m: Option<&Mask>| match m {
            Some(m) if m.elements() != n * d => {
                bail!("a dropout mask of {} elements for {n} rows of {d}", m.elements())
            }
            m => Ok(m.cloned()),
        };
        let mut block = Self {
            norms: norms.map(|n| NormParts::new(&n, d)).collect::<Result<_>>()?,
            maps,
            wanted,
            masks: [mask(block.attn_mask)?, mask(block.mlp_mask)?],
            rotary: block.rotary.clone(),
            activation: block.activation,
            precision: block.precision,
            eps: block.eps as f32,
            d,
            inner,
            size,
            group: (size.batch / 4).clamp(1, ROWS.div_ceil(size.time)),
            tracked: false,
            passes_on: x.track_op(),
            saved: Handover::default(),
        };
        block.tracked = block.passes_on || block.variable().is_some();
        Ok(block)
    }

    /// A variable among the weights, if there is one.
    pub fn variable(&self) -> Option<Tensor> {
        let norms = self.norms.iter().flat_map(NormParts::tensors).filter(|t| t.track_op());
        norms.chain(self.maps.iter().flat_map(Fan::trained)).next().cloned()
    }

    /// Rows of a chunk.
    fn chunk(&self) -> usize {
        self.group * self.size.time
    }

    /// Calls `f` with every weight prepared for one direction.
    fn open<R>(&self, way: Way, f: impl FnOnce(&Pass) -> Result<R>) -> Result<R> {
        let [a, b, c, e] = &self.maps;
        let views: [Vec<Views>; 4] = [a.views()?, b.views()?, c.views()?, e.views()?];
        let norms = self.norms.iter().map(NormParts::views).collect::<Result<Vec<_>>>()?;
        let new = |i: usize| Maps::new(&views[i], self.precision, way);
        let ((qkv, out), (up, down)) =
            rayon::join(|| rayon::join(|| new(QKV), || new(OUT)), || rayon::join(|| new(UP), || new(DOWN)));
        f(&Pass {
            maps: [qkv, out, up, down],
            norms: norms.iter().map(|(w, b)| Scale { w, b: b.as_deref(), eps: self.eps }).collect(),
            masks: self.masks.each_ref().map(Option::as_ref),
        })
    }

    fn forward(&self, x: &[f32]) -> Result<Vec<f32>> {
        let chunk = self.chunk();
        let parts = self.wanted.parts(chunk);
        let mut y = build(self.wanted.len() * self.d, chunk * self.d, |_, _| {});
        let saved: Vec<Option<Saved>> = self.open(Way::Forward, |pass| {
            let of_parts = cut_mut(&mut y, parts.iter().map(|part| part.len() * self.d));
            let chunks = of_parts.into_par_iter().zip(x.par_chunks(chunk * self.d)).zip(parts);
            Ok(chunks
                .map(|((y, x), part)| {
                    let saved = self.forward_chunk(y, x, part, pass);
                    self.tracked.then_some(saved)
                })
                .collect())
        })?;
        if let Some(saved) = saved.into_iter().collect() {
            self.saved.leave(saved);
        }
        Ok(y)
    }

    /// [`TransformerBlock::forward`] in candle's types.
    fn result(&self, x: &[f32], shape: &Shape) -> Result<(CpuStorage, Shape)> {
        let shape = if self.wanted.is_partial() { Shape::from((self.wanted.len(), self.d)) } else { shape.clone() };
        output(self.forward(x)?, shape)
    }

    /// Applies the rotary embedding to the queries and keys of joint rows.
    fn rotate(&self, qkv: &mut [f32], turn: Turn) {
        let Some(rotary) = &self.rotary else { return };
        let Size { time, heads, kv_heads, width, .. } = self.size;
        for (i, row) in qkv.chunks_exact_mut(self.size.joint()).enumerate() {
            rotary.turn(&mut row[..(heads + kv_heads) * width], width, i % time, turn);
        }
    }

    fn forward_chunk(&self, y: &mut [f32], x: &[f32], part: Part, pass: &Pass) -> Saved {
        let d = self.d;
        let (rows, n) = (part.rows, part.len());
        let size = Size { batch: rows / self.size.time, ..self.size };
        let (mut qkv, shared_up) = scratch(x.len(), |h| {
            pass.norms[0].forward(h, x);
            let up = pass.norm_2().is_none().then(|| pass.maps[UP].apply(&part.pick(h, d), n, part.before));
            (pass.maps[QKV].apply(h, rows, part.first), up)
        });
        self.rotate(&mut qkv, Turn::Forward);
        let mut attended = vec![0.0; rows * size.d()];
        let mut lse = vec![0.0; size.batch * size.heads * size.time];
        let outs = bands(&mut attended, size.time, size.width, size.heads);
        for (i, (out, lse)) in outs.into_iter().zip(lse.chunks_exact_mut(size.time)).enumerate() {
            let (sequence, head) = (i / size.heads, i % size.heads);
            let head = Head { sequence, head, from: part.first_of(sequence, size.time) };
            attention::forward_head(out, lse, attention::joint(&qkv, size), size, head);
        }
        let branch = |into: &mut [f32], map: &Maps, input: &[f32], mask: Option<&Mask>| match mask {
            None => map.add_to(into, input, part.before),
            Some(mask) => mask.add_product(into, &map.apply(input, n, part.before), part.before * d),
        };
        part.pick_into(y, x, d);
        branch(y, &pass.maps[OUT], &part.pick(&attended, size.d()), pass.masks[0]);
        let mut x1 = vec![];
        let up = match (pass.norm_2(), shared_up) {
            (Some(norm), _) => {
                x1 = y.to_vec();
                scratch(x1.len(), |h| {
                    norm.forward(h, &x1);
                    pass.maps[UP].apply(h, n, part.before)
                })
            }
            (None, up) => up.unwrap_or_default(),
        };
        scratch(n * self.inner, |active| {
            self.activation.forward(active, &up, self.inner);
            branch(y, &pass.maps[DOWN], active, pass.masks[1]);
        });
        Saved { qkv, lse, attended, x1, up }
    }

    fn backward(&self, x: &Tensor, g: &Tensor) -> Result<Option<Tensor>> {
        let Some(saved) = self.saved.take() else {
            bail!("a transformer block's backward pass without a forward pass of its own")
        };
        let g = g.contiguous()?;
        let (x_v, g_v) = (View::of(x)?, View::of(&g)?);
        let chunk = self.chunk();
        let parts = self.wanted.parts(chunk);
        let mut dx = build(x_v.len(), chunk * self.d, |_, _| {});
        let total: usize = self.small_sizes().iter().sum();
        let sizes = || parts.iter().map(|&part| self.sizes(part)).collect::<Vec<_>>();
        let mut factors = self.maps.iter().any(Fan::trains_weights).then(|| Factors::new(&sizes()));
        let places = match &mut factors {
            Some(factors) => factors.places().into_iter().map(Some).collect(),
            None => parts.iter().map(|_| None).collect::<Vec<_>>(),
        };
        let done: Vec<Vec<f32>> = self.open(Way::Back, |pass| {
            let rows = dx.par_chunks_mut(chunk * self.d).zip(x_v.par_chunks(chunk * self.d));
            Ok(rows
                .zip(saved)
                .zip(parts.par_iter().zip(places))
                .map(|(((dx, x), saved), (&part, places))| {
                    let g = &g_v[part.before * self.d..][..part.len() * self.d];
                    let mut small = vec![0.0; total];
                    self.backward_chunk(dx, &mut small, Start { x, g, saved, part, places }, pass);
                    small
                })
                .collect())
        })?;
        let mut chunks = done.iter();
        let mut small = chunks.next().map_or_else(|| vec![0.0; total], Vec::clone);
        chunks.for_each(|s| add_assign(&mut small, s));
        self.deliver_small(&small)?;
        if let Some(factors) = factors {
            let mut maps = self.maps.iter().zip(factors.finish());
            maps.try_for_each(|(map, [x, g])| map.deliver_weights(&x, &g, self.precision))?;
        }
        self.passes_on.then(|| gradient(dx, x)).transpose()
    }

    /// Number of elements of each map's input and output.
    fn sizes(&self, part: Part) -> OfMaps<usize> {
        let mut sizes = self.maps.each_ref().map(|map| [map.d_in, map.d_out].map(|width| part.len() * width));
        sizes[QKV] = [self.maps[QKV].d_in, self.maps[QKV].d_out].map(|width| part.rows * width);
        sizes
    }

    /// Number of elements of the small gradients of the norms and of the four maps.
    fn small_sizes(&self) -> [usize; 6] {
        let norm = |i: usize| self.norms.get(i).map_or(0, NormParts::small);
        let [a, b, c, e] = self.maps.each_ref().map(Fan::small);
        [norm(0), norm(1), a, b, c, e]
    }

    fn deliver_small(&self, mut small: &[f32]) -> Result<()> {
        let parts = self.small_sizes().map(|n| {
            let (part, rest) = small.split_at(n);
            small = rest;
            part
        });
        self.norms.iter().zip(&parts).try_for_each(|(norm, part)| norm.deliver(part))?;
        self.maps.iter().zip(&parts[2..]).try_for_each(|(map, part)| map.deliver_small(part))
    }

    fn backward_chunk(
        &self,
        dx: &mut [f32],
        mut small: &mut [f32],
        Start { x, g, saved, part, mut places }: Start,
        pass: &Pass,
    ) {
        let d = self.d;
        let (rows, n) = (part.rows, part.len());
        let size = Size { batch: rows / self.size.time, ..self.size };
        let [s_norm1, s_norm2, s_qkv, s_out, s_up, s_down] = self.small_sizes().map(|n| {
            let (part, rest) = std::mem::take(&mut small).split_at_mut(n);
            small = rest;
            part
        });
        // The gradient of a branch's output: that of the sum, times the dropout mask if there is one.
        let masked = |out: &'_ mut [f32], g: &[f32], mask: Option<&Mask>| match mask {
            None => out.copy_from_slice(g),
            Some(mask) => mask.multiply(out, g, part.before * d),
        };
        let norm = |dx: &mut [f32], small: &mut [f32], x: &[f32], g: &[f32], scale: &Scale| {
            scale.backward(dx, x, g);
            if !small.is_empty() {
                scale.backward_weights(small, x, g);
            }
        };
        let [qkv_map, out_map, up_map, down] = &pass.maps;
        let mut keep = |map: usize, x: &[f32], g: &[f32]| {
            if let Some(places) = &mut places {
                places.keep(map, x, g);
            }
        };
        let (attended, active) = (rows * size.d(), n * self.inner);
        let (wide, joint) = (saved.up.len(), saved.qkv.len());
        scratch(2 * rows * d + attended + (active + wide).max(joint), |buffer| {
            let (all_h, buffer) = buffer.split_at_mut(rows * d);
            let (all_branch, buffer) = buffer.split_at_mut(rows * d);
            let (d_attended, buffer) = buffer.split_at_mut(attended);
            let [h, branch, dx_wanted] = [&mut *all_h, &mut *all_branch, &mut *dx].map(|x| &mut x[..n * d]);
            dx_wanted.copy_from_slice(g);

            masked(branch, g, pass.masks[1]);
            let (active, d_up) = buffer[..active + wide].split_at_mut(active);
            self.activation.backward(active, d_up, &saved.up, self.inner, |to| {
                down.input_gradient(to, Into::Overwrite, branch, part.before)
            });
            down.small_gradients(s_down, active, branch, part.before);
            keep(DOWN, active, branch);
            match pass.norm_2() {
                Some(norm) => norm.forward(branch, &saved.x1),
                None => pass.norms[0].forward(branch, &part.pick(x, d)),
            }
            up_map.input_gradient(h, Into::Overwrite, d_up, part.before);
            up_map.small_gradients(s_up, branch, d_up, part.before);
            keep(UP, branch, d_up);
            if let Some(scale) = pass.norm_2() {
                norm(dx_wanted, s_norm2, &saved.x1, h, scale);
            }

            masked(branch, dx_wanted, pass.masks[0]);
            out_map.input_gradient(&mut d_attended[..n * size.d()], Into::Overwrite, branch, part.before);
            let attended = part.pick(&saved.attended, size.d());
            out_map.small_gradients(s_out, &attended, branch, part.before);
            keep(OUT, &attended, branch);
            part.spread(d_attended, size.d());
            part.spread(dx, d);
            let d_qkv = &mut buffer[..joint];
            if self.wanted.is_partial() {
                d_qkv.fill(0.0);
            }
            let known = Known {
                qkv: attention::joint(&saved.qkv, size),
                out: attention::dense(&saved.attended, size.d()),
                g: attention::dense(d_attended, size.d()),
                lse: &saved.lse,
            };
            for (i, to) in attention::joint_gradients(d_qkv, size).into_iter().enumerate() {
                let (sequence, head) = (i / size.kv_heads, i % size.kv_heads);
                let head = Head { sequence, head, from: part.first_of(sequence, size.time) };
                attention::backward_heads(to, known, size, head);
            }
            self.rotate(d_qkv, Turn::Back);
            pass.norms[0].forward(all_branch, x);
            qkv_map.small_gradients(s_qkv, all_branch, d_qkv, part.first);
            keep(QKV, all_branch, d_qkv);
            if self.passes_on || !s_norm1.is_empty() {
                // With a shared norm, `h` holds the MLP's gradient; attention's is added to it.
                let into = match pass.norm_2() {
                    Some(_) => Into::Overwrite,
                    None => {
                        part.spread(all_h, d);
                        Into::Add
                    }
                };
                qkv_map.input_gradient(all_h, into, d_qkv, part.first);
                norm(dx, s_norm1, x, all_h, &pass.norms[0]);
            }
        });
    }
}

impl CustomOp1 for TransformerBlock {
    fn name(&self) -> &'static str {
        "temper-transformer-block"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        self.result(slice(x, layout)?, layout.shape())
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, g: &Tensor) -> Result<Option<Tensor>> {
        self.backward(x, g)
    }
}

/// The second operand is one of the block's variables: it makes candle call `bwd` even if `x` needs no gradient.
impl CustomOp2 for TransformerBlock {
    fn name(&self) -> &'static str {
        "temper-transformer-block"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        self.result(slice(x, layout)?, layout.shape())
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, _y: &Tensor, g: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        Ok((self.backward(x, g)?, None))
    }
}
