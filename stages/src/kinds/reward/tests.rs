//! Tests of `reward.train`, `reward.ensemble` and `annotate.gold`.

use std::path::Path;

use engine::context::Input;
use engine::error::{Blame, Error, Result};
use engine::kind::{ConnectedInput, Kind};
use engine::names::Digest;
use lm::Sequence;
use serde_json::{Value, json};

use super::ensemble::RewardEnsemble;
use super::train::RewardTrain;
use crate::kinds::annotate::Gold;
use crate::reward::{load_ensemble, load_reward_model, load_tokenizer, score};
use crate::testing::{Bench, Out, assert_pinned, run, run_seeded, toys};
use crate::types::{Corruption, LearningPoint, Outcome, Preference, Preferences, Split};

fn bench(preferences: Vec<Preference>) -> Bench {
    let mut bench = Bench::new();
    bench.input("model", "Model", |folder| toys::write_model(folder, 1));
    bench.input("preferences", "Preferences", |folder| toys::write_preferences(folder, preferences));
    let posts = toys::posts_with_facts(8, Split::Calibration).into_iter().chain(toys::posts(4, Split::Valid));
    bench.input("posts", "Posts", |folder| toys::write_posts(folder, posts));
    bench
}

fn tiny(more: Value) -> Value {
    let mut with = json!({ "batch": 16, "lr": 0.02, "warmup": 2, "steps": 12, "held_out": 0.2, "max_new_tokens": 8 });
    if let (Value::Object(with), Value::Object(more)) = (&mut with, more) {
        with.extend(more);
    }
    with
}

fn train_on(preferences: Vec<Preference>, more: Value, seed: u64) -> Result<Out> {
    run_seeded(&RewardTrain, tiny(more), bench(preferences).inputs(), seed)
}

fn train(more: Value, seed: u64) -> Result<Out> {
    train_on(toys::preferences(96, Split::Gold), more, seed)
}

fn sequences(tokenizer: &lm::Tokenizer) -> Vec<Sequence> {
    let pairs = toys::pairs(6, Split::Proxy);
    let rows = pairs.into_iter().flat_map(|p| [(p.prompt_ids.clone(), p.a_ids), (p.prompt_ids, p.b_ids)]);
    let mut rows: Vec<Sequence> = rows.map(|(prompt, response)| Sequence { prompt, response }).collect();
    rows.push(Sequence { prompt: tokenizer.encode("a much longer prompt than the others"), response: vec![1, 2, 3] });
    rows
}

#[test]
fn soft_labels_that_say_nothing_teach_nothing_and_a_scale_of_people_is_none() -> Result<()> {
    let rows = |confidence: f64| {
        let sure = move |row: Preference| Preference { confidence: Some(confidence), ..row };
        toys::preferences(96, Split::Gold).into_iter().map(sure).collect::<Vec<_>>()
    };
    let loss = |confidence: f64, soft: bool| -> Result<f64> {
        Ok(train_on(rows(confidence), json!({ "soft_labels": soft, "eta": 0 }), 7)?.metric("train_loss"))
    };
    assert!(loss(0.5, true)? >= 0.693 && loss(0.5, false)? < loss(0.5, true)?);
    assert_eq!(loss(1.0, true)?, loss(0.5, false)?);
    let error = train_on(rows(8.0), json!({ "soft_labels": true }), 7).map(drop).unwrap_err();
    assert!(error.message.contains("is 8, not a probability"), "{error}");
    Ok(())
}

#[test]
fn a_separable_toy_is_learned_with_either_pool_and_with_all_weights() -> Result<()> {
    for more in [json!({}), json!({ "pool": "sum" }), json!({ "lora": null, "lr": 0.005 })] {
        let out = train(more.clone(), 7)?;
        assert!(out.metric("accuracy") > 0.9, "{more}: {}", out.metric("accuracy"));
        assert!(out.metric("held_out_pairs") > 4.0);
    }
    Ok(())
}

#[test]
fn the_same_seed_gives_the_same_bytes_and_another_another_head() -> Result<()> {
    let head = |out: &Out| std::fs::read(out.path().join("head.safetensors")).expect("a head");
    let (one, again, other) = (train(json!({}), 1)?, train(json!({}), 1)?, train(json!({}), 2)?);
    assert_eq!(toys::bytes_of(&one.path()), toys::bytes_of(&again.path()));
    assert_ne!(head(&one), head(&other));
    Ok(())
}

#[test]
fn the_small_result_is_pinned_by_the_version() -> Result<()> {
    assert_eq!((RewardTrain::VERSION, lm::NUMERICS), (2, 5));
    let out = train(json!({ "steps": 6 }), 7)?;
    assert_eq!((out.metric("pairs"), out.metric("held_out_pairs")), (73.0, 19.0));
    assert_pinned(&out.metrics(&["train_loss", "calibration_score_mean", "accuracy"]), &[0.06585, 0.19916, 1.0]);
    let curve = LearningPoint::read(&out.path())?;
    assert_eq!(curve.len(), 6);
    assert_pinned(&[("first loss", curve[0].loss), ("last loss", curve[5].loss)], &[1.15827, 0.06585]);
    Ok(())
}

#[test]
fn scores_are_centred_on_the_calibration_samples_and_do_not_depend_on_batch_or_order() -> Result<()> {
    let (centred, raw) = (train(json!({}), 7)?, train(json!({ "centring": "none" }), 7)?);
    let centred_model = load_reward_model(&centred.path())?;
    let raw_model = load_reward_model(&raw.path())?;
    assert_eq!(raw_model.centre, 0.0);
    assert!((centred_model.centre - centred.metric("calibration_score_mean")).abs() < 1e-9);
    let rows = sequences(&load_tokenizer(&centred.path())?);
    let rows: Vec<&Sequence> = rows.iter().collect();
    let scores = score(&centred_model, &rows, 4)?;
    let raw_scores = score(&raw_model, &rows, 4)?;
    for (a, b) in scores.iter().zip(&raw_scores) {
        assert!((f64::from(*b) - f64::from(*a) - centred_model.centre).abs() < 1e-5);
    }
    let backwards: Vec<&Sequence> = rows.iter().rev().copied().collect();
    let reversed: Vec<f32> = score(&centred_model, &backwards, 3)?.into_iter().rev().collect();
    for (a, b) in scores.iter().zip(&reversed) {
        assert!((a - b).abs() < 1e-5, "{a} {b}");
    }
    assert_eq!(scores, score(&centred_model, &rows, 4)?);
    // The toy's rows alternate between (good, bad) and (bad, good).
    assert!(scores[0] > scores[1] && scores[3] > scores[2]);
    Ok(())
}

#[test]
fn fact_sensitivity_is_measured_where_posts_carry_facts() -> Result<()> {
    let out = train(json!({}), 7)?;
    let sensitivity = load_reward_model(&out.path())?.config.fact_sensitivity.expect("posts carry facts");
    assert!(sensitivity.low <= sensitivity.mean && sensitivity.mean <= sensitivity.high);
    assert!(sensitivity.n >= 6);
    Ok(())
}

#[test]
fn only_labelled_rows_of_other_posts_train() -> Result<()> {
    let mut rows = toys::preferences(64, Split::Gold);
    rows[0].outcome = Outcome::Tie;
    rows[1].outcome = Outcome::Refused;
    // Two posts that the filter reserves for evaluation.
    rows[2].post_id = "valid0".into();
    rows[3].post_id = "calibration1".into();
    let out = train_on(rows, json!({ "steps": 1 }), 7)?;
    assert_eq!(out.metric("rows_without_label"), 2.0);
    assert_eq!(out.metric("rows_of_reserved_posts"), 2.0);
    assert_eq!(out.metric("pairs") + out.metric("held_out_pairs"), 60.0);
    Ok(())
}

#[test]
fn rows_without_ids_are_encoded_by_the_models_tokenizer() -> Result<()> {
    let with_ids = toys::preferences(40, Split::Gold);
    let strip = |mut row: Preference| {
        (row.prompt_ids, row.chosen_ids, row.rejected_ids) = (None, None, None);
        row
    };
    let without = with_ids.iter().cloned().map(strip).collect();
    let (a, b) = (train_on(with_ids, json!({ "steps": 2 }), 7)?, train_on(without, json!({ "steps": 2 }), 7)?);
    assert_eq!(toys::bytes_of(&a.path()), toys::bytes_of(&b.path()));
    Ok(())
}

#[test]
fn a_summary_longer_than_the_window_is_told_or_its_pair_dropped_and_counted() -> Result<()> {
    let mut rows = toys::preferences(40, Split::Gold);
    for long in [4, 9] {
        (rows[long].rejected_text, rows[long].rejected_ids) = ("cat is sad ".repeat(300), None);
    }
    (rows[11].chosen_text, rows[11].chosen_ids) = ("cat is sad ".repeat(300), None);
    rows.iter_mut().for_each(|row| row.prompt_ids = None);
    let error = train_on(rows.clone(), json!({ "steps": 1 }), 7).err().expect("it does not fit");
    assert_eq!(error.exit_code(), 2);
    assert!(error.message.contains("tokens leaves no room for a prompt in a window of 256"), "{error}");
    assert!(error.help.is_some_and(|help| help.contains("`drop_long: true`")));
    let out = train_on(rows, json!({ "steps": 1, "drop_long": true }), 7)?;
    assert_eq!(out.metric("dropped_long"), 3.0);
    // Four more rows belong to posts reserved for evaluation.
    assert_eq!(out.metric("rows_of_reserved_posts"), 4.0);
    assert_eq!(out.metric("pairs") + out.metric("held_out_pairs"), 33.0);
    assert_eq!(out.metric("truncated_prompts"), 0.0);
    Ok(())
}

#[test]
fn calibration_posts_that_do_not_fit_are_told_or_dropped() -> Result<()> {
    let mut bench = Bench::new();
    bench.input("model", "Model", |folder| toys::write_model(folder, 1));
    bench.input("preferences", "Preferences", |folder| {
        toys::write_preferences(folder, toys::preferences(40, Split::Gold))
    });
    let mut posts = toys::posts_with_facts(8, Split::Calibration);
    posts[2].title = "Help ".repeat(300);
    posts[5].summary = "cat is sad ".repeat(300);
    bench.input("posts", "Posts", |folder| toys::write_posts(folder, posts));
    let train =
        |drop: bool| run_seeded(&RewardTrain, tiny(json!({ "steps": 1, "drop_long": drop })), bench.inputs(), 7);
    assert!(train(false).is_err_and(|error| error.help.is_some()));
    let out = train(true)?;
    assert_eq!(["dropped_long", "calibration_posts"].map(|name| out.metric(name)), [0.0, 6.0]);
    Ok(())
}

#[test]
fn nothing_to_learn_from_is_an_error() {
    let mut ties = toys::preferences(8, Split::Gold);
    ties.iter_mut().for_each(|row| row.outcome = Outcome::Tie);
    let error = train_on(ties, json!({}), 7).err().expect("no labels");
    assert!(error.message.contains("no labelled pair"), "{error}");
    let mut same = toys::preferences(40, Split::Gold);
    for row in &mut same {
        row.rejected_text = row.chosen_text.clone();
        row.rejected_ids = row.chosen_ids.clone();
    }
    let error = train_on(same, json!({}), 7).err().expect("no difference");
    assert!(error.message.contains("to itself"), "{error}");
}

#[test]
fn contrast_pairs_come_first_on_demand() -> Result<()> {
    let mut rows = toys::preferences(48, Split::Gold);
    let error = train_on(rows.clone(), json!({ "order": "contrast_first" }), 7).err().expect("no contrast pairs");
    assert!(error.message.contains("contrast_first"), "{error}");
    rows.iter_mut().step_by(2).for_each(|row| row.corruption = Some(Corruption::Swap));
    let out = train_on(rows, json!({ "order": "contrast_first", "held_out": 0.4 }), 7)?;
    assert!(out.metric("accuracy_swap") > 0.5);
    Ok(())
}

#[test]
fn a_diverging_run_names_its_step() {
    let error = train(json!({ "lr": 1e30, "clip": null, "warmup": 0 }), 7).err().expect("it diverges");
    assert_eq!(error.blame, Blame::User);
    assert!(error.message.contains("at step "), "{error}");
}

fn member(label: &str, folder: &Path) -> Input {
    Input {
        label: label.to_owned(),
        artifact_type: "RewardModel".to_owned(),
        digest: Digest::of(label.as_bytes()),
        folder: folder.to_owned(),
    }
}

fn gather(members: &[(&str, &Out)]) -> Result<Out> {
    let bench = bench(Vec::new());
    let mut inputs = bench.inputs();
    inputs.retain(|port, _| port == "posts");
    inputs.insert("members".to_owned(), members.iter().map(|(label, out)| member(label, &out.path())).collect());
    run(&RewardEnsemble, json!({ "max_new_tokens": 8 }), inputs)
}

/// Each member of the ensemble gives the scores of the reward model that it was made from.
fn scores_as(ensemble: &Out, outs: &[&Out]) -> Result<()> {
    let members = load_ensemble(&ensemble.path())?;
    assert_eq!(members.len(), outs.len());
    let rows = sequences(&load_tokenizer(&ensemble.path())?);
    let rows: Vec<&Sequence> = rows.iter().collect();
    for (out, member) in outs.iter().zip(&members) {
        assert_eq!(score(&load_reward_model(&out.path())?, &rows, 4)?, score(member, &rows, 4)?);
    }
    Ok(())
}

#[test]
fn members_on_different_scales_are_refused_at_planning() {
    let faults = |a: Value, b: Value| -> Vec<String> {
        let params = |with: Value| {
            serde_json::to_value(serde_json::from_value::<crate::reward::params::Params>(with).unwrap()).unwrap()
        };
        let (a, b) = (params(a), params(b));
        let wired = [&a, &b].map(|params| ConnectedInput {
            port: "members",
            kind: RewardTrain::NAME,
            output: "RewardModel",
            params,
        });
        let found = Kind::check_wiring(&RewardEnsemble, &serde_json::from_value(json!({})).unwrap(), &wired);
        found.into_iter().map(|(_, error)| error.message).collect()
    };
    assert!(faults(json!({ "lr": 0.1 }), json!({})).is_empty());
    for (field, value) in [("normalise", "calibration"), ("centring", "none")] {
        let told = faults(json!({ field: value }), json!({}));
        assert!(told.len() == 1 && told[0].contains(&format!("`{field}`")), "{told:?}");
    }
}

#[test]
fn normalised_scores_have_deviation_one_on_the_calibration_samples() -> Result<()> {
    let (plain, normalised) = (train(json!({}), 7)?, train(json!({ "normalise": "calibration" }), 7)?);
    let deviation = plain.metric("calibration_score_std");
    let (plain, normalised) = (load_reward_model(&plain.path())?, load_reward_model(&normalised.path())?);
    assert_eq!(plain.scale, 1.0);
    assert!((normalised.scale - deviation).abs() < 1e-9 && (deviation - 1.0).abs() > 0.05, "{deviation}");
    let rows = sequences(&toys::tokenizer());
    let rows: Vec<&Sequence> = rows.iter().collect();
    for (a, b) in score(&plain, &rows, 4)?.into_iter().zip(score(&normalised, &rows, 4)?) {
        assert!((f64::from(a) / deviation - f64::from(b)).abs() < 1e-4, "{a} {b}");
    }
    Ok(())
}

#[test]
fn a_bootstrapped_member_draws_its_pairs_by_its_seed() -> Result<()> {
    let loss = |more: Value, seed| Ok::<_, Error>(train(more, seed)?.metric("train_loss"));
    let bootstrap = json!({ "bootstrap": true, "diversity": "head" });
    assert_eq!(loss(bootstrap.clone(), 1)?, loss(bootstrap.clone(), 1)?);
    assert_ne!(loss(bootstrap, 1)?, loss(json!({ "diversity": "head" }), 1)?);
    Ok(())
}

#[test]
fn an_ensemble_scores_as_its_members_do() -> Result<()> {
    let outs = [train(json!({}), 1)?, train(json!({}), 2)?, train(json!({ "lora": null, "lr": 0.005 }), 3)?];
    // Two labels are equal: those of two stages may be.
    let ensemble = gather(&[("1", &outs[0]), ("1", &outs[1]), ("x", &outs[2])])?;
    scores_as(&ensemble, &[&outs[0], &outs[1], &outs[2]])?;
    // The first member's base is what it learned: the others keep the one that they start from.
    scores_as(&gather(&[("x", &outs[2]), ("1", &outs[0])])?, &[&outs[2], &outs[0]])?;
    assert!(ensemble.metric("s2_calibration") > 0.0);
    assert!(toys::bytes_of(&ensemble.path()).iter().all(|(name, _)| !name.ends_with(crate::types::LEARNING)));
    assert!(ensemble.metric("correlation_calibration") <= 1.0);
    Ok(())
}

#[test]
fn a_member_of_another_base_keeps_it_and_one_of_another_tokenizer_is_refused() -> Result<()> {
    let one = train(json!({ "steps": 1 }), 1)?;
    let world = bench(toys::preferences(96, Split::Gold));
    let mut elsewhere = world.inputs();
    let base = Bench::new();
    toys::write_model(&base.path("model"), 2)?;
    elsewhere.get_mut("model").expect("a port")[0].folder = base.path("model");
    let other = run_seeded(&RewardTrain, tiny(json!({ "steps": 1 })), elsewhere, 2)?;
    let info = other.path().join("reward.json");
    let text = std::fs::read_to_string(&info).expect("reward.json");
    let base = Digest::of(b"input 0").to_string();
    assert!(text.contains(&base));
    std::fs::write(&info, text.replace(&base, &Digest::of(b"another base").to_string())).expect("written");
    let both = gather(&[("1", &one), ("2", &other)])?;
    assert!(both.path().join("members/2/base").is_dir() && !both.path().join("members/1/base").exists());
    scores_as(&both, &[&one, &other])?;
    let tokenizer = other.path().join("base/tokenizer.json");
    let text = std::fs::read_to_string(&tokenizer).expect("a tokenizer");
    std::fs::write(&tokenizer, text + "\n").expect("written");
    let error = gather(&[("1", &one), ("2", &other)]).err().expect("different tokenizers");
    assert!(error.message.contains("`1` and `2` have different tokenizers"), "{error}");
    let error = gather(&[("1", &one)]).err().expect("one member");
    assert!(error.message.contains("at least two"), "{error}");
    Ok(())
}

fn annotate(gold: &Out, with: Value, seed: u64) -> Result<(Out, Vec<Preference>)> {
    let mut bench = Bench::new();
    bench.input("pairs", "Pairs", |folder| toys::write_pairs(folder, toys::pairs(30, Split::Proxy)));
    let mut pairs = toys::pairs(4, Split::Rl);
    for pair in &mut pairs {
        (pair.b_text, pair.b_ids) = (pair.a_text.clone(), pair.a_ids.clone());
    }
    bench.input("pairs", "Pairs", |folder| toys::write_pairs(folder, pairs));
    let mut inputs = bench.inputs();
    inputs.insert("reward".to_owned(), vec![member("gold", &gold.path())]);
    let out = run_seeded(&Gold, with, inputs, seed)?;
    let rows = Preferences::open(&out.path())?.collect::<Result<Vec<_>>>()?;
    Ok((out, rows))
}

#[test]
fn a_gold_model_prefers_what_it_scores_higher_and_marks_ties() -> Result<()> {
    let gold = train(json!({}), 7)?;
    let (out, rows) = annotate(&gold, json!({}), 1)?;
    assert_eq!(rows.len(), 34);
    assert_eq!(out.metric("tie"), 4.0);
    assert!(rows[30..].iter().all(|row| row.outcome == Outcome::Tie));
    let good = rows[..30].iter().filter(|row| row.chosen_text != "zzz qqq zzz").count();
    assert!(good >= 28, "{good} of 30");
    assert!(rows[..30].iter().all(|row| row.confidence.is_some_and(|c| c > 0.5)));
    // Hard labels involve no random draws, so another seed changes nothing.
    assert_eq!(annotate(&gold, json!({}), 2)?.1, rows);
    Ok(())
}

#[test]
fn noise_turns_labels_round_and_sampled_labels_follow_the_scores() -> Result<()> {
    let gold = train(json!({}), 7)?;
    let (out, rows) = annotate(&gold, json!({ "label_noise": 0.3 }), 1)?;
    let (_, clean) = annotate(&gold, json!({}), 1)?;
    let turned = rows.iter().zip(&clean).filter(|(a, b)| a.chosen_text != b.chosen_text).count();
    assert_eq!(turned as f64, out.metric("turned"));
    assert!((2..=18).contains(&turned), "{turned}");
    let (_, sampled) = annotate(&gold, json!({ "labels": "sampled" }), 1)?;
    let good = sampled[..30].iter().filter(|row| row.chosen_text != "zzz qqq zzz").count();
    assert!(good > 15, "{good} of 30");
    Ok(())
}

#[test]
fn a_posts_split_without_calibration_is_named() -> Result<()> {
    let mut bench = Bench::new();
    bench.input("model", "Model", |folder| toys::write_model(folder, 1));
    bench.input("preferences", "Preferences", |f| toys::write_preferences(f, toys::preferences(40, Split::Gold)));
    bench.input("posts", "Posts", |folder| toys::write_posts(folder, toys::posts(4, Split::Valid)));
    let error = run(&RewardTrain, tiny(json!({ "steps": 1 })), bench.inputs()).err().expect("no calibration posts");
    assert!(error.message.contains("`calibration`"), "{error}");
    Ok::<(), Error>(())
}

#[test]
fn a_model_that_learned_nothing_is_warned_of() -> Result<()> {
    let warned = |out: &Out| out.warnings.iter().filter(|w| w.contains("did not learn")).count();
    assert_eq!(warned(&train(json!({}), 7)?), 0);
    // Scores far larger than Eq. 1 tolerates.
    let far = train(json!({ "lr": 1e9, "warmup": 0 }), 7)?;
    assert!(
        far.warnings.iter().any(|w| w.contains("its final loss is ") && w.contains("(it is 1e9)")),
        "{:?}",
        far.warnings
    );
    // A zero head and a step that changes nothing.
    let alike = train(json!({ "lr": 1e-30, "steps": 1, "warmup": 0, "head_init_std": 0.0 }), 7)?;
    assert!(alike.warnings.iter().any(|w| w.contains("all 8 calibration samples score alike")), "{:?}", alike.warnings);
    Ok(())
}

#[test]
fn pairs_whose_prompts_lose_their_end_are_warned_of() -> Result<()> {
    let end = format!(" {}\nTL;DR:", "word ".repeat(300));
    let long = |row: Preference| Preference { prompt: row.prompt.replace("\nTL;DR:", &end), prompt_ids: None, ..row };
    let out = train_on(toys::preferences(96, Split::Gold).into_iter().map(long).collect(), json!({ "steps": 1 }), 7)?;
    assert_eq!(out.metric("truncated_prompts"), 192.0);
    let warned = out.warnings.iter().any(|w| w.starts_with("192 of 192 prompts lost the end of their post to fit"));
    assert!(warned, "{:?}", out.warnings);
    Ok(())
}
