//! The probe job: shows that the machines of a batch system see the store and this program.

use std::path::Path;
use std::process::ExitCode;

use serde::{Deserialize, Serialize};

use crate::error::{AtPath, Error, Result};
use crate::store::files;

/// What the orchestrator writes into the folder of a probe.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Question {
    pub text: String,
}

/// What the probe job writes beside it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct ProbeAnswer {
    /// The question as the job read it.
    pub text: String,
    pub host: String,
    pub version: String,
}

impl Question {
    const FILE: &'static str = "question.json";

    pub fn write(&self, folder: &Path) -> Result<()> {
        write(folder, Self::FILE, self)
    }
}

impl ProbeAnswer {
    const FILE: &'static str = "answer.json";

    /// The answer in the folder of a probe, if there is one.
    pub fn read(folder: &Path) -> Result<Option<Self>> {
        Ok(files::read_if_file(&folder.join(Self::FILE))?.and_then(|bytes| serde_json::from_slice(&bytes).ok()))
    }
}

/// Answers the question in `folder`; the work of a probe job.
pub fn answer_probe(folder: &Path) -> ExitCode {
    let answer = || -> Result<()> {
        let path = folder.join(Question::FILE);
        let bytes = std::fs::read(&path).at(&path)?;
        let Question { text } = serde_json::from_slice(&bytes)
            .map_err(|e| Error::environment(format!("{}: not the question of a probe: {e}", path.display())))?;
        let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
        let answer = ProbeAnswer { text, host, version: env!("CARGO_PKG_VERSION").to_owned() };
        write(folder, ProbeAnswer::FILE, &answer)
    };
    match answer() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::from(error.exit_code())
        }
    }
}

fn write(folder: &Path, name: &str, what: &impl Serialize) -> Result<()> {
    let text =
        serde_json::to_vec_pretty(what).map_err(|e| Error::internal(format!("cannot serialise a probe: {e}")))?;
    files::write_atomically(&folder.join(name), &text)
}
