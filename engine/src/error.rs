//! Errors, tagged with whose fault they are; the tag decides the exit code.

use std::fmt;
use std::path::Path;

use serde::{Deserialize, Serialize};

/// Whose fault an error is; decides the exit code.
///
/// The serialised names are those that journals of older runs have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Blame {
    /// The pipeline file, its parameters or its data: exit code 2.
    #[serde(rename = "yours")]
    User,
    /// Disk, network, an API, a budget: exit code 3.
    #[serde(rename = "surroundings")]
    Environment,
    /// A bug in temper: exit code 4.
    #[serde(rename = "ours")]
    Internal,
}

/// What went wrong, and what to do about it. Serialised as JSON between the attempt process and the orchestrator.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Error {
    pub blame: Blame,
    /// Lower-case, one line: what happened, where, what was expected.
    pub message: String,
    /// What the user can do.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub help: Option<String>,
    /// Whether trying again later may succeed; the runner then retries with backoff.
    #[serde(default)]
    pub transient: bool,
}

pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    pub fn new(blame: Blame, message: impl Into<String>) -> Self {
        Self { blame, message: message.into(), help: None, transient: false }
    }

    /// The pipeline file, its parameters or its data are at fault.
    pub fn user(message: impl Into<String>) -> Self {
        Self::new(Blame::User, message)
    }

    /// The machine, the network or an API is at fault.
    pub fn environment(message: impl Into<String>) -> Self {
        Self::new(Blame::Environment, message)
    }

    /// A bug in temper.
    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(Blame::Internal, message)
    }

    #[must_use]
    pub fn help(mut self, help: impl Into<String>) -> Self {
        self.help = Some(help.into());
        self
    }

    #[must_use]
    pub fn transient(mut self) -> Self {
        self.transient = true;
        self
    }

    /// Puts `what` in front of the message: `what: message`.
    #[must_use]
    pub fn context(mut self, what: impl fmt::Display) -> Self {
        self.message = format!("{what}: {}", self.message);
        self
    }

    pub fn exit_code(&self) -> u8 {
        match self.blame {
            Blame::User => 2,
            Blame::Environment => 3,
            Blame::Internal => 4,
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)?;
        match &self.help {
            Some(help) => write!(f, "\n  help: {help}"),
            None => Ok(()),
        }
    }
}

impl std::error::Error for Error {}

/// Names the path in an I/O error: `std::fs::read(p).at(p)?`.
pub trait AtPath<T> {
    fn at(self, path: impl AsRef<Path>) -> Result<T>;
}

impl<T> AtPath<T> for std::io::Result<T> {
    fn at(self, path: impl AsRef<Path>) -> Result<T> {
        self.map_err(|e| {
            let error = Error::environment(format!("{}: {e}", path.as_ref().display()));
            match e.kind() {
                std::io::ErrorKind::StorageFull => {
                    error.help("no space left on the device: free some, then run again; finished stages are kept")
                }
                _ => error,
            }
        })
    }
}
