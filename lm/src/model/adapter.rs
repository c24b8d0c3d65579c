//! LoRA adapters (Hu et al. 2021): their hyperparameters, and the two matrices beside one linear layer.

use candle_core::Tensor;

use crate::{Result, variable};

/// The hyperparameters of a LoRA adapter: W x + alpha/r B A dropout(x).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LoraConfig {
    pub r: usize,
    pub alpha: f64,
    /// Probability of dropping an entry of the adapter's input in training.
    pub dropout: f64,
}

impl LoraConfig {
    /// alpha / r.
    pub fn scale(&self) -> f64 {
        self.alpha / self.r as f64
    }

    pub(crate) fn check(&self) -> Result<(), String> {
        if self.r == 0 {
            return Err("lora r is 0, expected at least 1".to_owned());
        }
        if !self.alpha.is_finite() {
            return Err(format!("lora alpha is {}, expected a finite number", self.alpha));
        }
        if !(0.0..1.0).contains(&self.dropout) {
            return Err(format!("lora dropout is {}, expected at least 0 and below 1", self.dropout));
        }
        Ok(())
    }
}

/// The adapter of one linear layer: A `[r, in]`, B `[out, r]` as PEFT stores them; scale = alpha / r.
#[derive(Debug, Clone)]
pub struct LoraAdapter {
    pub a: Tensor,
    pub b: Tensor,
    pub scale: f64,
    pub dropout: f64,
}

impl LoraAdapter {
    /// A frozen view that shares storage.
    pub fn frozen(&self) -> Self {
        Self { a: self.a.detach(), b: self.b.detach(), ..*self }
    }

    /// A trainable copy.
    pub fn trainable(self) -> Result<Self> {
        Ok(Self { a: variable::trainable_copy(&self.a)?, b: variable::trainable_copy(&self.b)?, ..self })
    }
}
