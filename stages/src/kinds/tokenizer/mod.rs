//! Kinds that produce a tokenizer, by training on posts or by import.

pub mod import;
pub mod train;

pub use import::Import;
pub use train::Train;
