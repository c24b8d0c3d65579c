//! Kinds that produce a language model, by pre-training or by import.

pub mod import;
pub mod pretrain;

#[cfg(test)]
mod tests;
