//! Three ways to run a model, which read the same description, [`Block`](crate::model::block::Block), and candle's own
//! models with quantised weights.

pub mod decode;
pub mod memory;
pub mod portable;
pub mod quantized;
pub mod train;
