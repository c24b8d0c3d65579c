//! The crate's error type; each variant names the file or the quantity.

use std::path::{Path, PathBuf};

use crate::tensor::device::device_failure;

/// The crate's result.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// An error of a model file, a tokenizer, an input, or the numbers themselves.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An invalid model, adapter or head on disk.
    #[error("{path}: {message}", path = path.display())]
    BadModel { path: PathBuf, message: String },
    /// A tokenizer that cannot be read, trained, or used with a model.
    #[error("tokenizer {path}: {message}", path = path.display())]
    Tokenizer { path: PathBuf, message: String },
    /// A NaN or an infinity where a finite number is needed.
    #[error("{quantity} is not finite")]
    NonFinite { quantity: String },
    /// Invalid arguments: an empty batch, ids above the vocabulary, top-p of zero.
    #[error("{message}")]
    BadInput { message: String },
    /// A device that does not start, or fails later.
    #[error("{message}")]
    Device { message: String },
    /// A file that cannot be read or written.
    #[error("{path}: {source}", path = path.display())]
    Io { path: PathBuf, source: std::io::Error },
    /// A tensor operation that failed: almost always a wrong shape, hence a bug in this project.
    #[error(transparent)]
    Candle(candle_core::Error),
}

impl From<candle_core::Error> for Error {
    fn from(error: candle_core::Error) -> Self {
        match device_failure(&error) {
            Some(message) => Self::Device { message },
            None => Self::Candle(error),
        }
    }
}

impl Error {
    pub(crate) fn model(path: &Path, message: impl Into<String>) -> Self {
        Self::BadModel { path: path.to_path_buf(), message: message.into() }
    }

    pub(crate) fn input(message: impl Into<String>) -> Self {
        Self::BadInput { message: message.into() }
    }

    pub(crate) fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Self + '_ {
        move |source| Self::Io { path: path.to_path_buf(), source }
    }
}
