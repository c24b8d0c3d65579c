//! How an operand is read into panels. Knows no products.
//!
//! An operand is seen as lanes of `k` elements: the rows of a left factor, the columns of a right one. A panel holds some
//! lanes side by side, word after word along `k`; what the last panel and the last word lack is zero.

use rayon::prelude::*;

use super::tile::round::Pair;
use super::tile::{COLS, ROWS, Word};
use crate::kernels::gemm::{Mat, Threads};
use crate::kernels::simd::{fma, simd};

/// Lanes that are packed together: some panels of either kind.
pub const TOGETHER: usize = 96;
/// Words that one panel after the other packs where lanes are neighbours.
const STEP: usize = 4;
/// Words of a lane that are read in one go where a lane's elements are neighbours.
const BLOCK: usize = 128;
/// Elements of an operand from which threads share its packing.
const SHARED: usize = 64 * 1024;

/// A matrix of low rank that is added to another while it is packed: `a' b`, both with contiguous rows.
#[derive(Clone, Copy)]
pub struct Plus<'a> {
    /// `[rank, rows]`
    pub a: &'a [f32],
    /// `[rank, cols]`
    pub b: &'a [f32],
    pub rank: usize,
}

/// Where the lanes of an operand are. One of the strides is 1.
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

    /// Words of a lane.
    pub fn depth<W: Word>(self) -> usize {
        self.k.div_ceil(W::ELEMENTS)
    }

    /// Panels of `width` lanes.
    pub fn panels(self, width: usize) -> usize {
        self.lanes.div_ceil(width)
    }

    /// Panels of `width` lanes that are packed together.
    pub const fn together(width: usize) -> usize {
        TOGETHER / width
    }

    /// Fills panels of `WIDTH` lanes, some at a time by `panels(out, lanes, first lane)`.
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

    /// Element `k` of the lanes from `first` on, which are neighbours in memory; 0 beyond the operand.
    #[inline(always)]
    fn across<const FMA: bool>(self, k: usize, first: usize) -> [f32; TOGETHER] {
        let mut out = [0.0; TOGETHER];
        if k >= self.k {
            return out;
        }
        let n = TOGETHER.min(self.lanes - first);
        let row = &self.data[k * self.k_stride..][first..first + n];
        match row.first_chunk() {
            Some(whole) => out = *whole,
            None => out[..n].copy_from_slice(row),
        }
        if let Some(Plus { a, b, rank }) = self.plus {
            for r in 0..rank {
                add_scaled::<FMA>(&mut out[..n], a[r * self.k + k], &b[r * self.lanes + first..]);
            }
        }
        out
    }

    /// The elements of lane `lane` from `start` on, which are neighbours in memory, at most as many as `room` holds.
    #[inline(always)]
    fn along<'r, const FMA: bool>(self, lane: usize, start: usize, room: &'r mut [f32]) -> &'r [f32]
    where
        'a: 'r,
    {
        let n = room.len().min(self.k - start);
        let elements = &self.data[lane * self.lane_stride..][start..start + n];
        let Some(Plus { a, b, rank }) = self.plus else { return elements };
        let sum = &mut room[..n];
        sum.copy_from_slice(elements);
        for r in 0..rank {
            add_scaled::<FMA>(sum, b[r * self.lanes + lane], &a[r * self.k + start..]);
        }
        sum
    }
}

/// `out += scale x`, as far as `out` goes.
#[inline(always)]
fn add_scaled<const FMA: bool>(out: &mut [f32], scale: f32, x: &[f32]) {
    let x = &x[..out.len()];
    for i in 0..out.len() {
        out[i] = fma::<FMA>(scale, x[i], out[i]);
    }
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

/// The lanes are neighbours in memory: some rows of several panels at a time.
#[inline(always)]
fn pack_across<const FMA: bool, W: Word, const WIDTH: usize>(out: &mut [[W; WIDTH]], from: Lanes, first: usize) {
    let depth = from.depth::<W>();
    let mut rows = [[W::default(); TOGETHER]; STEP];
    for start in (0..depth).step_by(STEP) {
        for (p, row) in rows.iter_mut().enumerate() {
            let k = W::ELEMENTS * (start + p);
            *row = W::of(from.across::<FMA>(k, first), || from.across::<FMA>(k + 1, first));
        }
        for (i, out) in out.chunks_mut(depth).enumerate() {
            let out = &mut out[start..];
            for p in 0..STEP.min(out.len()) {
                out[p].copy_from_slice(&rows[p][i * WIDTH..][..WIDTH]);
            }
        }
    }
}

/// The elements of a lane are neighbours in memory: one panel, lane by lane, and then transposed.
#[inline(always)]
fn pack_along<const FMA: bool, W: Word, const WIDTH: usize>(out: &mut [[W; WIDTH]], from: Lanes, first: usize) {
    let mut block = [[W::default(); BLOCK]; WIDTH];
    let mut room = [0.0; 2 * BLOCK];
    for (b, out) in out.chunks_mut(BLOCK).enumerate() {
        let lanes = first..(first + WIDTH).min(from.lanes);
        for (lane, words) in lanes.zip(&mut block) {
            let start = W::ELEMENTS * BLOCK * b;
            W::along(words, from.along::<FMA>(lane, start, &mut room[..W::ELEMENTS * BLOCK]));
        }
        for p in 0..out.len().min(BLOCK) {
            for i in 0..WIDTH {
                out[p][i] = block[i][p];
            }
        }
    }
}
