//! Converts errors of models and tensors into stage errors, tagged with whose fault they are.

use engine::error::{Error, Result};

/// The expectation shown when a file is not a usable tokenizer.
pub const TOKENIZER: &str = "expected the tokenizer.json of a byte-level BPE or of one that falls back to bytes, such as GPT-2's or \
                             Llama's: for a model, the one it was trained with";

/// Converts a library error into a stage error.
pub trait IntoStageResult<T> {
    fn into_stage_result(self) -> Result<T>;
}

impl<T> IntoStageResult<T> for lm::Result<T> {
    fn into_stage_result(self) -> Result<T> {
        self.map_err(|e| {
            let message = e.to_string();
            match e {
                lm::Error::BadModel { .. } | lm::Error::BadInput { .. } => Error::user(message),
                lm::Error::Tokenizer { .. } => Error::user(message).help(TOKENIZER),
                lm::Error::NonFinite { .. } => Error::user(message).help("lower `lr`, or clip harder"),
                lm::Error::Io { .. } | lm::Error::Device { .. } => Error::environment(message),
                lm::Error::Candle(error) => of_candle(&error),
                _ => Error::internal(message),
            }
        })
    }
}

impl<T> IntoStageResult<T> for candle_core::Result<T> {
    fn into_stage_result(self) -> Result<T> {
        self.map_err(|e| of_candle(&e))
    }
}

/// A failed tensor operation is a bug in this project, unless the device failed.
fn of_candle(error: &candle_core::Error) -> Error {
    lm::device_failure(error).map_or_else(|| Error::internal(error.to_string()), Error::environment)
}

/// Formats a number for a message: with an exponent if its plain digits would be hard to read.
pub fn number(x: f64) -> String {
    let plain = x == 0.0 || !x.is_finite() || (1e-3..1e6).contains(&x.abs());
    if plain { x.to_string() } else { format!("{x:e}") }
}

/// Like [`number`], with at most four significant digits.
pub fn rounded(x: f64) -> String {
    number(format!("{x:.3e}").parse().unwrap_or(x))
}

/// Names the rows of a batch for a message by their ids: the first few, and how many more.
pub fn named<S: AsRef<str>>(what: &str, ids: impl IntoIterator<Item = S>) -> String {
    const SHOWN: usize = 4;
    let mut ids = ids.into_iter();
    let shown: Vec<String> = ids.by_ref().take(SHOWN).map(|id| format!("`{}`", id.as_ref())).collect();
    let more = match ids.count() {
        0 => String::new(),
        n => format!(" and {n} more"),
    };
    format!("{what} {}{more}", shown.join(", "))
}

/// Runs `work` on a thread with a large stack: the walk over a deep graph of tensors recurses.
pub fn on_a_big_stack<T: Send>(work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    // Only reserved: pages become memory when they are used.
    const STACK: usize = 256 << 20;
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new()
            .name("training".to_owned())
            .stack_size(STACK)
            .spawn_scoped(scope, work)
            .map_err(|e| Error::environment(format!("no thread for training: {e}")))?;
        match thread.join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_rows_in_messages_can_be_read() {
        let told = [0.0, 0.0015, 3e-5, 1.0, 1e30, f64::NAN].map(number);
        assert_eq!(told, ["0", "0.0015", "3e-5", "1", "1e30", "NaN"]);
        assert_eq!(named("posts", ["a", "b"]), "posts `a`, `b`");
        assert_eq!(named("posts", ["a", "b", "c", "d", "e", "f"]), "posts `a`, `b`, `c`, `d` and 2 more");
        assert_eq!([0.612_345, 5.0, 3.123_456e16].map(rounded), ["0.6123", "5", "3.123e16"]);
    }

    #[test]
    fn a_failed_device_is_the_environments_fault_and_any_other_failed_operation_a_bug() {
        let exit_codes = |text: &str| {
            let error = || candle_core::Error::Msg(text.to_owned());
            let direct = candle_core::Result::<()>::Err(error()).into_stage_result();
            let through_lm = lm::Result::<()>::Err(error().into()).into_stage_result();
            [direct, through_lm].map(|result| result.expect_err("a failed operation").exit_code())
        };
        assert_eq!(exit_codes("DriverError(CUDA_ERROR_OUT_OF_MEMORY, \"out of memory\")"), [3, 3]);
        assert_eq!(exit_codes("shape mismatch in add"), [4, 4]);
    }
}
