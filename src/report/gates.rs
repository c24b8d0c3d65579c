//! The gates of the study's operating point, checked seed by seed.

use super::arms::is_engaged;
use super::outcome::{self, Measure};
use super::study::{Arm, Run};
use super::verdict::NO_QUALITY;

/// G1: the minimum drop of true quality from its peak, on a scale of 1.
pub const LEAST_FALL: f64 = 0.15;
/// G2: the minimum of Algorithm 1's mean coefficient, in units of lambda, and of the share of c KL in the gain.
pub const COEFFICIENT_GROWN: f64 = 1.5;
pub const KL_SHARE: f64 = 0.25;

/// A condition on the operating point, by seed; `None` for a seed where it is unknown.
#[derive(Clone, Debug, PartialEq)]
pub struct Gate {
    pub name: &'static str,
    pub sentence: String,
    pub seeds: Vec<(u64, Option<bool>, String)>,
}

impl Gate {
    pub fn passed(&self) -> usize {
        self.seeds.iter().filter(|(_, passed, _)| *passed == Some(true)).count()
    }

    pub fn missed(&self) -> Vec<u64> {
        self.seeds.iter().filter(|(_, passed, _)| *passed == Some(false)).map(|(seed, ..)| *seed).collect()
    }
}

/// G1 to G4 for every seed of `adaptive`; `mean` is the mean arm with the same lambda.
pub fn gates(adaptive: &Arm, mean: Option<&Arm>, title: &str) -> Vec<Gate> {
    let by_seed = |of: &dyn Fn(&Run) -> (Option<bool>, String), arm: Option<&Arm>| {
        let seeds = adaptive.runs.iter().map(|run| match arm.and_then(|arm| arm.run(run.seed)) {
            Some(run) => (run.seed, of(run)),
            None => (run.seed, (None, "no mean arm at this lambda".to_owned())),
        });
        seeds.map(|(seed, (passed, numbers))| (seed, passed, numbers)).collect()
    };
    let unknown = || (None, "not known".to_owned());
    let falls = |run: &Run| match (outcome::drop(run, Measure::Quality), outcome::proxy_rise(run, Measure::Quality)) {
        (Some(drop), Some(rise)) => {
            (Some(drop >= LEAST_FALL && rise > 0.0), format!("fall {drop:.2}, proxy {rise:+.2}"))
        }
        _ => (None, NO_QUALITY.to_owned()),
    };
    let engaged = |run: &Run| {
        let m = &run.about.mechanism;
        match (is_engaged(run), m.c_over_lambda_max, m.c_kl_share_max) {
            (passed, Some(grown), Some(share)) => (passed, format!("c/lambda {grown:.2}, c KL {share:.2} of the gain")),
            _ => unknown(),
        }
    };
    let uncertain = |run: &Run| match run.ensemble_s2 {
        Some((random, own)) => (Some(random > own), format!("{random:.3} against {own:.3}")),
        None => unknown(),
    };
    let reads = |run: &Run| match run.about.fact_sensitivity {
        Some(s) => (Some(s.reads_the_post()), format!("{:.2} [{:.2}, {:.2}]", s.mean, s.low, s.high)),
        None => unknown(),
    };
    let gate = |name, sentence: String, seeds| Gate { name, sentence: format!("{title}{sentence}"), seeds };
    vec![
        gate(
            "G1",
            format!("the mean arm falls at least {LEAST_FALL} of true quality from its peak while the proxy rises"),
            by_seed(&falls, mean),
        ),
        gate(
            "G2",
            format!(
                "on the mean arm's path Algorithm 1's coefficient reaches {COEFFICIENT_GROWN} lambda and c KL {KL_SHARE} of the gain"
            ),
            by_seed(&engaged, mean),
        ),
        gate(
            "G3",
            "the ensemble disagrees more on random text than on calibration samples".to_owned(),
            by_seed(&uncertain, Some(adaptive)),
        ),
        gate(
            "G4",
            "the gold model reads the post: its fact sensitivity is above 0".to_owned(),
            by_seed(&reads, Some(adaptive)),
        ),
    ]
}
