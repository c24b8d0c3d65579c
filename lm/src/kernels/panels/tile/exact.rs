//! The product of some rows by a panel in f32: with AVX-512 registers, and the same in plain Rust.
//! Knows no memory beyond the rows, a panel and a tile.
//!
//! Loops run over indices: an iterator's call that is not inlined would keep the sums from staying in registers.

use std::sync::OnceLock;

use super::{COLS, Choice, ROWS, Tile, VECTORS};
use crate::kernels::simd::{fma, simd};

/// Writes the product of rows and a panel, all of one depth, to a tile: of the first rows alone, as many as it is for.
pub type Multiply = fn(&mut Tile, &[&[f32]; ROWS], &[[f32; COLS]]);

/// The best [`Multiply`]s of this CPU, for each size of a tile.
pub fn multiply() -> Choice<Multiply> {
    static CHOSEN: OnceLock<Choice<Multiply>> = OnceLock::new();
    *CHOSEN.get_or_init(detect)
}

#[cfg(target_arch = "x86_64")]
fn detect() -> Choice<Multiply> {
    if !is_x86_feature_detected!("avx512f") {
        return PORTABLE;
    }
    /// The feature detection above is the only way to this.
    fn with<const R: usize, const V: usize>(tile: &mut Tile, rows: &[&[f32]; ROWS], b: &[[f32; COLS]]) {
        // SAFETY: the feature that the function enables was found.
        unsafe { avx512::multiply::<R, V>(tile, rows, b) }
    }
    [
        [
            with::<1, 1>,
            with::<2, 1>,
            with::<3, 1>,
            with::<4, 1>,
            with::<5, 1>,
            with::<6, 1>,
            with::<7, 1>,
            with::<8, 1>,
        ],
        [
            with::<1, 2>,
            with::<2, 2>,
            with::<3, 2>,
            with::<4, 2>,
            with::<5, 2>,
            with::<6, 2>,
            with::<7, 2>,
            with::<8, 2>,
        ],
        [
            with::<1, 3>,
            with::<2, 3>,
            with::<3, 3>,
            with::<4, 3>,
            with::<5, 3>,
            with::<6, 3>,
            with::<7, 3>,
            with::<8, 3>,
        ],
    ]
}

#[cfg(not(target_arch = "x86_64"))]
fn detect() -> Choice<Multiply> {
    PORTABLE
}

/// For any CPU. Sums are in the order of the AVX-512 kernel's: equal bit for bit where products and sums are fused.
pub const PORTABLE: Choice<Multiply> = [[upper, upper, upper, upper, portable, portable, portable, portable]; VECTORS];

/// Rows and columns of which 16 registers of eight f32 hold the sums.
const HEIGHT: usize = 4;
const WIDTH: usize = 24;

/// All rows.
fn portable(tile: &mut Tile, rows: &[&[f32]; ROWS], b: &[[f32; COLS]]) {
    part(tile, rows, b, 0);
    part(tile, rows, b, HEIGHT);
}

/// The first half of the rows.
fn upper(tile: &mut Tile, rows: &[&[f32]; ROWS], b: &[[f32; COLS]]) {
    part(tile, rows, b, 0);
}

simd! {
    fn part(tile: &mut Tile, rows: &[&[f32]; ROWS], b: &[[f32; COLS]], top: usize) {
        let depth = b.len();
        let mut a = [&[][..]; HEIGHT];
        for i in 0..HEIGHT {
            a[i] = &rows[top + i][..depth];
        }
        for left in [0, WIDTH] {
            let mut sums = [[0.0; WIDTH]; HEIGHT];
            for p in 0..depth {
                let mut columns = [0.0; WIDTH];
                columns.copy_from_slice(&b[p][left..left + WIDTH]);
                for i in 0..HEIGHT {
                    for j in 0..WIDTH {
                        sums[i][j] = fma::<FMA>(a[i][p], columns[j], sums[i][j]);
                    }
                }
            }
            for i in 0..HEIGHT {
                tile[top + i][left..left + WIDTH].copy_from_slice(&sums[i]);
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use std::arch::x86_64::{__m512, _mm512_fmadd_ps, _mm512_set1_ps, _mm512_setzero_ps};
    use std::mem::transmute;

    use super::{COLS, ROWS, Tile, VECTORS};

    #[target_feature(enable = "avx512f")]
    pub fn multiply<const R: usize, const V: usize>(tile: &mut Tile, rows: &[&[f32]; ROWS], b: &[[f32; COLS]]) {
        let depth = b.len();
        let mut a = [&[][..]; R];
        for i in 0..R {
            a[i] = &rows[i][..depth];
        }
        let mut sums = [[_mm512_setzero_ps(); VECTORS]; R];
        for p in 0..depth {
            // SAFETY: both are VECTORS times 64 bytes, of which any bits are valid.
            let b = unsafe { transmute::<[f32; COLS], [__m512; VECTORS]>(b[p]) };
            for i in 0..R {
                let a = _mm512_set1_ps(a[i][p]);
                for j in 0..V {
                    sums[i][j] = _mm512_fmadd_ps(a, b[j], sums[i][j]);
                }
            }
        }
        for i in 0..R {
            // SAFETY: both are COLS f32, of which any bits are valid.
            tile[i] = unsafe { transmute::<[__m512; VECTORS], [f32; COLS]>(sums[i]) };
        }
    }
}
