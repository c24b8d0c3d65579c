//! The state of all live jobs of an executor, from one query per interval.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::system::{BatchSystem, JobReport};
use crate::error::Error;

/// What is known about a job.
pub(super) enum JobStatus {
    /// It is newer than the last query.
    NotAskedYet,
    Known(JobReport),
    /// The batch system does not know it.
    Gone,
    Unreachable(Error),
}

#[derive(Default)]
pub(super) struct Jobs(Mutex<Watched>);

#[derive(Default)]
struct Watched {
    /// Since when each job is watched.
    jobs: BTreeMap<String, Instant>,
    reports: BTreeMap<String, JobReport>,
    asked: Option<Instant>,
    /// Why the last query failed.
    error: Option<Error>,
}

impl Jobs {
    /// The status of a job, asked at most `max_age` ago. Watches the job from then on.
    pub fn status(&self, system: &dyn BatchSystem, job: &str, max_age: Duration) -> JobStatus {
        let mut watched = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let since = *watched.jobs.entry(job.to_owned()).or_insert_with(Instant::now);
        if watched.asked.is_none_or(|asked| asked.elapsed() >= max_age) {
            let jobs: Vec<String> = watched.jobs.keys().cloned().collect();
            match system.reports(&jobs) {
                Ok(reports) => (watched.reports, watched.error) = (reports, None),
                Err(error) => watched.error = Some(error),
            }
            watched.asked = Some(Instant::now());
        }
        match (&watched.error, watched.reports.get(job)) {
            (Some(error), _) => JobStatus::Unreachable(error.clone()),
            (None, Some(report)) => JobStatus::Known(report.clone()),
            (None, None) if watched.asked.is_none_or(|asked| asked < since) => JobStatus::NotAskedYet,
            (None, None) => JobStatus::Gone,
        }
    }

    pub fn forget(&self, job: &str) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).jobs.remove(job);
    }
}
