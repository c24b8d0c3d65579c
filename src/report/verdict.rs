//! The report's fixed sentences: what a study saw, did not see, or cannot tell. Pure; knows no file and no markup.

use std::fmt;

use super::study::{Arm, Run, Study};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    Seen,
    NotSeen,
    CannotTell,
}

impl fmt::Display for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Seen => "seen",
            Self::NotSeen => "not seen",
            Self::CannotTell => "cannot tell",
        })
    }
}

/// A fixed sentence with its answer and the numbers behind it.
#[derive(Clone, Debug, PartialEq)]
pub struct Verdict {
    pub sentence: String,
    pub answer: Answer,
    pub because: String,
}

/// Seeds from which on a difference between arms is judged by a test.
const ENOUGH_SEEDS: usize = 5;
const SIGNIFICANT: f64 = 0.05;
const NO_QUALITY: &str = "the posts carry no facts to score true quality by";

/// All sentences, in the report's order.
pub fn verdicts(study: &Study) -> Vec<Verdict> {
    let mut out: Vec<Verdict> = study.arms.iter().map(overoptimised).collect();
    out.extend(study.arms.iter().map(gold_followed));
    for other in ["mean", "matched"] {
        out.extend(differences(study, other));
    }
    out
}

/// "The proxy rose while true quality fell": in each run the proxy ends above its start, and true quality's interval at the
/// end lies below that at the start.
fn overoptimised(arm: &Arm) -> Verdict {
    let sentence = format!("{}: the proxy rose while true quality fell", arm.label);
    let mut told = Vec::new();
    let (mut seen, mut against, mut known) = (0, 0, 0);
    for run in &arm.runs {
        let (Some(start), Some(end)) = (run.start(), run.end()) else { continue };
        let (Some(before), Some(after)) = (start.quality, end.quality) else { continue };
        known += 1;
        let rose = end.proxy > start.proxy;
        let below = end.quality_high.zip(start.quality_low).is_some_and(|(high, low)| high < low);
        seen += usize::from(rose && below);
        against += usize::from(!rose || after >= before);
        told.push(format!(
            "seed {}: proxy {:+.2} to {:+.2}, true quality {before:.2} to {after:.2}",
            run.seed, start.proxy, end.proxy
        ));
    }
    let answer = match known {
        0 => Answer::CannotTell,
        n if seen == n => Answer::Seen,
        n if against == n => Answer::NotSeen,
        _ => Answer::CannotTell,
    };
    let because = if told.is_empty() { NO_QUALITY.into() } else { told.join("; ") };
    Verdict { sentence, answer, because }
}

/// "Gold followed true quality": over the steps of each run the two correlate (Spearman) at 0.5 or more.
fn gold_followed(arm: &Arm) -> Verdict {
    let rho: Vec<(u64, Option<f64>)> = arm
        .runs
        .iter()
        .map(|run| {
            let (gold, quality): (Vec<f64>, Vec<f64>) =
                run.sampled().filter_map(|row| Some((row.gold, row.quality?))).unzip();
            (run.seed, stages::stats::spearman(&gold, &quality))
        })
        .collect();
    let all = |test: fn(f64) -> bool| !rho.is_empty() && rho.iter().all(|(_, r)| r.is_some_and(test));
    let sentence = format!("{}: gold followed true quality", arm.label);
    if !arm.runs.iter().all(Run::has_quality) {
        return Verdict { sentence, answer: Answer::CannotTell, because: NO_QUALITY.into() };
    }
    let answer = if all(|r| r >= 0.5) {
        Answer::Seen
    } else if all(|r| r <= 0.0) {
        Answer::NotSeen
    } else {
        Answer::CannotTell
    };
    let because = rho
        .iter()
        .map(|(seed, r)| {
            format!("seed {seed}: Spearman over steps {}", r.map_or("undefined".into(), |r| format!("{r:+.2}")))
        })
        .collect::<Vec<_>>()
        .join("; ");
    Verdict { sentence, answer, because }
}

type Measure = fn(&stages::types::CurvePoint) -> Option<f64>;
const MEASURES: [(&str, Measure); 2] =
    [("true quality", |row| row.quality), ("gold (SFT deviations)", |row| Some(row.gold_sd))];

/// "Adaptive minus `other`" at the last step: of each adaptive arm and each arm of that objective beside it. Where there are
/// none, the sentence stands and says what is missing.
fn differences(study: &Study, other: &str) -> Vec<Verdict> {
    let untold = |adaptive: &str, because: String| {
        MEASURES.map(|(what, _)| Verdict {
            sentence: told(adaptive, other, what),
            answer: Answer::CannotTell,
            because: because.clone(),
        })
    };
    let adaptive: Vec<&Arm> = study.arms.iter().filter(|arm| arm.is_papers_own()).collect();
    if adaptive.is_empty() {
        return untold("adaptive", "no adaptive arm with variance scope `sample` was evaluated".into()).into();
    }
    adaptive
        .into_iter()
        .flat_map(|arm| {
            let others: Vec<&Arm> = study.beside(arm, other).collect();
            if others.is_empty() {
                let because =
                    format!("no arm of objective `{other}` with lambda {} stands beside {}", arm.lambda, arm.label);
                return untold(&arm.label, because).into();
            }
            others.into_iter().flat_map(|other| MEASURES.map(|m| between(arm, other, m))).collect::<Vec<_>>()
        })
        .collect()
}

fn told(adaptive: &str, other: &str, what: &str) -> String {
    format!("{adaptive} above {other} in {what} at the end")
}

/// The difference of two arms in one measure, paired by seed.
fn between(arm: &Arm, other: &Arm, (what, of): (&str, Measure)) -> Verdict {
    let sentence = told(&arm.label, &other.label, what);
    let pairs: Vec<(&Run, &Run)> =
        arm.runs.iter().filter_map(|a| Some((a, other.runs.iter().find(|b| b.seed == a.seed)?))).collect();
    let measured: Vec<(u64, f64)> =
        pairs.iter().filter_map(|(a, b)| Some((a.seed, of(a.end()?)? - of(b.end()?)?))).collect();
    if measured.is_empty() {
        let because = if pairs.is_empty() { "no seed was evaluated in both arms" } else { NO_QUALITY };
        return Verdict { sentence, answer: Answer::CannotTell, because: because.into() };
    }
    difference(sentence, &measured, seeds_vary_ppo_only(&pairs))
}

/// Whether every run compared starts from the same posts, SFT model and rewards and is judged by the same gold model.
fn seeds_vary_ppo_only(pairs: &[(&Run, &Run)]) -> bool {
    let mut made_from = pairs.iter().flat_map(|(a, b)| [&a.made_from, &b.made_from]);
    let first = made_from.next().and_then(Option::as_ref);
    first.is_some() && made_from.all(|other| other.as_ref() == first)
}

fn difference(sentence: String, pairs: &[(u64, f64)], ppo_only: bool) -> Verdict {
    let values = pairs.iter().map(|(seed, d)| format!("seed {seed}: {d:+.3}")).collect::<Vec<_>>().join("; ");
    let n = pairs.len();
    let differences: Vec<f64> = pairs.iter().map(|p| p.1).collect();
    let mean = stages::stats::mean(&differences);
    if n < ENOUGH_SEEDS {
        let because = format!("cannot tell (n = {n}): {values}");
        return Verdict { sentence, answer: Answer::CannotTell, because };
    }
    let p = sign_flip_p(&differences);
    let answer = match p {
        p if p >= SIGNIFICANT => Answer::CannotTell,
        _ if mean > 0.0 => Answer::Seen,
        _ => Answer::NotSeen,
    };
    let shared = if ppo_only { " (seeds vary PPO only: corpus, SFT, gold model and proxies are shared)" } else { "" };
    let because = format!("n = {n}, mean {mean:+.3}, paired sign-flip p = {p:.3}{shared}; {values}");
    Verdict { sentence, answer, because }
}

/// Two-sided p of the paired sign-flip test, exact over all 2^n flips; for n > 20 over the first 2^20 of a fixed sequence.
pub fn sign_flip_p(differences: &[f64]) -> f64 {
    let n = differences.len();
    let observed = differences.iter().sum::<f64>().abs() - 1e-12;
    let flips = 1_u64 << n.min(20);
    let mut extreme = 0_u64;
    for flip in 0..flips {
        // Beyond 20 differences the flips are spread by an odd multiplier: fixed, and the same for everybody.
        let pattern = if n > 20 { flip.wrapping_mul(0x9E37_79B9_7F4A_7C15) } else { flip };
        let sum: f64 = differences
            .iter()
            .enumerate()
            .map(|(i, d)| if pattern.rotate_right((i % 64) as u32) & 1 == 1 { -d } else { *d })
            .sum();
        extreme += u64::from(sum.abs() >= observed);
    }
    extreme as f64 / flips as f64
}

#[cfg(test)]
mod tests {
    use super::super::study::tests::arm;
    use super::*;

    #[test]
    fn below_five_seeds_no_difference_is_told() {
        let v = difference("a above b".into(), &[(1, 0.5), (2, 0.7)], true);
        assert_eq!(v.answer, Answer::CannotTell);
        assert_eq!(v.because, "cannot tell (n = 2): seed 1: +0.500; seed 2: +0.700");
    }

    #[test]
    fn five_equal_signs_are_not_yet_significant_and_eight_are() {
        assert!((sign_flip_p(&[1.0; 5]) - 2.0 / 32.0).abs() < 1e-12);
        let eight: Vec<(u64, f64)> = (0..8).map(|s| (s, 1.0)).collect();
        assert_eq!(difference("a".into(), &eight, true).answer, Answer::Seen);
        let negative: Vec<(u64, f64)> = (0..8).map(|s| (s, -1.0)).collect();
        assert_eq!(difference("a".into(), &negative, true).answer, Answer::NotSeen);
    }

    #[test]
    fn mixed_signs_give_a_large_p() {
        assert!(sign_flip_p(&[1.0, -1.0, 0.9, -1.1, 0.2, -0.1]) > 0.5);
    }

    fn study(arms: Vec<Arm>) -> Study {
        Study { arms, ..Study::default() }
    }

    fn because<'a>(verdicts: &'a [Verdict], sentence: &str) -> (Answer, &'a str) {
        let found = verdicts.iter().find(|v| v.sentence.contains(sentence));
        found
            .map(|v| (v.answer, v.because.as_str()))
            .unwrap_or_else(|| panic!("`{sentence}` is not told: {verdicts:?}"))
    }

    #[test]
    fn every_sentence_stands_with_a_reason_where_it_cannot_be_told() {
        let mut lone = arm(&[("arm", "adaptive")], "adaptive", &[0.7]);
        for row in &mut lone.runs[0].curve {
            (row.quality, row.quality_low, row.quality_high) = (None, None, None);
        }
        let told = verdicts(&study(vec![lone.clone()]));
        for sentence in ["the proxy rose", "gold followed"] {
            assert_eq!(because(&told, sentence), (Answer::CannotTell, NO_QUALITY));
        }
        for other in ["mean", "matched"] {
            for what in ["true quality", "gold"] {
                let (answer, because) = because(&told, &format!("adaptive above {other} in {what}"));
                assert_eq!(answer, Answer::CannotTell);
                assert!(because.contains(&format!("no arm of objective `{other}`")), "{because}");
            }
        }
        let mean = arm(&[("arm", "mean")], "mean", &[0.5]);
        let told = verdicts(&study(vec![mean.clone()]));
        assert!(because(&told, "adaptive above mean").1.contains("no adaptive arm"));
        let told = verdicts(&study(vec![lone, mean]));
        assert_eq!(because(&told, "adaptive above mean in true quality"), (Answer::CannotTell, NO_QUALITY));
    }

    #[test]
    fn that_seeds_vary_ppo_only_is_told_only_where_it_is_so() {
        let ends = [0.9; 6];
        let (adaptive, mut mean) =
            (arm(&[("arm", "adaptive")], "adaptive", &ends), arm(&[("arm", "mean")], "mean", &[0.5; 6]));
        let told = verdicts(&study(vec![adaptive.clone(), mean.clone()]));
        let (answer, shared) = because(&told, "adaptive above mean in gold");
        assert!(answer == Answer::Seen && shared.contains("seeds vary PPO only"), "{shared}");
        mean.runs[3].made_from = Some(vec![engine::names::Digest::of(b"another gold")]);
        let told = verdicts(&study(vec![adaptive, mean]));
        assert!(!because(&told, "adaptive above mean in gold").1.contains("seeds vary"));
    }
}
