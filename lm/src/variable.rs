//! A named trainable tensor, for optimisers.

use candle_core::{Tensor, Var};

use crate::Result;

/// One trainable tensor. `var` shares its storage with the model: setting it changes the model.
#[derive(Debug, Clone)]
pub struct Variable {
    /// Unique within a model; the name in its file, such as `transformer.h.0.attn.c_attn.weight`.
    pub name: String,
    pub var: Var,
    /// Whether weight decay applies: 2-d matrices only, never biases, norms or heads.
    pub decays: bool,
}

/// Wraps `tensor` if it is trainable.
pub(crate) fn from_trainable(name: String, tensor: &Tensor, decays: bool) -> Option<Variable> {
    // `from_tensor` does not copy a variable.
    tensor.is_variable().then(|| Var::from_tensor(tensor).ok()).flatten().map(|var| Variable { name, var, decays })
}

/// A fresh variable with a copy of `tensor`'s values.
pub(crate) fn trainable_copy(tensor: &Tensor) -> Result<Tensor> {
    // `Var::from_tensor` would return a variable as it is; it copies any other tensor.
    Ok(Var::from_tensor(&tensor.detach())?.into_inner())
}
