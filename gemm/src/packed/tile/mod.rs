//! Tiles: products of a few rows and a panel's columns, in f32 or of operands rounded to bf16.

pub mod bf16;
pub mod bf16_tile;
pub mod f32_tile;

use crate::simd::{CACHE_LINE, prefetch_far};

/// Rows of a tile.
pub const ROWS: usize = 8;
/// Columns of an AVX-512 register.
pub const REGISTER_COLS: usize = 16;
/// Registers per row of a tile: as many as leave registers for the operands.
pub const REGISTERS: usize = 3;
/// Columns of a tile, and lanes of a right operand's panel.
pub const COLS: usize = REGISTERS * REGISTER_COLS;

/// A block of a product.
pub type Tile = [[f32; COLS]; ROWS];

/// The part of a panel that a tile reads, and data to prefetch for the tiles after it: an operand's panels follow one
/// another too fast for the hardware prefetcher.
#[derive(Clone, Copy)]
pub struct PanelBlock<'a, W> {
    /// `[depth, COLS]`
    pub words: &'a [[W; COLS]],
    /// Cache lines to prefetch.
    pub next: &'a [[W; CACHE_LINE]],
}

impl<'a, W: Copy> PanelBlock<'a, W> {
    /// For tile `i` of `tiles` tiles that multiply by the same `words`: each prefetches its share of `next`.
    pub fn new(words: &'a [[W; COLS]], next: &'a [[W; COLS]], i: usize, tiles: usize) -> Self {
        let [start, end] = [i, i + 1].map(|i| i * next.len() / tiles);
        Self { words, next: next[start..end].as_flattened().as_chunks().0 }
    }

    /// Prefetches cache line `i` of `next`, if it exists.
    #[inline(always)]
    fn prefetch_next(self, i: usize) {
        if i < self.next.len() {
            prefetch_far(&self.next[i]);
        }
    }
}

/// Functions for tiles of 1 to [`ROWS`] rows and 1 to [`REGISTERS`] registers of columns: a last panel is rarely full.
pub type KernelTable<M> = [[M; ROWS]; REGISTERS];

/// A [`KernelTable`] of the function `f::<rows, registers>`.
macro_rules! kernel_table {
    ($f:ident) => {
        [kernel_table!($f, 1), kernel_table!($f, 2), kernel_table!($f, 3)]
    };
    ($f:ident, $v:literal) => {
        [$f::<1, $v>, $f::<2, $v>, $f::<3, $v>, $f::<4, $v>, $f::<5, $v>, $f::<6, $v>, $f::<7, $v>, $f::<8, $v>]
    };
}
use kernel_table;

/// The function for `rows` rows and `cols` columns; it may fill further columns of the tile with anything.
pub fn select_kernel<M: Copy>(table: &KernelTable<M>, rows: usize, cols: usize) -> M {
    table[cols.div_ceil(REGISTER_COLS) - 1][rows - 1]
}
