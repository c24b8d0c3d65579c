//! Every learning kind, and the scoring one, gives the same bytes after being killed and resumed.

use std::path::Path;

use engine::error::Result;
use engine::kind::AnyKind;
use serde_json::{Value, json};

use crate::kinds::annotate::Gold;
use crate::kinds::model::pretrain::Pretrain;
use crate::kinds::reward::train::RewardTrain;
use crate::kinds::rl::{Ppo, Rloo};
use crate::kinds::sft::Sft;
use crate::testing::attempts::{Attempt, Attempts};
use crate::testing::{Bench, toys};
use crate::types::{Post, Split};

fn pretrain() -> (Bench, Value) {
    let mut bench = Bench::new();
    bench.input("posts", "Posts", |folder| toys::write_posts(folder, toys::posts(40, Split::Sft)));
    bench.input("tokenizer", "Tokenizer", toys::write_tokenizer);
    let with = json!({ "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 128, "batch": 6, "lr": 0.01, "warmup": 2,
        "steps": 17, "tokens_at_once": 120 });
    (bench, with)
}

fn sft(lora: Value) -> (Bench, Value) {
    let mut bench = Bench::new();
    bench.input("base", "Model", |folder| toys::write_model(folder, 1));
    let posts = toys::posts(40, Split::Sft).into_iter().chain(toys::posts(8, Split::Valid));
    bench.input("posts", "Posts", |folder| toys::write_posts(folder, posts));
    (bench, json!({ "batch": 6, "lr": 0.01, "warmup": 2, "steps": 17, "weight_decay": 0.1, "lora": lora }))
}

fn reward() -> (Bench, Value) {
    let mut bench = Bench::new();
    bench.input("model", "Model", |folder| toys::write_model(folder, 1));
    bench.input("preferences", "Preferences", |folder| {
        toys::write_preferences(folder, toys::preferences(40, Split::Gold))
    });
    let posts = toys::posts_with_facts(8, Split::Calibration).into_iter().chain(toys::posts(4, Split::Valid));
    bench.input("posts", "Posts", |folder| toys::write_posts(folder, posts));
    (bench, json!({ "batch": 6, "lr": 0.01, "warmup": 2, "steps": 17, "held_out": 0.2, "max_new_tokens": 8 }))
}

/// Two responses per prompt, prompts that run out in the middle of a phase, evaluations after some phases, and every
/// generator in use.
fn ppo(lora: Value) -> (Bench, Value) {
    let mut bench = Bench::new();
    bench.input("policy", "Model", |folder| toys::write_model(folder, 1));
    bench.input("rewards", "Ensemble", |folder| toys::write_ensemble(folder, 1, &["1", "2", "3"]));
    let posts = toys::posts(7, Split::Rl).into_iter().chain(toys::posts(4, Split::Valid));
    bench.input("posts", "Posts", |folder| toys::write_posts(folder, posts));
    let with = json!({ "objective": "adaptive", "variance_scope": "shuffled", "lambda": 0.1, "steps": { "n": 4 },
        "rollouts": 5, "responses": 2, "min_new_tokens": 2, "max_new_tokens": 8, "epochs": 2, "minibatch": 4,
        "lr": 1e-3, "lora": lora, "eval_every": 2, "greedy": "ends" });
    (bench, with)
}

/// Two tables; the first ends in the middle of a chunk.
fn gold() -> Result<(Bench, Value)> {
    let (bench, with) = reward();
    let trained = crate::testing::run(&RewardTrain, with, bench.inputs())?;
    let mut bench = Bench::new();
    for n in [300, 140] {
        bench.input("pairs", "Pairs", |folder| toys::write_pairs(folder, toys::pairs(n, Split::Proxy)));
    }
    bench.input("reward", "RewardModel", |folder| {
        copy_folder(&trained.path(), folder);
        Ok(())
    });
    let posts = toys::posts(10, Split::Proxy).into_iter().map(|post| Post { splits: vec![Split::Valid], ..post });
    bench.input("exclude", "Posts", |folder| toys::write_posts(folder, posts));
    Ok((bench, json!({ "labels": "sampled", "label_noise": 0.25 })))
}

fn copy_folder(from: &Path, to: &Path) {
    for (name, bytes) in toys::bytes_of(from) {
        let path = to.join(name);
        std::fs::create_dir_all(path.parent().expect("a file has a folder")).expect("a folder");
        std::fs::write(path, bytes).expect("a file");
    }
}

/// Kills each attempt at its first checkpoint until one finishes; returns that attempt and the points where attempts
/// resumed.
fn killed_again_and_again(attempts: &Attempts<'_>) -> Result<(Attempt, Vec<u64>)> {
    let mut resumed = Vec::new();
    loop {
        let attempt = attempts.killed_after(1)?;
        resumed.extend(attempt.resumed);
        if !attempt.killed {
            return Ok((attempt, resumed));
        }
    }
}

/// Asserts that a kind killed after every `every` steps gives the same result as an undisturbed run.
fn holds(kind: &dyn AnyKind, (bench, with): &(Bench, Value), every: u64, resumes: &[u64]) -> Result<()> {
    // `u64::MAX`: a checkpoint is never due.
    let undisturbed = Attempts::new(kind, with, bench.inputs(), u64::MAX)?.undisturbed()?;
    let attempts = Attempts::new(kind, with, bench.inputs(), every)?;
    let (last, resumed) = killed_again_and_again(&attempts)?;
    assert_eq!((resumed.as_slice(), &last.warnings), (resumes, &undisturbed.warnings));
    for ((name, bytes), (same, expected)) in last.bytes().into_iter().zip(undisturbed.bytes()) {
        assert_eq!(name, same);
        assert!(bytes == expected, "{} {with}: {name} differs", kind.name());
    }
    Ok(())
}

#[test]
fn a_killed_pretraining_goes_on_to_the_same_bytes() -> Result<()> {
    holds(&Pretrain, &pretrain(), 5, &[5, 10, 15])
}

#[test]
fn a_killed_fine_tuning_goes_on_to_the_same_bytes() -> Result<()> {
    holds(&Sft, &sft(json!({ "r": 4, "alpha": 8, "dropout": 0.1 })), 4, &[4, 8, 12, 16])?;
    holds(&Sft, &sft(Value::Null), 1, &(1..=17).collect::<Vec<_>>())
}

#[test]
fn a_killed_reward_training_goes_on_to_the_same_bytes() -> Result<()> {
    holds(&RewardTrain, &reward(), 6, &[6, 12])
}

#[test]
fn a_killed_ppo_goes_on_to_the_same_bytes() -> Result<()> {
    // Killed after each evaluation (0, 2, 4 phases done) and each phase.
    for lora in [json!({ "r": 4, "alpha": 8 }), Value::Null] {
        holds(&Ppo, &ppo(lora), 1, &[0, 1, 2, 2, 3, 4, 4])?;
    }
    // The controller's coefficient is part of what goes on.
    let (bench, mut with) = ppo(json!({ "r": 4, "alpha": 8 }));
    with["objective"] = json!("mean");
    with["kl_target"] = json!(0.5);
    with["kl_gain"] = json!(2.0);
    holds(&Ppo, &(bench, with), 1, &[0, 1, 2, 2, 3, 4, 4])?;
    let (bench, mut with) = ppo(json!({ "r": 4, "alpha": 8 }));
    with["variance_reference"] = json!("sft");
    holds(&Rloo, &(bench, with), 1, &[0, 1, 2, 2, 3, 4, 4])?;
    holds(&Ppo, &ppo(json!({ "r": 4, "alpha": 8 })), 3, &[2, 4])
}

#[test]
fn a_killed_labelling_goes_on_to_the_same_bytes() -> Result<()> {
    // Pairs whose posts are held out count as done but are not scored.
    holds(&Gold, &gold()?, 1, &[118, 246, 290, 408, 420])?;
    holds(&Gold, &gold()?, 3, &[290])
}

#[test]
fn a_checkpoint_that_is_cut_off_or_damaged_is_told_and_the_stage_starts_again() -> Result<()> {
    let cases: [(&dyn AnyKind, (Bench, Value)); 2] = [(&Sft, sft(json!({ "r": 4 }))), (&Ppo, ppo(json!({ "r": 4 })))];
    for (kind, (bench, with)) in cases {
        let undisturbed = Attempts::new(kind, &with, bench.inputs(), u64::MAX)?.undisturbed()?;
        let spoilers: [fn(Vec<u8>) -> Vec<u8>; 3] = [
            |bytes| bytes[..bytes.len() / 2].to_vec(),
            |mut bytes| {
                let middle = bytes.len() / 2;
                bytes[middle] ^= 1;
                bytes
            },
            |_| Vec::new(),
        ];
        for (spoil, file) in spoilers.into_iter().zip(["training.safetensors", "state.json", "checkpoint.json"]) {
            let attempts = Attempts::new(kind, &with, bench.inputs(), 2)?;
            assert!(attempts.killed_after(2)?.killed);
            let path = attempts.checkpoint().join(file);
            let bytes = std::fs::read(&path).expect("a file of the checkpoint");
            std::fs::remove_file(&path).and_then(|()| std::fs::write(&path, spoil(bytes))).expect("spoilt");
            let again = attempts.undisturbed()?;
            assert_eq!((again.resumed, again.warnings.len()), (None, 1 + undisturbed.warnings.len()), "{file}");
            assert!(again.warnings.iter().any(|w| w.starts_with("ignoring a checkpoint: ")), "{:?}", again.warnings);
            assert!(again.bytes() == undisturbed.bytes(), "{} with a spoilt {file}", kind.name());
        }
    }
    Ok(())
}

#[test]
fn a_checkpoint_of_another_model_is_told_and_not_used() -> Result<()> {
    // As if a build had changed the trained weights without raising the version.
    let (bench, with) = sft(json!({ "r": 4 }));
    let (small, large) = (with.clone(), sft(json!({ "r": 8 })).1);
    let killed = Attempts::new(&Sft, &small, bench.inputs(), 2)?;
    killed.killed_after(1)?;
    let other = killed.with(&large)?.undisturbed()?;
    assert_eq!(other.resumed, None);
    let told = |warning: &String| warning.contains("training.safetensors") && warning.contains("expected F32");
    assert!(other.warnings.iter().any(told), "{:?}", other.warnings);
    Ok(())
}
