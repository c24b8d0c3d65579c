//! The one description of a transformer block. A family states it as shapes with tensor names, a model holds it as
//! tensors, and each executor reads it in the form that it computes with: [`Block::try_map`] leads from one to the
//! next.

use std::convert::Infallible;
use std::sync::Arc;

use candle_core::Tensor;

use crate::model::linear::Linear;
use crate::{Result, variable};

/// A pre-norm transformer block of width `d`: `x1 = x + out(attention(qkv(norm_1(x))))`, `y = x1 +
/// down(activation(up(norm_2(x1))))`. `L` is the form of its linear layers, `N` that of its norms.
#[derive(Debug, Clone)]
pub struct Block<L = Linear, N = Norm> {
    pub norm_1: N,
    pub attention: Attention<L, N>,
    /// None: attention and MLP both read the output of `norm_1`, and both add to the residual stream at once.
    pub norm_2: Option<N>,
    pub mlp: Mlp<L>,
}

/// Causal attention: position `t` sees positions `0..=t`.
#[derive(Debug, Clone)]
pub struct Attention<L, N> {
    /// `d -> (query + 2 key_value) width`: queries, keys and values side by side, in one layer or in three.
    pub qkv: Vec<L>,
    /// `query width -> d`
    pub out: L,
    /// Norms of each head's query and key, before they are rotated.
    pub qk_norm: Option<[N; 2]>,
    pub heads: Heads,
    pub rotary: Option<Arc<Rotary>>,
}

#[derive(Debug, Clone)]
pub struct Mlp<L> {
    /// `d -> inner`, or for SwiGLU `d -> 2 inner`: the gate, then the value, in one layer or in two.
    pub up: Vec<L>,
    /// `inner -> d`
    pub down: L,
    pub activation: Activation,
}

/// The activation of an MLP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// Elementwise; GPT-2's and GPT-J's `gelu_new`.
    GeluTanh,
    /// Llama's. Each input row holds a gate and a value side by side, so the output is half as wide.
    SwiGlu,
}

/// The heads of an attention layer, of `width` columns each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Heads {
    /// Query heads.
    pub query: usize,
    /// Key/value heads; each serves `query / key_value` neighbouring query heads.
    pub key_value: usize,
    pub width: usize,
}

/// Rotary positions: pairs of a head's columns are rotated by an angle that grows with the position.
#[derive(Debug, Clone, PartialEq)]
pub struct Rotary {
    pub pairing: Pairing,
    /// Radians per position, one value for each pair of columns; the first `2 pairs` columns of a head are rotated.
    pub frequencies: Vec<f32>,
}

/// Which columns of a head form a pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pairing {
    /// Columns i and i + dim/2 (Llama's `rotate_half`).
    Halves,
    /// Columns 2i and 2i + 1 (GPT-J's `rotate_every_two`).
    Interleaved,
}

/// The shape of a linear layer and its module's name within its block.
#[derive(Debug, Clone)]
pub struct LinearShape {
    pub module: &'static str,
    pub d_in: usize,
    pub d_out: usize,
    pub bias: bool,
}

/// The shape of a norm and its module's name within its block.
#[derive(Debug, Clone)]
pub struct NormShape {
    pub module: &'static str,
    pub d: usize,
    /// Whether it is a layer norm, with a bias, rather than an RMS norm.
    pub bias: bool,
    pub eps: f64,
}

/// A layer norm over the last dimension, `(x - mean) / sqrt(variance + eps) * weight + bias`, or without a bias an RMS
/// norm, `x / sqrt(mean(x^2) + eps) * weight`.
#[derive(Debug, Clone)]
pub struct Norm {
    /// The module's name in the model's file, without `.weight`.
    pub name: String,
    /// `[d]`
    pub weight: Tensor,
    /// `[d]`
    pub bias: Option<Tensor>,
    pub eps: f64,
}

impl<L, N> Block<L, N> {
    /// The linear layers in four groups of one input each: `qkv`, `out`, `up`, `down`.
    pub fn groups(&self) -> [&[L]; 4] {
        let one = std::slice::from_ref;
        [&self.attention.qkv, one(&self.attention.out), &self.mlp.up, one(&self.mlp.down)]
    }

    /// The linear layers, in file order.
    pub fn linears(&self) -> impl Iterator<Item = &L> {
        self.groups().into_iter().flatten()
    }

    /// The block with references to its parts.
    pub fn parts(&self) -> Block<&L, &N> {
        let Self { norm_1, attention, norm_2, mlp } = self;
        Block {
            norm_1,
            attention: Attention {
                qkv: attention.qkv.iter().collect(),
                out: &attention.out,
                qk_norm: attention.qk_norm.as_ref().map(<[N; 2]>::each_ref),
                heads: attention.heads,
                rotary: attention.rotary.clone(),
            },
            norm_2: norm_2.as_ref(),
            mlp: Mlp { up: mlp.up.iter().collect(), down: &mlp.down, activation: mlp.activation },
        }
    }

    /// The block with each of its parts replaced by `linear` or `norm` of it, one after the other in file order; both
    /// also get `context`.
    pub fn try_map<C: ?Sized, M, O, E>(
        self,
        context: &mut C,
        linear: impl Fn(&mut C, L) -> Result<M, E>,
        norm: impl Fn(&mut C, N) -> Result<O, E>,
    ) -> Result<Block<M, O>, E> {
        let Self { norm_1, attention: Attention { qkv, out, qk_norm, heads, rotary }, norm_2, mlp } = self;
        Ok(Block {
            norm_1: norm(context, norm_1)?,
            attention: Attention {
                qkv: qkv.into_iter().map(|part| linear(context, part)).collect::<Result<_, E>>()?,
                out: linear(context, out)?,
                qk_norm: match qk_norm {
                    Some([q, k]) => Some([norm(context, q)?, norm(context, k)?]),
                    None => None,
                },
                heads,
                rotary,
            },
            norm_2: norm_2.map(|part| norm(context, part)).transpose()?,
            mlp: Mlp {
                up: mlp.up.into_iter().map(|part| linear(context, part)).collect::<Result<_, E>>()?,
                down: linear(context, mlp.down)?,
                activation: mlp.activation,
            },
        })
    }

    /// [`Block::try_map`] that does not fail.
    pub fn map<C: ?Sized, M, O>(
        self,
        context: &mut C,
        linear: impl Fn(&mut C, L) -> M,
        norm: impl Fn(&mut C, N) -> O,
    ) -> Block<M, O> {
        let mapped = self.try_map(context, |c, l| Ok::<_, Infallible>(linear(c, l)), |c, n| Ok(norm(c, n)));
        mapped.unwrap_or_else(|never| match never {})
    }
}

impl Block {
    /// All tensors, those of adapters included.
    pub fn tensors(&self) -> Vec<&Tensor> {
        let mut all = Vec::new();
        self.parts().map(&mut all, |all, linear| all.extend(linear.tensors()), |all, norm| all.extend(norm.tensors()));
        all
    }

    /// A frozen view that shares storage, adapters included.
    pub fn frozen(&self) -> Self {
        self.parts().map(&mut (), |(), linear| linear.frozen(), |(), norm| norm.frozen())
    }
}

impl Activation {
    /// Columns of the input for an output of `inner` columns.
    pub fn input_width(self, inner: usize) -> usize {
        match self {
            Self::GeluTanh => inner,
            Self::SwiGlu => 2 * inner,
        }
    }
}

impl Heads {
    /// Columns of `n` heads. Saturates: a config file is untrusted.
    pub fn columns(self, n: usize) -> usize {
        self.width.saturating_mul(n)
    }
}

impl Norm {
    pub fn tensors(&self) -> impl Iterator<Item = &Tensor> {
        [&self.weight].into_iter().chain(&self.bias)
    }

    /// The norm with each tensor replaced by `f` of it.
    pub fn try_map(self, mut f: impl FnMut(Tensor) -> Result<Tensor>) -> Result<Self> {
        Ok(Self { weight: f(self.weight)?, bias: self.bias.map(f).transpose()?, ..self })
    }

    fn frozen(&self) -> Self {
        Self {
            name: self.name.clone(),
            weight: self.weight.detach(),
            bias: self.bias.as_ref().map(Tensor::detach),
            eps: self.eps,
        }
    }

    /// A trainable copy.
    pub fn trainable(self) -> Result<Self> {
        self.try_map(|tensor| variable::trainable_copy(&tensor))
    }
}
