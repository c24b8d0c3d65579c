//! The product of two panels: with the instruction that multiplies pairs of bf16, and in plain Rust.
//!
//! Loops use indices: an iterator call that is not inlined would keep the sums out of registers.

use std::sync::OnceLock;

use super::bf16::{Bf16Pair, even, odd};
use super::{COLS, KernelTable, PanelBlock, REGISTERS, ROWS, Tile, kernel_table};

/// Writes the product of two panels of equal depth to a tile. Only the left panel's first rows are valid: as many as
/// the function is made for.
pub type TileKernel = fn(&mut Tile, &[[Bf16Pair; ROWS]], PanelBlock<Bf16Pair>);

/// The best [`TileKernel`]s of this CPU, for each tile size.
pub fn kernels() -> KernelTable<TileKernel> {
    static KERNELS: OnceLock<KernelTable<TileKernel>> = OnceLock::new();
    *KERNELS.get_or_init(detect)
}

#[cfg(target_arch = "x86_64")]
fn detect() -> KernelTable<TileKernel> {
    if crate::simd::has_avx512_bf16() {
        /// Only reachable after the feature detection above.
        fn with<const R: usize, const V: usize>(tile: &mut Tile, a: &[[Bf16Pair; ROWS]], b: PanelBlock<Bf16Pair>) {
            // SAFETY: both features that the function enables were found.
            unsafe { avx512::multiply::<R, V>(tile, a, b) }
        }
        kernel_table!(with)
    } else {
        [[portable; ROWS]; REGISTERS]
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn detect() -> KernelTable<TileKernel> {
    [[portable; ROWS]; REGISTERS]
}

simd! {
    /// All rows, in f32. Products of two bf16 are exact, so only the sums round. The odd element comes first, as in the
    /// instruction's description; on Zen 4 the results are bit-for-bit equal.
    pub fn portable(tile: &mut Tile, a: &[[Bf16Pair; ROWS]], b: PanelBlock<Bf16Pair>) {
        *tile = [[0.0; COLS]; ROWS];
        let depth = a.len();
        let b = &b.words[..depth];
        for p in 0..depth {
            for i in 0..ROWS {
                for j in 0..COLS {
                    tile[i][j] += odd(a[p][i]) * odd(b[p][j]);
                    tile[i][j] += even(a[p][i]) * even(b[p][j]);
                }
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use std::arch::x86_64::{__m512, __m512bh, __m512i, _mm512_dpbf16_ps, _mm512_set1_epi32, _mm512_setzero_ps};
    use std::mem::transmute;

    use super::super::bf16::Bf16Pair;
    use super::{COLS, PanelBlock, REGISTERS, ROWS, Tile};

    #[target_feature(enable = "avx512f,avx512bf16")]
    pub fn multiply<const R: usize, const V: usize>(tile: &mut Tile, a: &[[Bf16Pair; ROWS]], b: PanelBlock<Bf16Pair>) {
        let depth = a.len();
        let words = &b.words[..depth];
        let mut sums = [[_mm512_setzero_ps(); REGISTERS]; R];
        for p in 0..depth {
            b.prefetch_next(p);
            // SAFETY: both are REGISTERS times 64 bytes, of which any bits are valid.
            let b = unsafe { transmute::<[Bf16Pair; COLS], [__m512bh; REGISTERS]>(words[p]) };
            for i in 0..R {
                // SAFETY: both are registers of 64 bytes, of which any bits are valid.
                let a = unsafe { transmute::<__m512i, __m512bh>(_mm512_set1_epi32(a[p][i].bits())) };
                for j in 0..V {
                    sums[i][j] = _mm512_dpbf16_ps(sums[i][j], a, b[j]);
                }
            }
        }
        for i in 0..R {
            // SAFETY: both are COLS f32, of which any bits are valid.
            tile[i] = unsafe { transmute::<[__m512; REGISTERS], [f32; COLS]>(sums[i]) };
        }
    }
}
