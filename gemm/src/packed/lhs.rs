//! Left operands: f32 rows in place, or rows rounded to bf16 and packed for the tiles.

use std::cell::RefCell;
use std::ops::Range;

use super::pack::{Operand, PanelWord, pack_lhs};
use super::tile::bf16::Bf16Pair;
use super::tile::{KernelTable, PanelBlock, ROWS, Tile, bf16_tile, f32_tile, select_kernel};
use crate::dense::{Mat, Threads};

/// A left operand, multiplied by a right operand with the same kind of words.
pub trait Lhs: Sync {
    /// The words in the right operand's panels.
    type Word: PanelWord;

    fn rows(&self) -> usize;

    /// Elements of a row.
    fn k(&self) -> usize;

    /// Writes the product of `rows` and a panel's first `cols` columns. `rows` are at most [`ROWS`] and start at a
    /// multiple of it; `first_word` is the index of the panel's first word along the inner dimension.
    fn tile(&self, tile: &mut Tile, rows: Range<usize>, first_word: usize, panel: PanelBlock<Self::Word>, cols: usize);
}

/// Rows of f32, each contiguous.
pub struct LhsRows<'a> {
    matrix: Mat<'a>,
    kernels: KernelTable<f32_tile::TileKernel>,
}

impl<'a> LhsRows<'a> {
    /// # Panics
    /// If the matrix is a transpose: products with packed operands read contiguous rows.
    pub fn new(matrix: Mat<'a>) -> Self {
        assert_eq!(matrix.col_stride, 1, "a left operand's rows are contiguous");
        Self { matrix, kernels: f32_tile::kernels() }
    }
}

impl Lhs for LhsRows<'_> {
    type Word = f32;

    fn rows(&self) -> usize {
        self.matrix.rows
    }

    fn k(&self) -> usize {
        self.matrix.cols
    }

    fn tile(&self, tile: &mut Tile, rows: Range<usize>, first_word: usize, panel: PanelBlock<f32>, cols: usize) {
        let height = rows.len();
        let Mat { data, row_stride, .. } = self.matrix;
        // Results of rows beyond the last are ignored; the last row stands in for them.
        let row = |i: usize| &data[(rows.start + i.min(height - 1)) * row_stride + first_word..][..panel.words.len()];
        select_kernel(&self.kernels, height, cols)(tile, &std::array::from_fn(row), panel);
    }
}

/// Rows rounded to bf16, in panels of [`ROWS`].
pub struct LhsPanels {
    /// `[panels, depth, ROWS]`
    pairs: Vec<Bf16Pair>,
    rows: usize,
    k: usize,
    kernels: KernelTable<bf16_tile::TileKernel>,
}

impl LhsPanels {
    /// Rounds the rows of `a` for the duration of `f`, in a buffer that this thread keeps for its next call.
    pub fn with_packed<R>(a: Mat, threads: Threads, f: impl FnOnce(&Self) -> R) -> R {
        let mut pairs = BUFFERS.with_borrow_mut(Vec::pop).unwrap_or_default();
        let operand = Operand::from_rows(a);
        let len = operand.panels(ROWS) * operand.depth::<Bf16Pair>() * ROWS;
        if pairs.len() < len {
            pairs.resize(len, Bf16Pair::default());
        }
        operand.pack::<Bf16Pair, ROWS>(&mut pairs[..len], threads, pack_lhs);
        let packed = Self { pairs, rows: a.rows, k: a.cols, kernels: bf16_tile::kernels() };
        let result = f(&packed);
        BUFFERS.with_borrow_mut(|pool| pool.push(packed.pairs));
        result
    }

    /// The words of panel `i`, `[depth, ROWS]`.
    pub fn panel(&self, i: usize) -> &[[Bf16Pair; ROWS]] {
        let size = self.k.div_ceil(2) * ROWS;
        self.pairs[i * size..(i + 1) * size].as_chunks().0
    }
}

impl Lhs for LhsPanels {
    type Word = Bf16Pair;

    fn rows(&self) -> usize {
        self.rows
    }

    fn k(&self) -> usize {
        self.k
    }

    fn tile(&self, tile: &mut Tile, rows: Range<usize>, first_word: usize, panel: PanelBlock<Bf16Pair>, cols: usize) {
        let a = &self.panel(rows.start / ROWS)[first_word..first_word + panel.words.len()];
        select_kernel(&self.kernels, rows.len(), cols)(tile, a, panel);
    }
}

thread_local! {
    static BUFFERS: RefCell<Vec<Vec<Bf16Pair>>> = const { RefCell::new(Vec::new()) };
}
