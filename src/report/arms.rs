//! The table of arms at the start, the step chosen on half A and the final step; all numbers are from half B.

use stages::stats::mean;
use stages::types::{CurvePoint, Half, Mechanism};

use super::gates::{COEFFICIENT_GROWN, KL_SHARE};
use super::outcome::{self, Measure};
use super::study::{Arm, Role, Run, Study};

/// The columns that identify a row.
pub const ID_COLUMNS: [&str; 4] = ["arm", "seed", "at", "phase"];
/// Number of identifying columns that are text.
pub const TEXT_COLUMNS: usize = 3;

/// A column of numbers.
pub struct Column {
    pub head: &'static str,
    /// The heading on the terminal; `None`: only the page has the column.
    pub short: Option<&'static str>,
    /// Whether the terminal has space for the interval.
    pub shows_interval: bool,
    /// The cell of a sampled point, and of the greedy one if there is one.
    of: fn(&CurvePoint, Option<&CurvePoint>) -> Option<TableCell>,
}

pub const COLUMNS: [Column; 9] = [
    Column { head: "true quality", short: Some("true quality"), shows_interval: true, of: |p, _| quality(p) },
    Column { head: "gold (SFT sd)", short: Some("gold sd"), shows_interval: false, of: |p, _| Some(gold(p)) },
    Column {
        head: "win rate",
        short: Some("win rate"),
        shows_interval: false,
        of: |p, _| Some(cell(p.win_rate, p.win_rate_low, p.win_rate_high, |v| format!("{v:.2}"))),
    },
    Column { head: "greedy: true quality", short: None, shows_interval: false, of: |_, greedy| quality(greedy?) },
    Column { head: "greedy: gold (SFT sd)", short: None, shows_interval: false, of: |_, greedy| Some(gold(greedy?)) },
    Column {
        head: "proxy",
        short: Some("proxy"),
        shows_interval: false,
        of: |p, _| Some(cell(p.proxy, p.proxy_low, p.proxy_high, |v| format!("{v:+.2}"))),
    },
    Column {
        head: "KL (nats)",
        short: Some("KL"),
        shows_interval: false,
        of: |p, _| Some(cell(p.kl, p.kl_low, p.kl_high, |v| format!("{v:.2}"))),
    },
    Column {
        head: "length",
        short: Some("length"),
        shows_interval: false,
        of: |p, _| Some(cell(p.length, p.length_low, p.length_high, |v| format!("{v:.1}"))),
    },
    Column {
        head: "EOS",
        short: Some("EOS"),
        shows_interval: false,
        of: |p, _| {
            let percent = cell(p.eos_rate, p.eos_rate_low, p.eos_rate_high, |v| format!("{:.0}", 100.0 * v));
            Some(TableCell { mean: percent.mean + "%", ..percent })
        },
    },
];

/// A mean and its interval.
#[derive(Clone, Debug, PartialEq)]
pub struct TableCell {
    pub mean: String,
    /// `[low, high]`
    pub interval: String,
}

fn cell(mean: f64, low: f64, high: f64, format_value: fn(f64) -> String) -> TableCell {
    let format_value = |v: f64| {
        let formatted = format_value(v);
        // A value that rounds to zero is printed without a sign.
        if formatted.chars().all(|c| "-0.".contains(c)) { formatted.replace('-', "") } else { formatted }
    };
    TableCell { mean: format_value(mean), interval: format!("[{}, {}]", format_value(low), format_value(high)) }
}

fn quality(p: &CurvePoint) -> Option<TableCell> {
    Some(cell(p.quality?, p.quality_low?, p.quality_high?, |v| format!("{v:.2}")))
}

fn gold(p: &CurvePoint) -> TableCell {
    cell(p.gold_sd, p.gold_sd_low, p.gold_sd_high, |v| format!("{v:.2}"))
}

/// One arm, seed and step: identifying columns and numbers. A number is absent if the step or the posts have none.
pub struct Row {
    pub ids: [String; 4],
    pub cells: Vec<Option<TableCell>>,
}

/// All rows, with an arm's seeds adjacent.
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
        ids: [arm.label.clone(), run.seed.to_string(), at.to_owned(), point.step.to_string()],
        cells: COLUMNS.iter().map(|column| (column.of)(point, greedy)).collect(),
    }
}

/// With more runs, tables show the arms' means first.
pub const MAX_RUNS_LISTED: usize = 12;

pub const OUTCOME_HEAD: [&str; 8] =
    ["arm", "λ", "seeds", "true quality", "gold (SFT sd)", "proxy", "KL", "drop of true quality"];

/// Each arm's outcomes, means over its seeds of half B in the last third of the evaluations; the drop is from the best step on half A
/// to the last.
pub fn outcomes(study: &Study) -> Vec<Vec<String>> {
    let row = |arm: &Arm| {
        let over = |of: &dyn Fn(&Run) -> Option<f64>| -> String {
            let values: Option<Vec<f64>> = arm.runs.iter().map(of).collect();
            values.filter(|v| !v.is_empty()).map_or_else(|| "–".to_owned(), |v| format!("{:.3}", mean(&v)))
        };
        let window = |of: fn(&CurvePoint) -> Option<f64>| over(&|run| outcome::window_mean(run, Half::B, of));
        vec![
            arm.label.clone(),
            format!("{}", arm.lambda),
            arm.runs.len().to_string(),
            window(|point| point.quality),
            window(|point| Some(point.gold_sd)),
            window(|point| Some(point.proxy)),
            window(|point| Some(point.kl_exact)),
            over(&|run| outcome::drop(run, Measure::Quality)),
        ]
    };
    study.arms.iter().map(row).collect()
}

pub const MECHANISM_HEAD: [&str; 10] = [
    "arm",
    "seed",
    "λ",
    "c/λ first",
    "c/λ max",
    "c/λ last",
    "mean(1 − c)",
    "c KL / gain, max",
    "Spearman(s², KL)",
    "Spearman(s², error²)",
];

/// The mechanism of every run; a dash for a number that does not apply to the arm.
pub fn mechanism(study: &Study) -> Vec<Vec<String>> {
    let format_value = |v: Option<f64>| v.map_or_else(|| "–".to_owned(), |v| format!("{v:.3}"));
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
                    m.c_kl_share_max,
                    m.spearman_s2_kl,
                    m.spearman_s2_error,
                ]
                .map(format_value),
            );
            row
        })
        .collect()
}

/// The coefficient of a fixed objective or the range of its schedule; for the adaptive one, its lambda parameter.
fn lambda(run: &Run) -> String {
    let m = &run.about.mechanism;
    let format_value = |v: f64| {
        let text = format!("{v:.5}");
        text.trim_end_matches('0').trim_end_matches('.').to_owned()
    };
    match (m.lambda_low, m.lambda_high) {
        (Some(low), Some(high)) if low < high => format!("{} to {}", format_value(low), format_value(high)),
        (Some(constant), _) => format_value(constant),
        _ => format_value(run.about.lambda),
    }
}

/// Sentences on whether the mechanism was engaged, for each adaptive arm, the paper's own first. This is judged on the
/// trajectory of the mean arm next to it, since an adaptive arm that keeps the KL low also keeps its own coefficient
/// low.
pub fn engagement(study: &Study) -> Vec<String> {
    let adaptive = study.arms.iter().filter(|arm| arm.role.is_adaptive());
    let (own, others): (Vec<&Arm>, Vec<&Arm>) = adaptive.partition(|arm| arm.role == Role::Adaptive);
    let mut sentences: Vec<String> = own.into_iter().map(|arm| engaged(study, arm)).collect();
    sentences.extend(others.into_iter().map(|arm| format!("{}: {}.", arm.label, own_path(arm))));
    if study.arms.iter().any(|arm| !arm.role.is_adaptive() && !reached(arm, |m| m.c_over_lambda_max).is_empty()) {
        sentences
            .push("c of arms that are not adaptive is what Algorithm 1's coefficient would be on their path.".into());
    }
    sentences
}

type Number = fn(&Mechanism) -> Option<f64>;

fn reached(arm: &Arm, of: Number) -> Vec<f64> {
    arm.runs.iter().filter_map(|run| of(&run.about.mechanism)).collect()
}

fn range(values: &[f64]) -> String {
    let (low, high) = values.iter().fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), v| (l.min(*v), h.max(*v)));
    if values.len() > 1 { format!("{low:.2} to {high:.2} by seed") } else { format!("{high:.2}") }
}

fn own_path(arm: &Arm) -> String {
    let grown = reached(arm, |m| m.c_over_lambda_max);
    if grown.is_empty() {
        return "its own coefficient is not known: its runs logged no c".to_owned();
    }
    format!("on its own path mean(c)/lambda reached {}", range(&grown))
}

fn engaged(study: &Study, arm: &Arm) -> String {
    let own = own_path(arm);
    let mean = study.comparable(arm, Role::Mean).find(|mean| !reached(mean, |m| m.c_over_lambda_max).is_empty());
    let Some(mean) = mean else {
        return format!(
            "{}: whether the mechanism was engaged cannot be judged: no mean arm at lambda {} logged its coefficient; {own}, \
             which says little where the arm holds the KL low.",
            arm.label, arm.lambda
        );
    };
    let grown = reached(mean, |m| m.c_over_lambda_max);
    let share = reached(mean, |m| m.c_kl_share_max);
    let share = if share.is_empty() { "an unknown share".to_owned() } else { range(&share) };
    let count = mean.runs.iter().filter(|run| is_engaged(run) == Some(true)).count();
    format!(
        "{}: the mechanism was engaged in {count} of {} seeds, judged on the path of {}: there mean(c)/lambda would have \
         reached {} (engaged from {COEFFICIENT_GROWN}) and c KL {share} of the gain (from {KL_SHARE}); {own}.",
        arm.label,
        mean.runs.len(),
        mean.label,
        range(&grown),
    )
}

/// Whether Algorithm 1's coefficient on this run's trajectory reached the thresholds of gate G2.
pub fn is_engaged(run: &Run) -> Option<bool> {
    let m = &run.about.mechanism;
    Some(m.c_over_lambda_max? >= COEFFICIENT_GROWN && m.c_kl_share_max? >= KL_SHARE)
}

#[cfg(test)]
mod tests {
    use super::super::study::tests::arm;
    use super::*;

    fn reaching(name: &str, role: Role, most: &[(f64, f64)]) -> Arm {
        let mut arm = arm(&[("arm", name)], "mean", &vec![0.5; most.len()]);
        arm.role = role;
        for (run, (grown, share)) in arm.runs.iter_mut().zip(most) {
            let m = &mut run.about.mechanism;
            (m.c_over_lambda_max, m.c_kl_share_max) = (Some(*grown), Some(*share));
        }
        arm
    }

    #[test]
    fn engagement_is_judged_on_the_mean_arms_path() {
        let own = reaching("adaptive", Role::Adaptive, &[(1.2, 0.1), (1.3, 0.1)]);
        let shuffled = reaching("shuffled", Role::Shuffled, &[(9.0, 0.9)]);
        let mean = reaching("mean", Role::Mean, &[(1.6, 0.3), (2.0, 0.2)]);
        let sentences = engagement(&Study { arms: vec![shuffled.clone(), own.clone(), mean], ..Study::default() });
        assert!(sentences[0].starts_with("adaptive: the mechanism was engaged in 1 of 2 seeds"), "{sentences:?}");
        assert!(sentences[0].contains("path of mean") && sentences[0].contains("1.60 to 2.00"), "{sentences:?}");
        assert!(sentences[0].contains("own path mean(c)/lambda reached 1.20 to 1.30"), "{sentences:?}");
        assert_eq!(sentences[1], "shuffled: on its own path mean(c)/lambda reached 9.00.");
        let sentences = engagement(&Study { arms: vec![shuffled, own], ..Study::default() });
        assert!(sentences[0].contains("cannot be judged: no mean arm"), "{sentences:?}");
    }

    #[test]
    fn greedy_columns_exist_where_greedy_responses_were_drawn() {
        let rows = rows(&Study { arms: vec![arm(&[("arm", "mean")], "mean", &[0.7])], ..Study::default() });
        let at = COLUMNS.iter().position(|c| c.head == "greedy: true quality").unwrap();
        let shown: Vec<Option<&str>> = rows.iter().map(|r| r.cells[at].as_ref().map(|c| c.mean.as_str())).collect();
        assert_eq!(shown, [Some("0.55"), None, Some("0.70")]);
    }

    #[test]
    fn values_that_round_to_zero_have_no_sign() {
        let formatted = cell(-0.001, -0.02, 0.03, |v| format!("{v:.2}"));
        assert_eq!((formatted.mean.as_str(), formatted.interval.as_str()), ("0.00", "[-0.02, 0.03]"));
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
