//! Packing of operands into panels.
//!
//! An operand consists of lanes of `k` elements: the rows of a left operand, the columns of a right one. A panel holds
//! some lanes side by side, word after word along `k`; the last panel and the last word are padded with zeros.

use rayon::prelude::*;

use super::tile::bf16::{Bf16Pair, bf16_pair};
use super::tile::{COLS, ROWS};
use crate::dense::{Mat, Threads};
use crate::simd::{fma, prefetch};

/// Lanes packed together: a whole number of panels of either kind.
pub const GROUP_LANES: usize = 96;
/// Words packed per panel before moving on to the next panel, if lanes are neighbours in memory.
const STEP_WORDS: usize = 4;
/// Prefetch distance into the L1 cache, in lanes.
const PREFETCH_LANES: usize = 4;
/// Words of a lane read in one go, if a lane's elements are neighbours in memory.
const BLOCK_WORDS: usize = 128;
/// Elements of a lane summed in registers.
const PIECE_ELEMENTS: usize = 64;
/// Least size of an operand, in elements, whose packing is shared among threads.
const MIN_PARALLEL_ELEMENTS: usize = 64 * 1024;

/// A low-rank matrix `a' b` that is added to another while that is packed; both have contiguous rows.
#[derive(Clone, Copy)]
pub struct LowRankUpdate<'a> {
    /// `[rank, rows]`
    pub a: &'a [f32],
    /// `[rank, cols]`
    pub b: &'a [f32],
    pub rank: usize,
}

/// The unit in which a panel stores a lane.
pub trait PanelWord: Copy + Default + Send + Sync + 'static {
    /// Elements of a lane per word, neighbours along `k`.
    const ELEMENTS: usize;

    /// One word for each of `N` lanes, from their elements at some `k` and, for words of two elements, at the next `k`.
    fn from_elements<const N: usize>(first: [f32; N], second: impl FnOnce() -> [f32; N]) -> [Self; N];

    /// Stores consecutive elements of one lane as words.
    fn store_elements<const N: usize>(words: &mut [Self], elements: [f32; N]);

    /// Packs the lanes from `first` on into some panels of a right operand.
    fn pack_rhs(out: &mut [Self], operand: Operand, first: usize);
}

impl PanelWord for f32 {
    const ELEMENTS: usize = 1;

    #[inline(always)]
    fn from_elements<const N: usize>(first: [Self; N], _: impl FnOnce() -> [Self; N]) -> [Self; N] {
        first
    }

    #[inline(always)]
    fn store_elements<const N: usize>(words: &mut [Self], elements: [Self; N]) {
        words.copy_from_slice(&elements);
    }

    fn pack_rhs(out: &mut [Self], operand: Operand, first: usize) {
        pack_rhs_f32(out, operand, first);
    }
}

impl PanelWord for Bf16Pair {
    const ELEMENTS: usize = 2;

    #[inline(always)]
    fn from_elements<const N: usize>(first: [f32; N], second: impl FnOnce() -> [f32; N]) -> [Self; N] {
        let second = second();
        let mut words = [Self::default(); N];
        for i in 0..N {
            words[i] = bf16_pair(first[i], second[i]);
        }
        words
    }

    #[inline(always)]
    fn store_elements<const N: usize>(words: &mut [Self], elements: [f32; N]) {
        for i in 0..N / 2 {
            words[i] = bf16_pair(elements[2 * i], elements[2 * i + 1]);
        }
    }

    fn pack_rhs(out: &mut [Self], operand: Operand, first: usize) {
        pack_rhs_bf16(out, operand, first);
    }
}

/// The lanes of an operand in memory. One of the strides is 1.
#[derive(Clone, Copy)]
pub struct Operand<'a> {
    data: &'a [f32],
    lanes: usize,
    k: usize,
    lane_stride: usize,
    k_stride: usize,
    update: Option<LowRankUpdate<'a>>,
}

impl<'a> Operand<'a> {
    pub fn from_rows(m: Mat<'a>) -> Self {
        let Mat { data, rows, cols, row_stride, col_stride } = m;
        Self { data, lanes: rows, k: cols, lane_stride: row_stride, k_stride: col_stride, update: None }
    }

    pub fn from_columns(m: Mat<'a>, update: Option<LowRankUpdate<'a>>) -> Self {
        if let Some(LowRankUpdate { a, b, rank }) = update {
            let same_shape = a.len() == rank * m.rows && b.len() == rank * m.cols;
            assert!(same_shape, "the low-rank update has the shape of the operand");
        }
        Self { update, ..Self::from_rows(m.t()) }
    }

    /// Words per lane.
    pub fn depth<W: PanelWord>(self) -> usize {
        self.k.div_ceil(W::ELEMENTS)
    }

    /// Number of panels of `width` lanes.
    pub fn panels(self, width: usize) -> usize {
        self.lanes.div_ceil(width)
    }

    /// Number of panels of `width` lanes packed together.
    pub const fn panels_per_group(width: usize) -> usize {
        GROUP_LANES / width
    }

    /// Fills panels of `WIDTH` lanes; each call `panels(out, lanes, first lane)` fills several.
    pub fn pack<W: PanelWord, const WIDTH: usize>(
        self,
        out: &mut [W],
        threads: Threads,
        panels: fn(&mut [W], Operand, usize),
    ) {
        let group = Self::panels_per_group(WIDTH) * self.depth::<W>() * WIDTH;
        if group == 0 {
            return;
        }
        let fill = |(i, out): (usize, &mut [W])| panels(out, self, i * Self::panels_per_group(WIDTH) * WIDTH);
        match threads {
            Threads::Pool if self.lanes * self.k >= MIN_PARALLEL_ELEMENTS => {
                out.par_chunks_mut(group).enumerate().for_each(fill)
            }
            _ => out.chunks_mut(group).enumerate().for_each(fill),
        }
    }

    /// Element `k` of the `N` lanes from `first` on, for lanes that are neighbours in memory; 0 beyond the operand.
    #[inline(always)]
    fn load_lanes<const FMA: bool, const N: usize>(self, k: usize, first: usize) -> [f32; N] {
        if k >= self.k {
            return [0.0; N];
        }
        let mut sum = window(&self.data[k * self.k_stride..][..self.lanes], first);
        if let Some(LowRankUpdate { a, b, rank }) = self.update {
            for r in 0..rank {
                let b = window(&b[r * self.lanes..][..self.lanes], first);
                add_scaled::<FMA, N>(&mut sum, a[r * self.k + k], &b);
            }
        }
        sum
    }

    /// The `N` elements of lane `lane` from `start` on, for elements that are neighbours in memory; 0 beyond the
    /// operand.
    #[inline(always)]
    fn load_elements<const FMA: bool, const N: usize>(self, lane: usize, start: usize) -> [f32; N] {
        let mut sum = window(&self.data[lane * self.lane_stride..][..self.k], start);
        if let Some(LowRankUpdate { a, b, rank }) = self.update {
            for r in 0..rank {
                let a = window(&a[r * self.k..][..self.k], start);
                add_scaled::<FMA, N>(&mut sum, b[r * self.lanes + lane], &a);
            }
        }
        sum
    }
}

/// `sum += scale x`, in registers if `N` elements fit.
#[inline(always)]
fn add_scaled<const FMA: bool, const N: usize>(sum: &mut [f32; N], scale: f32, x: &[f32; N]) {
    for i in 0..N {
        sum[i] = fma::<FMA>(scale, x[i], sum[i]);
    }
}

/// The `N` elements from `first` on, 0 beyond the last.
#[inline(always)]
fn window<const N: usize>(x: &[f32], first: usize) -> [f32; N] {
    let x = x.get(first..).unwrap_or_default();
    if let Some(whole) = x.first_chunk() {
        return *whole;
    }
    let mut window = [0.0; N];
    window[..x.len()].copy_from_slice(x);
    window
}

simd! {
    /// Packs the lanes from `first` on into some panels of a left operand rounded to bf16.
    pub fn pack_lhs(out: &mut [Bf16Pair], operand: Operand, first: usize) {
        pack_panels::<FMA, Bf16Pair, ROWS>(out, operand, first);
    }
}

simd! {
    /// Packs the lanes from `first` on into some panels of a right operand rounded to bf16.
    pub fn pack_rhs_bf16(out: &mut [Bf16Pair], operand: Operand, first: usize) {
        pack_panels::<FMA, Bf16Pair, COLS>(out, operand, first);
    }
}

simd! {
    /// Packs the lanes from `first` on into some panels of a right operand in f32.
    pub fn pack_rhs_f32(out: &mut [f32], operand: Operand, first: usize) {
        pack_panels::<FMA, f32, COLS>(out, operand, first);
    }
}

#[inline(always)]
fn pack_panels<const FMA: bool, W: PanelWord, const WIDTH: usize>(out: &mut [W], operand: Operand, first: usize) {
    let out = out.as_chunks_mut::<WIDTH>().0;
    if operand.lane_stride == 1 {
        pack_adjacent_lanes::<FMA, W, WIDTH>(out, operand, first);
    } else {
        for (i, out) in out.chunks_mut(operand.depth::<W>().max(1)).enumerate() {
            pack_contiguous_lanes::<FMA, W, WIDTH>(out, operand, first + i * WIDTH);
        }
    }
}

/// For lanes that are neighbours in memory: packs some rows of several panels at a time.
#[inline(always)]
fn pack_adjacent_lanes<const FMA: bool, W: PanelWord, const WIDTH: usize>(
    out: &mut [[W; WIDTH]],
    operand: Operand,
    first: usize,
) {
    let depth = operand.depth::<W>();
    let lanes = first..(first + out.len() / depth.max(1) * WIDTH).min(operand.lanes);
    for start in (0..depth).step_by(STEP_WORDS) {
        // The rows are too far apart for the hardware prefetcher.
        for k in W::ELEMENTS * (start + STEP_WORDS)..(W::ELEMENTS * (start + 2 * STEP_WORDS)).min(operand.k) {
            prefetch(&operand.data[k * operand.k_stride..][lanes.clone()]);
        }
        for (i, out) in out.chunks_mut(depth).enumerate() {
            let first = first + i * WIDTH;
            for (p, out) in out[start..].iter_mut().take(STEP_WORDS).enumerate() {
                let k = W::ELEMENTS * (start + p);
                *out = W::from_elements(operand.load_lanes::<FMA, WIDTH>(k, first), || {
                    operand.load_lanes::<FMA, WIDTH>(k + 1, first)
                });
            }
        }
    }
}

/// For lanes whose elements are neighbours in memory: packs one panel, lane by lane, then transposes it.
#[inline(always)]
fn pack_contiguous_lanes<const FMA: bool, W: PanelWord, const WIDTH: usize>(
    out: &mut [[W; WIDTH]],
    operand: Operand,
    first: usize,
) {
    let mut block = [[W::default(); BLOCK_WORDS]; WIDTH];
    for (b, out) in out.chunks_mut(BLOCK_WORDS).enumerate() {
        let lanes = first..(first + WIDTH).min(operand.lanes);
        let elements = W::ELEMENTS * BLOCK_WORDS * b..(W::ELEMENTS * BLOCK_WORDS * (b + 1)).min(operand.k);
        for (lane, words) in lanes.clone().zip(&mut block) {
            if lane + PREFETCH_LANES < lanes.end {
                prefetch(&operand.data[(lane + PREFETCH_LANES) * operand.lane_stride..][elements.clone()]);
            }
            for (i, words) in words.chunks_exact_mut(PIECE_ELEMENTS / W::ELEMENTS).enumerate() {
                W::store_elements(
                    words,
                    operand
                        .load_elements::<FMA, PIECE_ELEMENTS>(lane, W::ELEMENTS * BLOCK_WORDS * b + PIECE_ELEMENTS * i),
                );
            }
        }
        for p in 0..out.len().min(BLOCK_WORDS) {
            for i in 0..WIDTH {
                out[p][i] = block[i][p];
            }
        }
    }
}
