//! Tests of the client against a local API server: retries, pacing, and faults in batch calls.

use std::ops::ControlFlow;
use std::time::{Duration, SystemTime};

use serde_json::json;

use super::*;
use crate::judge::providers::anthropic::batches::Created;
use crate::judge::providers::anthropic::endpoint_at;
use fake_api::{Api, Fault, KEY as TEST_KEY, Limits, Rules};

fn client(api: &Api) -> (Client, tokio::sync::mpsc::UnboundedReceiver<String>) {
    let (waits, told) = tokio::sync::mpsc::unbounded_channel();
    (Client::new(endpoint_at(&api.address, TEST_KEY).unwrap(), waits).unwrap().in_a_hurry(), told)
}

fn run<T>(work: impl Future<Output = T>) -> T {
    http::runtime().unwrap().block_on(work)
}

fn body() -> Value {
    json!({ "model": "m", "max_tokens": 9, "messages": [{ "role": "user", "content": "x" }] })
}

/// A server with these faults as its first responses.
fn faulty(faults: Vec<Fault>) -> Api {
    Api::new(Rules { message: Box::new(move |n, _| faults.get(n).cloned()), ..Rules::default() })
}

fn soon(status: u16) -> Fault {
    Fault::status(status, "some_error").with("retry-after-ms", 1)
}

#[test]
fn every_fault_that_passes_is_outlasted() {
    let faults = vec![soon(429), soon(529), soon(500), Fault::Lost, Fault::Torn, Fault::Garbage, Fault::Dropped];
    let api = faulty(faults);
    let (client, mut told) = client(&api);
    run(async {
        client.post(&body(), &|| Ok(())).await.unwrap();
    });
    assert_eq!(api.messages(), 8);
    let told: Vec<String> = std::iter::from_fn(|| told.try_recv().ok()).collect();
    assert_eq!(told.len(), 7);
    assert!(told[0].contains("/v1/messages: 429: scripted some_error (request req_test); try 2 of 8 in "), "{told:?}");
    assert!(told[5].contains("answered 200 with something else than JSON"), "{told:?}");
}

#[test]
fn a_try_that_may_have_been_paid_is_told_apart_and_may_be_the_last() {
    let faults = vec![soon(429), Fault::Lost, soon(500), Fault::Torn, soon(529), Fault::Garbage];
    for (faults, lost) in [(faults, 3), (vec![Fault::Proxy(502), soon(503)], 1), (vec![Fault::Dropped], 1)] {
        let n = faults.len();
        let api = faulty(faults);
        let count = std::sync::atomic::AtomicUsize::new(0);
        let on_lost = || {
            count.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            Ok(())
        };
        run(client(&api).0.post(&body(), &on_lost)).unwrap();
        assert_eq!((api.messages(), count.into_inner()), (n + 1, lost));
    }
    let api = faulty(vec![Fault::Lost]);
    let no_more = || Err(Error::environment("no money"));
    let error = run(client(&api).0.post(&body(), &no_more)).map(drop).unwrap_err();
    assert_eq!((error.message.as_str(), api.messages()), ("no money", 1));
}

#[test]
fn what_cannot_pass_is_told_at_once_with_the_request_and_whose_fault_it_is() {
    let spent = Fault::Error {
        status: 429,
        kind: "rate_limit_error",
        message: "the tier's monthly spend limit is reached".into(),
        headers: vec![],
        details: json!({ "error_code": "enforced_spend_limit_reached" }),
    };
    let own_limit = Fault::Error {
        status: 400,
        kind: "invalid_request_error",
        message: "You have reached your specified API usage limits. You will regain access on 2027-01-01.".into(),
        headers: vec![],
        details: Value::Null,
    };
    let faults = [
        (spent, 3),
        (own_limit, 3),
        (Fault::status(400, "invalid_request_error"), 2),
        (Fault::status(401, "authentication_error"), 3),
        (Fault::status(402, "billing_error"), 3),
        (Fault::status(403, "permission_error"), 3),
        (Fault::status(404, "not_found_error"), 2),
        (Fault::status(413, "request_too_large"), 2),
        (Fault::status(503, "api_error").with("x-should-retry", "false"), 3),
    ];
    for (fault, code) in faults {
        let api = faulty(vec![fault.clone()]);
        let error = run(client(&api).0.post(&body(), &|| Ok(()))).map(drop).unwrap_err();
        assert_eq!((api.messages(), error.exit_code()), (1, code), "{fault:?}: {error}");
        assert!(error.message.contains("(request req_test)") && error.help.is_some(), "{error}");
        assert!(!error.transient, "{error}");
    }
}

/// An error document with status 200, as a gateway sends it.
fn document(kind: &str) -> Fault {
    Fault::Body(json!({ "type": "error", "error": { "type": kind, "message": "said so" }, "request_id": "req_test" }))
}

#[test]
fn a_success_without_a_message_is_a_failed_try() {
    let others = [
        document("overloaded_error"),
        document("api_error"),
        document("rate_limit_error"),
        document("a_new_kind_of_error"),
        Fault::Body(json!({ "error": { "message": "upstream timed out" } })),
        Fault::Body(json!({ "type": "completion", "completion": "{}" })),
        Fault::Body(json!({})),
    ];
    let n = others.len();
    let api = faulty(others.to_vec());
    let (client, mut told) = client(&api);
    let lost = std::sync::atomic::AtomicUsize::new(0);
    let on_lost = || {
        lost.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        Ok(())
    };
    let answer = run(client.post(&body(), &on_lost)).unwrap();
    assert_eq!((answer["type"].as_str(), api.messages()), (Some("message"), n + 1));
    // Error documents are not billed; for the other faults this is unknown.
    assert_eq!(lost.into_inner(), 2);
    let told: Vec<String> = std::iter::from_fn(|| told.try_recv().ok()).collect();
    assert!(
        told[0].starts_with("an error document with status 200: ") && told[0].contains(": 529: said so"),
        "{told:?}"
    );
    assert!(told[4].contains(": 500: upstream timed out"), "{told:?}");
    assert!(told[5].contains("200 with something else than a message: {\"type\":\"completion\""), "{told:?}");
}

#[test]
fn an_error_document_with_status_200_that_cannot_pass_is_told_at_once() {
    for (kind, status, code) in [
        ("invalid_request_error", 400, 2),
        ("authentication_error", 401, 3),
        ("billing_error", 402, 3),
        ("permission_error", 403, 3),
        ("not_found_error", 404, 2),
        ("request_too_large", 413, 2),
    ] {
        let api = faulty(vec![document(kind)]);
        let error = run(client(&api).0.post(&body(), &|| Ok(()))).map(drop).unwrap_err();
        assert_eq!((api.messages(), error.exit_code()), (1, code), "{kind}: {error}");
        assert!(error.message.ends_with(&format!(": {status}: said so (request req_test)")), "{error}");
    }
}

#[test]
fn error_documents_in_the_place_of_a_batch_or_of_its_results_are_failed_tries() {
    let folder = tempfile::tempdir().unwrap();
    let file = batch_body(folder.path(), 2);
    let busy = |n: usize, _: &Value| n.is_multiple_of(2).then(|| document("overloaded_error"));
    let api = Api::new(Rules { get: Box::new(busy), ..Rules::default() });
    let (client, _told) = client(&api);
    run(async {
        let Created::Yes(batch) = client.create_batch(&file).await.unwrap() else { panic!("not created") };
        assert_eq!(client.batches_since(SystemTime::UNIX_EPOCH).await.unwrap().len(), 1);
        assert!(client.batch(&batch.id).await.unwrap().ended);
        let mut lines = 0;
        let mut on_line = |line: Value| {
            assert!(line["custom_id"].is_string(), "{line}");
            lines += 1;
            Ok(ControlFlow::Continue(()))
        };
        client.results(&batch.id, &mut on_line).await.unwrap();
        assert_eq!(lines, 2);
    });
    // A batch may exist, so none is created again.
    let api = Api::new(Rules { create: Box::new(|_, _| Some(document("api_error"))), ..Rules::default() });
    let created = run(self::client(&api).0.create_batch(&file)).unwrap();
    assert!(matches!(&created, Created::Unknown(error) if error.message.contains(": 500: said so")), "{created:?}");
    assert_eq!(api.creates(), 1);
}

#[test]
fn a_wait_beyond_reason_is_told_instead_of_waited_for() {
    let api = faulty(vec![Fault::status(429, "rate_limit_error").with("retry-after", 7200)]);
    let error = run(client(&api).0.post(&body(), &|| Ok(()))).map(drop).unwrap_err();
    assert!(error.message.starts_with("told to wait 7200 s: "), "{error}");
    assert_eq!(api.messages(), 1);
}

#[test]
fn an_answer_that_never_comes_is_given_up_and_asked_for_again() {
    let folder = tempfile::tempdir().unwrap();
    let stalled = |n: usize, _: &Value| (n == 0).then_some(Fault::Stalled);
    let api = Api::new(Rules { message: Box::new(stalled), create: Box::new(stalled), ..Rules::default() });
    let client = client(&api).0.with_timeout(Duration::from_secs(2));
    run(client.post(&body(), &|| Ok(()))).unwrap();
    assert_eq!(api.messages(), 2);
    // A batch is never created twice.
    let created = run(client.create_batch(&batch_body(folder.path(), 1))).unwrap();
    assert!(matches!(created, Created::Unknown(_)), "{created:?}");
    assert_eq!(api.creates(), 1);
}

#[test]
fn rate_limits_are_kept_without_ever_being_turned_away() {
    // 20 requests are refilled each second; the minute starts with 8.
    let limits = Limits { per_minute: 1200.0, left: 8.0 };
    let api = Api::new(Rules { limits: Some(limits), ..Rules::default() });
    let (client, _told) = client(&api);
    run(async {
        // The first request learns the limits.
        client.post(&body(), &|| Ok(())).await.unwrap();
        let mut under_way = tokio::task::JoinSet::new();
        for _ in 0..40 {
            let client = client.clone();
            under_way.spawn(async move { client.post(&body(), &|| Ok(())).await.map(drop) });
        }
        while let Some(done) = under_way.join_next().await {
            done.unwrap().unwrap();
        }
    });
    assert_eq!((api.messages(), api.turned_away()), (41, 0));
}

fn batch_body(folder: &std::path::Path, n: usize) -> std::path::PathBuf {
    let path = folder.join("body");
    let requests: Vec<Value> = (0..n).map(|i| json!({ "custom_id": format!("a-{i}"), "params": body() })).collect();
    std::fs::write(&path, json!({ "requests": requests }).to_string()).unwrap();
    path
}

#[test]
fn a_batch_is_created_once_whatever_the_answer_looks_like() {
    let folder = tempfile::tempdir().unwrap();
    let file = batch_body(folder.path(), 3);
    for fault in [Fault::Lost, Fault::Torn] {
        let api = Api::new(Rules { create: Box::new(move |_, _| Some(fault.clone())), ..Rules::default() });
        let created = run(client(&api).0.create_batch(&file)).unwrap();
        assert!(matches!(created, Created::Unknown(_)), "{created:?}");
        assert_eq!(api.creates(), 1);
    }
    for status in [500, 502, 504] {
        let fault = Fault::status(status, "api_error");
        let api = Api::new(Rules { create: Box::new(move |_, _| Some(fault.clone())), ..Rules::default() });
        assert!(matches!(run(client(&api).0.create_batch(&file)).unwrap(), Created::Unknown(_)), "{status}");
        assert_eq!(api.creates(), 1, "{status}");
    }
    // Rejected before processing: there is no batch, and another try is safe.
    let faults = [soon(429), soon(529)];
    let api = Api::new(Rules { create: Box::new(move |n, _| faults.get(n).cloned()), ..Rules::default() });
    let Created::Yes(batch) = run(client(&api).0.create_batch(&file)).unwrap() else { panic!("not created") };
    assert_eq!((api.creates(), batch.count, batch.processing, batch.ended), (3, 3, 3, false));
}

#[test]
fn batches_are_listed_over_pages_back_to_a_time_and_results_come_line_by_line_after_a_cut() {
    let folder = tempfile::tempdir().unwrap();
    let file = batch_body(folder.path(), 5);
    let torn = |n: usize, rest: &Value| (rest[1] == "results" && n < 9).then_some(Fault::Torn);
    let api = Api::new(Rules { get: Box::new(torn), ..Rules::default() });
    (0..230).for_each(|_| api.create_foreign_batch(2));
    let (client, _told) = client(&api);
    run(async {
        let before = SystemTime::now();
        let Created::Yes(ours) = client.create_batch(&file).await.unwrap() else { panic!("not created") };
        let all = client.batches_since(SystemTime::UNIX_EPOCH).await.unwrap();
        assert_eq!((all.len(), &all[0].id), (231, &ours.id));
        let recent = client.batches_since(before - Duration::from_millis(1)).await.unwrap();
        assert!(recent.iter().any(|batch| batch.id == ours.id) && recent.len() <= all.len());
        assert!(client.batches_since(SystemTime::now() + Duration::from_secs(60)).await.unwrap().is_empty());

        assert!(client.batch(&ours.id).await.unwrap().ended);
        let mut ids = std::collections::BTreeSet::new();
        let mut on_line = |line: Value| {
            ids.insert(line["custom_id"].as_str().unwrap().to_owned());
            Ok(ControlFlow::Continue(()))
        };
        client.results(&ours.id, &mut on_line).await.unwrap();
        assert_eq!(ids.len(), 5);
        let error = client.batch("msgbatch_none").await.unwrap_err();
        assert!(error.message.contains("404: no such batch"), "{error}");
    });
}

#[test]
fn the_server_must_be_told_apart_from_a_place_that_answers_anything() {
    let api = Api::new(Rules { get: Box::new(|_, _| Some(Fault::Says(Value::Null))), ..Rules::default() });
    assert!(run(client(&api).0.batches_since(SystemTime::UNIX_EPOCH)).unwrap().is_empty());
    assert!(run(client(&api).0.clock()).unwrap() <= SystemTime::now() + Duration::from_secs(1));
}
