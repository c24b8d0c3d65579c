//! Matrix products with a right factor that is packed once, in panels, and used many times.
//!
//! Panels hold f32, or operands rounded to bf16: then `c = scale * bf16(a) bf16(b)` with sums in f32; see
//! [`Precision::Bf16`](crate::Precision) for the rounding and the error. Panels are multiplied tile by tile.
//!
//! An element is the sum over blocks of [`DEPTH`] words in order, whichever tile it lies in and whichever thread
//! computes it: the result does not depend on the number of threads.

mod left;
mod pack;
mod right;
mod target;
#[cfg(test)]
mod tests;
mod tile;

use std::ops::Range;

pub use left::{Left, Rounded, Rows};
pub use right::{Plus, Right};
pub use target::Target;
pub use tile::round::Pair;

use super::gemm::{Into, Threads};
use tile::{Block, COLS, ROWS};

/// Words per block along the inner dimension: more than most products have. A block of a panel of the right factor, 192
/// KiB, and the group of row panels multiplied by it stay in the L2 cache.
const DEPTH: usize = 1024;
/// Row panels per group.
const PANELS: usize = 16;
/// Least number of multiplications that justifies a task of its own.
const TASK: usize = 1 << 21;

/// `target = or += scale * a b + bias`, with one element of the bias per column.
pub fn product<L: Left>(
    target: Target,
    into: Into,
    bias: Option<&[f32]>,
    scale: f32,
    a: &L,
    b: &Right<L::Word>,
    threads: Threads,
) {
    assert_eq!(a.k(), b.k(), "inner dimensions of a product");
    assert!(target.rows() == a.rows() && target.cols() == b.cols(), "the product has its destination's shape");
    assert!(bias.is_none_or(|bias| bias.len() == b.cols()), "an element of a bias for each column");
    let job = Job { into, bias, scale, a, b };
    job.run(target, 0..a.rows().div_ceil(ROWS), 0..b.panels(), threads);
}

struct Job<'a, L: Left> {
    into: Into,
    bias: Option<&'a [f32]>,
    scale: f32,
    a: &'a L,
    b: &'a Right<L::Word>,
}

impl<L: Left> Job<'_, L> {
    /// Computes the product of panels `rows` of `a` and `cols` of `b` into `target`.
    fn run(&self, target: Target, rows: Range<usize>, cols: Range<usize>, threads: Threads) {
        let (height, width) = (rows.len() * ROWS, cols.len() * COLS);
        if threads == Threads::One || height * width * self.a.k() < 2 * TASK {
            return self.part(target, rows, cols);
        }
        if height > width && rows.len() > 1 {
            let middle = rows.len() / 2;
            let (upper, lower) = target.split_rows(middle * ROWS);
            let middle = rows.start + middle;
            rayon::join(
                || self.run(upper, rows.start..middle, cols.clone(), threads),
                || self.run(lower, middle..rows.end, cols.clone(), threads),
            );
        } else if cols.len() > 1 {
            let middle = cols.len() / 2;
            let (left, right) = target.split_cols(middle * COLS);
            let middle = cols.start + middle;
            rayon::join(
                || self.run(left, rows.clone(), cols.start..middle, threads),
                || self.run(right, rows.clone(), middle..cols.end, threads),
            );
        } else {
            self.part(target, rows, cols);
        }
    }

    /// [`Job::run`] on the calling thread.
    fn part(&self, mut target: Target, rows: Range<usize>, cols: Range<usize>) {
        let mut tile = [[0.0; COLS]; ROWS];
        let depth = self.b.depth();
        for top in rows.clone().step_by(PANELS) {
            let group = top..(top + PANELS).min(rows.end);
            // An inner dimension of zero is one empty block, which overwrites with zeros.
            for block in 0..depth.div_ceil(DEPTH).max(1) {
                let words = block * DEPTH..((block + 1) * DEPTH).min(depth);
                let (into, bias) = if block == 0 { (self.into, self.bias) } else { (Into::Add, None) };
                for j in cols.clone() {
                    let panel = &self.b.panel(j)[words.clone()];
                    let next = if j + 1 < cols.end { &self.b.panel(j + 1)[words.clone()] } else { &[] };
                    let width = (target.cols() - (j - cols.start) * COLS).min(COLS);
                    let bias = bias.map(|bias| &bias[j * COLS..][..width]);
                    for i in group.clone() {
                        let (row, col) = ((i - rows.start) * ROWS, (j - cols.start) * COLS);
                        target.prefetch(row, col, ROWS, COLS);
                        let height = (target.rows() - row).min(ROWS);
                        let panel = Block::of(panel, next, i - group.start, group.len());
                        self.a.tile(&mut tile, i * ROWS..i * ROWS + height, words.start, panel, width);
                        target::write(&mut target, &tile[..height], row, col, into, bias, self.scale);
                    }
                }
            }
        }
    }
}
