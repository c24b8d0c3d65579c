//! Models: the description of a block, the families, whole models, adapters and heads.

pub mod adapter;
pub mod architecture;
pub mod block;
pub mod causal_lm;
pub mod families;
pub mod head;
pub mod linear;
pub mod transformer;
