//! GPT-2: pre-norm blocks, tanh GELU, learned positions, tied output embedding; knows no files and no losses.

use candle_core::Tensor;
use rand_chacha::ChaCha12Rng;

use crate::adapter::LoraConfig;
use crate::linear::{Dropout, Linear, LowRank};
use crate::{Batch, Error, Gpt2Config, InitStd, Result, kernels, random};

/// Scale and shift of a layer normalisation, `[d]` each.
#[derive(Debug, Clone)]
pub(crate) struct Norm {
    pub weight: Tensor,
    pub bias: Tensor,
}

/// One transformer block; d the width, i the MLP's.
#[derive(Debug, Clone)]
pub(crate) struct Block {
    pub ln_1: Norm,
    /// `[d, 3 d]`: queries, keys, values side by side.
    pub c_attn: Linear,
    /// `[d, d]`.
    pub attn_proj: Linear,
    pub ln_2: Norm,
    /// `[d, i]`.
    pub c_fc: Linear,
    /// `[i, d]`.
    pub mlp_proj: Linear,
}

impl Block {
    /// The linear layers under their names within the block.
    pub fn linears(&self) -> [(&'static str, &Linear); 4] {
        [
            ("attn.c_attn", &self.c_attn),
            ("attn.c_proj", &self.attn_proj),
            ("mlp.c_fc", &self.c_fc),
            ("mlp.c_proj", &self.mlp_proj),
        ]
    }

    /// `[batch, time, d]` to the same. The gradient of a frozen weight is never computed.
    fn forward(&self, x: &Tensor, config: &Gpt2Config, drop: &mut Option<&mut Dropout>) -> Result<Tensor> {
        let (batch, time, _) = x.dims3()?;
        let rows = batch * time;
        let c_attn = self.c_attn.mask(rows, drop.as_deref_mut())?;
        let attn_proj = self.attn_proj.mask(rows, drop.as_deref_mut())?;
        let attn_branch = branch_mask(x.dims(), drop)?;
        let c_fc = self.c_fc.mask(rows, drop.as_deref_mut())?;
        let mlp_proj = self.mlp_proj.mask(rows, drop.as_deref_mut())?;
        let mlp_branch = branch_mask(x.dims(), drop)?;
        let block = kernels::Block {
            ln_1: (&self.ln_1.weight, &self.ln_1.bias),
            c_attn: self.c_attn.projection(c_attn.as_ref()),
            attn_proj: self.attn_proj.projection(attn_proj.as_ref()),
            ln_2: (&self.ln_2.weight, &self.ln_2.bias),
            c_fc: self.c_fc.projection(c_fc.as_ref()),
            mlp_proj: self.mlp_proj.projection(mlp_proj.as_ref()),
            attn_mask: attn_branch.as_ref(),
            mlp_mask: mlp_branch.as_ref(),
            eps: config.layer_norm_epsilon,
            n_head: config.n_head,
            time,
        };
        Ok(kernels::transformer_block(x, &block)?)
    }
}

/// The weights of a GPT-2, without the file's `transformer.` prefix in names.
#[derive(Debug, Clone)]
pub(crate) struct Gpt2 {
    pub config: Gpt2Config,
    /// `[vocab, d]`, also the output layer.
    pub wte: Tensor,
    /// `[n_positions, d]`.
    pub wpe: Tensor,
    pub blocks: Vec<Block>,
    pub ln_f: Norm,
}

impl Gpt2 {
    /// Builds a model by asking for each tensor by name and shape, in file order. No adapters.
    pub fn build(config: &Gpt2Config, mut get: impl FnMut(&str, &[usize]) -> Result<Tensor>) -> Result<Self> {
        let (d, inner) = (config.n_embd, config.inner());
        let wte = get("wte.weight", &[config.vocab_size, d])?;
        let wpe = get("wpe.weight", &[config.n_positions, d])?;
        // Not sized in advance: a config that lies about its layers fails at the first missing tensor.
        let mut blocks = Vec::new();
        for i in 0..config.n_layer {
            let ln_1 = norm(&mut get, &format!("h.{i}.ln_1"), d)?;
            let c_attn = linear(&mut get, &format!("h.{i}.attn.c_attn"), d, 3 * d)?;
            let attn_proj = linear(&mut get, &format!("h.{i}.attn.c_proj"), d, d)?;
            let ln_2 = norm(&mut get, &format!("h.{i}.ln_2"), d)?;
            let c_fc = linear(&mut get, &format!("h.{i}.mlp.c_fc"), d, inner)?;
            let mlp_proj = linear(&mut get, &format!("h.{i}.mlp.c_proj"), inner, d)?;
            blocks.push(Block { ln_1, c_attn, attn_proj, ln_2, c_fc, mlp_proj });
        }
        let ln_f = norm(&mut get, "ln_f", d)?;
        Ok(Self { config: config.clone(), wte, wpe, blocks, ln_f })
    }

    /// Draws fresh weights as GPT-2 does: normal matrices, the projections into the residual stream smaller by
    /// sqrt(2 n_layer), norms one, biases zero.
    pub fn init(config: &Gpt2Config, init: InitStd, rng: &mut ChaCha12Rng) -> Result<Self> {
        let (std, position_std) = match init {
            InitStd::Fixed(std) => (std, std),
            InitStd::InverseSqrtWidth => (1.0 / (config.n_embd as f64).sqrt(), 0.02),
        };
        let residual = 1.0 / (2.0 * config.n_layer as f64).sqrt();
        Self::build(config, |name, shape| {
            let device = candle_core::Device::Cpu;
            let tensor = match name {
                _ if name.ends_with("bias") => Tensor::zeros(shape, candle_core::DType::F32, &device)?,
                _ if shape.len() == 1 => Tensor::ones(shape, candle_core::DType::F32, &device)?,
                "wpe.weight" => random::normal(shape, position_std, rng)?,
                _ if name.ends_with("c_proj.weight") => random::normal(shape, std * residual, rng)?,
                _ => random::normal(shape, std, rng)?,
            };
            Ok(tensor)
        })
    }

    /// Every tensor but the adapters', by name, in file order.
    pub fn tensors(&self) -> Vec<(String, &Tensor)> {
        let mut all = vec![("wte.weight".to_owned(), &self.wte), ("wpe.weight".to_owned(), &self.wpe)];
        for (i, block) in self.blocks.iter().enumerate() {
            let mut pair = |name: &str, weight, bias| {
                all.push((format!("h.{i}.{name}.weight"), weight));
                all.push((format!("h.{i}.{name}.bias"), bias));
            };
            pair("ln_1", &block.ln_1.weight, &block.ln_1.bias);
            pair("attn.c_attn", &block.c_attn.weight, &block.c_attn.bias);
            pair("attn.c_proj", &block.attn_proj.weight, &block.attn_proj.bias);
            pair("ln_2", &block.ln_2.weight, &block.ln_2.bias);
            pair("mlp.c_fc", &block.c_fc.weight, &block.c_fc.bias);
            pair("mlp.c_proj", &block.mlp_proj.weight, &block.mlp_proj.bias);
        }
        all.push(("ln_f.weight".to_owned(), &self.ln_f.weight));
        all.push(("ln_f.bias".to_owned(), &self.ln_f.bias));
        all
    }

    /// The same model with every tensor but the adapters' replaced; adapters are dropped.
    pub fn map(&self, mut f: impl FnMut(&Tensor) -> Result<Tensor>) -> Result<Self> {
        let tensors: std::collections::HashMap<String, &Tensor> = self.tensors().into_iter().collect();
        Self::build(&self.config, |name, _| f(tensors[name]))
    }

    /// A view that shares storage and tracks nothing; adapters are dropped.
    pub fn detached(&self) -> Self {
        let norm = |n: &Norm| Norm { weight: n.weight.detach(), bias: n.bias.detach() };
        let linear = |l: &Linear| Linear { weight: l.weight.detach(), bias: l.bias.detach(), adapter: None };
        let block = |b: &Block| Block {
            ln_1: norm(&b.ln_1),
            c_attn: linear(&b.c_attn),
            attn_proj: linear(&b.attn_proj),
            ln_2: norm(&b.ln_2),
            c_fc: linear(&b.c_fc),
            mlp_proj: linear(&b.mlp_proj),
        };
        Self {
            config: self.config.clone(),
            wte: self.wte.detach(),
            wpe: self.wpe.detach(),
            blocks: self.blocks.iter().map(block).collect(),
            ln_f: norm(&self.ln_f),
        }
    }

    /// The same model with each linear layer's adapter replaced by what `f` says for its name (`h.0.attn.c_attn`).
    pub fn map_adapters(mut self, mut f: impl FnMut(&str, &Linear) -> Result<Option<LowRank>>) -> Result<Self> {
        for (i, block) in self.blocks.iter_mut().enumerate() {
            for (name, linear) in [
                ("attn.c_attn", &mut block.c_attn),
                ("attn.c_proj", &mut block.attn_proj),
                ("mlp.c_fc", &mut block.c_fc),
                ("mlp.c_proj", &mut block.mlp_proj),
            ] {
                linear.adapter = f(&format!("h.{i}.{name}"), linear)?;
            }
        }
        Ok(self)
    }

    /// Linear layers with their names in the model.
    pub fn linears(&self) -> impl Iterator<Item = (String, &Linear)> {
        self.blocks
            .iter()
            .enumerate()
            .flat_map(|(i, block)| block.linears().map(|(name, linear)| (format!("h.{i}.{name}"), linear)))
    }

    /// A fresh adapter on every linear layer: A uniform in ±1/sqrt(in) (PEFT's Kaiming-uniform with a = sqrt 5), B zero.
    pub fn with_fresh_adapters(&self, lora: &LoraConfig, rng: &mut ChaCha12Rng) -> Result<Self> {
        lora.check().map_err(Error::input)?;
        self.detached().map_adapters(|_, linear| {
            let (rows, out) = linear.weight.dims2()?;
            let a = random::uniform(&[lora.r, rows], 1.0 / (rows as f64).sqrt(), rng)?;
            let b = Tensor::zeros((out, lora.r), candle_core::DType::F32, &candle_core::Device::Cpu)?;
            Ok(Some(LowRank {
                a: crate::variable::fresh(&a)?,
                b: crate::variable::fresh(&b)?,
                scale: lora.scale(),
                dropout: lora.dropout,
            }))
        })
    }

    /// The hidden states after `ln_f`, `[batch, time, d]`.
    pub fn hidden(&self, batch: &Batch, mut drop: Option<&mut Dropout>) -> Result<Tensor> {
        let config = &self.config;
        let time = batch.time();
        if time > config.n_positions {
            return Err(Error::input(format!(
                "a sequence of {time} tokens; the model has {} positions",
                config.n_positions
            )));
        }
        if batch.max_id() as usize >= config.vocab_size {
            return Err(Error::input(format!(
                "token id {} is not below the model's vocabulary of {}",
                batch.max_id(),
                config.vocab_size
            )));
        }
        let tokens = kernels::embedding(batch.ids(), &self.wte)?;
        let mut x = tokens.broadcast_add(&self.wpe.narrow(0, 0, time)?)?;
        if let Some(mask) = branch_mask(x.dims(), &mut drop)? {
            x = (x * mask)?;
        }
        for block in &self.blocks {
            x = block.forward(&x, config, &mut drop)?;
        }
        Ok(kernels::layer_norm(&x, &self.ln_f.weight, &self.ln_f.bias, config.layer_norm_epsilon)?)
    }
}

/// The dropout of the embeddings or of a branch before it joins the residual stream, if asked for.
fn branch_mask(shape: &[usize], drop: &mut Option<&mut Dropout>) -> Result<Option<Tensor>> {
    match drop {
        Some(drop) if drop.model > 0.0 => Ok(Some(random::dropout_mask(shape, drop.model, &mut drop.rng)?)),
        _ => Ok(None),
    }
}

fn norm(get: &mut impl FnMut(&str, &[usize]) -> Result<Tensor>, name: &str, d: usize) -> Result<Norm> {
    Ok(Norm { weight: get(&format!("{name}.weight"), &[d])?, bias: get(&format!("{name}.bias"), &[d])? })
}

fn linear(
    get: &mut impl FnMut(&str, &[usize]) -> Result<Tensor>,
    name: &str,
    rows: usize,
    columns: usize,
) -> Result<Linear> {
    Ok(Linear {
        weight: get(&format!("{name}.weight"), &[rows, columns])?,
        bias: get(&format!("{name}.bias"), &[columns])?,
        adapter: None,
    })
}
