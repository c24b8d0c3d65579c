//! The report's page: every section of it, in order. Computes nothing.

use std::collections::BTreeMap;

use stages::paper;

use super::agreement::{self, Measured};
use super::figures::figures;
use super::graph::graph;
use super::html::{escape, page, section, table};
use super::load::{RunData, State};
use super::study::{Study, list};
use super::{answers, arms};

pub fn render(run: &RunData, study: &Study, agreement: &[Measured]) -> String {
    let mut body = header(run);
    body.push_str(&failures(run, study));
    if !study.arms.is_empty() {
        body.push_str(&section("What the study saw", &answers::section(study)));
        let note = format!(
            "<p class=\"soft\">Steps are chosen on half A of the held-out prompts; every number comes from half B. Intervals: 95% bootstrap over \
             prompts within a run; {}.</p>",
            escape(&study.gold_heading())
        );
        body.push_str(&section("Arms", &(note + &arms_table(study))));
        body.push_str(&section("Figures", &figures(study)));
        let engagement: String = arms::engagement(study).iter().map(|s| format!("<p>{}</p>", escape(s))).collect();
        let mechanism = table(&arms::MECHANISM_HEAD, 1, &escaped(arms::mechanism(study)));
        body.push_str(&section("The mechanism", &(engagement + &mechanism)));
        body.push_str(&section("Summaries (Table 1)", &examples(study)));
    }
    if !agreement.is_empty() {
        body.push_str(&section("Agreement of annotators", &agreement::section(agreement)));
    }
    body.push_str(&section("The graph", &graph(run)));
    body.push_str(&section("Stages", &stages_table(run)));
    let paid = paid_table(run);
    if !paid.is_empty() {
        body.push_str(&section("Paid requests of this run", &paid));
    }
    body.push_str(&section("Seeds", &seeds(study)));
    body.push_str(&section("Deviations from the paper", &deviations(run)));
    page(&format!("{} · {}", run.pipeline, run.id), &body)
}

/// Every mean with its interval beneath it.
fn arms_table(study: &Study) -> String {
    let head: Vec<&str> = arms::NAMED.into_iter().chain(arms::COLUMNS.iter().map(|column| column.head)).collect();
    let rows: Vec<Vec<String>> = arms::rows(study)
        .into_iter()
        .map(|row| {
            let cells = row.cells.iter().map(|cell| match cell {
                None => "–".to_owned(),
                Some(cell) => {
                    format!("{}<span class=\"interval\">{}</span>", escape(&cell.mean), escape(&cell.interval))
                }
            });
            row.named.iter().map(|name| escape(name)).chain(cells).collect()
        })
        .collect();
    table(&head, arms::TEXT, &rows)
}

fn escaped(rows: Vec<Vec<String>>) -> Vec<Vec<String>> {
    rows.into_iter().map(|row| row.iter().map(|cell| escape(cell)).collect()).collect()
}

fn header(run: &RunData) -> String {
    let count = |state: State| run.instances.iter().filter(|i| run.fate(i).state == state).count();
    let profiles = if run.profiles.is_empty() {
        String::new()
    } else {
        format!(", profiles {}", escape(&run.profiles.join(", ")))
    };
    let time = run.seconds.map_or_else(|| "not finished".to_owned(), |s| format!("{s:.0} s"));
    let cut = if run.interrupted { ", interrupted" } else { "" };
    let unreached = match count(State::NotReached) + count(State::Skipped) {
        0 => String::new(),
        n => format!(", {n} not reached or skipped"),
    };
    format!(
        "<h1>{}</h1><p class=\"soft\">run {}{profiles} · {time}{cut} · {} stages: {} ran, {} reused, {} failed{unreached}</p>",
        escape(&run.pipeline),
        escape(&run.id),
        run.instances.len(),
        count(State::Ran),
        count(State::Reused),
        count(State::Failed),
    )
}

fn failures(run: &RunData, study: &Study) -> String {
    let mut out = String::new();
    for instance in &run.instances {
        let fate = run.fate(instance);
        if let Some(error) = &fate.error {
            out.push_str(&format!(
                "<h3 class=\"bad\">{} failed</h3><p>{}</p>",
                escape(&instance.name),
                escape(&error.to_string())
            ));
            if !fate.tail.is_empty() {
                out.push_str(&format!("<pre>{}</pre>", escape(&fate.tail.join("\n"))));
            }
        }
    }
    for (evaluation, why) in &study.unread {
        out.push_str(&format!(
            "<p class=\"bad\">{} is left out, since it cannot be read; running again evaluates it anew: {}</p>",
            escape(evaluation),
            escape(why)
        ));
    }
    for (stage, message) in &run.warnings {
        let stage = stage.as_deref().map(|s| format!("{}: ", escape(s))).unwrap_or_default();
        out.push_str(&format!("<p class=\"cannot-tell\">warning: {stage}{}</p>", escape(message)));
    }
    if out.is_empty() { out } else { section("Failures and warnings", &out) }
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
            // Every arm starts from the same SFT sample: told once.
            if last || (start && entry.2.is_empty()) {
                entry.2.push(vec![
                    escape(if start { "SFT" } else { &arm.label }),
                    escape(&example.text),
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
    let rows: Vec<Vec<String>> = run
        .instances
        .iter()
        .map(|instance| {
            let fate = run.fate(instance);
            let spent: Vec<String> = fate.spent.iter().map(|(what, s)| format!("{what} {s:.1} s")).collect();
            vec![
                escape(&instance.name),
                escape(&instance.kind),
                fate.state.word().to_owned(),
                format!(
                    "<span class=\"key\" title=\"{0}\">{1}</span>",
                    fate.key.map_or_else(String::new, |k| k.to_string()),
                    fate.key.map_or_else(String::new, |k| k.short())
                ),
                escape(&spent.join(", ")),
                fate.seconds.map_or_else(String::new, |s| format!("{s:.1}")),
                if fate.peak_bytes > 0 { format!("{}", fate.peak_bytes >> 20) } else { String::new() },
            ]
        })
        .collect();
    table(&["stage", "kind", "state", "key", "time spent on", "seconds", "peak MiB"], 5, &rows)
}

/// What each stage paid for in this run, also one that failed; empty if nothing was.
fn paid_table(run: &RunData) -> String {
    let paid = run.instances.iter().map(|instance| (instance, run.fate(instance).paid));
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

/// The seeds that settings were chosen on beside those reported, of PPO and of the study; a seed on both lists is told.
fn seeds(study: &Study) -> String {
    let warning = study.flattered().map_or_else(String::new, |told| format!("<p class=\"bad\">{told}</p>"));
    let (tuning, reported) = (list(&study.tuning), list(&study.seeds()));
    let own = study.seed.map_or_else(|| "not recorded by this run".to_owned(), |seed| seed.to_string());
    format!(
        "<p>Settings were chosen on seeds: {tuning}. Reported here: of PPO {reported}; of all before it, the pipeline's own, \
         {own}.</p>{warning}"
    )
}

/// Each parameter that differs from what the paper fixes, once per stage, then what the run holds that the paper does not, the
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
