//! Any other batch system, through three shell commands with placeholders.

use std::collections::BTreeMap;
use std::process::Command;

use super::system::{BatchSystem, JobReport, JobState, Submission, quoted, run_command};
use crate::document::{SubmitSettings, resources::clock};
use crate::error::{Error, Result};

pub(super) struct Submit(pub SubmitSettings);

impl BatchSystem for Submit {
    /// The first word of each command, where it is a plain name.
    fn programs(&self) -> Vec<String> {
        let SubmitSettings { submit, status, cancel } = &self.0;
        let plain = |word: &&str| word.bytes().all(|b| b.is_ascii_alphanumeric() || b"_-./+".contains(&b));
        let of_shell = ["case", "cd", "eval", "exec", "export", "for", "if", "kill", "set", "ulimit", "until", "while"];
        let words = [submit, status, cancel].into_iter().filter_map(|command| command.split_whitespace().next());
        words.filter(plain).filter(|word| !of_shell.contains(word)).map(str::to_owned).collect()
    }

    fn submit(&self, submission: &Submission<'_>) -> Result<String> {
        let Submission { name, script, log, env, resources, .. } = submission;
        let text = |n: Option<u64>| n.map(|n| n.to_string()).unwrap_or_default();
        let time = resources.time.unwrap_or_default();
        let command = fill(
            &self.0.submit,
            &[
                ("script", quoted(&script.display().to_string())),
                ("name", quoted(name)),
                ("log", quoted(&log.display().to_string())),
                ("env", quoted(&env.join(","))),
                ("threads", resources.threads.unwrap_or(1).to_string()),
                ("memory_mb", text(resources.memory)),
                ("gpus", resources.gpus.unwrap_or(0).to_string()),
                ("time", clock(time)),
                ("seconds", time.as_secs_f64().ceil().to_string()),
            ],
        );
        let output = run_command(&mut shell(&command))?;
        if !output.status.success() {
            let message = format!("the batch system rejected the job: {}", output.complaint());
            return Err(Error::environment(message).help("check the executor's `submit` command"));
        }
        job_id(&output.stdout).ok_or_else(|| {
            Error::environment(format!("the `submit` command printed no job id: `{}`", output.stdout.trim()))
                .help("its last line must have the id as its only word, or as its first number")
        })
    }

    fn reports(&self, jobs: &[String]) -> Result<BTreeMap<String, JobReport>> {
        let ids: Vec<String> = jobs.iter().map(|job| quoted(job)).collect();
        let output = run_command(&mut shell(&fill(&self.0.status, &[("jobs", ids.join(" "))])))?;
        if !output.status.success() {
            let message = format!("the `status` command failed: {}", output.complaint());
            return Err(Error::environment(message).transient());
        }
        let live: Vec<&str> = output.stdout.split_whitespace().collect();
        let report = || JobReport { state: JobState::Live { held: None }, limit: None };
        let found = jobs.iter().filter(|job| live.iter().any(|word| is_same_job(word, job)));
        Ok(found.map(|job| (job.clone(), report())).collect())
    }

    fn cancel(&self, job: &str) -> Result<()> {
        let output = run_command(&mut shell(&fill(&self.0.cancel, &[("job", quoted(job))])))?;
        match output.status.success() {
            true => Ok(()),
            false => Err(Error::environment(format!("the `cancel` command failed: {}", output.complaint()))),
        }
    }
}

fn shell(command: &str) -> Command {
    let mut shell = Command::new("sh");
    shell.arg("-c").arg(command);
    shell
}

/// Replaces each placeholder `{name}`, in one pass.
fn fill(template: &str, values: &[(&str, String)]) -> String {
    let mut filled = String::new();
    let mut rest = template;
    while let Some(at) = rest.find('{') {
        let found = rest[at + 1..].split_once('}').and_then(|(name, after)| {
            let value = values.iter().find(|(known, _)| *known == name)?;
            (!rest[..at].ends_with('$')).then_some((&value.1, after))
        });
        filled.push_str(&rest[..at]);
        rest = match found {
            Some((value, after)) => {
                filled.push_str(value);
                after
            }
            None => {
                filled.push('{');
                &rest[at + 1..]
            }
        };
    }
    filled + rest
}

/// The id in the output of a submit command: the only word of its last line, or the first number in it.
fn job_id(output: &str) -> Option<String> {
    let line = output.lines().map(str::trim).rfind(|line| !line.is_empty())?;
    if line.split_whitespace().count() == 1 {
        return Some(line.to_owned());
    }
    let mut numbers = line.split(|c: char| !c.is_ascii_digit()).filter(|number| !number.is_empty());
    numbers.next().map(str::to_owned)
}

/// Whether a word of a list of jobs names a job. Lists may cut `1234.server` short.
fn is_same_job(word: &str, job: &str) -> bool {
    let number = |text: &str| {
        let digits = text.bytes().take_while(u8::is_ascii_digit).count();
        (digits > 0 && (digits == text.len() || text.as_bytes()[digits] == b'.')).then(|| text[..digits].to_owned())
    };
    word == job || (number(job).is_some() && number(word) == number(job))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_found_in_what_batch_systems_print() {
        for (output, id) in [
            ("1234.pbs01\n", Some("1234.pbs01")),
            ("Your job 5 (\"sft.17\") has been submitted\n", Some("5")),
            ("a note of the site\nJob submitted successfully, job ID: 12\n\n", Some("12")),
            ("3f2a-b\n", Some("3f2a-b")),
            ("no id\n", None),
            ("", None),
        ] {
            assert_eq!(job_id(output).as_deref(), id, "{output}");
        }
        for (word, job, same) in [
            ("1234.pbs*", "1234.pbs01", true),
            ("1234", "1234.pbs01", true),
            ("12345.pbs01", "1234.pbs01", false),
            ("12a", "12", false),
            ("3f2a-b", "3f2a-b", true),
        ] {
            assert_eq!(is_same_job(word, job), same, "{word} {job}");
        }
    }

    #[test]
    fn values_are_filled_in_once_and_other_braces_stay() {
        let values = [("script", quoted("/a b/{name}.sh")), ("name", "n".to_owned())];
        let filled = fill("sub {script} -N {name} ${name} | awk '{print $1}' {", &values);
        assert_eq!(filled, "sub '/a b/{name}.sh' -N n ${name} | awk '{print $1}' {");
    }
}
