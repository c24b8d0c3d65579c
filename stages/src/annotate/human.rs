//! `annotate.human`: people's comparisons, read from files, the hub or an artifact. Knows no tokenizer.

use std::collections::HashSet;
use std::path::Path;

use engine::context::Context;
use engine::error::{Error, Result};
use engine::kind::{Kind, Signature};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{HeldOut, Judged};
use crate::data::clean::{id_of, normalised, printable};
use crate::data::paths::Paths;
use crate::data::source::{self, Allowance};
use crate::data::tldr::{empty, files_of, no_rows, one_source};
use crate::hub::{self, HubId};
use crate::prompt::Parts;
use crate::table;
use crate::types::comparisons::Comparison;
use crate::types::{Comparisons, Outcome, Posts, Preference, Preferences};

pub struct Human;

#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Params {
    /// Stiennon et al.'s comparisons as JSON lines, plain or in gzip or zstd, or Parquet with prompt, chosen and rejected: a
    /// path, a list of paths, a folder, a wildcard. Stands in for the input `comparisons`, which is then not read.
    pub files: Paths,
    /// With a folder: a pattern that the names of its files must match.
    pub matching: Option<String>,
    /// A data set of the hub, instead of `files` or the input.
    pub hub: Option<HubId>,
    /// Stop after so many preferences.
    pub rows: Option<u64>,
    /// Rows that may be empty or malformed; they are left out and counted. One more is an error.
    pub max_bad_rows: u64,
}

crate::table! {
    struct PromptPair {
        prompt: Option<String>,
        chosen: Option<String>,
        rejected: Option<String>,
    }
}

/// A missing column is told before the first row: only a null in one is a bad row.
fn check_columns(file: &Path) -> Result<()> {
    let columns = table::columns(file)?;
    for name in ["prompt", "chosen", "rejected"] {
        if !columns.iter().any(|(column, _)| column == name) {
            let found = columns.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>().join(", ");
            let what = format!("{}: column `{name}` (utf8) is missing; found {found}", file.display());
            return Err(Error::yours(what).help("expected text columns `prompt`, `chosen` and `rejected`"));
        }
    }
    Ok(())
}

/// A person's choice, whatever file it stood in.
struct Choice {
    post_id: Option<String>,
    subreddit: String,
    title: String,
    post: String,
    chosen: String,
    rejected: String,
    /// Which of the two stood first as they were shown: 0 or 1; absent where a file does not tell.
    place: Option<usize>,
    worker: Option<String>,
    confidence: Option<f64>,
}

/// What a row can be besides a choice.
enum Row {
    Choice(Choice),
    /// A news article, which has no place in the prompt's template.
    Article,
}

fn of_comparison(comparison: Comparison) -> Result<Row, String> {
    let info = comparison.info;
    let Some(post) = info.post.filter(|post| !post.trim().is_empty()) else {
        return if info.article.is_some() {
            Ok(Row::Article)
        } else {
            Err("`info.post` is missing or empty".to_owned())
        };
    };
    let place = comparison.choice;
    let mut texts = comparison.summaries.into_iter().map(|summary| summary.text);
    // The parser saw to it that there are two.
    let (first, second) = (texts.next().unwrap_or_default(), texts.next().unwrap_or_default());
    let (chosen, rejected) = if place == 0 { (first, second) } else { (second, first) };
    Ok(Row::Choice(Choice {
        post_id: Some(info.id).filter(|id| !id.is_empty()),
        subreddit: info.subreddit.unwrap_or_default(),
        title: info.title.unwrap_or_default(),
        post,
        chosen,
        rejected,
        place: Some(place),
        worker: comparison.worker,
        confidence: comparison.extra.and_then(|extra| extra.confidence),
    }))
}

fn of_prompt(row: PromptPair) -> Result<Row, String> {
    let text = |value: Option<String>, name: &str| value.ok_or(format!("`{name}` is null"));
    let prompt = text(row.prompt, "prompt")?;
    let (chosen, rejected) = (text(row.chosen, "chosen")?, text(row.rejected, "rejected")?);
    for (value, name) in [(&chosen, "chosen"), (&rejected, "rejected")] {
        if summary(printable(value).trim()).is_empty() {
            return Err(format!("`{name}` is empty"));
        }
    }
    let parts = Parts::parse(&prompt).ok_or("`prompt` does not read SUBREDDIT: … TITLE: … POST: …")?;
    if parts.post.is_empty() {
        return Err("the post is empty".to_owned());
    }
    Ok(Row::Choice(Choice {
        post_id: None,
        subreddit: parts.subreddit.to_owned(),
        title: parts.title.to_owned(),
        post: parts.post.to_owned(),
        chosen,
        rejected,
        place: None,
        worker: None,
        confidence: None,
    }))
}

/// The table in the making.
struct Taking {
    judged: Judged,
    held_out: HeldOut,
    limit: u64,
    seen: HashSet<[u8; 16]>,
    duplicates: u64,
    articles: u64,
    /// Choices of the first and of the second summary, where the file tells.
    places: [u64; 2],
}

impl Taking {
    /// Whether there is room for more.
    fn take(&mut self, row: Row) -> Result<bool> {
        match row {
            Row::Article => self.articles += 1,
            Row::Choice(choice) => self.choice(choice)?,
        }
        Ok(self.judged.rows() < self.limit)
    }

    fn choice(&mut self, choice: Choice) -> Result<()> {
        let clean = |text: &str| printable(text).trim().to_owned();
        let post = clean(&choice.post);
        let post_id = choice.post_id.unwrap_or_else(|| id_of(&post));
        if self.held_out.holds(&post_id, &post) {
            return Ok(());
        }
        let prompt = Parts { subreddit: &clean(&choice.subreddit), title: &clean(&choice.title), post: &post }.text();
        let [chosen, rejected] = [&choice.chosen, &choice.rejected].map(|text| summary(&clean(text)));
        let mut hasher = blake3::Hasher::new();
        for part in [&prompt, &chosen, &rejected, choice.worker.as_deref().unwrap_or_default()] {
            hasher.update(&(part.len() as u64).to_le_bytes());
            hasher.update(part.as_bytes());
        }
        let mut print = [0; 16];
        print.copy_from_slice(&hasher.finalize().as_bytes()[..16]);
        if !self.seen.insert(print) {
            self.duplicates += 1;
            return Ok(());
        }
        if let Some(place) = choice.place {
            self.places[place.min(1)] += 1;
        }
        let digits: String = print[..8].iter().map(|b| format!("{b:02x}")).collect();
        let outcome = if normalised(&chosen) == normalised(&rejected) { Outcome::Tie } else { Outcome::Labelled };
        self.judged.push(Preference {
            id: format!("{post_id}-{digits}"),
            post_id,
            prompt,
            prompt_ids: None,
            facts: None,
            chosen_text: chosen,
            chosen_ids: None,
            chosen_ended: true,
            rejected_text: rejected,
            rejected_ids: None,
            rejected_ended: true,
            corruption: None,
            outcome,
            annotator: choice
                .worker
                .map_or_else(|| "human".to_owned(), |worker| format!("human:{}", printable(&worker))),
            confidence: choice.confidence,
        })
    }
}

/// Some files keep the template's `TL;DR:` with the summaries.
fn summary(text: &str) -> String {
    let label = "TL;DR:";
    match text.get(..label.len()) {
        Some(head) if head.eq_ignore_ascii_case(label) => text[label.len()..].trim().to_owned(),
        _ => text.to_owned(),
    }
}

fn each_row(file: &Path, allowance: &mut Allowance, taking: &mut Taking) -> Result<()> {
    match source::Format::of_file(file)? {
        source::Format::Parquet => {
            check_columns(file)?;
            for (i, row) in table::Reader::<PromptPair>::open_columns(file)?.enumerate() {
                match of_prompt(row?) {
                    Ok(row) => {
                        if !taking.take(row)? {
                            break;
                        }
                    }
                    Err(what) => allowance.bad(format_args!("{}, row {}", file.display(), i + 1), &what)?,
                }
            }
            Ok(())
        }
        _ => {
            let parse = |line: &str| of_comparison(Comparison::parse(line)?);
            source::each_line(file, allowance, parse, |row| taking.take(row))
        }
    }
}

/// From so many on, choices that all fall on the same place are no chance: one of two in 2^15.
const ENOUGH: u64 = 16;

impl Kind for Human {
    type Params = Params;

    const NAME: &'static str = "annotate.human";
    const VERSION: u32 = 1;
    const ABOUT: &'static str =
        "takes people's comparisons of summaries as preferences, from an input, `files` or `hub`";

    fn signature(&self, params: &Params) -> Signature {
        let signature = Signature::gives(Preferences::NAME).optional("exclude", &[Posts::NAME]);
        let signature = if params.files.is_empty() && params.hub.is_none() {
            signature.one("comparisons", &[Comparisons::NAME])
        } else {
            signature.optional("comparisons", &[Comparisons::NAME])
        };
        hub::declare(signature, params.hub.as_ref())
    }

    fn check(&self, params: &Params) -> Vec<(String, String)> {
        let mut faults = match (&params.hub, params.files.is_empty()) {
            (None, true) => Vec::new(),
            _ => one_source(&params.files, params.hub.as_ref(), "files"),
        };
        faults.extend(no_rows(params.rows));
        faults
    }

    fn run(&self, params: Params, ctx: &mut Context) -> Result<()> {
        let files = match ctx.optional("comparisons") {
            Some(input) if params.files.is_empty() && params.hub.is_none() => {
                vec![input.folder.join(Comparisons::FILE)]
            }
            _ => files_of(&params.files, params.matching.as_deref(), params.hub.as_ref(), ctx)?,
        };
        let mut allowance = Allowance::new(params.max_bad_rows);
        let mut taking = Taking {
            judged: Judged::create(ctx.out())?,
            held_out: HeldOut::of(ctx)?,
            limit: params.rows.unwrap_or(u64::MAX),
            seen: HashSet::new(),
            duplicates: 0,
            articles: 0,
            places: [0; 2],
        };
        for (done, file) in files.iter().enumerate() {
            if taking.judged.rows() < taking.limit {
                each_row(file, &mut allowance, &mut taking)?;
            }
            ctx.progress(
                done as u64 + 1,
                files.len() as u64,
                "files",
                Some(("preferences", taking.judged.rows() as f64)),
            );
        }
        let Taking { judged, held_out, duplicates, articles, places, .. } = taking;
        if judged.rows() + held_out.dropped + articles == 0 {
            return Err(empty(&files, "comparison", allowance.bad));
        }
        if places.iter().sum::<u64>() >= ENOUGH && places.contains(&0) {
            let always = if places[0] == 0 { 1 } else { 0 };
            return Err(Error::yours(format!(
                "{}: one class only: all {} choices are {always}",
                files.iter().map(|f| f.display().to_string()).collect::<Vec<_>>().join(", "),
                places[always]
            ))
            .help("labels that always point to the same place are no judgements"));
        }
        if articles > 0 {
            ctx.warn(format!(
                "{articles} comparisons of news articles were left out: only Reddit posts fit the prompt"
            ));
        }
        ctx.metric("articles", articles as f64);
        ctx.metric("duplicates", duplicates as f64);
        ctx.metric("held_out_dropped", held_out.dropped as f64);
        ctx.metric("bad_rows", allowance.bad as f64);
        judged.finish(ctx)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::testing::{Bench, run};
    use crate::types::{Post, Split};

    /// A record as Stiennon et al. publish them, in our own words.
    fn comparison(id: usize, choice: usize) -> Value {
        json!({
            "info": { "id": format!("t3_{id}"), "post": format!("My neighbour number {id}\nplays the drums."), "title": "Drums", "subreddit": "legaladvice" },
            "summaries": [
                { "text": " neighbour drums, what now?", "policy": "ref", "note": "fine" },
                { "text": " drums.", "policy": "sup2", "note": "short" }
            ],
            "choice": choice, "worker": "w1", "batch": "batch3", "split": "train", "extra": { "confidence": 8 }
        })
    }

    fn axis() -> Value {
        json!({ "info": { "id": "x" }, "split": "test", "summary": { "text": "t", "policy": "ref", "axes": { "overall": 3 } }, "worker": "w", "batch": "cnndm1" })
    }

    fn prompt_pair(prompt: Option<&str>, chosen: Option<&str>, rejected: Option<&str>) -> PromptPair {
        let [prompt, chosen, rejected] = [prompt, chosen, rejected].map(|text| text.map(str::to_owned));
        PromptPair { prompt, chosen, rejected }
    }

    fn lines(rows: &[Value]) -> String {
        rows.iter().map(|row| format!("{row}\n")).collect()
    }

    fn take(bench: &Bench, with: Value) -> Result<Vec<Preference>> {
        let out = run(&Human, with, bench.inputs())?;
        Preferences::open(&out.path())?.collect()
    }

    #[test]
    fn a_comparison_becomes_a_preference_in_our_template() {
        let bench = Bench::new();
        let file = bench.write("c.jsonl", &lines(&[comparison(1, 1)]));
        let rows = take(&bench, json!({ "files": file })).unwrap();
        let row = &rows[0];
        assert_eq!(
            row.prompt,
            "Subreddit: r/legaladvice\nTITLE: Drums\nPOST: My neighbour number 1\nplays the drums.\nTL;DR:"
        );
        assert_eq!((row.chosen_text.as_str(), row.rejected_text.as_str()), ("drums.", "neighbour drums, what now?"));
        assert_eq!((row.post_id.as_str(), row.confidence, row.annotator.as_str()), ("t3_1", Some(8.0), "human:w1"));
        assert!(row.prompt_ids.is_none() && row.chosen_ended);
    }

    #[test]
    fn an_axis_rating_is_refused_for_what_it_is() {
        let bench = Bench::new();
        let file = bench.write("axis.jsonl", &lines(&[axis()]));
        let error = take(&bench, json!({ "files": file })).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        assert!(error.message.contains("axis.jsonl, line 1: this is an axis rating of one summary"), "{error}");
    }

    #[test]
    fn parquet_with_prompts_is_read_and_a_missing_column_named() {
        let bench = Bench::new();
        let file = bench.path("train.parquet");
        let prompt = "SUBREDDIT: r/tifu\nTITLE: T\nPOST: I fell.".to_owned();
        table::write(&file, [prompt_pair(Some(&prompt), Some("TL;DR:  fell"), Some("TL;DR: stood"))]).unwrap();
        let rows = take(&bench, json!({ "files": file })).unwrap();
        assert_eq!(rows[0].prompt, "Subreddit: r/tifu\nTITLE: T\nPOST: I fell.\nTL;DR:");
        assert_eq!((rows[0].chosen_text.as_str(), rows[0].rejected_text.as_str()), ("fell", "stood"));
        assert_eq!(rows[0].post_id, id_of("I fell."));
        crate::table! { struct Half { prompt: String, chosen: String } }
        table::write(&file, [Half { prompt: "p".into(), chosen: "c".into() }]).unwrap();
        let error = take(&bench, json!({ "files": file })).unwrap_err();
        assert!(error.message.contains("column `rejected` (utf8) is missing"), "{error}");
    }

    #[test]
    fn held_out_posts_and_duplicates_are_dropped_and_counted() {
        let mut bench = Bench::new();
        bench.input("exclude", "Posts", |folder| {
            let post = |id: &str, text: &str, split| Post {
                id: id.into(),
                subreddit: String::new(),
                title: String::new(),
                post: text.into(),
                summary: "s".into(),
                splits: vec![split],
                facts: None,
            };
            let posts = [
                post("t3_1", "other text", Split::Valid),
                post("other id", "my NEIGHBOUR number 2 plays the drums", Split::Calibration),
                post("t3_3", "third", Split::Sft),
            ];
            crate::table::write(&folder.join(Posts::FILE), posts).map(drop)
        });
        let rows = [comparison(1, 0), comparison(2, 0), comparison(3, 1), comparison(3, 1)];
        bench.input("comparisons", "Comparisons", |folder| {
            std::fs::write(folder.join(Comparisons::FILE), lines(&rows)).map_err(|e| Error::ours(e.to_string()))
        });
        let out = run(&Human, json!({}), bench.inputs()).unwrap();
        assert_eq!(out.metric("held_out_dropped"), 2.0);
        assert_eq!(out.metric("duplicates"), 1.0);
        assert_eq!(out.metric("labelled"), 1.0);
    }

    #[test]
    fn one_class_only_is_an_error() {
        let bench = Bench::new();
        let same: Vec<Value> = (0..20).map(|i| comparison(i, 0)).collect();
        let file = bench.write("c.jsonl", &lines(&same));
        let error = take(&bench, json!({ "files": file })).unwrap_err();
        assert!(error.message.contains("one class only: all 20 choices are 0"), "{error}");
        let mut tie = comparison(1, 0);
        tie["summaries"][1]["text"] = "Neighbour drums, what now".into();
        let file = bench.write("c.jsonl", &lines(&[tie]));
        assert!(take(&bench, json!({ "files": file })).unwrap_err().message.contains("1 tie"));
    }

    #[test]
    fn nulls_empty_texts_lists_and_empty_files_are_told() {
        let bench = Bench::new();
        let file = bench.path("train.parquet");
        let prompt = Some("SUBREDDIT: r/tifu\nTITLE: T\nPOST: I fell.");
        for (bad, told) in [
            (prompt_pair(None, Some("a"), Some("b")), "row 1: `prompt` is null"),
            (prompt_pair(prompt, None, Some("b")), "row 1: `chosen` is null"),
            (prompt_pair(prompt, Some("a"), Some(" TL;DR: ")), "row 1: `rejected` is empty"),
        ] {
            table::write(&file, [bad, prompt_pair(prompt, Some("a"), Some("b"))]).unwrap();
            let error = take(&bench, json!({ "files": file })).unwrap_err();
            assert!(error.message.ends_with(told), "{error}");
            assert_eq!(take(&bench, json!({ "files": file, "max_bad_rows": 1 })).unwrap().len(), 1);
        }
        let list = json!([comparison(1, 0)["info"], comparison(1, 0)["summaries"], 0]);
        let file = bench.write("c.jsonl", &lines(&[list]));
        let error = take(&bench, json!({ "files": file })).unwrap_err();
        assert!(error.message.ends_with("line 1: expected one JSON object a line"), "{error}");
        let mut listed = comparison(1, 0);
        listed["info"] = json!(["t3_1", "post"]);
        let file = bench.write("c.jsonl", &lines(&[listed]));
        assert!(take(&bench, json!({ "files": file })).unwrap_err().message.contains("`info` holds a list"));
        let file = bench.write("c.jsonl", "");
        let error = take(&bench, json!({ "files": file })).unwrap_err();
        assert!(error.message.ends_with("c.jsonl: holds no row"), "{error}");
        assert!(take(&bench, json!({ "files": file, "rows": 0 })).is_err());
    }

    #[test]
    fn malformed_lines_are_named_and_can_be_allowed() {
        let bench = Bench::new();
        let file = bench.write("c.jsonl", &format!("{}\n{{\"info\": {{}}}}\n", comparison(1, 1)));
        let error = take(&bench, json!({ "files": file })).unwrap_err();
        assert!(error.message.contains("c.jsonl, line 2: not a comparison"), "{error}");
        assert_eq!(take(&bench, json!({ "files": file, "max_bad_rows": 1 })).unwrap().len(), 1);
    }
}
