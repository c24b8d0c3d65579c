//! The providers of answers.

pub mod anthropic;
pub mod openai;
