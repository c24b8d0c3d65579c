//! Kinds that bring posts in and split them, and what they share: sources of rows, clean text. Know no model.

pub mod clean;
pub mod filter;
pub mod minhash;
pub mod source;
pub mod splits;
pub mod tldr;

pub use filter::Filter;
pub use tldr::Tldr;
