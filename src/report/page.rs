//! The report's page with all its sections, in order.

use std::collections::BTreeMap;

use engine::journal::utc;
use stages::paper;

use super::agreement::{self, AgreementResult};
use super::figures::figures;
use super::graph::graph;
use super::html::{Sections, escape, page, table};
use super::load::{Instance, InstanceResult, InstanceState, RunData};
use super::study::{Study, list};
use super::{answers, arms, best_of_n, glossary, learned, parameters, timeline, uncertainty};

pub fn render(run: &RunData, study: &Study, agreement: &[AgreementResult]) -> String {
    let mut body = Sections::default();
    body.push("Failures and warnings", &failures(run, study));
    if !study.arms.is_empty() {
        body.push("What the study saw", &answers::section(study));
        let note = format!(
            "<p class=\"soft\">Steps are chosen on half A of the held-out prompts; every number comes from half B. Intervals: 95% bootstrap over \
             prompts within a run; {}.</p>",
            escape(&study.gold_heading())
        );
        let outcomes = table(&arms::OUTCOME_HEAD, 1, &escaped(arms::outcomes(study)));
        let all = format!("<details><summary>Every seed</summary>{}</details>", arms_table(study));
        let all = if study.runs() > arms::MAX_RUNS_LISTED { all } else { arms_table(study) };
        body.push("Arms", &(note + &outcomes + &all));
        body.push("Figures", &figures(study));
        let engagement: String = arms::engagement(study).iter().map(|s| format!("<p>{}</p>", escape(s))).collect();
        let mechanism = table(&arms::MECHANISM_HEAD, 1, &escaped(arms::mechanism(study)));
        body.push("The mechanism", &(engagement + &mechanism + &uncertainty::figures(study)));
        body.push("Summaries (Table 1)", &examples(study));
    }
    if study.arms.is_empty() && !study.best_of.is_empty() {
        body.push("Figures", &best_of_n::figures(&study.best_of));
    }
    if !agreement.is_empty() {
        body.push("Agreement of annotators", &agreement::section(agreement));
    }
    body.push("What was learned", &learned::metrics(run));
    body.push("Learning curves", &learned::curves(run));
    body.push("Samples by step", &learned::samples(run));
    body.push("Parameters by arm", &parameters::section(run));
    body.push("The graph", &graph(run));
    body.push("Stages", &stages_table(run));
    body.push("Timeline", &timeline::timeline(run));
    body.push("Paid requests of this run", &paid_table(run));
    body.push("Seeds", &seeds(study));
    if is_about_the_paper(run) {
        body.push("Deviations from the paper", &deviations(run));
    }
    let terms = glossary::glossary(&body.words());
    body.push("Terms", &terms);
    let notes: String = run.settings.notes.iter().map(|note| format!("<p>{}</p>", escape(note))).collect();
    page(&format!("{} · {}", run.pipeline, run.id), &(header(run) + &notes + &body.html()))
}

/// Whether the run studies the paper's question: it has RL and an ensemble of reward models, or its pipeline file lists
/// deviations.
fn is_about_the_paper(run: &RunData) -> bool {
    let holds = |is: fn(&str) -> bool| run.instances.iter().any(|instance| is(&instance.kind));
    let studies = holds(|kind| kind == "reward.ensemble") && holds(|kind| kind.starts_with("rl."));
    studies || !run.settings.deviations.is_empty()
}

/// The table of arms, each mean with its interval below it.
fn arms_table(study: &Study) -> String {
    let head: Vec<&str> = arms::ID_COLUMNS.into_iter().chain(arms::COLUMNS.iter().map(|column| column.head)).collect();
    let rows: Vec<Vec<String>> = arms::rows(study)
        .into_iter()
        .map(|row| {
            let cells = row.cells.iter().map(|cell| match cell {
                None => "–".to_owned(),
                Some(cell) => {
                    format!("{}<span class=\"interval\">{}</span>", escape(&cell.mean), escape(&cell.interval))
                }
            });
            row.ids.iter().map(|name| escape(name)).chain(cells).collect()
        })
        .collect();
    table(&head, arms::TEXT_COLUMNS, &rows)
}

fn escaped(rows: Vec<Vec<String>>) -> Vec<Vec<String>> {
    rows.into_iter().map(|row| row.iter().map(|cell| escape(cell)).collect()).collect()
}

fn header(run: &RunData) -> String {
    let count = |state: InstanceState| run.instances.iter().filter(|i| run.result(i).state == state).count();
    let counts: Vec<String> = [
        InstanceState::Ran,
        InstanceState::Reused,
        InstanceState::Failed,
        InstanceState::Interrupted,
        InstanceState::Skipped,
        InstanceState::NotReached,
    ]
    .into_iter()
    .map(|state| (state, count(state)))
    .filter(|(state, n)| *n > 0 || *state == InstanceState::Ran)
    .map(|(state, n)| format!("{n} {}", state.word()))
    .collect();
    let time = run.seconds.map_or_else(
        || "its journal has no final event: it is still running, or was killed".to_owned(),
        |s| format!("{s:.0} s{}", if run.interrupted { ", interrupted" } else { "" }),
    );
    let hosts: Vec<&str> = run.hosts.iter().map(String::as_str).collect();
    let host = if hosts.is_empty() { String::new() } else { format!(" · on {}", escape(&hosts.join(", "))) };
    let mut out = format!(
        "<h1>{}</h1><p class=\"soft\">run {} · {}{host} · {time} · {}: {}</p>",
        escape(&run.pipeline),
        escape(&run.id),
        utc(run.started),
        crate::output::counted(run.instances.len(), "stage"),
        counts.join(", "),
    );
    let mut about = Vec::new();
    if let Some(file) = &run.file {
        about.push(format!("file <code>{}</code>", escape(file)));
    }
    if !run.profiles.is_empty() {
        about.push(format!("profiles {}", escape(&run.profiles.join(", "))));
    }
    if !run.command.is_empty() {
        about.push(format!("command <code>{}</code>", escape(&shell_quoted(&run.command))));
    }
    if !about.is_empty() {
        out.push_str(&format!("<p class=\"soft\">{}</p>", about.join(" · ")));
    }
    out
}

/// The command line in shell syntax, with the program's folder removed.
fn shell_quoted(command: &[String]) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "_-./=:,@%+".contains(c);
    let word = |(at, word): (usize, &String)| {
        let word = if at == 0 { word.rsplit('/').next().unwrap_or(word) } else { word };
        if !word.is_empty() && word.chars().all(plain) {
            word.to_owned()
        } else {
            format!("'{}'", word.replace('\'', r"'\''"))
        }
    };
    command.iter().enumerate().map(word).collect::<Vec<_>>().join(" ")
}

fn failures(run: &RunData, study: &Study) -> String {
    let mut out = String::new();
    for instance in &run.instances {
        let result = run.result(instance);
        if let Some(error) = &result.error {
            out.push_str(&format!(
                "<h3 class=\"bad\">{} failed</h3><p>{}</p>",
                escape(&instance.name),
                escape(&error.to_string())
            ));
            if !result.tail.is_empty() {
                out.push_str(&format!("<pre>{}</pre>", escape(&result.tail.join("\n"))));
            }
        }
        if result.state == InstanceState::Interrupted {
            out.push_str(&format!("<p class=\"cannot-tell\">{}</p>", escape(&interrupted(run, instance, &result))));
        }
    }
    for (evaluation, why) in &study.unreadable {
        out.push_str(&format!(
            "<p class=\"bad\">{} is left out, since it cannot be read; running again repeats the evaluation: {}</p>",
            escape(evaluation),
            escape(why)
        ));
    }
    for (stage, message) in &run.warnings {
        let stage = stage.as_deref().map(|s| format!("{}: ", escape(s))).unwrap_or_default();
        out.push_str(&format!("<p class=\"cannot-tell\">warning: {stage}{}</p>", escape(message)));
    }
    out
}

/// The progress of a stage that was started and did not end.
fn interrupted(run: &RunData, instance: &Instance, result: &InstanceResult) -> String {
    let seconds = result.started.map_or(0.0, |started| run.last_event - started);
    let reached = result
        .progress
        .as_ref()
        .map_or_else(String::new, |(done, total, unit)| format!(", at {done} of {total} {unit}"));
    format!("{} was interrupted after {seconds:.0} s{reached}", instance.name)
}

/// The first posts of each arm's first seed: the post once, then each arm's last summary.
fn examples(study: &Study) -> String {
    let mut posts: BTreeMap<&str, (&str, &str, Vec<Vec<String>>)> = BTreeMap::new();
    for arm in &study.arms {
        let Some(run) = arm.runs.first() else { continue };
        for example in &run.examples {
            let entry = posts.entry(&example.post_id).or_insert((
                example.prompt.as_str(),
                example.reference.as_str(),
                Vec::new(),
            ));
            let start = example.step == 0;
            let last = example.step == run.about.final_step;
            // Every arm starts from the same SFT sample, so it is shown once.
            if last || (start && entry.2.is_empty()) {
                entry.2.push(vec![
                    escape(if start { "SFT" } else { &arm.label }),
                    format!("<div class=\"long\">{}</div>", escape(&example.text)),
                    format!("{:+.2}", example.gold),
                    format!("{:+.2}", example.proxy),
                    example.quality.map_or_else(|| "–".into(), |q| format!("{q:.2}")),
                ]);
            }
        }
    }
    posts
        .into_values()
        .map(|(prompt, reference, rows)| {
            format!(
                "<pre>{}</pre><p class=\"soft\">reference: {}</p>{}",
                escape(prompt),
                escape(reference),
                table(&["arm at its end", "summary", "gold", "proxy", "true quality"], 2, &rows)
            )
        })
        .collect()
}

fn stages_table(run: &RunData) -> String {
    let results: Vec<(&Instance, InstanceResult)> =
        run.instances.iter().map(|instance| (instance, run.result(instance))).collect();
    let rows: Vec<Vec<String>> = results
        .iter()
        .map(|(instance, result)| {
            let spent: Vec<String> = result.spent.iter().map(|(what, s)| format!("{what} {s:.1} s")).collect();
            let place = run.relative_folder(instance).map(|place| escape(&place));
            let [seconds, peak] = cost(result);
            vec![
                escape(&instance.name),
                escape(&instance.kind),
                result.state.word().to_owned(),
                format!(
                    "<span class=\"key\" title=\"{0}\">{1}</span>",
                    result.key.map_or_else(String::new, |k| k.to_string()),
                    result.key.map_or_else(String::new, |k| k.short())
                ),
                place.map_or_else(String::new, |place| {
                    format!("<code class=\"place\" title=\"{place}\">{place}</code>")
                }),
                if spent.is_empty() {
                    String::new()
                } else {
                    format!("<div class=\"long\">{}</div>", escape(&spent.join(", ")))
                },
                seconds,
                peak,
            ]
        })
        .collect();
    let head = ["stage", "kind", "state", "key", "artifact", "time spent on", "seconds", "peak MiB"];
    let mut notes =
        "Artifacts lie below the store's folder; <code>temper path PIPELINE STAGE</code> prints a whole path."
            .to_owned();
    let earlier = results.iter().filter_map(|(_, result)| result.earlier.as_ref().map(|earlier| earlier.seconds));
    if earlier.clone().next().is_some() {
        let sum: f64 = earlier.sum();
        notes.push_str(&format!(" * In the earlier run that made what was reused: {sum:.0} s in all."));
    }
    format!("{}<p class=\"soft\">{notes}</p>", table(&head, 6, &rows))
}

/// Seconds and peak memory; for a reused stage those of the attempt that made it, marked.
fn cost(result: &InstanceResult) -> [String; 2] {
    let mebibytes = |bytes: u64| if bytes > 0 { (bytes >> 20).to_string() } else { String::new() };
    match &result.earlier {
        Some(earlier) => {
            let marked = |text: String| {
                let run = escape(&earlier.run);
                if text.is_empty() {
                    text
                } else {
                    format!("<span class=\"soft\" title=\"in run {run}\">{text}*</span>")
                }
            };
            [marked(format!("{:.1}", earlier.seconds)), marked(mebibytes(earlier.peak_bytes))]
        }
        None => [result.seconds.map_or_else(String::new, |s| format!("{s:.1}")), mebibytes(result.peak_bytes)],
    }
}

/// The costs of each stage in this run, including failed ones; empty if nothing was paid.
fn paid_table(run: &RunData) -> String {
    let paid = run.instances.iter().map(|instance| (instance, run.result(instance).paid));
    let rows: Vec<Vec<String>> = paid
        .filter(|(_, paid)| paid.requests > 0)
        .map(|(instance, paid)| {
            vec![
                escape(&instance.name),
                paid.requests.to_string(),
                paid.input_tokens.to_string(),
                paid.output_tokens.to_string(),
                paid.dollars.map_or_else(|| "no price known".to_owned(), |dollars| format!("${dollars:.4}")),
            ]
        })
        .collect();
    if rows.is_empty() {
        return String::new();
    }
    table(&["stage", "requests", "input tokens", "output tokens", "cost"], 1, &rows)
}

/// The seeds used to choose settings and the reported seeds, of PPO and of the study. Warns of a seed on both lists.
fn seeds(study: &Study) -> String {
    let warning =
        study.tuning_overlap().map_or_else(String::new, |warning_text| format!("<p class=\"bad\">{warning_text}</p>"));
    let (tuning, reported) = (list(&study.tuning), list(&study.seeds()));
    let own = study.seed.map_or_else(|| "not recorded by this run".to_owned(), |seed| seed.to_string());
    if study.arms.is_empty() && study.tuning.is_empty() {
        return format!("<p>The pipeline's own seed: {own}.</p>");
    }
    let redrawn_stages = study.redrawn_stages().map(|(redrawn_stages, _)| redrawn_stages).unwrap_or_default();
    let drawn =
        if redrawn_stages.is_empty() { "RL".to_owned() } else { format!("{} and RL", redrawn_stages.join(", ")) };
    format!(
        "<p>Settings were chosen on seeds: {tuning}. Reported here: {reported}, which draw {drawn}; the pipeline's own, {own}, \
         draws the rest.</p>{warning}"
    )
}

/// Each parameter that differs from the paper's, once per stage, then other differences of the run from the paper, the
/// pipeline file's own notes, and our readings.
fn deviations(run: &RunData) -> String {
    let mut rows: Vec<Vec<String>> = Vec::new();
    for instance in &run.instances {
        for d in paper::deviations(&instance.kind, &instance.params) {
            let row = vec![escape(instance.stage()), escape(d.parameter), escape(&d.paper), escape(&d.here)];
            if !rows.contains(&row) {
                rows.push(row);
            }
        }
    }
    let held = paper::notes(&run.held());
    let own = run.settings.deviations.iter().map(String::as_str);
    let is_held = |kind: &str| run.instances.iter().any(|instance| instance.kind == kind);
    let readings = paper::READINGS.iter().filter(|(kind, _)| is_held(kind)).map(|(_, note)| *note);
    let notes: String = held
        .iter()
        .map(String::as_str)
        .chain(own)
        .chain(readings)
        .map(|note| format!("<li>{}</li>", escape(note)))
        .collect();
    format!("{}<ul>{notes}</ul>", table(&["stage", "parameter", "paper", "here"], 4, &rows))
}

#[cfg(test)]
mod tests {
    use engine::error::Result;
    use engine::journal::Event;

    use super::super::load::EarlierAttempt;
    use super::super::load::tests::{run, skipped, started};
    use super::*;

    fn rendered(run: &RunData) -> String {
        render(run, &Study::gather(run), &[])
    }

    #[test]
    fn the_header_says_what_ran_when_and_how() -> Result<()> {
        let command = ["/usr/bin/temper", "run", "a b.yaml", "--set", "stages.a.with.name='x'"];
        let event = Event::Started {
            run: "1".into(),
            pipeline: "test".into(),
            profiles: vec!["paper".into()],
            targets: Vec::new(),
            folder: std::path::PathBuf::new(),
            command: command.map(str::to_owned).to_vec(),
            file: Some("a b.yaml".into()),
        };
        let run = run(&[("a", "sft")], &[event])?;
        let html = rendered(&run);
        assert!(html.contains(&utc(run.started)), "{html}");
        let typed = r"temper run 'a b.yaml' --set 'stages.a.with.name='\''x'\'''";
        assert_eq!(shell_quoted(&run.command), typed);
        assert!(html.contains(&format!("command <code>{}</code>", escape(typed))), "{html}");
        assert!(
            html.contains("file <code>a b.yaml</code> · profiles paper")
                && html.contains("still running, or was killed")
        );
        assert!(html.contains("<a href=\"#stages\">Stages</a>") && html.contains("<section id=\"stages\">"));
        Ok(())
    }

    #[test]
    fn an_interrupted_stage_shows_its_progress() -> Result<()> {
        let progress = Event::Progress { stage: "a".into(), done: 3, total: 9, unit: "steps".into(), headline: None };
        let run =
            run(&[("a", "sft"), ("b", "sft")], &[started("a"), progress, skipped("a", None), skipped("b", None)])?;
        let html = rendered(&run);
        assert!(html.contains("a was interrupted after 0 s, at 3 of 9 steps"), "{html}");
        assert!(html.contains("2 stages: 0 ran, 1 interrupted, 1 skipped"), "{html}");
        assert!(html.contains("<td>interrupted</td>") && html.contains("class=\"bar interrupted\""), "{html}");
        Ok(())
    }

    #[test]
    fn a_reused_stage_shows_what_it_cost_when_it_ran() {
        let earlier = Some(EarlierAttempt { run: "r1".into(), seconds: 12.34, peak_bytes: 5 << 20 });
        let shown = |text: &str| format!("<span class=\"soft\" title=\"in run r1\">{text}*</span>");
        assert_eq!(cost(&InstanceResult { earlier, ..InstanceResult::default() }), [shown("12.3"), shown("5")]);
        let old = Some(EarlierAttempt { run: "r1".into(), seconds: 1.0, peak_bytes: 0 });
        assert_eq!(cost(&InstanceResult { earlier: old, ..InstanceResult::default() }), [shown("1.0"), String::new()]);
        assert_eq!(
            cost(&InstanceResult { seconds: Some(2.0), peak_bytes: 3 << 20, ..InstanceResult::default() }),
            ["2.0", "3"]
        );
    }

    #[test]
    fn deviations_from_the_paper_stand_where_the_paper_is_studied() -> Result<()> {
        let heading = "<h2>Deviations from the paper</h2>";
        let plain = run(&[("a", "sft"), ("r", "rl.ppo")], &[])?;
        assert!(!rendered(&plain).contains(heading));
        assert!(rendered(&run(&[("e", "reward.ensemble"), ("r", "rl.ppo")], &[])?).contains(heading));
        let mut own = plain;
        own.settings.deviations.push("shorter".to_owned());
        assert!(rendered(&own).contains(heading));
        Ok(())
    }
}
