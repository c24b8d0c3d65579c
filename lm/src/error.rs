//! What can go wrong in this crate, each variant naming the file or the quantity; knows no exit codes.

use std::path::{Path, PathBuf};

/// The crate's result.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// An error of a model file, a tokenizer, an input, or the numbers themselves.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A model, adapter or head on disk that is not what it should be.
    #[error("{path}: {what}", path = path.display())]
    BadModel { path: PathBuf, what: String },
    /// A tokenizer that cannot be read, trained, or used with a model.
    #[error("tokenizer {path}: {what}", path = path.display())]
    Tokenizer { path: PathBuf, what: String },
    /// A NaN or an infinity where a finite number is needed.
    #[error("{what} is not finite")]
    NonFinite { what: String },
    /// Arguments that make no sense together: an empty batch, ids above the vocabulary, top-p of zero.
    #[error("{what}")]
    BadInput { what: String },
    /// A file that cannot be read or written.
    #[error("{path}: {source}", path = path.display())]
    Io { path: PathBuf, source: std::io::Error },
    /// A tensor operation that failed: almost always a wrong shape, hence ours.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}

impl Error {
    pub(crate) fn model(path: &Path, what: impl Into<String>) -> Self {
        Self::BadModel { path: path.to_path_buf(), what: what.into() }
    }

    pub(crate) fn input(what: impl Into<String>) -> Self {
        Self::BadInput { what: what.into() }
    }

    pub(crate) fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Self + '_ {
        move |source| Self::Io { path: path.to_path_buf(), source }
    }
}
