//! Rounding of f32 to bf16, and pairs of bf16 values.

/// The bf16 nearest to `x`, ties to even, as the f32 bits of equal value: the upper half of a word whose lower half is
/// zero. As in the CPU's own instructions, f32 subnormals become zero with their sign; a NaN stays a NaN.
#[inline(always)]
pub fn round_to_bf16(x: f32) -> u32 {
    let bits = x.to_bits();
    let magnitude = bits & 0x7fff_ffff;
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1));
    // The quiet bit keeps a NaN whose payload lies in the lower half from turning into an infinity.
    let kept = if magnitude > 0x7f80_0000 { bits | 0x0040_0000 } else { rounded };
    let sign = bits & 0x8000_0000;
    (if magnitude < 0x0080_0000 { sign } else { kept }) & 0xffff_0000
}

/// Two neighbours along the inner dimension, rounded to bf16: the even one in the lower half, the odd one in the upper.
#[derive(Clone, Copy, Debug, Default)]
#[repr(transparent)]
pub struct Bf16Pair(u32);

impl Bf16Pair {
    /// The bits in the type that the instructions take.
    #[inline(always)]
    pub fn bits(self) -> i32 {
        self.0.cast_signed()
    }
}

/// Rounds two elements to a pair.
#[inline(always)]
pub fn bf16_pair(even: f32, odd: f32) -> Bf16Pair {
    Bf16Pair(round_to_bf16(even) >> 16 | round_to_bf16(odd))
}

/// The even element of a [`bf16_pair`].
#[inline(always)]
pub fn even(Bf16Pair(bits): Bf16Pair) -> f32 {
    f32::from_bits(bits << 16)
}

/// The odd element of a [`bf16_pair`].
#[inline(always)]
pub fn odd(Bf16Pair(bits): Bf16Pair) -> f32 {
    f32::from_bits(bits & 0xffff_0000)
}

#[cfg(test)]
mod tests {
    use half::bf16;
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn rounding_is_to_nearest_even(bits: u32) {
            let x = f32::from_bits(bits);
            let rounded = f32::from_bits(round_to_bf16(x));
            if x.is_subnormal() {
                prop_assert_eq!(rounded.to_bits(), 0f32.copysign(x).to_bits());
            } else if x.is_nan() {
                prop_assert!(rounded.is_nan());
            } else {
                prop_assert_eq!(rounded.to_bits(), bf16::from_f32(x).to_f32().to_bits());
            }
        }
    }

    #[test]
    fn a_pair_holds_its_rounded_elements() {
        let p = bf16_pair(1.5, -2.0);
        assert_eq!((even(p), odd(p)), (1.5, -2.0));
        // Halfway between 1 and its successor 1 + 2^-7, and between that and the next.
        let p = bf16_pair(1.0 + 1.0 / 256.0, 1.0 + 3.0 / 256.0);
        assert_eq!((even(p), odd(p)), (1.0, 1.0 + 4.0 / 256.0));
    }
}
