//! Tests against a local API server: counted requests, scripted faults, and no answer paid twice.

use std::path::Path;
use std::sync::{Arc, Mutex};

mod money;
mod openai;
mod outcomes;
mod quality;
mod questions;
mod secrets;
mod sharing;
mod strangers;

use engine::context::{Context, StageEvent};
use engine::kind::AnyKind;
use serde_json::{Value, json};

use super::providers::anthropic::{KEY, endpoint_at};
use super::*;
use crate::kinds::annotate::Claude;
use crate::kinds::annotate::claude::Params;
use crate::testing::Bench;
use fake_api::{Api, Fault, Rules};

/// The API server and its address.
struct Server {
    api: Api,
    endpoint: Endpoint,
}

impl Server {
    fn new(rules: Rules) -> Self {
        let api = Api::new(rules);
        let endpoint = endpoint_at(&api.address, fake_api::KEY).unwrap();
        Self { api, endpoint }
    }

    /// Prefers summaries that start with `good`, except for the scripted faults of the n-th request.
    fn scripted(script: impl Fn(usize, &Value) -> Option<Fault> + Send + Sync + 'static) -> Self {
        Self::new(Rules { message: Box::new(script), ..Rules::default() })
    }

    /// Prefers summaries that start with `good`.
    fn fine() -> Self {
        Self::new(Rules::default())
    }

    fn count(&self) -> usize {
        self.api.messages()
    }

    /// The documents of all requests: (number, first summary).
    fn documents(&self) -> Vec<(usize, String)> {
        self.api.requests().iter().flat_map(|(_, body)| documents(body)).collect()
    }
}

/// The documents of a request: (number, first summary).
fn documents(body: &Value) -> Vec<(usize, String)> {
    let first =
        |text: String| text.split("<doc.summary.1>\n").nth(1).and_then(|rest| rest.lines().next()).unwrap().to_owned();
    fake_api::documents(body).into_iter().map(|(n, text)| (n, first(text))).collect()
}

/// An API error with this message.
fn told(status: u16, message: &str) -> Fault {
    let message = message.to_owned();
    Fault::Error { status, kind: "some_error", message, headers: vec![], details: Value::Null }
}

fn pair(i: usize) -> Pair {
    Pair {
        id: format!("pair {i}"),
        post_id: format!("post {i}"),
        prompt: format!("Subreddit: \nTITLE: \nPOST: post {i}\nTL;DR:"),
        prompt_ids: vec![1],
        facts: None,
        a_model: "s".into(),
        a_text: if i.is_multiple_of(2) { format!("good {i}") } else { format!("bad {i}") },
        a_ids: vec![],
        a_ended: true,
        b_model: "m".into(),
        b_text: if i.is_multiple_of(2) { format!("bad {i}") } else { format!("good {i}") },
        b_ids: vec![],
        b_ended: true,
        corruption: None,
        corrupted: None,
    }
}

fn bench(pairs: Vec<Pair>) -> Bench {
    let mut bench = Bench::new();
    bench.input("pairs", "Pairs", |folder| crate::table::write(&folder.join(Pairs::FILE), pairs).map(drop));
    bench
}

fn attempt(bench: &Bench, server: &Server, store: &Path) -> Result<Vec<Preference>> {
    asked(bench, &server.endpoint, store, json!({})).rows
}

/// The rows and warnings of an attempt.
fn warned(bench: &Bench, endpoint: &Endpoint, store: &Path) -> (Result<Vec<Preference>>, Vec<String>) {
    let seen = asked(bench, endpoint, store, json!({}));
    (seen.rows, seen.warnings)
}

/// The result of an attempt.
struct Seen {
    rows: Result<Vec<Preference>>,
    warnings: Vec<String>,
    out: tempfile::TempDir,
}

impl Seen {
    fn rows(&self) -> &[Preference] {
        self.rows.as_deref().unwrap()
    }

    fn error(&self) -> &Error {
        self.rows.as_ref().unwrap_err()
    }

    fn metrics(&self) -> std::collections::BTreeMap<String, f64> {
        serde_json::from_slice(&std::fs::read(self.out.path().join("metrics.json")).unwrap()).unwrap()
    }
}

/// An attempt with these parameters and, unless they say otherwise, no questions about label quality.
fn asked(bench: &Bench, endpoint: &Endpoint, store: &Path, with: Value) -> Seen {
    attempted(bench, endpoint, store, with, Pay::Once)
}

/// The answers that an attempt may pay for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Pay {
    /// None: its table was paid for and is lost.
    Nothing,
    /// Answers that were never paid for.
    Once,
    /// Everything (`--pay`).
    Again,
}

fn attempted(bench: &Bench, endpoint: &Endpoint, store: &Path, with: Value, pay: Pay) -> Seen {
    let mut all = json!({ "model": "a-model", "max_unlabelled": 0.2, "swap_share": 0, "repeat_share": 0 });
    all.as_object_mut().unwrap().extend(with.as_object().unwrap().clone());
    let params = (&Claude as &dyn AnyKind).normalise(&all).unwrap();
    let params: Params = serde_json::from_value(params).unwrap();
    ran(bench, &params.settings().unwrap(), endpoint, store, pay)
}

fn ran(bench: &Bench, settings: &Settings, endpoint: &Endpoint, store: &Path, pay: Pay) -> Seen {
    let out = tempfile::tempdir().unwrap();
    let warnings: Arc<Mutex<Vec<String>>> = Arc::default();
    let sink = warnings.clone();
    // Checkpoints belong to an attempt, cached answers to the store.
    let checkpoints = tempfile::tempdir().unwrap();
    let mut ctx =
        Context::new(settings.kind(), 7, bench.inputs(), out.path().to_owned(), checkpoints.path().to_owned())
            .with_requests(store.join("requests"))
            .with_pay(pay != Pay::Nothing)
            .with_pay_again(pay == Pay::Again)
            .with_sink(move |tell| {
                if let StageEvent::Warning { message } = tell {
                    sink.lock().unwrap().push(message);
                }
            });
    let rows = run_with(settings, &mut ctx, || Ok(endpoint.clone()))
        .and_then(|()| ctx.write_metrics())
        .and_then(|()| Preferences::open(out.path())?.collect::<Result<Vec<_>>>());
    let warnings = warnings.lock().unwrap().clone();
    Seen { rows, warnings, out }
}

#[test]
fn labels_follow_content_not_place_and_a_second_run_pays_nothing() {
    let server = Server::fine();
    let bench = bench((0..21).map(pair).collect());
    let checkpoints = tempfile::tempdir().unwrap();
    let rows = attempt(&bench, &server, checkpoints.path()).unwrap();
    assert_eq!(rows.len(), 21);
    assert!(rows.iter().all(|row| row.outcome == Outcome::Labelled && row.chosen_text.starts_with("good")));
    assert_eq!(rows[0].annotator, "a-model");
    assert_eq!(server.count(), 11);
    let firsts: Vec<bool> = server.documents().into_iter().map(|(_, first)| first.starts_with("good")).collect();
    assert!(firsts.iter().any(|&good| good) && firsts.iter().any(|&good| !good), "the order is never turned");
    assert_eq!(attempt(&bench, &server, checkpoints.path()).unwrap(), rows);
    assert_eq!(server.count(), 11);
}

#[test]
fn faults_that_pass_are_tried_again_and_others_stop_with_the_apis_message_and_no_key() {
    let busy = Server::scripted(|n, _| match n {
        0 => Some(told(429, "slow down").with("retry-after-ms", 1)),
        1 => Some(told(529, "busy").with("retry-after", 0)),
        _ => None,
    });
    let one = bench(vec![pair(0)]);
    assert_eq!(attempt(&one, &busy, tempfile::tempdir().unwrap().path()).unwrap().len(), 1);
    assert_eq!(busy.count(), 3);

    let message = format!("no such model; key {}", fake_api::KEY);
    let strict = Server::scripted(move |_, _| Some(told(400, &message).with("request-id", "req_9")));
    let error = attempt(&one, &strict, tempfile::tempdir().unwrap().path()).unwrap_err();
    assert_eq!((strict.count(), error.exit_code()), (1, 2));
    assert!(error.message.ends_with("/v1/messages: 400: no such model; key *** (request req_9)"), "{error}");
}

#[test]
fn the_key_follows_no_redirect() {
    let elsewhere = Server::fine();
    let to = format!("{}/v1/messages?token=x", elsewhere.api.address);
    let server = Server::scripted(move |_, _| Some(told(307, "moved").with("location", &to)));
    let error = attempt(&bench(vec![pair(0)]), &server, tempfile::tempdir().unwrap().path()).unwrap_err();
    assert_eq!((server.count(), elsewhere.count(), error.exit_code()), (1, 0, 3));
    assert!(error.message.contains("307: redirects to http://127.0.0.1:"), "{error}");
    assert!(error.message.ends_with("/v1/messages; the key is not sent there"), "{error}");
}

#[test]
fn an_address_or_a_key_that_cannot_be_sent_is_told_at_once_by_its_variable() {
    for base in ["ftp://x", "not a url", "https://", "api.anthropic.com", "file:///x"] {
        let error = endpoint_at(base, "sk-secret").map(drop).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        assert!(error.message.starts_with("ANTHROPIC_BASE_URL: "), "{base}: {error}");
    }
    for key in ["sk-\u{1}secret", "sk-sec\nret", "sk-sec\n", "sk sec", "schlüssel"] {
        let error = endpoint_at("http://localhost:1/", key).map(drop).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        assert!(error.message.starts_with("ANTHROPIC_API_KEY ") && !error.to_string().contains("sec"), "{error}");
    }
}

#[test]
fn every_wait_is_a_warning_and_the_last_failure_says_what_is_kept() {
    let message = format!("slow down, {}", fake_api::KEY);
    let busy = Server::scripted(move |_, _| Some(told(429, &message).with("retry-after-ms", 1)));
    let one = bench(vec![pair(0)]);
    let (rows, warnings) = warned(&one, &busy.endpoint, tempfile::tempdir().unwrap().path());
    let error = rows.unwrap_err();
    assert_eq!((busy.count(), warnings.len(), error.exit_code()), (8, 7, 3));
    assert!(
        warnings[0].ends_with("/v1/messages: 429: slow down, *** (request req_test); try 2 of 8 in 0.0 s"),
        "{warnings:?}"
    );
    assert!(error.transient && error.message.starts_with("gave up after 8 tries: "), "{error}");
    assert_eq!(error.help.as_deref(), Some("the answers so far are kept; run again"));
}

#[test]
fn answers_that_landed_before_a_failure_are_kept() {
    let expired = Arc::new(std::sync::atomic::AtomicBool::new(true));
    let still = expired.clone();
    let server = Server::scripted(move |n, _| {
        (n >= 6 && still.load(std::sync::atomic::Ordering::Relaxed)).then(|| told(401, "expired"))
    });
    let bench = bench((0..40).map(pair).collect());
    let checkpoints = tempfile::tempdir().unwrap();
    let error = attempt(&bench, &server, checkpoints.path()).unwrap_err();
    assert_eq!(error.exit_code(), 3);
    assert_eq!(server.api.paid_messages(), 6);
    expired.store(false, std::sync::atomic::Ordering::Relaxed);
    let rows = attempt(&bench, &server, checkpoints.path()).unwrap();
    assert_eq!((rows.len(), server.api.paid_messages(), server.api.paid_twice()), (40, 20, vec![]));
}

#[test]
fn equal_summaries_are_a_tie_without_a_request_and_a_missing_key_is_told() {
    let server = Server::fine();
    let tie = Pair { b_text: "good 0".into(), ..pair(0) };
    let rows = attempt(&bench(vec![tie, pair(2)]), &server, tempfile::tempdir().unwrap().path()).unwrap();
    assert_eq!((rows[0].outcome, rows[1].outcome, server.count()), (Outcome::Tie, Outcome::Labelled, 1));

    if http::variable(KEY).is_none() {
        let error =
            crate::testing::run(&Claude, json!({ "model": "m" }), bench(vec![pair(0)]).inputs()).map(drop).unwrap_err();
        assert_eq!((error.exit_code(), error.message.as_str()), (3, "no API key: ANTHROPIC_API_KEY is not set"));
    }
}
