//! The providers of answers.

pub mod anthropic;
