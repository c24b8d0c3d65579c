//! Measures whether the adaptive mechanism had an effect in a run: how c moved, and what the variance correlated with.

use super::calibration::Fits;
use super::curve::select;
use crate::rl::objective::Objective;
use crate::stats::{mean, spearman};
use crate::types::{Half, Mechanism, Phase, PolicyInfo, Score};

/// c / lambda at the first, highest and last phase, mean(1 - c), the largest share of the KL term, and Spearman's
/// correlation of s2 with KL and with the squared error against gold over the last step's samples of half B. Null if
/// the run has no variance or no c. For a non-adaptive run also the range of its KL coefficients.
pub fn mechanism(phases: &[Phase], scores: &[Score], fits: &Fits, last: i64, policy: &PolicyInfo) -> Mechanism {
    let c: Vec<f64> = phases.iter().filter_map(|p| p.c).collect();
    let over_lambda = |c: f64| c / policy.lambda;
    let end: Vec<&Score> = select(scores, last, Half::B, false).collect();
    let s2: Option<Vec<f64>> = end.iter().map(|s| s.variance).collect();
    let kl: Vec<f64> = end.iter().map(|s| s.kl_exact).collect();
    let error: Option<Vec<f64>> = end.iter().map(|s| fits.gold_error(s)).collect();
    let correlated = |with: &[f64]| s2.as_deref().and_then(|s2| spearman(s2, with));
    let fixed = policy.objective != Objective::Adaptive.to_string();
    let lambdas = || phases.iter().filter(|_| fixed).filter_map(|p| p.lambda_effective);
    let terms: Vec<(f64, f64)> = phases.iter().filter_map(|p| Some((p.c_kl?, p.one_minus_c_mu?))).collect();
    Mechanism {
        c_over_lambda_first: c.first().copied().map(over_lambda),
        c_over_lambda_max: c.iter().copied().reduce(f64::max).map(over_lambda),
        c_over_lambda_last: c.last().copied().map(over_lambda),
        one_minus_c: (!c.is_empty()).then(|| 1.0 - mean(&c)),
        c_kl_share_max: share(&terms),
        lambda_low: lambdas().reduce(f64::min),
        lambda_high: lambdas().reduce(f64::max),
        spearman_s2_kl: correlated(&kl),
        spearman_s2_error: error.as_deref().and_then(correlated),
    }
}

/// The largest value over phases of mean(c KL) divided by the gain of mean((1 - c) mu) since the first phase. `terms`:
/// (mean(c KL), mean((1 - c) mu)) of each phase.
fn share(terms: &[(f64, f64)]) -> Option<f64> {
    let start = terms.first()?.1;
    let most = terms.iter().map(|(_, score)| score - start).fold(0.0, f64::max);
    // Skip small gains: their quotient would be noise.
    let counted = terms.iter().filter(|(_, score)| most > 0.0 && score - start >= most / 10.0);
    counted.map(|(c_kl, score)| c_kl / (score - start)).reduce(f64::max)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_share_of_the_kl_term_is_that_of_the_gain_where_there_is_one() {
        // Gains 0, 0.01, 0.5, 1: the second one is too small to count.
        let found = share(&[(0.0, 0.2), (0.5, 0.21), (0.1, 0.7), (0.25, 1.2)]);
        assert!(found.is_some_and(|share| (share - 0.25).abs() < 1e-12), "{found:?}");
        assert_eq!((share(&[(0.1, 0.5), (0.1, 0.4)]), share(&[])), (None, None));
    }
}
