//! `dataset.tldr`: reads Reddit posts with their authors' summaries from files or the hub.

use std::path::Path;

use engine::context::Context;
use engine::error::{Error, Result};
use engine::external::InputFiles;
use engine::kind::{Kind, Signature};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::hub::{self, HubId};
use crate::prompt::Parts;
use crate::source::{empty, files_of, no_rows, one_source};
use crate::table;
use crate::text::clean::{id_of, printable};
use crate::text::lines::{self, BadRowLimit};
use crate::types::{Post, Posts};

pub struct Tldr;

#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Params {
    /// Parquet or JSON lines, uncompressed or in gzip or zstd, recognised by content: a path, a list of paths, a
    /// folder, or a pattern.
    pub files: InputFiles,
    /// For a folder: a pattern that file names must match.
    pub matching: Option<String>,
    /// A data set on the hub, instead of `files`.
    pub hub: Option<HubId>,
    /// Stop after so many posts.
    pub rows: Option<u64>,
    /// Number of empty or malformed rows to skip and count. One more is an error.
    pub max_bad_rows: u64,
}

crate::table! {
    /// A row of any supported layout; fields that the file lacks are `None`.
    #[derive(Default, Deserialize)]
    #[serde(default)]
    pub struct RawPost {
        id: Option<String>,
        subreddit: Option<String>,
        title: Option<String>,
        post: Option<String>,
        /// Webis TLDR-17: the text without its summary.
        content: Option<String>,
        body: Option<String>,
        summary: Option<String>,
        /// The A.1 prompt, instead of subreddit, title and post.
        prompt: Option<String>,
        label: Option<String>,
        completion: Option<String>,
    }
}

impl RawPost {
    /// # Errors
    /// Names the missing or empty field.
    fn into_post(self) -> Result<Post, String> {
        let summary = self.summary.or(self.label).or(self.completion).ok_or("field `summary` is missing")?;
        let text = self.post.or(self.content).or(self.body);
        let (subreddit, title, post) = match (text, &self.prompt) {
            (Some(text), _) => (self.subreddit.unwrap_or_default(), self.title.unwrap_or_default(), text),
            (None, Some(prompt)) => {
                let parts = Parts::parse(prompt).ok_or("`prompt` does not read SUBREDDIT: … TITLE: … POST: …")?;
                (parts.subreddit.to_owned(), parts.title.to_owned(), parts.post.to_owned())
            }
            (None, None) => return Err("field `post` is missing".to_owned()),
        };
        let clean = |text: String| printable(&text).trim().to_owned();
        let (post, summary) = (clean(post), clean(summary));
        for (field, text) in [("post", &post), ("summary", &summary)] {
            if text.is_empty() {
                return Err(format!("the {field} is empty"));
            }
        }
        let id = self.id.map(clean).filter(|id| !id.is_empty()).unwrap_or_else(|| id_of(&post));
        let one_line = |text: String| clean(text).replace(['\n', '\t'], " ");
        Ok(Post {
            id,
            subreddit: one_line(subreddit),
            title: one_line(title),
            post,
            summary,
            splits: Vec::new(),
            facts: None,
        })
    }
}

fn parse(line: &str) -> Result<Post, String> {
    lines::object::<RawPost>(line)?.into_post()
}

/// Rejects a Parquet file without the columns of any layout before reading its first row.
fn check_columns(file: &Path) -> Result<()> {
    let columns = table::columns(file)?;
    let has = |names: &[&str]| names.iter().any(|name| columns.iter().any(|(column, _)| column == name));
    let missing = if !has(&["prompt", "post", "content", "body"]) {
        "`prompt` (or `post`)"
    } else if !has(&["label", "summary", "completion"]) {
        "`label` (or `summary`)"
    } else {
        return Ok(());
    };
    let found = columns.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>().join(", ");
    let error = Error::user(format!("{}: column {missing} (utf8) is missing; found {found}", file.display()));
    Err(error.help("expected a text column `prompt` or `post`, and one `label` or `summary`"))
}

/// Passes the posts of `file` to `take` until `take` returns `false`.
fn each_post(file: &Path, allowance: &mut BadRowLimit, mut take: impl FnMut(Post) -> Result<bool>) -> Result<()> {
    match lines::Format::of_file(file)? {
        lines::Format::Parquet => {
            check_columns(file)?;
            for (i, raw) in table::Reader::<RawPost>::open_columns(file)?.enumerate() {
                match raw?.into_post() {
                    Ok(post) => {
                        if !take(post)? {
                            break;
                        }
                    }
                    Err(what) => allowance.bad(format_args!("{}, row {}", file.display(), i + 1), &what)?,
                }
            }
            Ok(())
        }
        _ => lines::each_line(file, allowance, parse, take),
    }
}

impl Kind for Tldr {
    type Params = Params;

    const NAME: &'static str = "dataset.tldr";
    const VERSION: u32 = 2;
    const ABOUT: &'static str = "reads Reddit TL;DR posts from files or the hub";

    fn signature(&self, params: &Params) -> Signature {
        let signature = Signature::producing(Posts::NAME);
        hub::declare(signature, params.hub.as_ref())
    }

    fn check(&self, params: &Params) -> Vec<(String, String)> {
        let mut faults = one_source(&params.files, params.hub.as_ref(), "files");
        faults.extend(no_rows(params.rows));
        faults
    }

    fn complete(&self, params: &mut Params) {
        params.files.set_matching(params.matching.clone());
    }

    fn run(&self, params: Params, ctx: &mut Context) -> Result<()> {
        let files = files_of(&params.files, params.hub.as_ref(), ctx)?;
        let mut allowance = BadRowLimit::new(params.max_bad_rows);
        let mut writer = Posts::create(ctx.out())?;
        let limit = params.rows.unwrap_or(u64::MAX);
        for (done, file) in files.iter().enumerate() {
            if writer.rows() >= limit {
                break;
            }
            each_post(file, &mut allowance, |post| {
                writer.push(post)?;
                Ok(writer.rows() < limit)
            })?;
            ctx.progress(done as u64 + 1, files.len() as u64, "files", Some(("posts", writer.rows() as f64)));
        }
        let rows = writer.finish()?;
        if rows == 0 {
            return Err(empty(&files, "post", allowance.bad));
        }
        ctx.metric("rows", rows as f64);
        ctx.metric("bad_rows", allowance.bad as f64);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::testing::{Bench, run};

    fn posts(bench: &Bench, with: serde_json::Value) -> Result<Vec<Post>> {
        let out = run(&Tldr, with, bench.inputs())?;
        Posts::open(&out.path())?.collect()
    }

    const FILTERED: &str = r#"{"id": "t3_1", "subreddit": "relationships", "title": "My [24F] roommate\n", "post": "She never\r\ncleans.\u0007", "summary": " she is messy", "other": 3}"#;
    const WEBIS: &str = r#"{"author": "x", "body": "long text TL;DR short", "normalizedBody": "n", "content": "long text", "content_len": 2, "summary": "short", "summary_len": 1, "id": "c6", "subreddit": "tifu", "subreddit_id": "t5_1"}"#;
    const BARE: &str =
        r#"{"id": "TLDR_1", "subreddit": "", "title": "", "post": "i lost my keys", "summary": "keys lost"}"#;

    #[test]
    fn every_json_layout_gives_posts() {
        let bench = Bench::new();
        let file = bench.write("posts.jsonl", &[FILTERED, WEBIS, BARE].map(|l| format!("{l}\n")).concat());
        let posts = posts(&bench, json!({ "files": file })).unwrap();
        let of = |i: usize| {
            [&posts[i].id, &posts[i].subreddit, &posts[i].title, &posts[i].post, &posts[i].summary].map(String::as_str)
        };
        assert_eq!(of(0), ["t3_1", "relationships", "My [24F] roommate", "She never\ncleans.", "she is messy"]);
        assert_eq!(of(1), ["c6", "tifu", "", "long text", "short"]);
        assert_eq!(of(2), ["TLDR_1", "", "", "i lost my keys", "keys lost"]);
    }

    #[test]
    fn parquet_prompts_are_taken_apart() {
        crate::table! { struct Carper { prompt: String, label: String } }
        let bench = Bench::new();
        let file = bench.path("train.parquet");
        let prompt = "SUBREDDIT: r/AskReddit\nTITLE: A question\nPOST: Why is it so?\n\nI wonder.\nTL;DR:";
        table::write(&file, [Carper { prompt: prompt.into(), label: "why?".into() }]).unwrap();
        let posts = posts(&bench, json!({ "files": [file] })).unwrap();
        assert_eq!(posts[0].subreddit, "r/AskReddit");
        assert_eq!(posts[0].post, "Why is it so?\n\nI wonder.");
        assert_eq!(posts[0].summary, "why?");
        assert_eq!(posts[0].id.len(), 16);
    }

    #[test]
    fn a_parquet_file_without_a_column_is_refused_by_name() {
        crate::table! { struct Odd { prompt: String, answer: String } }
        let bench = Bench::new();
        let file = bench.path("train.parquet");
        table::write(&file, [Odd { prompt: "p".into(), answer: "a".into() }]).unwrap();
        let error = posts(&bench, json!({ "files": file })).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        assert!(
            error
                .message
                .ends_with("train.parquet: column `label` (or `summary`) (utf8) is missing; found prompt, answer"),
            "{error}"
        );
    }

    #[test]
    fn malformed_lines_stop_the_stage_unless_allowed() {
        let bench = Bench::new();
        let file = bench.write("posts.jsonl", &format!("{BARE}\n\n{{\"id\": 3}}\n{{\"post\": \"p\"}}\n{BARE}\n"));
        let error = posts(&bench, json!({ "files": file })).unwrap_err();
        assert!(error.message.ends_with("posts.jsonl, line 2: empty line"), "{error}");
        assert_eq!(error.exit_code(), 2);
        let error = posts(&bench, json!({ "files": file, "max_bad_rows": 1 })).unwrap_err();
        let told =
            "posts.jsonl, line 3: invalid type: integer `3`, expected a string (column 8) (bad row 2 of 1 allowed)";
        assert!(error.message.ends_with(told), "{error}");
        let error = posts(&bench, json!({ "files": file, "max_bad_rows": 2 })).unwrap_err();
        assert!(error.message.contains("posts.jsonl, line 4: field `summary` is missing"), "{error}");
        assert_eq!(posts(&bench, json!({ "files": file, "max_bad_rows": 3 })).unwrap().len(), 2);
    }

    #[test]
    fn each_line_is_an_object_and_an_empty_file_is_told() {
        let bench = Bench::new();
        let list = r#"["t3_1", "tifu", "title", "post", "content", "body", "summary", "p", "l", "c"]"#;
        let file = bench.write("posts.jsonl", &format!("{list}\n"));
        let error = posts(&bench, json!({ "files": file })).unwrap_err();
        assert!(error.message.ends_with("posts.jsonl, line 1: expected one JSON object a line"), "{error}");
        let file = bench.write("marked.txt", &format!("\u{feff}{BARE}\n"));
        assert_eq!(posts(&bench, json!({ "files": file })).unwrap().len(), 1);
        let file = bench.write("empty.jsonl", "");
        let error = posts(&bench, json!({ "files": file })).unwrap_err();
        assert!(error.message.ends_with("empty.jsonl: holds no row"), "{error}");
        let error = posts(&bench, json!({ "files": file, "rows": 0 })).unwrap_err();
        assert!(error.message.contains("rows") && error.message.contains("at least 1"), "{error}");
        let file = bench.write("cut.parquet", "PAR1 and no more");
        let error = posts(&bench, json!({ "files": file })).unwrap_err();
        assert!(error.message.contains("not a readable Parquet file") && error.help.is_some(), "{error}");
    }

    #[test]
    fn separators_of_words_keep_them_apart() {
        let bench = Bench::new();
        let row =
            r#"{"title": "a\u001fb", "post": "three\u0085four\u000bfive\u2028six", "summary": "counted\u001chats"}"#;
        let file = bench.write("posts.jsonl", &format!("{row}\n"));
        let post = posts(&bench, json!({ "files": file })).unwrap().remove(0);
        assert_eq!([post.title, post.post, post.summary], ["a b", "three four five\nsix", "counted hats"]);
    }

    #[test]
    fn rows_bounds_the_posts_over_all_files() {
        let bench = Bench::new();
        for name in ["a.jsonl", "b.jsonl"] {
            bench.write(name, &format!("{BARE}\n{WEBIS}\n"));
        }
        let posts = |rows| posts(&bench, json!({ "files": bench.path("*.jsonl"), "rows": rows })).unwrap().len();
        assert_eq!([posts(1), posts(3), posts(9)], [1, 3, 4]);
    }
}
