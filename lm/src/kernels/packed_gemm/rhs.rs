//! Right factors in panels.

use super::pack::Lanes;
use super::tile::{COLS, Word};
use crate::kernels::buffer::build;
use crate::kernels::gemm::Mat;

pub use super::pack::Plus;

/// The columns of a right factor, [`COLS`] per panel.
pub struct Right<W> {
    /// `[panels, depth, COLS]`
    words: Vec<W>,
    cols: usize,
    k: usize,
}

impl<W: Word> Right<W> {
    /// Packs `b`, or the sum of `b` and a low-rank matrix.
    pub fn new(b: Mat, plus: Option<Plus>) -> Self {
        let from = Lanes::of_columns(b, plus);
        let (size, group) = (from.depth::<W>() * COLS, Lanes::together(COLS));
        let len = from.panels(COLS) * size;
        let words = build(len, group * size, |start, out| W::pack_right(out, from, start / size.max(1) * COLS));
        Self { words, cols: b.cols, k: b.rows }
    }

    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Elements per column.
    pub fn k(&self) -> usize {
        self.k
    }

    /// Words per column.
    pub fn depth(&self) -> usize {
        self.k.div_ceil(W::ELEMENTS)
    }

    /// Number of panels.
    pub fn panels(&self) -> usize {
        self.cols.div_ceil(COLS)
    }

    /// The words of panel `i`, `[depth, COLS]`.
    pub fn panel(&self, i: usize) -> &[[W; COLS]] {
        let size = self.depth() * COLS;
        self.words[i * size..(i + 1) * size].as_chunks().0
    }
}
