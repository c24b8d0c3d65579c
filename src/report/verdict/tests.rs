use rand::SeedableRng;
use rand::rngs::StdRng;
use serde_json::{Value, json};
use stages::stats::normal;
use stages::types::{CurvePoint, FactSensitivity};

use super::super::inference::Verdict;
use super::super::study::tests::{arm, point, run};
use super::*;

/// An arm of ten evaluations on both halves whose true quality starts at 0.85 and ends near `end`, while the proxy
/// rises.
fn built(label: &str, objective: &str, more: Value, lambda: f64, end: f64, seeds: usize) -> Arm {
    let mut rng = StdRng::from_seed(*engine::names::Digest::of(label.as_bytes()).as_bytes());
    let mut arm = arm(&[("arm", label)], objective, &[end]);
    arm.lambda = lambda;
    arm.runs = (1..=seeds as u64)
        .map(|seed| {
            let end = end + 0.03 * normal(&mut rng);
            let curve = (0..10).flat_map(|step| {
                let done = (f64::from(step as i32 - 3) / 6.0).clamp(0.0, 1.0);
                let quality = 0.85 + (end - 0.85) * done + 0.01 * f64::from(step.min(3) as i32);
                let mut b = point(step, false, Some(quality), 2.0 * quality, f64::from(step as i32).sqrt());
                b.variance = Some(0.1 + 0.01 * step as f64);
                // A larger coefficient keeps the KL lower.
                b.kl_exact *= (0.02 / lambda).sqrt();
                [CurvePoint { half: Half::A, ..b.clone() }, b]
            });
            let mut run = Run { curve: curve.collect(), ..run(objective, seed, end) };
            run.about.more.extend(more.as_object().cloned().unwrap());
            run.about.lambda = lambda;
            run.about.fact_sensitivity = Some(FactSensitivity { mean: 0.5, low: 0.3, high: 0.7, n: 100 });
            run.about.mechanism.c_over_lambda_max = Some(1.8 + 0.05 * normal(&mut rng));
            run.about.mechanism.c_kl_share_max = Some(0.4 + 0.02 * normal(&mut rng));
            run.ensemble_s2 = Some((0.3, 0.1));
            run
        })
        .collect();
    arm.role = Role::of(&arm.runs[0].about);
    arm
}

/// A study in which the adaptive arm keeps its quality, every arm with about its coefficient drops, and the mean arm
/// repeats.
pub fn constructed(seeds: usize) -> Study {
    let none = || json!({});
    let arms = vec![
        built("standard", "standard", none(), 0.02, 0.3, seeds),
        built("mean", "mean", none(), 0.02, 0.4, seeds),
        built("mean-again", "mean", none(), 0.02, 0.4, seeds),
        built("mean-0.01", "mean", none(), 0.01, 0.2, seeds),
        built("mean-0.08", "mean", none(), 0.08, 0.7, seeds),
        built("pessimistic", "pessimistic", none(), 0.02, 0.5, seeds),
        built("uwo", "uwo", none(), 0.02, 0.5, seeds),
        built("adaptive", "adaptive", none(), 0.02, 0.9, seeds),
        built("batch", "adaptive", json!({"variance_scope": "batch"}), 0.02, 0.6, seeds),
        built("shuffled", "adaptive", json!({"variance_scope": "shuffled"}), 0.02, 0.6, seeds),
        built("matched", "matched", none(), 0.02, 0.6, seeds),
        built("scheduled", "matched", json!({"matching": "phases"}), 0.02, 0.6, seeds),
        built("target", "mean", json!({"kl": {"controller": "target"}}), 0.02, 0.7, seeds),
    ];
    Study { arms, ..Study::default() }
}

fn without(mut study: Study, labels: &[&str]) -> Study {
    study.arms.retain(|arm| !labels.contains(&arm.label.as_str()));
    study
}

fn all_statements(findings: &Findings) -> impl Iterator<Item = &Statement> {
    findings.hypotheses.iter().chain(&findings.claims).flat_map(|family| &family.statements)
}

fn statement<'a>(findings: &'a Findings, sentence: &str) -> &'a Statement {
    all_statements(findings)
        .find(|statement| statement.sentence.contains(sentence))
        .unwrap_or_else(|| panic!("no statement `{sentence}`"))
}

#[test]
fn every_hypothesis_is_answered_on_a_study_with_the_effect() {
    let findings = Findings::of(&constructed(8));
    assert_eq!(findings.primary, Measure::Quality);
    let preconditions: Vec<_> =
        findings.hypotheses[0].statements.iter().map(|statement| (statement.name, statement.verdict)).collect();
    assert_eq!(preconditions, [("H1", Verdict::Shown), ("H2", Verdict::Shown)]);
    for family in &findings.hypotheses[1..3] {
        let found: Vec<_> = family
            .statements
            .iter()
            .map(|statement| (statement.name, statement.verdict, statement.parts.len()))
            .collect();
        let expected = [("H3", 1), ("H4", 2), ("H5", 2), ("H6", 1), ("H7", 1)];
        assert_eq!(found, expected.map(|(name, parts)| (name, Verdict::Shown, parts)), "{}", family.title);
        // Five tests with eight equal signs each.
        assert!(family.statements.iter().all(|statement| (statement.corrected.unwrap() - 5.0 / 128.0).abs() < 1e-12));
    }
    assert_eq!(statement(&findings, "falls less from its peak").verdict, Verdict::Shown);
    assert_eq!(statement(&findings, "at equal KL").verdict, Verdict::Shown);
    assert_eq!(statement(&findings, "adaptive above mean-0.08, the best of 3 fixed lambdas").verdict, Verdict::Shown);
    assert_eq!(statement(&findings, "gold falls from its peak").verdict, Verdict::NotShown);
    assert_eq!(statement(&findings, "mean: gold followed true quality").verdict, Verdict::Shown);
    assert_eq!(statement(&findings, "the proxy still rises").verdict, Verdict::Shown);
    assert_eq!(statement(&findings, "rises less in the last third").verdict, Verdict::Shown);
    assert_eq!(statement(&findings, "adaptive: the ensemble's variance rose").verdict, Verdict::Shown);
    assert_eq!(statement(&findings, "standard over-optimises").verdict, Verdict::Shown);
    assert_eq!(findings.noise.len(), 2);
    assert!(findings.noise[0].1.mean.abs() < 0.06 && findings.noise[0].1.label == "mean-again − mean");
    assert_eq!(findings.not_judged(), "");
    assert_eq!(statement(&findings, "adaptive above uwo").verdict, Verdict::Shown);
}

#[test]
fn the_outcome_is_measured_on_half_b() {
    let mut study = constructed(6);
    for point in study.arms.iter_mut().flat_map(|arm| &mut arm.runs).flat_map(|run| &mut run.curve) {
        if point.half == Half::A {
            point.quality = Some(0.0);
        }
    }
    let findings = Findings::of(&study);
    let difference = statement(&findings, "adaptive above mean").parts[0].mean;
    assert!((0.3..0.5).contains(&difference), "{difference}");
}

#[test]
fn the_best_fixed_lambda_is_chosen_on_half_a() {
    let mut study = constructed(6);
    let arm = study.arms.iter_mut().find(|arm| arm.label == "mean-0.01").unwrap();
    for point in arm.runs.iter_mut().flat_map(|run| &mut run.curve).filter(|point| point.half == Half::A) {
        point.quality = Some(1.0);
    }
    let findings = Findings::of(&study);
    let statement = statement(&findings, "the best of 3 fixed lambdas");
    assert_eq!(statement.sentence, "adaptive above mean-0.01, the best of 3 fixed lambdas on half A");
    assert!(statement.parts[0].mean > 0.3, "compared on half B");
}

#[test]
fn a_study_without_an_effect_shows_none() {
    let mut study = constructed(8);
    for arm in &mut study.arms {
        let (label, objective) = (arm.label.clone(), arm.runs[0].about.objective.clone());
        let more = Value::Object(arm.runs[0].about.more.clone());
        *arm = built(&label, &objective, more, arm.lambda, 0.6, 8);
    }
    let findings = Findings::of(&study);
    for statement in findings.hypotheses[1..3].iter().flat_map(|family| &family.statements) {
        assert_eq!(statement.verdict, Verdict::NotShown, "{statement:?}");
        assert!(statement.parts.iter().all(|part| part.interval.is_some_and(|(low, high)| low < 0.05 && high > -0.05)));
    }
}

#[test]
fn the_demonstration_note_for_two_seeds_appears_once() {
    let findings = Findings::of(&constructed(2));
    let said = findings.notes.iter().filter(|note| note.contains("no test is possible below 6")).count();
    assert_eq!((said, findings.notes[0].starts_with("A demonstration with 2 seeds:")), (1, true));
    assert!(
        all_statements(&findings)
            .all(|statement| statement.verdict == Verdict::NotJudged && statement.corrected.is_none())
    );
    assert!(
        (statement(&findings, "adaptive above mean").parts[0].mean - 0.45).abs() < 0.1,
        "but the differences are there"
    );
    let five = Findings::of(&constructed(5));
    assert!(all_statements(&five).all(|statement| statement.verdict == Verdict::NotJudged));
}

#[test]
fn a_sweep_of_three_evaluations_and_one_seed_gives_no_verdict() {
    let mut arms = vec![built("a", "mean", json!({}), 0.01, 0.4, 1), built("b", "mean", json!({}), 0.02, 0.9, 1)];
    for run in arms.iter_mut().flat_map(|arm| &mut arm.runs) {
        run.curve.retain(|point| point.step % 4 == 0);
    }
    let findings = Findings::of(&Study { arms, ..Study::default() });
    assert!(all_statements(&findings).all(|statement| statement.verdict == Verdict::NotJudged));
    assert!(all_statements(&findings).all(|statement| !statement.sentence.contains("gold followed")));
    let missing = findings.not_judged();
    assert!(
        missing.contains("gold followed true quality") && missing.contains("fewer than 6 evaluations"),
        "{missing}"
    );
    assert!(missing.contains("H1 to H7 (no adaptive arm"), "{missing}");
    // Many seeds do not make up for too few evaluations.
    let mut study = constructed(8);
    for run in study.arms.iter_mut().flat_map(|arm| &mut arm.runs) {
        run.curve.retain(|point| point.step % 4 == 0);
    }
    assert!(all_statements(&Findings::of(&study)).all(|statement| !statement.sentence.contains("followed")));
}

#[test]
fn statements_that_cannot_be_judged_are_one_line() {
    let study = without(constructed(8), &["matched", "scheduled", "target", "batch", "shuffled", "pessimistic"]);
    let findings = Findings::of(&study);
    let missing = findings.not_judged();
    assert_eq!(
        missing,
        "Not judged: H4 (no matched arm to compare with adaptive); H5 (no shuffled and batch arm to compare with adaptive); \
         H7 (no KL-target arm to compare with adaptive); adaptive above pessimistic (no pessimistic arm to compare with adaptive)."
    );
    // Two tests are left of the five that were registered: the correction is still for five.
    assert!((statement(&findings, "adaptive above standard").corrected.unwrap() - 5.0 / 128.0).abs() < 1e-12);
}

#[test]
fn a_statement_about_two_controls_is_not_judged_on_one() {
    let findings = Findings::of(&without(constructed(8), &["scheduled"]));
    assert!(
        all_statements(&findings).all(|statement| statement.name != "H4" || !statement.sentence.contains("matched"))
    );
    assert!(findings.not_judged().contains("H4 (no matched arm"), "{}", findings.not_judged());
}

#[test]
fn nothing_is_judged_before_all_evaluations_are_there() {
    let study = Study { absent: 3, ..constructed(8) };
    let findings = Findings::of(&study);
    assert!(findings.notes[0].starts_with("Interim: 3 evaluations"));
    assert!(
        all_statements(&findings)
            .all(|statement| statement.verdict == Verdict::NotJudged && statement.corrected.is_none())
    );
}

#[test]
fn gold_is_primary_where_posts_carry_no_facts() {
    let mut study = constructed(8);
    for point in study.arms.iter_mut().flat_map(|arm| &mut arm.runs).flat_map(|run| &mut run.curve) {
        point.quality = None;
    }
    let findings = Findings::of(&study);
    assert_eq!(findings.primary, Measure::Gold);
    assert!(findings.notes.iter().any(|note| note.contains("gold (SFT deviations)") && note.contains(NO_QUALITY)));
    assert_eq!(statement(&findings, "adaptive above mean").verdict, Verdict::Shown);
    assert!(findings.not_judged().contains(&format!("gold followed true quality ({NO_QUALITY})")));
    assert!(findings.gates[0].seeds.iter().all(|(_, passed, _)| passed.is_none()));
}

#[test]
fn a_seed_that_misses_a_gate_is_named_and_kept() {
    let mut study = constructed(8);
    let mean = study.arms.iter_mut().find(|arm| arm.label == "mean").unwrap();
    mean.runs[2].about.mechanism.c_over_lambda_max = Some(1.4);
    mean.runs[4].about.mechanism.c_kl_share_max = Some(0.2);
    for point in &mut mean.runs[6].curve {
        point.quality = Some(0.9);
    }
    let adaptive = study.arms.iter_mut().find(|arm| arm.label == "adaptive").unwrap();
    adaptive.runs[0].ensemble_s2 = Some((0.1, 0.2));
    adaptive.runs[1].about.fact_sensitivity = Some(FactSensitivity { mean: 0.1, low: -0.1, high: 0.3, n: 100 });
    adaptive.runs[3].about.fact_sensitivity = None;
    let findings = Findings::of(&study);
    let missed: Vec<_> = findings.gates.iter().map(|gate| (gate.name, gate.missed(), gate.passed())).collect();
    assert_eq!(missed, [("G1", vec![7], 7), ("G2", vec![3, 5], 6), ("G3", vec![1], 7), ("G4", vec![2], 6)]);
    assert_eq!(statement(&findings, "adaptive above mean").n(), 8);
}

#[test]
fn arms_are_paired_by_seed_and_judged_by_the_seeds_they_share() {
    let mut study = constructed(8);
    let standard = study.arms.iter_mut().find(|arm| arm.label == "standard").unwrap();
    standard.runs.reverse();
    standard.runs.truncate(5);
    let findings = Findings::of(&study);
    let statement = statement(&findings, "adaptive above standard");
    assert_eq!((statement.n(), statement.verdict), (5, Verdict::NotJudged));
    assert_eq!(statement.parts[0].seeds.iter().map(|seed| seed.0).collect::<Vec<_>>(), [4, 5, 6, 7, 8]);
}

#[test]
fn each_adaptive_arm_has_answers_of_its_own_among_its_lambda() {
    let mut study = constructed(6);
    let other = built("adaptive-0.01", "adaptive", json!({}), 0.01, 0.2, 6);
    study.arms.push(other);
    let findings = Findings::of(&study);
    assert_eq!(statement(&findings, "adaptive-0.01 above mean-0.01").parts[0].seeds.len(), 6);
    assert!(all_statements(&findings).all(|statement| statement.sentence != "adaptive-0.01 above standard"));
    assert!(findings.hypotheses.iter().all(|family| family.title.starts_with("adaptive")));
    assert!(findings.not_judged().contains("adaptive-0.01: H6"));
}

#[test]
fn the_notes_name_the_stages_that_the_seeds_redraw() {
    let mut study = constructed(6);
    let notes = |study: &Study| Findings::of(study).notes.join(" ");
    assert!(
        notes(&study).contains("Seeds vary RL only: the answers hold for the one draw of what all seeds share (gold)."),
        "{}",
        notes(&study)
    );
    for run in study.arms.iter_mut().flat_map(|arm| &mut arm.runs) {
        let digest = engine::names::Digest::of(&run.seed.to_le_bytes());
        run.input_digests.as_mut().unwrap().insert("proxy".to_owned(), [digest].into());
    }
    let said = notes(&study);
    assert!(said.contains("Each seed redraws proxy and RL; shared by all seeds: gold.") && !said.contains("RL only"));
}
