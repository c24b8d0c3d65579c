//! Claims about arms and seeds, and the runs that tests of the report are made of.

use stages::types::{Mechanism, SftScale};

use super::*;

/// A point on half B with intervals of +-0.1 and 200 prompts.
pub fn point(step: i64, greedy: bool, quality: Option<f64>, gold: f64, proxy: f64) -> CurvePoint {
    CurvePoint {
        step,
        half: Half::B,
        greedy,
        n: 200,
        gold,
        gold_low: gold - 0.1,
        gold_high: gold + 0.1,
        gold_sd: gold,
        gold_sd_low: gold - 0.1,
        gold_sd_high: gold + 0.1,
        win_rate: 0.5,
        win_rate_low: 0.4,
        win_rate_high: 0.6,
        proxy,
        proxy_low: proxy - 0.1,
        proxy_high: proxy + 0.1,
        mu: proxy,
        variance: Some(0.2),
        variance_offset: Some(0.05),
        variance_slope: Some(0.05),
        variance_rest: Some(0.1),
        kl: step as f64,
        kl_low: step as f64 - 0.1,
        kl_high: step as f64 + 0.1,
        kl_exact: step as f64,
        length: 20.0,
        length_low: 19.0,
        length_high: 21.0,
        eos_rate: 0.9,
        eos_rate_low: 0.8,
        eos_rate_high: 1.0,
        quality,
        quality_low: quality.map(|q| q - 0.1),
        quality_high: quality.map(|q| q + 0.1),
        coverage: None,
        invented: None,
        fluency: None,
        spearman_s2_error: None,
    }
}

/// A run of eight steps whose true quality and gold end at `end`.
pub fn run(objective: &str, seed: u64, end: f64) -> Run {
    let about = EvaluationInfo {
        objective: objective.to_owned(),
        lambda: 0.005,
        seed,
        evaluation_seed: 0,
        steps: vec![0, 4, 8],
        chosen_step: 4,
        final_step: 8,
        sft: SftScale { gold_mean: 0.0, gold_std: 1.0 },
        fact_sensitivity: None,
        reads_the_post: false,
        mechanism: Mechanism::default(),
        prompt_count: 400,
        more: [("variance_scope".to_owned(), Value::from("sample"))].into_iter().collect(),
    };
    let curve = [(0, 0.5), (4, 0.6), (8, end)]
        .map(|(step, q)| point(step, false, Some(q), q, step as f64))
        .into_iter()
        .chain([point(0, true, Some(0.55), 0.1, 0.0), point(8, true, Some(end), end, 8.0)])
        .collect();
    let input_digests = [("gold".to_owned(), BTreeSet::from([Digest::of(b"gold")]))].into();
    Run {
        seed,
        about,
        curve,
        examples: Vec::new(),
        ensemble_s2: None,
        calibration: Vec::new(),
        phases: Vec::new(),
        policy: None,
        input_digests: Some(input_digests),
    }
}

pub fn arm(labels: &[(&str, &str)], objective: &str, ends: &[f64]) -> Arm {
    let runs: Vec<Run> = ends.iter().zip(1..).map(|(end, seed)| run(objective, seed, *end)).collect();
    Arm {
        stage: "evaluate".to_owned(),
        labels: labels.iter().map(|(d, l)| ((*d).to_owned(), (*l).to_owned())).collect(),
        label: labels.iter().map(|(_, l)| *l).collect::<Vec<_>>().join(", "),
        role: Role::of(&runs[0].about),
        lambda: 0.005,
        runs,
    }
}

#[test]
fn an_arms_role_follows_from_its_evaluation() {
    let role = |objective: &str, more: Value| {
        let mut about = run(objective, 1, 0.5).about;
        about.more = more.as_object().cloned().unwrap();
        Role::of(&about)
    };
    use serde_json::json;
    for (objective, more, expected) in [
        ("mean", json!({}), Role::Mean),
        ("mean", json!({"kl": {"controller": "constant"}}), Role::Mean),
        ("mean", json!({"kl": {"controller": "target", "target": 4.0}}), Role::KlTarget),
        ("standard", json!({"kl": {"controller": "target"}}), Role::Other),
        ("matched", json!({}), Role::MatchedConstant),
        ("matched", json!({"matching": "phases"}), Role::MatchedPhases),
        ("adaptive", json!({"variance_scope": "sample"}), Role::Adaptive),
        ("adaptive", json!({"variance_scope": "batch"}), Role::Batch),
        ("adaptive", json!({"variance_scope": "shuffled"}), Role::Shuffled),
        ("a command's own", json!({}), Role::Other),
    ] {
        assert_eq!(role(objective, more.clone()), expected, "{objective} {more}");
    }
}

#[test]
fn redrawn_stages_are_those_that_differ_between_seeds() {
    let mut study = Study { arms: vec![arm(&[("arm", "mean")], "mean", &[0.5; 3])], ..Study::default() };
    assert_eq!(study.redrawn_stages(), Some((vec![], vec!["gold"])));
    for run in &mut study.arms[0].runs {
        let digest = Digest::of(&run.seed.to_le_bytes());
        run.input_digests.as_mut().unwrap().insert("proxy".to_owned(), [digest].into());
    }
    assert_eq!(study.redrawn_stages(), Some((vec!["proxy"], vec!["gold"])));
    study.arms[0].runs[1].input_digests = None;
    assert_eq!(study.redrawn_stages(), None);
}

#[test]
fn equal_labels_of_two_stages_are_two_arms() {
    let mut arms = [arm(&[("arm", "mean")], "mean", &[0.5]), arm(&[("arm", "mean")], "mean", &[0.5])];
    arms[1].stage = "other".to_owned();
    assert!(!arms[0].differs_in_one_label(&arms[1]));
    disambiguate_labels(&mut arms);
    assert_eq!(arms.map(|arm| arm.label), ["evaluate: mean", "other: mean"]);
}

#[test]
fn a_size_is_compared_with_itself() {
    let [s, m] = ["s", "m"].map(|size| {
        (
            arm(&[("size", size), ("arm", "adaptive")], "adaptive", &[0.5]),
            arm(&[("size", size), ("arm", "mean")], "mean", &[0.5]),
        )
    });
    let study = Study { arms: vec![s.0.clone(), s.1, m.0.clone(), m.1], ..Study::default() };
    for (adaptive, other) in [(&s.0, "s, mean"), (&m.0, "m, mean")] {
        assert_eq!(study.comparable(adaptive, Role::Mean).map(|a| a.label.as_str()).collect::<Vec<_>>(), [other]);
    }
}

#[test]
fn the_pipelines_own_seed_is_checked_for_tuning_overlap() {
    let arms = vec![arm(&[("arm", "mean")], "mean", &[0.5])];
    let study =
        |tuning: &[u64]| Study { arms: arms.clone(), tuning: tuning.to_vec(), seed: Some(17), ..Study::default() };
    assert_eq!(study(&[3]).tuning_overlap(), None);
    assert!(study(&[17]).tuning_overlap().unwrap().contains("the pipeline's own seed, 17"));
    assert!(study(&[1]).tuning_overlap().unwrap().contains("reported here: 1."));
}
