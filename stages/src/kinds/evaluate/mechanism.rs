//! Measures whether the adaptive mechanism had an effect in a run: how c moved, and what the variance correlated with.

use super::calibration::Fits;
use super::curve::select;
use crate::stats::{mean, spearman};
use crate::types::Objective;
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
    Mechanism {
        c_over_lambda_first: c.first().copied().map(over_lambda),
        c_over_lambda_max: c.iter().copied().reduce(f64::max).map(over_lambda),
        c_over_lambda_last: c.last().copied().map(over_lambda),
        one_minus_c: (!c.is_empty()).then(|| 1.0 - mean(&c)),
        c_kl_share_max: kl_shares(phases).into_iter().map(|(_, share)| share).reduce(f64::max),
        lambda_low: lambdas().reduce(f64::min),
        lambda_high: lambdas().reduce(f64::max),
        spearman_s2_kl: correlated(&kl),
        spearman_s2_error: error.as_deref().and_then(correlated),
    }
}

/// The share of mean(c KL) in the gain of mean((1 - c) mu) since the first phase, by phase. Phases whose gain is under a tenth of the
/// largest are left out: the quotient would be noise.
pub fn kl_shares(phases: &[Phase]) -> Vec<(i64, f64)> {
    let terms = phases.iter().filter_map(|p| Some((p.phase, p.c_kl?, p.one_minus_c_mu?)));
    shares(&terms.collect::<Vec<_>>())
}

/// `terms`: phase, mean(c KL) and mean((1 - c) mu).
fn shares(terms: &[(i64, f64, f64)]) -> Vec<(i64, f64)> {
    let Some(&(_, _, start)) = terms.first() else { return Vec::new() };
    let most = terms.iter().map(|(_, _, score)| score - start).fold(0.0, f64::max);
    let counted = terms.iter().filter(|(_, _, score)| most > 0.0 && score - start >= most / 10.0);
    counted.map(|&(phase, c_kl, score)| (phase, c_kl / (score - start))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_share_of_the_kl_term_is_that_of_the_gain_where_there_is_one() {
        // Gains 0, 0.01, 0.5, 1: the second one is too small to count.
        let found = shares(&[(1, 0.0, 0.2), (2, 0.5, 0.21), (3, 0.1, 0.7), (4, 0.25, 1.2)]);
        assert_eq!(found.iter().map(|(phase, _)| *phase).collect::<Vec<_>>(), [3, 4]);
        assert!((found[0].1 - 0.2).abs() < 1e-12 && (found[1].1 - 0.25).abs() < 1e-12, "{found:?}");
        assert_eq!((shares(&[(1, 0.1, 0.5), (2, 0.1, 0.4)]), shares(&[])), (vec![], vec![]));
    }
}
