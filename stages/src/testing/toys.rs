//! Tiny tokenizers, models and tables from which something can be learned within a second.

use std::path::Path;
use std::sync::OnceLock;

use engine::error::Result;
use engine::names::Digest;
use lm::{CausalLm, Gpt2Config, InitStd, ScalarHead, Tokenizer};

use crate::corpus;
use crate::error::IntoStageResult;
use crate::model;
use crate::random::fixed_generator;
use crate::train::Weights;
use crate::types::folder::write_json;
use crate::types::reward::{BASE, ENSEMBLE, HEAD, INFO, MEMBERS};
use crate::types::{
    EnsembleInfo, Outcome, Pair, Pairs, Pooling, Post, Posts, Preference, Preferences, RewardInfo, Side, Split,
};
use crate::{prompt, train};

/// Vocabulary of the toy posts.
const MOODS: [&str; 4] = ["sad", "glad", "mad", "bad"];
const ANIMALS: [&str; 4] = ["cat", "dog", "cow", "hen"];

/// A byte-level BPE trained on toy posts and the embedded corpus.
pub fn tokenizer() -> Tokenizer {
    static JSON: OnceLock<String> = OnceLock::new();
    let json = JSON.get_or_init(|| {
        let mut texts: Vec<String> =
            posts(64, Split::Sft).iter().map(|p| format!("{} {}", prompt::text(p), p.summary)).collect();
        texts.extend(corpus::examples(32, 1).into_iter().map(|s| format!("{} {}", s.post, s.summary)));
        let tokenizer = Tokenizer::train_bpe(texts.into_iter(), 420).expect("texts train a tokenizer");
        tokenizer.to_json().expect("a tokenizer is JSON")
    });
    Tokenizer::from_bytes(json.as_bytes()).expect("the JSON of a tokenizer")
}

/// ChatML's template, as many models have it.
pub const CHATML: &str = "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

/// The toy tokenizer with ChatML's markers of turns as special tokens.
pub fn chat_tokenizer() -> Tokenizer {
    let json = tokenizer().to_json().expect("a tokenizer is JSON");
    let mut file: serde_json::Value = serde_json::from_str(&json).expect("the JSON of a tokenizer");
    let next = tokenizer().vocab_size();
    let tokens = file["added_tokens"].as_array_mut().expect("a list");
    for (i, marker) in ["<|im_start|>", "<|im_end|>"].into_iter().enumerate() {
        let token = serde_json::json!({ "id": next + i, "content": marker, "single_word": false, "lstrip": false,
                                        "rstrip": false, "normalized": false, "special": true });
        tokens.push(token);
    }
    Tokenizer::from_bytes(file.to_string().as_bytes()).expect("the JSON of a tokenizer")
}

/// `n` short posts of one split; each summary repeats two words of its post.
pub fn posts(n: usize, split: Split) -> Vec<Post> {
    (0..n)
        .map(|i| {
            let (mood, animal) = (MOODS[i % 4], ANIMALS[i / 4 % 4]);
            Post {
                id: format!("{split}{i}"),
                subreddit: "pets".into(),
                title: "Help".into(),
                post: format!("My {animal} is {mood}. Day {i}."),
                summary: format!("{animal} is {mood}"),
                splits: vec![split],
                facts: None,
            }
        })
        .collect()
}

/// `n` posts of the embedded corpus with their facts.
pub fn posts_with_facts(n: u64, split: Split) -> Vec<Post> {
    let situations = corpus::examples(n, 3).into_iter().enumerate();
    situations
        .map(|(i, s)| Post {
            id: format!("{split}{i}"),
            subreddit: s.subreddit.into(),
            title: s.title,
            post: s.post,
            summary: s.summary,
            splits: vec![split],
            facts: Some(s.facts.to_json()),
        })
        .collect()
}

/// Writes a Posts artifact.
pub fn write_posts(folder: &Path, posts: impl IntoIterator<Item = Post>) -> Result<()> {
    let mut writer = Posts::create(folder)?;
    posts.into_iter().try_for_each(|post| writer.push(post))?;
    writer.finish().map(drop)
}

/// Writes a Tokenizer artifact.
pub fn write_tokenizer(folder: &Path) -> Result<()> {
    tokenizer().save(&folder.join("tokenizer.json")).into_stage_result()
}

const WIDTH: usize = 16;

/// Writes a Model artifact: untrained, width 16, one block, a window of 256 tokens.
pub fn write_model(folder: &Path, seed: u64) -> Result<()> {
    write_model_with(folder, seed, &tokenizer(), 256)
}

/// As [`write_model`], with another tokenizer and window.
pub fn write_model_with(folder: &Path, seed: u64, tokenizer: &Tokenizer, window: usize) -> Result<()> {
    let config = Gpt2Config {
        eos_token_id: tokenizer.eos().ids().to_vec(),
        ..Gpt2Config::new(tokenizer.vocab_size(), window, WIDTH, 1, 2)
    };
    let model =
        CausalLm::init(config, InitStd::InverseSqrtWidth, &mut fixed_generator(seed, "toy")).into_stage_result()?;
    model::save(&model, tokenizer, folder, Weights::F32)
}

/// Writes an Ensemble artifact on the base that [`write_model`] makes with `seed`, with one untrained head per member.
pub fn write_ensemble(folder: &Path, seed: u64, members: &[&str]) -> Result<()> {
    write_model(&folder.join(BASE), seed)?;
    let base_digest = Digest::of(b"toy base");
    for (i, label) in members.iter().enumerate() {
        let own = folder.join(MEMBERS).join(label);
        std::fs::create_dir_all(&own).expect("a folder in a temporary folder");
        write_head(&own, i as u64, base_digest)?;
    }
    let members = members.iter().map(|&label| label.to_owned()).collect();
    write_json(&folder.join(ENSEMBLE), &EnsembleInfo { members, base_digest, more: serde_json::Map::new() })
}

/// Writes a RewardModel artifact on the base that [`write_model`] makes with `seed`, with an untrained head.
pub fn write_reward_model(folder: &Path, seed: u64) -> Result<()> {
    write_model(&folder.join(BASE), seed)?;
    write_head(folder, seed, Digest::of(b"toy base"))
}

fn write_head(own: &Path, seed: u64, base_digest: Digest) -> Result<()> {
    ScalarHead::init(WIDTH, 0.5, &mut fixed_generator(seed, "toy head"))
        .into_stage_result()?
        .save(&own.join(HEAD))
        .into_stage_result()?;
    let info = RewardInfo {
        pool: Pooling::Last,
        centre: 0.0,
        scale: 1.0,
        base_digest,
        member_seed: seed,
        fact_sensitivity: None,
        more: serde_json::Map::new(),
    };
    write_json(&own.join(INFO), &info)
}

/// Pairs of a good and a bad summary with ids of the toy tokenizer; `a` is the good one in every second row.
pub fn pairs(n: usize, split: Split) -> Vec<Pair> {
    let tokenizer = tokenizer();
    let summary = |text: &str| (text.to_owned(), prompt::response_ids(&tokenizer, text, true));
    posts(n, split)
        .into_iter()
        .enumerate()
        .map(|(i, post)| {
            let fitted = train::encode::fit(&tokenizer, &post, 200).expect("a toy prompt fits");
            let (good, bad) = (summary(&post.summary), summary("zzz qqq zzz"));
            let (a, b) = if i.is_multiple_of(2) { (good, bad) } else { (bad, good) };
            Pair {
                id: format!("{}:toy", post.id),
                post_id: post.id,
                prompt: fitted.text,
                prompt_ids: fitted.ids,
                facts: None,
                a_model: "a".into(),
                a_text: a.0,
                a_ids: a.1,
                a_ended: true,
                b_model: "b".into(),
                b_text: b.0,
                b_ids: b.1,
                b_ended: true,
                corruption: None,
                corrupted: None,
            }
        })
        .collect()
}

/// Writes a Pairs artifact.
pub fn write_pairs(folder: &Path, pairs: impl IntoIterator<Item = Pair>) -> Result<()> {
    let mut writer = Pairs::create(folder)?;
    pairs.into_iter().try_for_each(|pair| writer.push(pair))?;
    writer.finish().map(drop)
}

/// Preferences over [`pairs`]; the good summary is always chosen.
pub fn preferences(n: usize, split: Split) -> Vec<Preference> {
    let side = |i: usize| if i.is_multiple_of(2) { Side::A } else { Side::B };
    let rows = pairs(n, split).into_iter().enumerate();
    rows.map(|(i, pair)| Preference::of(pair, side(i), Outcome::Labelled, "toy")).collect()
}

/// Writes a Preferences artifact.
pub fn write_preferences(folder: &Path, rows: impl IntoIterator<Item = Preference>) -> Result<()> {
    let mut writer = Preferences::create(folder)?;
    rows.into_iter().try_for_each(|row| writer.push(row))?;
    writer.finish().map(drop)
}

/// Every file below `folder` with its bytes, except the metrics.
pub fn bytes_of(folder: &Path) -> Vec<(String, Vec<u8>)> {
    let mut files = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(path) = folders.pop() {
        for entry in std::fs::read_dir(&path).expect("a folder") {
            let path = entry.expect("an entry").path();
            if path.is_dir() {
                folders.push(path);
            } else {
                let name = path.strip_prefix(folder).expect("below the folder").display().to_string();
                files.push((name, std::fs::read(&path).expect("a file")));
            }
        }
    }
    files.sort();
    files
}
