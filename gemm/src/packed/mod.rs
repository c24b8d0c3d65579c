//! Matrix products with a right operand that is packed once, in panels, and used many times.
//!
//! Panels hold f32, or operands rounded to bf16: then `c = scale * bf16(a) bf16(b)` with sums in f32; see
//! [`Precision::Bf16`](crate::Precision) for the rounding and the error. Panels are multiplied tile by tile.
//!
//! An element is the sum over blocks of [`DEPTH`] words in order, whichever tile it lies in and whichever thread
//! computes it: the result does not depend on the number of threads.

mod destination;
mod lhs;
mod pack;
mod rhs;
#[cfg(test)]
mod tests;
mod tile;

use std::ops::Range;

pub use destination::Destination;
pub use lhs::{Lhs, LhsPanels, LhsRows};
pub use pack::LowRankUpdate;
pub use rhs::RhsPanels;
pub use tile::bf16::Bf16Pair;

use crate::dense::{Threads, WriteMode};
use tile::{COLS, PanelBlock, ROWS};

/// Words per block along the inner dimension: more than most products have. A block of a panel of the right operand,
/// 192 KiB, and the group of row panels multiplied by it stay in the L2 cache.
const DEPTH: usize = 1024;
/// Row panels per group.
const GROUP_PANELS: usize = 16;
/// Least number of multiplications that justifies a task of its own.
const MIN_TASK: usize = 1 << 21;

/// `destination = or += scale * a b + bias`, with one element of the bias per column.
pub fn gemm_packed<L: Lhs>(
    destination: Destination,
    mode: WriteMode,
    bias: Option<&[f32]>,
    scale: f32,
    a: &L,
    b: &RhsPanels<L::Word>,
    threads: Threads,
) {
    assert_eq!(a.k(), b.k(), "inner dimensions of a product are equal");
    assert!(
        destination.rows() == a.rows() && destination.cols() == b.cols(),
        "the destination has the product's shape"
    );
    assert!(bias.is_none_or(|bias| bias.len() == b.cols()), "the bias has one element per column");
    let gemm = PackedGemm { mode, bias, scale, a, b };
    gemm.run(destination, 0..a.rows().div_ceil(ROWS), 0..b.panels(), threads);
}

/// The operands and settings of one product.
struct PackedGemm<'a, L: Lhs> {
    mode: WriteMode,
    bias: Option<&'a [f32]>,
    scale: f32,
    a: &'a L,
    b: &'a RhsPanels<L::Word>,
}

impl<L: Lhs> PackedGemm<'_, L> {
    /// Computes the product of panels `rows` of `a` and `cols` of `b` into `destination`.
    fn run(&self, destination: Destination, rows: Range<usize>, cols: Range<usize>, threads: Threads) {
        let (height, width) = (rows.len() * ROWS, cols.len() * COLS);
        if threads == Threads::One || height * width * self.a.k() < 2 * MIN_TASK {
            return self.run_serial(destination, rows, cols);
        }
        if height > width && rows.len() > 1 {
            let middle = rows.len() / 2;
            let (upper, lower) = destination.split_rows(middle * ROWS);
            let middle = rows.start + middle;
            rayon::join(
                || self.run(upper, rows.start..middle, cols.clone(), threads),
                || self.run(lower, middle..rows.end, cols.clone(), threads),
            );
        } else if cols.len() > 1 {
            let middle = cols.len() / 2;
            let (left, right) = destination.split_cols(middle * COLS);
            let middle = cols.start + middle;
            rayon::join(
                || self.run(left, rows.clone(), cols.start..middle, threads),
                || self.run(right, rows.clone(), middle..cols.end, threads),
            );
        } else {
            self.run_serial(destination, rows, cols);
        }
    }

    /// [`PackedGemm::run`] on the calling thread.
    fn run_serial(&self, mut destination: Destination, rows: Range<usize>, cols: Range<usize>) {
        let mut tile = [[0.0; COLS]; ROWS];
        let depth = self.b.depth();
        for top in rows.clone().step_by(GROUP_PANELS) {
            let group = top..(top + GROUP_PANELS).min(rows.end);
            // An inner dimension of zero is one empty block, which overwrites with zeros.
            for block in 0..depth.div_ceil(DEPTH).max(1) {
                let words = block * DEPTH..((block + 1) * DEPTH).min(depth);
                let (mode, bias) = if block == 0 { (self.mode, self.bias) } else { (WriteMode::Add, None) };
                for j in cols.clone() {
                    let panel = &self.b.panel(j)[words.clone()];
                    let next = if j + 1 < cols.end { &self.b.panel(j + 1)[words.clone()] } else { &[] };
                    let width = (destination.cols() - (j - cols.start) * COLS).min(COLS);
                    let bias = bias.map(|bias| &bias[j * COLS..][..width]);
                    for i in group.clone() {
                        let (row, col) = ((i - rows.start) * ROWS, (j - cols.start) * COLS);
                        destination.prefetch(row, col, ROWS, COLS);
                        let height = (destination.rows() - row).min(ROWS);
                        let panel = PanelBlock::new(panel, next, i - group.start, group.len());
                        self.a.tile(&mut tile, i * ROWS..i * ROWS + height, words.start, panel, width);
                        destination::write_tile(&mut destination, &tile[..height], row, col, mode, bias, self.scale);
                    }
                }
            }
        }
    }
}
