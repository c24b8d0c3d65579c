//! Two hand-drawn SVG figures: a forest plot of paired differences, and arms as points of quality against KL.

use super::chart::{COLOURS, colour, number};
use super::html::escape;
use super::inference::Test;

const WIDTH: f64 = 760.0;
/// Width of the labels on the left.
const LABELS: f64 = 300.0;
const ROW: f64 = 24.0;
const BOTTOM: f64 = 40.0;

/// One row per test with its mean, its interval if there is one, and each seed's difference; a line marks zero. The
/// band shows the A/A differences of two equal arms: their interval or, with few seeds, their range.
pub fn forest(title: &str, tests: &[&Test], noise: &[&Test]) -> String {
    let band = noise.iter().map(|test| test.interval.unwrap_or_else(|| span(test.seeds.iter().map(|s| s.1))));
    let band = band.reduce(|a, b| (a.0.min(b.0), a.1.max(b.1)));
    let rows: Vec<&Test> = tests.iter().chain(noise).copied().collect();
    let values = rows.iter().flat_map(|test| {
        let interval = test.interval.into_iter().flat_map(|(low, high)| [low, high]);
        test.seeds.iter().map(|s| s.1).chain(interval)
    });
    let (low, high) = span(values.chain([0.0]));
    if rows.is_empty() || high <= low {
        return String::new();
    }
    let margin = (high - low) / 20.0;
    let (low, high) = (low - margin, high + margin);
    let x = |value: f64| LABELS + (value - low) / (high - low) * (WIDTH - LABELS - 10.0);
    let bottom = ROW * (rows.len() as f64 + 1.0);
    let mut out = String::new();
    if let Some((a, b)) = band {
        out.push_str(&rectangle(x(a), ROW, x(b) - x(a), bottom - ROW));
    }
    out.push_str(&rule(x(0.0), ROW, x(0.0), bottom));
    for (row, test) in rows.iter().enumerate() {
        let y = ROW * (row as f64 + 1.5);
        out.push_str(&label(LABELS - 8.0, y + 4.0, "end", &test.label));
        if let Some((a, b)) = test.interval {
            out.push_str(&format!(
                "<line x1=\"{:.1}\" y1=\"{y}\" x2=\"{:.1}\" y2=\"{y}\" stroke=\"#111111\" stroke-width=\"2\"/>",
                x(a),
                x(b)
            ));
        }
        for (seed, value) in &test.seeds {
            let tooltip = format!("seed {seed}: {value:+.3}");
            out.push_str(&dot(x(*value), y, 2.5, "#888888", 0.7, &tooltip));
        }
        let tooltip = format!("mean {:+.3}", test.mean);
        out.push_str(&dot(x(test.mean), y, 5.0, &colour(1), 1.0, &tooltip));
    }
    out.push_str(&axis(&x, low, high, bottom));
    figure(title, bottom + BOTTOM, &out)
}

/// An arm as a point of KL and outcome: its mean over seeds, and the seeds.
pub struct ArmPoint {
    pub label: String,
    pub style: usize,
    pub mean: (f64, f64),
    pub seeds: Vec<(f64, f64)>,
    /// Whether the frontier passes through the arm.
    pub on_frontier: bool,
}

/// Outcome against sqrt(KL): every arm as a point, the fixed lambdas connected, and the trajectories in `paths` over
/// their steps.
pub fn frontier(title: &str, y_title: &str, places: &[ArmPoint], paths: &[(usize, Vec<(f64, f64)>)]) -> String {
    const HEIGHT: f64 = 360.0;
    const LEFT: f64 = 60.0;
    let root = |kl: f64| kl.max(0.0).sqrt();
    let all = || {
        let points = places.iter().flat_map(|place| place.seeds.iter().chain([&place.mean]));
        points.chain(paths.iter().flat_map(|(_, path)| path)).copied().filter(|(kl, y)| kl.is_finite() && y.is_finite())
    };
    let ((low, high), (bottom, top)) = (span(all().map(|p| root(p.0))), span(all().map(|p| p.1)));
    if high <= low || top <= bottom {
        return String::new();
    }
    let (mx, my) = ((high - low) / 20.0, (top - bottom) / 20.0);
    let (low, high, bottom, top) = (low - mx, high + mx, bottom - my, top + my);
    let x = |d: f64| LEFT + (d - low) / (high - low) * (WIDTH - LEFT - 170.0);
    let y = |v: f64| ROW + (top - v) / (top - bottom) * (HEIGHT - ROW);
    let at = |(kl, v): (f64, f64)| (x(root(kl)), y(v));
    let line = |points: &[(f64, f64)], style: &str| {
        let points: Vec<String> = points
            .iter()
            .map(|p| {
                let (x, y) = at(*p);
                format!("{x:.1},{y:.1}")
            })
            .collect();
        format!("<polyline points=\"{}\" fill=\"none\" {style}/>", points.join(" "))
    };
    let mut out = String::new();
    for step in ticks(bottom, top) {
        out.push_str(&rule(LEFT, y(step), x(high), y(step)));
        out.push_str(&label(LEFT - 6.0, y(step) + 4.0, "end", &number(step)));
    }
    let mut fixed: Vec<(f64, f64)> = places.iter().filter(|place| place.on_frontier).map(|place| place.mean).collect();
    fixed.sort_by(|a, b| a.0.total_cmp(&b.0));
    out.push_str(&line(&fixed, "stroke=\"#111111\" stroke-width=\"1.5\" stroke-dasharray=\"5 4\""));
    for (style, path) in paths {
        out.push_str(&line(path, &format!("stroke=\"{}\" stroke-width=\"1.5\"", colour(*style))));
    }
    for place in places {
        for seed in &place.seeds {
            let (x, y) = at(*seed);
            out.push_str(&dot(x, y, 2.5, &colour(place.style), 0.45, &place.label));
        }
    }
    for (i, place) in places.iter().enumerate() {
        let (px, py) = at(place.mean);
        let legend = ROW * (i as f64 * 0.75 + 1.0);
        out.push_str(&mark(px, py, place));
        out.push_str(&mark(WIDTH - 155.0, legend, place));
        out.push_str(&label(WIDTH - 146.0, legend + 4.0, "start", &place.label));
    }
    out.push_str(&axis(&x, low, high, HEIGHT));
    out.push_str(&label(x(high), HEIGHT + 34.0, "end", "sqrt(KL)"));
    out.push_str(&label(LEFT, ROW - 8.0, "start", y_title));
    figure(title, (HEIGHT + BOTTOM).max(ROW * (places.len() as f64 * 0.75 + 1.0)), &out)
}

fn figure(title: &str, height: f64, content: &str) -> String {
    format!(
        "<figure class=\"wide\"><svg viewBox=\"0 0 {WIDTH} {height:.0}\" width=\"{WIDTH}\" height=\"{height:.0}\" role=\"img\" \
         font-size=\"12\" aria-label=\"{0}\"><title>{0}</title>{content}</svg></figure>",
        escape(title)
    )
}

fn axis(x: &dyn Fn(f64) -> f64, low: f64, high: f64, y: f64) -> String {
    let marks = ticks(low, high)
        .into_iter()
        .map(|tick| rule(x(tick), y, x(tick), y + 5.0) + &label(x(tick), y + 18.0, "middle", &number(tick)));
    rule(x(low), y, x(high), y) + &marks.collect::<String>()
}

fn span(values: impl Iterator<Item = f64>) -> (f64, f64) {
    values.filter(|v| v.is_finite()).fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), v| (l.min(v), h.max(v)))
}

/// About five round numbers within the range.
fn ticks(low: f64, high: f64) -> Vec<f64> {
    let rough = (high - low) / 5.0;
    let power = 10.0_f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0].into_iter().map(|m| m * power).find(|step| *step >= rough).unwrap_or(rough);
    let (first, last) = ((low / step).ceil() as i64, (high / step).floor() as i64);
    (first..=last).map(|i| i as f64 * step).collect()
}

fn rule(x1: f64, y1: f64, x2: f64, y2: f64) -> String {
    format!(
        "<line x1=\"{x1:.1}\" y1=\"{y1:.1}\" x2=\"{x2:.1}\" y2=\"{y2:.1}\" stroke=\"#888888\" stroke-width=\"0.6\"/>"
    )
}

fn rectangle(x: f64, y: f64, width: f64, height: f64) -> String {
    format!(
        "<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"{height:.1}\" fill=\"{}\" opacity=\"0.18\"/>",
        colour(2)
    )
}

fn dot(x: f64, y: f64, radius: f64, fill: &str, opacity: f64, tooltip: &str) -> String {
    format!(
        "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"{radius}\" fill=\"{fill}\" opacity=\"{opacity}\"><title>{}</title></circle>",
        escape(tooltip)
    )
}

/// Marks an arm's mean; a ring if the palette's colours repeat.
fn mark(x: f64, y: f64, place: &ArmPoint) -> String {
    let colour = colour(place.style);
    let fill = if (place.style / COLOURS).is_multiple_of(2) { &colour } else { "none" };
    format!(
        "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"4.5\" fill=\"{fill}\" stroke=\"{colour}\" stroke-width=\"2\"><title>{}</title></circle>",
        escape(&place.label)
    )
}

fn label(x: f64, y: f64, anchor: &str, text: &str) -> String {
    format!("<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\">{}</text>", escape(text))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn test(label: &str, values: &[f64]) -> Test {
        Test::of(label.to_owned(), values.iter().copied().enumerate().map(|(i, v)| (i as u64, v)).collect()).unwrap()
    }

    #[test]
    fn every_difference_and_the_band_are_drawn() {
        let (a, b) = (test("a − <b>", &[0.1, 0.2, 0.3, 0.1, 0.2, 0.3]), test("again − mean", &[0.01, -0.02]));
        let svg = forest("Forest", &[&a], &[&b]);
        assert_eq!(svg.matches("<circle").count(), 6 + 2 + 2);
        assert_eq!(svg.matches("<rect").count(), 1);
        assert_eq!(svg.matches("stroke-width=\"2\"").count(), 1, "the interval of six seeds alone");
        assert!(svg.contains("a − &lt;b&gt;") && !svg.contains("NaN"), "{svg}");
        assert_eq!(forest("Forest", &[], &[]), "");
    }

    #[test]
    fn every_arm_has_its_point_and_the_fixed_ones_are_connected() {
        let place = |label: &str, kl: f64, on_frontier| ArmPoint {
            label: label.to_owned(),
            style: 0,
            mean: (kl, 0.5 + kl / 100.0),
            seeds: vec![(kl, 0.5)],
            on_frontier,
        };
        let places = [place("mean", 9.0, true), place("mean-0.05", 4.0, true), place("standard", 16.0, false)];
        let svg = frontier("Frontier", "true quality", &places, &[(1, vec![(0.0, 0.5), (1.0, 0.6)])]);
        assert_eq!(svg.matches("<circle").count(), 3 * 3);
        assert_eq!(svg.matches("<polyline").count(), 2);
        assert!(!svg.contains("NaN"), "{svg}");
    }

    #[test]
    fn ticks_are_round() {
        let close = |a: Vec<f64>, b: &[f64]| a.len() == b.len() && a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-12);
        assert!(close(ticks(-0.12, 0.31), &[-0.1, 0.0, 0.1, 0.2, 0.3]));
        assert!(close(ticks(0.0, 4.4), &[0.0, 1.0, 2.0, 3.0, 4.0]));
    }
}
