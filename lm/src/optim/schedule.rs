//! Learning-rate schedules.

use serde::{Deserialize, Serialize};

/// The learning rate after the warm-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LrDecay {
    /// Half a cosine from the peak to zero (Hugging Face's `get_cosine_schedule_with_warmup`).
    Cosine,
    /// Constant at the peak (Hugging Face's `get_constant_schedule_with_warmup`).
    Constant,
}

/// A linear warm-up to `peak`, then `shape`. Step 0 is the first optimiser step.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct LrSchedule {
    pub peak: f64,
    /// Warm-up steps. The rate at a step `s` below it is `peak * s / warmup`, so the first step's rate is 0.
    pub warmup: u64,
    pub total: u64,
    pub shape: LrDecay,
}

impl LrSchedule {
    /// The rate at `step`, counted from 0.
    pub fn at(&self, step: u64) -> f64 {
        if step < self.warmup {
            return self.peak * step as f64 / self.warmup as f64;
        }
        match self.shape {
            LrDecay::Constant => self.peak,
            LrDecay::Cosine => {
                let progress = (step - self.warmup) as f64 / self.total.saturating_sub(self.warmup).max(1) as f64;
                self.peak * (0.5 * (1.0 + (std::f64::consts::PI * progress.min(1.0)).cos())).max(0.0)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cosine_warms_up_peaks_and_ends_at_zero_like_hugging_face() {
        let s = LrSchedule { peak: 1e-3, warmup: 4, total: 12, shape: LrDecay::Cosine };
        // transformers.get_cosine_schedule_with_warmup(optimizer, 4, 12)
        let expected = [
            (0, 0.0),
            (1, 2.5e-4),
            (4, 1e-3),
            (6, 8.535533905932737e-4),
            (8, 5e-4),
            (10, 1.4644660940672627e-4),
            (12, 0.0),
        ];
        for (step, rate) in expected {
            assert!((s.at(step) - rate).abs() < 1e-15, "step {step}: {} is not {rate}", s.at(step));
        }
        assert_eq!(s.at(40), 0.0);
    }

    #[test]
    fn constant_keeps_the_peak_after_its_warm_up() {
        let s = LrSchedule { peak: 2.0, warmup: 2, total: 5, shape: LrDecay::Constant };
        assert_eq!([0, 1, 2, 3, 99].map(|i| s.at(i)), [0.0, 1.0, 2.0, 2.0, 2.0]);
    }

    #[test]
    fn without_warm_up_the_first_step_has_the_peak() {
        assert_eq!(LrSchedule { peak: 0.5, warmup: 0, total: 0, shape: LrDecay::Cosine }.at(0), 0.5);
    }
}
