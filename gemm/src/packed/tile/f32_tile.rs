//! The product of some rows and a panel in f32: with AVX-512 registers, with AVX2 registers, and in plain Rust.
//!
//! Loops use indices: an iterator call that is not inlined would keep the sums out of registers.

use std::sync::OnceLock;

use super::{COLS, KernelTable, PanelBlock, REGISTERS, ROWS, Tile, kernel_table};
use crate::simd::{Isa, isa};

/// Writes the product of rows and a panel of equal depth to a tile. Only the first rows are valid: as many as the
/// function is made for.
pub type TileKernel = fn(&mut Tile, &[&[f32]; ROWS], PanelBlock<f32>);

/// The best [`TileKernel`]s of this CPU, for each tile size.
pub fn kernels() -> KernelTable<TileKernel> {
    static KERNELS: OnceLock<KernelTable<TileKernel>> = OnceLock::new();
    *KERNELS.get_or_init(|| kernels_for(isa()))
}

/// The [`TileKernel`]s for an instruction set. All sum in the same order, so results are bit-for-bit equal among those
/// with fused multiply-add.
///
/// # Panics
/// If the CPU lacks the instruction set.
pub fn kernels_for(requested: Isa) -> KernelTable<TileKernel> {
    assert!(requested <= isa(), "kernels for {requested:?} on a CPU that has {:?}", isa());
    match requested {
        #[cfg(target_arch = "x86_64")]
        Isa::V4 => {
            /// Only reachable after `kernels_for` has checked the CPU's features.
            fn with<const R: usize, const V: usize>(tile: &mut Tile, rows: &[&[f32]; ROWS], b: PanelBlock<f32>) {
                // SAFETY: V4 has the feature that the function enables.
                unsafe { avx512::multiply::<R, V>(tile, rows, b) }
            }
            kernel_table!(with)
        }
        #[cfg(target_arch = "x86_64")]
        Isa::V3 => {
            /// Only reachable after `kernels_for` has checked the CPU's features.
            fn with<const R: usize, const V: usize>(tile: &mut Tile, rows: &[&[f32]; ROWS], b: PanelBlock<f32>) {
                // SAFETY: V3 has the features that the function enables.
                unsafe { avx2::multiply::<R, V>(tile, rows, b) }
            }
            kernel_table!(with)
        }
        _ => [[upper, upper, upper, upper, portable, portable, portable, portable]; REGISTERS],
    }
}

/// Rows and columns whose sums fit into 16 registers of eight or of four f32.
const HEIGHT: usize = 4;
const WIDTH: usize = 24;

/// All rows.
fn portable(tile: &mut Tile, rows: &[&[f32]; ROWS], b: PanelBlock<f32>) {
    part(tile, rows, b.words, 0);
    part(tile, rows, b.words, HEIGHT);
}

/// The first half of the rows.
fn upper(tile: &mut Tile, rows: &[&[f32]; ROWS], b: PanelBlock<f32>) {
    part(tile, rows, b.words, 0);
}

fn part(tile: &mut Tile, rows: &[&[f32]; ROWS], b: &[[f32; COLS]], top: usize) {
    let depth = b.len();
    let mut a = [&[][..]; HEIGHT];
    for i in 0..HEIGHT {
        a[i] = &rows[top + i][..depth];
    }
    for left in [0, WIDTH] {
        let mut sums = [[0.0; WIDTH]; HEIGHT];
        for p in 0..depth {
            for i in 0..HEIGHT {
                for j in 0..WIDTH {
                    sums[i][j] += a[i][p] * b[p][left + j];
                }
            }
        }
        for i in 0..HEIGHT {
            tile[top + i][left..left + WIDTH].copy_from_slice(&sums[i]);
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod avx2 {
    use std::arch::x86_64::{
        __m256, _MM_HINT_T0, _mm_prefetch, _mm256_fmadd_ps, _mm256_loadu_ps, _mm256_set1_ps, _mm256_setzero_ps,
        _mm256_storeu_ps,
    };

    use super::{COLS, HEIGHT, PanelBlock, ROWS, Tile};

    /// f32 per register.
    const LANES: usize = 8;
    /// Prefetch distance into the L1 cache, in words.
    const PREFETCH_WORDS: usize = 8;

    #[target_feature(enable = "avx2,fma")]
    pub fn multiply<const R: usize, const V: usize>(tile: &mut Tile, rows: &[&[f32]; ROWS], b: PanelBlock<f32>) {
        let mut top = 0;
        while top < R {
            match V {
                1 => strip::<R, 2>(tile, rows, b, top, 0),
                2 => {
                    strip::<R, 2>(tile, rows, b, top, 0);
                    strip::<R, 2>(tile, rows, b, top, 2);
                }
                _ => {
                    strip::<R, 3>(tile, rows, b, top, 0);
                    strip::<R, 3>(tile, rows, b, top, 3);
                }
            }
            top += HEIGHT;
        }
    }

    /// The `W` registers of columns from register `left` on, for at most `HEIGHT` rows from row `top` on.
    #[target_feature(enable = "avx2,fma")]
    fn strip<const R: usize, const W: usize>(
        tile: &mut Tile,
        rows: &[&[f32]; ROWS],
        b: PanelBlock<f32>,
        top: usize,
        left: usize,
    ) {
        match R - top {
            1 => part::<1, W>(tile, rows, b, top, left),
            2 => part::<2, W>(tile, rows, b, top, left),
            3 => part::<3, W>(tile, rows, b, top, left),
            _ => part::<HEIGHT, W>(tile, rows, b, top, left),
        }
    }

    #[target_feature(enable = "avx2,fma")]
    fn part<const H: usize, const W: usize>(
        tile: &mut Tile,
        rows: &[&[f32]; ROWS],
        b: PanelBlock<f32>,
        top: usize,
        left: usize,
    ) {
        let depth = b.words.len();
        let mut a = [&[][..]; H];
        for i in 0..H {
            a[i] = &rows[top + i][..depth];
        }
        let first = left * LANES;
        assert!(first + W * LANES <= COLS, "the columns lie within a tile");
        let mut sums = [[_mm256_setzero_ps(); W]; H];
        for p in 0..depth {
            if top == 0 && left == 0 {
                b.prefetch_next(p);
            }
            let ahead =
                b.words.as_ptr().wrapping_add(p + PREFETCH_WORDS).cast::<f32>().wrapping_add(first).cast::<i8>();
            _mm_prefetch::<_MM_HINT_T0>(ahead);
            _mm_prefetch::<_MM_HINT_T0>(ahead.wrapping_add(W * LANES * size_of::<f32>() - 1));
            let mut columns: [__m256; W] = [_mm256_setzero_ps(); W];
            for (j, column) in columns.iter_mut().enumerate() {
                // SAFETY: by the assertion the eight f32 lie within the word.
                *column = unsafe { _mm256_loadu_ps(b.words[p].as_ptr().add(first + j * LANES)) };
            }
            for i in 0..H {
                let a = _mm256_set1_ps(a[i][p]);
                for j in 0..W {
                    sums[i][j] = _mm256_fmadd_ps(a, columns[j], sums[i][j]);
                }
            }
        }
        for (sums, row) in sums.iter().zip(&mut tile[top..top + H]) {
            for (j, &sum) in sums.iter().enumerate() {
                // SAFETY: by the assertion the eight f32 lie within the tile's row.
                unsafe { _mm256_storeu_ps(row.as_mut_ptr().add(first + j * LANES), sum) };
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use std::arch::x86_64::{__m512, _mm512_fmadd_ps, _mm512_set1_ps, _mm512_setzero_ps};
    use std::mem::transmute;

    use super::{COLS, PanelBlock, REGISTERS, ROWS, Tile};

    #[target_feature(enable = "avx512f")]
    pub fn multiply<const R: usize, const V: usize>(tile: &mut Tile, rows: &[&[f32]; ROWS], b: PanelBlock<f32>) {
        let depth = b.words.len();
        let mut a = [&[][..]; R];
        for i in 0..R {
            a[i] = &rows[i][..depth];
        }
        let mut sums = [[_mm512_setzero_ps(); REGISTERS]; R];
        for p in 0..depth {
            b.prefetch_next(p);
            // SAFETY: both are REGISTERS times 64 bytes, of which any bits are valid.
            let b = unsafe { transmute::<[f32; COLS], [__m512; REGISTERS]>(b.words[p]) };
            for i in 0..R {
                let a = _mm512_set1_ps(a[i][p]);
                for j in 0..V {
                    sums[i][j] = _mm512_fmadd_ps(a, b[j], sums[i][j]);
                }
            }
        }
        for i in 0..R {
            // SAFETY: both are COLS f32, of which any bits are valid.
            tile[i] = unsafe { transmute::<[__m512; REGISTERS], [f32; COLS]>(sums[i]) };
        }
    }
}
