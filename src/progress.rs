//! Progress output of a run: bars on a terminal, lines elsewhere, or JSON.

use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use engine::context::ApiUsage;
use engine::journal::Event;
use engine::text::escape_controls;
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

use crate::output;

/// Interval between progress lines of a stage when there is no terminal.
const PLAIN_INTERVAL: Duration = Duration::from_secs(15);
/// Used in place of a stage's name, which cannot contain a space: transfers from and to the remote store.
const REMOTE: &str = "remote store";

pub struct Progress {
    mode: OutputMode,
    state: Mutex<ProgressState>,
}

enum OutputMode {
    Json,
    Plain,
    Bars(MultiProgress),
}

#[derive(Default)]
struct ProgressState {
    bars: BTreeMap<String, ProgressBar>,
    last_line: BTreeMap<String, Instant>,
    /// Each stage's first reported progress and its time.
    since: BTreeMap<String, (u64, Instant)>,
    paid: BTreeMap<String, ApiUsage>,
    /// Number of stages left to run by the plan.
    open: usize,
    done: usize,
    reused: usize,
}

impl Progress {
    pub fn new(as_json: bool) -> Self {
        let mode = if as_json {
            OutputMode::Json
        } else if std::io::stderr().is_terminal() {
            OutputMode::Bars(MultiProgress::new())
        } else {
            OutputMode::Plain
        };
        Self { mode, state: Mutex::default() }
    }

    pub fn handle(&self, event: &Event) {
        if let OutputMode::Json = self.mode {
            // Events are plain data. A failure to serialise would be a bug that the journal has already reported.
            if let Ok(line) = output::json(event) {
                outln!("{line}");
            }
            return;
        }
        // No code panics while it holds this lock.
        let mut state = self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        self.show(event, &mut state);
    }

    /// Removes the bars.
    pub fn end(&self) {
        if let OutputMode::Bars(bars) = &self.mode {
            // Ignore a terminal that cannot be cleared.
            let _ = bars.clear();
        }
    }

    fn show(&self, event: &Event, state: &mut ProgressState) {
        match event {
            Event::Planned { stages } => {
                use engine::journal::PlannedAction::Reuse;
                state.open = stages.iter().filter(|s| s.action != Reuse).count();
                state.done = 0;
                if state.open > 0 {
                    self.line(&format!(
                        "{} stages: {} to run or pending, {} reused",
                        stages.len(),
                        state.open,
                        stages.len() - state.open
                    ));
                }
            }
            Event::StageStarted { stage, threads, .. } => {
                state.since.remove(stage);
                match &self.mode {
                    OutputMode::Bars(bars) => {
                        let bar = bars.add(ProgressBar::new(0));
                        bar.set_style(style("{spinner} {prefix:<22} {elapsed:>5} {wide_msg}"));
                        bar.set_prefix(stage.clone());
                        bar.enable_steady_tick(Duration::from_millis(200));
                        state.bars.insert(stage.clone(), bar);
                    }
                    _ => self
                        .line(&format!("{stage}: started on {threads} thread{}", if *threads == 1 { "" } else { "s" })),
                }
            }
            Event::Progress { stage, done, total, unit, headline } => {
                let mut headline =
                    headline.as_ref().map_or_else(String::new, |(name, value)| format!("  {name} {value:.3}"));
                if let Some(paid) = state.paid.get(stage) {
                    headline += &usage_text(paid);
                }
                let (first_done, at) = *state.since.entry(stage.clone()).or_insert((*done, Instant::now()));
                if let Some(bar) = state.bars.get(stage) {
                    if bar.length() != Some(*total) {
                        bar.set_length(*total);
                        bar.set_style(style(
                            "{spinner} {prefix:<22} {elapsed:>5} {bar:20} {pos}/{len} {msg}  {per_sec}, {eta} left",
                        ));
                    }
                    bar.set_position(*done);
                    bar.set_message(escape_controls(&format!("{unit}{headline}")).into_owned());
                } else if state.last_line.get(stage).is_none_or(|t| t.elapsed() >= PLAIN_INTERVAL) {
                    state.last_line.insert(stage.clone(), Instant::now());
                    let rate_and_eta =
                        rate_and_eta(done.saturating_sub(first_done), total.saturating_sub(*done), at.elapsed());
                    self.line(&format!("{stage}: {done}/{total} {unit}{headline}{rate_and_eta}"));
                }
            }
            Event::Paid { stage, paid } => state.paid.entry(stage.clone()).or_default().add(*paid),
            Event::Resumed { stage, done, total, unit } => {
                if let Some(bar) = state.bars.get(stage) {
                    // Progress of an earlier attempt says nothing about the speed of this one.
                    bar.set_position(*done);
                    bar.reset_eta();
                }
                self.line(&format!("{stage}: resumed after {done} of {total} {unit}"));
            }
            Event::StageFinished { stage, seconds, .. } => {
                state.done += 1;
                self.clear(stage, state);
                self.line(&format!("{stage}: done in {seconds:.1} s ({}/{})", state.done, state.open));
            }
            Event::StageReused { stage, cutoff, .. } => {
                if *cutoff {
                    state.done += 1;
                    self.clear(stage, state);
                    self.line(&format!("{stage}: reused ({}/{})", state.done, state.open));
                } else {
                    state.reused += 1;
                }
            }
            Event::StageFailed { stage, error, .. } => {
                self.clear(stage, state);
                self.line(&format!("{stage}: failed: {}", error.message));
            }
            Event::StageSkipped { stage, because } => {
                self.line(&match because {
                    Some(because) => format!("{stage}: skipped because {because} failed"),
                    None => format!("{stage}: not run"),
                });
            }
            Event::Waiting { stage, holder, .. } => self.line(&format!("{stage}: waiting for {holder}")),
            Event::Retrying { stage, error, seconds, .. } => {
                self.line(&format!("{stage}: {}; retrying in {seconds:.0} s", error.message));
            }
            Event::Warning { stage, message } => {
                let stage = stage.as_ref().map_or_else(String::new, |s| format!("{s}: "));
                self.line(&format!("{stage}warning: {message}"));
            }
            Event::Transfer { upload, bytes, total_bytes } => match &self.mode {
                OutputMode::Bars(bars) => {
                    let bar = state.bars.entry(REMOTE.to_owned()).or_insert_with(|| {
                        let bar = bars.add(ProgressBar::new(0));
                        bar.set_style(style("{spinner} {prefix:<22} {elapsed:>5} {bar:20} {msg}"));
                        bar.set_prefix(if *upload { "uploading" } else { "fetching" });
                        bar
                    });
                    bar.set_length(*total_bytes);
                    bar.set_position(*bytes);
                    bar.set_message(format!("{} of {}", size(*bytes), size(*total_bytes)));
                }
                _ if state.last_line.get(REMOTE).is_none_or(|t| t.elapsed() >= PLAIN_INTERVAL) => {
                    state.last_line.insert(REMOTE.to_owned(), Instant::now());
                    let what = if *upload { "uploading" } else { "fetching" };
                    self.line(&format!("remote: {what}, {} of {}", size(*bytes), size(*total_bytes)));
                }
                _ => {}
            },
            Event::Transferred { upload, records, files, bytes, seconds } => {
                self.clear(REMOTE, state);
                let what = if *upload { "uploaded" } else { "fetched" };
                let things = if *upload { "files" } else { "artifacts" };
                self.line(&format!(
                    "remote: {what} {records} records, {files} {things}, {} in {seconds:.1} s",
                    size(*bytes)
                ));
            }
            Event::Started { .. } | Event::Timing { .. } | Event::Checkpoint { .. } | Event::Finished { .. } => {}
        }
    }

    fn clear(&self, stage: &str, state: &mut ProgressState) {
        if let Some(bar) = state.bars.remove(stage) {
            bar.finish_and_clear();
        }
    }

    fn line(&self, text: &str) {
        match &self.mode {
            // A line that cannot be drawn is dropped; the journal has it.
            OutputMode::Bars(bars) => {
                let _ = bars.println(escape_controls(text));
            }
            _ => errln!("{text}"),
        }
    }
}

/// Tokens and money spent so far.
fn usage_text(paid: &ApiUsage) -> String {
    let money = paid.dollars.map_or_else(String::new, |dollars| format!(", ${dollars:.4}"));
    format!("  {} tokens in, {} out{money}", paid.input_tokens, paid.output_tokens)
}

/// A number of bytes with its unit.
pub fn size(bytes: u64) -> String {
    match bytes {
        0..1_000 => format!("{bytes} B"),
        1_000..1_000_000 => format!("{:.1} kB", bytes as f64 / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1} MB", bytes as f64 / 1e6),
        _ => format!("{:.1} GB", bytes as f64 / 1e9),
    }
}

/// The rate and the remaining time; empty before any progress.
fn rate_and_eta(done: u64, left: u64, elapsed: Duration) -> String {
    let rate = done as f64 / elapsed.as_secs_f64().max(1e-9);
    match done {
        0 => String::new(),
        _ => format!("  {rate:.1}/s, {:.0} s left", left as f64 / rate),
    }
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}
