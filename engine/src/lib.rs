//! The orchestrator: pipeline file -> graph -> plan -> attempts -> artifact store.

pub mod artifact;
pub mod attempt;
pub mod checkpoint;
pub mod context;
pub mod diagnostics;
pub mod document;
pub mod error;
pub mod estimate;
pub mod external;
pub mod graph;
pub mod journal;
pub mod kind;
pub mod names;
pub mod plan;
pub mod remote;
pub mod run;
pub mod schema;
pub mod store;
pub mod text;
