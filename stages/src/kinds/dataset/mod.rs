//! Kinds that produce posts, comparisons, and pairs taken from tables of preferences.

pub mod comparisons;
pub mod filter;
pub mod pairs;
pub mod tinytldr;
pub mod tldr;

pub use comparisons::DatasetComparisons;
pub use filter::Filter;
pub use pairs::DatasetPairs;
pub use tinytldr::DatasetTinyTldr;
pub use tldr::Tldr;
