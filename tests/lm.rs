//! Tests of `temper lm` through the real binary, on the smallest embedded model.

mod space;

use std::io::Write;
use std::path::Path;
use std::process::{Output, Stdio};

use serde_json::{Value, json};
use space::{TestSpace, repository, text};

/// A space with the model `tinytldr-s` in the folder `model`.
fn with_model() -> TestSpace {
    let space = TestSpace::new();
    place_model(&space.path("model"));
    space
}

fn place_model(folder: &Path) {
    std::fs::create_dir_all(folder).expect("a folder in a temporary folder");
    for file in ["tinytldr-s/config.json", "tinytldr-s/model.safetensors", "tinytldr/tokenizer.json"] {
        let from = repository("assets").join(file);
        let to = folder.join(from.file_name().expect("a file's name"));
        std::fs::copy(&from, &to).expect("the assets are part of the repository");
    }
}

fn lm(space: &TestSpace, arguments: &[&str], lines: &[String]) -> Output {
    let mut command = space.command(&[&["lm"], arguments].concat());
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("the binary starts");
    let mut stdin = child.stdin.take().expect("it was piped");
    let input = lines.iter().map(|line| format!("{line}\n")).collect::<String>();
    let writer = std::thread::spawn(move || {
        // A command that stops at a bad line need not read the rest.
        let _ = stdin.write_all(input.as_bytes());
    });
    let out = child.wait_with_output().expect("the binary ends");
    writer.join().expect("writing does not panic");
    out
}

/// The answers of a command that must succeed.
fn answers(space: &TestSpace, arguments: &[&str], questions: &[Value]) -> Vec<Value> {
    let out = lm(space, arguments, &questions.iter().map(Value::to_string).collect::<Vec<_>>());
    assert!(out.status.success(), "{arguments:?}: {}", text(&out.stderr));
    let lines = text(&out.stdout);
    lines.lines().map(|line| serde_json::from_str(line).expect("an answer is JSON")).collect()
}

fn numbers(list: &Value) -> Vec<f64> {
    list.as_array().expect("a list").iter().map(|n| n.as_f64().expect("a number")).collect()
}

#[track_caller]
fn assert_near(a: &[f64], b: &[f64]) {
    let near = a.len() == b.len() && a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-4);
    assert!(near, "{a:?} {b:?}");
}

const TEXT: &str = "My boss asked me to work on Saturday. I said no.";

#[test]
fn a_text_and_its_ids_have_the_same_log_probabilities_whatever_stands_beside_them() {
    let space = with_model();
    let args = ["logprobs", "--model", "model"];
    let alone = answers(&space, &args, &[json!({ "text": TEXT })]).remove(0);
    let ids = alone["ids"].as_array().expect("ids").clone();
    let logprobs = numbers(&json!(alone["logprobs"].as_array().expect("a list")[1..]));
    assert_eq!(alone["logprobs"][0], Value::Null);
    assert_eq!(logprobs.len() + 1, ids.len());
    assert!(logprobs.iter().all(|p| *p < 0.0));

    // A prefix of the text has the same log-probabilities as within the whole text: no position sees later ones.
    let mut questions: Vec<Value> = (0..ids.len()).map(|n| json!({ "ids": ids[..n], "id": n })).collect();
    questions.insert(3, json!({ "text": TEXT, "other": "left alone" }));
    for more in [&[][..], &["--batch", "3"], &["--threads", "1"]] {
        let mut many = answers(&space, &[&args[..], more].concat(), &questions);
        assert_eq!(many.len(), questions.len());
        let whole = many.remove(3);
        assert_eq!(whole["ids"], alone["ids"]);
        assert!(whole.get("id").is_none());
        assert_near(&numbers(&json!(whole["logprobs"].as_array().expect("a list")[1..])), &logprobs);
        assert_eq!(many[0], json!({ "id": 0, "ids": [], "logprobs": [] }));
        assert_eq!(many[1], json!({ "id": 1, "ids": ids[..1], "logprobs": [null] }));
        for (n, answer) in many.iter().enumerate().skip(2) {
            assert_eq!((&answer["id"], &answer["ids"]), (&json!(n), &json!(ids[..n])));
            assert_near(&numbers(&json!(answer["logprobs"].as_array().expect("a list")[1..])), &logprobs[..n - 1]);
        }
    }
}

#[test]
fn log_probabilities_of_a_text_need_no_eos_that_the_tokenizer_knows() {
    let space = with_model();
    let question = [json!({ "text": TEXT })];
    let args = ["logprobs", "--model", "model"];
    let before = answers(&space, &args, &question);
    let config = space.path("model/config.json");
    let mut value: Value = serde_json::from_slice(&std::fs::read(&config).expect("a config")).expect("JSON");
    value["eos_token_id"] = json!(2);
    std::fs::write(&config, value.to_string()).expect("written");
    assert_eq!(answers(&space, &args, &question), before);
    let out = lm(&space, &["generate", "--model", "model"], &[json!({ "prompt": TEXT }).to_string()]);
    assert_eq!(out.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&out.stderr).contains("2 as EOS, which is not a special token"));
}

#[test]
fn a_text_begins_with_what_its_tokenizer_puts_there() {
    let space = with_model();
    let args = ["logprobs", "--model", "model"];
    let ids = |space: &TestSpace| answers(space, &args, &[json!({ "text": TEXT })])[0]["ids"].clone();
    let plain = ids(&space);
    let file = space.path("model/tokenizer.json");
    let mut tokenizer: Value = serde_json::from_slice(&std::fs::read(&file).expect("a tokenizer")).expect("JSON");
    tokenizer["post_processor"] = json!({
        "type": "TemplateProcessing",
        "single": [
            { "SpecialToken": { "id": "<|endoftext|>", "type_id": 0 } }, { "Sequence": { "id": "A", "type_id": 0 } },
        ],
        "pair": [],
        "special_tokens": { "<|endoftext|>": { "id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"] } },
    });
    std::fs::write(&file, tokenizer.to_string()).expect("written");
    assert_eq!(ids(&space).as_array().expect("ids")[..1], [json!(0)]);
    assert_eq!(json!(ids(&space).as_array().expect("ids")[1..]), plain);
    // Even an empty prompt has a token to continue from.
    let args = ["generate", "--model", "model", "--max-new-tokens", "3", "--min-new-tokens", "3"];
    let answer = answers(&space, &args, &[json!({ "prompt": "" })]).remove(0);
    assert_eq!(answer["ids"].as_array().expect("ids").len(), 3);
}

#[test]
fn greedily_generated_tokens_have_the_greatest_log_probabilities() {
    let space = with_model();
    let args = ["generate", "--model", "model", "--greedy", "--max-new-tokens", "8", "--min-new-tokens", "8"];
    let answer = answers(&space, &args, &[json!({ "prompt": TEXT, "id": "x" })]).remove(0);
    assert_eq!((&answer["id"], &answer["prompt"]), (&json!("x"), &json!(TEXT)));
    let response = answer["ids"].as_array().expect("ids").clone();
    assert_eq!(response.len(), 8);
    assert!(!answer["response"].as_str().expect("a text").is_empty());

    let args = ["logprobs", "--model", "model"];
    let prompt = answers(&space, &args, &[json!({ "text": TEXT })])[0]["ids"].as_array().expect("ids").clone();
    let score_last = |last: &Value| {
        let ids = [&prompt[..], &response[..3], std::slice::from_ref(last)].concat();
        let answer = answers(&space, &args, &[json!({ "ids": ids })]).remove(0);
        answer["logprobs"].as_array().and_then(|p| p.last()?.as_f64()).expect("the last one's figure")
    };
    let chosen = score_last(&response[3]);
    assert!((300..310).all(|other| score_last(&json!(other)) <= chosen + 1e-4));
}

#[test]
fn a_sample_depends_on_seed_and_line_and_not_on_the_batch_or_the_threads() {
    let space = with_model();
    let questions = vec![json!({ "prompt": TEXT }); 5];
    let sample = |more: &[&str]| {
        let args = ["generate", "--model", "model", "--max-new-tokens", "12", "--top-p", "0.9", "--temperature", "0.8"];
        let answers = answers(&space, &[&args[..], more].concat(), &questions);
        answers.iter().map(|answer| answer["ids"].clone()).collect::<Vec<_>>()
    };
    let first = sample(&[]);
    assert_ne!(first[0], first[1], "equal prompts on two lines are drawn apart");
    assert_eq!(first, sample(&["--threads", "1"]));
    assert_eq!(first, sample(&["--batch", "2"]));
    assert_ne!(first, sample(&["--seed", "1"]));
}

/// A safetensors file with a head's `weight` `[1, d]`, all `w`, and `bias` `[1]`.
fn head(file: &Path, d: usize, w: f32, bias: f32) {
    let header = format!(
        r#"{{"bias":{{"dtype":"F32","shape":[1],"data_offsets":[0,4]}},"weight":{{"dtype":"F32","shape":[1,{d}],"data_offsets":[4,{}]}}}}"#,
        4 + 4 * d
    );
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.extend(bias.to_le_bytes());
    bytes.extend(w.to_le_bytes().repeat(d));
    std::fs::write(file, bytes).expect("the temporary folder can be written to");
}

fn reward_info(folder: &Path, centre: f64) {
    let info = json!({ "pool": "last", "centre": centre, "base_digest": "0".repeat(64), "member_seed": 1 });
    std::fs::write(folder.join("reward.json"), info.to_string()).expect("the temporary folder can be written to");
}

#[test]
fn a_reward_model_gives_its_score_and_an_ensemble_its_members_mean_and_variance() {
    let space = TestSpace::new();
    let config = std::fs::read_to_string(repository("assets/tinytldr-s/config.json")).expect("the config");
    let config: Value = serde_json::from_str(&config).expect("JSON");
    let d = config["n_embd"].as_u64().expect("a width") as usize;

    let alone = space.path("reward");
    place_model(&alone.join("base"));
    head(&alone.join("head.safetensors"), d, 0.5, 2.0);
    reward_info(&alone, 0.25);
    let question = |response: &str| json!({ "prompt": TEXT, "response": response, "id": response });
    let questions = ["No work on Saturday.", "  No work on Saturday. ", "Boss.", "Yes"].map(question);
    let args = ["score", "--model", "reward"];
    let scores = answers(&space, &args, &questions);
    assert_eq!(scores[0]["score"], scores[1]["score"], "white space around a response is none of it");
    assert_ne!(scores[0]["score"], scores[2]["score"]);
    assert_eq!(scores[3]["id"], "Yes");
    let cut = answers(&space, &args, &[json!({ "prompt": TEXT, "response": "Boss.", "ended": false })]).remove(0);
    assert_ne!(cut["score"], scores[2]["score"], "a response that did not end has no token for its end");

    let ensemble = space.path("ensemble");
    place_model(&ensemble.join("base"));
    for (label, bias) in [("a", 1.0), ("b", 4.0)] {
        let own = ensemble.join("members").join(label);
        std::fs::create_dir_all(&own).expect("a folder in a temporary folder");
        head(&own.join("head.safetensors"), d, 0.0, bias);
        reward_info(&own, 0.5);
    }
    let info = json!({ "members": ["a", "b"], "base_digest": "0".repeat(64) });
    space.write("ensemble/ensemble.json", &info.to_string());
    let answer = answers(&space, &["score", "--model", "ensemble"], &questions[3..]).remove(0);
    assert_eq!(answer, json!({ "id": "Yes", "scores": [0.5, 3.5], "mean": 2.0, "variance": 2.25 }));
}

#[test]
fn a_bad_line_is_reported_by_its_number_after_those_before_it_were_answered() {
    let space = with_model();
    let good = |task: &str| match task {
        "logprobs" => json!({ "ids": [1, 2] }),
        _ => json!({ "prompt": TEXT }),
    };
    for (task, bad, what) in [
        ("logprobs", "{", "line 2: EOF while parsing"),
        ("logprobs", "{}", "line 2: expected either `text` or `ids`"),
        ("logprobs", r#"{"text":"a","ids":[1]}"#, "line 2: expected either `text` or `ids`"),
        ("logprobs", r#"{"ids":[1,-1]}"#, "line 2: invalid value: integer `-1`"),
        ("logprobs", r#"{"ids":[70000]}"#, "line 2: id 70000 is outside the model's vocabulary of "),
        ("generate", r#"{"text":"a"}"#, "line 2: missing field `prompt`"),
        ("generate", r#"{"prompt":""}"#, "line 2: the prompt is empty"),
    ] {
        let out =
            lm(&space, &[task, "--model", "model"], &[good(task).to_string(), bad.into(), good(task).to_string()]);
        let stderr = text(&out.stderr);
        assert_eq!(out.status.code(), Some(2), "{stderr}");
        assert!(stderr.contains(what), "{stderr}");
        assert_eq!(text(&out.stdout).lines().count(), 1, "{task}: {bad}");
    }
    let long = json!({ "prompt": "word ".repeat(2000) }).to_string();
    let out = lm(&space, &["generate", "--model", "model"], &[long]);
    assert_eq!(out.status.code(), Some(2));
    assert!(text(&out.stderr).contains("line 1: ") && text(&out.stderr).contains("48 new ones do not fit"));
}

#[test]
fn a_folder_without_a_model_is_reported() {
    let space = with_model();
    for (arguments, what) in [
        (&["logprobs", "--model", "none"][..], "none: no such file or folder"),
        (&["score", "--model", "model"], "model: expected reward.json or ensemble.json"),
        (&["generate", "--model", "model", "--temperature", "0"], "--greedy"),
        (&["generate", "--model", "model", "--min-new-tokens", "49"], "--min-new-tokens 49 is above"),
    ] {
        let out = lm(&space, arguments, &[]);
        assert_eq!(out.status.code(), Some(2), "{arguments:?}");
        assert!(text(&out.stderr).contains(what), "{}", text(&out.stderr));
    }
    // Questions with ids need no tokenizer; a text does.
    std::fs::remove_file(space.path("model/tokenizer.json")).expect("it was there");
    assert_eq!(answers(&space, &["logprobs", "--model", "model"], &[json!({ "ids": [1, 2] })]).len(), 1);
    let out = lm(&space, &["logprobs", "--model", "model"], &[json!({ "text": TEXT }).to_string()]);
    assert!(text(&out.stderr).contains("line 1: a text needs model/tokenizer.json"), "{}", text(&out.stderr));
}

#[test]
fn a_byte_order_mark_in_a_models_files_or_on_standard_input_changes_nothing() {
    let space = with_model();
    let question = "{\"text\":\"one two\"}".to_owned();
    let arguments = ["logprobs", "--model", "model"];
    let plain = lm(&space, &arguments, std::slice::from_ref(&question));
    assert!(plain.status.success(), "{}", text(&plain.stderr));
    for file in ["model/config.json", "model/tokenizer.json"] {
        let content = std::fs::read_to_string(space.path(file)).expect("it was placed there");
        space.write(file, &format!("\u{feff}{content}"));
    }
    let marked = lm(&space, &arguments, &[format!("\u{feff}{question}")]);
    assert_eq!((text(&marked.stdout), text(&marked.stderr)), (text(&plain.stdout), String::new()));
}

#[test]
fn a_text_that_takes_too_much_memory_is_refused_by_its_line() {
    let space = with_model();
    let line = |bytes: usize| json!({ "text": "word ".repeat(bytes / 5) }).to_string();
    for (bytes, what) in
        [(60 << 20, "line 2: longer than 2 MiB"), (1 << 20, "tokens do not fit into the model's window")]
    {
        let out = lm(&space, &["logprobs", "--model", "model"], &[line(20), line(bytes)]);
        let stderr = text(&out.stderr);
        assert_eq!((out.status.code(), text(&out.stdout).lines().count()), (Some(2), 1), "{stderr}");
        assert!(stderr.contains(what), "{stderr}");
    }
}
