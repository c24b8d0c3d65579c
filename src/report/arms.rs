//! The table of arms: start, chosen on A and final step, every number from half B. Knows no markup.

use stages::types::CurvePoint;

use super::study::{Arm, Run, Study};

/// The columns that name a row.
pub const NAMED: [&str; 4] = ["arm", "seed", "at", "phase"];
/// How many of them are text.
pub const TEXT: usize = 3;

/// A column of numbers.
pub struct Column {
    pub head: &'static str,
    /// The terminal's heading.
    pub short: &'static str,
    /// Whether the terminal has room for the interval.
    pub roomy: bool,
    /// Of the sampled point, and of the greedy one where there is one.
    of: fn(&CurvePoint, Option<&CurvePoint>) -> Option<Cell>,
}

pub const COLUMNS: [Column; 9] = [
    Column { head: "true quality", short: "true quality", roomy: true, of: |p, _| quality(p) },
    Column { head: "gold (SFT sd)", short: "gold (SFT sd)", roomy: true, of: |p, _| Some(gold(p)) },
    Column {
        head: "win rate",
        short: "win rate",
        roomy: true,
        of: |p, _| Some(cell(p.win_rate, p.win_rate_low, p.win_rate_high, |v| format!("{v:.2}"))),
    },
    Column { head: "greedy: true quality", short: "gr. quality", roomy: false, of: |_, greedy| quality(greedy?) },
    Column { head: "greedy: gold (SFT sd)", short: "gr. gold", roomy: false, of: |_, greedy| Some(gold(greedy?)) },
    Column {
        head: "proxy",
        short: "proxy",
        roomy: false,
        of: |p, _| Some(cell(p.proxy, p.proxy_low, p.proxy_high, |v| format!("{v:+.2}"))),
    },
    Column {
        head: "KL (nats)",
        short: "KL",
        roomy: false,
        of: |p, _| Some(cell(p.kl, p.kl_low, p.kl_high, |v| format!("{v:.2}"))),
    },
    Column {
        head: "length",
        short: "length",
        roomy: false,
        of: |p, _| Some(cell(p.length, p.length_low, p.length_high, |v| format!("{v:.1}"))),
    },
    Column {
        head: "EOS",
        short: "EOS",
        roomy: false,
        of: |p, _| {
            let percent = cell(p.eos_rate, p.eos_rate_low, p.eos_rate_high, |v| format!("{:.0}", 100.0 * v));
            Some(Cell { mean: percent.mean + "%", ..percent })
        },
    },
];

/// A mean and its interval.
#[derive(Clone, Debug, PartialEq)]
pub struct Cell {
    pub mean: String,
    /// `[low, high]`
    pub interval: String,
}

fn cell(mean: f64, low: f64, high: f64, tell: fn(f64) -> String) -> Cell {
    let tell = |v: f64| {
        let told = tell(v);
        // What rounds to nothing has no sign.
        if told.chars().all(|c| "-0.".contains(c)) { told.replace('-', "") } else { told }
    };
    Cell { mean: tell(mean), interval: format!("[{}, {}]", tell(low), tell(high)) }
}

fn quality(p: &CurvePoint) -> Option<Cell> {
    Some(cell(p.quality?, p.quality_low?, p.quality_high?, |v| format!("{v:.2}")))
}

fn gold(p: &CurvePoint) -> Cell {
    cell(p.gold_sd, p.gold_sd_low, p.gold_sd_high, |v| format!("{v:.2}"))
}

/// One arm, seed and step: what names it and its numbers; absent where the step or the posts do not have one.
pub struct Row {
    pub named: [String; 4],
    pub cells: Vec<Option<Cell>>,
}

/// An arm's seeds together.
pub fn rows(study: &Study) -> Vec<Row> {
    let runs = study.arms.iter().flat_map(|arm| arm.runs.iter().map(move |run| (arm, run)));
    runs.flat_map(|(arm, run)| points(run).map(move |(at, point)| row(arm, run, at, point))).collect()
}

fn points(run: &Run) -> impl Iterator<Item = (&'static str, &CurvePoint)> {
    [("start", run.start()), ("chosen on A", run.chosen()), ("final", run.end())]
        .into_iter()
        .filter_map(|(at, point)| Some((at, point?)))
}

fn row(arm: &Arm, run: &Run, at: &str, point: &CurvePoint) -> Row {
    let greedy = run.greedy(point.step);
    Row {
        named: [arm.label.clone(), run.seed.to_string(), at.to_owned(), point.step.to_string()],
        cells: COLUMNS.iter().map(|column| (column.of)(point, greedy)).collect(),
    }
}

pub const MECHANISM_HEAD: [&str; 9] = [
    "arm",
    "seed",
    "λ",
    "c/λ first",
    "c/λ max",
    "c/λ last",
    "mean(1 − c)",
    "Spearman(s², KL)",
    "Spearman(s², |μ − gold|)",
];

/// The mechanism of every run; a dash for a number that the arm does not have.
pub fn mechanism(study: &Study) -> Vec<Vec<String>> {
    let tell = |v: Option<f64>| v.map_or_else(|| "–".to_owned(), |v| format!("{v:.3}"));
    study
        .arms
        .iter()
        .flat_map(|arm| arm.runs.iter().map(move |run| (arm, run)))
        .map(|(arm, run)| {
            let m = &run.about.mechanism;
            let mut row = vec![arm.label.clone(), run.seed.to_string(), lambda(run)];
            row.extend(
                [
                    m.c_over_lambda_first,
                    m.c_over_lambda_max,
                    m.c_over_lambda_last,
                    m.one_minus_c,
                    m.spearman_s2_kl,
                    m.spearman_s2_error,
                ]
                .map(tell),
            );
            row
        })
        .collect()
}

/// The coefficient that a fixed objective took, or the range of its schedule; of the adaptive one, what it was set to.
fn lambda(run: &Run) -> String {
    let m = &run.about.mechanism;
    let tell = |v: f64| {
        let text = format!("{v:.5}");
        text.trim_end_matches('0').trim_end_matches('.').to_owned()
    };
    match (m.lambda_low, m.lambda_high) {
        (Some(low), Some(high)) if low < high => format!("{} to {}", tell(low), tell(high)),
        (Some(constant), _) => tell(constant),
        _ => tell(run.about.lambda),
    }
}

/// c must have grown to this many times lambda for the mechanism to have been at work.
const ENGAGED: f64 = 3.0;

/// What the mechanism's numbers say of each adaptive arm, the paper's own first.
pub fn engagement(study: &Study) -> Vec<String> {
    let adaptive = study.arms.iter().filter(|arm| arm.objective == "adaptive");
    let (own, others): (Vec<&Arm>, Vec<&Arm>) = adaptive.partition(|arm| arm.is_papers_own());
    own.into_iter().chain(others).map(engaged).collect()
}

fn engaged(arm: &Arm) -> String {
    let reached: Vec<f64> = arm.runs.iter().filter_map(|run| run.about.mechanism.c_over_lambda_max).collect();
    let Some(most) = reached.iter().copied().reduce(f64::max) else {
        return format!("{}: cannot tell whether the adaptive mechanism was engaged: its runs logged no c.", arm.label);
    };
    let least = reached.iter().copied().fold(most, f64::min);
    let what = match reached.iter().filter(|r| **r >= ENGAGED).count() {
        0 => "was not engaged".to_owned(),
        n if n == reached.len() => "was engaged".to_owned(),
        n => format!("was engaged in {n} of {} seeds", reached.len()),
    };
    let range = if reached.len() > 1 { format!("{least:.2} to {most:.2} by seed") } else { format!("{most:.2}") };
    format!("{}: the adaptive mechanism {what}: mean(c)/lambda reached {range} (engaged from {ENGAGED}).", arm.label)
}

#[cfg(test)]
mod tests {
    use super::super::study::tests::arm;
    use super::*;

    fn reaching(name: &str, scope: &str, most: &[f64]) -> Arm {
        let mut arm = arm(&[("arm", name)], "adaptive", &vec![0.5; most.len()]);
        arm.scope = scope.to_owned();
        for (run, most) in arm.runs.iter_mut().zip(most) {
            run.about.mechanism.c_over_lambda_max = Some(*most);
        }
        arm
    }

    #[test]
    fn a_control_cannot_say_that_the_papers_arm_was_engaged() {
        let arms = vec![reaching("shuffled", "shuffled", &[9.0]), reaching("adaptive", "sample", &[1.5, 2.0])];
        let told = engagement(&Study { arms, ..Study::default() });
        assert!(told[0].starts_with("adaptive: the adaptive mechanism was not engaged"), "{told:?}");
        assert!(told[1].starts_with("shuffled: the adaptive mechanism was engaged"), "{told:?}");
        let mixed = engagement(&Study { arms: vec![reaching("a", "sample", &[2.0, 4.0])], ..Study::default() });
        assert!(mixed[0].contains("engaged in 1 of 2 seeds") && mixed[0].contains("2.00 to 4.00"), "{mixed:?}");
    }

    #[test]
    fn greedy_numbers_stand_where_greedy_responses_were_drawn() {
        let rows = rows(&Study { arms: vec![arm(&[("arm", "mean")], "mean", &[0.7])], ..Study::default() });
        let at = COLUMNS.iter().position(|c| c.head == "greedy: true quality").unwrap();
        let shown: Vec<Option<&str>> = rows.iter().map(|r| r.cells[at].as_ref().map(|c| c.mean.as_str())).collect();
        assert_eq!(shown, [Some("0.55"), None, Some("0.70")]);
    }

    #[test]
    fn what_rounds_to_nothing_has_no_sign() {
        let told = cell(-0.001, -0.02, 0.03, |v| format!("{v:.2}"));
        assert_eq!((told.mean.as_str(), told.interval.as_str()), ("0.00", "[-0.02, 0.03]"));
    }

    #[test]
    fn a_schedule_shows_its_range() {
        let mut run = super::super::study::tests::run("matched", 1, 0.5);
        assert_eq!(lambda(&run), "0.005");
        (run.about.mechanism.lambda_low, run.about.mechanism.lambda_high) = (Some(0.0101), Some(0.0101));
        assert_eq!(lambda(&run), "0.0101");
        run.about.mechanism.lambda_high = Some(0.25);
        assert_eq!(lambda(&run), "0.0101 to 0.25");
    }
}
