//! Operands rounded to bf16 and laid out as the tiles read them. Knows no products.
//!
//! An operand is seen as lanes of `k` elements: the rows of a left factor, the columns of a right one. A panel holds
//! `LANES` lanes side by side, pair after pair along `k`; what the last panel and an odd `k` lack is zero.

use std::cell::RefCell;

use rayon::prelude::*;

use super::round::pair;
use crate::kernels::gemm::{Mat, Threads};
use crate::kernels::simd::simd;

/// Rows of a tile, the lanes of a left factor's panel.
pub const ROWS: usize = 8;
/// Columns of a tile, the lanes of a right factor's panel: three AVX-512 registers.
pub const COLS: usize = 48;
/// Lanes that are packed together: some panels of either kind.
const TOGETHER: usize = 96;
/// Pairs that one panel after the other packs where lanes are neighbours.
const STEP: usize = 4;
/// Pairs of a lane that are read in one go where a lane's elements are neighbours.
const BLOCK: usize = 128;
/// Elements of an operand from which threads share its packing.
const SHARED: usize = 64 * 1024;

/// The rows of a left factor.
pub type Left = Packed<ROWS>;
/// The columns of a right factor.
pub type Right = Packed<COLS>;

/// An operand in panels.
pub struct Packed<const LANES: usize> {
    /// `[panels, depth, LANES]`
    pairs: Vec<u32>,
    lanes: usize,
    k: usize,
}

/// Where the lanes of an operand are. One of the strides is 1.
#[derive(Clone, Copy)]
struct Lanes<'a> {
    data: &'a [f32],
    lanes: usize,
    k: usize,
    lane_stride: usize,
    k_stride: usize,
}

impl<'a> Lanes<'a> {
    fn of_rows(m: Mat<'a>) -> Self {
        Self { data: m.data, lanes: m.rows, k: m.cols, lane_stride: m.row_stride, k_stride: m.col_stride }
    }

    /// Element `k` of the lanes from `first` on, which are neighbours in memory; 0 beyond the operand.
    #[inline(always)]
    fn across(self, k: usize, first: usize) -> [f32; TOGETHER] {
        if k >= self.k {
            return [0.0; TOGETHER];
        }
        let row = &self.data[k * self.k_stride..][first..self.lanes];
        row.first_chunk().copied().unwrap_or_else(|| {
            let mut padded = [0.0; TOGETHER];
            padded[..row.len()].copy_from_slice(row);
            padded
        })
    }
}

impl Left {
    /// Packs the rows of `a`, in room that this thread keeps for its next call, for the time of `f`.
    pub fn with<R>(a: Mat, threads: Threads, f: impl FnOnce(&Self) -> R) -> R {
        lend(|room| {
            let packed = Self::pack(Lanes::of_rows(a), room, threads, pack_left);
            let result = f(&packed);
            (packed.pairs, result)
        })
    }
}

impl Right {
    /// Packs the columns of `b`.
    pub fn new(b: Mat, threads: Threads) -> Self {
        Self::pack(Lanes::of_rows(b.t()), Vec::new(), threads, pack_right)
    }

    /// Packs the columns of `b`, in room that this thread keeps for its next call, for the time of `f`.
    pub fn with<R>(b: Mat, threads: Threads, f: impl FnOnce(&Self) -> R) -> R {
        lend(|room| {
            let packed = Self::pack(Lanes::of_rows(b.t()), room, threads, pack_right);
            let result = f(&packed);
            (packed.pairs, result)
        })
    }
}

impl<const LANES: usize> Packed<LANES> {
    fn pack(from: Lanes, mut room: Vec<u32>, threads: Threads, panels: fn(&mut [u32], Lanes, usize)) -> Self {
        let (lanes, k) = (from.lanes, from.k);
        let size = k.div_ceil(2) * LANES;
        let len = lanes.div_ceil(LANES) * size;
        if room.len() < len {
            room.resize(len, 0);
        }
        if size > 0 {
            let group = TOGETHER / LANES;
            let fill = |(i, out): (usize, &mut [u32])| panels(out, from, i * group * LANES);
            match threads {
                Threads::Pool if lanes * k >= SHARED => {
                    room[..len].par_chunks_mut(group * size).enumerate().for_each(fill)
                }
                _ => room[..len].chunks_mut(group * size).enumerate().for_each(fill),
            }
        }
        Self { pairs: room, lanes, k }
    }

    /// Number of lanes.
    pub fn lanes(&self) -> usize {
        self.lanes
    }

    /// Elements of a lane.
    pub fn k(&self) -> usize {
        self.k
    }

    /// Pairs of a lane.
    pub fn depth(&self) -> usize {
        self.k.div_ceil(2)
    }

    /// Number of panels.
    pub fn panels(&self) -> usize {
        self.lanes.div_ceil(LANES)
    }

    /// The pairs of panel `i`, `[depth, LANES]`.
    pub fn panel(&self, i: usize) -> &[[u32; LANES]] {
        let size = self.depth() * LANES;
        self.pairs[i * size..(i + 1) * size].as_chunks().0
    }
}

thread_local! {
    static ROOM: RefCell<Vec<Vec<u32>>> = const { RefCell::new(Vec::new()) };
}

/// Lends a vector with arbitrary contents to `f`, which gives it back.
fn lend<R>(f: impl FnOnce(Vec<u32>) -> (Vec<u32>, R)) -> R {
    let room = ROOM.with_borrow_mut(Vec::pop).unwrap_or_default();
    let (room, result) = f(room);
    ROOM.with_borrow_mut(|pool| pool.push(room));
    result
}

simd! {
    /// Packs the lanes from `first` on into some panels of a left factor.
    fn pack_left(out: &mut [u32], from: Lanes, first: usize) {
        pack_panels::<ROWS>(out, from, first);
    }
}

simd! {
    /// Packs the lanes from `first` on into some panels of a right factor.
    fn pack_right(out: &mut [u32], from: Lanes, first: usize) {
        pack_panels::<COLS>(out, from, first);
    }
}

#[inline(always)]
fn pack_panels<const LANES: usize>(out: &mut [u32], from: Lanes, first: usize) {
    let out = out.as_chunks_mut::<LANES>().0;
    if from.lane_stride == 1 {
        pack_across(out, from, first);
    } else {
        for (i, out) in out.chunks_mut(from.k.div_ceil(2)).enumerate() {
            pack_along(out, from, first + i * LANES);
        }
    }
}

/// The lanes are neighbours in memory: some rows of several panels at a time.
#[inline(always)]
fn pack_across<const LANES: usize>(out: &mut [[u32; LANES]], from: Lanes, first: usize) {
    let depth = from.k.div_ceil(2);
    let mut rows = [[0; TOGETHER]; STEP];
    for start in (0..depth).step_by(STEP) {
        for (p, row) in rows.iter_mut().enumerate() {
            let k = 2 * (start + p);
            let (evens, odds) = (from.across(k, first), from.across(k + 1, first));
            for i in 0..TOGETHER {
                row[i] = pair(evens[i], odds[i]);
            }
        }
        for (i, out) in out.chunks_mut(depth).enumerate() {
            let out = &mut out[start..];
            for p in 0..STEP.min(out.len()) {
                out[p].copy_from_slice(&rows[p][i * LANES..][..LANES]);
            }
        }
    }
}

/// The elements of a lane are neighbours in memory: one panel, lane by lane, and then transposed.
#[inline(always)]
fn pack_along<const LANES: usize>(out: &mut [[u32; LANES]], from: Lanes, first: usize) {
    let mut block = [[0; BLOCK]; LANES];
    for (b, out) in out.chunks_mut(BLOCK).enumerate() {
        let start = 2 * BLOCK * b;
        let lanes = first..(first + LANES).min(from.lanes);
        for (lane, pairs) in lanes.zip(&mut block) {
            let lane = &from.data[lane * from.lane_stride..][..from.k];
            let (even_odd, rest) = lane[start..].as_chunks::<2>();
            for (to, &[even, odd]) in pairs.iter_mut().zip(even_odd) {
                *to = pair(even, odd);
            }
            if let Some(last) = pairs.get_mut(even_odd.len())
                && let [even] = rest
            {
                *last = pair(*even, 0.0);
            }
        }
        for p in 0..out.len().min(BLOCK) {
            for i in 0..LANES {
                out[p][i] = block[i][p];
            }
        }
    }
}
