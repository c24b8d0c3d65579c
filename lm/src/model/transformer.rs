//! A causal transformer of any family: its weights and the forward pass.

use std::sync::Arc;

use candle_core::{DType, Tensor};
use rand_chacha::ChaCha12Rng;

use crate::exec::train::{self, BlockPass, DropoutMask, LmHead, RotaryTable};
use crate::model::adapter::{LoraAdapter, LoraConfig};
use crate::model::architecture::{Architecture, LM_HEAD, LmHeadKind};
use crate::model::block::{Block, LinearShape, Norm, NormShape};
use crate::model::families::ModelConfig;
use crate::model::linear::{Dropout, Linear};
use crate::tensor::device::{check_device, device};
use crate::tensor::random;
use crate::{Batch, Error, InitStd, Precision, Result, variable};

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
    /// Shared with operations that run backward later.
    pub blocks: Vec<Arc<Block>>,
    pub norm: Norm,
    /// Weight `[vocab, d]` and bias `[vocab]` of an output layer that is not the embedding.
    pub lm_head: Option<(Tensor, Option<Tensor>)>,
}

/// Builds the parts of a model from the tensors that `get` returns.
struct TransformerBuilder<'a> {
    /// Returns a tensor given its name and shape, both as in the file.
    get: &'a mut dyn FnMut(&str, &[usize]) -> Result<Tensor>,
    /// Prefix of modules' names.
    prefix: String,
    transposed: bool,
}

impl TransformerBuilder<'_> {
    fn bias(&mut self, module: &str, d: usize, exists: bool) -> Result<Option<Tensor>> {
        if exists { (self.get)(&format!("{module}.bias"), &[d]).map(Some) } else { Ok(None) }
    }

    fn norm(&mut self, shape: &NormShape) -> Result<Norm> {
        let name = format!("{}{}", self.prefix, shape.module);
        let weight = (self.get)(&format!("{name}.weight"), &[shape.d])?;
        Ok(Norm { bias: self.bias(&name, shape.d, shape.bias)?, weight, name, eps: shape.eps })
    }

    fn linear(&mut self, shape: &LinearShape) -> Result<Linear> {
        let &LinearShape { module, d_in, d_out, bias } = shape;
        let name = format!("{}{module}", self.prefix);
        let file_name = format!("{name}.weight");
        let weight = match self.transposed {
            true => (self.get)(&file_name, &[d_out, d_in])?.t()?.contiguous()?,
            false => (self.get)(&file_name, &[d_in, d_out])?,
        };
        Ok(Linear { bias: self.bias(&name, d_out, bias)?, weight, name, adapter: None })
    }
}

impl Transformer {
    /// Builds a model without adapters. Calls `get` with each tensor's name and shape in the file, in file order.
    pub fn build(config: &ModelConfig, mut get: impl FnMut(&str, &[usize]) -> Result<Tensor>) -> Result<Self> {
        check_device()?;
        let architecture = Arc::new(config.architecture().map_err(Error::input)?);
        let &Architecture { prefix, vocab, window, d, transposed, .. } = &*architecture;
        let mut builder = TransformerBuilder { get: &mut get, prefix: prefix.to_owned(), transposed };
        let embedding = (builder.get)(&format!("{prefix}{}.weight", architecture.embedding), &[vocab, d])?;
        let positions =
            architecture.positions.map(|name| (builder.get)(&format!("{prefix}{name}.weight"), &[window, d]));
        let positions = positions.transpose()?;
        // Not sized in advance: the number of layers is untrusted, and a false one fails at the first missing tensor.
        let mut blocks = Vec::new();
        for i in 0..architecture.layers {
            builder.prefix = format!("{prefix}{}.{i}.", architecture.blocks);
            let block = architecture.block.parts();
            blocks.push(Arc::new(block.try_map(&mut builder, TransformerBuilder::linear, TransformerBuilder::norm)?));
        }
        builder.prefix = prefix.to_owned();
        let norm = builder.norm(&architecture.norm)?;
        let lm_head = match architecture.lm_head {
            LmHeadKind::Tied => None,
            LmHeadKind::Untied { bias } => {
                let weight = (builder.get)(&format!("{LM_HEAD}.weight"), &[vocab, d])?;
                Some((weight, builder.bias(LM_HEAD, vocab, bias)?))
            }
        };
        let (config, precision) = (config.clone(), Precision::F32);
        Ok(Self { config, architecture, precision, embedding, positions, blocks, norm, lm_head })
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
        let residual = [architecture.block.attention.out.module, architecture.block.mlp.down.module];
        Self::build(config, |name, shape| {
            let module = name.strip_suffix(".weight");
            let module_ends_with = |with: &str| module.is_some_and(|m| m.ends_with(with));
            let tensor = match shape {
                _ if module.is_none() => Tensor::zeros(shape, DType::F32, &device())?,
                [_] => Tensor::ones(shape, DType::F32, &device())?,
                _ if architecture.positions.is_some_and(module_ends_with) => random::normal(shape, position_std, rng)?,
                _ if residual.into_iter().any(module_ends_with) => random::normal(shape, std * residual_scale, rng)?,
                _ => random::normal(shape, std, rng)?,
            };
            Ok(tensor)
        })
    }

    /// All tensors except the adapters', in file order.
    pub fn tensors(&self) -> Vec<NamedTensor<'_>> {
        let architecture = &self.architecture;
        let mut list = TensorList { all: vec![], transposed: architecture.transposed };
        list.add(&format!("{}{}", architecture.prefix, architecture.embedding), &self.embedding, None, false);
        if let (Some(module), Some(positions)) = (architecture.positions, &self.positions) {
            list.add(&format!("{}{module}", architecture.prefix), positions, None, false);
        }
        for block in &self.blocks {
            block.parts().map(&mut list, TensorList::linear, TensorList::norm);
        }
        list.norm(&self.norm);
        if let Some((weight, bias)) = &self.lm_head {
            list.add(LM_HEAD, weight, bias.as_ref(), false);
        }
        list.all
    }

    /// Replaces every linear layer by `linear` of it and every other tensor by `tensor` of it, one after the other;
    /// both also get `context`.
    pub fn try_map<C>(
        self,
        context: &mut C,
        linear: impl Fn(&mut C, Linear) -> Result<Linear>,
        tensor: impl Fn(&mut C, Tensor) -> Result<Tensor>,
    ) -> Result<Self> {
        let norm = |context: &mut C, norm: Norm| norm.try_map(|t| tensor(context, t));
        Ok(Self {
            embedding: tensor(context, self.embedding)?,
            positions: self.positions.map(|t| tensor(context, t)).transpose()?,
            blocks: self
                .blocks
                .into_iter()
                .map(|block| Ok(Arc::new(Arc::unwrap_or_clone(block).try_map(context, &linear, norm)?)))
                .collect::<Result<_>>()?,
            norm: norm(context, self.norm)?,
            lm_head: match self.lm_head {
                Some((weight, bias)) => Some((tensor(context, weight)?, bias.map(|t| tensor(context, t)).transpose()?)),
                None => None,
            },
            ..self
        })
    }

    /// A frozen view that shares storage, with each linear layer replaced by `linear` of it.
    pub fn frozen_with<C>(&self, context: &mut C, linear: impl Fn(&mut C, Linear) -> Result<Linear>) -> Result<Self> {
        self.clone().try_map(context, linear, |_, tensor| Ok(tensor.detach()))
    }

    /// A frozen view that shares storage, without adapters.
    pub fn frozen_base(&self) -> Self {
        let base = self.frozen_with(&mut (), |(), linear| Ok(Linear { adapter: None, ..linear.frozen() }));
        base.expect("detaching a tensor does not fail")
    }

    /// A frozen view that shares storage, adapters included.
    pub fn frozen(&self) -> Self {
        self.frozen_with(&mut (), |(), linear| Ok(linear.frozen())).expect("detaching a tensor does not fail")
    }

    /// The same model with a trainable copy of every tensor. A tensor that nothing else holds is freed right after its
    /// copy.
    pub fn trainable(self) -> Result<Self> {
        let copy = |(): &mut (), tensor: Tensor| variable::trainable_copy(&tensor);
        self.try_map(&mut (), |(), linear| linear.try_map(|tensor| copy(&mut (), tensor)), copy)
    }

    /// A frozen model with the adapters added into the weights.
    pub fn merged(&self) -> Result<Self> {
        self.frozen_with(&mut (), |(), linear| linear.merged())
    }

    /// The linear layers of all blocks, in file order.
    pub fn linears(&self) -> impl Iterator<Item = &Linear> {
        self.blocks.iter().flat_map(|block| block.linears())
    }

    /// A fresh adapter on every linear layer: A uniform in ±1/sqrt(in) (PEFT's Kaiming-uniform with a = sqrt 5), B
    /// zero.
    pub fn with_new_adapters(&self, lora: &LoraConfig, rng: &mut ChaCha12Rng) -> Result<Self> {
        lora.check().map_err(Error::input)?;
        self.frozen_with(rng, |rng, linear| {
            let (rows, out) = linear.weight.dims2()?;
            let a = random::uniform(&[lora.r, rows], 1.0 / (rows as f64).sqrt(), rng)?;
            let b = Tensor::zeros((out, lora.r), DType::F32, &device())?;
            let adapter = LoraAdapter { a, b, scale: lora.scale(), dropout: lora.dropout }.trainable()?;
            Ok(Linear { adapter: Some(adapter), ..linear.frozen() })
        })
    }

    /// The output layer.
    pub fn lm_head(&self) -> LmHead {
        let (weight, bias) = self.lm_head.clone().unwrap_or_else(|| (self.embedding.clone(), None));
        LmHead { weight, bias, precision: self.precision }
    }

    /// The rotation angles of the first `time` positions, if positions are rotary.
    pub fn rotary(&self, time: usize) -> Option<RotaryTable> {
        self.architecture.block.attention.rotary.as_ref().map(|rotary| RotaryTable::new(rotary, time))
    }

    /// The hidden states after the last norm: `[batch, time, d]`, or `[n, d]` for the rows of `[batch * time]` in
    /// `output_rows`, which ascend.
    pub fn hidden(
        &self,
        batch: &Batch,
        output_rows: Option<&[u32]>,
        mut dropout: Option<&mut Dropout>,
    ) -> Result<Tensor> {
        let &Architecture { window, vocab, d, .. } = &*self.architecture;
        let time = batch.time();
        if time > window {
            return Err(Error::input(format!("a sequence has {time} tokens, but the model has {window} positions")));
        }
        if batch.max_id() as usize >= vocab {
            let id = batch.max_id();
            return Err(Error::input(format!("token id {id} is not below the model's vocabulary of {vocab}")));
        }
        let mut x = train::embedding(batch.ids(), &self.embedding)?;
        if let Some(positions) = &self.positions {
            x = x.broadcast_add(&positions.narrow(0, 0, time)?)?;
        }
        if let Some(mask) = residual_dropout_mask(x.elem_count(), &mut dropout) {
            x = (&x * mask.tensor(x.dims(), x.device())?)?;
        }
        let rotary = self.rotary(time).map(Arc::new);
        for (i, block) in self.blocks.iter().enumerate() {
            // Only the last block may skip rows: every earlier one feeds the attention of the next.
            let output_rows = output_rows.filter(|_| i + 1 == self.blocks.len()).map(<[u32]>::to_vec);
            let mut pass = BlockPass { rotary: rotary.clone(), output_rows, ..BlockPass::new(time, self.precision) };
            if dropout.is_some() {
                draw_masks(&mut pass, block, batch.len() * time, d, &mut dropout)?;
            }
            x = train::transformer_block(&x, block, pass)?;
        }
        Ok(train::norm(&x, &self.norm)?)
    }
}

/// Draws the dropout masks of a pass over `rows` rows of width `d`, in the order of the forward pass.
fn draw_masks(
    pass: &mut BlockPass,
    block: &Block,
    rows: usize,
    d: usize,
    dropout: &mut Option<&mut Dropout>,
) -> Result<()> {
    let outputs = pass.output_rows.as_ref().map_or(rows, Vec::len);
    let [qkv, out, up, down] = block.groups();
    for (branch, layers) in [qkv.iter().chain(out), up.iter().chain(down)].into_iter().enumerate() {
        for (i, linear) in layers.enumerate() {
            let rows = if branch == 0 && i < qkv.len() { rows } else { outputs };
            pass.adapter_dropout.push(linear.draw_mask(rows, dropout)?);
        }
        pass.residual_dropout[branch] = residual_dropout_mask(outputs * d, dropout);
    }
    Ok(())
}

/// Collects the tensors of a model.
struct TensorList<'a> {
    all: Vec<NamedTensor<'a>>,
    /// Whether the file holds the weights of linear layers transposed.
    transposed: bool,
}

impl<'a> TensorList<'a> {
    fn add(&mut self, module: &str, weight: &'a Tensor, bias: Option<&'a Tensor>, transposed: bool) {
        self.all.push(NamedTensor { name: format!("{module}.weight"), tensor: weight, transposed });
        self.all.extend(bias.map(|tensor| NamedTensor { name: format!("{module}.bias"), tensor, transposed: false }));
    }

    fn norm(&mut self, norm: &'a Norm) {
        self.add(&norm.name, &norm.weight, norm.bias.as_ref(), false);
    }

    fn linear(&mut self, linear: &'a Linear) {
        self.add(&linear.name, &linear.weight, linear.bias.as_ref(), self.transposed);
    }
}

/// The dropout mask of the embeddings or of a residual branch, if model dropout is on.
fn residual_dropout_mask(elements: usize, dropout: &mut Option<&mut Dropout>) -> Option<DropoutMask> {
    let dropout = dropout.as_mut().filter(|dropout| dropout.model > 0.0)?;
    Some(random::dropout_mask(elements, dropout.model, &mut dropout.rng))
}
