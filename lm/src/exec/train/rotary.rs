//! Rotary position embeddings, on slices.

use std::ops::Range;

use candle_core::{Device, Result, Tensor, bail};
use temper_gemm::simd;

use super::Direction;
use crate::model::block::{Pairing, Rotary};

/// Cosines and sines of the angles of every position.
#[derive(Debug)]
pub struct RotaryTable {
    pairing: Pairing,
    /// Number of pairs; the first `2 pairs` columns of a head are rotated.
    pairs: usize,
    /// `[positions, pairs]` each.
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl RotaryTable {
    /// Multiples of the frequencies are rounded to f32 as in transformers: at position 2,000 that changes the angle by
    /// up to 6e-5.
    pub fn new(rotary: &Rotary, positions: usize) -> Self {
        let Rotary { pairing, frequencies } = rotary;
        let angles = (0..positions).flat_map(|t| frequencies.iter().map(move |f| f64::from(t as f32 * f)));
        let (sin, cos) = angles.map(|a| (a.sin() as f32, a.cos() as f32)).unzip();
        Self { pairing: *pairing, pairs: frequencies.len(), cos, sin }
    }

    /// Errors unless heads are wide enough and there are angles for `time` positions.
    pub fn check(&self, width: usize, time: usize) -> Result<()> {
        let positions = self.cos.len() / self.pairs.max(1);
        if 2 * self.pairs > width || time > positions {
            bail!(
                "rotary embeddings of {} pairs and {positions} positions do not fit heads of {width} and sequences of {time}",
                self.pairs
            );
        }
        Ok(())
    }

    /// Cosines and sines at `positions` as tensors, `[positions, pairs]` each.
    pub fn tables(&self, positions: Range<usize>, device: &Device) -> Result<(Tensor, Tensor)> {
        let at = positions.start * self.pairs..positions.end * self.pairs;
        let table = |values: &[f32]| Tensor::from_slice(&values[at.clone()], (positions.len(), self.pairs), device);
        Ok((table(&self.cos)?, table(&self.sin)?))
    }

    /// Rotates the heads of `width` columns side by side in `x`, in place, for `position`. Backward is the inverse,
    /// which is also the transpose: it rotates gradients.
    pub fn rotate(&self, x: &mut [f32], width: usize, position: usize, direction: Direction) {
        let at = position * self.pairs..(position + 1) * self.pairs;
        let (cos, sin) = (&self.cos[at.clone()], &self.sin[at]);
        let sign = if direction == Direction::Forward { 1.0 } else { -1.0 };
        for head in x.chunks_exact_mut(width) {
            let rotated = &mut head[..2 * self.pairs];
            match self.pairing {
                Pairing::Halves => {
                    let (a, b) = rotated.split_at_mut(self.pairs);
                    halves(a, b, cos, sin, sign);
                }
                Pairing::Interleaved => interleaved(rotated, cos, sin, sign),
            }
        }
    }
}

simd! {
    fn halves(a: &mut [f32], b: &mut [f32], cos: &[f32], sin: &[f32], sign: f32) {
        for ((a, b), (&c, &s)) in a.iter_mut().zip(b).zip(cos.iter().zip(sin)) {
            let s = s * sign;
            (*a, *b) = (*a * c - *b * s, *b * c + *a * s);
        }
    }
}

simd! {
    fn interleaved(x: &mut [f32], cos: &[f32], sin: &[f32], sign: f32) {
        let (pairs, _) = x.as_chunks_mut::<2>();
        for ([a, b], (&c, &s)) in pairs.iter_mut().zip(cos.iter().zip(sin)) {
            let s = s * sign;
            (*a, *b) = (*a * c - *b * s, *b * c + *a * s);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(pairing: Pairing, frequencies: &[f32], positions: usize) -> RotaryTable {
        RotaryTable::new(&Rotary { pairing, frequencies: frequencies.to_vec() }, positions)
    }

    fn rotary(pairing: Pairing) -> RotaryTable {
        table(pairing, &[1.0, 0.1], 8)
    }

    #[test]
    fn pairs_rotate_by_position_times_frequency_and_other_columns_stay() {
        let x = [1.0, 2.0, 3.0, 4.0, 5.0];
        let rotated =
            |a: f32, b: f32, angle: f32| (a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin());
        for (pairing, [i, j, k, l]) in [(Pairing::Halves, [0, 2, 1, 3]), (Pairing::Interleaved, [0, 1, 2, 3])] {
            let mut y = x;
            rotary(pairing).rotate(&mut y, 5, 3, Direction::Forward);
            let mut expected = x;
            (expected[i], expected[j]) = rotated(x[i], x[j], 3.0);
            (expected[k], expected[l]) = rotated(x[k], x[l], 0.3);
            assert!(y.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-6), "{pairing:?}: {y:?}, {expected:?}");
        }
    }

    #[test]
    fn angles_of_large_positions_are_those_of_transformers() {
        // For theta 500,000 over 14 columns, at position 1,999: (1999 * frequency).cos() in f32. The exact value is
        // 0.3586156.
        let mut x = [1.0, 0.0];
        table(Pairing::Halves, &[0.153_412_73], 2000).rotate(&mut x, 2, 1999, Direction::Forward);
        assert!((x[0] - 0.358_606_22).abs() < 1e-7 && (x[1] + 0.933_488_9).abs() < 1e-7, "{x:?}");
    }

    #[test]
    fn a_backward_rotation_is_the_inverse_in_every_head() {
        let x: Vec<f32> = (0..12).map(|i| i as f32 - 5.0).collect();
        for pairing in [Pairing::Halves, Pairing::Interleaved] {
            let mut y = x.clone();
            rotary(pairing).rotate(&mut y, 6, 7, Direction::Forward);
            assert!(y.iter().zip(&x).any(|(a, b)| (a - b).abs() > 0.1));
            rotary(pairing).rotate(&mut y, 6, 7, Direction::Backward);
            assert!(y.iter().zip(&x).all(|(a, b)| (a - b).abs() < 1e-5));
        }
    }
}
