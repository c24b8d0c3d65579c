//! The orchestrator of temper: pipeline file -> graph -> plan -> attempts -> artifact store.
//!
//! [`document`] reads the pipeline file, [`graph`] expands its matrices and connects its stages, [`plan`] decides which instances can
//! be reused, [`run`] executes the others, each as an [`attempt`] in a process of its own, and [`store`] keeps the artifacts under the
//! hash of their content. A [`kind::Kind`] is what a stage does and an [`artifact::ArtifactType`] what it produces; a program
//! registers its own in a [`kind::Registry`]. This crate does no machine learning.

pub mod artifact;
pub mod attempt;
pub mod checkpoint;
pub mod context;
pub mod describe;
pub mod diagnostics;
mod disk;
pub mod document;
pub mod error;
pub mod estimate;
pub mod external;
mod fault;
pub mod gc;
pub mod graph;
pub mod journal;
pub mod kind;
pub mod machine;
pub mod names;
pub mod plan;
pub mod remote;
pub mod run;
pub mod schema;
pub mod store;
pub mod text;
