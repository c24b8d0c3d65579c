//! Tiles: what a few rows and a panel's columns multiply to, in f32 or of operands rounded to bf16. Knows no memory beyond
//! the operands of one tile.

pub mod exact;
pub mod round;
pub mod rounded;

use super::pack::{Lanes, TOGETHER, pack_right, pack_right_rounded};
use round::{Pair, pair};

/// Rows of a tile.
pub const ROWS: usize = 8;
/// Columns of an AVX-512 register.
pub const VECTOR: usize = 16;
/// Registers of a tile's row: as many as leave room for the operands.
pub const VECTORS: usize = 3;
/// Columns of a tile, the lanes of a right factor's panel.
pub const COLS: usize = VECTORS * VECTOR;

/// A part of a product.
pub type Tile = [[f32; COLS]; ROWS];

/// What multiplies tiles of 1 to [`ROWS`] rows, by 1 to [`VECTORS`] registers of columns: a last panel is rarely full.
pub type Choice<M> = [[M; ROWS]; VECTORS];

/// What multiplies `rows` rows and `cols` columns; further columns of the tile may hold anything.
pub fn choose<M: Copy>(among: &Choice<M>, rows: usize, cols: usize) -> M {
    among[cols.div_ceil(VECTOR) - 1][rows - 1]
}

/// What a panel holds of a lane at a time.
pub trait Word: Copy + Default + Send + Sync + 'static {
    /// Elements of a lane in a word, neighbours along `k`.
    const ELEMENTS: usize;

    /// A word of each of many lanes, of their elements at some `k` and, for words of two, at the next.
    fn of(first: [f32; TOGETHER], second: impl FnOnce() -> [f32; TOGETHER]) -> [Self; TOGETHER];

    /// The words of some elements of one lane; a word of two that lacks one has zero in its place.
    fn along(words: &mut [Self], elements: &[f32]);

    /// Packs the lanes from `first` on into some panels of a right factor.
    fn pack_right(out: &mut [Self], from: Lanes, first: usize);
}

impl Word for f32 {
    const ELEMENTS: usize = 1;

    #[inline(always)]
    fn of(first: [Self; TOGETHER], _: impl FnOnce() -> [Self; TOGETHER]) -> [Self; TOGETHER] {
        first
    }

    #[inline(always)]
    fn along(words: &mut [Self], elements: &[Self]) {
        words[..elements.len()].copy_from_slice(elements);
    }

    fn pack_right(out: &mut [Self], from: Lanes, first: usize) {
        pack_right(out, from, first);
    }
}

impl Word for Pair {
    const ELEMENTS: usize = 2;

    #[inline(always)]
    fn of(first: [f32; TOGETHER], second: impl FnOnce() -> [f32; TOGETHER]) -> [Self; TOGETHER] {
        let second = second();
        let mut words = [Self::default(); TOGETHER];
        for i in 0..TOGETHER {
            words[i] = pair(first[i], second[i]);
        }
        words
    }

    #[inline(always)]
    fn along(words: &mut [Self], elements: &[f32]) {
        let (even_odd, rest) = elements.as_chunks::<2>();
        for (to, &[even, odd]) in words.iter_mut().zip(even_odd) {
            *to = pair(even, odd);
        }
        if let Some(last) = words.get_mut(even_odd.len())
            && let [even] = rest
        {
            *last = pair(*even, 0.0);
        }
    }

    fn pack_right(out: &mut [Self], from: Lanes, first: usize) {
        pack_right_rounded(out, from, first);
    }
}
