//! Kinds that give a tokenizer: trained on posts, or taken from elsewhere. Know no model.

pub mod import;
pub mod train;

pub use import::Import;
pub use train::Train;
