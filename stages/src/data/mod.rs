//! Kinds that read, filter and split posts, with shared modules for reading rows and cleaning text.

pub mod clean;
pub mod filter;
pub mod minhash;
pub mod source;
pub mod splits;
pub mod tldr;

pub use filter::Filter;
pub use tldr::Tldr;
