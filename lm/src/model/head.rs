//! Linear heads that turn hidden states into one number, and reward models with such a head.

use std::path::Path;

use candle_core::{DType, Tensor};
use rand_chacha::ChaCha12Rng;

use crate::io::Checkpoint;
use crate::io::weights;
use crate::model::linear::Dropout;
use crate::model::transformer::NamedTensor;
use crate::tensor::device::device;
use crate::tensor::random;
use crate::{Batch, CausalLm, Error, Result, Variable, WeightType, variable};

/// x . w + b: weight `[1, d]`, bias `[1]`.
#[derive(Debug, Clone)]
pub struct ScalarHead {
    weight: Tensor,
    bias: Tensor,
}

impl ScalarHead {
    /// A trainable head: the weight normal with standard deviation `std`, the bias 0.
    pub fn init(d: usize, std: f64, rng: &mut ChaCha12Rng) -> Result<Self> {
        let weight = variable::trainable_copy(&random::normal(&[1, d], std, rng)?)?;
        Ok(Self { weight, bias: variable::trainable_copy(&Tensor::zeros(1, DType::F32, &device())?)? })
    }

    /// A trainable head, all zero.
    pub fn zeros(d: usize) -> Result<Self> {
        let zeros = |shape: &[usize]| variable::trainable_copy(&Tensor::zeros(shape, DType::F32, &device())?);
        Ok(Self { weight: zeros(&[1, d])?, bias: zeros(&[1])? })
    }

    /// `[n, d]` to `[n]`.
    pub fn forward(&self, hidden: &Tensor) -> Result<Tensor> {
        Ok(hidden.matmul(&self.weight.t()?)?.squeeze(1)?.broadcast_add(&self.bias)?)
    }

    /// `head.weight` and `head.bias`, if trainable. Weight decay applies to neither.
    pub fn variables(&self) -> Vec<Variable> {
        [("head.weight", &self.weight), ("head.bias", &self.bias)]
            .into_iter()
            .filter_map(|(name, tensor)| variable::from_trainable(name.to_owned(), tensor, false))
            .collect()
    }

    /// A detached view that shares storage.
    pub fn frozen(&self) -> Self {
        Self { weight: self.weight.detach(), bias: self.bias.detach() }
    }

    /// A fresh trainable copy.
    pub fn trainable(&self) -> Result<Self> {
        Ok(Self { weight: variable::trainable_copy(&self.weight)?, bias: variable::trainable_copy(&self.bias)? })
    }

    /// Writes a safetensors file with `weight` and `bias`.
    pub fn save(&self, file: &Path) -> Result<()> {
        let named_tensor = |name: &str, tensor| NamedTensor { name: name.to_owned(), tensor, transposed: false };
        let tensors = [named_tensor("weight", &self.weight), named_tensor("bias", &self.bias)];
        weights::write(file, &tensors, WeightType::F32)
    }

    /// Reads a file written by [`ScalarHead::save`]; frozen. Errors name the file, the tensor and the expected width
    /// `d`.
    pub fn load(file: &Path, d: usize) -> Result<Self> {
        let weights = Checkpoint::file(file)?;
        Ok(Self { weight: weights.get("weight", &[1, d])?, bias: weights.get("bias", &[1])? })
    }
}

/// How a reward is read from the hidden states.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RewardPooling {
    /// The head's output at the last real token of the sequence: EOS if the response has it.
    Last,
    /// The sum of the head's output over the response tokens.
    Sum,
}

/// A language model with a scalar head.
#[derive(Debug, Clone)]
pub struct RewardModel {
    pub lm: CausalLm,
    pub head: ScalarHead,
    pub pool: RewardPooling,
}

impl RewardModel {
    /// One score per sequence, `[batch]`. Errors: [`RewardPooling::Sum`] with a sequence that has no response.
    pub fn scores(&self, batch: &Batch, dropout: Option<&mut Dropout>) -> Result<Tensor> {
        match self.pool {
            RewardPooling::Last => self.head.forward(&self.lm.hidden_at(batch, &batch.last_rows(), dropout)?),
            RewardPooling::Sum => {
                if let Some(i) = batch.row_ranges().iter().position(|r| r.is_empty()) {
                    return Err(Error::input(format!("sequence {i} of the batch has no response to score")));
                }
                let (rows, sequence_of) = batch.response_rows();
                let tokens = self.head.forward(&self.lm.hidden_at(batch, &rows, dropout)?)?;
                let sequence_of = Tensor::from_vec(sequence_of, rows.len(), &device())?;
                Ok(Tensor::zeros(batch.len(), DType::F32, &device())?.index_add(&sequence_of, &tokens, 0)?)
            }
        }
    }

    /// The model's variables, then the head's. A separate output layer is left out: no score depends on it.
    pub fn variables(&self) -> Vec<Variable> {
        let mut all = self.lm.trunk_variables();
        all.extend(self.head.variables());
        all
    }

    /// A detached view for scoring.
    pub fn frozen(&self) -> Self {
        Self { lm: self.lm.frozen(), head: self.head.frozen(), pool: self.pool }
    }
}
