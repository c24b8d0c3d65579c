//! Statements tested across seeds: exact paired sign flips, corrected within a family.

use std::fmt;

use stages::stats::{detectable_effect, holm, mean, sign_flip_interval, sign_flip_p, smallest_sign_flip_p, std};

use super::outcome::Measure;
use super::study::{Arm, Run};

/// Minimum number of seeds at which the sign-flip test can reach 0.05: its smallest p is 2 / 2^n.
pub const MIN_SEEDS: usize = 6;
pub const ALPHA: f64 = 0.05;
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Shown by the family's corrected test.
    Shown,
    /// The test shows the opposite.
    Opposite,
    NotShown,
    /// Too few seeds for any test of the family.
    NotJudged,
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Shown => "shown",
            Self::Opposite => "opposite",
            Self::NotShown => "not shown",
            Self::NotJudged => "not judged",
        })
    }
}

/// One number per seed, tested for being above zero.
#[derive(Clone, Debug, PartialEq)]
pub struct Test {
    /// Description of the numbers, such as `adaptive − mean`.
    pub label: String,
    pub seeds: Vec<(u64, f64)>,
    pub mean: f64,
    /// 95% interval by inverting the test; `None` below [`MIN_SEEDS`].
    pub interval: Option<(f64, f64)>,
    /// Two-sided, uncorrected.
    pub p: f64,
}

impl Test {
    /// `None` without seeds.
    pub fn of(label: String, seeds: Vec<(u64, f64)>) -> Option<Self> {
        let values: Vec<f64> = seeds.iter().map(|(_, value)| *value).collect();
        (!values.is_empty()).then(|| Self {
            label,
            mean: mean(&values),
            interval: sign_flip_interval(&values, ALPHA),
            p: sign_flip_p(&values),
            seeds,
        })
    }

    pub fn over(label: String, arm: &Arm, of: impl Fn(&Run) -> Option<f64>) -> Option<Self> {
        Self::of(label, arm.runs.iter().filter_map(|run| Some((run.seed, of(run)?))).collect())
    }

    /// The difference `of(arm) - of(other)` for each seed.
    pub fn paired(arm: &Arm, other: &Arm, of: impl Fn(&Run) -> Option<f64>) -> Option<Self> {
        Self::over(format!("{} − {}", arm.label, other.label), arm, |run| Some(of(run)? - of(other.run(run.seed)?)?))
    }

    /// The smallest mean detected with power 0.8, assuming normal differences with the observed deviation.
    pub fn detectable(&self) -> Option<f64> {
        let n = self.seeds.len();
        let values: Vec<f64> = self.seeds.iter().map(|(_, value)| *value).collect();
        Some(detectable_effect(n, ALPHA)? * std(&values) * (n as f64 / (n as f64 - 1.0)).sqrt())
    }
}

/// A statement that holds if every one of its parts is above zero. An intersection-union test: its p is the largest p
/// of its parts, which need no correction among themselves.
#[derive(Clone, Debug, PartialEq)]
pub struct Statement {
    /// `H3`; empty for a claim that was not registered.
    pub name: &'static str,
    pub sentence: String,
    pub parts: Vec<Test>,
    pub verdict: Verdict,
    /// p corrected within the family; `None` if no test was made.
    pub corrected: Option<f64>,
}

impl Statement {
    pub fn new(name: &'static str, sentence: String, parts: Vec<Test>) -> Self {
        Self { name, sentence, parts, verdict: Verdict::NotJudged, corrected: None }
    }

    /// Number of seeds of its smallest part.
    pub fn n(&self) -> usize {
        self.parts.iter().map(|part| part.seeds.len()).min().unwrap_or(0)
    }

    /// The statement's p; 1 if the parts disagree in sign.
    fn p(&self) -> f64 {
        let side = |above: bool| self.parts.iter().all(|part| part.mean != 0.0 && (part.mean > 0.0) == above);
        if side(true) || side(false) { self.parts.iter().map(|part| part.p).fold(0.0, f64::max) } else { 1.0 }
    }
}

/// The subject of a family's statements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Subject {
    /// H1 and H2.
    Preconditions,
    /// Comparisons of two arms by outcome in a measure.
    Outcomes(Measure),
    Other,
}

/// Statements that are corrected together.
#[derive(Clone, Debug, PartialEq)]
pub struct Family {
    pub title: String,
    pub subject: Subject,
    pub statements: Vec<Statement>,
    /// The reason why none of them can be judged, if so.
    pub note: Option<String>,
}

/// Tests the statements and corrects them by Holm's method.
pub fn judge(subject: Subject, title: String, statements: Vec<Statement>) -> Family {
    judge_registered(0, subject, title, statements)
}

/// The same in a family of `registered` tests, of which some may be missing: the correction is for all of them.
pub fn judge_registered(registered: usize, subject: Subject, title: String, mut statements: Vec<Statement>) -> Family {
    let tested: Vec<usize> = (0..statements.len()).filter(|&i| statements[i].n() >= MIN_SEEDS).collect();
    let size = if tested.is_empty() { 0 } else { tested.len().max(registered) };
    let mut p: Vec<f64> = tested.iter().map(|&i| statements[i].p()).collect();
    p.resize(size, 1.0);
    let most = tested.iter().map(|&i| statements[i].n()).max().unwrap_or(0);
    let smallest = size as f64 * smallest_sign_flip_p(most);
    if smallest > ALPHA {
        let note = format!(
            "{size} tests of {most} seeds: the smallest corrected p is {smallest:.3}, so that none of them is judged"
        );
        return Family { title, subject, statements, note: Some(note) };
    }
    for (i, corrected) in tested.into_iter().zip(holm(&p)) {
        let statement = &mut statements[i];
        statement.corrected = Some(corrected);
        statement.verdict = match statement.parts.first() {
            Some(part) if corrected <= ALPHA && part.mean > 0.0 => Verdict::Shown,
            Some(_) if corrected <= ALPHA => Verdict::Opposite,
            _ => Verdict::NotShown,
        };
    }
    Family { title, subject, statements, note: None }
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;
    use rand::rngs::StdRng;
    use stages::stats::normal;

    use super::*;

    fn statement(values: &[f64]) -> Statement {
        let test = Test::of("a − b".into(), (0..).zip(values.iter().copied()).collect());
        Statement::new("", "a above b".into(), vec![test.unwrap()])
    }

    fn verdicts(statements: Vec<Statement>) -> Vec<Verdict> {
        judge(Subject::Other, String::new(), statements).statements.iter().map(|statement| statement.verdict).collect()
    }

    #[test]
    fn nothing_is_judged_below_six_seeds() {
        assert_eq!(verdicts(vec![statement(&[0.5; 5])]), [Verdict::NotJudged]);
        assert_eq!(verdicts(vec![statement(&[0.5; 6])]), [Verdict::Shown]);
        assert_eq!(verdicts(vec![statement(&[-0.5; 6])]), [Verdict::Opposite]);
        assert_eq!(verdicts(vec![statement(&[0.5, -0.5, 0.4, -0.4, 0.3, -0.3])]), [Verdict::NotShown]);
    }

    #[test]
    fn a_family_too_large_for_its_seeds_says_so() {
        let statements = |n: usize| vec![statement(&[0.5; 8]); n];
        assert_eq!(verdicts(statements(6)), [Verdict::Shown; 6]);
        let family = judge(Subject::Other, String::new(), statements(7));
        assert!(family.statements.iter().all(|statement| statement.verdict == Verdict::NotJudged));
        assert!(family.note.unwrap().contains("7 tests of 8 seeds: the smallest corrected p is 0.055"));
    }

    #[test]
    fn a_statement_of_two_parts_needs_both() {
        let both = |second: &[f64]| {
            let parts = [statement(&[0.5; 8]), statement(second)].map(|statement| statement.parts[0].clone());
            verdicts(vec![Statement::new("H4", "a above b and c".into(), parts.into())])
        };
        assert_eq!(both(&[0.1; 8]), [Verdict::Shown]);
        assert_eq!(both(&[0.1, -0.1, 0.2, -0.2, 0.1, -0.1, 0.2, -0.1]), [Verdict::NotShown]);
        assert_eq!(both(&[-0.5; 8]), [Verdict::NotShown], "above one, below the other");
        assert_eq!(both(&[0.5; 5]), [Verdict::NotJudged], "as few seeds as its smallest part");
    }

    #[test]
    fn a_family_has_five_percent_false_positives_and_detects_a_large_effect() {
        let mut rng = StdRng::seed_from_u64(3);
        let mut study = |effects: &[f64]| -> Vec<Verdict> {
            let mut values = |effect: f64| (0..8).map(|_| effect + normal(&mut rng)).collect::<Vec<_>>();
            verdicts(effects.iter().map(|&effect| statement(&values(effect))).collect())
        };
        let wrong = (0..400).filter(|_| study(&[0.0; 5]).iter().any(|a| *a != Verdict::NotShown)).count();
        assert!(wrong <= 30, "{wrong} of 400");
        let found = (0..400).filter(|_| study(&[1.5]) == [Verdict::Shown]).count();
        assert!(found > 320, "{found} of 400");
    }

    #[test]
    fn the_detectable_difference_is_in_the_units_of_the_differences() {
        let test = |scale: f64| statement(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0].map(|v| v * scale)).parts[0].clone();
        let (one, ten) = (test(1.0).detectable().unwrap(), test(10.0).detectable().unwrap());
        assert!((ten - 10.0 * one).abs() < 1e-9 && one > 3.0, "{one} {ten}");
        assert_eq!(statement(&[0.1; 5]).parts[0].detectable(), None);
        assert_eq!(test(1.0).interval, Some((1.0, 6.0)));
    }
}
