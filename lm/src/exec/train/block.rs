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
use temper_gemm::WriteMode;
use temper_gemm::buffer::{build_chunked, split_at_lengths_mut, split_submatrices, with_scratch};
use temper_gemm::simd::add_assign;

use super::attention::{self, AttentionShape, BackwardInputs, HeadIndex};
use super::candle_interop::{CpuSlice, SavedForBackward, contiguous_slice, grad_tensor, op_output, rows_and_width};
use super::linear::{self, LinearView};
use super::norm::{RowNorm, norm_heads, norm_heads_backward};
use super::row_subset::{ChunkRows, RowSubset};
use super::weight_grad_inputs::{ChunkWriter, PerLinear, WeightGradInputs};
use super::{BlockPass, Direction, DropoutMask, leaf_or_constant};
use crate::model::block::{Block, Heads};
use crate::model::linear::Linear;

/// Least number of rows in a chunk, if there are as many.
const CHUNK_ROWS: usize = 128;

/// Indices of the groups of linear layers.
const QKV: usize = 0;
const ATTN_OUT: usize = 1;
const UP: usize = 2;
const DOWN: usize = 3;

/// The block's weights in memory, for one direction.
type BlockView<'a> = Block<LinearView<'a>, RowNorm<CpuSlice<'a>>>;

/// The block as a candle operation.
pub struct TransformerBlockOp {
    block: Arc<Block>,
    /// Without its output rows.
    pass: BlockPass,
    /// The rows kept after attention.
    row_subset: RowSubset,
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
    /// After norms and rotation.
    qkv: Vec<f32>,
    /// Queries and keys before their norms; empty if there are none.
    qk: Vec<f32>,
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

impl TransformerBlockOp {
    pub fn new(x: &Tensor, block: Arc<Block>, mut pass: BlockPass) -> Result<Self> {
        let (rows, d) = rows_and_width(x)?;
        let time = pass.time;
        let heads @ Heads { query, key_value, width } = block.attention.heads;
        if width == 0 || key_value == 0 || query == 0 || !query.is_multiple_of(key_value) {
            bail!(
                "attention needs query heads in a multiple of its key/value heads, got {query} and {key_value} of width {width}"
            );
        }
        if time == 0 || !rows.is_multiple_of(time) {
            bail!("attention needs whole sequences, got {rows} rows for sequences of {time}");
        }
        let attn_shape = AttentionShape { batch: rows / time, time, heads: query, kv_heads: key_value, width };
        if let Some(rotary) = &pass.rotary {
            rotary.check(width, time)?;
        }
        let inner = block.mlp.down.weight.dim(0)?;
        let row_subset = RowSubset::new(rows, pass.output_rows.take())?;
        let n = row_subset.len();
        let wide = block.mlp.activation.input_width(inner);
        let widths = [(rows, d, attn_shape.qkv_width()), (n, heads.columns(query), d), (n, d, wide), (n, inner, d)];
        let mut masks = pass.adapter_masks();
        for (group, (rows, d_in, d_out)) in block.groups().into_iter().zip(widths) {
            linear::check_widths(group, d_in, d_out)?;
            for mask in masks.by_ref().take(group.len()).flatten() {
                check_mask(mask, rows, d_in)?;
            }
        }
        drop(masks);
        pass.residual_dropout.iter().flatten().try_for_each(|mask| check_mask(mask, n, d))?;
        let tensors = block.tensors();
        tensors.iter().try_for_each(|tensor| leaf_or_constant(tensor).map(drop))?;
        let input_needs_grad = x.track_op();
        let tracked = input_needs_grad || tensors.iter().any(|tensor| tensor.is_variable());
        let chunk_sequences = (attn_shape.batch / 4).clamp(1, CHUNK_ROWS.div_ceil(time));
        let saved = SavedForBackward::default();
        Ok(Self { block, pass, row_subset, d, inner, attn_shape, chunk_sequences, tracked, input_needs_grad, saved })
    }

    /// A variable among the weights, if there is one.
    pub fn variable(&self) -> Option<Tensor> {
        self.block.tensors().into_iter().find(|tensor| tensor.is_variable()).cloned()
    }

    /// Rows of a chunk.
    fn chunk_rows(&self) -> usize {
        self.chunk_sequences * self.attn_shape.time
    }

    /// The weights, packed for one direction.
    fn view(&self, direction: Direction) -> Result<BlockView<'_>> {
        let view = self.block.parts().try_map(
            &mut self.pass.adapter_masks(),
            |masks, linear| LinearView::new(linear, masks.next().flatten(), self.pass.precision, direction),
            |_, norm| RowNorm::new(norm),
        )?;
        let pack = |group: usize| view.groups()[group].iter().for_each(LinearView::pack);
        rayon::join(|| rayon::join(|| pack(QKV), || pack(ATTN_OUT)), || rayon::join(|| pack(UP), || pack(DOWN)));
        Ok(view)
    }

    fn forward(&self, x: &[f32]) -> Result<Vec<f32>> {
        let chunk_rows = self.chunk_rows();
        let chunks = self.row_subset.chunks(chunk_rows);
        let mut y = build_chunked(self.row_subset.len() * self.d, chunk_rows * self.d, |_, _| {});
        let view = self.view(Direction::Forward)?;
        let outputs = split_at_lengths_mut(&mut y, chunks.iter().map(|chunk| chunk.len() * self.d));
        let tasks = outputs.into_par_iter().zip(x.par_chunks(chunk_rows * self.d)).zip(chunks);
        let saved: Vec<Option<SavedActivations>> = tasks
            .map(|((y, x), chunk)| {
                let saved = self.forward_chunk(y, x, chunk, &view);
                self.tracked.then_some(saved)
            })
            .collect();
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

    /// Columns of queries and of keys in joint rows.
    fn qk_columns(&self) -> [usize; 2] {
        let AttentionShape { heads, kv_heads, width, .. } = self.attn_shape;
        [heads * width, kv_heads * width]
    }

    /// Applies the rotary embedding to the queries and keys of joint rows.
    fn rotate(&self, qkv: &mut [f32], direction: Direction) {
        let Some(rotary) = &self.pass.rotary else { return };
        let AttentionShape { time, width, .. } = self.attn_shape;
        let columns = self.qk_columns().iter().sum::<usize>();
        for (i, row) in qkv.chunks_exact_mut(self.attn_shape.qkv_width()).enumerate() {
            rotary.rotate(&mut row[..columns], width, i % time, direction);
        }
    }

    fn forward_chunk(&self, y: &mut [f32], x: &[f32], chunk: ChunkRows, view: &BlockView) -> SavedActivations {
        let d = self.d;
        let (rows, n, first_output) = (chunk.rows, chunk.len(), chunk.selected_before);
        let attn_shape = AttentionShape { batch: rows / self.attn_shape.time, ..self.attn_shape };
        let [qkv_layers, out_layer, up_layers, down_layer] = view.groups();
        let (mut qkv, shared_up) = with_scratch(x.len(), |h| {
            view.norm_1.forward(h, x);
            let up = view.norm_2.is_none().then(|| linear::apply(up_layers, &chunk.gather(h, d), n, first_output));
            (linear::apply(qkv_layers, h, rows, chunk.first_row), up)
        });
        let mut qk = vec![];
        if let Some(norms) = &view.attention.qk_norm {
            let columns = self.qk_columns();
            qk.reserve_exact(rows * (columns[0] + columns[1]));
            for row in qkv.chunks_exact(attn_shape.qkv_width()) {
                qk.extend_from_slice(&row[..columns[0] + columns[1]]);
            }
            norm_heads(norms, &mut qkv, attn_shape.qkv_width(), columns);
        }
        self.rotate(&mut qkv, Direction::Forward);
        let mut attended = vec![0.0; rows * attn_shape.out_width()];
        let mut lse = vec![0.0; attn_shape.batch * attn_shape.heads * attn_shape.time];
        let outs = split_submatrices(&mut attended, attn_shape.time, attn_shape.width, attn_shape.heads);
        for (i, (out, lse)) in outs.into_iter().zip(lse.chunks_exact_mut(attn_shape.time)).enumerate() {
            let (sequence, head) = (i / attn_shape.heads, i % attn_shape.heads);
            let head = HeadIndex { sequence, head, first_row: chunk.first_in_sequence(sequence, attn_shape.time) };
            attention::forward_head(out, lse, attention::split_qkv(&qkv, attn_shape), attn_shape, head);
        }
        let add_branch = |y: &mut [f32], layer: &[LinearView], input: &[f32], mask: &Option<DropoutMask>| match mask {
            None => linear::add_to(layer, y, input, first_output),
            Some(mask) => mask.add_product(y, &linear::apply(layer, input, n, first_output), first_output * d),
        };
        let [attn_dropout, mlp_dropout] = &self.pass.residual_dropout;
        chunk.gather_into(y, x, d);
        add_branch(y, out_layer, &chunk.gather(&attended, attn_shape.out_width()), attn_dropout);
        let mut x1 = vec![];
        let up = match (&view.norm_2, shared_up) {
            (Some(norm), _) => {
                x1 = y.to_vec();
                with_scratch(x1.len(), |h| {
                    norm.forward(h, &x1);
                    linear::apply(up_layers, h, n, first_output)
                })
            }
            (None, up) => up.unwrap_or_default(),
        };
        with_scratch(n * self.inner, |active| {
            self.block.mlp.activation.forward(active, &up, self.inner);
            add_branch(y, down_layer, active, mlp_dropout);
        });
        SavedActivations { qkv, qk, lse, attended, x1, up }
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
        let mut total = 0;
        let add = |total: &mut usize, len: usize| {
            *total += len;
            len
        };
        let small_grad_lens = self.block.parts().map(
            &mut total,
            |total, linear| add(total, linear.small_grad_len()),
            |total, norm| add(total, norm.small_grad_len()),
        );
        let sizes = || chunks.iter().map(|&chunk| self.sizes(chunk)).collect::<Vec<_>>();
        let trains_weights = self.block.linears().any(|linear| linear.weight.is_variable());
        let mut weight_grad_inputs = trains_weights.then(|| WeightGradInputs::new(&sizes()));
        let writers = match &mut weight_grad_inputs {
            Some(inputs) => inputs.writers().into_iter().map(Some).collect(),
            None => chunks.iter().map(|_| None).collect::<Vec<_>>(),
        };
        let view = self.view(Direction::Backward)?;
        let rows = dx.par_chunks_mut(chunk_rows * self.d).zip(x_v.par_chunks(chunk_rows * self.d));
        let chunk_grads: Vec<Vec<f32>> = rows
            .zip(saved)
            .zip(chunks.par_iter().zip(writers))
            .map(|(((dx, x), saved), (&chunk, writer))| {
                let g = &g_v[chunk.selected_before * self.d..][..chunk.len() * self.d];
                let mut small_grads = vec![0.0; total];
                let parts = small_grad_lens.parts().map(&mut &mut *small_grads, split_off, split_off);
                self.backward_chunk(dx, parts, ChunkInputs { x, g, saved, chunk, writer }, &view);
                small_grads
            })
            .collect();
        drop(view);
        let mut chunk_sums = chunk_grads.iter();
        let mut small_grads = chunk_sums.next().map_or_else(|| vec![0.0; total], Vec::clone);
        chunk_sums.for_each(|s| add_assign(&mut small_grads, s));
        let mut rest = &*small_grads;
        let mut take = |len: usize| rest.split_off(..len).expect("small gradients of all parts");
        self.block.parts().try_map(
            &mut take,
            |take, linear| linear.accumulate_small_grads(take(linear.small_grad_len())),
            |take, norm| norm.accumulate_small_grads(take(norm.small_grad_len())),
        )?;
        if let Some(weight_grad_inputs) = weight_grad_inputs {
            let groups = self.block.groups().into_iter().zip(weight_grad_inputs.finish());
            for (group, [x, g]) in groups {
                linear::accumulate_weight_grads(group, &x, &g, self.pass.precision)?;
            }
        }
        self.input_needs_grad.then(|| grad_tensor(dx, x)).transpose()
    }

    /// Number of elements of each group's input and output.
    fn sizes(&self, chunk: ChunkRows) -> PerLinear<usize> {
        let [qkv, out, up, down] = self.block.groups().map(|group| {
            let d_out: usize = group.iter().map(|linear: &Linear| linear.weight.dims()[1]).sum();
            [group[0].weight.dims()[0], d_out]
        });
        [(qkv, chunk.rows), (out, chunk.len()), (up, chunk.len()), (down, chunk.len())]
            .map(|(widths, rows)| widths.map(|width| width * rows))
    }

    fn backward_chunk(
        &self,
        dx: &mut [f32],
        mut small_grads: Block<&mut [f32], &mut [f32]>,
        ChunkInputs { x, g, saved, chunk, mut writer }: ChunkInputs,
        view: &BlockView,
    ) {
        let d = self.d;
        let (rows, n, first_output) = (chunk.rows, chunk.len(), chunk.selected_before);
        let attn_shape = AttentionShape { batch: rows / self.attn_shape.time, ..self.attn_shape };
        // The gradient of a branch's output: that of the sum, times the dropout mask if there is one.
        let masked = |out: &mut [f32], g: &[f32], mask: &Option<DropoutMask>| match mask {
            None => out.copy_from_slice(g),
            Some(mask) => mask.multiply(out, g, first_output * d),
        };
        let norm_backward = |dx: &mut [f32], small_grads: &mut [f32], x: &[f32], g: &[f32], norm: &RowNorm<_>| {
            norm.backward(dx, x, g);
            if !small_grads.is_empty() {
                norm.backward_weights(small_grads, x, g);
            }
        };
        let [attn_dropout, mlp_dropout] = &self.pass.residual_dropout;
        let [qkv, attn_out, up, down] = view.groups();
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

            masked(branch, g, mlp_dropout);
            let (active, d_up) = buffer[..active + wide].split_at_mut(active);
            self.block.mlp.activation.backward(active, d_up, &saved.up, self.inner, |d_active| {
                linear::input_gradient(down, d_active, WriteMode::Overwrite, branch, first_output)
            });
            let grad = std::slice::from_mut(&mut small_grads.mlp.down);
            linear::small_gradients(down, grad, active, branch, first_output);
            write_inputs(DOWN, active, branch);
            match &view.norm_2 {
                Some(norm) => norm.forward(branch, &saved.x1),
                None => view.norm_1.forward(branch, &chunk.gather(x, d)),
            }
            linear::input_gradient(up, h, WriteMode::Overwrite, d_up, first_output);
            linear::small_gradients(up, &mut small_grads.mlp.up, branch, d_up, first_output);
            write_inputs(UP, branch, d_up);
            if let (Some(norm_2), Some(grad)) = (&view.norm_2, small_grads.norm_2) {
                norm_backward(dx_selected, grad, &saved.x1, h, norm_2);
            }

            masked(branch, dx_selected, attn_dropout);
            let d_output = &mut d_attended[..n * attn_shape.out_width()];
            linear::input_gradient(attn_out, d_output, WriteMode::Overwrite, branch, first_output);
            let attended = chunk.gather(&saved.attended, attn_shape.out_width());
            let grad = std::slice::from_mut(&mut small_grads.attention.out);
            linear::small_gradients(attn_out, grad, &attended, branch, first_output);
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
            if let (Some(norms), Some(grads)) = (&view.attention.qk_norm, small_grads.attention.qk_norm) {
                norm_heads_backward(norms, grads, d_qkv, &saved.qk, attn_shape.qkv_width(), self.qk_columns());
            }
            view.norm_1.forward(all_branch, x);
            linear::small_gradients(qkv, &mut small_grads.attention.qkv, all_branch, d_qkv, chunk.first_row);
            write_inputs(QKV, all_branch, d_qkv);
            if self.input_needs_grad || !small_grads.norm_1.is_empty() {
                // With a shared norm, `h` holds the MLP's gradient; attention's is added to it.
                let mode = match &view.norm_2 {
                    Some(_) => WriteMode::Overwrite,
                    None => {
                        chunk.scatter(all_h, d);
                        WriteMode::Add
                    }
                };
                linear::input_gradient(qkv, all_h, mode, d_qkv, chunk.first_row);
                norm_backward(dx, small_grads.norm_1, x, all_h, &view.norm_1);
            }
        });
    }
}

/// Takes the first `len` elements of `rest`.
fn split_off<'a>(rest: &mut &'a mut [f32], len: &usize) -> &'a mut [f32] {
    rest.split_off_mut(..*len).expect("small gradients of all parts")
}

fn check_mask(mask: &DropoutMask, rows: usize, d: usize) -> Result<()> {
    if mask.elements() != rows * d {
        bail!("a dropout mask has {} elements, expected {rows} rows of {d}", mask.elements());
    }
    Ok(())
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
