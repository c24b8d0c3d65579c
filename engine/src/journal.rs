//! The journal of a run: every event and decision, one JSON line each.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions, TryLockError};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use crate::context::ApiUsage;
use crate::disk;
use crate::error::{AtPath, Error, Result};
use crate::names::{Digest, Key};

/// An event of a run. `stage` is always an instance's name, such as `rl[mean]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    Started {
        run: String,
        pipeline: String,
        #[serde(default)]
        profiles: Vec<String>,
        targets: Vec<String>,
        /// The folder of the run: journal, graph.json, report.
        folder: PathBuf,
        /// The command line of the run, with secrets redacted; empty in runs of older versions.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        command: Vec<String>,
        /// The pipeline file as given on the command line.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        file: Option<String>,
    },
    /// The plan; repeated when the run plans again because of a damaged artifact.
    Planned { stages: Vec<PlannedStage> },
    StageStarted {
        stage: String,
        key: Key,
        threads: usize,
        /// The name of the attempt's folder.
        attempt: String,
        /// The log file with its standard error.
        log: PathBuf,
    },
    /// A job that checks the file system that an executor shares with this machine was submitted.
    Probing { executor: String },
    /// The attempt is a job of a batch system; `attached`: submitted by an earlier run.
    Job {
        stage: String,
        executor: String,
        job: String,
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        attached: bool,
    },
    /// Another process holds the lock of this stage's key.
    Waiting { stage: String, key: Key, holder: String },
    Progress {
        stage: String,
        done: u64,
        total: u64,
        unit: String,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        headline: Option<(String, f64)>,
    },
    /// What a stage does now, such as `sampling`, while its progress stands still.
    Activity { stage: String, what: String },
    /// Seconds by name, for example sampling, scoring and update of one PPO phase.
    Timing { stage: String, what: String, seconds: BTreeMap<String, f64> },
    /// The attempt wrote a checkpoint; the next attempt at this key resumes from it.
    Checkpoint { stage: String, done: u64, total: u64, unit: String },
    /// The attempt resumed from the checkpoint of an earlier attempt.
    Resumed { stage: String, done: u64, total: u64, unit: String },
    /// Requests that an attempt paid for since its previous `Paid` event.
    Paid {
        stage: String,
        #[serde(flatten)]
        paid: ApiUsage,
    },
    Warning {
        #[serde(default, skip_serializing_if = "Option::is_none")]
        stage: Option<String>,
        message: String,
    },
    /// An attempt failed with a transient error; the next one starts after `seconds`.
    Retrying { stage: String, error: Error, tries: u32, seconds: f64 },
    StageFinished {
        stage: String,
        key: Key,
        digest: Digest,
        seconds: f64,
        /// Peak resident memory of the attempt.
        #[serde(default)]
        peak_bytes: u64,
    },
    StageReused {
        stage: String,
        key: Key,
        digest: Digest,
        /// Whether this became known only after its inputs had been made (early cutoff), or because another process
        /// made the artifact meanwhile.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        cutoff: bool,
    },
    StageFailed {
        stage: String,
        error: Error,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        log: Option<PathBuf>,
        /// The last lines of the log.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        tail: Vec<String>,
    },
    /// The stage did not run: because the stage `because`, which it needs, failed; or, if `because` is `None`, because
    /// the run was interrupted or stopped at a failure elsewhere.
    StageSkipped {
        stage: String,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        because: Option<String>,
    },
    /// Bytes moved so far from the remote store, or to it; at most one event per second.
    Transfer { upload: bool, bytes: u64, total_bytes: u64 },
    /// What was moved from the remote store, or to it.
    Transferred { upload: bool, records: u64, files: u64, bytes: u64, seconds: f64 },
    Finished {
        ran: Vec<String>,
        reused: Vec<String>,
        failed: Vec<String>,
        #[serde(default)]
        skipped: Vec<String>,
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        interrupted: bool,
        seconds: f64,
    },
}

/// One stage of a plan, with the same names as in `temper plan --json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PlannedStage {
    pub stage: String,
    pub kind: String,
    pub action: PlannedAction,
    pub reason: String,
    pub key: Option<Key>,
    #[serde(default)]
    pub waits_on: Vec<String>,
    /// Expected wall time, from earlier attempts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expected_seconds: Option<f64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PlannedAction {
    Reuse,
    Run,
    Pending,
}

/// A line of the journal: an event and its time.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct JournalLine {
    /// Seconds since 1970, UTC.
    pub at: f64,
    #[serde(flatten)]
    pub event: Event,
}

/// Minimum time between two journal entries of a stage's progress; listeners receive all of it.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(1);

/// The folder of one run and its open journal.
pub struct Journal {
    id: String,
    folder: PathBuf,
    file: File,
    progress: BTreeMap<String, Instant>,
}

impl Journal {
    /// Starts a run: creates a new folder under `runs`, whose name sorts by time.
    ///
    /// # Errors
    /// When the folder cannot be created.
    pub fn create(runs: &Path) -> Result<Self> {
        disk::create_dir_all(runs).at(runs)?;
        Self::create_as(runs, "")
    }

    /// Like [`Journal::create`], but in the system's temporary folder: for a read-only store.
    pub fn create_in_temp_folder() -> Result<Self> {
        Self::create_as(&std::env::temp_dir(), "temper-")
    }

    fn create_as(parent: &Path, prefix: &str) -> Result<Self> {
        // Events contain the folder's path as JSON text.
        if parent.to_str().is_none() {
            return Err(Error::environment(format!("{}: the path of a run must be UTF-8", parent.display())));
        }
        loop {
            let id = fresh_id(SystemTime::now());
            let folder = parent.join(format!("{prefix}{id}"));
            match disk::create_dir(&folder) {
                Ok(()) => {
                    let path = folder.join("journal.jsonl");
                    let file = disk::open(OpenOptions::new().append(true).create(true), &path).at(&path)?;
                    // Released when the process ends; see `is_running`.
                    file.lock().at(&path)?;
                    return Ok(Self { id, folder, file, progress: BTreeMap::new() });
                }
                // Another run of this process started in the same millisecond.
                Err(e) if e.kind() == ErrorKind::AlreadyExists => std::thread::sleep(Duration::from_millis(1)),
                Err(e) => return Err(e).at(&folder),
            }
        }
    }

    pub fn id(&self) -> &str {
        &self.id
    }

    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Appends one line in a single write, so that only the last line can ever be incomplete. Drops progress events
    /// that are not due.
    pub fn write(&mut self, event: &Event) -> Result<()> {
        if let Event::Progress { stage, done, total, .. } = event {
            let due = self.progress.get(stage).is_none_or(|last| last.elapsed() >= PROGRESS_INTERVAL);
            if !due && done < total {
                return Ok(());
            }
            self.progress.insert(stage.clone(), Instant::now());
        }
        let line = JournalLine { at: unix_seconds(SystemTime::now()), event: event.clone() };
        let mut text =
            serde_json::to_vec(&line).map_err(|e| Error::internal(format!("cannot serialise an event: {e}")))?;
        text.push(b'\n');
        let path = self.folder.join("journal.jsonl");
        disk::write_all(&self.file, &path, &text).at(&path)
    }
}

/// Whether a process is still writing the journal in `folder`.
pub fn is_running(folder: &Path) -> Result<bool> {
    let path = folder.join("journal.jsonl");
    let Some(file) = crate::store::files::open_if_file(&path)? else { return Ok(false) };
    match file.try_lock_shared() {
        Ok(()) => Ok(false),
        Err(TryLockError::WouldBlock) => Ok(true),
        Err(TryLockError::Error(e)) => Err(e).at(&path),
    }
}

/// The folders of the runs below `runs`, oldest first: their names sort by time.
pub fn run_folders(runs: &Path) -> Result<Vec<PathBuf>> {
    if !runs.is_dir() {
        return Ok(Vec::new());
    }
    let mut folders = Vec::new();
    for entry in std::fs::read_dir(runs).at(runs)? {
        let path = entry.at(runs)?.path();
        if path.join("journal.jsonl").is_file() {
            folders.push(path);
        }
    }
    folders.sort();
    Ok(folders)
}

/// Reads the events of the run in `folder`. Replaces each damaged line by a warning, and omits a last line that a crash
/// cut short.
///
/// # Errors
/// When there is no readable journal.
pub fn read(folder: &Path) -> Result<Vec<JournalLine>> {
    let path = folder.join("journal.jsonl");
    let bytes = crate::store::files::read_if_file(&path)?
        .ok_or_else(|| Error::environment(format!("{}: not a readable file", path.display())))?;
    let text = String::from_utf8_lossy(&bytes);
    let count = text.lines().count();
    let mut events: Vec<JournalLine> = Vec::with_capacity(count);
    for (i, line) in text.lines().enumerate() {
        match serde_json::from_str(line) {
            Ok(event) => events.push(event),
            Err(_) if i + 1 == count => break,
            Err(e) => {
                let message = format!("{}: line {} is not an event: {e}", path.display(), i + 1);
                let at = events.last().map_or(0.0, |line| line.at);
                events.push(JournalLine { at, event: Event::Warning { stage: None, message } });
            }
        }
    }
    Ok(events)
}

pub(crate) fn unix_seconds(time: SystemTime) -> f64 {
    time.duration_since(UNIX_EPOCH).map_or(0.0, |d| d.as_secs_f64())
}

/// A run id such as `20261123-124100-123-4f2a`: UTC to the millisecond, then the process id.
fn fresh_id(now: SystemTime) -> String {
    let since = now.duration_since(UNIX_EPOCH).unwrap_or_default();
    let ((year, month, day), (hour, minute, second)) = date_and_time(since.as_secs());
    let (millis, pid) = (since.subsec_millis(), std::process::id());
    format!("{year:04}{month:02}{day:02}-{hour:02}{minute:02}{second:02}-{millis:03}-{pid:x}")
}

/// A journal time for display: `2026-11-23 12:41:00 UTC`.
pub fn utc(at: f64) -> String {
    let ((year, month, day), (hour, minute, second)) = date_and_time(at as u64);
    format!("{year:04}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02} UTC")
}

/// Converts seconds since 1970 to (year, month, day), (hour, minute, second).
fn date_and_time(seconds: u64) -> ((u64, u64, u64), (u64, u64, u64)) {
    let of_day = seconds % 86_400;
    (calendar_date(seconds / 86_400), (of_day / 3600, of_day / 60 % 60, of_day % 60))
}

/// Converts days since 1970-01-01 to year, month and day of the Gregorian calendar.
fn calendar_date(days: u64) -> (u64, u64, u64) {
    let is_leap = |y: u64| y.is_multiple_of(4) && (!y.is_multiple_of(100) || y.is_multiple_of(400));
    let (mut year, mut day) = (1970, days);
    while day >= 365 + u64::from(is_leap(year)) {
        day -= 365 + u64::from(is_leap(year));
        year += 1;
    }
    let february = 28 + u64::from(is_leap(year));
    let mut month = 1;
    for length in [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31] {
        if day < length {
            break;
        }
        day -= length;
        month += 1;
    }
    (year, month, day + 1)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn progress(done: u64) -> Event {
        Event::Progress { stage: "sft".into(), done, total: 100, unit: "steps".into(), headline: None }
    }

    #[test]
    fn days_are_converted_to_dates() {
        for (days, date) in [(0, (1970, 1, 1)), (59, (1970, 3, 1)), (789, (1972, 2, 29)), (20_780, (2026, 11, 23))] {
            assert_eq!(calendar_date(days), date);
        }
        assert_eq!(utc(20_780.0 * 86_400.0 + 45_660.9), "2026-11-23 12:41:00 UTC");
    }

    #[test]
    fn written_lines_can_be_read_and_a_truncated_last_line_is_skipped() {
        let dir = tempfile::tempdir().unwrap();
        let mut journal = Journal::create(dir.path()).unwrap();
        let events = [
            Event::StageSkipped { stage: "a".into(), because: None },
            Event::StageFailed { stage: "b".into(), error: Error::user("no rows"), log: None, tail: vec![] },
        ];
        events.iter().for_each(|e| journal.write(e).unwrap());
        journal.file.write_all(b"{\"at\":1,\"event\":\"stage_sk").unwrap();
        let read: Vec<Event> = read(journal.folder()).unwrap().into_iter().map(|line| line.event).collect();
        assert_eq!(read, events);
    }

    #[test]
    fn a_run_counts_as_running_while_its_journal_is_open() {
        let dir = tempfile::tempdir().unwrap();
        let journal = Journal::create(dir.path()).unwrap();
        let folder = journal.folder().to_owned();
        assert!(is_running(&folder).unwrap() && is_running(&folder).unwrap());
        assert_eq!(run_folders(dir.path()).unwrap(), [folder.as_path()]);
        drop(journal);
        assert!(!is_running(&folder).unwrap() && !is_running(dir.path()).unwrap());
    }

    #[test]
    fn a_damaged_line_is_reported_with_its_number_and_the_others_are_read() {
        let dir = tempfile::tempdir().unwrap();
        let mut journal = Journal::create(dir.path()).unwrap();
        let (first, last) = (Event::StageSkipped { stage: "a".into(), because: None }, progress(100));
        journal.write(&first).unwrap();
        journal.file.write_all(b"\xff{\"at\":1}\n").unwrap();
        journal.write(&last).unwrap();
        let read: Vec<Event> = read(journal.folder()).unwrap().into_iter().map(|line| line.event).collect();
        let [a, Event::Warning { stage: None, message }, b] = &read[..] else { panic!("{read:?}") };
        assert_eq!((a, b), (&first, &last));
        assert!(message.contains("journal.jsonl: line 2 is not an event"), "{message}");
    }

    #[test]
    fn a_journal_that_is_not_a_file_is_an_error_and_not_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        rustix::fs::mkfifoat(rustix::fs::CWD, dir.path().join("journal.jsonl"), 0o600.into()).unwrap();
        assert_eq!(read(dir.path()).unwrap_err().exit_code(), 3);
    }

    #[test]
    fn progress_is_written_about_once_a_second_and_at_its_end() {
        let dir = tempfile::tempdir().unwrap();
        let mut journal = Journal::create(dir.path()).unwrap();
        for done in 0..=100 {
            journal.write(&progress(done)).unwrap();
        }
        let events: Vec<Event> = read(journal.folder()).unwrap().into_iter().map(|line| line.event).collect();
        assert_eq!(events, [progress(0), progress(100)]);
    }

    #[test]
    fn two_runs_never_share_a_folder() {
        let dir = tempfile::tempdir().unwrap();
        let first = Journal::create(dir.path()).unwrap();
        let second = Journal::create(dir.path()).unwrap();
        assert!(first.id() < second.id(), "{} {}", first.id(), second.id());
    }
}
