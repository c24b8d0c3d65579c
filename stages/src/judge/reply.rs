//! The result for each document of a request. Answers are parsed again at every read, so a better parser costs nothing.

use crate::table::cut;
use crate::text::clean::printable;
use crate::types::Outcome;

/// The result for one document.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reply {
    /// Position of the better summary, 1 or 2.
    Label(u8),
    Refused,
    Truncated,
    Unparsable,
    /// The API rejected the request.
    Failed,
}

impl Reply {
    pub fn outcome(self) -> Outcome {
        match self {
            Self::Label(_) => Outcome::Labelled,
            Self::Refused => Outcome::Refused,
            Self::Truncated => Outcome::Truncated,
            Self::Unparsable => Outcome::Unparsable,
            Self::Failed => Outcome::Failed,
        }
    }
}

/// A reason as one short, printable line.
pub fn one_line(text: &str) -> String {
    cut(&printable(text), 300)
}
