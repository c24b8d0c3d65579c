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

use super::attention::{self, AttentionShape, BackwardInputs, HeadIndex};
use super::buffer::{build_chunked, split_at_lengths_mut, split_submatrices, with_scratch};
use super::candle_interop::{CpuSlice, SavedForBackward, check_shape, contiguous_slice, grad_tensor, op_output};
use super::gemm::WriteMode;
use super::grad_accumulator::accumulate;
use super::linear::{LinearSlices, leaf_or_constant};
use super::linear_group::{LinearGroup, PreparedLinearGroup};
use super::norm::RowNorm;
use super::rotary::Rotary;
use super::row_subset::{ChunkRows, RowSubset};
use super::simd::add_assign;
use super::weight_grad_inputs::{ChunkWriter, PerLinear, WeightGradInputs};
use super::{Activation, BlockArgs, Direction, DropoutMask, NormRef};
use crate::Precision;

/// Least number of rows in a chunk, if there are as many.
const CHUNK_ROWS: usize = 128;

/// Indices of the linear groups in arrays of four.
const QKV: usize = 0;
const ATTN_OUT: usize = 1;
const UP: usize = 2;
const DOWN: usize = 3;

struct NormTensors {
    w: Tensor,
    b: Option<Tensor>,
}

impl NormTensors {
    fn new(norm: &NormRef, d: usize) -> Result<Self> {
        check_shape("a norm's weight", norm.weight, &[d])?;
        if let Some(bias) = norm.bias {
            check_shape("a norm's bias", bias, &[d])?;
        }
        Ok(Self { w: leaf_or_constant(norm.weight)?, b: norm.bias.map(leaf_or_constant).transpose()? })
    }

    fn tensors(&self) -> impl Iterator<Item = &Tensor> {
        [&self.w].into_iter().chain(&self.b)
    }

    /// Number of elements of its gradients; 0 if none of it is trained.
    fn small_grad_len(&self) -> usize {
        if self.tensors().any(Tensor::track_op) { self.tensors().map(Tensor::elem_count).sum() } else { 0 }
    }

    fn views(&self) -> Result<(CpuSlice<'_>, Option<CpuSlice<'_>>)> {
        Ok((CpuSlice::new(&self.w)?, self.b.as_ref().map(CpuSlice::new).transpose()?))
    }

    fn accumulate(&self, mut small_grads: &[f32]) -> Result<()> {
        if small_grads.is_empty() {
            return Ok(());
        }
        for tensor in self.tensors() {
            let (own, rest) = small_grads.split_at(tensor.elem_count());
            if tensor.track_op() {
                accumulate(tensor, own.to_vec())?;
            }
            small_grads = rest;
        }
        Ok(())
    }
}

/// The block as a candle operation, with its weights and settings.
pub struct TransformerBlockOp {
    /// One if both branches share a norm, else two.
    norms: Vec<NormTensors>,
    /// The linear groups at indices `QKV`, `ATTN_OUT`, `UP`, `DOWN`.
    linears: [LinearGroup; 4],
    /// The rows kept after attention.
    row_subset: RowSubset,
    /// Dropout masks of the two branches, `[selected rows, d]`.
    masks: [Option<DropoutMask>; 2],
    rotary: Option<Arc<Rotary>>,
    activation: Activation,
    precision: Precision,
    eps: f32,
    d: usize,
    /// The width of the MLP.
    inner: usize,
    attn_shape: AttentionShape,
    /// Sequences per chunk.
    chunk_sequences: usize,
    /// Whether any input or weight needs a gradient.
    tracked: bool,
    /// Whether the input needs a gradient.
    input_needs_grad: bool,
    saved: SavedForBackward<Vec<SavedActivations>>,
}

/// Activations that one chunk saves for its backward pass, `[rows, ..]` each; `x1` and `up` have selected rows only.
/// All activations not listed are quicker to recompute.
struct SavedActivations {
    /// After rotation.
    qkv: Vec<f32>,
    lse: Vec<f32>,
    attended: Vec<f32>,
    /// The input of the second norm; empty if there is none.
    x1: Vec<f32>,
    /// Before the activation.
    up: Vec<f32>,
}

/// Inputs of one chunk's backward pass, and the destination of the inputs of the weights' gradients.
struct ChunkInputs<'a> {
    x: &'a [f32],
    g: &'a [f32],
    saved: SavedActivations,
    chunk: ChunkRows<'a>,
    writer: Option<ChunkWriter<'a>>,
}

/// The weights and masks, prepared for one direction.
struct PreparedWeights<'a> {
    linears: [PreparedLinearGroup<'a>; 4],
    norms: Vec<RowNorm<'a>>,
    masks: [Option<&'a DropoutMask>; 2],
}

impl PreparedWeights<'_> {
    /// The norm in front of the MLP.
    fn norm_2(&self) -> Option<&RowNorm<'_>> {
        self.norms.get(1)
    }
}

impl TransformerBlockOp {
    pub fn new(x: &Tensor, block: &BlockArgs) -> Result<Self> {
        let (rows, d) = super::candle_interop::rows_and_width(x)?;
        let attn_shape = block.attention_shape(rows)?;
        let norms = [Some(block.norm_1), block.norm_2].into_iter().flatten();
        let inner = block.down.w.dims2()?.0;
        if let Some(rotary) = &block.rotary {
            rotary.check(attn_shape.width, attn_shape.time)?;
        }
        let row_subset = RowSubset::new(rows, block.output_rows)?;
        let n = row_subset.len();
        let single = |p: &super::LinearRef, d_in, d_out| LinearGroup::new(std::slice::from_ref(p), n, d_in, d_out);
        let linears = [
            LinearGroup::new(&block.qkv, rows, d, attn_shape.qkv_width())?,
            single(&block.attn_out, attn_shape.out_width(), d)?,
            LinearGroup::new(&block.up, n, d, block.activation.input_width(inner))?,
            single(&block.down, inner, d)?,
        ];
        let mask = |m: Option<&DropoutMask>| match m {
            Some(m) if m.elements() != n * d => {
                bail!("a dropout mask has {} elements, expected {n} rows of {d}", m.elements())
            }
            m => Ok(m.cloned()),
        };
        let mut block = Self {
            norms: norms.map(|n| NormTensors::new(&n, d)).collect::<Result<_>>()?,
            linears,
            row_subset,
            masks: [mask(block.attn_dropout)?, mask(block.mlp_dropout)?],
            rotary: block.rotary.clone(),
            activation: block.activation,
            precision: block.precision,
            eps: block.eps as f32,
            d,
            inner,
            attn_shape,
            chunk_sequences: (attn_shape.batch / 4).clamp(1, CHUNK_ROWS.div_ceil(attn_shape.time)),
            tracked: false,
            input_needs_grad: x.track_op(),
            saved: SavedForBackward::default(),
        };
        block.tracked = block.input_needs_grad || block.variable().is_some();
        Ok(block)
    }

    /// A variable among the weights, if there is one.
    pub fn variable(&self) -> Option<Tensor> {
        let norms = self.norms.iter().flat_map(NormTensors::tensors).filter(|t| t.track_op());
        norms.chain(self.linears.iter().flat_map(LinearGroup::trained_tensors)).next().cloned()
    }

    /// Rows of a chunk.
    fn chunk_rows(&self) -> usize {
        self.chunk_sequences * self.attn_shape.time
    }

    /// Calls `f` with every weight prepared for one direction.
    fn with_prepared<R>(&self, direction: Direction, f: impl FnOnce(&PreparedWeights) -> Result<R>) -> Result<R> {
        let [a, b, c, e] = &self.linears;
        let views: [Vec<LinearSlices>; 4] = [a.views()?, b.views()?, c.views()?, e.views()?];
        let norms = self.norms.iter().map(NormTensors::views).collect::<Result<Vec<_>>>()?;
        let new = |i: usize| PreparedLinearGroup::new(&views[i], self.precision, direction);
        let ((qkv, out), (up, down)) =
            rayon::join(|| rayon::join(|| new(QKV), || new(ATTN_OUT)), || rayon::join(|| new(UP), || new(DOWN)));
        f(&PreparedWeights {
            linears: [qkv, out, up, down],
            norms: norms.iter().map(|(w, b)| RowNorm { w, b: b.as_deref(), eps: self.eps }).collect(),
            masks: self.masks.each_ref().map(Option::as_ref),
        })
    }

    fn forward(&self, x: &[f32]) -> Result<Vec<f32>> {
        let chunk_rows = self.chunk_rows();
        let chunks = self.row_subset.chunks(chunk_rows);
        let mut y = build_chunked(self.row_subset.len() * self.d, chunk_rows * self.d, |_, _| {});
        let saved: Vec<Option<SavedActivations>> = self.with_prepared(Direction::Forward, |weights| {
            let outputs = split_at_lengths_mut(&mut y, chunks.iter().map(|chunk| chunk.len() * self.d));
            let tasks = outputs.into_par_iter().zip(x.par_chunks(chunk_rows * self.d)).zip(chunks);
            Ok(tasks
                .map(|((y, x), chunk)| {
                    let saved = self.forward_chunk(y, x, chunk, weights);
                    self.tracked.then_some(saved)
                })
                .collect())
        })?;
        if let Some(saved) = saved.into_iter().collect() {
            self.saved.save(saved);
        }
        Ok(y)
    }

    /// [`TransformerBlockOp::forward`] in candle's types.
    fn forward_op(&self, x: &[f32], shape: &Shape) -> Result<(CpuStorage, Shape)> {
        let shape =
            if self.row_subset.is_partial() { Shape::from((self.row_subset.len(), self.d)) } else { shape.clone() };
        op_output(self.forward(x)?, shape)
    }

    /// Applies the rotary embedding to the queries and keys of joint rows.
    fn rotate(&self, qkv: &mut [f32], direction: Direction) {
        let Some(rotary) = &self.rotary else { return };
        let AttentionShape { time, heads, kv_heads, width, .. } = self.attn_shape;
        for (i, row) in qkv.chunks_exact_mut(self.attn_shape.qkv_width()).enumerate() {
            rotary.rotate(&mut row[..(heads + kv_heads) * width], width, i % time, direction);
        }
    }

    fn forward_chunk(&self, y: &mut [f32], x: &[f32], chunk: ChunkRows, weights: &PreparedWeights) -> SavedActivations {
        let d = self.d;
        let (rows, n) = (chunk.rows, chunk.len());
        let attn_shape = AttentionShape { batch: rows / self.attn_shape.time, ..self.attn_shape };
        let (mut qkv, shared_up) = with_scratch(x.len(), |h| {
            weights.norms[0].forward(h, x);
            let up = weights
                .norm_2()
                .is_none()
                .then(|| weights.linears[UP].apply(&chunk.gather(h, d), n, chunk.selected_before));
            (weights.linears[QKV].apply(h, rows, chunk.first_row), up)
        });
        self.rotate(&mut qkv, Direction::Forward);
        let mut attended = vec![0.0; rows * attn_shape.out_width()];
        let mut lse = vec![0.0; attn_shape.batch * attn_shape.heads * attn_shape.time];
        let outs = split_submatrices(&mut attended, attn_shape.time, attn_shape.width, attn_shape.heads);
        for (i, (out, lse)) in outs.into_iter().zip(lse.chunks_exact_mut(attn_shape.time)).enumerate() {
            let (sequence, head) = (i / attn_shape.heads, i % attn_shape.heads);
            let head = HeadIndex { sequence, head, first_row: chunk.first_in_sequence(sequence, attn_shape.time) };
            attention::forward_head(out, lse, attention::split_qkv(&qkv, attn_shape), attn_shape, head);
        }
        let add_branch =
            |y: &mut [f32], group: &PreparedLinearGroup, input: &[f32], mask: Option<&DropoutMask>| match mask {
                None => group.add_to(y, input, chunk.selected_before),
                Some(mask) => {
                    mask.add_product(y, &group.apply(input, n, chunk.selected_before), chunk.selected_before * d)
                }
            };
        chunk.gather_into(y, x, d);
        add_branch(y, &weights.linears[ATTN_OUT], &chunk.gather(&attended, attn_shape.out_width()), weights.masks[0]);
        let mut x1 = vec![];
        let up = match (weights.norm_2(), shared_up) {
            (Some(norm), _) => {
                x1 = y.to_vec();
                with_scratch(x1.len(), |h| {
                    norm.forward(h, &x1);
                    weights.linears[UP].apply(h, n, chunk.selected_before)
                })
            }
            (None, up) => up.unwrap_or_default(),
        };
        with_scratch(n * self.inner, |active| {
            self.activation.forward(active, &up, self.inner);
            add_branch(y, &weights.linears[DOWN], active, weights.masks[1]);
        });
        SavedActivations { qkv, lse, attended, x1, up }
    }

    fn backward(&self, x: &Tensor, g: &Tensor) -> Result<Option<Tensor>> {
        let Some(saved) = self.saved.take() else {
            bail!("a transformer block runs backward once per forward pass, and not before it")
        };
        let g = g.contiguous()?;
        let (x_v, g_v) = (CpuSlice::new(x)?, CpuSlice::new(&g)?);
        let chunk_rows = self.chunk_rows();
        let chunks = self.row_subset.chunks(chunk_rows);
        let mut dx = build_chunked(x_v.len(), chunk_rows * self.d, |_, _| {});
        let total: usize = self.small_grad_lens().iter().sum();
        let sizes = || chunks.iter().map(|&chunk| self.sizes(chunk)).collect::<Vec<_>>();
        let mut weight_grad_inputs =
            self.linears.iter().any(LinearGroup::trains_weights).then(|| WeightGradInputs::new(&sizes()));
        let writers = match &mut weight_grad_inputs {
            Some(inputs) => inputs.writers().into_iter().map(Some).collect(),
            None => chunks.iter().map(|_| None).collect::<Vec<_>>(),
        };
        let chunk_grads: Vec<Vec<f32>> = self.with_prepared(Direction::Backward, |weights| {
            let rows = dx.par_chunks_mut(chunk_rows * self.d).zip(x_v.par_chunks(chunk_rows * self.d));
            Ok(rows
                .zip(saved)
                .zip(chunks.par_iter().zip(writers))
                .map(|(((dx, x), saved), (&chunk, writer))| {
                    let g = &g_v[chunk.selected_before * self.d..][..chunk.len() * self.d];
                    let mut small_grads = vec![0.0; total];
                    self.backward_chunk(dx, &mut small_grads, ChunkInputs { x, g, saved, chunk, writer }, weights);
                    small_grads
                })
                .collect())
        })?;
        let mut chunk_sums = chunk_grads.iter();
        let mut small_grads = chunk_sums.next().map_or_else(|| vec![0.0; total], Vec::clone);
        chunk_sums.for_each(|s| add_assign(&mut small_grads, s));
        self.accumulate_small_grads(&small_grads)?;
        if let Some(weight_grad_inputs) = weight_grad_inputs {
            let mut linears = self.linears.iter().zip(weight_grad_inputs.finish());
            linears.try_for_each(|(group, [x, g])| group.accumulate_weight_grads(&x, &g, self.precision))?;
        }
        self.input_needs_grad.then(|| grad_tensor(dx, x)).transpose()
    }

    /// Number of elements of each group's input and output.
    fn sizes(&self, chunk: ChunkRows) -> PerLinear<usize> {
        let mut sizes = self.linears.each_ref().map(|group| [group.d_in, group.d_out].map(|width| chunk.len() * width));
        sizes[QKV] = [self.linears[QKV].d_in, self.linears[QKV].d_out].map(|width| chunk.rows * width);
        sizes
    }

    /// Number of elements of the small gradients (all but those of weights) of the norms and of the four groups.
    fn small_grad_lens(&self) -> [usize; 6] {
        let norm = |i: usize| self.norms.get(i).map_or(0, NormTensors::small_grad_len);
        let [a, b, c, e] = self.linears.each_ref().map(LinearGroup::small_grad_len);
        [norm(0), norm(1), a, b, c, e]
    }

    fn accumulate_small_grads(&self, mut small_grads: &[f32]) -> Result<()> {
        let parts = self.small_grad_lens().map(|n| {
            let (part, rest) = small_grads.split_at(n);
            small_grads = rest;
            part
        });
        self.norms.iter().zip(&parts).try_for_each(|(norm, part)| norm.accumulate(part))?;
        self.linears.iter().zip(&parts[2..]).try_for_each(|(group, part)| group.accumulate_small_grads(part))
    }

    fn backward_chunk(
        &self,
        dx: &mut [f32],
        mut small_grads: &mut [f32],
        ChunkInputs { x, g, saved, chunk, mut writer }: ChunkInputs,
        weights: &PreparedWeights,
    ) {
        let d = self.d;
        let (rows, n) = (chunk.rows, chunk.len());
        let attn_shape = AttentionShape { batch: rows / self.attn_shape.time, ..self.attn_shape };
        let [s_norm1, s_norm2, s_qkv, s_out, s_up, s_down] = self.small_grad_lens().map(|n| {
            let (part, rest) = std::mem::take(&mut small_grads).split_at_mut(n);
            small_grads = rest;
            part
        });
        // The gradient of a branch's output: that of the sum, times the dropout mask if there is one.
        let masked = |out: &'_ mut [f32], g: &[f32], mask: Option<&DropoutMask>| match mask {
            None => out.copy_from_slice(g),
            Some(mask) => mask.multiply(out, g, chunk.selected_before * d),
        };
        let norm_backward = |dx: &mut [f32], small_grads: &mut [f32], x: &[f32], g: &[f32], norm: &RowNorm| {
            norm.backward(dx, x, g);
            if !small_grads.is_empty() {
                norm.backward_weights(small_grads, x, g);
            }
        };
        let [qkv, attn_out, up, down] = &weights.linears;
        let mut write_inputs = |group: usize, x: &[f32], g: &[f32]| {
            if let Some(writer) = &mut writer {
                writer.write(group, x, g);
            }
        };
        let (attended, active) = (rows * attn_shape.out_width(), n * self.inner);
        let (wide, qkv_len) = (saved.up.len(), saved.qkv.len());
        with_scratch(2 * rows * d + attended + (active + wide).max(qkv_len), |buffer| {
            let (all_h, buffer) = buffer.split_at_mut(rows * d);
            let (all_branch, buffer) = buffer.split_at_mut(rows * d);
            let (d_attended, buffer) = buffer.split_at_mut(attended);
            let [h, branch, dx_selected] = [&mut *all_h, &mut *all_branch, &mut *dx].map(|x| &mut x[..n * d]);
            dx_selected.copy_from_slice(g);

            masked(branch, g, weights.masks[1]);
            let (active, d_up) = buffer[..active + wide].split_at_mut(active);
            self.activation.backward(active, d_up, &saved.up, self.inner, |d_active| {
                down.input_gradient(d_active, WriteMode::Overwrite, branch, chunk.selected_before)
            });
            down.small_gradients(s_down, active, branch, chunk.selected_before);
            write_inputs(DOWN, active, branch);
            match weights.norm_2() {
                Some(norm) => norm.forward(branch, &saved.x1),
                None => weights.norms[0].forward(branch, &chunk.gather(x, d)),
            }
            up.input_gradient(h, WriteMode::Overwrite, d_up, chunk.selected_before);
            up.small_gradients(s_up, branch, d_up, chunk.selected_before);
            write_inputs(UP, branch, d_up);
            if let Some(norm_2) = weights.norm_2() {
                norm_backward(dx_selected, s_norm2, &saved.x1, h, norm_2);
            }

            masked(branch, dx_selected, weights.masks[0]);
            attn_out.input_gradient(
                &mut d_attended[..n * attn_shape.out_width()],
                WriteMode::Overwrite,
                branch,
                chunk.selected_before,
            );
            let attended = chunk.gather(&saved.attended, attn_shape.out_width());
            attn_out.small_gradients(s_out, &attended, branch, chunk.selected_before);
            write_inputs(ATTN_OUT, &attended, branch);
            chunk.scatter(d_attended, attn_shape.out_width());
            chunk.scatter(dx, d);
            let d_qkv = &mut buffer[..qkv_len];
            if self.row_subset.is_partial() {
                d_qkv.fill(0.0);
            }
            let inputs = BackwardInputs {
                qkv: attention::split_qkv(&saved.qkv, attn_shape),
                out: attention::heads_view(&saved.attended, attn_shape.out_width()),
                g: attention::heads_view(d_attended, attn_shape.out_width()),
                lse: &saved.lse,
            };
            for (i, grads) in attention::split_qkv_gradients(d_qkv, attn_shape).into_iter().enumerate() {
                let (sequence, head) = (i / attn_shape.kv_heads, i % attn_shape.kv_heads);
                let head = HeadIndex { sequence, head, first_row: chunk.first_in_sequence(sequence, attn_shape.time) };
                attention::backward_heads(grads, inputs, attn_shape, head);
            }
            self.rotate(d_qkv, Direction::Backward);
            weights.norms[0].forward(all_branch, x);
            qkv.small_gradients(s_qkv, all_branch, d_qkv, chunk.first_row);
            write_inputs(QKV, all_branch, d_qkv);
            if self.input_needs_grad || !s_norm1.is_empty() {
                // With a shared norm, `h` holds the MLP's gradient; attention's is added to it.
                let mode = match weights.norm_2() {
                    Some(_) => WriteMode::Overwrite,
                    None => {
                        chunk.scatter(all_h, d);
                        WriteMode::Add
                    }
                };
                qkv.input_gradient(all_h, mode, d_qkv, chunk.first_row);
                norm_backward(dx, s_norm1, x, all_h, &weights.norms[0]);
            }
        });
    }
}

impl CustomOp1 for TransformerBlockOp {
    fn name(&self) -> &'static str {
        "temper-transformer-block"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        self.forward_op(contiguous_slice(x, layout)?, layout.shape())
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, g: &Tensor) -> Result<Option<Tensor>> {
        self.backward(x, g)
    }
}

/// The second operand is one of the block's variables: it makes candle call `bwd` even if `x` needs no gradient.
impl CustomOp2 for TransformerBlockOp {
    fn name(&self) -> &'static str {
        "temper-transformer-block"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        self.forward_op(contiguous_slice(x, layout)?, layout.shape())
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, _y: &Tensor, g: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        Ok((self.backward(x, g)?, None))
    }
}
