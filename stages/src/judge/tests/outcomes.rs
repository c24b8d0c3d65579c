//! Tests of answers without a label: they stay in the table with a reason, and are asked again only on request.

use super::*;

/// Answers all requests, except with `other` for requests whose documents contain `text`.
fn but(text: &'static str, other: impl Fn(&Value) -> Fault + Send + Sync + 'static) -> Server {
    let holds = move |body: &Value| body["messages"][4]["content"].as_str().unwrap().contains(text);
    Server::scripted(move |_, body| holds(body).then(|| other(body)))
}

fn refused(_: &Value) -> Fault {
    let details = json!({ "category": "bio", "explanation": "no" });
    Fault::Says(json!({ "stop_reason": "refusal", "content": [], "stop_details": details }))
}

fn count(rows: &[Preference], outcome: Outcome) -> usize {
    rows.iter().filter(|row| row.outcome == outcome).count()
}

#[test]
fn refusals_stay_in_the_table_without_a_label_and_too_many_fail_the_stage() {
    let bench = bench((0..20).map(pair).collect());
    let store = tempfile::tempdir().unwrap();
    let seen = asked(&bench, &but("post 3\n", refused).endpoint, store.path(), json!({}));
    assert_eq!(count(seen.rows(), Outcome::Refused), 2, "a refusal is of the whole request");
    let row = seen.rows().iter().find(|row| row.outcome == Outcome::Refused).unwrap();
    assert_eq!((row.reason.as_deref(), row.chosen_first), (Some("bio: no"), None));
    assert!(seen.rows().iter().all(|row| row.reason.is_some() == (row.outcome != Outcome::Labelled)));
    assert_eq!(seen.metrics()["refused"], 2.0);

    let store = tempfile::tempdir().unwrap();
    let server = but("post", refused);
    let seen = asked(&bench, &server.endpoint, store.path(), json!({}));
    assert!(seen.error().message.contains("100.0% of 20 pairs have no label (20 refused"), "{}", seen.error());
    assert_eq!(seen.error().exit_code(), 3);
    let help = seen.error().help.clone().unwrap_or_default();
    assert!(help.contains("`retry: [refused]` asks"), "{help}");
    // The answers are cached, so another limit costs nothing.
    let count = server.count();
    let seen = asked(&bench, &server.endpoint, store.path(), json!({ "max_unlabelled": 1 }));
    assert!(seen.error().message.contains("no preference can be learned"), "{}", seen.error());
    assert_eq!(server.count(), count);
}

#[test]
fn a_cut_off_answer_labels_nothing_and_one_that_says_nothing_of_a_document_labels_the_other() {
    let bench = bench((0..10).map(pair).collect());
    let store = tempfile::tempdir().unwrap();
    let cut = but("post 3\n", |body| {
        let mut answer = fake_api::judge(body);
        answer["stop_reason"] = "max_tokens".into();
        Fault::Says(answer)
    });
    let seen = asked(&bench, &cut.endpoint, store.path(), json!({}));
    assert_eq!(count(seen.rows(), Outcome::Truncated), 2);

    let store = tempfile::tempdir().unwrap();
    let half = but("post 3\n", |body| {
        let mut answer = fake_api::judge(body);
        answer["content"][0]["text"] = "{\"doc.4.chosen.summary\": 1}".into();
        Fault::Says(answer)
    });
    let seen = asked(&bench, &half.endpoint, store.path(), json!({}));
    assert_eq!((count(seen.rows(), Outcome::Unparsable), count(seen.rows(), Outcome::Labelled)), (1, 9));
}

#[test]
fn an_error_document_with_status_200_is_no_answer_and_nothing_of_it_is_kept() {
    let bench = bench((0..8).map(pair).collect());
    let store = tempfile::tempdir().unwrap();
    let error = |kind: &str| json!({ "type": "error", "error": { "type": kind, "message": "not now" } });
    let stopped = Server::scripted(move |_, _| Some(Fault::Body(error("authentication_error"))));
    assert_eq!(asked(&bench, &stopped.endpoint, store.path(), json!({})).error().exit_code(), 3);
    let busy = Server::scripted(move |n, _| (n < 2).then(|| Fault::Body(error("overloaded_error"))));
    let seen = asked(&bench, &busy.endpoint, store.path(), json!({}));
    assert_eq!((count(seen.rows(), Outcome::Labelled), busy.count()), (8, 6));
    let logs = std::fs::read_dir(store.path().join("requests/annotate.claude")).unwrap();
    for log in logs.map(|folder| folder.unwrap().path().join("answers.jsonl")) {
        assert!(!std::fs::read_to_string(log).unwrap().contains("not now"));
    }
}

fn too_long(_: &Value) -> Fault {
    told(400, "prompt is too long")
}

#[test]
fn a_document_that_the_api_takes_no_request_for_fails_alone() {
    let bench = bench((0..20).map(pair).collect());
    let store = tempfile::tempdir().unwrap();
    let server = but("post 3\n", too_long);
    let seen = asked(&bench, &server.endpoint, store.path(), json!({}));
    assert_eq!((count(seen.rows(), Outcome::Failed), count(seen.rows(), Outcome::Labelled)), (1, 19));
    assert!(seen.rows()[3].reason.as_ref().unwrap().contains("400: prompt is too long"), "{:?}", seen.rows()[3].reason);
    // Ten requests, then one for each of the two documents alone.
    assert_eq!(server.count(), 12);
    let again = asked(&bench, &server.endpoint, store.path(), json!({}));
    assert_eq!((again.rows(), server.count()), (seen.rows(), 12));
}

#[test]
fn settings_that_the_api_never_takes_stop_the_stage_and_fail_no_document() {
    let bench = bench((0..100).map(pair).collect());
    let store = tempfile::tempdir().unwrap();
    let server = but("post", too_long);
    let seen = asked(&bench, &server.endpoint, store.path(), json!({}));
    assert_eq!(seen.error().exit_code(), 2);
    assert!(seen.error().message.contains("in a row") && seen.error().message.contains("too long"), "{}", seen.error());
    assert!(server.count() < 30, "{}", server.count());
    // Nothing was stored as failed.
    let fine = but("nothing", too_long);
    assert_eq!(count(asked(&bench, &fine.endpoint, store.path(), json!({})).rows(), Outcome::Labelled), 100);
}

#[test]
fn one_asks_again_only_on_request_and_the_last_answer_counts() {
    let bench = bench((0..20).map(pair).collect());
    let store = tempfile::tempdir().unwrap();
    let stubborn = but("post 3\n", refused);
    let path = store.path();
    asked(&bench, &stubborn.endpoint, path, json!({}));
    let paid = stubborn.count();
    asked(&bench, &stubborn.endpoint, path, json!({ "retry": "truncated" }));
    assert_eq!(stubborn.count(), paid, "none was cut off");
    // One more try by default; then that answer is cached too.
    for _ in 0..2 {
        let seen = asked(&bench, &stubborn.endpoint, path, json!({ "retry": ["refused"] }));
        assert_eq!((count(seen.rows(), Outcome::Refused), stubborn.count()), (2, paid + 1));
    }
    let seen = asked(&bench, &stubborn.endpoint, path, json!({ "retry": ["refused"], "retries": 4 }));
    assert_eq!((count(seen.rows(), Outcome::Refused), stubborn.count()), (2, paid + 4));
    let fine = but("nothing", refused);
    let seen = asked(&bench, &fine.endpoint, path, json!({ "retry": ["refused"], "retries": 5 }));
    assert_eq!((count(seen.rows(), Outcome::Labelled), fine.count()), (20, 1));
    // Without `retry`, the first answer still counts.
    let seen = asked(&bench, &fine.endpoint, path, json!({}));
    assert_eq!((count(seen.rows(), Outcome::Refused), fine.count()), (2, 1));
}
