//! A named trainable tensor, as optimisers see it; knows no model.

use candle_core::{Tensor, Var};

use crate::Result;

/// One trainable tensor. `var` shares its storage with the model: setting it changes the model.
#[derive(Debug, Clone)]
pub struct Variable {
    /// Unique within a model, as in its file: `transformer.h.0.attn.c_attn.weight`.
    pub name: String,
    pub var: Var,
    /// Whether weight decay applies: 2-d matrices only, never biases, norms or heads.
    pub decays: bool,
}

/// The variable behind `tensor`, if it is one.
pub(crate) fn of(name: String, tensor: &Tensor, decays: bool) -> Option<Variable> {
    // For a variable `from_tensor` only wraps it.
    tensor.is_variable().then(|| Var::from_tensor(tensor).ok()).flatten().map(|var| Variable { name, var, decays })
}

/// A fresh variable with a copy of `tensor`'s values.
pub(crate) fn fresh(tensor: &Tensor) -> Result<Tensor> {
    // `Var::from_tensor` hands a variable back as it is and copies anything else.
    Ok(Var::from_tensor(&tensor.detach())?.into_inner())
}
