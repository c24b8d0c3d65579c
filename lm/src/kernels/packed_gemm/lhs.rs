//! Left factors: f32 rows in place, or rows rounded to bf16 and packed for the tiles.

use std::cell::RefCell;
use std::ops::Range;

use super::pack::{Lanes, pack_left};
use super::tile::round::Pair;
use super::tile::{Block, Choice, ROWS, Tile, Word, choose, exact, rounded};
use crate::kernels::gemm::{Mat, Threads};

/// A left factor, multiplied by a right factor with the same kind of words.
pub trait Left: Sync {
    /// The words in the right factor's panels.
    type Word: Word;

    fn rows(&self) -> usize;

    /// Elements of a row.
    fn k(&self) -> usize;

    /// Writes the product of `rows` and a panel's first `cols` columns. `rows` are at most [`ROWS`] and start at a
    /// multiple of it; `first` is the index of the panel's first word along the inner dimension.
    fn tile(&self, tile: &mut Tile, rows: Range<usize>, first: usize, panel: Block<Self::Word>, cols: usize);
}

/// Rows of f32, each contiguous.
pub struct Rows<'a> {
    matrix: Mat<'a>,
    multiply: Choice<exact::Multiply>,
}

impl<'a> Rows<'a> {
    /// # Panics
    /// If the matrix is a transpose: products with prepared factors read contiguous rows.
    pub fn of(matrix: Mat<'a>) -> Self {
        assert_eq!(matrix.col_stride, 1, "a left factor's rows are contiguous");
        Self { matrix, multiply: exact::multiply() }
    }
}

impl Left for Rows<'_> {
    type Word = f32;

    fn rows(&self) -> usize {
        self.matrix.rows
    }

    fn k(&self) -> usize {
        self.matrix.cols
    }

    fn tile(&self, tile: &mut Tile, rows: Range<usize>, first: usize, panel: Block<f32>, cols: usize) {
        let height = rows.len();
        let Mat { data, row_stride, .. } = self.matrix;
        // Results of rows beyond the last are ignored; the last row stands in for them.
        let of = |i: usize| &data[(rows.start + i.min(height - 1)) * row_stride + first..][..panel.words.len()];
        choose(&self.multiply, height, cols)(tile, &std::array::from_fn(of), panel);
    }
}

/// Rows rounded to bf16, in panels of [`ROWS`].
pub struct Rounded {
    /// `[panels, depth, ROWS]`
    pairs: Vec<Pair>,
    rows: usize,
    k: usize,
    multiply: Choice<rounded::Multiply>,
}

impl Rounded {
    /// Rounds the rows of `a` for the duration of `f`, in a buffer that this thread keeps for its next call.
    pub fn with<R>(a: Mat, threads: Threads, f: impl FnOnce(&Self) -> R) -> R {
        let mut pairs = ROOM.with_borrow_mut(Vec::pop).unwrap_or_default();
        let from = Lanes::of_rows(a);
        let len = from.panels(ROWS) * from.depth::<Pair>() * ROWS;
        if pairs.len() < len {
            pairs.resize(len, Pair::default());
        }
        from.pack::<Pair, ROWS>(&mut pairs[..len], threads, pack_left);
        let packed = Self { pairs, rows: a.rows, k: a.cols, multiply: rounded::multiply() };
        let result = f(&packed);
        ROOM.with_borrow_mut(|pool| pool.push(packed.pairs));
        result
    }

    /// The words of panel `i`, `[depth, ROWS]`.
    pub fn panel(&self, i: usize) -> &[[Pair; ROWS]] {
        let size = self.k.div_ceil(2) * ROWS;
        self.pairs[i * size..(i + 1) * size].as_chunks().0
    }
}

impl Left for Rounded {
    type Word = Pair;

    fn rows(&self) -> usize {
        self.rows
    }

    fn k(&self) -> usize {
        self.k
    }

    fn tile(&self, tile: &mut Tile, rows: Range<usize>, first: usize, panel: Block<Pair>, cols: usize) {
        let a = &self.panel(rows.start / ROWS)[first..first + panel.words.len()];
        choose(&self.multiply, rows.len(), cols)(tile, a, panel);
    }
}

thread_local! {
    static ROOM: RefCell<Vec<Vec<Pair>>> = const { RefCell::new(Vec::new()) };
}
