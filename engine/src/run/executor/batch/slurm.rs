//! The batch system Slurm, through sbatch, squeue and scancel.

use std::collections::BTreeMap;
use std::process::Command;
use std::time::Duration;

use super::ended::SIGNAL_RESOLUTION;
use super::system::{BatchSystem, JobEnd, JobReport, JobState, Submission, run_command};
use crate::document::{SlurmSettings, resources::clock};
use crate::error::{Error, Result};

pub(super) struct Slurm(pub SlurmSettings);

/// Messages of sbatch when the controller does not answer, which is no rejection.
const UNREACHABLE: [&str; 4] = [
    "Unable to contact slurm controller",
    "Socket timed out",
    "Connection refused",
    "Resource temporarily unavailable",
];

impl BatchSystem for Slurm {
    fn programs(&self) -> Vec<String> {
        ["sbatch", "squeue", "scancel"].map(str::to_owned).to_vec()
    }

    fn submit(&self, submission: &Submission<'_>) -> Result<String> {
        let output = run_command(slurm_command("sbatch").args(self.arguments(submission)))?;
        if !output.status.success() {
            let message = format!("Slurm rejected the job: {}", output.complaint());
            let error = Error::environment(message);
            return Err(match UNREACHABLE.iter().any(|text| output.stderr.contains(text)) {
                true => error.transient(),
                false => error.help("check partition, account, flags and resources of the executor and the stage"),
            });
        }
        // `ID`, or `ID;CLUSTER`.
        let id: String = output.stdout.trim().chars().take_while(char::is_ascii_digit).collect();
        match id.is_empty() {
            false => Ok(id),
            true => {
                Err(Error::environment(format!("sbatch: expected the id of a job, found `{}`", output.stdout.trim())))
            }
        }
    }

    fn reports(&self, jobs: &[String]) -> Result<BTreeMap<String, JobReport>> {
        // One line a job in all versions of Slurm. Its JSON has a new layout in almost every version, and old versions print
        // all jobs of the cluster.
        let mut command = slurm_command("squeue");
        command.args(["--noheader", "--states=all", "--format=%i|%T|%l|%r"]).arg(format!("--jobs={}", jobs.join(",")));
        let output = run_command(&mut command)?;
        // If the only job that was asked for is forgotten.
        if !output.status.success() && !output.stderr.contains("Invalid job id") {
            return Err(Error::environment(format!("squeue: {}", output.complaint())).transient());
        }
        Ok(output.stdout.lines().filter_map(parse_line).collect())
    }

    fn cancel(&self, job: &str) -> Result<()> {
        // Slurm sends SIGTERM, and SIGKILL after its KillWait.
        let output = run_command(slurm_command("scancel").arg(job))?;
        let has_ended = ["Invalid job id", "already completing or completed"];
        match output.status.success() || has_ended.iter().any(|text| output.stderr.contains(text)) {
            true => Ok(()),
            false => Err(Error::environment(format!("scancel: {}", output.complaint()))),
        }
    }
}

impl Slurm {
    fn arguments(&self, submission: &Submission<'_>) -> Vec<String> {
        let Submission { name, script, log, folder, env, resources } = submission;
        let mut arguments = vec![
            "--parsable".to_owned(),
            format!("--job-name={name}"),
            format!("--output={}", escape_pattern(&log.display().to_string())),
            "--open-mode=append".to_owned(),
            format!("--chdir={}", folder.display()),
            // Names only: sbatch takes the values from its own environment.
            format!("--export={}", if env.is_empty() { "NIL".to_owned() } else { env.join(",") }),
            "--nodes=1".to_owned(),
            "--ntasks=1".to_owned(),
            (if self.0.requeue { "--requeue" } else { "--no-requeue" }).to_owned(),
            format!("--cpus-per-task={}", resources.threads.unwrap_or(1)),
        ];
        // Slurm may send the signal a minute early, which must not be at the start of a short job.
        if resources.time.is_none_or(|time| time > self.0.signal + SIGNAL_RESOLUTION) {
            arguments.push(format!("--signal=B:TERM@{}", self.0.signal.as_secs().max(1)));
        }
        arguments.extend(resources.memory.map(|mebibytes| format!("--mem={mebibytes}M")));
        arguments.extend(resources.gpus.filter(|n| *n > 0).map(|n| format!("--gres=gpu:{n}")));
        arguments.extend(resources.time.map(|time| format!("--time={}", clock(time))));
        arguments.extend(self.0.partition.as_ref().map(|name| format!("--partition={name}")));
        arguments.extend(self.0.account.as_ref().map(|name| format!("--account={name}")));
        // Last, so that they win.
        arguments.extend(self.0.flags.iter().cloned());
        arguments.push(script.display().to_string());
        arguments
    }
}

/// A command of Slurm. The variables of a job that this process may itself be part of would change the new job.
fn slurm_command(program: &str) -> Command {
    const KEPT: [&str; 2] = ["SLURM_CONF", "SLURM_JWT"];
    let mut command = Command::new(program);
    if std::env::var_os("SLURM_JOB_ID").is_some() {
        let names = std::env::vars_os().filter_map(|(name, _)| name.into_string().ok());
        for name in names.filter(|name| name.starts_with("SLURM_") && !KEPT.contains(&name.as_str())) {
            command.env_remove(name);
        }
    }
    command
}

/// sbatch replaces `%x` and the like in the name of the output file.
fn escape_pattern(path: &str) -> String {
    path.replace('%', "%%")
}

/// `ID|STATE|TIME LIMIT|REASON`
fn parse_line(line: &str) -> Option<(String, JobReport)> {
    let mut parts = line.trim().splitn(4, '|');
    let (id, state, limit, reason) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
    let state = match state {
        "COMPLETED" | "FAILED" | "REVOKED" | "LAUNCH_FAILED" => JobState::Ended(JobEnd::Finished),
        "TIMEOUT" | "DEADLINE" => JobState::Ended(JobEnd::TimeLimit),
        "NODE_FAIL" | "BOOT_FAIL" => JobState::Ended(JobEnd::NodeFailed),
        "PREEMPTED" => JobState::Ended(JobEnd::Preempted),
        "OUT_OF_MEMORY" => JobState::Ended(JobEnd::OutOfMemory),
        "CANCELLED" => JobState::Ended(JobEnd::Cancelled),
        // Pending, running, suspended, completing, requeued, and what later versions add.
        _ => {
            let never = ["JobHeld", "requeued held", "requeued_held", "BadConstraints", "PartitionTimeLimit"];
            let held = never.iter().any(|text| reason.contains(text)) || state == "SPECIAL_EXIT";
            JobState::Live { held: held.then(|| reason.to_owned()) }
        }
    };
    Some((id.to_owned(), JobReport { state, limit: parse_limit(limit) }))
}

/// `[DAYS-]HH:MM:SS`, `MM:SS`, or a word for no limit.
fn parse_limit(text: &str) -> Option<Duration> {
    let (days, clock) = text.split_once('-').unwrap_or(("0", text));
    let parts: Vec<u64> = clock.split(':').map(|part| part.parse().ok()).collect::<Option<_>>()?;
    let seconds = parts.iter().fold(0, |seconds, part| seconds * 60 + part);
    (parts.len() > 1).then(|| Duration::from_secs(days.parse::<u64>().unwrap_or(0) * 86_400 + seconds))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_squeue_say_how_jobs_are_and_how_they_ended() {
        let live = |held: Option<&str>| JobState::Live { held: held.map(str::to_owned) };
        for (line, state, minutes) in [
            ("7|PENDING|1:00:00|Resources", live(None), Some(60)),
            ("7|PENDING|1-00:00:00|JobHeldUser", live(Some("JobHeldUser")), Some(1440)),
            ("7|PENDING|30:00|launch failed requeued held", live(Some("launch failed requeued held")), Some(30)),
            ("7|RUNNING|UNLIMITED|None", live(None), None),
            ("7|COMPLETING|INVALID|None", live(None), None),
            ("7|FAILED|5:00|NonZeroExitCode", JobState::Ended(JobEnd::Finished), Some(5)),
            ("7|TIMEOUT|5:00|TimeLimit", JobState::Ended(JobEnd::TimeLimit), Some(5)),
            ("7|NODE_FAIL|5:00|None", JobState::Ended(JobEnd::NodeFailed), Some(5)),
            ("7|CANCELLED|5:00|None", JobState::Ended(JobEnd::Cancelled), Some(5)),
        ] {
            let limit = minutes.map(|minutes| Duration::from_secs(minutes * 60));
            assert_eq!(parse_line(line), Some(("7".to_owned(), JobReport { state, limit })), "{line}");
        }
        assert_eq!(parse_line("slurm_load_jobs error"), None);
    }
}
