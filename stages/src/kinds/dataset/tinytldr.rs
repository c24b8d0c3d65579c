//! `dataset.tinytldr`: writes posts of the embedded grammar.

use engine::context::Context;
use engine::error::Result;
use engine::estimate::Scaling;
use engine::kind::{Kind, Signature};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::corpus::situation;
use crate::train::params::{Faults, ROWS};
use crate::types::Posts;

pub struct DatasetTinyTldr;

#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Params {
    /// Number of posts. With the same seed, a smaller data set is a prefix of a larger one.
    pub posts: u64,
}

impl Kind for DatasetTinyTldr {
    type Params = Params;
    const NAME: &'static str = "dataset.tinytldr";
    const VERSION: u32 = 1;
    const ABOUT: &'static str = "writes posts with TL;DRs from a seeded grammar, and keeps their facts";

    fn signature(&self, _: &Params) -> Signature {
        Signature::producing(Posts::NAME).seeded()
    }

    fn check(&self, p: &Params) -> Vec<(String, String)> {
        let mut faults = Faults::default();
        faults.must(p.posts > 0, "posts", "must be at least 1");
        faults.at_most(p.posts, ROWS, "posts");
        faults.0
    }

    fn scaling(&self, p: &Params, _: &dyn Fn(&str) -> Option<f64>) -> Option<Scaling> {
        Some(Scaling::new(p.posts as f64, p.posts as f64))
    }

    fn run(&self, p: Params, ctx: &mut Context) -> Result<()> {
        const TOLD_EVERY: u64 = 4096;
        let key = ctx.generator_key("posts");
        let seed = ctx.seed();
        let mut writer = Posts::create(ctx.out())?;
        for index in 0..p.posts {
            // The id contains the seed, so that posts of two seeds have different ids.
            writer.push(situation(key, index).into_post(format!("tiny{seed}-{index}"), Vec::new()))?;
            if index % TOLD_EVERY == 0 {
                ctx.progress(index, p.posts, "posts", None);
            }
        }
        ctx.metric("posts", writer.finish()? as f64);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::corpus::Facts;
    use crate::corpus::quality::score;
    use crate::testing::run_seeded;
    use crate::types::Post;

    fn run(seed: u64, posts: u64) -> Vec<Post> {
        let out = run_seeded(&DatasetTinyTldr, serde_json::json!({ "posts": posts }), BTreeMap::new(), seed).unwrap();
        Posts::open(&out.path()).unwrap().collect::<Result<_>>().unwrap()
    }

    #[test]
    fn posts_carry_the_facts_that_their_summaries_tell() {
        for post in run(5, 50) {
            let facts = Facts::parse(post.facts.as_deref().unwrap()).unwrap();
            assert_eq!(score(&facts, &post.summary, true).covered, 6);
            assert!(post.splits.is_empty());
        }
    }

    #[test]
    fn a_seed_decides_everything_and_more_posts_begin_with_the_same() {
        assert_eq!(run(5, 30)[..20], run(5, 20)[..]);
        assert!(run(5, 20).iter().zip(run(6, 20)).all(|(a, b)| a.id != b.id && a.post != b.post));
    }
}
