//! Matrix products of slices in f32, or of operands rounded to bf16 with sums in f32, on CPUs.
//!
//! [`matmul`] multiplies by a right operand that was packed once ([`PackedRhs`]) and may serve many products; the functions
//! of [`dense`] multiply operands in place, through the crate `gemm`. [`simd`] compiles a loop once for each instruction
//! set; [`buffer`] fills memory in parallel.
//!
//! No result depends on the number of threads: an element is summed in an order that follows from the shapes alone. It does
//! depend on the instruction set.

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

#[macro_use]
pub mod simd;
pub mod buffer;
pub mod dense;
pub mod matmul;
mod packed;
mod precision;

pub use dense::{Mat, Threads, WriteMode};
pub use matmul::{LowRankUpdate, PackedRhs, Rhs, matmul};
pub use precision::Precision;
