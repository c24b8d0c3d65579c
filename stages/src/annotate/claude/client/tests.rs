//! The client against a server of our own: what is sent again and what is not, pacing.

use serde_json::json;

use super::*;
use crate::testing::api::{Api, Fault, KEY as TEST_KEY, Limits, Rules};

fn client(api: &Api) -> (Client, tokio::sync::mpsc::UnboundedReceiver<String>) {
    let (waits, told) = tokio::sync::mpsc::unbounded_channel();
    (Client::new(Endpoint::new(&api.address, TEST_KEY).unwrap(), waits).unwrap().in_a_hurry(), told)
}

fn run<T>(work: impl Future<Output = T>) -> T {
    http::runtime().unwrap().block_on(work)
}

fn body() -> Value {
    json!({ "model": "m", "max_tokens": 9, "messages": [{ "role": "user", "content": "x" }] })
}

/// A server whose first answers are these faults.
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
        client.post(&body()).await.unwrap();
    });
    assert_eq!(api.messages(), 8);
    let told: Vec<String> = std::iter::from_fn(|| told.try_recv().ok()).collect();
    assert_eq!(told.len(), 7);
    assert!(told[0].contains("/v1/messages: 429: scripted some_error (request req_test); try 2 of 8 in "), "{told:?}");
    assert!(told[5].contains("answered 200 with something else than JSON"), "{told:?}");
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
        let error = run(client(&api).0.post(&body())).map(drop).unwrap_err();
        assert_eq!((api.messages(), error.exit_code()), (1, code), "{fault:?}: {error}");
        assert!(error.message.contains("(request req_test)") && error.help.is_some(), "{error}");
        assert!(!error.transient, "{error}");
    }
}

#[test]
fn a_wait_beyond_reason_is_told_instead_of_waited_for() {
    let api = faulty(vec![Fault::status(429, "rate_limit_error").with("retry-after", 7200)]);
    let error = run(client(&api).0.post(&body())).map(drop).unwrap_err();
    assert!(error.message.starts_with("told to wait 7200 s: "), "{error}");
    assert_eq!(api.messages(), 1);
}

#[test]
fn rate_limits_are_kept_without_ever_being_turned_away() {
    let limits = Limits { requests: 8.0, per_second: 200.0 };
    let api = Api::new(Rules { limits: Some(limits), ..Rules::default() });
    let (client, _told) = client(&api);
    run(async {
        // The first one learns what the limits are.
        client.post(&body()).await.unwrap();
        let mut under_way = tokio::task::JoinSet::new();
        for _ in 0..60 {
            let client = client.clone();
            under_way.spawn(async move { client.post(&body()).await.map(drop) });
        }
        while let Some(done) = under_way.join_next().await {
            done.unwrap().unwrap();
        }
    });
    assert_eq!((api.messages(), api.turned_away()), (61, 0));
}
