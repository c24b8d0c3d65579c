//! `tokenizer.train`: trains a byte-level BPE tokenizer on posts.

use engine::context::Context;
use engine::error::{Error, Result};
use engine::estimate::Forecast;
use engine::kind::{Kind, Signature};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::prompt;
use crate::train::params::Faults;
use crate::types::{Posts, Split, Tokenizer};

pub struct Train;

#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Params {
    /// Vocabulary size: 256 bytes, `<|endoftext|>` and merges.
    pub vocab_size: usize,
    /// The split to train on; absent: all posts.
    pub split: Option<Split>,
    /// Train only on the first so many posts.
    pub rows: Option<u64>,
}

impl Default for Params {
    fn default() -> Self {
        Self { vocab_size: 2048, split: None, rows: None }
    }
}

impl Kind for Train {
    type Params = Params;

    const NAME: &'static str = "tokenizer.train";
    const VERSION: u32 = 1;
    const ABOUT: &'static str = "learns a byte-level BPE tokenizer from posts and their summaries";

    fn signature(&self, _: &Params) -> Signature {
        Signature::producing(Tokenizer::NAME).one("posts", &[Posts::NAME])
    }

    fn check(&self, params: &Params) -> Vec<(String, String)> {
        let mut faults = Faults::default();
        faults.must(params.vocab_size >= 257, "vocab_size", "expected at least 257: the bytes and <|endoftext|>");
        faults.at_most(params.vocab_size as u64, 10_000_000, "vocab_size");
        faults.must(params.rows != Some(0), "rows", "must be at least 1");
        faults.0
    }

    fn forecast(&self, p: &Params, _: &dyn Fn(&str) -> Vec<Value>) -> Forecast {
        Forecast { memory: None, outline: p.vocab_size.into() }
    }

    fn run(&self, params: Params, ctx: &mut Context) -> Result<()> {
        ctx.activity("training");
        let posts = Posts::open(&ctx.one("posts")?.folder)?;
        let wanted = |post: &crate::types::Post| params.split.is_none_or(|split| post.is_in(split));
        // The trainer takes an iterator of texts without errors: the first error is stored and ends the iterator.
        let mut failed = None;
        let mut texts = 0_u64;
        let stream = posts
            .map_while(|post| post.map_err(|e| failed = Some(e)).ok())
            .filter(wanted)
            .take(params.rows.map_or(usize::MAX, |rows| rows as usize))
            .map(|post| {
                texts += 1;
                format!("{} {}", prompt::text(&post), post.summary.trim())
            });
        let tokenizer = lm::Tokenizer::train_bpe(stream, params.vocab_size).map_err(|e| Error::user(e.to_string()));
        if let Some(e) = failed {
            return Err(e);
        }
        let tokenizer = tokenizer?;
        if texts == 0 {
            return Err(
                Error::user("tokenizer.train: no post to learn from").help("check `split` and the filter before it")
            );
        }
        tokenizer.save(&ctx.out().join(Tokenizer::FILE)).map_err(|e| Error::environment(e.to_string()))?;
        ctx.metric("posts", texts as f64);
        ctx.metric("vocab_size", tokenizer.vocab_size() as f64);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::testing::{Bench, run};
    use crate::types::Post;

    #[test]
    fn a_trained_tokenizer_reads_back_what_it_writes_and_is_the_same_each_time() {
        let mut bench = Bench::new();
        bench.input("posts", "Posts", |folder| {
            let post = |i: usize| Post {
                id: i.to_string(),
                subreddit: "tifu".into(),
                title: "the title".into(),
                post: format!("a long story about number {i}"),
                summary: "short story".into(),
                splits: vec![],
                facts: None,
            };
            crate::table::write(&folder.join(Posts::FILE), (0..50).map(post)).map(drop)
        });
        let train = || run(&Train, json!({ "vocab_size": 300 }), bench.inputs()).unwrap();
        let (a, b) = (train(), train());
        let file = |out: &crate::testing::Out| std::fs::read(out.path().join(Tokenizer::FILE)).unwrap();
        assert_eq!(file(&a), file(&b));
        let tokenizer = lm::Tokenizer::from_bytes(&file(&a)).unwrap();
        assert_eq!(tokenizer.vocab_size(), 300);
        assert_eq!(tokenizer.decode(&tokenizer.encode("a story, “quoted”")), "a story, “quoted”");
        let none = run(&Train, json!({ "split": "rl" }), bench.inputs()).map(drop).unwrap_err();
        assert_eq!(none.exit_code(), 2);
    }
}
