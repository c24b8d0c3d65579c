//! Tests of `annotate.human`.

use serde_json::{Value, json};

use super::*;
use crate::labels::trl::{Layout, write_preferences};
use crate::table;
use crate::testing::{Bench, Out, run};
use crate::text::clean::id_of;
use crate::types::{Outcome, Post, Preference, Split};

crate::table! {
    struct PromptPair {
        prompt: Option<String>,
        chosen: Option<String>,
        rejected: Option<String>,
    }
}

/// A record in the format of Stiennon et al., with invented texts.
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
    assert_eq!(row.chosen_first, Some(false));
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
    assert!(error.message.contains("column `rejected` is missing; found prompt, chosen"), "{error}");
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
        std::fs::write(folder.join(Comparisons::FILE), lines(&rows)).map_err(|e| Error::internal(e.to_string()))
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

/// A record of a vote on pair `id`: the choice, the worker and the batch.
fn vote(id: usize, choice: usize, worker: &str, batch: &str) -> Value {
    let mut record = comparison(id, choice);
    (record["worker"], record["batch"]) = (worker.into(), batch.into());
    record
}

fn out(bench: &Bench, with: Value) -> (Out, Vec<Preference>) {
    let out = run(&Human, with, bench.inputs()).unwrap();
    let rows = Preferences::open(&out.path()).unwrap().collect::<Result<_>>().unwrap();
    (out, rows)
}

/// Writes the records as a Parquet file of another program.
fn write_parquet(file: &Path, records: &[Value]) {
    let text = lines(records);
    let (schema, _) = arrow::json::reader::infer_json_schema(text.as_bytes(), None).unwrap();
    let schema = std::sync::Arc::new(schema);
    let mut reader = arrow::json::ReaderBuilder::new(schema.clone()).build(text.as_bytes()).unwrap();
    let batch = reader.next().unwrap().unwrap();
    let mut writer = parquet::arrow::ArrowWriter::try_new(std::fs::File::create(file).unwrap(), schema, None).unwrap();
    writer.write(&batch).unwrap();
    writer.close().unwrap();
}

#[test]
fn the_majority_of_a_pairs_labels_is_its_label_and_a_drawn_vote_a_tie() {
    let bench = Bench::new();
    let mut turned = vote(1, 0, "c", "b");
    turned["summaries"].as_array_mut().unwrap().reverse();
    let rows = [
        vote(1, 0, "a", "b"),
        vote(2, 1, "a", "b"),
        vote(1, 1, "b", "b"),
        vote(2, 0, "b", "b"),
        // The same pair in the other order: `drums.` again.
        turned,
        vote(3, 1, "a", "b"),
        // The same label twice from one worker.
        vote(3, 1, "a", "b"),
    ];
    let file = bench.write("c.jsonl", &lines(&rows));
    let (made, rows) = out(&bench, json!({ "files": file, "labels": "majority" }));
    let told: Vec<_> = rows.iter().map(|r| (r.post_id.as_str(), r.chosen_text.as_str(), r.outcome)).collect();
    let now = "neighbour drums, what now?";
    assert_eq!((told[0], told[2]), (("t3_1", "drums.", Outcome::Labelled), ("t3_3", "drums.", Outcome::Labelled)));
    assert_eq!((told[1].0, told[1].2, rows[0].rejected_text.as_str()), ("t3_2", Outcome::Tie, now));
    let annotators: Vec<&str> = rows.iter().map(|row| row.annotator.as_str()).collect();
    assert_eq!(annotators, ["human:2 of 3", "human:1 of 2", "human:a"]);
    assert_eq!([rows[0].chosen_first, rows[2].chosen_first], [None, Some(false)]);
    assert_eq!((made.metric("merged_labels"), made.metric("duplicates"), made.metric("rows_read")), (3.0, 1.0, 7.0));

    let (made, rows) = out(&bench, json!({ "files": file }));
    assert_eq!((rows.len(), made.metric("duplicates"), made.metric("merged_labels")), (6, 1.0, 0.0));
    let mut ids: Vec<&str> = rows.iter().map(|row| row.id.as_str()).collect();
    ids.sort_unstable();
    ids.dedup();
    assert_eq!(ids.len(), 6, "every label is a row with an id of its own");
}

#[test]
fn labels_that_name_no_worker_are_a_vote_each_but_never_two_rows() {
    let bench = Bench::new();
    let file = bench.path("train.parquet");
    let prompt = Some("SUBREDDIT: r/tifu\nTITLE: T\nPOST: I fell.");
    let (a, b) = (prompt_pair(prompt, Some("a"), Some("b")), prompt_pair(prompt, Some("b"), Some("a")));
    table::write(&file, [b, a.clone(), a]).unwrap();
    let (_, rows) = out(&bench, json!({ "files": file, "labels": "majority" }));
    assert_eq!((rows.len(), rows[0].chosen_text.as_str(), rows[0].annotator.as_str()), (1, "a", "human:2 of 3"));
    let (made, rows) = out(&bench, json!({ "files": file }));
    assert_eq!((rows.len(), made.metric("duplicates")), (2, 1.0));
    assert_eq!(rows[0].chosen_first, None);
}

#[test]
fn every_row_read_is_a_preference_or_dropped_for_one_counted_reason() {
    let mut bench = Bench::new();
    let mut article = comparison(9, 0);
    article["info"] = json!({ "id": "x", "article": "A shop burned." });
    let mut other_policy = comparison(4, 0);
    other_policy["summaries"][0]["policy"] = "sup1".into();
    let mut unsure = comparison(5, 1);
    unsure["extra"]["confidence"] = 2.into();
    let mut silent = comparison(6, 1);
    silent["extra"] = json!({});
    let mut valid = comparison(7, 1);
    valid["split"] = "valid1".into();
    let rows = [
        vote(1, 0, "a", "batch3"),
        vote(1, 0, "a", "batch3"),
        vote(2, 0, "a", "batch11"),
        vote(3, 0, "spam", "batch3"),
        article,
        other_policy,
        unsure,
        silent,
        valid,
        vote(8, 1, "a", "batch3"),
    ];
    let file = bench.write("batch3.json", &lines(&rows));
    bench.input("exclude", "Posts", |folder| {
        let mut post = crate::testing::toys::posts(1, Split::Valid).remove(0);
        post.id = "t3_8".into();
        crate::testing::toys::write_posts(folder, [post])
    });
    let filters = json!({ "batch": ["batch[3-9]"], "split": ["train"], "worker": ["!spam"], "policy": ["ref", "sup2"],
        "confidence": [[5, 9]] });
    let (made, rows) = out(&bench, json!({ "files": file, "filters": filters }));
    assert_eq!(rows.len(), 1);
    let reasons = [
        ("articles", 1.0),
        ("filtered_batch", 1.0),
        ("filtered_split", 1.0),
        ("filtered_worker", 1.0),
        ("filtered_policy", 1.0),
        ("filtered_confidence", 2.0),
        ("held_out_dropped", 1.0),
        ("duplicates", 1.0),
        ("merged_labels", 0.0),
    ];
    assert_eq!(Reason::ALL.iter().map(|r| (r.as_str(), made.metric(r.as_str()))).collect::<Vec<_>>(), reasons);
    assert_eq!(made.metric("rows_read"), made.metric("rows") + reasons.iter().map(|(_, n)| n).sum::<f64>());
    assert!(made.warnings[0].starts_with("1 comparisons of news articles"), "{:?}", made.warnings);

    let error = take(&bench, json!({ "files": file, "filters": { "batch": ["batch99"] } })).unwrap_err();
    assert!(error.message.ends_with("of 10 rows none is left: 1 articles, 9 filtered_batch"), "{error}");
    let error =
        take(&bench, json!({ "files": file, "filters": { "batch": ["["], "confidence": [[9, 5]] } })).unwrap_err();
    assert!(error.message.contains("filters.batch") && error.message.contains("filters.confidence"), "{error}");
}

#[test]
fn a_filter_that_a_source_cannot_answer_is_refused() {
    let bench = Bench::new();
    let record = json!({ "prompt": "POST: p", "chosen": "a", "rejected": "b" });
    let file = bench.write("p.jsonl", &lines(&[record]));
    let error = take(&bench, json!({ "files": file, "filters": { "split": ["train"] } })).unwrap_err();
    assert_eq!(error.exit_code(), 2);
    assert!(error.message.contains("p.jsonl: `filters`: rows of prompt, chosen and rejected name no batch"), "{error}");
}

#[test]
fn stiennons_records_read_alike_from_lines_and_from_parquet() {
    let bench = Bench::new();
    let mut article = comparison(3, 0);
    article["info"] = json!({ "id": "x", "article": "A shop burned.", "site": "dailymail" });
    let records = [vote(1, 1, "a", "batch3"), vote(2, 0, "b", "batch4"), article];
    let text = lines(&records);
    let (plain, nested) = (bench.write("c.json", &text), bench.path("c.parquet"));
    write_parquet(&nested, &records);
    let expected = out(&bench, json!({ "files": plain, "filters": { "batch": ["batch*"] } })).1;
    assert_eq!(expected.len(), 2);
    assert_eq!(out(&bench, json!({ "files": nested, "filters": { "batch": ["batch*"] } })).1, expected);
    let zst = bench.path("c.zst");
    std::fs::write(&zst, zstd::encode_all(text.as_bytes(), 1).unwrap()).unwrap();
    assert_eq!(out(&bench, json!({ "files": bench.path("*.zst") })).1, expected);

    // TRL's conversations keep the record beside the messages.
    let message = |role: &str, content: &str| json!({ "role": role, "content": content });
    let prompt = "SUBREDDIT: r/legaladvice\n\nTITLE: Drums\n\nPOST: My neighbour number 1\nplays the drums.\n\nTL;DR:";
    let chat = json!({ "prompt": prompt, "chosen": [message("user", prompt), message("assistant", "drums.")],
        "rejected": [message("user", prompt), message("assistant", "neighbour drums, what now?")] });
    write_parquet(&nested, &[chat]);
    let row = &out(&bench, json!({ "files": nested })).1[0];
    assert_eq!((&row.prompt, &row.chosen_text), (&expected[0].prompt, &expected[0].chosen_text));
}

#[test]
fn a_damaged_parquet_file_is_an_error_or_other_rows_and_never_a_panic() {
    use rand::Rng;
    let bench = Bench::new();
    let file = bench.path("c.parquet");
    write_parquet(&file, &(0..40).map(|i| vote(i, i % 2, "a", "batch3")).collect::<Vec<_>>());
    let whole = std::fs::read(&file).unwrap();
    let mut rng = crate::random::fixed_generator(1, "damage");
    let mut refused = 0;
    for round in 0..300 {
        let mut bytes = whole.clone();
        if round % 5 == 0 {
            bytes.truncate(rng.random_range(4..bytes.len()));
        }
        for _ in 0..rng.random_range(1..6) {
            let at = rng.random_range(4..bytes.len());
            bytes[at] = rng.random();
        }
        std::fs::write(&file, bytes).unwrap();
        refused += u64::from(take(&bench, json!({ "files": file, "max_bad_rows": 40 })).is_err());
    }
    assert!(refused > 50, "{refused} of 300");
}

#[test]
fn bytes_for_texts_and_columns_of_another_kind_are_refused() {
    let bench = Bench::new();
    let file = bench.path("odd.parquet");
    crate::table! { struct Numbers { prompt: i64, chosen: i64, rejected: i64 } }
    table::write(&file, [Numbers { prompt: 1, chosen: 2, rejected: 3 }]).unwrap();
    let error = take(&bench, json!({ "files": file })).unwrap_err();
    assert!(error.message.ends_with("odd.parquet, row 1: `chosen` is no text: 2"), "{error}");
    let field = arrow::datatypes::Field::new("chosen", arrow::datatypes::DataType::Binary, false);
    let rejected = field.clone().with_name("rejected");
    let schema = std::sync::Arc::new(arrow::datatypes::Schema::new(vec![field, rejected]));
    let mut writer = parquet::arrow::ArrowWriter::try_new(std::fs::File::create(&file).unwrap(), schema, None).unwrap();
    writer.flush().unwrap();
    writer.close().unwrap();
    let error = take(&bench, json!({ "files": file })).unwrap_err();
    assert!(error.message.ends_with("odd.parquet: column `chosen` holds bytes (binary)"), "{error}");
}

#[test]
fn a_layout_is_recognised_by_the_first_record_or_told_by_the_parameter() {
    let bench = Bench::new();
    let both = {
        let mut both = comparison(1, 1);
        for (name, text) in [("prompt", "POST: p"), ("chosen", "a"), ("rejected", "b")] {
            both[name] = text.into();
        }
        both
    };
    let file = bench.write("c.jsonl", &lines(&[both]));
    assert_eq!(take(&bench, json!({ "files": file })).unwrap()[0].chosen_text, "drums.");
    assert_eq!(take(&bench, json!({ "files": file, "format": "preference" })).unwrap()[0].chosen_text, "a");
    let file = bench.write("q.jsonl", "{\"question\": \"q\", \"answer\": \"a\"}\n");
    let error = take(&bench, json!({ "files": file })).unwrap_err();
    assert!(error.message.contains("q.jsonl, line 1: neither a comparison"), "{error}");
    assert!(error.message.ends_with("found question, answer"), "{error}");
    let error = take(&bench, json!({ "files": file, "format": "csv" })).unwrap_err();
    assert!(error.message.contains("format") && error.message.contains("preference"), "{error}");
}

#[test]
fn hostile_files_are_told_by_line_and_never_end_the_program() {
    let bench = Bench::new();
    let good = comparison(1, 0).to_string();
    let deep = format!("{}1{}", "[".repeat(100_000), "]".repeat(100_000));
    for (line, told) in [
        ("{\"info\": {", "line 2: EOF while parsing"),
        ("\u{0}\u{1}", "line 2: expected value"),
        ("null", "line 2: expected one JSON object a line"),
        (&deep, "line 2: recursion limit exceeded"),
        ("{\"info\": 1, \"summaries\": 2, \"choice\": 3}", "line 2: not a comparison"),
        (&good.replace("\"choice\":0", "\"choice\":7"), "line 2: `choice` is 7, expected 0 or 1"),
        (&good.replace("\"choice\":0", "\"choice\":1e400"), "line 2: number out of range"),
        (&good.replace("\"choice\":0", "\"choice\":99999999999999999999"), "line 2: not a comparison"),
        (&good.replace("\"confidence\":8", "\"confidence\":\"8\""), "line 2: not a comparison"),
        (&good.replace(" drums.", "\\u0000\\u202e "), "line 2: `summaries[1].text` is empty"),
    ] {
        let file = bench.write("c.jsonl", &format!("{good}\n{line}\n"));
        let error = take(&bench, json!({ "files": file })).unwrap_err();
        assert!(error.message.contains(told), "{told}: {error}");
        assert_eq!(error.exit_code(), 2);
        let (made, rows) = out(&bench, json!({ "files": file, "max_bad_rows": 1 }));
        assert_eq!((rows.len(), made.metric("bad_rows")), (1, 1.0), "{told}");
    }
    // Control characters and newlines in texts and ids are removed, so that they reach neither a terminal nor the
    // prompt template.
    let mut odd = comparison(1, 1);
    odd["info"]["title"] = "two\nlines\u{1b}[2J".into();
    odd["info"]["id"] = "t3\n\u{7}1".into();
    let file = bench.write("c.jsonl", &lines(&[odd]));
    let row = take(&bench, json!({ "files": file })).unwrap().remove(0);
    assert!(row.prompt.contains("\nTITLE: two lines[2J\nPOST:"), "{}", row.prompt);
    assert_eq!(row.post_id, "t3 1");
}

#[test]
fn labels_written_for_trl_read_back_as_the_same_labels() {
    let bench = Bench::new();
    let file = bench.write("c.jsonl", &lines(&[comparison(1, 1), comparison(2, 0)]));
    let labelled = run(&Human, json!({ "files": file }), bench.inputs()).unwrap();
    for layout in [Layout::Texts, Layout::Messages] {
        let [first, second] = ["first.jsonl", "second.jsonl"].map(|name| bench.path(name));
        assert_eq!(write_preferences(&labelled.path(), layout, &first).unwrap(), 2);
        let back = run(&Human, json!({ "files": first }), bench.inputs()).unwrap();
        write_preferences(&back.path(), layout, &second).unwrap();
        let [first, second] = [first, second].map(|path| std::fs::read_to_string(path).unwrap());
        assert_eq!(first, second);
        let row: Value = serde_json::from_str(first.lines().next().unwrap()).unwrap();
        match layout {
            Layout::Texts => assert_eq!(row["chosen"], "drums."),
            Layout::Messages => assert_eq!(row["chosen"], json!([{ "role": "assistant", "content": "drums." }])),
        }
    }
}
