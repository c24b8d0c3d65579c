//! A pre-norm transformer block as one operation: y = x1 + mlp(norm(x1)), x1 = x + attention(norm(x)).
//!
//! Some whole sequences at a time go through the block on one thread, so that what one step writes is in cache for the
//! next, and candle's tape sees one operation instead of ten. Which sequences go together depends on the shape alone;
//! sums over them run in their order.

use std::sync::OnceLock;

use candle_core::{CpuStorage, CustomOp1, CustomOp2, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use super::attention::{self, Size};
use super::buffer::{bands, build, scratch};
use super::glue::{View, expect, gradient, output, slice};
use super::projection::{Map, Parts, Views, trained};
use super::simd::{add_assign, multiply};
use super::sink::deliver_aside;
use super::{Block, gelu, layer_norm};

/// Rows that go through the block together, at least, if there are as many.
const ROWS: usize = 256;

struct Norm {
    w: Tensor,
    b: Tensor,
}

impl Norm {
    fn trains(&self) -> bool {
        self.w.track_op() || self.b.track_op()
    }
}

pub struct TransformerBlock {
    norms: [Norm; 2],
    /// qkv, attention's output, up, down.
    maps: [Parts; 4],
    /// Dropout of the two branches `[rows, d]`.
    masks: [Option<Tensor>; 2],
    eps: f32,
    size: Size,
    /// Sequences per chunk.
    group: usize,
    tracked: bool,
    saved: OnceLock<Vec<Saved>>,
}

/// What one chunk of sequences leaves for its backward pass; `[n, ..]` each. The rest is quicker computed again.
struct Saved {
    qkv: Vec<f32>,
    lse: Vec<f32>,
    attended: Vec<f32>,
    x1: Vec<f32>,
    /// Before GELU.
    up: Vec<f32>,
}

/// What the gradients of large weights are made of, for one chunk: inputs and gradients of the four maps.
type Large = [(Vec<f32>, Vec<f32>); 4];

impl TransformerBlock {
    pub fn new(x: &Tensor, block: &Block) -> Result<Self> {
        let (rows, d) = super::glue::rows(x)?;
        let size = super::heads(rows, block.time, d, block.n_head)?;
        let norm = |(w, b): (&Tensor, &Tensor)| -> Result<Norm> {
            expect("a norm's weight", w, &[d])?;
            expect("a norm's bias", b, &[d])?;
            Ok(Norm { w: trained(w)?, b: trained(b)? })
        };
        let inner = block.c_fc.w.dims2()?.1;
        let maps = [
            Parts::new(&block.c_attn, rows, d)?,
            Parts::new(&block.attn_proj, rows, d)?,
            Parts::new(&block.c_fc, rows, d)?,
            Parts::new(&block.mlp_proj, rows, inner)?,
        ];
        if [maps[0].d_out, maps[1].d_out, maps[3].d_out] != [3 * d, d, d] {
            bail!(
                "a transformer block of width {d} whose projections have widths {:?}",
                [0, 1, 3].map(|i| maps[i].d_out)
            );
        }
        let mask = |m: Option<&Tensor>| match m {
            Some(m) if m.elem_count() != rows * d => bail!("a dropout mask {:?} for {rows} rows of {d}", m.shape()),
            m => m.map(|m| m.detach().contiguous()).transpose(),
        };
        let mut block = Self {
            norms: [norm(block.ln_1)?, norm(block.ln_2)?],
            maps,
            masks: [mask(block.attn_mask)?, mask(block.mlp_mask)?],
            eps: block.eps as f32,
            size,
            group: (size.batch / 4).clamp(1, ROWS.div_ceil(size.time)),
            tracked: false,
            saved: OnceLock::new(),
        };
        block.tracked = x.track_op() || block.variable().is_some();
        Ok(block)
    }

    /// A variable among the weights, if there is one.
    pub fn variable(&self) -> Option<Tensor> {
        let norms = self.norms.iter().flat_map(|n| [&n.w, &n.b]).filter(|t| t.track_op());
        norms.chain(self.maps.iter().flat_map(Parts::trained)).next().cloned()
    }

    fn d(&self) -> usize {
        self.size.heads * self.size.width
    }

    /// Rows of a chunk.
    fn chunk(&self) -> usize {
        self.group * self.size.time
    }

    fn open(&self) -> Result<[Views<'_>; 4]> {
        let [a, b, c, d] = &self.maps;
        Ok([a.views()?, b.views()?, c.views()?, d.views()?])
    }

    fn forward(&self, x: &[f32]) -> Result<Vec<f32>> {
        let views = self.open()?;
        let maps = views.each_ref().map(Views::map);
        let [norm1, norm2] = &self.norms;
        let norms = [[View::of(&norm1.w)?, View::of(&norm1.b)?], [View::of(&norm2.w)?, View::of(&norm2.b)?]];
        let norms = norms.each_ref().map(|n| n.each_ref().map(|v| &**v));
        let masks = [self.mask(0)?, self.mask(1)?];
        let masks = masks.each_ref().map(Option::as_deref);
        let d = self.d();
        let chunk = self.chunk();
        let mut y = build(x.len(), chunk * d, |_, _| {});
        let saved: Vec<Option<Saved>> = y
            .par_chunks_mut(chunk * d)
            .zip(x.par_chunks(chunk * d))
            .enumerate()
            .map(|(i, (y, x))| {
                let saved = self.forward_chunk(y, x, i * chunk, &maps, norms, masks);
                self.tracked.then_some(saved)
            })
            .collect();
        if let Some(saved) = saved.into_iter().collect() {
            self.saved.get_or_init(|| saved);
        }
        Ok(y)
    }

    fn mask(&self, i: usize) -> Result<Option<View<'_>>> {
        self.masks[i].as_ref().map(View::of).transpose()
    }

    fn forward_chunk(
        &self,
        y: &mut [f32],
        x: &[f32],
        first: usize,
        [qkv_map, proj, up_map, down]: &[Map; 4],
        [norm1, norm2]: [[&[f32]; 2]; 2],
        masks: [Option<&[f32]>; 2],
    ) -> Saved {
        let d = self.d();
        let size = Size { batch: x.len() / d / self.size.time, ..self.size };
        let normed = |x: &[f32], [w, b]: [&[f32]; 2], map: &Map| {
            scratch(x.len(), |h| {
                layer_norm::forward(h, x, w, b, self.eps);
                map.apply(h, first)
            })
        };
        let qkv = normed(x, norm1, qkv_map);
        let mut attended = vec![0.0; x.len()];
        let mut lse = vec![0.0; size.batch * size.heads * size.time];
        let [q, k, v] = attention::joint(&qkv, d);
        let outs = bands(&mut attended, size.time, size.width, size.heads);
        for (i, (out, lse)) in outs.into_iter().zip(lse.chunks_exact_mut(size.time)).enumerate() {
            attention::forward_head(out, lse, q, k, v, size, (i / size.heads, i % size.heads));
        }
        let branch = |into: &mut [f32], map: &Map, input: &[f32], mask: Option<&[f32]>| match mask {
            None => map.add_to(into, input, first),
            Some(mask) => {
                let mut out = map.apply(input, first);
                out.iter_mut().zip(&mask[first * d..]).for_each(|(o, &m)| *o *= m);
                add_assign(into, &out);
            }
        };
        let mut x1 = x.to_vec();
        branch(&mut x1, proj, &attended, masks[0]);
        let up = normed(&x1, norm2, up_map);
        y.copy_from_slice(&x1);
        scratch(up.len(), |active| {
            gelu::forward(active, &up);
            branch(y, down, active, masks[1]);
        });
        Saved { qkv, lse, attended, x1, up }
    }

    fn backward(&self, x: &Tensor, g: &Tensor) -> Result<Option<Tensor>> {
        let Some(saved) = self.saved.get() else {
            bail!("a transformer block's backward pass before its forward pass")
        };
        let g = g.contiguous()?;
        let (x_v, g_v) = (View::of(x)?, View::of(&g)?);
        let views = self.open()?;
        let maps = views.each_ref().map(Views::map);
        let [norm1, norm2] = &self.norms;
        let norms = [[View::of(&norm1.w)?, View::of(&norm1.b)?], [View::of(&norm2.w)?, View::of(&norm2.b)?]];
        let norms = norms.each_ref().map(|n| n.each_ref().map(|v| &**v));
        let masks = [self.mask(0)?, self.mask(1)?];
        let masks = masks.each_ref().map(Option::as_deref);
        let d = self.d();
        let chunk = self.chunk();
        let mut dx = build(x_v.len(), chunk * d, |_, _| {});
        let sizes = self.small_sizes(&maps);
        let total: usize = sizes.iter().sum();
        let done: Vec<(Vec<f32>, Option<Large>)> = dx
            .par_chunks_mut(chunk * d)
            .zip(x_v.par_chunks(chunk * d))
            .zip(g_v.par_chunks(chunk * d))
            .zip(saved)
            .enumerate()
            .map(|(i, (((dx, x), g), saved))| {
                let mut small = vec![0.0; total];
                let large = self.backward_chunk(dx, &mut small, sizes, x, g, saved, i * chunk, &maps, norms, masks);
                (small, large)
            })
            .collect();
        drop(maps);
        drop(views);
        let mut chunks = done.iter();
        let mut small = chunks.next().map_or_else(|| vec![0.0; total], |(s, _)| s.clone());
        chunks.for_each(|(s, _)| add_assign(&mut small, s));
        self.deliver_small(&small, sizes)?;
        for (i, map) in self.maps.iter().enumerate() {
            let chunks = done.iter().filter_map(|(_, large)| large.as_ref().map(|l| (&*l[i].0, &*l[i].1)));
            map.deliver_weight(chunks)?;
        }
        x.track_op().then(|| gradient(dx, x)).transpose()
    }

    /// Elements of the small gradients of the two norms (weight and bias) and the four maps.
    fn small_sizes(&self, maps: &[Map; 4]) -> [usize; 6] {
        let norm = |i: usize| if self.norms[i].trains() { 2 * self.d() } else { 0 };
        let [a, b, c, e] = maps.each_ref().map(Map::small);
        [norm(0), norm(1), a, b, c, e]
    }

    fn deliver_small(&self, small: &[f32], sizes: [usize; 6]) -> Result<()> {
        let parts = split(small, sizes);
        for (norm, part) in self.norms.iter().zip(&parts) {
            let (w, b) = part.split_at(part.len() / 2);
            if norm.w.track_op() {
                deliver_aside(&norm.w, w.to_vec())?;
            }
            if norm.b.track_op() {
                deliver_aside(&norm.b, b.to_vec())?;
            }
        }
        self.maps.iter().zip(&parts[2..]).try_for_each(|(map, part)| map.deliver_small(part))
    }

    #[expect(clippy::too_many_arguments, reason = "a backward pass takes what the forward pass took and left")]
    fn backward_chunk(
        &self,
        dx: &mut [f32],
        small: &mut [f32],
        sizes: [usize; 6],
        x: &[f32],
        g: &[f32],
        saved: &Saved,
        first: usize,
        [qkv_map, proj, up_map, down]: &[Map; 4],
        norms: [[&[f32]; 2]; 2],
        masks: [Option<&[f32]>; 2],
    ) -> Option<Large> {
        let d = self.d();
        let size = Size { batch: x.len() / d / self.size.time, ..self.size };
        let [s_norm1, s_norm2, s_qkv, s_proj, s_up, s_down] = split_mut(small, sizes);
        // Under a dropout mask, the gradient of a branch's output; without one, that of the sum.
        let masked = |out: &'_ mut [f32], g: &[f32], mask: Option<&[f32]>| match mask {
            None => out.copy_from_slice(g),
            Some(mask) => multiply(out, g, &mask[first * d..]),
        };
        let norm = |into: &mut [f32], small: &mut [f32], x: &[f32], g: &[f32], w: &[f32]| {
            layer_norm::backward(into, x, g, w, self.eps);
            if !small.is_empty() {
                let (dw, db) = small.split_at_mut(d);
                layer_norm::backward_weights(dw, db, x, g, self.eps);
            }
        };
        let trains = self.maps.iter().any(Parts::trains_weight);
        let keep = |x: &[f32], g: &[f32]| if trains { (x.to_vec(), g.to_vec()) } else { (vec![], vec![]) };
        let (n, wide, joint) = (x.len(), saved.up.len(), saved.qkv.len());
        let large = scratch(2 * n + (2 * wide).max(joint), |buffer| {
            let (h, buffer) = buffer.split_at_mut(n);
            let (branch, buffer) = buffer.split_at_mut(n);
            dx.copy_from_slice(g);

            masked(branch, g, masks[1]);
            let (active, up) = buffer[..2 * wide].split_at_mut(wide);
            down.input_gradient(up, branch, first);
            gelu::both(active, &saved.up, up);
            down.small_gradients(s_down, active, branch, first);
            let large_down = keep(active, branch);
            layer_norm::forward(branch, &saved.x1, norms[1][0], norms[1][1], self.eps);
            up_map.input_gradient(h, up, first);
            up_map.small_gradients(s_up, branch, up, first);
            let large_up = keep(branch, up);
            norm(dx, s_norm2, &saved.x1, h, norms[1][0]);

            masked(branch, dx, masks[0]);
            proj.input_gradient(h, branch, first);
            proj.small_gradients(s_proj, &saved.attended, branch, first);
            let large_proj = keep(&saved.attended, branch);
            let qkv = &mut buffer[..joint];
            let rows = attention::joint(&saved.qkv, d);
            let (out, grad) = (attention::dense(&saved.attended, d), attention::dense(h, d));
            for (i, to) in attention::joint_gradients(qkv, size).into_iter().enumerate() {
                let lse = &saved.lse[i * size.time..(i + 1) * size.time];
                attention::backward_head(to, rows, out, grad, lse, size, (i / size.heads, i % size.heads));
            }
            layer_norm::forward(branch, x, norms[0][0], norms[0][1], self.eps);
            qkv_map.input_gradient(h, qkv, first);
            qkv_map.small_gradients(s_qkv, branch, qkv, first);
            let large_qkv = keep(branch, qkv);
            norm(dx, s_norm1, x, h, norms[0][0]);
            [large_qkv, large_proj, large_up, large_down]
        });
        trains.then_some(large)
    }
}

fn split(mut all: &[f32], sizes: [usize; 6]) -> [&[f32]; 6] {
    sizes.map(|n| {
        let (part, rest) = all.split_at(n);
        all = rest;
        part
    })
}

fn split_mut(mut all: &mut [f32], sizes: [usize; 6]) -> [&mut [f32]; 6] {
    sizes.map(|n| {
        let (part, rest) = std::mem::take(&mut all).split_at_mut(n);
        all = rest;
        part
    })
}

impl CustomOp1 for TransformerBlock {
    fn name(&self) -> &'static str {
        "temper-transformer-block"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        output(self.forward(slice(x, layout)?)?, layout.shape())
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, g: &Tensor) -> Result<Option<Tensor>> {
        self.backward(x, g)
    }
}

/// The second operand is one of the block's variables, so that candle comes by even where `x` needs no gradient.
impl CustomOp2 for TransformerBlock {
    fn name(&self) -> &'static str {
        "temper-transformer-block"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        output(self.forward(slice(x, layout)?)?, layout.shape())
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, _y: &Tensor, g: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        Ok((self.backward(x, g)?, None))
    }
}
