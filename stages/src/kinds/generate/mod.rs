//! Kinds that sample responses or corrupt them.

pub mod best_of_n;
pub mod contrast;
pub mod pairs;

pub use best_of_n::GenerateBestOfN;
pub use contrast::GenerateContrast;
pub use pairs::GeneratePairs;
