//! Whether the adaptive mechanism was at work in a run: how c moved, and what the variance went with. Knows no file.

use super::curve::select;
use crate::stats::{mean, spearman};
use crate::types::{Half, Mechanism, Phase, Score};

/// c / lambda at the first, highest and last phase, mean(1 - c), and Spearman's correlation of s2 with KL and with
/// |mu - gold| (each centred) over the last step's samples of half B. Null where a run has no variance or no c. A run without
/// c has the KL coefficients that its phases took instead.
pub fn mechanism(phases: &[Phase], scores: &[Score], last: i64, lambda: f64) -> Mechanism {
    let c: Vec<f64> = phases.iter().filter_map(|p| p.c).collect();
    let over_lambda = |c: f64| c / lambda;
    let end: Vec<&Score> = select(scores, last, Half::B, false).collect();
    let of = |f: &dyn Fn(&Score) -> f64| -> Vec<f64> { end.iter().map(|s| f(s)).collect() };
    let s2: Option<Vec<f64>> = end.iter().map(|s| s.variance).collect();
    let (kl, mu, gold) = (of(&|s| s.kl), of(&|s| s.mean), of(&|s| s.gold));
    let (mu_mean, gold_mean) = (mean(&mu), mean(&gold));
    let error: Vec<f64> = mu.iter().zip(&gold).map(|(m, g)| ((m - mu_mean) - (g - gold_mean)).abs()).collect();
    let correlated = |with: &[f64]| s2.as_deref().and_then(|s2| spearman(s2, with));
    let fixed = || phases.iter().filter(|p| p.c.is_none()).filter_map(|p| p.lambda_effective);
    Mechanism {
        c_over_lambda_first: c.first().copied().map(over_lambda),
        c_over_lambda_max: c.iter().copied().reduce(f64::max).map(over_lambda),
        c_over_lambda_last: c.last().copied().map(over_lambda),
        one_minus_c: (!c.is_empty()).then(|| 1.0 - mean(&c)),
        c_kl_share_max: None,
        lambda_low: fixed().reduce(f64::min),
        lambda_high: fixed().reduce(f64::max),
        spearman_s2_kl: correlated(&kl),
        spearman_s2_error: correlated(&error),
    }
}
