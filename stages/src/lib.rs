//! Stage kinds and artifact types of temper.

#[macro_use]
pub mod table;
pub mod assets;
pub mod corpus;
pub mod error;
pub mod http;
pub mod hub;
pub mod judge;
pub mod kinds;
pub mod labels;
pub mod model;
pub mod paper;
pub mod prompt;
pub mod random;
pub mod reward;
pub mod rl;
pub mod services;
pub mod source;
pub mod stats;
pub mod text;
pub mod train;
pub mod types;

#[cfg(test)]
mod testing;

use engine::kind::Registry;

/// The registry of every artifact type and stage kind.
pub fn registry() -> Registry {
    kinds::register(types::register(Registry::default()))
}
