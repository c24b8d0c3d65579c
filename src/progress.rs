//! Progress output of a run: bars on a terminal, lines elsewhere, or JSON.

use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use engine::context::ApiUsage;
use engine::journal::Event;
use engine::text::escape_controls;
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

use crate::output::{self, counted};

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
    Bars {
        bars: MultiProgress,
        /// Width of the terminal.
        columns: usize,
    },
}

#[derive(Default)]
struct ProgressState {
    bars: BTreeMap<String, ProgressBar>,
    last_line: BTreeMap<String, Instant>,
    /// Where each stage's speed is measured from: its first reported progress, or the checkpoint that it resumed from.
    since: BTreeMap<String, (u64, Instant)>,
    paid: BTreeMap<String, ApiUsage>,
    /// The last progress of each stage, as text.
    reached: BTreeMap<String, String>,
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
            OutputMode::Bars { bars: MultiProgress::new(), columns: console::Term::stderr().size().1.into() }
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
        if let OutputMode::Bars { bars, .. } = &self.mode {
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
                        "{}: {} to run or pending, {} reused",
                        counted(stages.len(), "stage"),
                        state.open,
                        stages.len() - state.open
                    ));
                }
            }
            Event::StageStarted { stage, threads, .. } => {
                state.since.remove(stage);
                state.reached.remove(stage);
                match &self.mode {
                    OutputMode::Bars { bars, columns } => {
                        let bar = bars.add(ProgressBar::new(0));
                        bar.set_style(style("{spinner} {prefix} {elapsed:>5} {wide_msg}"));
                        bar.set_prefix(escape_controls(&name(stage, *columns)).into_owned());
                        bar.enable_steady_tick(Duration::from_millis(200));
                        state.bars.insert(stage.clone(), bar);
                    }
                    _ => self.line(&format!("{stage}: started on {}", counted(*threads, "thread"))),
                }
            }
            Event::Probing { executor } => {
                self.line(&format!("executor {executor}: waiting for a job that checks the shared file system"));
            }
            Event::Job { stage, executor, job, attached } => {
                let how = if *attached { "continues with" } else { "submitted as" };
                self.line(&format!("{stage}: {how} job {job} of {executor}"));
            }
            Event::Progress { stage, done, total, unit, headline } => {
                let (first_done, at) = *state.since.entry(stage.clone()).or_insert((*done, Instant::now()));
                let bar = state.bars.get(stage);
                let due = || state.last_line.get(stage).is_none_or(|t| t.elapsed() >= PLAIN_INTERVAL);
                if bar.is_none() && !due() {
                    return;
                }
                let mut text = reached(*done, *total, unit);
                text += &rate_and_eta(done.saturating_sub(first_done), total.saturating_sub(*done), at.elapsed(), unit);
                if let Some((name, value)) = headline {
                    text += &format!("  {name} {}", number(*value));
                }
                if let Some(paid) = state.paid.get(stage) {
                    text += &usage_text(paid);
                }
                state.reached.insert(stage.clone(), text.clone());
                let Some(bar) = bar else {
                    state.last_line.insert(stage.clone(), Instant::now());
                    return self.line(&format!("{stage}: {text}"));
                };
                if bar.length() != Some(*total)
                    && let OutputMode::Bars { columns, .. } = self.mode
                {
                    bar.set_length(*total);
                    let bar_or_not = if columns < WIDE { "" } else { "{bar:20} " };
                    bar.set_style(style(&format!("{{spinner}} {{prefix}} {{elapsed:>5}} {bar_or_not}{{wide_msg}}")));
                }
                bar.set_position(*done);
                bar.set_message(escape_controls(&text).into_owned());
            }
            Event::Activity { stage, what } => {
                let due = state.last_line.get(stage).is_none_or(|t| t.elapsed() >= PLAIN_INTERVAL);
                let text = match state.reached.get(stage) {
                    Some(reached) => format!("{reached}  {what}"),
                    None => what.clone(),
                };
                match state.bars.get(stage) {
                    Some(bar) => bar.set_message(escape_controls(&text).into_owned()),
                    None if due => {
                        state.last_line.insert(stage.clone(), Instant::now());
                        self.line(&format!("{stage}: {text}"));
                    }
                    None => {}
                }
            }
            Event::Paid { stage, paid } => state.paid.entry(stage.clone()).or_default().add(*paid),
            Event::Resumed { stage, done, total, unit } => {
                // The steps of an earlier attempt do not count for the speed of this one.
                state.since.insert(stage.clone(), (*done, Instant::now()));
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
                OutputMode::Bars { bars, .. } => {
                    let bar = state.bars.entry(REMOTE.to_owned()).or_insert_with(|| {
                        let bar = bars.add(ProgressBar::new(0));
                        bar.set_style(style("{spinner} {prefix:<22} {elapsed:>5} {bar:20} {msg}"));
                        bar.set_prefix(if *upload { "uploading" } else { "fetching" });
                        bar
                    });
                    bar.set_length(*total_bytes);
                    bar.set_position(*bytes);
                    bar.set_message(format!("{} of {}", size(*bytes as f64), size(*total_bytes as f64)));
                }
                _ if state.last_line.get(REMOTE).is_none_or(|t| t.elapsed() >= PLAIN_INTERVAL) => {
                    state.last_line.insert(REMOTE.to_owned(), Instant::now());
                    let what = if *upload { "uploading" } else { "fetching" };
                    self.line(&format!("remote: {what}, {} of {}", size(*bytes as f64), size(*total_bytes as f64)));
                }
                _ => {}
            },
            Event::Transferred { upload, records, files, bytes, seconds } => {
                self.clear(REMOTE, state);
                let what = if *upload { "uploaded" } else { "fetched" };
                let things = if *upload { "files" } else { "artifacts" };
                self.line(&format!(
                    "remote: {what} {records} records, {files} {things}, {} in {seconds:.1} s",
                    size(*bytes as f64)
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
            OutputMode::Bars { bars, .. } => {
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

/// Minimum width of a terminal for bars beside the text.
const WIDE: usize = 100;

/// The name at the start of a bar: padded so that the bars of several stages line up, and cut on a narrow terminal so that
/// no line is wider than the terminal.
fn name(stage: &str, columns: usize) -> String {
    let most = (columns / 2).saturating_sub(10).clamp(8, 40);
    let cut = match stage.char_indices().nth(most) {
        Some(_) => stage.chars().take(most - 1).chain(['…']).collect(),
        None => stage.to_owned(),
    };
    format!("{cut:<width$}", width = most.min(22))
}

/// `12/120 steps`, or `1.2/5.1 MB of model.safetensors`.
fn reached(done: u64, total: u64, unit: &str) -> String {
    match (unit.strip_prefix("bytes "), total) {
        (Some(of), 0) => format!("{} {of}", size(done as f64)),
        (Some(of), _) => {
            let (divisor, prefix) = scale(total as f64);
            format!("{:.1}/{:.1} {prefix}B {of}", done as f64 / divisor, total as f64 / divisor)
        }
        (None, 0) => format!("{done} {unit}"),
        (None, _) => format!("{done}/{total} {unit}"),
    }
}

/// The speed and the remaining time; empty before any progress.
fn rate_and_eta(done: u64, left: u64, elapsed: Duration, unit: &str) -> String {
    if done == 0 {
        return String::new();
    }
    let seconds_each = elapsed.as_secs_f64().max(1e-9) / done as f64;
    let speed = if unit.starts_with("bytes ") {
        format!("{}/s", size(1.0 / seconds_each))
    } else if seconds_each <= 1.0 {
        format!("{} {unit}/s", figure(1.0 / seconds_each))
    } else {
        format!("{}/{}", span(seconds_each), unit.strip_suffix('s').unwrap_or(unit))
    };
    let left = if left == 0 { String::new() } else { format!(", {} left", span(left as f64 * seconds_each)) };
    format!("  {speed}{left}")
}

/// Two digits, as far as they are needed.
fn figure(value: f64) -> String {
    if value < 9.95 { format!("{value:.1}") } else { format!("{value:.0}") }
}

fn span(seconds: f64) -> String {
    let minutes = (seconds / 60.0).round() as u64;
    match minutes {
        _ if seconds < 99.5 => format!("{} s", figure(seconds)),
        0..100 => format!("{minutes} min"),
        _ => format!("{} h {:02} min", minutes / 60, minutes % 60),
    }
}

/// A number of bytes with its unit.
pub fn size(bytes: f64) -> String {
    let (divisor, prefix) = scale(bytes);
    format!("{:.1} {prefix}B", bytes / divisor)
}

/// The divisor and its prefix for an amount.
fn scale(amount: f64) -> (f64, &'static str) {
    let scales = [(1e9, "G"), (1e6, "M"), (1e3, "k")];
    scales.into_iter().find(|(divisor, _)| amount >= *divisor).unwrap_or((1.0, ""))
}

/// A count as an integer, any other number with three decimals.
fn number(value: f64) -> String {
    if value.fract() == 0.0 { format!("{value:.0}") } else { format!("{value:.3}") }
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::sync::Arc;

    use indicatif::{ProgressDrawTarget, TermLike};

    use super::*;

    #[test]
    fn a_speed_is_told_per_second_or_per_step_whichever_is_above_one() {
        let text = |done, left, seconds| rate_and_eta(done, left, Duration::from_secs_f64(seconds), "steps");
        assert_eq!(text(0, 5, 3.0), "");
        assert_eq!(text(15_304, 120, 10_000.0), "  1.5 steps/s, 78 s left");
        assert_eq!(text(1_000, 30, 10.0), "  100 steps/s, 0.3 s left");
        assert_eq!(text(2, 3, 82.0), "  41 s/step, 2 min left");
        assert_eq!(text(2, 600, 5.0), "  2.5 s/step, 25 min left");
        assert_eq!(text(1, 100, 240.0), "  4 min/step, 6 h 40 min left");
        assert_eq!(text(4, 0, 2.0), "  2.0 steps/s");
        let bytes = rate_and_eta(5_100_000, 10_200_000, Duration::from_secs(1), "bytes of a.bin");
        assert_eq!(bytes, "  5.1 MB/s, 2.0 s left");
    }

    #[test]
    fn counts_are_integers_and_bytes_have_a_scale() {
        assert_eq!([number(12.0), number(0.5), number(-3.0), number(1e6)], ["12", "0.500", "-3", "1000000"]);
        assert_eq!(reached(3, 9, "steps"), "3/9 steps");
        assert_eq!(reached(512, 5_120_000, "bytes of a.bin"), "0.0/5.1 MB of a.bin");
        assert_eq!(
            (reached(512, 0, "bytes of a.bin"), reached(7, 0, "posts")),
            ("512.0 B of a.bin".into(), "7 posts".into())
        );
    }

    fn event(json: serde_json::Value) -> Event {
        serde_json::from_value(json).expect("an event")
    }

    fn progress(stage: &str, done: u64) -> Event {
        event(
            serde_json::json!({ "event": "progress", "stage": stage, "done": done, "total": 120, "unit": "steps", "headline": ["loss", 0.25] }),
        )
    }

    #[test]
    fn steps_of_an_earlier_attempt_do_not_count_for_the_speed() {
        let bars = MultiProgress::with_draw_target(ProgressDrawTarget::hidden());
        let all = Progress { mode: OutputMode::Bars { bars, columns: 80 }, state: Mutex::default() };
        all.handle(&event(
            serde_json::json!({ "event": "resumed", "stage": "sft", "done": 100, "total": 120, "unit": "steps" }),
        ));
        all.handle(&progress("sft", 102));
        assert_eq!(all.state.lock().unwrap().since["sft"].0, 100);
    }

    /// A terminal that notes the widest line drawn.
    #[derive(Clone, Debug)]
    struct Screen {
        columns: u16,
        widest: Arc<Mutex<(usize, String)>>,
    }

    impl Screen {
        fn note(&self, text: &str) {
            let mut widest = self.widest.lock().unwrap();
            for line in text.lines() {
                let width = console::measure_text_width(line);
                // A cleared line is filled with spaces.
                if width > widest.0 && !line.trim().is_empty() {
                    *widest = (width, line.to_owned());
                }
            }
        }
    }

    impl TermLike for Screen {
        fn width(&self) -> u16 {
            self.columns
        }

        fn move_cursor_up(&self, _: usize) -> io::Result<()> {
            Ok(())
        }

        fn move_cursor_down(&self, _: usize) -> io::Result<()> {
            Ok(())
        }

        fn move_cursor_right(&self, _: usize) -> io::Result<()> {
            Ok(())
        }

        fn move_cursor_left(&self, _: usize) -> io::Result<()> {
            Ok(())
        }

        fn write_line(&self, text: &str) -> io::Result<()> {
            self.note(text);
            Ok(())
        }

        fn write_str(&self, text: &str) -> io::Result<()> {
            self.note(text);
            Ok(())
        }

        fn clear_line(&self) -> io::Result<()> {
            Ok(())
        }

        fn flush(&self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_bar_is_never_wider_than_the_terminal() {
        for columns in [30, 60, 80, 100, 160] {
            let screen = Screen { columns, widest: Arc::default() };
            let target = ProgressDrawTarget::term_like(Box::new(screen.clone()));
            let bars = MultiProgress::with_draw_target(target);
            let all = Progress { mode: OutputMode::Bars { bars, columns: columns.into() }, state: Mutex::default() };
            let stage = "evaluate[mean-quadruple,404]";
            let key = engine::names::Key::of(b"key");
            all.handle(&event(serde_json::json!({ "event": "stage_started", "stage": stage, "key": key, "threads": 1, "attempt": "a", "log": "l" })));
            for done in [1, 60, 119] {
                all.handle(&progress(stage, done));
                std::thread::sleep(Duration::from_millis(2));
            }
            all.state.lock().unwrap().bars[stage].tick();
            let (widest, line) = screen.widest.lock().unwrap().clone();
            assert!(widest > 0 && widest <= columns.into(), "{columns}: {line:?}");
            assert!(columns < 80 || (line.contains(stage) && line.contains("/120 steps")), "{columns}: {line:?}");
        }
    }
}
