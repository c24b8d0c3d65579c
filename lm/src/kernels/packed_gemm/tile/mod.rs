//! Tiles: products of a few rows and a panel's columns, in f32 or of operands rounded to bf16.

pub mod exact;
pub mod round;
pub mod rounded;

use super::pack::{Lanes, pack_right, pack_right_rounded};
use crate::kernels::simd::{LINE, prefetch_far};
use round::{Pair, pair};

/// Rows of a tile.
pub const ROWS: usize = 8;
/// Columns of an AVX-512 register.
pub const VECTOR: usize = 16;
/// Registers per row of a tile: as many as leave registers for the operands.
pub const VECTORS: usize = 3;
/// Columns of a tile, and lanes of a right factor's panel.
pub const COLS: usize = VECTORS * VECTOR;

/// A block of a product.
pub type Tile = [[f32; COLS]; ROWS];

/// The part of a panel that a tile reads, and data to prefetch for the tiles after it: a factor's panels follow one
/// another too fast for the hardware prefetcher.
#[derive(Clone, Copy)]
pub struct Block<'a, W> {
    /// `[depth, COLS]`
    pub words: &'a [[W; COLS]],
    /// Cache lines to prefetch.
    pub next: &'a [[W; LINE]],
}

impl<'a, W: Word> Block<'a, W> {
    /// For tile `i` of `tiles` tiles that multiply by the same `words`: each prefetches its share of `next`.
    pub fn of(words: &'a [[W; COLS]], next: &'a [[W; COLS]], i: usize, tiles: usize) -> Self {
        let [start, end] = [i, i + 1].map(|i| i * next.len() / tiles);
        Self { words, next: next[start..end].as_flattened().as_chunks().0 }
    }

    /// Prefetches cache line `i` of `next`, if it exists.
    #[inline(always)]
    fn fetch(self, i: usize) {
        if i < self.next.len() {
            prefetch_far(&self.next[i]);
        }
    }
}

/// Functions for tiles of 1 to [`ROWS`] rows and 1 to [`VECTORS`] registers of columns: a last panel is rarely full.
pub type Choice<M> = [[M; ROWS]; VECTORS];

/// A [`Choice`] of the function `f::<rows, registers>`.
macro_rules! each_size {
    ($f:ident) => {
        [each_size!($f, 1), each_size!($f, 2), each_size!($f, 3)]
    };
    ($f:ident, $v:literal) => {
        [$f::<1, $v>, $f::<2, $v>, $f::<3, $v>, $f::<4, $v>, $f::<5, $v>, $f::<6, $v>, $f::<7, $v>, $f::<8, $v>]
    };
}
use each_size;

/// The function for `rows` rows and `cols` columns; it may fill further columns of the tile with anything.
pub fn choose<M: Copy>(among: &Choice<M>, rows: usize, cols: usize) -> M {
    among[cols.div_ceil(VECTOR) - 1][rows - 1]
}

/// The unit in which a panel stores a lane.
pub trait Word: Copy + Default + Send + Sync + 'static {
    /// Elements of a lane per word, neighbours along `k`.
    const ELEMENTS: usize;

    /// One word for each of `N` lanes, from their elements at some `k` and, for words of two elements, at the next `k`.
    fn of<const N: usize>(first: [f32; N], second: impl FnOnce() -> [f32; N]) -> [Self; N];

    /// Stores consecutive elements of one lane as words.
    fn along<const N: usize>(words: &mut [Self], elements: [f32; N]);

    /// Packs the lanes from `first` on into some panels of a right factor.
    fn pack_right(out: &mut [Self], from: Lanes, first: usize);
}

impl Word for f32 {
    const ELEMENTS: usize = 1;

    #[inline(always)]
    fn of<const N: usize>(first: [Self; N], _: impl FnOnce() -> [Self; N]) -> [Self; N] {
        first
    }

    #[inline(always)]
    fn along<const N: usize>(words: &mut [Self], elements: [Self; N]) {
        words.copy_from_slice(&elements);
    }

    fn pack_right(out: &mut [Self], from: Lanes, first: usize) {
        pack_right(out, from, first);
    }
}

impl Word for Pair {
    const ELEMENTS: usize = 2;

    #[inline(always)]
    fn of<const N: usize>(first: [f32; N], second: impl FnOnce() -> [f32; N]) -> [Self; N] {
        let second = second();
        let mut words = [Self::default(); N];
        for i in 0..N {
            words[i] = pair(first[i], second[i]);
        }
        words
    }

    #[inline(always)]
    fn along<const N: usize>(words: &mut [Self], elements: [f32; N]) {
        for i in 0..N / 2 {
            words[i] = pair(elements[2 * i], elements[2 * i + 1]);
        }
    }

    fn pack_right(out: &mut [Self], from: Lanes, first: usize) {
        pack_right_rounded(out, from, first);
    }
}
