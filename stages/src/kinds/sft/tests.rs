//! Tests of `sft`.

use engine::error::{Blame, Error, Result};
use engine::kind::Kind;
use serde_json::{Value, json};

use super::Sft;
use crate::model;
use crate::testing::{Bench, Out, assert_pinned, run_seeded, toys};
use crate::types::{LearningPoint, Split};

fn sft(more: Value, seed: u64) -> Result<Out> {
    let mut bench = Bench::new();
    bench.input("base", "Model", |folder| toys::write_model(folder, 1));
    let posts = toys::posts(96, Split::Sft).into_iter().chain(toys::posts(8, Split::Valid));
    bench.input("posts", "Posts", |folder| toys::write_posts(folder, posts));
    let mut with = json!({ "batch": 16, "lr": 0.02, "warmup": 2, "steps": 30 });
    if let (Value::Object(with), Value::Object(more)) = (&mut with, more) {
        with.extend(more);
    }
    run_seeded(&Sft, with, bench.inputs(), seed)
}

#[test]
fn a_lora_lowers_the_held_out_loss_and_is_merged_away() -> Result<()> {
    let out = sft(json!({}), 7)?;
    let (before, after) = (out.metric("held_out_response_nll_before"), out.metric("held_out_response_nll"));
    assert!(after < before - 0.5, "{before} {after}");
    let (merged, _) = model::load(&out.path())?;
    assert!(merged.lora().is_none());
    Ok(())
}

#[test]
fn full_training_learns_more_than_nothing() -> Result<()> {
    for lora in [Value::Null, json!("none")] {
        let out = sft(json!({ "lora": lora, "loss": "all", "lr": 0.01, "steps": 10 }), 7)?;
        let (before, after) = (out.metric("held_out_response_nll_before"), out.metric("held_out_response_nll"));
        assert!(after < before, "{before} {after}");
    }
    Ok(())
}

#[test]
fn the_same_seed_gives_the_same_bytes_and_another_does_not() -> Result<()> {
    let bytes = |seed| Ok::<_, Error>(toys::bytes_of(&sft(json!({ "steps": 4 }), seed)?.path()));
    assert_eq!(bytes(1)?, bytes(1)?);
    assert_ne!(bytes(1)?, bytes(2)?);
    Ok(())
}

#[test]
fn the_small_result_is_pinned_by_the_version() -> Result<()> {
    assert_eq!((Sft::VERSION, lm::NUMERICS), (2, 5));
    let out = sft(json!({ "steps": 8 }), 7)?;
    assert_eq!((out.metric("rows"), out.metric("tokens")), (96.0, 3935.0));
    let names = ["train_loss", "held_out_response_nll_before", "held_out_response_nll"];
    assert_pinned(&out.metrics(&names), &[4.63540, 6.46752, 4.60230]);
    let curve = LearningPoint::read(&out.path())?;
    assert_eq!(curve.iter().map(|point| point.step).collect::<Vec<_>>(), (1..=8).collect::<Vec<_>>());
    let ends =
        [("loss", curve[0].loss), ("norm", curve[0].grad_norm), ("lr", curve[1].lr), ("last loss", curve[7].loss)];
    assert_pinned(&ends, &[6.39638, 2.86678, 0.01, 4.63540]);
    Ok(())
}

#[test]
fn half_an_epoch_takes_half_the_steps() -> Result<()> {
    let steps = sft(json!({ "steps": null, "epochs": 0.5 }), 7)?.metric("steps");
    assert_eq!(steps, 3.0);
    Ok(())
}

#[test]
fn a_diverging_run_names_its_step_its_posts_and_the_last_finite_loss() {
    let error = sft(json!({ "lr": 1e25, "clip": null, "warmup": 0 }), 7).err().expect("it diverges");
    assert_eq!(error.blame, Blame::User);
    assert!(error.message.contains("at step ") && error.message.contains("the last finite loss was "), "{error}");
    assert!(error.message.contains(", on posts `sft") && error.message.contains(" and 12 more ("), "{error}");
}

#[test]
fn a_summary_longer_than_the_window_is_told_or_dropped_and_counted() -> Result<()> {
    let mut bench = Bench::new();
    bench.input("base", "Model", |folder| toys::write_model(folder, 1));
    let mut posts: Vec<_> = toys::posts(12, Split::Sft).into_iter().chain(toys::posts(4, Split::Valid)).collect();
    for long in [3, 5, 13] {
        posts[long].summary = "cat is sad ".repeat(300);
    }
    // Truncated prompts of skipped posts do not count.
    posts[7].title = "Help ".repeat(300);
    bench.input("posts", "Posts", |folder| toys::write_posts(folder, posts));
    let with = |more: Value| json!({ "batch": 4, "steps": 1, "warmup": 0, "drop_long": more });
    let error = run_seeded(&Sft, with(json!(false)), bench.inputs(), 7).err().expect("it does not fit");
    assert_eq!(error.exit_code(), 2);
    assert!(error.message.starts_with("post `sft3`: a response of "), "{error}");
    assert!(error.help.is_some_and(|help| help.contains("`drop_long: true`")));
    let out = run_seeded(&Sft, with(json!(true)), bench.inputs(), 7)?;
    assert_eq!(["dropped_long", "rows", "held_out_rows"].map(|name| out.metric(name)), [4.0, 9.0, 3.0]);
    Ok(())
}

#[test]
fn what_drops_nothing_has_the_key_that_it_always_had() {
    let params = |with: Value| engine::kind::AnyKind::normalise(&Sft, &with).expect("good parameters");
    assert_eq!(params(json!({ "drop_long": false })), params(json!({})));
    assert_eq!(params(json!({})).get("drop_long"), None);
    assert_eq!(params(json!({ "drop_long": true }))["drop_long"], true);
}

#[test]
fn a_split_without_posts_is_named() {
    let error = sft(json!({ "split": "gold" }), 7).err().expect("there are none");
    assert!(error.message.contains("split `gold`"), "{error}");
}

#[test]
fn prompts_that_lose_their_end_are_warned_of() -> Result<()> {
    let cut = sft(json!({ "steps": 1, "max_prompt_tokens": 24 }), 7)?;
    assert_eq!(cut.metric("truncated_prompts"), 104.0);
    assert!(cut.warnings[0].starts_with("104 of 104 prompts lost the end of their post to fit"), "{:?}", cut.warnings);
    let whole = sft(json!({ "steps": 1 }), 7)?;
    assert_eq!((whole.metric("truncated_prompts"), whole.warnings.len()), (0.0, 0));
    Ok(())
}
