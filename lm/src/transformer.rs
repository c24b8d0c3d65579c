//! A causal transformer of any family: its weights and the forward pass.

use std::sync::Arc;

use candle_core::{DType, Tensor};
use rand_chacha::ChaCha12Rng;

use crate::architecture::{Architecture, LM_HEAD, LmHeadKind, PositionEmbedding};
use crate::config::ModelConfig;
use crate::device::{check_device, device};
use crate::kernels::{self, BlockArgs, LmHeadRef, Rotary};
use crate::linear::{Dropout, Linear};
use crate::lora::{LoraAdapter, LoraConfig};
use crate::{Batch, Error, InitStd, Precision, Result, random, variable};

/// Weight and bias of a normalisation, `[d]` each; without a bias it is an RMS norm.
#[derive(Debug, Clone)]
pub(crate) struct Norm {
    pub weight: Tensor,
    pub bias: Option<Tensor>,
}

impl Norm {
    pub fn kernel(&self) -> kernels::NormRef<'_> {
        kernels::NormRef { weight: &self.weight, bias: self.bias.as_ref() }
    }
}

/// One transformer block.
#[derive(Debug, Clone)]
pub(crate) struct Block {
    pub norm_1: Norm,
    /// Queries, keys and values, in one layer or in three.
    pub qkv: Vec<Linear>,
    pub attn_out: Linear,
    /// None: attention and MLP share the first norm.
    pub norm_2: Option<Norm>,
    /// The MLP's first linear layer, or its gate and up layers.
    pub up: Vec<Linear>,
    pub down: Linear,
}

impl Block {
    /// The linear layers, in file order.
    pub fn linears(&self) -> impl Iterator<Item = &Linear> {
        self.qkv.iter().chain([&self.attn_out]).chain(&self.up).chain([&self.down])
    }

    fn linears_mut(&mut self) -> impl Iterator<Item = &mut Linear> {
        self.qkv.iter_mut().chain([&mut self.attn_out]).chain(&mut self.up).chain([&mut self.down])
    }

    /// The block as an argument of kernels, for sequences of `time`, without dropout.
    pub fn without_dropout(&self, architecture: &Architecture, precision: Precision, time: usize) -> BlockArgs<'_> {
        fn linear(linear: &Linear) -> kernels::LinearRef<'_> {
            linear.kernel(None)
        }
        BlockArgs {
            norm_1: self.norm_1.kernel(),
            qkv: self.qkv.iter().map(linear).collect(),
            attn_out: linear(&self.attn_out),
            norm_2: self.norm_2.as_ref().map(Norm::kernel),
            up: self.up.iter().map(linear).collect(),
            down: linear(&self.down),
            activation: architecture.activation,
            precision,
            attn_dropout: None,
            mlp_dropout: None,
            rotary: None,
            eps: architecture.eps,
            heads: architecture.heads,
            time,
            output_rows: None,
        }
    }

    /// Maps `[batch, time, d]` to the same shape, or to `[n, d]` for the `n` rows in `output_rows`. Gradients of frozen
    /// weights are never computed.
    fn forward(
        &self,
        x: &Tensor,
        architecture: &Architecture,
        precision: Precision,
        rotary: Option<&Arc<Rotary>>,
        dropout: &mut Option<&mut Dropout>,
        output_rows: Option<&[u32]>,
    ) -> Result<Tensor> {
        let (batch, time, d) = x.dims3()?;
        let rows = batch * time;
        let output_count = output_rows.map_or(rows, <[u32]>::len);
        let mask =
            |l: &Linear, n, dropout: &mut Option<&mut Dropout>| l.adapter_dropout_mask(n, dropout.as_deref_mut());
        let qkv = self.qkv.iter().map(|l| mask(l, rows, dropout)).collect::<Result<Vec<_>>>()?;
        let attn_out = mask(&self.attn_out, output_count, dropout)?;
        let attn_dropout = residual_dropout_mask(output_count * d, dropout);
        let up = self.up.iter().map(|l| mask(l, output_count, dropout)).collect::<Result<Vec<_>>>()?;
        let down = mask(&self.down, output_count, dropout)?;
        let mlp_dropout = residual_dropout_mask(output_count * d, dropout);
        let block = BlockArgs {
            qkv: self.qkv.iter().zip(&qkv).map(|(l, m)| l.kernel(m.as_ref())).collect(),
            attn_out: self.attn_out.kernel(attn_out.as_ref()),
            up: self.up.iter().zip(&up).map(|(l, m)| l.kernel(m.as_ref())).collect(),
            down: self.down.kernel(down.as_ref()),
            attn_dropout: attn_dropout.as_ref(),
            mlp_dropout: mlp_dropout.as_ref(),
            rotary: rotary.cloned(),
            output_rows,
            ..self.without_dropout(architecture, precision, time)
        };
        Ok(kernels::transformer_block(x, &block)?)
    }
}

/// An output layer that is not the embedding.
#[derive(Debug, Clone)]
pub(crate) struct LmHead {
    /// `[vocab, d]`.
    pub weight: Tensor,
    /// `[vocab]`.
    pub bias: Option<Tensor>,
}

/// A tensor of a model with its name and orientation in the file.
pub(crate) struct NamedTensor<'a> {
    /// The name in the file of a whole model: `transformer.h.0.attn.c_attn.weight`.
    pub name: String,
    pub tensor: &'a Tensor,
    /// Whether the file holds the transpose.
    pub transposed: bool,
}

#[derive(Debug, Clone)]
pub(crate) struct Transformer {
    pub config: ModelConfig,
    pub architecture: Arc<Architecture>,
    /// Precision of matrix products with weights.
    pub precision: Precision,
    /// `[vocab, d]`.
    pub embedding: Tensor,
    /// `[window, d]`, if positions are learned.
    pub positions: Option<Tensor>,
    pub blocks: Vec<Block>,
    pub norm: Norm,
    /// None: the embedding is reused.
    pub lm_head: Option<LmHead>,
}

/// Returns a tensor given its name and shape, both as in the file.
type GetTensor<'g> = dyn FnMut(&str, &[usize]) -> Result<Tensor> + 'g;

/// Builds the parts of a model from the tensors that `get` returns.
struct TransformerBuilder<'a, 'g> {
    architecture: &'a Architecture,
    get: &'a mut GetTensor<'g>,
}

impl TransformerBuilder<'_, '_> {
    fn norm(&mut self, module: &str) -> Result<Norm> {
        let shape = [self.architecture.d];
        let weight = (self.get)(&format!("{module}.weight"), &shape)?;
        let bias = match self.architecture.names.norm_bias {
            true => Some((self.get)(&format!("{module}.bias"), &shape)?),
            false => None,
        };
        Ok(Norm { weight, bias })
    }

    fn linear(&mut self, module: String, d_in: usize, d_out: usize, bias: bool) -> Result<Linear> {
        let name = format!("{module}.weight");
        let weight = match self.architecture.names.transposed {
            true => (self.get)(&name, &[d_out, d_in])?.t()?.contiguous()?,
            false => (self.get)(&name, &[d_in, d_out])?,
        };
        let bias = match bias {
            true => Some((self.get)(&format!("{module}.bias"), &[d_out])?),
            false => None,
        };
        Ok(Linear { name: module, weight, bias, adapter: None })
    }

    /// Linear layers of the same input: one for each name and width, or one layer of all widths together if there is
    /// one name.
    fn linear_group(
        &mut self,
        block: &str,
        names: &[&str],
        d_in: usize,
        widths: &[usize],
        bias: bool,
    ) -> Result<Vec<Linear>> {
        let total = [widths.iter().sum::<usize>()];
        let widths = if names.len() == 1 { &total } else { widths };
        names
            .iter()
            .zip(widths)
            .map(|(name, &width)| self.linear(format!("{block}{name}"), d_in, width, bias))
            .collect()
    }

    fn block(&mut self, i: usize) -> Result<Block> {
        let architecture = self.architecture;
        let names = architecture.names;
        let prefix = format!("{}{}.{i}.", names.prefix, names.layers);
        let (d, inner) = (architecture.d, architecture.inner);
        let query_width = architecture.qkv_widths()[0];
        let up_widths = vec![inner; architecture.activation.input_width(inner) / inner];
        Ok(Block {
            norm_1: self.norm(&format!("{prefix}{}", names.norm_1))?,
            qkv: self.linear_group(&prefix, names.qkv, d, &architecture.qkv_widths(), architecture.attn_bias)?,
            attn_out: self.linear(format!("{prefix}{}", names.attn_out), query_width, d, architecture.attn_bias)?,
            norm_2: names.norm_2.map(|name| self.norm(&format!("{prefix}{name}"))).transpose()?,
            up: self.linear_group(&prefix, names.up, d, &up_widths, architecture.mlp_bias)?,
            down: self.linear(format!("{prefix}{}", names.down), inner, d, architecture.mlp_bias)?,
        })
    }
}

impl Transformer {
    /// Builds a model without adapters. Calls `get` with each tensor's name and shape in the file, in file order.
    pub fn build(config: &ModelConfig, mut get: impl FnMut(&str, &[usize]) -> Result<Tensor>) -> Result<Self> {
        check_device()?;
        let architecture = Arc::new(config.architecture().map_err(Error::input)?);
        let names = architecture.names;
        let mut builder = TransformerBuilder { architecture: &architecture, get: &mut get };
        let name = |module: &str| format!("{}{module}.weight", names.prefix);
        let embedding = (builder.get)(&name(names.embedding), &[architecture.vocab, architecture.d])?;
        let positions = match architecture.positions {
            PositionEmbedding::Learned => {
                Some((builder.get)(&name(names.positions), &[architecture.window, architecture.d])?)
            }
            PositionEmbedding::Rotary { .. } => None,
        };
        // Not sized in advance: the number of layers is untrusted, and a false one fails at the first missing tensor.
        let mut blocks = Vec::new();
        for i in 0..architecture.layers {
            blocks.push(builder.block(i)?);
        }
        let norm = builder.norm(&format!("{}{}", names.prefix, names.norm))?;
        let lm_head = match architecture.lm_head {
            LmHeadKind::Tied => None,
            LmHeadKind::Untied { bias } => Some(LmHead {
                weight: (builder.get)(&format!("{LM_HEAD}.weight"), &[architecture.vocab, architecture.d])?,
                bias: if bias { Some((builder.get)(&format!("{LM_HEAD}.bias"), &[architecture.vocab])?) } else { None },
            }),
        };
        Ok(Self {
            config: config.clone(),
            architecture,
            precision: Precision::F32,
            embedding,
            positions,
            blocks,
            norm,
            lm_head,
        })
    }

    /// Draws fresh weights as GPT-2 does: matrices normal, projections into the residual stream smaller by sqrt(2
    /// n_layer), norm weights 1, biases 0.
    pub fn init(config: &ModelConfig, init: InitStd, rng: &mut ChaCha12Rng) -> Result<Self> {
        let architecture = config.architecture().map_err(Error::input)?;
        let (std, position_std) = match init {
            InitStd::Fixed(std) => (std, std),
            InitStd::InverseSqrtWidth => (1.0 / (architecture.d as f64).sqrt(), 0.02),
        };
        let residual_scale = 1.0 / (2.0 * architecture.layers as f64).sqrt();
        let names = architecture.names;
        Self::build(config, |name, shape| {
            let module = name.strip_suffix(".weight");
            let module_ends_with = |with: &str| module.is_some_and(|m| m.ends_with(with));
            let tensor = match shape {
                _ if module.is_none() => Tensor::zeros(shape, DType::F32, &device())?,
                [_] => Tensor::ones(shape, DType::F32, &device())?,
                _ if !names.positions.is_empty() && module_ends_with(names.positions) => {
                    random::normal(shape, position_std, rng)?
                }
                _ if module_ends_with(names.attn_out) || module_ends_with(names.down) => {
                    random::normal(shape, std * residual_scale, rng)?
                }
                _ => random::normal(shape, std, rng)?,
            };
            Ok(tensor)
        })
    }

    /// All tensors except the adapters', in file order.
    pub fn tensors(&self) -> Vec<NamedTensor<'_>> {
        let names = self.architecture.names;
        let mut list = TensorList { all: vec![], transposed: names.transposed };
        let full_name = |module: &str| format!("{}{module}", names.prefix);
        list.weight(&full_name(names.embedding), &self.embedding);
        if let Some(positions) = &self.positions {
            list.weight(&full_name(names.positions), positions);
        }
        for (i, block) in self.blocks.iter().enumerate() {
            let prefix = full_name(&format!("{}.{i}.", names.layers));
            list.norm(&format!("{prefix}{}", names.norm_1), &block.norm_1);
            block.qkv.iter().chain([&block.attn_out]).for_each(|l| list.linear(l));
            if let (Some(name), Some(norm)) = (names.norm_2, &block.norm_2) {
                list.norm(&format!("{prefix}{name}"), norm);
            }
            block.up.iter().chain([&block.down]).for_each(|l| list.linear(l));
        }
        list.norm(&full_name(names.norm), &self.norm);
        if let Some(lm_head) = &self.lm_head {
            list.weight(LM_HEAD, &lm_head.weight);
            list.bias(LM_HEAD, lm_head.bias.as_ref());
        }
        list.all
    }

    /// Replaces every tensor, one after the other, by `f` of it; drops adapters.
    pub fn map_tensors(self, mut f: impl FnMut(Tensor) -> Result<Tensor>) -> Result<Self> {
        fn optional(t: Option<Tensor>, f: &mut impl FnMut(Tensor) -> Result<Tensor>) -> Result<Option<Tensor>> {
            t.map(f).transpose()
        }
        fn norm(n: Norm, f: &mut impl FnMut(Tensor) -> Result<Tensor>) -> Result<Norm> {
            Ok(Norm { weight: f(n.weight)?, bias: optional(n.bias, f)? })
        }
        fn linear(l: Linear, f: &mut impl FnMut(Tensor) -> Result<Tensor>) -> Result<Linear> {
            Ok(Linear { name: l.name, weight: f(l.weight)?, bias: optional(l.bias, f)?, adapter: None })
        }
        fn block(b: Block, f: &mut impl FnMut(Tensor) -> Result<Tensor>) -> Result<Block> {
            Ok(Block {
                norm_1: norm(b.norm_1, f)?,
                qkv: b.qkv.into_iter().map(|l| linear(l, f)).collect::<Result<_>>()?,
                attn_out: linear(b.attn_out, f)?,
                norm_2: b.norm_2.map(|n| norm(n, f)).transpose()?,
                up: b.up.into_iter().map(|l| linear(l, f)).collect::<Result<_>>()?,
                down: linear(b.down, f)?,
            })
        }
        let f = &mut f;
        Ok(Self {
            config: self.config,
            architecture: self.architecture,
            precision: self.precision,
            embedding: f(self.embedding)?,
            positions: optional(self.positions, f)?,
            blocks: self.blocks.into_iter().map(|b| block(b, f)).collect::<Result<_>>()?,
            norm: norm(self.norm, f)?,
            lm_head: match self.lm_head {
                Some(lm_head) => Some(LmHead { weight: f(lm_head.weight)?, bias: optional(lm_head.bias, f)? }),
                None => None,
            },
        })
    }

    /// A frozen view that shares storage, without adapters.
    pub fn frozen_base(&self) -> Self {
        self.clone().map_tensors(|t| Ok(t.detach())).expect("detaching a tensor does not fail")
    }

    /// The same model with a trainable copy of every tensor. A tensor that nothing else holds is freed right after its
    /// copy.
    pub fn trainable(self) -> Result<Self> {
        self.map_tensors(|t| variable::trainable_copy(&t))
    }

    /// Replaces each linear layer's adapter by the result of `f`.
    pub fn map_adapters(mut self, mut f: impl FnMut(&Linear) -> Result<Option<LoraAdapter>>) -> Result<Self> {
        for linear in self.blocks.iter_mut().flat_map(Block::linears_mut) {
            linear.adapter = f(linear)?;
        }
        Ok(self)
    }

    /// A frozen view that shares storage, adapters included.
    pub fn frozen(&self) -> Self {
        let mut frozen = self.frozen_base();
        for (frozen, from) in frozen.blocks.iter_mut().flat_map(Block::linears_mut).zip(self.linears()) {
            frozen.adapter = from.adapter.as_ref().map(LoraAdapter::frozen);
        }
        frozen
    }

    /// A frozen model with the adapters added into the weights.
    pub fn merged(&self) -> Result<Self> {
        let mut merged = self.frozen_base();
        for (merged, from) in merged.blocks.iter_mut().flat_map(Block::linears_mut).zip(self.linears()) {
            merged.weight = from.merged_weight()?;
        }
        Ok(merged)
    }

    /// The linear layers of all blocks, in file order.
    pub fn linears(&self) -> impl Iterator<Item = &Linear> {
        self.blocks.iter().flat_map(Block::linears)
    }

    /// A fresh adapter on every linear layer: A uniform in ±1/sqrt(in) (PEFT's Kaiming-uniform with a = sqrt 5), B
    /// zero.
    pub fn with_new_adapters(&self, lora: &LoraConfig, rng: &mut ChaCha12Rng) -> Result<Self> {
        lora.check().map_err(Error::input)?;
        self.frozen_base().map_adapters(|linear| {
            let (rows, out) = linear.weight.dims2()?;
            let a = random::uniform(&[lora.r, rows], 1.0 / (rows as f64).sqrt(), rng)?;
            let b = Tensor::zeros((out, lora.r), DType::F32, &device())?;
            let (a, b) = (variable::trainable_copy(&a)?, variable::trainable_copy(&b)?);
            Ok(Some(LoraAdapter { a, b, scale: lora.scale(), dropout: lora.dropout }))
        })
    }

    /// The output layer.
    pub fn lm_head_ref(&self) -> LmHeadRef<'_> {
        let precision = self.precision;
        match &self.lm_head {
            Some(lm_head) => LmHeadRef { weight: &lm_head.weight, bias: lm_head.bias.as_ref(), precision },
            None => LmHeadRef { weight: &self.embedding, bias: None, precision },
        }
    }

    /// The rotation angles of the first `time` positions, if positions are rotary.
    pub fn rotary(&self, time: usize) -> Option<Rotary> {
        match &self.architecture.positions {
            PositionEmbedding::Rotary { pairing, frequencies } => Some(Rotary::new(*pairing, frequencies, time)),
            PositionEmbedding::Learned => None,
        }
    }

    /// The hidden states after the last norm: `[batch, time, d]`, or `[n, d]` for the rows of `[batch * time]` in
    /// `output_rows`, which ascend.
    pub fn hidden(
        &self,
        batch: &Batch,
        output_rows: Option<&[u32]>,
        mut dropout: Option<&mut Dropout>,
    ) -> Result<Tensor> {
        let architecture = &self.architecture;
        let time = batch.time();
        if time > architecture.window {
            return Err(Error::input(format!(
                "a sequence has {time} tokens, but the model has {} positions",
                architecture.window
            )));
        }
        if batch.max_id() as usize >= architecture.vocab {
            let (id, vocab) = (batch.max_id(), architecture.vocab);
            return Err(Error::input(format!("token id {id} is not below the model's vocabulary of {vocab}")));
        }
        let mut x = kernels::embedding(batch.ids(), &self.embedding)?;
        if let Some(positions) = &self.positions {
            x = x.broadcast_add(&positions.narrow(0, 0, time)?)?;
        }
        if let Some(mask) = residual_dropout_mask(x.elem_count(), &mut dropout) {
            x = (&x * mask.tensor(x.dims(), x.device())?)?;
        }
        let rotary = self.rotary(time).map(Arc::new);
        for (i, block) in self.blocks.iter().enumerate() {
            // Only the last block may skip rows: every earlier one feeds the attention of the next.
            let output_rows = output_rows.filter(|_| i + 1 == self.blocks.len());
            x = block.forward(&x, architecture, self.precision, rotary.as_ref(), &mut dropout, output_rows)?;
        }
        Ok(kernels::norm(&x, &self.norm.kernel(), architecture.eps)?)
    }
}

/// Collects the tensors of a model.
struct TensorList<'a> {
    all: Vec<NamedTensor<'a>>,
    /// Whether the file holds linear weights transposed.
    transposed: bool,
}

impl<'a> TensorList<'a> {
    fn weight(&mut self, module: &str, tensor: &'a Tensor) {
        self.all.push(NamedTensor { name: format!("{module}.weight"), tensor, transposed: false });
    }

    fn bias(&mut self, module: &str, tensor: Option<&'a Tensor>) {
        self.all.extend(tensor.map(|tensor| NamedTensor { name: format!("{module}.bias"), tensor, transposed: false }));
    }

    fn norm(&mut self, module: &str, norm: &'a Norm) {
        self.weight(module, &norm.weight);
        self.bias(module, norm.bias.as_ref());
    }

    fn linear(&mut self, linear: &'a Linear) {
        let name = format!("{}.weight", linear.name);
        self.all.push(NamedTensor { name, tensor: &linear.weight, transposed: self.transposed });
        self.bias(&linear.name, linear.bias.as_ref());
    }
}

/// The dropout mask of the embeddings or of a residual branch, if model dropout is on.
fn residual_dropout_mask(elements: usize, dropout: &mut Option<&mut Dropout>) -> Option<kernels::DropoutMask> {
    let dropout = dropout.as_mut().filter(|dropout| dropout.model > 0.0)?;
    Some(random::dropout_mask(elements, dropout.model, &mut dropout.rng))
}
