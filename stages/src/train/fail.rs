//! Errors of models and tensors as errors of a stage, with whose fault they are. Knows no kind.

use engine::error::{Error, Result};

/// Turns a library's error into a stage's.
pub trait Told<T> {
    fn told(self) -> Result<T>;
}

impl<T> Told<T> for lm::Result<T> {
    fn told(self) -> Result<T> {
        self.map_err(|e| {
            let message = e.to_string();
            match e {
                lm::Error::BadModel { .. } | lm::Error::Tokenizer { .. } | lm::Error::BadInput { .. } => {
                    Error::yours(message)
                }
                lm::Error::NonFinite { .. } => Error::yours(message).help("lower `lr`, or clip harder"),
                lm::Error::Io { .. } => Error::surroundings(message),
                _ => Error::ours(message),
            }
        })
    }
}

impl<T> Told<T> for candle_core::Result<T> {
    fn told(self) -> Result<T> {
        self.map_err(|e| Error::ours(e.to_string()))
    }
}

/// Runs `work` on a thread with a big stack: the walk over a deep graph of tensors recurses.
pub fn on_a_big_stack<T: Send>(work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    // Reserved, not touched: only what is used becomes memory.
    const STACK: usize = 256 << 20;
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new()
            .name("training".to_owned())
            .stack_size(STACK)
            .spawn_scoped(scope, work)
            .map_err(|e| Error::surroundings(format!("no thread for training: {e}")))?;
        match thread.join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}
