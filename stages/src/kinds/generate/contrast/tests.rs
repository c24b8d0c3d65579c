//! Tests of contrast pairs.

use std::collections::BTreeMap;

use lm::{Gpt2Config, InitStd};
use rand_chacha::ChaCha12Rng;
use rand_chacha::rand_core::SeedableRng;

use super::*;
use crate::corpus::examples;
use crate::corpus::quality::{Facts, score};
use crate::corpus::words::words;
use crate::testing::{Bench, run_seeded};
use crate::types::{Pair, Side};

const MOST: usize = 40;

fn tokenizer() -> Tokenizer {
    Tokenizer::train_bpe(examples(300, 1).iter().map(|s| format!("{} {}", s.post, s.summary)), 700).unwrap()
}

/// Pairs of 40 gold posts: with an untrained model or without, of invented or of real posts.
fn run(seed: u64, with_model: bool, with_facts: bool, with: serde_json::Value) -> Result<Vec<Pair>> {
    let mut bench = Bench::new();
    bench.input("posts", Posts::NAME, |folder| {
        let mut writer = Posts::create(folder)?;
        for (i, s) in examples(60, 4).into_iter().enumerate() {
            let split = if i % 3 == 0 { Split::Valid } else { Split::Gold };
            let mut post = s.into_post(format!("p{i}"), vec![split]);
            post.facts = post.facts.filter(|_| with_facts);
            writer.push(post)?;
        }
        writer.finish().map(drop)
    });
    let tokenizer = tokenizer();
    if with_model {
        let config = Gpt2Config::new(tokenizer.vocab_size(), 256, 8, 1, 2);
        let model = CausalLm::init(config, InitStd::Fixed(0.02), &mut ChaCha12Rng::seed_from_u64(1)).unwrap();
        bench.input("model", Model::NAME, |folder| {
            crate::model::save(&model, &tokenizer, folder, crate::train::Weights::F32)
        });
    } else {
        let save = |folder: &std::path::Path| tokenizer.save(&folder.join(types::Tokenizer::FILE)).into_stage_result();
        bench.input("tokenizer", types::Tokenizer::NAME, save);
    }
    let out = run_seeded(&GenerateContrast, with, bench.inputs(), seed)?;
    Pairs::open(&out.path())?.collect()
}

fn params(pairs: u64) -> serde_json::Value {
    serde_json::json!({"pairs": pairs, "max_new_tokens": MOST})
}

/// The sound and the corrupted side of a pair, each as (text, ids, ended).
type Said<'a> = (&'a str, &'a [u32], bool);
fn sides(pair: &Pair) -> (Said<'_>, Said<'_>) {
    let a: Said = (&pair.a_text, &pair.a_ids, pair.a_ended);
    let b: Said = (&pair.b_text, &pair.b_ids, pair.b_ended);
    if pair.corrupted == Some(Side::A) { (b, a) } else { (a, b) }
}

#[test]
fn the_corrupted_side_is_worse_and_swaps_are_the_majority() {
    let pairs = run(1, false, true, params(400)).unwrap();
    assert_eq!(pairs.len(), 400);
    let mut counts = BTreeMap::new();
    for pair in &pairs {
        let facts = Facts::parse(pair.facts.as_deref().unwrap()).unwrap();
        let (sound, worse) = sides(pair);
        assert_eq!(score(&facts, sound.0, sound.2).total, 1.0, "{}", sound.0);
        assert!(score(&facts, worse.0, worse.2).total < 1.0, "{}", worse.0);
        *counts.entry(pair.corruption.unwrap()).or_insert(0) += 1;
    }
    assert!(counts.len() == 4 && counts[&Corruption::Swap] > 200, "{counts:?}");
    let a = pairs.iter().filter(|p| p.corrupted == Some(Side::A)).count();
    assert!((150..250).contains(&a), "the place tells nothing: {a} of 400");
}

#[test]
fn no_post_outside_the_split_is_used_and_ids_are_distinct() {
    let pairs = run(1, false, true, params(100)).unwrap();
    let ids: std::collections::HashSet<&str> = pairs.iter().map(|p| p.id.as_str()).collect();
    assert_eq!(ids.len(), 100);
    assert!(pairs.iter().all(|p| p.post_id[1..].parse::<u32>().unwrap() % 3 != 0));
}

#[test]
fn ids_are_those_of_the_text_and_within_the_limit() {
    let tokenizer = tokenizer();
    for pair in run(1, false, true, params(200)).unwrap() {
        assert_eq!(pair.prompt_ids, tokenizer.encode(&pair.prompt));
        for (text, ids, ended) in [sides(&pair).0, sides(&pair).1] {
            assert!(ids.len() <= MOST);
            assert_eq!(ids.last() == Some(&tokenizer.eos().first()), ended);
            assert_eq!(tokenizer.decode(ids).replace("<|endoftext|>", "").trim(), text);
        }
    }
}

#[test]
fn what_is_too_long_is_cut_and_has_not_ended_and_is_still_worse() {
    for pair in run(1, false, true, serde_json::json!({"pairs": 50, "max_new_tokens": 12})).unwrap() {
        let facts = Facts::parse(pair.facts.as_deref().unwrap()).unwrap();
        let (sound, worse) = sides(&pair);
        assert!(sound.1.len() == 12 && !sound.2 && worse.1.len() <= 12);
        assert!(
            score(&facts, worse.0, worse.2).total < score(&facts, sound.0, sound.2).total,
            "{} | {}",
            sound.0,
            worse.0
        );
    }
}

#[test]
fn the_same_seed_gives_the_same_pairs() {
    assert_eq!(run(1, false, true, params(50)).unwrap(), run(1, false, true, params(50)).unwrap());
    assert_ne!(run(1, false, true, params(50)).unwrap(), run(2, false, true, params(50)).unwrap());
}

#[test]
fn a_models_samples_are_corrupted_too_and_the_batch_does_not_matter() {
    let with = |batch: u64| {
        let params = serde_json::json!({"pairs": 40, "max_new_tokens": 12, "samples": 0.5, "batch": batch});
        run(1, true, true, params).unwrap()
    };
    let pairs = with(3);
    let sampled = pairs.iter().filter(|p| !p.a_model.starts_with("reference")).count();
    assert!((10..=30).contains(&sampled), "{sampled} of 40");
    let texts = |pairs: &[Pair]| pairs.iter().map(|p| (p.a_text.clone(), p.b_text.clone())).collect::<Vec<_>>();
    assert_eq!(texts(&pairs), texts(&with(16)));
}

#[test]
fn real_text_without_facts_is_swapped_for_words_of_other_posts() {
    let pairs = run(1, false, false, params(100)).unwrap();
    let swaps: Vec<&Pair> = pairs.iter().filter(|p| p.corruption == Some(Corruption::Swap)).collect();
    assert!(swaps.len() > 40);
    for pair in swaps {
        let (sound, worse) = sides(pair);
        let post = words(&pair.prompt);
        let new: Vec<String> = words(worse.0).into_iter().filter(|w| !words(sound.0).contains(w)).collect();
        assert!(!new.is_empty() && new.iter().all(|w| !post.contains(w)), "{} | {}", sound.0, worse.0);
    }
}

#[test]
fn what_cannot_be_is_told() {
    let params: Params = serde_json::from_str(
        r#"{"pairs": 0, "split": "valid", "weights": {"swap": 0, "shuffle": 0, "truncate": 0, "repeat": 0}}"#,
    )
    .unwrap();
    let fields: Vec<String> = GenerateContrast.check(&params).into_iter().map(|(field, _)| field).collect();
    assert_eq!(fields, ["split", "pairs", "weights"]);
    let error = run(1, false, true, serde_json::json!({"pairs": 1, "split": "rl"})).unwrap_err();
    assert_eq!(error.message, "no posts in split `rl`");
    let error = run(1, false, true, serde_json::json!({"pairs": 1, "prompt_tokens": 5})).unwrap_err();
    assert!(error.message.contains("5 fit"), "{}", error.message);
}
