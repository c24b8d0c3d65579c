//! Shared by executors and optimisers: access to tensors' memory, gradients, parallel buffers, threads, the device,
//! random numbers.

pub mod candle_interop;
pub mod counter_rng;
#[cfg(feature = "cuda")]
mod cuda;
pub mod device;
pub mod grad_accumulator;
pub mod philox;
pub mod random;
pub mod row_subset;
pub mod threads;
