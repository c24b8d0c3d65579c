//! Why a job ended without a result.

use std::time::Duration;

use super::system::{JobEnd, JobReport, JobState};
use super::{Batch, RunningJob};
use crate::attempt::detached::Stopped;
use crate::document::SystemSettings;
use crate::document::resources::clock;
use crate::error::{Error, Result};

/// Slurm sends the signal before the time limit up to this much too early.
pub(super) const SIGNAL_RESOLUTION: Duration = Duration::from_secs(60);

impl Batch {
    /// The error of a job that is over without a result. Those that another try may survive are transient.
    pub(super) fn ended_without_result(&self, job: &RunningJob<'_>, report: Option<&JobReport>) -> Result<Error> {
        let stopped = Stopped::read(&job.folder.root)?;
        let limit = report.and_then(|report| report.limit);
        let end = match report.map(|report| &report.state) {
            Some(JobState::Ended(end)) => Some(*end),
            _ => None,
        };
        let at_limit = matches!((stopped, limit), (Some(stopped), Some(limit)) if self.near_limit(stopped, limit));
        let who = self.describe(job);
        const GOES_ON: &str = "the next try continues from the last checkpoint";
        Ok(match (end, stopped) {
            (Some(JobEnd::Cancelled), _) => Error::environment(format!("{who} was cancelled by somebody"))
                .help("run again to continue from the last checkpoint"),
            (Some(JobEnd::OutOfMemory), _) => Error::environment(format!("{who} ran out of memory"))
                .help("set more `memory` in the stage's `resources`"),
            (Some(JobEnd::NodeFailed), _) => Error::environment(format!("{who} lost its node")).transient(),
            (Some(JobEnd::TimeLimit), _) => time_limit(&who, limit),
            _ if at_limit => time_limit(&who, limit),
            (Some(JobEnd::Preempted), _) => {
                Error::environment(format!("{who} was preempted")).help(GOES_ON).transient()
            }
            (_, Some(Stopped { signal, seconds })) => {
                let message = format!(
                    "{who} was ended by signal {signal} after {seconds:.0} s: preempted, cancelled, or at its time limit"
                );
                Error::environment(message).help(GOES_ON).transient()
            }
            (Some(JobEnd::Finished), None) => Error::environment(format!("{who} ended without a result"))
                .help(format!("its log says more: {}", job.folder.log.display())),
            (None, None) => {
                let help = format!("its log may say more: {}", job.folder.log.display());
                Error::environment(format!("{who} vanished: it is no longer known and left no result"))
                    .help(help)
                    .transient()
            }
        })
    }

    fn near_limit(&self, stopped: Stopped, limit: Duration) -> bool {
        let SystemSettings::Slurm(slurm) = &self.settings.system else { return false };
        Duration::from_secs_f64(stopped.seconds.max(0.0)) + slurm.signal + SIGNAL_RESOLUTION >= limit
    }
}

fn time_limit(who: &str, limit: Option<Duration>) -> Error {
    let limit = limit.map_or_else(String::new, |limit| format!(" ({})", clock(limit)));
    Error::environment(format!("{who} reached its time limit{limit}"))
        .help(
            "the next try continues from the last checkpoint; a higher `time` in the stage's `resources` avoids tries",
        )
        .transient()
}
