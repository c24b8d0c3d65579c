//! Packing of operands into panels.
//!
//! An operand consists of lanes of `k` elements: the rows of a left factor, the columns of a right one. A panel holds
//! some lanes side by side, word after word along `k`; the last panel and the last word are padded with zeros.

use rayon::prelude::*;

use super::tile::round::Pair;
use super::tile::{COLS, ROWS, Word};
use crate::kernels::gemm::{Mat, Threads};
use crate::kernels::simd::{fma, prefetch, simd};

/// Lanes packed together: a whole number of panels of either kind.
pub const TOGETHER: usize = 96;
/// Words packed per panel before moving on to the next panel, if lanes are neighbours in memory.
const STEP: usize = 4;
/// Prefetch distance into the L1 cache, in lanes.
const AHEAD: usize = 4;
/// Words of a lane read in one go, if a lane's elements are neighbours in memory.
const BLOCK: usize = 128;
/// Elements of a lane summed in registers.
const PIECE: usize = 64;
/// Least size of an operand, in elements, whose packing is shared among threads.
const SHARED: usize = 64 * 1024;

/// A low-rank matrix `a' b` that is added to another while that is packed; both have contiguous rows.
#[derive(Clone, Copy)]
pub struct Plus<'a> {
    /// `[rank, rows]`
    pub a: &'a [f32],
    /// `[rank, cols]`
    pub b: &'a [f32],
    pub rank: usize,
}

/// The lanes of an operand in memory. One of the strides is 1.
#[derive(Clone, Copy)]
pub struct Lanes<'a> {
    data: &'a [f32],
    lanes: usize,
    k: usize,
    lane_stride: usize,
    k_stride: usize,
    plus: Option<Plus<'a>>,
}

impl<'a> Lanes<'a> {
    pub fn of_rows(m: Mat<'a>) -> Self {
        let Mat { data, rows, cols, row_stride, col_stride } = m;
        Self { data, lanes: rows, k: cols, lane_stride: row_stride, k_stride: col_stride, plus: None }
    }

    pub fn of_columns(m: Mat<'a>, plus: Option<Plus<'a>>) -> Self {
        if let Some(Plus { a, b, rank }) = plus {
            let one_shape = a.len() == rank * m.rows && b.len() == rank * m.cols;
            assert!(one_shape, "a matrix and what is added to it have one shape");
        }
        Self { plus, ..Self::of_rows(m.t()) }
    }

    /// Words per lane.
    pub fn depth<W: Word>(self) -> usize {
        self.k.div_ceil(W::ELEMENTS)
    }

    /// Number of panels of `width` lanes.
    pub fn panels(self, width: usize) -> usize {
        self.lanes.div_ceil(width)
    }

    /// Number of panels of `width` lanes packed together.
    pub const fn together(width: usize) -> usize {
        TOGETHER / width
    }

    /// Fills panels of `WIDTH` lanes; each call `panels(out, lanes, first lane)` fills several.
    pub fn pack<W: Word, const WIDTH: usize>(
        self,
        out: &mut [W],
        threads: Threads,
        panels: fn(&mut [W], Lanes, usize),
    ) {
        let group = Self::together(WIDTH) * self.depth::<W>() * WIDTH;
        if group == 0 {
            return;
        }
        let fill = |(i, out): (usize, &mut [W])| panels(out, self, i * Self::together(WIDTH) * WIDTH);
        match threads {
            Threads::Pool if self.lanes * self.k >= SHARED => out.par_chunks_mut(group).enumerate().for_each(fill),
            _ => out.chunks_mut(group).enumerate().for_each(fill),
        }
    }

    /// Element `k` of the `N` lanes from `first` on, for lanes that are neighbours in memory; 0 beyond the operand.
    #[inline(always)]
    fn across<const FMA: bool, const N: usize>(self, k: usize, first: usize) -> [f32; N] {
        if k >= self.k {
            return [0.0; N];
        }
        let mut sum = window(&self.data[k * self.k_stride..][..self.lanes], first);
        if let Some(Plus { a, b, rank }) = self.plus {
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
    fn along<const FMA: bool, const N: usize>(self, lane: usize, start: usize) -> [f32; N] {
        let mut sum = window(&self.data[lane * self.lane_stride..][..self.k], start);
        if let Some(Plus { a, b, rank }) = self.plus {
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
    /// Packs the lanes from `first` on into some panels of a left factor rounded to bf16.
    pub fn pack_left(out: &mut [Pair], from: Lanes, first: usize) {
        pack_panels::<FMA, Pair, ROWS>(out, from, first);
    }
}

simd! {
    /// Packs the lanes from `first` on into some panels of a right factor rounded to bf16.
    pub fn pack_right_rounded(out: &mut [Pair], from: Lanes, first: usize) {
        pack_panels::<FMA, Pair, COLS>(out, from, first);
    }
}

simd! {
    /// Packs the lanes from `first` on into some panels of a right factor in f32.
    pub fn pack_right(out: &mut [f32], from: Lanes, first: usize) {
        pack_panels::<FMA, f32, COLS>(out, from, first);
    }
}

#[inline(always)]
fn pack_panels<const FMA: bool, W: Word, const WIDTH: usize>(out: &mut [W], from: Lanes, first: usize) {
    let out = out.as_chunks_mut::<WIDTH>().0;
    if from.lane_stride == 1 {
        pack_across::<FMA, W, WIDTH>(out, from, first);
    } else {
        for (i, out) in out.chunks_mut(from.depth::<W>().max(1)).enumerate() {
            pack_along::<FMA, W, WIDTH>(out, from, first + i * WIDTH);
        }
    }
}

/// For lanes that are neighbours in memory: packs some rows of several panels at a time.
#[inline(always)]
fn pack_across<const FMA: bool, W: Word, const WIDTH: usize>(out: &mut [[W; WIDTH]], from: Lanes, first: usize) {
    let depth = from.depth::<W>();
    let lanes = first..(first + out.len() / depth.max(1) * WIDTH).min(from.lanes);
    for start in (0..depth).step_by(STEP) {
        // The rows are too far apart for the hardware prefetcher.
        for k in W::ELEMENTS * (start + STEP)..(W::ELEMENTS * (start + 2 * STEP)).min(from.k) {
            prefetch(&from.data[k * from.k_stride..][lanes.clone()]);
        }
        for (i, out) in out.chunks_mut(depth).enumerate() {
            let first = first + i * WIDTH;
            for (p, out) in out[start..].iter_mut().take(STEP).enumerate() {
                let k = W::ELEMENTS * (start + p);
                *out = W::of(from.across::<FMA, WIDTH>(k, first), || from.across::<FMA, WIDTH>(k + 1, first));
            }
        }
    }
}

/// For lanes whose elements are neighbours in memory: packs one panel, lane by lane, then transposes it.
#[inline(always)]
fn pack_along<const FMA: bool, W: Word, const WIDTH: usize>(out: &mut [[W; WIDTH]], from: Lanes, first: usize) {
    let mut block = [[W::default(); BLOCK]; WIDTH];
    for (b, out) in out.chunks_mut(BLOCK).enumerate() {
        let lanes = first..(first + WIDTH).min(from.lanes);
        let here = W::ELEMENTS * BLOCK * b..(W::ELEMENTS * BLOCK * (b + 1)).min(from.k);
        for (lane, words) in lanes.clone().zip(&mut block) {
            if lane + AHEAD < lanes.end {
                prefetch(&from.data[(lane + AHEAD) * from.lane_stride..][here.clone()]);
            }
            for (i, words) in words.chunks_exact_mut(PIECE / W::ELEMENTS).enumerate() {
                W::along(words, from.along::<FMA, PIECE>(lane, W::ELEMENTS * BLOCK * b + PIECE * i));
            }
        }
        for p in 0..out.len().min(BLOCK) {
            for i in 0..WIDTH {
                out[p][i] = block[i][p];
            }
        }
    }
}
