//! The stage kinds and artifact types of temper, on the crates `engine` and `lm`.
//!
//! [`kinds`] holds one module per kind, under the kind's name; [`types`] the artifact types with their typed readers and writers. The
//! modules between them are shared by several kinds: the RL loop ([`rl`]), reward models ([`reward`]), training ([`train`]), labels
//! from a model behind an API ([`judge`]), the synthetic corpus ([`corpus`]). [`registry`] returns all of it for the orchestrator.

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
