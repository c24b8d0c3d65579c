//! Draws a small graph of stages as SVG, in layers from left to right.

use std::collections::{BTreeMap, BTreeSet};

use crate::report::escape;

/// One stage of the drawing.
#[derive(Clone, Debug, Default)]
pub struct GraphNode {
    pub name: String,
    /// Names of the boxes that are its inputs.
    pub from: BTreeSet<String>,
    /// Text of the second line.
    pub note: String,
    pub ran: bool,
    pub failed: bool,
    /// Whether some of its instances were skipped or not reached.
    pub unreached: bool,
}

/// Widths of an average letter in the sizes of the two lines, with some reserve: the font is not known.
const NAME_LETTER: f64 = 7.0;
const NOTE_LETTER: f64 = 5.8;
const LEAST_WIDTH: f64 = 90.0;
const HEIGHT: f64 = 38.0;
const GAP_X: f64 = 38.0;
const GAP_Y: f64 = 14.0;
const MARGIN: f64 = 2.0;

impl GraphNode {
    /// The width in which both lines fit.
    fn width(&self) -> f64 {
        let letters = |text: &str| text.chars().count() as f64;
        let text = (letters(&self.name) * NAME_LETTER).max(letters(&self.note) * NOTE_LETTER);
        (text + 14.0).ceil().max(LEAST_WIDTH)
    }

    /// Class for the page's style sheet, and the look without one.
    fn look(&self) -> (&'static str, &'static str) {
        if self.failed {
            ("failed", "fill=\"#fbe6e3\" stroke=\"#b3261e\"")
        } else if self.unreached {
            ("unreached", "fill=\"#ffffff\" stroke=\"#999999\" stroke-dasharray=\"4 3\"")
        } else if self.ran {
            ("ran", "fill=\"#dff1e6\" stroke=\"#1d7f4e\"")
        } else {
            ("", "fill=\"#f4f4f1\" stroke=\"#999999\"")
        }
    }
}

/// Draws the boxes as one `<svg>`, each column as wide as its widest box. Inputs may come before or after their users.
pub fn layers_svg(nodes: &[GraphNode]) -> String {
    let layer = layers(nodes);
    let order = rows(nodes, &layer);
    let tallest = order.iter().map(Vec::len).max().unwrap_or(0);
    let height = tallest as f64 * (HEIGHT + GAP_Y) - GAP_Y + 2.0 * MARGIN;
    let mut position: BTreeMap<&str, (f64, f64, f64)> = BTreeMap::new();
    let mut x = MARGIN;
    for names in &order {
        let width = names.iter().map(|&i| nodes[i].width()).fold(0.0, f64::max);
        let top = (height - (names.len() as f64 * (HEIGHT + GAP_Y) - GAP_Y)) / 2.0;
        for (row, &i) in names.iter().enumerate() {
            position.insert(&nodes[i].name, (x, top + row as f64 * (HEIGHT + GAP_Y), width));
        }
        x += width + GAP_X;
    }
    let width = x - GAP_X + MARGIN;
    let mut out = format!(
        "<svg class=\"graph\" viewBox=\"0 0 {width:.0} {height:.0}\" width=\"{width:.0}\" height=\"{height:.0}\" \
         xmlns=\"http://www.w3.org/2000/svg\" font-family=\"sans-serif\" font-size=\"12\">"
    );
    for b in nodes {
        let (x, y, _) = position[b.name.as_str()];
        for from in b.from.iter().filter_map(|from| position.get(from.as_str())) {
            let (x0, y0, y1) = (from.0 + from.2, from.1 + HEIGHT / 2.0, y + HEIGHT / 2.0);
            let bend = (x - x0) / 2.0;
            out.push_str(&format!(
                "<path d=\"M{x0:.0} {y0:.0}C{:.0} {y0:.0} {:.0} {y1:.0} {x:.0} {y1:.0}\" fill=\"none\" stroke=\"#888\"/>",
                x0 + bend,
                x - bend
            ));
        }
    }
    for b in nodes {
        let (x, y, width) = position[b.name.as_str()];
        let (class, look) = b.look();
        out.push_str(&format!(
            "<rect class=\"{class}\" x=\"{x:.0}\" y=\"{y:.0}\" width=\"{width:.0}\" height=\"{HEIGHT}\" rx=\"5\" {look}/>\
             <text x=\"{tx:.0}\" y=\"{:.0}\" text-anchor=\"middle\">{}</text>\
             <text class=\"small\" x=\"{tx:.0}\" y=\"{:.0}\" text-anchor=\"middle\" font-size=\"10\">{}</text>",
            y + 16.0,
            escape(&b.name),
            y + 30.0,
            escape(&b.note),
            tx = x + width / 2.0,
        ));
    }
    out.push_str("</svg>");
    out
}

/// The length of the longest path from a source to each box. Stages may depend on each other's instances in a cycle; an
/// edge that closes a cycle is ignored.
fn layers(nodes: &[GraphNode]) -> Vec<usize> {
    let index: BTreeMap<&str, usize> = nodes.iter().enumerate().map(|(i, b)| (b.name.as_str(), i)).collect();
    let mut layer = vec![0; nodes.len()];
    // Limit the number of rounds: the boxes of a cycle would push each other on for ever.
    for _ in 0..nodes.len() {
        let mut moved = false;
        for (i, b) in nodes.iter().enumerate() {
            let least =
                b.from.iter().filter_map(|from| index.get(from.as_str())).map(|&f| layer[f] + 1).max().unwrap_or(0);
            if least > layer[i] && least < nodes.len() {
                layer[i] = least;
                moved = true;
            }
        }
        if !moved {
            break;
        }
    }
    layer
}

/// The boxes of each layer, ordered by the mean row of their inputs.
fn rows(nodes: &[GraphNode], layer: &[usize]) -> Vec<Vec<usize>> {
    let depth = layer.iter().max().map_or(0, |d| d + 1);
    let mut order: Vec<Vec<usize>> =
        (0..depth).map(|l| (0..nodes.len()).filter(|&i| layer[i] == l).collect()).collect();
    for l in 1..depth {
        let row_of: BTreeMap<&str, f64> = order[..l]
            .iter()
            .flat_map(|names| {
                names
                    .iter()
                    .enumerate()
                    .map(|(row, &i)| (nodes[i].name.as_str(), row as f64 - names.len() as f64 / 2.0))
            })
            .collect();
        let weight = |i: usize| {
            let rows: Vec<f64> = nodes[i].from.iter().filter_map(|from| row_of.get(from.as_str()).copied()).collect();
            if rows.is_empty() { 0.0 } else { rows.iter().sum::<f64>() / rows.len() as f64 }
        };
        order[l].sort_by(|&a, &b| weight(a).total_cmp(&weight(b)).then(a.cmp(&b)));
    }
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    fn named(name: &str, from: &[&str]) -> GraphNode {
        GraphNode { name: name.into(), from: from.iter().map(|f| (*f).to_owned()).collect(), ..GraphNode::default() }
    }

    #[test]
    fn a_box_is_right_of_all_its_inputs() {
        let nodes = [named("a", &[]), named("b", &["a"]), named("c", &["a", "b"])];
        assert_eq!(layers(&nodes), [0, 1, 2]);
    }

    #[test]
    fn every_label_fits_its_box_and_columns_do_not_overlap() {
        let long = GraphNode { note: "evaluate · cached".into(), ..named("evaluate[mean-quadruple,404]", &["a"]) };
        let svg = layers_svg(&[named("a", &[]), long, named("end", &["evaluate[mean-quadruple,404]"])]);
        let numbers = |key: &str| -> Vec<f64> {
            let rects = svg.split("<rect ").skip(1);
            rects
                .map(|rect| rect.split(&format!(" {key}=\"")).nth(1).unwrap().split('"').next().unwrap())
                .map(|n| n.parse().unwrap())
                .collect()
        };
        let (x, width) = (numbers("x"), numbers("width"));
        assert_eq!((width[0], width[2]), (LEAST_WIDTH, LEAST_WIDTH));
        assert!(width[1] > 28.0 * 6.5, "{width:?}");
        assert!(x[0] + width[0] < x[1] && x[1] + width[1] < x[2], "{x:?} {width:?}");
    }

    #[test]
    fn a_cached_stage_has_a_colour_of_its_own_without_a_style_sheet() {
        let looks = [
            GraphNode { ran: true, ..GraphNode::default() },
            GraphNode { unreached: true, ..GraphNode::default() },
            GraphNode::default(),
        ];
        assert_eq!(BTreeSet::from(looks.map(|b| b.look().1)).len(), 3);
    }

    #[test]
    fn a_dependency_cycle_does_not_hang_the_layout() {
        let nodes = [named("a", &["b"]), named("b", &["a"])];
        assert!(layers_svg(&nodes).starts_with("<svg"));
    }
}
