//! A few posts with their summaries at the first, the chosen and the last step (the paper's Table 1, Appendix C).

use std::collections::{BTreeMap, BTreeSet};

use crate::types::{Example, Half, Post, Sample, Score};

/// The first `count` of the held-out `posts` of half B by id, once at each of `steps`.
pub fn pick(
    samples: &[Sample],
    scores: &[Score],
    steps: &[i64],
    count: usize,
    posts: &BTreeMap<String, Post>,
) -> Vec<Example> {
    let steps: BTreeSet<i64> = steps.iter().copied().collect();
    let chosen: BTreeSet<&str> = samples
        .iter()
        .filter(|s| s.half == Half::B)
        .map(|s| s.post_id.as_str())
        .collect::<BTreeSet<_>>()
        .into_iter()
        .take(count)
        .collect();
    let mut rows: Vec<Example> = samples
        .iter()
        .zip(scores)
        .filter(|(sample, _)| {
            !sample.greedy && steps.contains(&sample.step) && chosen.contains(sample.post_id.as_str())
        })
        .filter_map(|(sample, score)| {
            let post = posts.get(&sample.post_id)?;
            Some(Example {
                post_id: sample.post_id.clone(),
                prompt: crate::prompt::text(post),
                reference: post.summary.clone(),
                step: sample.step,
                text: sample.text.clone(),
                gold: score.gold,
                proxy: sample.proxy,
                quality: score.quality,
            })
        })
        .collect();
    rows.sort_by(|a, b| (&a.post_id, a.step).cmp(&(&b.post_id, b.step)));
    rows
}
