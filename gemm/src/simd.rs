//! Chooses the instruction set at run time and holds the vector-friendly scalar functions.
//!
//! The choice depends on the CPU alone, never on the number of threads.

use std::sync::OnceLock;

/// Instruction sets that a kernel is compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Isa {
    /// The target's baseline, without fused multiply-add.
    Portable,
    /// AVX2 and FMA.
    V3,
    /// AVX-512 F, BW, CD, DQ, VL.
    V4,
}

/// The best instruction set of this CPU.
#[inline]
pub fn isa() -> Isa {
    static ISA: OnceLock<Isa> = OnceLock::new();
    *ISA.get_or_init(detect)
}

#[cfg(target_arch = "x86_64")]
fn detect() -> Isa {
    let v3 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
    let v4 = is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512cd")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vl");
    match (v3, v4) {
        (true, true) => Isa::V4,
        (true, false) => Isa::V3,
        _ => Isa::Portable,
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn detect() -> Isa {
    Isa::Portable
}

/// Whether this CPU has the instruction that multiplies pairs of bf16 (AVX512_BF16).
#[cfg(target_arch = "x86_64")]
pub fn has_avx512_bf16() -> bool {
    is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bf16")
}

#[cfg(not(target_arch = "x86_64"))]
pub fn has_avx512_bf16() -> bool {
    false
}

/// Compiles a function once per instruction set and calls the best one. The body sees `FMA: bool`, to pass to the
/// functions of this module. Only plain loops belong in the body: the compiler vectorises them.
#[macro_export]
macro_rules! simd {
    ($(#[$meta:meta])* $vis:vis fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? $body:block) => {
        $(#[$meta])*
        $vis fn $name($($arg: $ty),*) $(-> $ret)? {
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512bw,avx512cd,avx512dq,avx512vl,avx2,fma")]
                fn v4($($arg: $ty),*) $(-> $ret)? {
                    #[allow(dead_code, reason = "not every body multiplies and adds")]
                    const FMA: bool = true;
                    $body
                }
                #[target_feature(enable = "avx2,fma")]
                fn v3($($arg: $ty),*) $(-> $ret)? {
                    #[allow(dead_code, reason = "not every body multiplies and adds")]
                    const FMA: bool = true;
                    $body
                }
                match $crate::simd::isa() {
                    // SAFETY: `isa` returned V4, so it found every feature that `v4` enables.
                    $crate::simd::Isa::V4 => return unsafe { v4($($arg),*) },
                    // SAFETY: `isa` returned V3, so it found every feature that `v3` enables.
                    $crate::simd::Isa::V3 => return unsafe { v3($($arg),*) },
                    $crate::simd::Isa::Portable => {}
                }
            }
            #[allow(dead_code, reason = "not every body multiplies and adds")]
            const FMA: bool = false;
            $body
        }
    };
}
/// f32 in a cache line.
pub const CACHE_LINE: usize = 16;

/// Width of the accumulators below: two AVX-512 registers, so that two chains of additions overlap.
pub const LANES: usize = 32;

/// `a * b + c`, fused where the CPU has it.
#[inline(always)]
pub fn fma<const FMA: bool>(a: f32, b: f32, c: f32) -> f32 {
    if FMA { a.mul_add(b, c) } else { a * b + c }
}

/// `e^x` with a relative error below 2e-7; 0 below -87.3, and NaN stays NaN. After Cephes' `expf`: e^x = 2^n e^r with
/// |r| <= ln 2 / 2.
#[inline(always)]
pub fn exp<const FMA: bool>(x: f32) -> f32 {
    const LOWEST: f32 = -87.3;
    const HIGHEST: f32 = 88.0;
    // Adding 1.5 * 2^23 rounds to an integer, held in the low bits of the sum.
    const ROUND: f32 = 12_582_912.0;
    let c = if x > HIGHEST { HIGHEST } else { x };
    let c = if c < LOWEST { LOWEST } else { c };
    let shifted = fma::<FMA>(c, std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = fma::<FMA>(n, -0.693_359_4, c);
    let r = fma::<FMA>(n, 2.121_944_4e-4, r);
    let p = fma::<FMA>(r, 1.987_569_1e-4, 1.398_199_9e-3);
    let p = fma::<FMA>(p, r, 8.333_452e-3);
    let p = fma::<FMA>(p, r, 4.166_579_6e-2);
    let p = fma::<FMA>(p, r, 0.166_666_66);
    let p = fma::<FMA>(p, r, 0.5);
    let p = fma::<FMA>(p, r * r, r) + 1.0;
    let power = f32::from_bits((shifted.to_bits().wrapping_add(127)) << 23);
    if x < LOWEST { 0.0 } else { p * power }
}

/// The sum of accumulators, in a fixed order.
#[inline(always)]
pub fn sum_lanes(acc: &[f32; LANES]) -> f32 {
    let mut acc = *acc;
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            acc[i] += acc[i + width];
        }
        width /= 2;
    }
    acc[0]
}

/// Sums `f(x_i)` in an order that depends on the length alone.
#[inline(always)]
pub fn sum_map(x: &[f32], f: impl Fn(f32) -> f32) -> f32 {
    let mut acc = [0f32; LANES];
    let (chunks, rest) = x.as_chunks::<LANES>();
    for c in chunks {
        for i in 0..LANES {
            acc[i] += f(c[i]);
        }
    }
    for (a, &v) in acc.iter_mut().zip(rest) {
        *a += f(v);
    }
    sum_lanes(&acc)
}

/// Sums `f(x_i, y_i)` in an order that depends on the length alone. The slices have equal lengths.
#[inline(always)]
pub fn sum_map2(x: &[f32], y: &[f32], f: impl Fn(f32, f32) -> f32) -> f32 {
    let mut acc = [0f32; LANES];
    let (xs, x_rest) = x.as_chunks::<LANES>();
    let (ys, y_rest) = y.as_chunks::<LANES>();
    for (a, b) in xs.iter().zip(ys) {
        for i in 0..LANES {
            acc[i] += f(a[i], b[i]);
        }
    }
    for ((acc, &a), &b) in acc.iter_mut().zip(x_rest).zip(y_rest) {
        *acc += f(a, b);
    }
    sum_lanes(&acc)
}

/// Sums `f(x_i, y_i, z_i)` in an order that depends on the length alone. The slices have equal lengths.
#[inline(always)]
pub fn sum_map3(x: &[f32], y: &[f32], z: &[f32], f: impl Fn(f32, f32, f32) -> f32) -> f32 {
    let mut acc = [0f32; LANES];
    let (xs, x_rest) = x.as_chunks::<LANES>();
    let (ys, y_rest) = y.as_chunks::<LANES>();
    let (zs, z_rest) = z.as_chunks::<LANES>();
    for ((a, b), c) in xs.iter().zip(ys).zip(zs) {
        for i in 0..LANES {
            acc[i] += f(a[i], b[i], c[i]);
        }
    }
    for (((acc, &a), &b), &c) in acc.iter_mut().zip(x_rest).zip(y_rest).zip(z_rest) {
        *acc += f(a, b, c);
    }
    sum_lanes(&acc)
}

/// The largest element; minus infinity for an empty slice. May skip a NaN, which `exp` then restores.
#[inline(always)]
pub fn max(x: &[f32]) -> f32 {
    let mut acc = [f32::NEG_INFINITY; LANES];
    let (chunks, rest) = x.as_chunks::<LANES>();
    for c in chunks {
        for i in 0..LANES {
            acc[i] = if c[i] > acc[i] { c[i] } else { acc[i] };
        }
    }
    for (a, &v) in acc.iter_mut().zip(rest) {
        *a = if v > *a { v } else { *a };
    }
    acc.iter().fold(f32::NEG_INFINITY, |m, &v| if v > m { v } else { m })
}

/// Prefetches `x` into all cache levels, for reading soon.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
pub fn prefetch(x: &[f32]) {
    use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
    for line in x.chunks(CACHE_LINE) {
        // SAFETY: a prefetch accesses nothing, and its address lies within the slice.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(line.as_ptr().cast()) };
    }
}

/// No such instruction: the first access loads it.
#[cfg(not(target_arch = "x86_64"))]
pub fn prefetch(_x: &[f32]) {}

/// Prefetches a cache line into the L2 cache, for reading later.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
pub fn prefetch_far<W>(line: &[W; CACHE_LINE]) {
    use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
    // SAFETY: a prefetch accesses nothing, and its address is borrowed.
    unsafe { _mm_prefetch::<_MM_HINT_T1>(line.as_ptr().cast()) };
}

/// No such instruction: the first access loads it.
#[cfg(not(target_arch = "x86_64"))]
pub fn prefetch_far<W>(_line: &[W; CACHE_LINE]) {}

simd! {
    /// `acc += x`, elementwise.
    pub fn add_assign(acc: &mut [f32], x: &[f32]) {
        for (a, &v) in acc.iter_mut().zip(x) {
            *a += v;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    simd! {
        fn exp_all(out: &mut [f32], x: &[f32]) {
            for (o, &v) in out.iter_mut().zip(x) {
                *o = exp::<FMA>(v);
            }
        }
    }

    fn worst_relative_error(f: impl Fn(f32) -> f32) -> f64 {
        (-870_000..880_000)
            .map(|i| i as f32 * 1e-4)
            .map(|x| (f64::from(f(x)) / f64::from(x).exp() - 1.0).abs())
            .fold(0.0, f64::max)
    }

    #[test]
    fn exp_is_accurate_to_two_units_in_the_last_place() {
        assert!(worst_relative_error(exp::<false>) < 2e-7);
        assert!(worst_relative_error(exp::<true>) < 2e-7);
    }

    #[test]
    fn exp_handles_extreme_inputs() {
        assert_eq!(exp::<true>(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp::<true>(-1e30), 0.0);
        assert_eq!(exp::<true>(0.0), 1.0);
        assert!(exp::<true>(f32::NAN).is_nan());
        assert!(exp::<true>(f32::INFINITY) > 1e38);
    }

    #[test]
    fn the_dispatched_loop_agrees_with_the_scalar_function() {
        let x: Vec<f32> = (0..1003).map(|i| i as f32 * 0.05 - 30.0).collect();
        let mut out = vec![0.0; x.len()];
        exp_all(&mut out, &x);
        for (o, v) in out.iter().zip(&x) {
            assert!((o / exp::<false>(*v) - 1.0).abs() < 3e-7);
        }
    }

    #[test]
    fn sums_and_maxima_cover_every_element() {
        for n in [0, 1, 31, 32, 33, 100] {
            let x: Vec<f32> = (0..n).map(|i| i as f32 - 7.0).collect();
            assert_eq!(sum_map(&x, |v| v), x.iter().sum::<f32>());
            assert_eq!(sum_map2(&x, &x, |a, b| a * b), x.iter().map(|v| v * v).sum::<f32>());
            assert_eq!(sum_map3(&x, &x, &x, |a, b, c| a * b + c), x.iter().map(|v| v * v + v).sum::<f32>());
            assert_eq!(max(&x), x.iter().copied().fold(f32::NEG_INFINITY, f32::max));
        }
    }
}
