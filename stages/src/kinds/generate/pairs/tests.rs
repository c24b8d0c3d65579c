//! Tests of `generate.pairs`.

use engine::error::{Error, Result};
use lm::{CausalLm, Gpt2Config, InitStd, Tokenizer};
use serde_json::{Value, json};

use super::two_of;
use crate::error::IntoStageResult;
use crate::kinds::generate::GeneratePairs;
use crate::model;
use crate::random::fixed_generator;
use crate::random::{bits_of, fixed_key};
use crate::testing::{Bench, Out, run_seeded, toys};
use crate::train::Weights;
use crate::types::{Pair, Pairs, Split};

fn generate(models: u64, more: Value, seed: u64) -> Result<Out> {
    let mut bench = Bench::new();
    (0..models).for_each(|m| bench.input("models", "Model", |folder| toys::write_model(folder, m)));
    let posts = toys::posts(12, Split::Gold).into_iter().chain(toys::posts(5, Split::Rl));
    bench.input("posts", "Posts", |folder| toys::write_posts(folder, posts));
    let mut with = json!({ "split": "gold", "min_new_tokens": 2, "max_new_tokens": 6 });
    if let (Value::Object(with), Value::Object(more)) = (&mut with, more) {
        with.extend(more);
    }
    run_seeded(&GeneratePairs, with, bench.inputs(), seed)
}

fn rows(out: &Out) -> Result<Vec<Pair>> {
    Pairs::open(&out.path())?.collect()
}

#[test]
fn two_distinct_models_are_drawn_and_every_ordered_pair_comes_up() {
    let key = fixed_key(1, "test");
    let mut counts = std::collections::BTreeMap::new();
    for i in 0..3000 {
        let (a, b) = two_of(3, bits_of(&key, i.to_string()));
        assert_ne!(a, b);
        *counts.entry((a, b)).or_insert(0) += 1;
    }
    assert_eq!(counts.len(), 6);
    assert!(counts.values().all(|&n| (400..600).contains(&n)), "{counts:?}");
    assert_eq!(two_of(1, 12345), (0, 0));
}

#[test]
fn every_post_of_the_split_gets_two_summaries_in_the_order_of_the_table() -> Result<()> {
    let pairs = rows(&generate(3, json!({}), 7)?)?;
    let ids: Vec<&str> = pairs.iter().map(|p| p.post_id.as_str()).collect();
    assert_eq!(ids, (0..12).map(|i| format!("gold{i}")).collect::<Vec<_>>());
    let tokenizer = toys::tokenizer();
    for pair in &pairs {
        assert_ne!(pair.a_model, pair.b_model);
        for (text, ids, ended) in [(&pair.a_text, &pair.a_ids, pair.a_ended), (&pair.b_text, &pair.b_ids, pair.b_ended)]
        {
            assert!((3..=6).contains(&ids.len()), "{ids:?}");
            assert_eq!(ended, ids.last() == Some(&tokenizer.eos().first()));
            assert_eq!(*text, tokenizer.decode(ids).trim());
        }
    }
    Ok(())
}

#[test]
fn some_posts_are_drawn_by_the_seed_and_keep_their_summaries_whatever_the_batch() -> Result<()> {
    let all = rows(&generate(2, json!({}), 7)?)?;
    let some = rows(&generate(2, json!({ "pairs": 5, "batch": 2 }), 7)?)?;
    assert_eq!(some.len(), 5);
    assert!(some.iter().all(|pair| all.contains(pair)));
    let others = rows(&generate(2, json!({ "pairs": 5 }), 8)?)?;
    assert_ne!(some, others);
    Ok(())
}

#[test]
fn the_same_seed_gives_the_same_bytes() -> Result<()> {
    let bytes = || Ok::<_, Error>(toys::bytes_of(&generate(2, json!({}), 7)?.path()));
    assert_eq!(bytes()?, bytes()?);
    Ok(())
}

#[test]
fn one_model_gives_pairs_only_on_demand() -> Result<()> {
    let error = generate(1, json!({}), 7).err().expect("one is too few");
    assert!(error.help.is_some_and(|help| help.contains("same_model")));
    let pairs = rows(&generate(1, json!({ "same_model": true }), 7)?)?;
    assert!(pairs.iter().any(|pair| pair.a_ids != pair.b_ids));
    Ok(())
}

#[test]
fn more_pairs_than_posts_are_refused() {
    let error = generate(2, json!({ "pairs": 13 }), 7).err().expect("there are 12");
    assert!(error.message.contains("13") && error.message.contains("12"), "{error}");
}

#[test]
fn models_of_different_tokenizers_are_refused() -> Result<()> {
    let mut bench = Bench::new();
    bench.input("models", "Model", |folder| toys::write_model(folder, 1));
    bench.input("models", "Model", |folder| {
        let tokenizer = Tokenizer::train_bpe(["a b a b"; 4].into_iter(), 258).into_stage_result()?;
        let config = Gpt2Config::new(tokenizer.vocab_size(), 64, 16, 1, 2);
        let model = CausalLm::init(config, InitStd::Fixed(0.02), &mut fixed_generator(1, "toy")).into_stage_result()?;
        model::save(&model, &tokenizer, folder, Weights::F32)
    });
    bench.input("posts", "Posts", |folder| toys::write_posts(folder, toys::posts(4, Split::Gold)));
    let error = run_seeded(&GeneratePairs, json!({ "split": "gold" }), bench.inputs(), 7).err().expect("they differ");
    assert!(error.message.contains("different tokenizers"), "{error}");
    Ok(())
}
