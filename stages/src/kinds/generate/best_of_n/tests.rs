//! Tests of `generate.best_of_n` and of `evaluate` on its output.

use engine::error::Result;
use engine::kind::{AnyKind, ConnectedInput, Kind};
use serde_json::{Value, json};

use super::{BestOfN, Candidate};
use crate::kinds::evaluate::Evaluate;
use crate::kinds::generate::GenerateBestOfN;
use crate::rl::held_out::Prompt;
use crate::stats::mean;
use crate::testing::{Bench, Out, assert_pinned, run, run_seeded, toys};
use crate::types::Objective;
use crate::types::{BestOfPoint, Evaluation, Half, Score, Split};

fn generate(more: Value, seed: u64) -> Result<Out> {
    let mut bench = Bench::new();
    bench.input("policy", "Model", |folder| toys::write_model(folder, 1));
    bench.input("rewards", "Ensemble", |folder| toys::write_ensemble(folder, 1, &["1", "2", "3"]));
    bench.input("posts", "Posts", |folder| toys::write_posts(folder, posts()));
    let mut with = json!({ "n": 6, "min_new_tokens": 2, "max_new_tokens": 8,
        "objectives": ["standard", "mean", "pessimistic", "mean_minus_std"] });
    if let (Value::Object(with), Value::Object(more)) = (&mut with, more) {
        with.extend(more);
    }
    run_seeded(&GenerateBestOfN, with, bench.inputs(), seed)
}

fn posts() -> impl Iterator<Item = crate::types::Post> {
    toys::posts_with_facts(3, Split::Rl).into_iter().chain(toys::posts_with_facts(9, Split::Valid))
}

fn samples(out: &Out) -> Result<Vec<Candidate>> {
    BestOfN::samples(&out.path())?.collect()
}

fn evaluate(made: &Out) -> Result<Out> {
    let mut bench = Bench::new();
    bench.input("policy", "BestOfN", |folder| {
        for (name, bytes) in toys::bytes_of(&made.path()) {
            std::fs::write(folder.join(name), bytes).expect("a file in a temporary folder");
        }
        Ok(())
    });
    bench.input("gold", "RewardModel", |folder| toys::write_reward_model(folder, 1));
    bench.input("posts", "Posts", |folder| toys::write_posts(folder, posts()));
    run(&Evaluate, json!({ "resamples": 100 }), bench.inputs())
}

#[test]
fn every_prompt_has_n_responses_scored_by_every_member_and_objective() -> Result<()> {
    let out = generate(json!({}), 7)?;
    let rows = samples(&out)?;
    assert_eq!(rows.len(), 9 * 6);
    for (i, row) in rows.iter().enumerate() {
        assert_eq!((row.post_id.as_str(), row.index), (format!("valid{}", i / 6).as_str(), i as i64 % 6));
        assert_eq!(row.half, Prompt { post_id: row.post_id.clone(), ids: Vec::new() }.half());
        let phi: Vec<f64> = row.scores.iter().map(|&score| f64::from(score)).collect();
        let (mu, least) = (mean(&phi), phi.iter().copied().fold(f64::INFINITY, f64::min));
        let right = [phi[0], mu, least, mu - crate::stats::std(&phi)];
        assert!(row.phi.iter().zip(right).all(|(a, b)| (a - b).abs() < 1e-12), "{row:?}");
        assert!((3..=8).contains(&row.ids.len()) && row.scores.len() == 3, "{row:?}");
    }
    assert!(rows.windows(2).any(|pair| pair[0].post_id == pair[1].post_id && pair[0].ids != pair[1].ids));
    Ok(())
}

#[test]
fn responses_depend_on_seed_post_and_index_and_not_on_limit_or_batch() -> Result<()> {
    let all = samples(&generate(json!({}), 7)?)?;
    let drawn = |rows: &[Candidate]| rows.iter().map(|row| (row.post_id.clone(), row.ids.clone())).collect::<Vec<_>>();
    for batch in [1, 4, 7, 64] {
        let some = samples(&generate(json!({ "prompts": 4, "batch": batch }), 7)?)?;
        assert_eq!(drawn(&some), drawn(&all[..4 * 6]), "batch {batch}");
    }
    assert_ne!(drawn(&samples(&generate(json!({}), 8)?)?), drawn(&all));
    let bytes = || Ok::<_, engine::error::Error>(toys::bytes_of(&generate(json!({}), 7)?.path()));
    assert_eq!(bytes()?, bytes()?);
    Ok(())
}

#[test]
fn what_cannot_choose_is_told_at_planning() {
    let faults = |with: Value| -> Vec<String> {
        let found = (&GenerateBestOfN as &dyn AnyKind).normalise(&with).err().unwrap_or_default();
        found.into_iter().map(|(field, what)| format!("{field}: {what}")).collect()
    };
    assert!(faults(json!({})).is_empty());
    assert_eq!(faults(json!({ "n": 1 })), ["n: must be at least 2"]);
    assert_eq!(faults(json!({ "prompts": 0, "batch": 0 })).len(), 2);
    assert_eq!(faults(json!({ "min_new_tokens": 9, "max_new_tokens": 8 })).len(), 1);
    assert!(faults(json!({ "objectives": ["adaptive"] }))[0].contains("as `mean` does"));
    assert!(faults(json!({ "objectives": ["mean", "mean"] }))[0].contains("twice"));
    assert_eq!(faults(json!({ "objectives": [] })), ["objectives: must name at least one"]);
    assert!(!faults(json!({ "objectives": ["median"] })).is_empty());

    let wired = |objectives: &[&str], output: &str| {
        let params = serde_json::from_value(json!({ "objectives": objectives })).expect("good parameters");
        let inputs = [ConnectedInput { port: "rewards", kind: "", output, params: &Value::Null }];
        Kind::check_wiring(&GenerateBestOfN, &params, &inputs).len()
    };
    assert_eq!(wired(&["standard"], "RewardModel"), 0);
    assert_eq!(wired(&["standard", "mean"], "RewardModel"), 1);
    assert_eq!(wired(&["standard", "mean"], "Ensemble"), 0);
}

#[test]
fn the_small_result_is_pinned_by_the_version() -> Result<()> {
    assert_eq!((GenerateBestOfN::VERSION, lm::NUMERICS), (1, 5));
    let out = generate(json!({}), 7)?;
    let rows = samples(&out)?;
    let phi = |o: usize| mean(&rows.iter().map(|row| row.phi[o]).collect::<Vec<_>>());
    let found = [
        ("mean tokens", out.metric("mean_tokens")),
        ("standard", phi(0)),
        ("mean", phi(1)),
        ("pessimistic", phi(2)),
        ("mean_minus_std", phi(3)),
    ];
    assert_pinned(&found, &[8.0, 0.45895, -0.30227, -1.94590, -1.68265]);
    Ok(())
}

#[test]
fn evaluation_tells_the_best_of_n_from_all_samples() -> Result<()> {
    let made = generate(json!({}), 7)?;
    let out = evaluate(&made)?;
    let scores: Vec<Score> = Evaluation::scores(&out.path())?.collect::<Result<_>>()?;
    let samples = samples(&made)?;
    assert_eq!(scores.len(), samples.len());
    let points = Evaluation::best_of_n(&out.path())?.expect("there is a table of best-of-n");
    assert_eq!(points.len(), 2 * 4 * 4, "halves, objectives, sizes 1, 2, 4 and 6");
    let at = |half: Half, objective: Objective, n: i64| -> &BestOfPoint {
        points.iter().find(|p| (p.half, p.objective, p.n) == (half, objective, n)).expect("a point for each")
    };
    for half in [Half::A, Half::B] {
        let here = || scores.iter().zip(&samples).filter(move |(score, _)| score.half == half);
        let of = |f: &dyn Fn(&Score) -> f64| mean(&here().map(|(score, _)| f(score)).collect::<Vec<_>>());
        for (o, objective) in [Objective::Standard, Objective::Mean, Objective::Pessimistic, Objective::MeanMinusStd]
            .into_iter()
            .enumerate()
        {
            let one = at(half, objective, 1);
            let near = |a: f64, b: f64| assert!((a - b).abs() < 1e-9, "{objective}: {a} {b}");
            near(one.gold, of(&|s| s.gold));
            near(one.gold_sd, 0.0);
            near(one.quality.expect("posts carry facts"), of(&|s| s.quality.unwrap_or(f64::NAN)));
            near(one.mu, of(&|s| s.mean));
            near(one.variance.expect("an ensemble"), of(&|s| s.variance.unwrap_or(f64::NAN)));
            near(one.length, of(&|s| s.length as f64));
            near(one.proxy, mean(&here().map(|(_, sample)| sample.phi[o]).collect::<Vec<_>>()));

            // The best of all six is the single sample with the highest phi.
            let all: Vec<_> = here().collect();
            let best: Vec<f64> = all
                .chunks(6)
                .map(|six| six.iter().max_by(|a, b| a.1.phi[o].total_cmp(&b.1.phi[o])).expect("six samples").0.gold)
                .collect();
            near(at(half, objective, 6).gold, mean(&best));
            assert_eq!(one.prompts as usize, best.len());
            let proxies = [1, 2, 4, 6].map(|n| at(half, objective, n).proxy);
            assert!(proxies.windows(2).all(|pair| pair[0] < pair[1]), "{proxies:?}");
        }
        let six = at(half, Objective::Mean, 6);
        assert!(six.gold_low <= six.gold && six.gold <= six.gold_high && six.gold_low < six.gold_high);
    }

    // Readers of an evaluation find the SFT samples, one per prompt, at step 0.
    let (info, curve) = (Evaluation::info(&out.path())?, Evaluation::curve(&out.path())?);
    assert_eq!((info.steps, info.chosen_step, info.final_step, info.prompt_count), (vec![0], 0, 0, 9));
    assert_eq!(info.objective, Evaluation::BEST_OF_N_OBJECTIVE);
    assert_eq!(curve.iter().map(|row| (row.step, row.n, row.kl)).collect::<Vec<_>>().len(), 2);
    assert!(curve.iter().all(|row| row.step == 0 && row.kl == 0.0) && curve.iter().map(|row| row.n).sum::<i64>() == 9);
    assert!(!Evaluation::examples(&out.path())?.is_empty());
    assert!((out.metric("mean_quality") - at(Half::B, Objective::Mean, 6).quality.unwrap_or(f64::NAN)).abs() < 1e-12);
    Ok(())
}

#[test]
fn what_cannot_be_evaluated_is_told() -> Result<()> {
    let made = generate(json!({ "prompts": 2 }), 7)?;
    let in_a: Vec<Candidate> = samples(&made)?.into_iter().map(|row| Candidate { half: Half::A, ..row }).collect();
    crate::table::write(&made.path().join(BestOfN::SAMPLES), in_a)?;
    let error = evaluate(&made).err().expect("no number comes from half B");
    assert!(error.message.contains("none of the 2 prompts") && error.exit_code() == 2, "{error}");

    let made = generate(json!({ "prompts": 4 }), 7)?;
    let file = made.path().join(BestOfN::INFO);
    let text = std::fs::read_to_string(&file).expect("the file is there");
    for (n, told) in [(0, "`n` is 0"), (5, "expected 5 that stand next to each other")] {
        std::fs::write(&file, text.replace("\"n\": 6", &format!("\"n\": {n}"))).expect("the test's own file");
        let error = evaluate(&made).err().expect("the table has six a prompt");
        assert!(error.message.contains(told), "{error}");
    }
    Ok(())
}

#[test]
fn samples_of_other_posts_are_told() -> Result<()> {
    let made = generate(json!({ "split": "rl" }), 7)?;
    let file = made.path().join(BestOfN::INFO);
    let text = std::fs::read_to_string(&file).expect("the file is there").replace("\"rl\"", "\"valid\"");
    std::fs::write(&file, text).expect("the test's own file");
    let error = evaluate(&made).err().expect("they are in no split `valid`");
    assert!(error.message.contains("post `rl0` is not in split `valid`"), "{error}");
    Ok(())
}
