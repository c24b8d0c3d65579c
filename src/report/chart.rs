//! Line charts as SVG with their data; they follow the page's light or dark theme.

use std::collections::BTreeMap;

use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::html::{csv, escape};

/// One line: `(x, y)` in drawing order; points that are not finite are skipped.
#[derive(Clone, Debug)]
pub struct ChartLine {
    /// Name of the line in the chart's data.
    pub name: String,
    pub points: Vec<(f64, f64)>,
    /// Index of the line's look (colour and dashes); different indices look different.
    pub style: usize,
    /// Thin lines are single seeds, thick ones their mean.
    pub thin: bool,
}

#[derive(Clone, Debug)]
pub struct Chart {
    pub title: String,
    pub x: String,
    pub y: String,
    pub lines: Vec<ChartLine>,
}

impl Chart {
    /// Whether the chart has no points.
    pub fn is_empty(&self) -> bool {
        self.lines.iter().all(|line| line.points.is_empty())
    }
}

pub const COLOURS: usize = 8;
/// Colours that are readable on light and dark paper; the page names them beside the arms. Beyond the last colour they
/// repeat with dashes.
const PALETTE: [RGBColor; COLOURS] = [
    RGBColor(214, 69, 65),
    RGBColor(46, 134, 222),
    RGBColor(201, 121, 10),
    RGBColor(39, 157, 104),
    RGBColor(142, 92, 199),
    RGBColor(20, 160, 170),
    RGBColor(200, 84, 150),
    RGBColor(128, 128, 128),
];

/// Text colour in the drawing; the page's style sheet replaces it by its own.
const INK: RGBColor = RGBColor(17, 17, 17);
/// Colour of rules in the drawing; the style sheet replaces it too.
const RULE: RGBColor = RGBColor(221, 221, 221);

/// Gap between dashes, in pixels.
const GAP: u32 = 4;

/// A line's colour and dash length; `None` for a solid line.
fn line_style(n: usize) -> (RGBColor, Option<u32>) {
    let round = (n / PALETTE.len()) as u32;
    (PALETTE[n % PALETTE.len()], round.checked_sub(1).map(|again| 2 + 5 * again))
}

/// The colour of a look, as an attribute value.
pub fn colour(n: usize) -> String {
    let (RGBColor(r, g, b), _) = line_style(n);
    format!("#{r:02x}{g:02x}{b:02x}")
}

/// A short line of a look, for legends.
pub fn swatch(n: usize) -> String {
    let (_, dash) = line_style(n);
    let colour = colour(n);
    let dash = dash.map(|dash| format!(" stroke-dasharray=\"{dash} {GAP}\"")).unwrap_or_default();
    format!(
        "<svg width=\"26\" height=\"8\"><line x1=\"0\" y1=\"4\" x2=\"26\" y2=\"4\" stroke=\"{colour}\" \
         stroke-width=\"3\"{dash}/></svg>"
    )
}

/// Charts side by side, as many as fit.
pub fn figures(charts: &[Chart]) -> String {
    let figures: String = charts.iter().map(figure).collect();
    format!("<div class=\"charts\">{figures}</div>")
}

/// A chart with a link to its data.
pub fn figure(chart: &Chart) -> String {
    format!("<figure>{}{}</figure>", svg(chart), data(chart))
}

/// A legend that names the lines by look.
pub fn legend<'a>(names: impl IntoIterator<Item = &'a str>) -> String {
    let entry = |(style, name)| format!("<span>{}{}</span>", swatch(style), escape(name));
    let entries: String = names.into_iter().enumerate().map(entry).collect();
    format!("<div class=\"legend\">{entries}</div>")
}

/// A link to the chart's points; empty if it has none.
fn data(chart: &Chart) -> String {
    let row = |line: &ChartLine, &(x, y): &(f64, f64)| vec![line.name.clone(), rounded(x), rounded(y)];
    let rows: Vec<Vec<String>> =
        chart.lines.iter().flat_map(|line| line.points.iter().map(move |point| row(line, point))).collect();
    if rows.is_empty() {
        return String::new();
    }
    let name = format!("{} by {}", chart.title, chart.x);
    format!("<figcaption>{}</figcaption>", csv(&name, &["line", &chart.x, &chart.y], &rows))
}

/// Rounds to seven digits, more than a chart can show; empty if the value is not finite.
fn rounded(v: f64) -> String {
    if v.is_finite() {
        format!("{v:.6e}").parse::<f64>().map_or_else(|_| v.to_string(), |v| v.to_string())
    } else {
        String::new()
    }
}

/// `(x, y)` by step.
pub type Series = BTreeMap<i64, (f64, f64)>;

/// One line per named run of an arm and, if there are several, a thick line of their means at the steps that all runs
/// have.
pub fn arm_lines(arm: &str, style: usize, runs: &[(String, Series)]) -> Vec<ChartLine> {
    let several = runs.len() > 1;
    let single = |(name, series): &(String, Series)| {
        let points = series.values().copied().collect();
        ChartLine { name: format!("{arm}, {name}"), points, style, thin: several }
    };
    let mut lines: Vec<ChartLine> = runs.iter().map(single).collect();
    if several {
        let n = runs.len() as f64;
        let mean = |step: &i64| {
            let points: Option<Vec<(f64, f64)>> = runs.iter().map(|(_, series)| series.get(step).copied()).collect();
            let points = points?;
            Some((points.iter().map(|p| p.0).sum::<f64>() / n, points.iter().map(|p| p.1).sum::<f64>() / n))
        };
        let points = runs[0].1.keys().filter_map(mean).collect();
        lines.push(ChartLine { name: format!("{arm}, mean"), points, style, thin: false });
    }
    lines
}

/// The chart as an `<svg>` element of 460 x 300, or a sentence instead if it has no points.
pub fn svg(chart: &Chart) -> String {
    let finite = |&(x, y): &(f64, f64)| x.is_finite() && y.is_finite();
    let points: Vec<(f64, f64)> = chart.lines.iter().flat_map(|l| l.points.iter().copied()).filter(finite).collect();
    if points.is_empty() {
        return format!("<p class=\"empty\">{}: no values in this run.</p>", escape(&chart.title));
    }
    let mut out = String::new();
    // Drawing into a string fails only through a bug in the library; the report then shows the error in place of the
    // chart.
    match draw(chart, &points, &mut out) {
        Ok(()) => out,
        Err(e) => format!("<p class=\"empty\">{}: {}</p>", escape(&chart.title), escape(&e)),
    }
}

fn draw(chart: &Chart, points: &[(f64, f64)], out: &mut String) -> Result<(), String> {
    let (x, y) = (range(points.iter().map(|p| p.0)), range(points.iter().map(|p| p.1)));
    let area = SVGBackend::with_string(out, (460, 300)).into_drawing_area();
    let text = |size: u32| ("sans-serif", size).into_font().color(&INK);
    let mut context = ChartBuilder::on(&area)
        .caption(&chart.title, text(15).pos(Pos::new(HPos::Left, VPos::Top)))
        .margin(8)
        .x_label_area_size(36)
        .y_label_area_size(52)
        .build_cartesian_2d(x.0..x.1, y.0..y.1)
        .map_err(|e| e.to_string())?;
    context
        .configure_mesh()
        .x_desc(&chart.x)
        .y_desc(&chart.y)
        .x_labels(6)
        .y_labels(6)
        .x_label_formatter(&|v| number(*v))
        .y_label_formatter(&|v| number(*v))
        .label_style(text(11))
        .axis_desc_style(text(12))
        .axis_style(RULE)
        .bold_line_style(RULE)
        .light_line_style(TRANSPARENT)
        .draw()
        .map_err(|e| e.to_string())?;
    for thin in [true, false] {
        for line in chart.lines.iter().filter(|l| l.thin == thin) {
            let (colour, dash) = line_style(line.style);
            let style = if thin { colour.mix(0.35).stroke_width(1) } else { colour.stroke_width(2) };
            let finite = line.points.iter().copied().filter(|(x, y)| x.is_finite() && y.is_finite());
            match dash {
                None => context.draw_series(LineSeries::new(finite, style)).map(drop),
                Some(dash) => context.draw_series(DashedLineSeries::new(finite, dash, GAP, style)).map(drop),
            }
            .map_err(|e| e.to_string())?;
        }
    }
    area.present().map_err(|e| e.to_string())
}

/// The range of the values extended by a twentieth on each side; a range of width 1 around a single value.
fn range(values: impl Iterator<Item = f64>) -> (f64, f64) {
    let (low, high) = values.fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), v| (l.min(v), h.max(v)));
    if high - low < 1e-12 { (low - 0.5, high + 0.5) } else { (low - (high - low) / 20.0, high + (high - low) / 20.0) }
}

pub fn number(v: f64) -> String {
    let v = if v.abs() < 1e-12 { 0.0 } else { v };
    if v.abs() >= 1000.0 || (v != 0.0 && v.abs() < 0.001) {
        format!("{v:.0e}")
    } else {
        let text = format!("{v:.3}");
        text.trim_end_matches('0').trim_end_matches('.').to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chart_without_points_says_so() {
        let chart = Chart { title: "gold <b>".into(), x: "x".into(), y: "y".into(), lines: Vec::new() };
        assert_eq!(svg(&chart), "<p class=\"empty\">gold &lt;b&gt;: no values in this run.</p>");
    }

    #[test]
    fn missing_values_are_skipped() {
        let line = ChartLine {
            name: "a".into(),
            points: vec![(0.0, 1.0), (1.0, f64::NAN), (2.0, 3.0)],
            style: 1,
            thin: false,
        };
        let text = svg(&Chart { title: "t".into(), x: "x".into(), y: "y".into(), lines: vec![line] });
        assert!(text.starts_with("<svg") && text.contains("polyline") && !text.contains("NaN"), "{text}");
    }

    /// WCAG contrast of two colours.
    fn contrast(a: RGBColor, b: RGBColor) -> f64 {
        let luminance = |RGBColor(r, g, b): RGBColor| {
            let linear = |v: u8| {
                let v = f64::from(v) / 255.0;
                if v <= 0.04045 { v / 12.92 } else { ((v + 0.055) / 1.055).powf(2.4) }
            };
            0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b)
        };
        let (a, b) = (luminance(a) + 0.05, luminance(b) + 0.05);
        a.max(b) / a.min(b)
    }

    #[test]
    fn line_colours_have_contrast_on_light_and_dark_backgrounds() {
        for colour in PALETTE {
            for paper in [RGBColor(0xfd, 0xfd, 0xfc), RGBColor(0x17, 0x18, 0x1a)] {
                assert!(contrast(colour, paper) >= 3.0, "{colour:?} on {paper:?}: {:.2}", contrast(colour, paper));
            }
        }
    }

    #[test]
    fn no_two_of_many_arms_look_alike() {
        let mut swatches: Vec<String> = (0..32).map(swatch).collect();
        swatches.sort();
        swatches.dedup();
        assert_eq!(swatches.len(), 32);
        let line = |style| ChartLine { name: "a".into(), points: vec![(0.0, 0.0), (1.0, 1.0)], style, thin: false };
        let drawn = |style| svg(&Chart { title: "t".into(), x: "x".into(), y: "y".into(), lines: vec![line(style)] });
        assert_ne!(drawn(0), drawn(PALETTE.len()));
    }

    #[test]
    fn a_figure_links_to_its_data() {
        let runs = [
            ("1".to_owned(), Series::from([(0, (0.0, 1.0)), (1, (1.0, 2.0))])),
            ("2".to_owned(), Series::from([(0, (0.0, 2.0))])),
        ];
        let lines = arm_lines("mean", 0, &runs);
        let html = figures(&[Chart { title: "proxy".into(), x: "phase".into(), y: "proxy".into(), lines }]);
        let data = "line,phase,proxy%0D%0A%22mean,%201%22,0,1%0D%0A%22mean,%201%22,1,2%0D%0A%22mean,%202%22,0,2%0D%0A\
                    %22mean,%20mean%22,0,1.5%0D%0A";
        assert!(
            html.contains(&format!("download=\"proxy-by-phase.csv\" href=\"data:text/csv;charset=utf-8,{data}\"")),
            "{html}"
        );
        assert_eq!([1.0 / 3.0, 1e-7, f64::NAN].map(rounded), ["0.3333333", "0.0000001", ""]);
    }

    #[test]
    fn numbers_are_short() {
        assert_eq!([0.0, 0.25, 12.0, 50_000.0].map(number), ["0", "0.25", "12", "5e4"]);
    }
}
