//! A language model whose weights are frozen, trained whole, or trained through an adapter.

use std::path::Path;
use std::sync::Arc;

use candle_core::Tensor;
use rand_chacha::ChaCha12Rng;

use crate::io::peft;
use crate::io::weights;
use crate::model::adapter::{LoraAdapter, LoraConfig};
use crate::model::architecture::LM_HEAD;
use crate::model::linear::{Dropout, Linear};
use crate::model::transformer::Transformer;
use crate::tensor::device::device;
use crate::tensor::threads::in_pool;
use crate::{
    Batch, Error, InitStd, ModelConfig, Precision, Result, StatOptions, TokenStats, Variable, WeightType, token_stats,
    variable,
};

/// A causal language model. Cloning is cheap and shares the weights.
#[derive(Debug, Clone)]
pub struct CausalLm {
    transformer: Arc<Transformer>,
    lora: Option<LoraConfig>,
}

/// The next-token loss of a batch, over all tokens and over responses alone; scalars in nats per token.
#[derive(Debug, Clone)]
pub struct LmLoss {
    /// The weighted mean over prompt and response tokens, with its autograd graph.
    pub loss: Tensor,
    /// The mean over response tokens alone, detached.
    pub response_nll: Tensor,
}

impl CausalLm {
    /// A model with freshly drawn weights, frozen.
    pub fn init(config: impl Into<ModelConfig>, init: InitStd, rng: &mut ChaCha12Rng) -> Result<Self> {
        Ok(Self::new(Transformer::init(&config.into(), init, rng)?, None))
    }

    /// Loads a model of any family from a Hugging Face folder (`config.json` and weights in f32, f16 or bf16, tensor
    /// names with or without the trunk's prefix), or a Llama from a GGUF file, dequantised. Frozen.
    pub fn load(path: &Path) -> Result<Self> {
        Ok(Self::new(weights::load(path)?, None))
    }

    /// Writes a Hugging Face folder. Equal weights give equal bytes. Errors: the model has an adapter (merge it first).
    pub fn save(&self, folder: &Path, dtype: WeightType) -> Result<()> {
        if self.lora.is_some() {
            return Err(Error::input(
                "a model with an adapter cannot be saved as one model; merge the adapter or save it alone",
            ));
        }
        weights::save(&self.transformer, folder, dtype)
    }

    /// The same weights and adapter with matrix products in another precision. Views and copies of the result keep the
    /// precision; files do not record it. An adapter's own products are always f32.
    pub fn with_precision(&self, precision: Precision) -> Self {
        Self::new(Transformer { precision, ..Transformer::clone(&self.transformer) }, self.lora)
    }

    pub fn precision(&self) -> Precision {
        self.transformer.precision
    }

    pub fn config(&self) -> &ModelConfig {
        &self.transformer.config
    }

    /// The adapter's configuration, if there is an adapter.
    pub fn lora(&self) -> Option<&LoraConfig> {
        self.lora.as_ref()
    }

    /// The model with all weights trainable. Tensors are copied one by one; one that no other model shares is freed
    /// after its copy. Errors: the model has an adapter.
    pub fn with_full_training(self) -> Result<Self> {
        if self.lora.is_some() {
            return Err(Error::input("a model with an adapter cannot be trained in full; merge the adapter first"));
        }
        Ok(Self::new(Arc::unwrap_or_clone(self.transformer).trainable()?, None))
    }

    /// The same weights, frozen, with a fresh trainable adapter on every linear layer: A is Kaiming-uniform as in PEFT
    /// and B = 0, so that outputs are unchanged at first. Replaces an existing adapter.
    pub fn with_adapter(&self, lora: &LoraConfig, rng: &mut ChaCha12Rng) -> Result<Self> {
        Ok(Self::new(self.transformer.with_new_adapters(lora, rng)?, Some(*lora)))
    }

    /// The same weights with an adapter read from a PEFT folder; all frozen. [`CausalLm::with_trainable_adapter`] makes
    /// the adapter trainable.
    pub fn load_adapter(&self, folder: &Path) -> Result<Self> {
        let (transformer, lora) = peft::load(&self.transformer, folder)?;
        Ok(Self::new(transformer, Some(lora)))
    }

    /// The same frozen weights with a trainable copy of the adapter. Errors: the model has no adapter.
    pub fn with_trainable_adapter(&self) -> Result<Self> {
        if self.lora.is_none() {
            return Err(Error::input("the model has no adapter to train"));
        }
        let trainable = |linear: Linear| -> Result<Linear> {
            let adapter = linear.adapter.map(LoraAdapter::trainable).transpose()?;
            Ok(Linear { adapter, ..linear })
        };
        let transformer = Transformer::clone(&self.transformer);
        let transformer = transformer.try_map(&mut (), |(), linear| trainable(linear), |(), tensor| Ok(tensor))?;
        Ok(Self::new(transformer, self.lora))
    }

    /// Writes the adapter as a PEFT folder. `base` names the model it belongs to. Errors: the model has no adapter.
    pub fn save_adapter(&self, folder: &Path, base: &str) -> Result<()> {
        let lora = self.lora.ok_or_else(|| Error::input("the model has no adapter to save"))?;
        peft::save(&self.transformer, &lora, folder, base)
    }

    /// The model with its adapter added into the weights, in f32; frozen.
    pub fn merged(&self) -> Result<Self> {
        Ok(Self::new(self.transformer.merged()?, None))
    }

    /// The same weights without the adapter, frozen. After full training, these are the trained weights.
    pub fn base(&self) -> Self {
        Self::new(self.transformer.frozen_base(), None)
    }

    /// A detached view for sampling and scoring, which builds no autograd graph. It shares storage, so it follows
    /// further training.
    pub fn frozen(&self) -> Self {
        Self::new(self.transformer.frozen(), self.lora)
    }

    /// The trainable tensors, in file order.
    pub fn variables(&self) -> Vec<Variable> {
        let mut all = Vec::new();
        for named in self.transformer.tensors() {
            all.extend(variable::from_trainable(named.name, named.tensor, named.tensor.rank() == 2));
        }
        for linear in self.transformer.linears() {
            if let Some(adapter) = &linear.adapter {
                all.extend(variable::from_trainable(format!("{}.lora_A.weight", linear.name), &adapter.a, true));
                all.extend(variable::from_trainable(format!("{}.lora_B.weight", linear.name), &adapter.b, true));
            }
        }
        all
    }

    /// The model's own tensors, without the adapter's, by their names in the file. They share storage with the model.
    pub fn weights(&self) -> impl Iterator<Item = (String, &Tensor)> {
        self.transformer.tensors().into_iter().map(|named| (named.name, named.tensor))
    }

    /// The trainable tensors that hidden states depend on: all but those of a separate output layer.
    pub(crate) fn trunk_variables(&self) -> Vec<Variable> {
        let mut all = self.variables();
        all.retain(|variable| !variable.name.strip_prefix(LM_HEAD).is_some_and(|rest| rest.starts_with('.')));
        all
    }

    /// The hidden states after the last norm, `[batch, time, d]`. `dropout` is for training only. Errors: ids above
    /// the vocabulary, sequences longer than the model's window.
    pub fn hidden(&self, batch: &Batch, dropout: Option<&mut Dropout>) -> Result<Tensor> {
        in_pool(|| self.transformer.hidden(batch, None, dropout))
    }

    /// [`CausalLm::hidden`] at the positions that predict the response tokens, `[response_tokens, d]`. The last layer
    /// computes no other rows.
    pub fn hidden_for_responses(&self, batch: &Batch, dropout: Option<&mut Dropout>) -> Result<Tensor> {
        self.hidden_at(batch, batch.predicting_rows(), dropout)
    }

    /// [`CausalLm::hidden`] at the given rows of `[batch * time]`, in ascending order: `[n, d]`.
    pub(crate) fn hidden_at(&self, batch: &Batch, rows: &[u32], dropout: Option<&mut Dropout>) -> Result<Tensor> {
        in_pool(|| self.transformer.hidden(batch, Some(rows), dropout))
    }

    /// Log-probabilities (and entropies) of the response tokens from the output of [`CausalLm::hidden_for_responses`].
    pub fn token_stats(&self, hidden: &Tensor, batch: &Batch, options: &StatOptions) -> Result<TokenStats> {
        let forbidden = token_stats::eos_forbidden(batch, options.min_new_tokens);
        token_stats::token_stats(
            hidden,
            &self.transformer.lm_head(),
            batch.targets(),
            Some((&options.eos, &forbidden)),
            options.entropy,
        )
    }

    /// The exact KL(self || other) over the whole vocabulary between the distributions of each response token: flat
    /// `[response_tokens]`, in nats. `hidden` and `other_hidden` are the outputs of [`CausalLm::hidden_for_responses`]
    /// of the two models. Errors: the vocabularies differ.
    pub fn kl_divergence(
        &self,
        hidden: &Tensor,
        other: &Self,
        other_hidden: &Tensor,
        batch: &Batch,
        options: &StatOptions,
    ) -> Result<Vec<f32>> {
        let forbidden = token_stats::eos_forbidden(batch, options.min_new_tokens);
        let (own, other) = ((hidden, &self.transformer.lm_head()), (other_hidden, &other.transformer.lm_head()));
        token_stats::kl_divergence(own, other, batch.targets(), (&options.eos, &forbidden))
    }

    /// The next-token loss: the mean negative log-probability, with weight 1 for a response token and `prompt_weight`
    /// for a prompt token (from the second on). With weight 0 the output layer and most of the last layer run on
    /// response positions only.
    pub fn lm_loss(&self, batch: &Batch, prompt_weight: f64, dropout: Option<&mut Dropout>) -> Result<LmLoss> {
        let responses = batch.response_tokens();
        let (prompt_rows, prompt_targets) =
            if prompt_weight > 0.0 { batch.prompt_predictions()? } else { Default::default() };
        let total_weight = responses as f64 + prompt_weight * prompt_targets.len() as f64;
        if total_weight == 0.0 {
            return Err(Error::input("the batch has no token to train on"));
        }
        let nll = |hidden: &Tensor, targets: &[u32]| -> Result<Tensor> {
            let stats = token_stats::token_stats(hidden, &self.transformer.lm_head(), targets, None, false)?;
            Ok(stats.logprob.sum_all()?.neg()?)
        };
        let (response, sum) = if prompt_rows.is_empty() {
            let response = nll(&self.hidden_for_responses(batch, dropout)?, batch.targets())?;
            (response.detach(), response)
        } else {
            let hidden = self.hidden(batch, dropout)?;
            let response = nll(&select_rows(&hidden, batch.predicting_rows())?, batch.targets())?;
            let prompt = nll(&select_rows(&hidden, &prompt_rows)?, &prompt_targets)?;
            (response.detach(), (response + (prompt * prompt_weight)?)?)
        };
        let response_nll = (response / responses.max(1) as f64)?;
        let loss = (sum / total_weight)?;
        Ok(LmLoss { loss, response_nll })
    }

    pub(crate) fn transformer(&self) -> &Transformer {
        &self.transformer
    }

    fn new(transformer: Transformer, lora: Option<LoraConfig>) -> Self {
        Self { transformer: Arc::new(transformer), lora }
    }
}

/// Rows of `hidden` `[batch, time, d]` by their index in `[batch * time]`: `[n, d]`.
fn select_rows(hidden: &Tensor, index: &[u32]) -> Result<Tensor> {
    let index = Tensor::from_vec(index.to_vec(), index.len(), &device())?;
    Ok(hidden.flatten(0, 1)?.index_select(&index, 0)?)
}
