//! The language model as stages see it: weights that may be frozen, trained whole, or trained through an adapter.
//! Knows no objective beyond the next-token loss.

use std::path::Path;
use std::sync::Arc;

use candle_core::{Device, Tensor};
use rand_chacha::ChaCha12Rng;

use crate::adapter::{self, LoraConfig};
use crate::linear::{Dropout, LowRank};
use crate::spec::OUTPUT;
use crate::threads::in_pool;
use crate::transformer::Transformer;
use crate::{
    Batch, Error, InitStd, ModelConfig, Precision, Result, StatOptions, TokenStats, Variable, WeightType, stats,
    variable, weights,
};

/// A causal language model. Cloning is cheap and shares the weights.
#[derive(Debug, Clone)]
pub struct CausalLm {
    net: Arc<Transformer>,
    lora: Option<LoraConfig>,
}

/// A next-token loss and its part on the responses, scalars in nats a token.
#[derive(Debug, Clone)]
pub struct LmLoss {
    /// The weighted mean over prompt and response tokens; to be differentiated.
    pub loss: Tensor,
    /// The mean over response tokens alone, detached.
    pub response_nll: Tensor,
}

impl CausalLm {
    /// Freshly drawn weights; frozen.
    pub fn init(config: impl Into<ModelConfig>, init: InitStd, rng: &mut ChaCha12Rng) -> Result<Self> {
        Ok(Self::of(Transformer::init(&config.into(), init, rng)?, None))
    }

    /// Reads a Hugging Face folder of a GPT-2, GPT-J or Llama, `config.json` and weights in f32, f16 or bf16, names with or
    /// without the trunk's prefix; or a Llama's GGUF file, dequantised. Frozen.
    pub fn load(path: &Path) -> Result<Self> {
        Ok(Self::of(weights::load(path)?, None))
    }

    /// Writes a Hugging Face folder. Equal weights give equal bytes. Errors: an adapter is on (merge it first).
    pub fn save(&self, folder: &Path, dtype: WeightType) -> Result<()> {
        if self.lora.is_some() {
            return Err(Error::input("a model with an adapter cannot be saved whole; merge it or save the adapter"));
        }
        weights::save(&self.net, folder, dtype)
    }

    /// The same model, weights and adapter, with its products in another precision. Every view and copy made of it keeps
    /// the precision; files know nothing of it. An adapter's own products are f32 either way.
    pub fn with_precision(&self, precision: Precision) -> Self {
        Self::of(Transformer { precision, ..Transformer::clone(&self.net) }, self.lora)
    }

    pub fn precision(&self) -> Precision {
        self.net.precision
    }

    pub fn config(&self) -> &ModelConfig {
        &self.net.config
    }

    /// The adapter's shape, if there is one.
    pub fn lora(&self) -> Option<&LoraConfig> {
        self.lora.as_ref()
    }

    /// All weights made trainable: a copy of those that another model shares. Errors: an adapter is on.
    pub fn with_full_training(self) -> Result<Self> {
        if self.lora.is_some() {
            return Err(Error::input("full training of a model with an adapter; merge it first"));
        }
        Ok(Self::of(Arc::unwrap_or_clone(self.net).trainable()?, None))
    }

    /// The same weights, frozen, with a fresh trainable adapter on every linear layer: A Kaiming-uniform as in PEFT,
    /// B = 0, so that the model is unchanged at first. An adapter already there is not kept.
    pub fn with_adapter(&self, lora: &LoraConfig, rng: &mut ChaCha12Rng) -> Result<Self> {
        Ok(Self::of(self.net.with_fresh_adapters(lora, rng)?, Some(*lora)))
    }

    /// The same weights with an adapter read from a PEFT folder; all frozen. `trainable_adapter` thaws it.
    pub fn load_adapter(&self, folder: &Path) -> Result<Self> {
        let (net, lora) = adapter::load(self.net.detached(), folder)?;
        Ok(Self::of(net, Some(lora)))
    }

    /// The same frozen weights with a fresh trainable copy of the adapter. Errors: there is none.
    pub fn with_trainable_adapter(&self) -> Result<Self> {
        if self.lora.is_none() {
            return Err(Error::input("the model has no adapter to train"));
        }
        self.map_adapters(variable::fresh)
    }

    /// Writes the adapter as a PEFT folder. `base` names the model it belongs to. Errors: there is none.
    pub fn save_adapter(&self, folder: &Path, base: &str) -> Result<()> {
        let lora = self.lora.ok_or_else(|| Error::input("the model has no adapter to save"))?;
        adapter::save(&self.net, &lora, folder, base)
    }

    /// The model with its adapter added into the weights, in f32; frozen.
    pub fn merged(&self) -> Result<Self> {
        Ok(Self::of(self.net.merged()?, None))
    }

    /// The same weights with the adapter off; frozen. With full training, these are the trained weights.
    pub fn base(&self) -> Self {
        Self::of(self.net.detached(), None)
    }

    /// A detached view for sampling and scoring that builds no graph. It shares storage: training goes on under it.
    pub fn frozen(&self) -> Self {
        Self::of(self.net.frozen(), self.lora)
    }

    /// The trainable tensors, in file order.
    pub fn variables(&self) -> Vec<Variable> {
        let mut all = Vec::new();
        for named in self.net.tensors() {
            all.extend(variable::of(named.name, named.tensor, named.tensor.rank() == 2));
        }
        for linear in self.net.linears() {
            if let Some(adapter) = &linear.adapter {
                all.extend(variable::of(format!("{}.lora_A.weight", linear.name), &adapter.a, true));
                all.extend(variable::of(format!("{}.lora_B.weight", linear.name), &adapter.b, true));
            }
        }
        all
    }

    /// The model's own tensors, without an adapter's, by their names in the file. They share storage.
    pub fn weights(&self) -> impl Iterator<Item = (String, &Tensor)> {
        self.net.tensors().into_iter().map(|named| (named.name, named.tensor))
    }

    /// Those that hidden states depend on: all but the output layer's own.
    pub(crate) fn trunk_variables(&self) -> Vec<Variable> {
        let mut all = self.variables();
        all.retain(|variable| !variable.name.strip_prefix(OUTPUT).is_some_and(|rest| rest.starts_with('.')));
        all
    }

    /// The hidden states after the last norm, `[batch, time, d]`. `dropout` is for training only. Errors: ids above
    /// the vocabulary, sequences longer than the model's window.
    pub fn hidden(&self, batch: &Batch, dropout: Option<&mut Dropout>) -> Result<Tensor> {
        in_pool(|| self.net.hidden(batch, None, dropout))
    }

    /// [`CausalLm::hidden`] of the positions that predict the response tokens, `[response_tokens, d]`: the last layer computes
    /// no others.
    pub fn predicting(&self, batch: &Batch, dropout: Option<&mut Dropout>) -> Result<Tensor> {
        self.hidden_at(batch, batch.predicting(), dropout)
    }

    /// [`CausalLm::hidden`] of some rows of `[batch * time]`, which ascend: `[n, d]`.
    pub(crate) fn hidden_at(&self, batch: &Batch, rows: &[u32], dropout: Option<&mut Dropout>) -> Result<Tensor> {
        in_pool(|| self.net.hidden(batch, Some(rows), dropout))
    }

    /// Log-probabilities (and entropies) of the response tokens from what [`CausalLm::predicting`] gives.
    pub fn token_stats(&self, predicting: &Tensor, batch: &Batch, o: &StatOptions) -> Result<TokenStats> {
        let masked = stats::before_minimum(batch, o.min_new_tokens);
        stats::token_stats(predicting, &self.net.output(), batch.targets(), Some((&o.eos, &masked)), o.entropy)
    }

    /// The exact KL(self || other) of the distributions that the response tokens were drawn from, over the whole vocabulary: flat
    /// `[response_tokens]`, in nats. `predicting` and `others` are what [`CausalLm::predicting`] gives for the two models.
    /// Errors: other vocabularies.
    pub fn divergence(
        &self,
        predicting: &Tensor,
        other: &Self,
        others: &Tensor,
        batch: &Batch,
        o: &StatOptions,
    ) -> Result<Vec<f32>> {
        let masked = stats::before_minimum(batch, o.min_new_tokens);
        let (own, other) = ((predicting, &self.net.output()), (others, &other.net.output()));
        stats::divergence(own, other, batch.targets(), (&o.eos, &masked))
    }

    /// The next-token loss: the mean negative log-probability in which a response token weighs 1 and a prompt token
    /// (from the second on) `prompt_weight`. With weight 0 the output layer and most of the last layer see
    /// response positions only.
    pub fn lm_loss(&self, batch: &Batch, prompt_weight: f64, dropout: Option<&mut Dropout>) -> Result<LmLoss> {
        let responses = batch.response_tokens();
        let (prompt_rows, prompt_targets) =
            if prompt_weight > 0.0 { batch.prompt_predictions()? } else { Default::default() };
        let weight = responses as f64 + prompt_weight * prompt_targets.len() as f64;
        if weight == 0.0 {
            return Err(Error::input("a batch without a token to learn from"));
        }
        let nll = |hidden: &Tensor, targets: &[u32]| -> Result<Tensor> {
            let stats = stats::token_stats(hidden, &self.net.output(), targets, None, false)?;
            Ok(stats.logprob.sum_all()?.neg()?)
        };
        let (response, sum) = if prompt_rows.is_empty() {
            let response = nll(&self.predicting(batch, dropout)?, batch.targets())?;
            (response.detach(), response)
        } else {
            let hidden = self.hidden(batch, dropout)?;
            let response = nll(&rows(&hidden, batch.predicting())?, batch.targets())?;
            let prompt = nll(&rows(&hidden, &prompt_rows)?, &prompt_targets)?;
            (response.detach(), (response + (prompt * prompt_weight)?)?)
        };
        let response_nll = (response / responses.max(1) as f64)?;
        let loss = (sum / weight)?;
        Ok(LmLoss { loss, response_nll })
    }

    pub(crate) fn net(&self) -> &Transformer {
        &self.net
    }

    fn of(net: Transformer, lora: Option<LoraConfig>) -> Self {
        Self { net: Arc::new(net), lora }
    }

    fn map_adapters(&self, f: impl Fn(&Tensor) -> Result<Tensor>) -> Result<Self> {
        let net = Transformer::clone(&self.net).map_adapters(|linear| match &linear.adapter {
            Some(adapter) => Ok(Some(LowRank { a: f(&adapter.a)?, b: f(&adapter.b)?, ..adapter.clone() })),
            None => Ok(None),
        })?;
        Ok(Self::of(net, self.lora))
    }
}

/// Rows of `hidden` `[batch, time, d]` by their index in `[batch * time]`: `[n, d]`.
fn rows(hidden: &Tensor, index: &[u32]) -> Result<Tensor> {
    let index = Tensor::from_vec(index.to_vec(), index.len(), &Device::Cpu)?;
    Ok(hidden.flatten(0, 1)?.index_select(&index, 0)?)
}
