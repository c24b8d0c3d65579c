//! `dataset.pairs`: the pairs of preference tables without their labels, for another judge.

use std::collections::{HashMap, HashSet};

use engine::context::Context;
use engine::error::{Error, Result};
use engine::kind::{Kind, Signature};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::error::IntoStageResult;
use crate::labels::pair_key::{PairKey, Text};
use crate::prompt::response_ids;
use crate::source::no_rows;
use crate::types::{Pair, Pairs, Posts, Preference, Preferences, Tokenizer};

pub struct DatasetPairs;

#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Params {
    /// Number of pairs, drawn by the seed; absent: all.
    pub rows: Option<u64>,
}

impl Kind for DatasetPairs {
    type Params = Params;

    const NAME: &'static str = "dataset.pairs";
    const VERSION: u32 = 1;
    const ABOUT: &'static str =
        "takes the pairs of judged tables without their labels, so that another judge can judge them";

    fn signature(&self, _: &Params) -> Signature {
        Signature::producing(Pairs::NAME)
            .many("preferences", &[Preferences::NAME])
            .one("tokenizer", &[Tokenizer::NAME])
            .optional("posts", &[Posts::NAME])
            .seeded()
    }

    fn check(&self, params: &Params) -> Vec<(String, String)> {
        no_rows(params.rows).into_iter().collect()
    }

    fn run(&self, params: Params, ctx: &mut Context) -> Result<()> {
        let tokenizer = lm::Tokenizer::load(&ctx.one("tokenizer")?.folder.join(Tokenizer::FILE)).into_stage_result()?;
        let mut facts = HashMap::new();
        if let Some(posts) = ctx.optional("posts") {
            for post in Posts::open(&posts.folder)? {
                let post = post?;
                facts.extend(post.facts.map(|facts| (post.id, facts)));
            }
        }
        let mut wanted = choose(&params, ctx)?;
        let (sides, total) = (ctx.generator_key("sides"), wanted.len() as u64);
        let mut writer = Pairs::create(ctx.out())?;
        for input in ctx.many("preferences").to_vec() {
            let mut own = None;
            for row in Preferences::open(&input.folder)? {
                let row = row?;
                let (key, chosen) = PairKey::of(&row.prompt, &row.chosen_text, &row.rejected_text);
                // The first row of a pair represents the pair.
                let Some(chosen) = chosen.filter(|_| wanted.remove(&key)) else { continue };
                let chosen_is_a = (key.share(&sides) < 0.5) == (chosen == Text::Low);
                let made = |ids: &Vec<u32>| tokenizer.encode(&row.prompt) == *ids;
                let own = *own.get_or_insert_with(|| row.prompt_ids.as_ref().is_some_and(made));
                let facts = row.facts.clone().or_else(|| facts.get(&row.post_id).cloned());
                writer.push(Pair { facts, ..pair(row, key, chosen_is_a, &tokenizer, own) })?;
            }
            ctx.progress(total - wanted.len() as u64, total, "pairs", None);
        }
        ctx.metric("pairs", writer.finish()? as f64);
        Ok(())
    }
}

/// The pairs to keep; pairs of equal texts are dropped.
fn choose(params: &Params, ctx: &mut Context) -> Result<HashSet<PairKey>> {
    let (mut rows, mut alike) = (0_u64, 0_u64);
    let mut keys = HashSet::new();
    for input in ctx.many("preferences") {
        for row in Preferences::open(&input.folder)? {
            let row = row?;
            rows += 1;
            match PairKey::of(&row.prompt, &row.chosen_text, &row.rejected_text) {
                (key, Some(_)) => drop(keys.insert(key)),
                (_, None) => alike += 1,
            }
        }
    }
    if keys.is_empty() {
        return Err(Error::user(format!("no pair to judge: {rows} rows, {alike} of them of equal texts")));
    }
    ctx.metric("rows_read", rows as f64);
    ctx.metric("equal_texts", alike as f64);
    ctx.metric("further_labels", (rows - alike - keys.len() as u64) as f64);
    let Some(most) = params.rows.filter(|&most| most < keys.len() as u64) else { return Ok(keys) };
    let draws = ctx.generator_key("pairs");
    let mut ranked: Vec<(u64, PairKey)> = keys.into_iter().map(|key| (key.bits(&draws), key)).collect();
    ranked.sort_unstable();
    Ok(ranked.into_iter().take(most as usize).map(|(_, key)| key).collect())
}

/// `own` is whether the table's ids are those of this tokenizer. Sampled ids are kept, because decoding and encoding
/// may change them.
fn pair(row: Preference, key: PairKey, chosen_is_a: bool, tokenizer: &lm::Tokenizer, own: bool) -> Pair {
    let side = |text: String, ids: Option<Vec<u32>>, ended| {
        let ids = ids.filter(|_| own).unwrap_or_else(|| response_ids(tokenizer, &text, ended));
        (text, ids, ended)
    };
    let chosen = side(row.chosen_text, row.chosen_ids, row.chosen_ended);
    let rejected = side(row.rejected_text, row.rejected_ids, row.rejected_ended);
    let (a, b) = if chosen_is_a { (chosen, rejected) } else { (rejected, chosen) };
    Pair {
        id: format!("{}:{key}", row.post_id),
        post_id: row.post_id,
        prompt_ids: row.prompt_ids.filter(|_| own).unwrap_or_else(|| tokenizer.encode(&row.prompt)),
        prompt: row.prompt,
        facts: row.facts,
        a_model: "judged".to_owned(),
        a_text: a.0,
        a_ids: a.1,
        a_ended: a.2,
        b_model: "judged".to_owned(),
        b_text: b.0,
        b_ids: b.1,
        b_ended: b.2,
        corruption: row.corruption,
        // A preference does not record which side was corrupted.
        corrupted: None,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::testing::{Bench, Out, run, run_seeded, toys};
    use crate::types::{Outcome, Split};

    fn people(n: usize) -> Vec<Preference> {
        let strip = |row: Preference| Preference { prompt_ids: None, chosen_ids: None, rejected_ids: None, ..row };
        toys::preferences(n, Split::Gold).into_iter().map(strip).collect()
    }

    fn bench(tables: &[Vec<Preference>]) -> Bench {
        let mut bench = Bench::new();
        for rows in tables {
            bench.input("preferences", "Preferences", |folder| toys::write_preferences(folder, rows.clone()));
        }
        bench.input("tokenizer", "Tokenizer", toys::write_tokenizer);
        bench
    }

    fn pairs(out: &Out) -> Vec<Pair> {
        Pairs::open(&out.path()).unwrap().collect::<Result<_>>().unwrap()
    }

    #[test]
    fn every_pair_comes_once_without_its_label_and_either_side_first() {
        let mut rows = people(200);
        let mut second_label = rows[0].clone();
        std::mem::swap(&mut second_label.chosen_text, &mut second_label.rejected_text);
        rows.push(second_label);
        let same = rows[1].chosen_text.clone();
        rows.push(Preference { rejected_text: same, outcome: Outcome::Tie, ..rows[1].clone() });
        let out = run(&DatasetPairs, json!({}), bench(&[rows.clone(), people(20)]).inputs()).unwrap();
        let found = pairs(&out);
        assert_eq!(found.len(), 200);
        assert_eq!((out.metric("further_labels"), out.metric("equal_texts")), (21.0, 1.0));
        let chosen_first = found.iter().zip(&rows).filter(|(pair, row)| pair.a_text == row.chosen_text).count();
        assert!((70..130).contains(&chosen_first), "{chosen_first} of 200");
        let tokenizer = toys::tokenizer();
        for pair in &found {
            assert_eq!(pair.prompt_ids, tokenizer.encode(&pair.prompt));
            assert_eq!(pair.a_ids, response_ids(&tokenizer, &pair.a_text, true));
        }
    }

    #[test]
    fn a_sample_is_drawn_by_the_seed_and_not_by_the_order_of_rows() {
        let rows = people(100);
        let mut turned = rows.clone();
        turned.rotate_left(37);
        let ids = |rows: &[Preference], seed| {
            let out = run_seeded(&DatasetPairs, json!({ "rows": 10 }), bench(&[rows.to_vec()]).inputs(), seed).unwrap();
            let mut texts: Vec<_> = pairs(&out).into_iter().map(|pair| (pair.id, pair.a_text)).collect();
            texts.sort();
            assert_eq!(texts.len(), 10);
            texts
        };
        assert_eq!(ids(&rows, 1), ids(&turned, 1));
        assert_ne!(ids(&rows, 1), ids(&rows, 2));
    }

    #[test]
    fn sampled_ids_are_kept_and_facts_come_from_the_posts() {
        let mut row = toys::preferences(1, Split::Gold).remove(0);
        let sampled: Vec<u32> = "dog is glad".bytes().map(u32::from).collect();
        row.chosen_ids = Some(sampled.clone());
        let mut bench = bench(&[vec![row.clone()]]);
        let post = crate::types::Post { id: row.post_id, ..toys::posts_with_facts(1, Split::Gold).remove(0) };
        bench.input("posts", "Posts", |folder| toys::write_posts(folder, [post.clone()]));
        let pair = pairs(&run(&DatasetPairs, json!({}), bench.inputs()).unwrap()).remove(0);
        assert!(pair.a_ids == sampled || pair.b_ids == sampled);
        assert_eq!(pair.facts, post.facts);
    }

    #[test]
    fn tables_without_a_pair_to_judge_are_an_error() {
        let mut row = people(1).remove(0);
        row.rejected_text = format!(" {}", row.chosen_text);
        let error = run(&DatasetPairs, json!({}), bench(&[vec![row]]).inputs()).err().unwrap();
        assert_eq!(error.message, "no pair to judge: 1 rows, 1 of them of equal texts");
    }
}
