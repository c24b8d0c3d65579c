//! A causal transformer of any family: its weights and the forward pass.

use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use rand_chacha::ChaCha12Rng;

use crate::adapter::LoraConfig;
use crate::config::ModelConfig;
use crate::kernels::{self, Output, Rotary};
use crate::linear::{Dropout, Linear, LowRank};
use crate::spec::{OUTPUT, OutputLayer, Positions, Spec};
use crate::{Batch, Error, InitStd, Precision, Result, random, variable};

/// Weight and bias of a normalisation, `[d]` each; without a bias it is an RMS norm.
#[derive(Debug, Clone)]
pub(crate) struct Norm {
    pub weight: Tensor,
    pub bias: Option<Tensor>,
}

impl Norm {
    fn kernel(&self) -> kernels::NormRef<'_> {
        kernels::NormRef { weight: &self.weight, bias: self.bias.as_ref() }
    }
}

/// One transformer block.
#[derive(Debug, Clone)]
pub(crate) struct Block {
    pub norm_1: Norm,
    /// Queries, keys and values, in one map or in three.
    pub qkv: Vec<Linear>,
    pub attn_out: Linear,
    /// None: attention and MLP share the first norm.
    pub norm_2: Option<Norm>,
    /// The MLP's first linear map, or its gate and up maps.
    pub up: Vec<Linear>,
    pub down: Linear,
}

impl Block {
    /// The linear maps, in file order.
    pub fn linears(&self) -> impl Iterator<Item = &Linear> {
        self.qkv.iter().chain([&self.attn_out]).chain(&self.up).chain([&self.down])
    }

    fn linears_mut(&mut self) -> impl Iterator<Item = &mut Linear> {
        self.qkv.iter_mut().chain([&mut self.attn_out]).chain(&mut self.up).chain([&mut self.down])
    }

    /// Maps `[batch, time, d]` to the same shape, or to `[n, d]` for the `n` rows in `output_rows`. Gradients of frozen
    /// weights are never computed.
    fn forward(
        &self,
        x: &Tensor,
        spec: &Spec,
        precision: Precision,
        rotary: Option<&Arc<Rotary>>,
        drop: &mut Option<&mut Dropout>,
        output_rows: Option<&[u32]>,
    ) -> Result<Tensor> {
        let (batch, time, d) = x.dims3()?;
        let rows = batch * time;
        let kept = output_rows.map_or(rows, <[u32]>::len);
        let mask = |l: &Linear, n, drop: &mut Option<&mut Dropout>| l.mask(n, drop.as_deref_mut());
        let qkv = self.qkv.iter().map(|l| mask(l, rows, drop)).collect::<Result<Vec<_>>>()?;
        let attn_out = mask(&self.attn_out, kept, drop)?;
        let attn_branch = branch_mask(kept * d, drop);
        let up = self.up.iter().map(|l| mask(l, kept, drop)).collect::<Result<Vec<_>>>()?;
        let down = mask(&self.down, kept, drop)?;
        let mlp_branch = branch_mask(kept * d, drop);
        let block = kernels::BlockArgs {
            norm_1: self.norm_1.kernel(),
            qkv: self.qkv.iter().zip(&qkv).map(|(l, m)| l.projection(m.as_ref())).collect(),
            attn_out: self.attn_out.projection(attn_out.as_ref()),
            norm_2: self.norm_2.as_ref().map(Norm::kernel),
            up: self.up.iter().zip(&up).map(|(l, m)| l.projection(m.as_ref())).collect(),
            down: self.down.projection(down.as_ref()),
            activation: spec.activation,
            precision,
            attn_dropout: attn_branch.as_ref(),
            mlp_dropout: mlp_branch.as_ref(),
            rotary: rotary.cloned(),
            eps: spec.eps,
            heads: spec.heads,
            time,
            output_rows,
        };
        Ok(kernels::transformer_block(x, &block)?)
    }
}

/// An output layer that is not the embedding.
#[derive(Debug, Clone)]
pub(crate) struct Head {
    /// `[vocab, d]`.
    pub weight: Tensor,
    /// `[vocab]`.
    pub bias: Option<Tensor>,
}

/// A tensor of a model with its name and orientation in the file.
pub(crate) struct Named<'a> {
    /// The name in the file of a whole model: `transformer.h.0.attn.c_attn.weight`.
    pub name: String,
    pub tensor: &'a Tensor,
    /// Whether the file holds the transpose.
    pub transposed: bool,
}

#[derive(Debug, Clone)]
pub(crate) struct Transformer {
    pub config: ModelConfig,
    pub spec: Arc<Spec>,
    /// Precision of matrix products with weights.
    pub precision: Precision,
    /// `[vocab, d]`.
    pub embedding: Tensor,
    /// `[window, d]`, if positions are learned.
    pub positions: Option<Tensor>,
    pub blocks: Vec<Block>,
    pub norm: Norm,
    /// None: the embedding is reused.
    pub head: Option<Head>,
}

/// Returns a tensor given its name and shape, both as in the file.
type Get<'g> = dyn FnMut(&str, &[usize]) -> Result<Tensor> + 'g;

/// Builds the parts of a model from the tensors that `get` returns.
struct Builder<'a, 'g> {
    spec: &'a Spec,
    get: &'a mut Get<'g>,
}

impl Builder<'_, '_> {
    fn norm(&mut self, module: &str) -> Result<Norm> {
        let shape = [self.spec.d];
        let weight = (self.get)(&format!("{module}.weight"), &shape)?;
        let bias = match self.spec.names.norm_bias {
            true => Some((self.get)(&format!("{module}.bias"), &shape)?),
            false => None,
        };
        Ok(Norm { weight, bias })
    }

    fn linear(&mut self, module: String, d_in: usize, d_out: usize, bias: bool) -> Result<Linear> {
        let name = format!("{module}.weight");
        let weight = match self.spec.names.transposed {
            true => (self.get)(&name, &[d_out, d_in])?.t()?.contiguous()?,
            false => (self.get)(&name, &[d_in, d_out])?,
        };
        let bias = match bias {
            true => Some((self.get)(&format!("{module}.bias"), &[d_out])?),
            false => None,
        };
        Ok(Linear { name: module, weight, bias, adapter: None })
    }

    /// Linear maps of the same input: one for each name and width, or one map of all widths together if there is one
    /// name.
    fn linear_group(&mut self, block: &str, names: &[&str], d_in: usize, widths: &[usize], bias: bool) -> Result<Vec<Linear>> {
        let joint = [widths.iter().sum::<usize>()];
        let widths = if names.len() == 1 { &joint } else { widths };
        names
            .iter()
            .zip(widths)
            .map(|(name, &width)| self.linear(format!("{block}{name}"), d_in, width, bias))
            .collect()
    }

    fn block(&mut self, i: usize) -> Result<Block> {
        let spec = self.spec;
        let names = spec.names;
        let at = format!("{}{}.{i}.", names.prefix, names.layers);
        let (d, inner) = (spec.d, spec.inner);
        let attended = spec.qkv_widths()[0];
        let ups = vec![inner; spec.activation.input_width(inner) / inner];
        Ok(Block {
            norm_1: self.norm(&format!("{at}{}", names.norm_1))?,
            qkv: self.linear_group(&at, names.qkv, d, &spec.qkv_widths(), spec.attn_bias)?,
            attn_out: self.linear(format!("{at}{}", names.attn_out), attended, d, spec.attn_bias)?,
            norm_2: names.norm_2.map(|name| self.norm(&format!("{at}{name}"))).transpose()?,
            up: self.linear_group(&at, names.up, d, &ups, spec.mlp_bias)?,
            down: self.linear(format!("{at}{}", names.down), inner, d, spec.mlp_bias)?,
        })
    }
}

impl Transformer {
    /// Builds a model without adapters. Calls `get` with each tensor's name and shape in the file, in file order.
    pub fn build(config: &ModelConfig, mut get: impl FnMut(&str, &[usize]) -> Result<Tensor>) -> Result<Self> {
        let spec = Arc::new(config.spec().map_err(Error::input)?);
        let names = spec.names;
        let mut build = Builder { spec: &spec, get: &mut get };
        let name = |module: &str| format!("{}{module}.weight", names.prefix);
        let embedding = (build.get)(&name(names.embedding), &[spec.vocab, spec.d])?;
        let positions = match spec.positions {
            Positions::Learned => Some((build.get)(&name(names.positions), &[spec.window, spec.d])?),
            Positions::Rotary { .. } => None,
        };
        // Not sized in advance: the number of layers is untrusted, and a false one fails at the first missing tensor.
        let mut blocks = Vec::new();
        for i in 0..spec.layers {
            blocks.push(build.block(i)?);
        }
        let norm = build.norm(&format!("{}{}", names.prefix, names.norm))?;
        let head = match spec.output {
            OutputLayer::Tied => None,
            OutputLayer::Own { bias } => Some(Head {
                weight: (build.get)(&format!("{OUTPUT}.weight"), &[spec.vocab, spec.d])?,
                bias: if bias { Some((build.get)(&format!("{OUTPUT}.bias"), &[spec.vocab])?) } else { None },
            }),
        };
        Ok(Self { config: config.clone(), spec, precision: Precision::F32, embedding, positions, blocks, norm, head })
    }

    /// Draws fresh weights as GPT-2 does: matrices normal, projections into the residual stream smaller by sqrt(2
    /// n_layer), norm weights 1, biases 0.
    pub fn init(config: &ModelConfig, init: InitStd, rng: &mut ChaCha12Rng) -> Result<Self> {
        let spec = config.spec().map_err(Error::input)?;
        let (std, position_std) = match init {
            InitStd::Fixed(std) => (std, std),
            InitStd::InverseSqrtWidth => (1.0 / (spec.d as f64).sqrt(), 0.02),
        };
        let residual = 1.0 / (2.0 * spec.layers as f64).sqrt();
        let names = spec.names;
        Self::build(config, |name, shape| {
            let module = name.strip_suffix(".weight");
            let ends = |with: &str| module.is_some_and(|m| m.ends_with(with));
            let tensor = match shape {
                _ if module.is_none() => Tensor::zeros(shape, DType::F32, &Device::Cpu)?,
                [_] => Tensor::ones(shape, DType::F32, &Device::Cpu)?,
                _ if !names.positions.is_empty() && ends(names.positions) => random::normal(shape, position_std, rng)?,
                _ if ends(names.attn_out) || ends(names.down) => random::normal(shape, std * residual, rng)?,
                _ => random::normal(shape, std, rng)?,
            };
            Ok(tensor)
        })
    }

    /// All tensors except the adapters', in file order.
    pub fn tensors(&self) -> Vec<Named<'_>> {
        let names = self.spec.names;
        let mut list = Listing { all: vec![], transposed: names.transposed };
        let top = |module: &str| format!("{}{module}", names.prefix);
        list.weight(&top(names.embedding), &self.embedding);
        if let Some(positions) = &self.positions {
            list.weight(&top(names.positions), positions);
        }
        for (i, block) in self.blocks.iter().enumerate() {
            let at = top(&format!("{}.{i}.", names.layers));
            list.norm(&format!("{at}{}", names.norm_1), &block.norm_1);
            block.qkv.iter().chain([&block.attn_out]).for_each(|l| list.linear(l));
            if let (Some(name), Some(norm)) = (names.norm_2, &block.norm_2) {
                list.norm(&format!("{at}{name}"), norm);
            }
            block.up.iter().chain([&block.down]).for_each(|l| list.linear(l));
        }
        list.norm(&top(names.norm), &self.norm);
        if let Some(head) = &self.head {
            list.weight(OUTPUT, &head.weight);
            list.bias(OUTPUT, head.bias.as_ref());
        }
        list.all
    }

    /// Replaces every tensor, one after the other, by `f` of it; drops adapters.
    pub fn map(self, mut f: impl FnMut(Tensor) -> Result<Tensor>) -> Result<Self> {
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
            spec: self.spec,
            precision: self.precision,
            embedding: f(self.embedding)?,
            positions: optional(self.positions, f)?,
            blocks: self.blocks.into_iter().map(|b| block(b, f)).collect::<Result<_>>()?,
            norm: norm(self.norm, f)?,
            head: match self.head {
                Some(head) => Some(Head { weight: f(head.weight)?, bias: optional(head.bias, f)? }),
                None => None,
            },
        })
    }

    /// A frozen view that shares storage, without adapters.
    pub fn detached(&self) -> Self {
        self.clone().map(|t| Ok(t.detach())).expect("detaching copies nothing: there is nothing that fails")
    }

    /// The same model with a trainable copy of every tensor. A tensor that nothing else holds is freed right after its
    /// copy.
    pub fn trainable(self) -> Result<Self> {
        self.map(|t| variable::fresh(&t))
    }

    /// Replaces each linear layer's adapter by the result of `f`.
    pub fn map_adapters(mut self, mut f: impl FnMut(&Linear) -> Result<Option<LowRank>>) -> Result<Self> {
        for linear in self.blocks.iter_mut().flat_map(Block::linears_mut) {
            linear.adapter = f(linear)?;
        }
        Ok(self)
    }

    /// A frozen view that shares storage, adapters included.
    pub fn frozen(&self) -> Self {
        let mut frozen = self.detached();
        for (frozen, from) in frozen.blocks.iter_mut().flat_map(Block::linears_mut).zip(self.linears()) {
            frozen.adapter = from.adapter.as_ref().map(LowRank::detached);
        }
        frozen
    }

    /// A frozen model with the adapters added into the weights.
    pub fn merged(&self) -> Result<Self> {
        let mut merged = self.detached();
        for (merged, from) in merged.blocks.iter_mut().flat_map(Block::linears_mut).zip(self.linears()) {
            merged.weight = from.merged_weight()?;
        }
        Ok(merged)
    }

    /// The linear maps of all blocks, in file order.
    pub fn linears(&self) -> impl Iterator<Item = &Linear> {
        self.blocks.iter().flat_map(Block::linears)
    }

    /// A fresh adapter on every linear layer: A uniform in ±1/sqrt(in) (PEFT's Kaiming-uniform with a = sqrt 5), B zero.
    pub fn with_fresh_adapters(&self, lora: &LoraConfig, rng: &mut ChaCha12Rng) -> Result<Self> {
        lora.check().map_err(Error::input)?;
        self.detached().map_adapters(|linear| {
            let (rows, out) = linear.weight.dims2()?;
            let a = random::uniform(&[lora.r, rows], 1.0 / (rows as f64).sqrt(), rng)?;
            let b = Tensor::zeros((out, lora.r), DType::F32, &Device::Cpu)?;
            let (a, b) = (variable::fresh(&a)?, variable::fresh(&b)?);
            Ok(Some(LowRank { a, b, scale: lora.scale(), dropout: lora.dropout }))
        })
    }

    /// The output layer.
    pub fn output(&self) -> Output<'_> {
        let precision = self.precision;
        match &self.head {
            Some(head) => Output { weight: &head.weight, bias: head.bias.as_ref(), precision },
            None => Output { weight: &self.embedding, bias: None, precision },
        }
    }

    /// The rotation angles of the first `time` positions, if positions are rotary.
    pub fn rotary(&self, time: usize) -> Option<Rotary> {
        match &self.spec.positions {
            Positions::Rotary { pairing, frequencies } => Some(Rotary::new(*pairing, frequencies, time)),
            Positions::Learned => None,
        }
    }

    /// The hidden states after the last norm: `[batch, time, d]`, or `[n, d]` for the rows of `[batch * time]` in
    /// `output_rows`, which ascend.
    pub fn hidden(&self, batch: &Batch, output_rows: Option<&[u32]>, mut drop: Option<&mut Dropout>) -> Result<Tensor> {
        let spec = &self.spec;
        let time = batch.time();
        if time > spec.window {
            return Err(Error::input(format!("a sequence of {time} tokens; the model has {} positions", spec.window)));
        }
        if batch.max_id() as usize >= spec.vocab {
            let (id, vocab) = (batch.max_id(), spec.vocab);
            return Err(Error::input(format!("token id {id} is not below the model's vocabulary of {vocab}")));
        }
        let mut x = kernels::embedding(batch.ids(), &self.embedding)?;
        if let Some(positions) = &self.positions {
            x = x.broadcast_add(&positions.narrow(0, 0, time)?)?;
        }
        if let Some(mask) = branch_mask(x.elem_count(), &mut drop) {
            x = (&x * mask.tensor(x.dims())?)?;
        }
        let rotary = self.rotary(time).map(Arc::new);
        for (i, block) in self.blocks.iter().enumerate() {
            // Only the last block may skip rows: every earlier one feeds the attention of the next.
            let output_rows = output_rows.filter(|_| i + 1 == self.blocks.len());
            x = block.forward(&x, spec, self.precision, rotary.as_ref(), &mut drop, output_rows)?;
        }
        Ok(kernels::norm(&x, &self.norm.kernel(), spec.eps)?)
    }
}

/// Collects the tensors of a model.
struct Listing<'a> {
    all: Vec<Named<'a>>,
    /// Whether the file holds linear weights transposed.
    transposed: bool,
}

impl<'a> Listing<'a> {
    fn weight(&mut self, module: &str, tensor: &'a Tensor) {
        self.all.push(Named { name: format!("{module}.weight"), tensor, transposed: false });
    }

    fn bias(&mut self, module: &str, tensor: Option<&'a Tensor>) {
        self.all.extend(tensor.map(|tensor| Named { name: format!("{module}.bias"), tensor, transposed: false }));
    }

    fn norm(&mut self, module: &str, norm: &'a Norm) {
        self.weight(module, &norm.weight);
        self.bias(module, norm.bias.as_ref());
    }

    fn linear(&mut self, linear: &'a Linear) {
        let name = format!("{}.weight", linear.name);
        self.all.push(Named { name, tensor: &linear.weight, transposed: self.transposed });
        self.bias(&linear.name, linear.bias.as_ref());
    }
}

/// The dropout mask of the embeddings or of a residual branch, if model dropout is on.
fn branch_mask(elements: usize, drop: &mut Option<&mut Dropout>) -> Option<kernels::DropoutMask> {
    let drop = drop.as_mut().filter(|drop| drop.model > 0.0)?;
    Some(random::dropout_mask(elements, drop.model, &mut drop.rng))
}
