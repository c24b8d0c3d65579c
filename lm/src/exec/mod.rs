//! Three ways to run a model. All read the same description, [`Block`](crate::model::block::Block).

pub mod decode;
pub mod memory;
pub mod portable;
pub mod train;
