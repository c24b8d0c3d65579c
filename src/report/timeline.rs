//! When each stage ran: one bar per attempt that this run started.

use std::fmt::Write as _;

use super::html::{csv, escape};
use super::load::{InstanceResult, InstanceState, RunData};

const LABELS: f64 = 190.0;
const BARS: f64 = 780.0;
/// Space for the seconds next to the longest bar.
const MARGIN: f64 = 60.0;
const ROW: f64 = 17.0;
const TOP: f64 = 18.0;

/// The timeline as SVG; empty for a run that started nothing.
pub fn timeline(run: &RunData) -> String {
    let results = run.instances.iter().map(|instance| (instance.name.as_str(), run.result(instance)));
    let mut bars: Vec<Bar<'_>> = results.filter_map(|(name, result)| Bar::of(run, name, &result)).collect();
    bars.sort_by(|a, b| a.start.total_cmp(&b.start));
    if bars.is_empty() {
        return String::new();
    }
    let rows: Vec<Vec<String>> = bars
        .iter()
        .map(|bar| {
            let ends = [bar.start, bar.end].map(|at| format!("{at:.3}"));
            [bar.name.to_owned(), bar.state.word().to_owned()].into_iter().chain(ends).collect()
        })
        .collect();
    let data = csv("timeline", &["stage", "state", "start (s)", "end (s)"], &rows);
    format!("<div class=\"wide tall\" tabindex=\"0\">{}</div>{data}", svg(&bars))
}

/// One bar; times in seconds since the run started.
struct Bar<'a> {
    name: &'a str,
    state: InstanceState,
    start: f64,
    end: f64,
}

impl<'a> Bar<'a> {
    fn of(run: &RunData, name: &'a str, result: &InstanceResult) -> Option<Self> {
        let start = result.started?;
        let end = result.ended.unwrap_or(run.last_event).max(start);
        Some(Self { name, state: result.state, start: start - run.started, end: end - run.started })
    }
}

fn svg(bars: &[Bar<'_>]) -> String {
    let last = bars.iter().map(|bar| bar.end).fold(1e-3, f64::max);
    let x = |seconds: f64| LABELS + BARS * seconds / last;
    let (width, height) = (LABELS + BARS + MARGIN, TOP + ROW * bars.len() as f64 + 4.0);
    let mut out = format!(
        "<svg class=\"graph\" role=\"img\" aria-label=\"Timeline of the stages\" viewBox=\"0 0 {width:.0} {height:.0}\" \
         width=\"{width:.0}\" height=\"{height:.0}\" font-size=\"11\">"
    );
    let step = tick(last);
    for at in (0..).map(|n| f64::from(n) * step).take_while(|at| *at <= last) {
        let _ = write!(
            out,
            "<line x1=\"{0:.1}\" y1=\"{TOP}\" x2=\"{0:.1}\" y2=\"{height:.0}\"/><text class=\"small\" x=\"{0:.1}\" y=\"11\" \
             text-anchor=\"middle\">{1} s</text>",
            x(at),
            (at * 1000.0).round() / 1000.0
        );
    }
    for (row, bar) in bars.iter().enumerate() {
        let top = TOP + ROW * row as f64;
        let class = match bar.state {
            InstanceState::Failed => " failed",
            InstanceState::Interrupted => " interrupted",
            _ => "",
        };
        let (start, end) = (bar.start, bar.end);
        let _ = write!(
            out,
            "<text x=\"{label:.0}\" y=\"{text:.1}\" text-anchor=\"end\">{name}</text>\
             <rect class=\"bar{class}\" x=\"{left:.1}\" y=\"{top:.1}\" width=\"{width:.1}\" height=\"{height:.1}\">\
             <title>{whole}, {start:.1} s to {end:.1} s</title></rect>\
             <text class=\"small\" x=\"{beside:.1}\" y=\"{text:.1}\">{seconds:.1} s</text>",
            label = LABELS - 6.0,
            name = escape(&shortened(bar.name)),
            whole = escape(bar.name),
            left = x(start),
            width = (x(end) - x(start)).max(1.5),
            top = top + 2.0,
            height = ROW - 4.0,
            beside = x(end) + 4.0,
            seconds = end - start,
            text = top + 12.0,
        );
    }
    out + "</svg>"
}

/// The name shortened to fit left of the bars.
fn shortened(name: &str) -> String {
    const FITS: usize = 28;
    if name.chars().count() <= FITS { name.to_owned() } else { name.chars().take(FITS - 1).chain(['…']).collect() }
}

/// Seconds between two ticks of an axis of `length` seconds: 1, 2 or 5 times a power of ten, at most ten ticks.
fn tick(length: f64) -> f64 {
    let least = length / 10.0;
    let power = 10f64.powf(least.log10().floor());
    [1.0, 2.0, 5.0].map(|factor| factor * power).into_iter().find(|step| *step >= least).unwrap_or(10.0 * power)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_at_most_ten() {
        assert_eq!([3.0, 10.0, 12.0, 31.0, 600.0].map(tick), [0.5, 1.0, 2.0, 5.0, 100.0]);
    }

    #[test]
    fn a_bar_spans_the_start_and_end_of_its_stage() {
        let bars = [
            Bar { name: "sft[<s>]", state: InstanceState::Ran, start: 0.0, end: 5.0 },
            Bar { name: "gold", state: InstanceState::Interrupted, start: 5.0, end: 10.0 },
        ];
        let svg = svg(&bars);
        assert!(svg.contains("<rect class=\"bar\" x=\"190.0\" y=\"20.0\" width=\"390.0\""), "{svg}");
        assert!(svg.contains("<rect class=\"bar interrupted\" x=\"580.0\" y=\"37.0\" width=\"390.0\""), "{svg}");
        assert!(svg.contains("sft[&lt;s&gt;]") && svg.contains(">5.0 s</text>"), "{svg}");
    }
}
