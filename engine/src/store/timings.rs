//! How long stages took, for estimates. The file may be lost without harm.

use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::OpenOptionsExt;

use super::{ActionRecord, Store, files};
use crate::disk;
use crate::error::{AtPath, Result};
use crate::names::{InstanceName, Key};

/// Above this many bytes the file is reduced to the last line of each instance.
const REWRITE_ABOVE: u64 = 1 << 20;

/// One earlier attempt.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Timing {
    pub seconds: f64,
    /// Its key; `None` in lines of older versions.
    pub key: Option<Key>,
}

/// Earlier attempts, by kind and instance.
#[derive(Clone, Debug, Default)]
pub struct Timings {
    /// By (kind, instance).
    exact: HashMap<(String, String), Timing>,
    /// By (kind, stage): the latest of any instance.
    stage: HashMap<(String, String), Timing>,
}

impl Timings {
    /// The latest attempt at the instance, or else at another instance of its stage with the same kind.
    pub fn latest(&self, kind: &str, instance: &InstanceName) -> Option<Timing> {
        let exact = (kind.to_owned(), instance.to_string());
        self.exact.get(&exact).or_else(|| self.stage.get(&(exact.0, instance.stage.to_string()))).copied()
    }

    /// One line per attempt: kind, instance, seconds, key, separated by tabs. Skips torn lines.
    fn parse(text: &str) -> Self {
        let mut timings = Self::default();
        for line in text.lines() {
            let mut parts = line.split('\t');
            let (Some(kind), Some(instance), Some(seconds)) = (parts.next(), parts.next(), parts.next()) else {
                continue;
            };
            let Ok(seconds) = seconds.parse::<f64>() else { continue };
            let timing = Timing { seconds, key: parts.next().and_then(|key| key.parse().ok()) };
            let stage = instance.split('[').next().unwrap_or(instance);
            timings.stage.insert((kind.to_owned(), stage.to_owned()), timing);
            timings.exact.insert((kind.to_owned(), instance.to_owned()), timing);
        }
        timings
    }
}

impl Store {
    pub fn timings(&self) -> Result<Timings> {
        let bytes = files::read_if_file(&self.root().join("timings"))?.unwrap_or_default();
        Ok(Timings::parse(&String::from_utf8_lossy(&bytes)))
    }

    pub(crate) fn record_seconds(&self, record: &ActionRecord) -> Result<()> {
        let path = self.root().join("timings");
        let (kind, stage) = (&record.recipe.kind, &record.provenance.stage);
        let (seconds, key) = (record.provenance.seconds, record.key);
        // Non-blocking, in case the path has become a FIFO.
        let options = File::options().create(true).append(true).custom_flags(libc::O_NONBLOCK).clone();
        let file = disk::open(&options, &path).at(&path)?;
        // A single write, so that lines of several processes do not mix.
        let line = format!("{kind}\t{stage}\t{seconds:.3}\t{key}\n");
        disk::write_all(&file, &path, line.as_bytes()).at(&path)?;
        if file.metadata().at(&path)?.len() > REWRITE_ABOVE {
            let mut lines: Vec<_> = self.timings()?.exact.into_iter().collect();
            lines.sort_by(|a, b| a.0.cmp(&b.0));
            let line = |((kind, stage), Timing { seconds, key }): &((String, String), Timing)| {
                let key = key.map_or_else(String::new, |key| format!("\t{key}"));
                format!("{kind}\t{stage}\t{seconds:.3}{key}\n")
            };
            let text: String = lines.iter().map(line).collect();
            let name = files::temporary_name(&path);
            // A line that another process appends meanwhile is lost, which costs only an estimate.
            disk::write(&name, text).and_then(|()| disk::rename(&name, &path)).at(&path)?;
        }
        Ok(())
    }
}
