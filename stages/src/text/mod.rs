//! Foreign text: cleaning, reading lines of untrusted files, near duplicates, overlap.

pub mod clean;
pub mod lines;
pub mod minhash;
pub mod rouge;
