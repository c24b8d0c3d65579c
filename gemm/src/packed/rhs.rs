//! Right operands in panels.

use super::pack::{LowRankUpdate, Operand, PanelWord};
use super::tile::COLS;
use crate::buffer::build_chunked;
use crate::dense::Mat;

/// The columns of a right operand, [`COLS`] per panel.
pub struct RhsPanels<W> {
    /// `[panels, depth, COLS]`
    words: Vec<W>,
    cols: usize,
    k: usize,
}

impl<W: PanelWord> RhsPanels<W> {
    /// Packs `b`, or the sum of `b` and a low-rank matrix.
    pub fn new(b: Mat, update: Option<LowRankUpdate>) -> Self {
        let operand = Operand::from_columns(b, update);
        let (panel_len, group) = (operand.depth::<W>() * COLS, Operand::panels_per_group(COLS));
        let len = operand.panels(COLS) * panel_len;
        let words = build_chunked(len, group * panel_len, |start, out| {
            W::pack_rhs(out, operand, start / panel_len.max(1) * COLS)
        });
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
