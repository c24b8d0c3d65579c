//! Simulates killed attempts of one key that resume from each other's checkpoints.

use std::collections::BTreeMap;
use std::num::NonZeroU64;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use engine::context::{Cadence, Context, Input, StageEvent};
use engine::error::{Error, Result};
use engine::kind::AnyKind;
use serde_json::Value;
use tempfile::TempDir;

/// One key: a kind, its parameters and its inputs. Every attempt gets a fresh output folder; checkpoints are shared.
pub struct Attempts<'a> {
    kind: &'a dyn AnyKind,
    params: Value,
    inputs: BTreeMap<String, Vec<Input>>,
    folder: TempDir,
    /// Steps between checkpoints.
    every: u64,
}

/// The result of an attempt, finished or killed.
pub struct Attempt {
    out: TempDir,
    /// The number of steps done in the checkpoint that this attempt resumed from.
    pub resumed: Option<u64>,
    pub warnings: Vec<String>,
    pub killed: bool,
}

impl Attempt {
    /// Every output file with its bytes.
    pub fn bytes(&self) -> Vec<(String, Vec<u8>)> {
        let mut files = super::toys::bytes_of(self.out.path());
        let metrics = std::fs::read(self.out.path().join("metrics.json")).expect("a finished attempt has metrics");
        files.push(("metrics.json".to_owned(), metrics));
        files
    }
}

impl<'a> Attempts<'a> {
    pub fn new(kind: &'a dyn AnyKind, with: &Value, inputs: BTreeMap<String, Vec<Input>>, every: u64) -> Result<Self> {
        let params = kind.normalise(with).map_err(|faults| Error::user(format!("{faults:?}")))?;
        Ok(Self { kind, params, inputs, folder: tempfile::tempdir().expect("a temporary folder"), every })
    }

    /// The same checkpoints with other parameters, which no pipeline would combine.
    pub fn with(self, with: &Value) -> Result<Self> {
        let params = self.kind.normalise(with).map_err(|faults| Error::user(format!("{faults:?}")))?;
        Ok(Self { params, ..self })
    }

    /// The folder of the only checkpoint.
    pub fn checkpoint(&self) -> PathBuf {
        let entries = std::fs::read_dir(self.folder.path()).expect("the folder of checkpoints");
        let mut found = entries.map(|entry| entry.expect("an entry").path()).filter(|path| is_checkpoint(path));
        let one = found.next().expect("a checkpoint");
        assert!(found.next().is_none(), "the last one alone is kept");
        one
    }

    /// Runs an attempt and kills it once it has written this many checkpoints.
    pub fn killed_after(&self, checkpoints: u64) -> Result<Attempt> {
        self.attempt(Some(checkpoints))
    }

    /// Runs an attempt to its end.
    pub fn undisturbed(&self) -> Result<Attempt> {
        self.attempt(None)
    }

    fn attempt(&self, kill_after: Option<u64>) -> Result<Attempt> {
        let out = tempfile::tempdir().expect("a temporary folder");
        let told: Arc<Mutex<Vec<StageEvent>>> = Arc::default();
        let sink = {
            let (told, mut written) = (told.clone(), 0);
            move |tell| {
                written += u64::from(matches!(tell, StageEvent::Checkpoint { .. }));
                let last = matches!(tell, StageEvent::Checkpoint { .. }) && Some(written) == kill_after;
                told.lock().expect("nothing panics while it is held").push(tell);
                if last {
                    // Unwinding stops the kind as a kill would; `resume_unwind` prints no panic message.
                    resume_unwind(Box::new(Killed));
                }
            }
        };
        let cadence = Cadence::Steps(NonZeroU64::new(self.every).expect("at least one step"));
        let (inputs, place) = (self.inputs.clone(), out.path().to_owned());
        let mut ctx = Context::new(self.kind.name(), 7, inputs, place, self.folder.path().to_owned())
            .with_cadence(cadence)
            .with_sink(sink);
        let killed = match catch_unwind(AssertUnwindSafe(|| self.kind.run(&self.params, &mut ctx))) {
            Ok(result) => {
                result?;
                ctx.write_metrics()?;
                false
            }
            Err(panic) if panic.is::<Killed>() => true,
            Err(panic) => resume_unwind(panic),
        };
        let told = std::mem::take(&mut *told.lock().expect("nothing panics while it is held"));
        let resumed = told.iter().find_map(|tell| match tell {
            StageEvent::Resumed { done, .. } => Some(*done),
            _ => None,
        });
        let warnings = told.into_iter().filter_map(|tell| match tell {
            StageEvent::Warning { message } => Some(message),
            _ => None,
        });
        Ok(Attempt { out, resumed, warnings: warnings.collect(), killed })
    }
}

fn is_checkpoint(path: &Path) -> bool {
    path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("checkpoint-"))
}

/// Panic payload that ends a killed attempt.
struct Killed;
