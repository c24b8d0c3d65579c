//! Tests of `annotate.openai` against a local server of chat completions, with the quirks of servers that exist.

use super::*;
use crate::judge::providers::openai::OpenAi;
use crate::kinds::annotate::Openai;
use crate::kinds::annotate::openai::Params;

/// The parameters for a server, without questions about label quality.
fn params(api: &Api, with: Value) -> Params {
    let mut all = json!({ "base_url": format!("{}/v1", api.address), "model": "m", "max_unlabelled": 0.2,
                          "swap_share": 0, "repeat_share": 0, "key_variable": "SOME_KEY" });
    all.as_object_mut().unwrap().extend(with.as_object().unwrap().clone());
    serde_json::from_value((&Openai as &dyn AnyKind).normalise(&all).unwrap()).unwrap()
}

fn provider(base_url: &str, key: bool) -> OpenAi {
    OpenAi {
        base_url: base_url.to_owned(),
        key_variable: key.then(|| "SOME_KEY".to_owned()),
        response_format: Default::default(),
        max_tokens_field: Default::default(),
        temperature: None,
        extra_body: Default::default(),
        verdict: Default::default(),
    }
}

fn asked(pairs: usize, api: &Api, store: &Path, with: Value) -> Seen {
    let endpoint = provider(&format!("{}/v1", api.address), true).endpoint_with(Some(fake_api::KEY)).unwrap();
    ran(&bench((0..pairs).map(pair).collect()), &params(api, with).settings().unwrap(), &endpoint, store, Pay::Once)
}

fn server(script: impl Fn(usize, &Value) -> Option<Fault> + Send + Sync + 'static) -> Api {
    Api::new(Rules { message: Box::new(script), ..Rules::default() })
}

/// A server whose every answer has this text; `{N}` is the number of the document.
fn saying(text: &'static str) -> Api {
    let choose = move |body: &Value| {
        let n = fake_api::documents(body)[0].0.to_string();
        json!({ "message": { "content": text.replace("{N}", &n) }, "finish_reason": "stop" })
    };
    Api::new(Rules { choose: Box::new(choose), ..Rules::default() })
}

#[test]
fn labels_follow_content_and_a_second_run_asks_nothing() {
    for with in [
        json!({}),
        json!({ "response_format": "none", "temperature": "none", "documents_per_request": 2 }),
        json!({ "verdict": "logprobs" }),
        json!({ "verdict": "logprobs", "response_format": "none", "swap_share": 0.5 }),
    ] {
        let api = Api::new(Rules::default());
        let store = tempfile::tempdir().unwrap();
        let seen = asked(21, &api, store.path(), with.clone());
        assert!(
            seen.rows().iter().all(|row| row.outcome == Outcome::Labelled && row.chosen_text.starts_with("good")),
            "{with}"
        );
        // 0.75 against 0.2 and 0.01.
        let sure = (with["verdict"] == "logprobs").then_some(0.75 / 0.96);
        let near = |p: Option<f64>| p.zip(sure).map_or(p == sure, |(p, sure)| (p - sure).abs() < 1e-9);
        assert!(seen.rows().iter().all(|row| near(row.confidence)), "{with}");
        assert_eq!(seen.warnings, [""; 0]);
        let messages = api.messages();
        assert_eq!(asked(21, &api, store.path(), with).rows(), seen.rows());
        assert_eq!((api.messages(), api.paid_twice()), (messages, vec![]));
    }
}

#[test]
fn the_request_has_what_was_set_and_nothing_else() {
    let api = Api::new(Rules::default());
    let store = tempfile::tempdir().unwrap();
    let body = |with: Value| {
        asked(1, &api, store.path(), with);
        let (head, body) = api.requests().pop().unwrap();
        assert!(head.contains(&format!("authorization: Bearer {}\r\n", fake_api::KEY)), "{head}");
        body
    };
    let fields = |body: &Value| body.as_object().unwrap().keys().cloned().collect::<Vec<_>>().join(" ");
    let plain = body(json!({}));
    assert_eq!(fields(&plain), "model messages stream max_tokens temperature response_format");
    assert_eq!((&plain["temperature"], &plain["stream"]), (&json!(0.0), &json!(false)));
    assert_eq!(plain["response_format"]["json_schema"]["schema"]["required"], json!(["doc.3.chosen.summary"]));
    let roles: Vec<&str> =
        plain["messages"].as_array().unwrap().iter().map(|message| message["role"].as_str().unwrap()).collect();
    assert_eq!(roles, ["user", "assistant", "user", "assistant", "user"]);
    let other = json!({ "response_format": "none", "temperature": "none", "max_tokens_field": "max_completion_tokens",
                        "max_tokens": 7, "verdict": "logprobs", "extra_body": { "seed": 3 } });
    let other = body(other);
    assert_eq!(fields(&other), "model messages stream max_completion_tokens logprobs top_logprobs seed");
    assert_eq!((&other["max_completion_tokens"], &other["seed"]), (&json!(7), &json!(3)));
}

#[test]
fn an_answer_in_any_words_has_one_number_or_no_label() {
    for (text, outcome) in [
        ("1", Outcome::Labelled),
        (" 2.\n", Outcome::Labelled),
        ("**Summary 2** is better.", Outcome::Labelled),
        ("La meilleure est la 1.", Outcome::Labelled),
        ("第2个更好", Outcome::Labelled),
        ("```json\n{\"doc.{N}.chosen.summary\": 2}\n```", Outcome::Labelled),
        ("For doc.{N} I choose 1", Outcome::Labelled),
        ("<think>1 or 2? doc.{N}.chosen.summary: 1</think>{\"doc.{N}.chosen.summary\": \"2\"}", Outcome::Labelled),
        ("Summary 1 is better than summary 2", Outcome::Unparsable),
        ("{\"doc.{N}.chosen.summary\": 1, \"doc.{N}.chosen.summary\": 2}", Outcome::Unparsable),
        ("{\"doc.{N}.chosen.summary\": 1.5}", Outcome::Unparsable),
        ("{\"doc.{N}.chosen.summary\": 12}", Outcome::Unparsable),
        ("{\"doc.{N}.chosen.summary\": 3}", Outcome::Unparsable),
        ("La première", Outcome::Unparsable),
        ("8 of 10", Outcome::Unparsable),
        ("", Outcome::Unparsable),
    ] {
        let store = tempfile::tempdir().unwrap();
        let with = json!({ "response_format": "none", "max_unlabelled": 1 });
        let seen = asked(2, &saying(text), store.path(), with);
        match outcome {
            Outcome::Labelled => assert!(seen.rows().iter().all(|row| row.outcome == outcome), "{text}"),
            _ => assert!(seen.error().message.contains("2 unparsable"), "{text}: {}", seen.error()),
        }
    }
}

#[test]
fn an_answer_that_ends_otherwise_is_no_label() {
    let end = |choice: Value| move |n: usize, _: &Value| (n == 1).then(|| Fault::Says(choice.clone()));
    let says = |text: &str| json!({ "role": "assistant", "content": text });
    for (choice, outcome, reason) in [
        (json!({ "message": says("1"), "finish_reason": "length" }), Outcome::Truncated, "cut off (length) after "),
        (json!({ "message": says(""), "finish_reason": "content_filter" }), Outcome::Refused, "ended by a content"),
        (json!({ "message": { "content": null, "refusal": "I will not" } }), Outcome::Refused, "I will not"),
        (json!({ "message": { "content": null } }), Outcome::Unparsable, "no text"),
        (json!({ "message": says("neither") }), Outcome::Unparsable, "no choice for it in `neither`"),
    ] {
        let store = tempfile::tempdir().unwrap();
        let seen = asked(10, &server(end(choice.clone())), store.path(), json!({}));
        let rows: Vec<_> = seen.rows().iter().filter(|row| row.outcome != Outcome::Labelled).collect();
        assert_eq!((rows.len(), rows[0].outcome), (1, outcome), "{choice}");
        assert!(rows[0].reason.as_ref().unwrap().starts_with(reason), "{:?}", rows[0].reason);
    }
    // A server without log-probabilities is named as such.
    let store = tempfile::tempdir().unwrap();
    let api = server(end(json!({ "message": says("1"), "finish_reason": "stop" })));
    let seen = asked(10, &api, store.path(), json!({ "verdict": "logprobs" }));
    let row = seen.rows().iter().find(|row| row.outcome == Outcome::Unparsable).unwrap();
    assert!(row.reason.as_ref().unwrap().contains("does the server know `logprobs`?"), "{:?}", row.reason);
}

#[test]
fn what_cannot_pass_stops_at_once_with_the_servers_words_and_what_to_check() {
    let told = |status: u16, code: &'static str| Fault::status(status, code);
    for (fault, code, message, help) in [
        (told(401, "invalid_api_key"), 3, "401: scripted invalid_api_key", "check SOME_KEY"),
        (told(404, "model_not_found"), 2, "404: scripted model_not_found", "check `model` and the other parameters"),
        (told(429, "insufficient_quota"), 3, "429: scripted insufficient_quota", "spend limit"),
        (Fault::Text(404, "<html><h1>Not Found</h1>"), 2, "404: `<html><h1>Not Found</h1>`", "check `model` and"),
        (Fault::Text(404, "{\"detail\":\"Not Found\"}"), 2, "404: Not Found", "annotate.openai"),
        (
            Fault::Text(400, "{\"object\":\"error\",\"message\":\"no template\",\"code\":400}"),
            2,
            "400: no template",
            "",
        ),
        (Fault::Text(200, "{\"object\":\"error\",\"message\":\"no model\",\"code\":404}"), 2, "404: no model", ""),
        (Fault::Text(200, "{\"error\":\"model 'm' not found\"}"), 3, "500: model 'm' not found", ""),
        (Fault::Text(200, "data: {\"choices\":[]}\n\n"), 3, "answered with a stream of events", "turn streaming off"),
    ] {
        let api = server(move |n, _| (n == 0).then(|| fault.clone()).or(Some(Fault::Text(403, "no"))));
        let store = tempfile::tempdir().unwrap();
        let seen = asked(1, &api, store.path(), json!({}));
        let error = seen.error();
        let all = format!("{error} {} {}", error.help.clone().unwrap_or_default(), seen.warnings.concat());
        assert!(all.contains(message) && all.contains(help), "{all}");
        if api.messages() == 1 {
            assert_eq!(error.exit_code(), code, "{error}");
        }
        assert!(api.messages() == 1 || message.starts_with("500"), "{message}");
    }
}

#[test]
fn a_page_of_html_in_the_place_of_an_answer_is_a_failed_try() {
    let api = server(|n, _| (n == 0).then_some(Fault::Text(200, "<!doctype html>")));
    let store = tempfile::tempdir().unwrap();
    let seen = asked(1, &api, store.path(), json!({}));
    assert_eq!((seen.rows().len(), api.messages()), (1, 2));
    assert!(seen.warnings[0].contains("answered 200 with something else than JSON"), "{:?}", seen.warnings);
}

#[test]
fn a_request_that_a_server_cannot_read_stops_the_stage_whatever_the_status() {
    // llama-cpp-python's answer to a JSON schema.
    let refusal = "{\"error\":{\"message\":\"1 validation error:\\n  {'loc': ('body', 'response_format', 'type'), 'msg': \
                   \\\"Input should be 'text' or 'json_object'\\\"}\",\"type\":\"internal_server_error\",\"code\":null}}";
    let api = server(move |_, _| Some(Fault::Text(500, refusal)));
    let store = tempfile::tempdir().unwrap();
    let seen = asked(1, &api, store.path(), json!({}));
    let error = seen.error();
    assert!(error.message.contains("Input should be 'text' or 'json_object'") && error.exit_code() == 2, "{error}");
    assert_eq!(api.messages(), 1, "it is not tried again");
}

#[test]
fn a_document_longer_than_the_models_context_fails_alone_whatever_the_status() {
    let llama = "{\"error\":{\"code\":500,\"message\":\"too much\",\"type\":\"exceed_context_size_error\"}}";
    let fastapi = "{\"object\":\"error\",\"message\":\"This model's maximum context length is 9 tokens\",\"code\":400}";
    for fault in [Fault::status(400, "context_length_exceeded"), Fault::Text(500, llama), Fault::Text(400, fastapi)] {
        let is_long = |body: &Value| body["messages"][4]["content"].as_str().unwrap().contains("post 3\n");
        let api = server(move |_, body| is_long(body).then(|| fault.clone()));
        let store = tempfile::tempdir().unwrap();
        let seen = asked(20, &api, store.path(), json!({}));
        let failed: Vec<_> = seen.rows().iter().filter(|row| row.outcome == Outcome::Failed).collect();
        assert_eq!((failed.len(), failed[0].id.as_str(), api.messages()), (1, "pair 3", 20));
        assert!(failed[0].reason.as_ref().unwrap().contains("/v1/chat/completions: 400: "), "{:?}", failed[0].reason);
    }
}

#[test]
fn the_key_follows_no_redirect_and_is_nowhere_in_what_is_kept() {
    let elsewhere = Api::new(Rules::default());
    let to = format!("{}/v1/chat/completions", elsewhere.address);
    let api = server(move |_, _| Some(told(307, "moved").with("location", &to)));
    let store = tempfile::tempdir().unwrap();
    let seen = asked(1, &api, store.path(), json!({}));
    assert_eq!((elsewhere.requests().len(), seen.error().exit_code()), (0, 3));
    assert!(seen.error().message.contains("307: redirects to http://127.0.0.1:"), "{}", seen.error());
    assert_eq!(seen.error().help.as_deref(), Some("if that is the API, name it in `base_url`"));

    let api = server(|n, _| {
        let says = format!("Bearer {}", fake_api::KEY);
        match n {
            0 => Some(told(503, &says).with("retry-after-ms", 1)),
            1 => Some(Fault::Says(json!({ "message": { "content": says }, (fake_api::KEY): 1 }))),
            _ => None,
        }
    });
    let seen = asked(10, &api, store.path(), json!({}));
    assert!(seen.rows().iter().any(|row| row.outcome == Outcome::Unparsable));
    assert!(!seen.warnings.is_empty() && !seen.warnings.concat().contains(fake_api::KEY), "{:?}", seen.warnings);
    assert_eq!(super::secrets::leaks(store.path()), Vec::<std::path::PathBuf>::new());
    assert_eq!(super::secrets::leaks(seen.out.path()), Vec::<std::path::PathBuf>::new());
}

#[test]
fn without_a_key_none_is_sent_and_a_wish_for_one_says_how() {
    let api = Api::new(Rules::default());
    let endpoint = provider(&format!("{}/v1/", api.address), false).endpoint_with(Some(fake_api::KEY)).unwrap();
    let settings = params(&api, json!({ "key_variable": null })).settings().unwrap();
    let bench = bench(vec![pair(0)]);
    let store = tempfile::tempdir().unwrap();
    assert_eq!(ran(&bench, &settings, &endpoint, store.path(), Pay::Once).rows().len(), 1);
    assert!(!api.requests()[0].0.to_lowercase().contains("authorization"));

    let strict = server(|_, _| Some(told(401, "no key")));
    let endpoint = provider(&format!("{}/v1", strict.address), false).endpoint_with(None).unwrap();
    let store = tempfile::tempdir().unwrap();
    let seen = ran(&bench, &settings, &endpoint, store.path(), Pay::Once);
    assert!(seen.error().help.as_ref().unwrap().contains("`key_variable`"), "{}", seen.error());
}

#[test]
fn another_model_behind_the_same_id_is_told_once() {
    let model = |n: usize| Some(if n < 6 { "m-0101" } else { "m-0202" });
    let api = Api::new(Rules { model: Box::new(model), ..Rules::default() });
    let store = tempfile::tempdir().unwrap();
    let seen = asked(10, &api, store.path(), json!({}));
    let told: Vec<_> = seen.warnings.iter().filter(|warning| warning.contains("reports the model")).collect();
    assert_eq!(told.len(), 1, "{:?}", seen.warnings);
    assert!(told[0].contains("`m-0202`, before `m-0101` ("), "{told:?}");
    let log = std::fs::read_dir(store.path().join("requests/annotate.openai")).unwrap().next().unwrap().unwrap();
    let log = std::fs::read_to_string(log.path().join("answers.jsonl")).unwrap();
    assert_eq!(log.matches("\"model\":\"m-0101\"").count(), 6);
}

#[test]
fn a_limit_holds_with_prices_of_ones_own_also_if_nothing_says_what_was_used() {
    let price = json!({ "date": "2027-01-01", "models": { "m": { "input": 3, "output": 15 } } });
    let with = json!({ "max_cost": 0.05, "max_tokens": 100, "prices": price });
    for usage in [true, false] {
        let api = Api::new(Rules { usage, ..Rules::default() });
        let store = tempfile::tempdir().unwrap();
        let seen = asked(60, &api, store.path(), with.clone());
        assert!(seen.error().message.starts_with("max_cost: $0.0"), "{}", seen.error());
        let (sent, got) = api.paid_tokens();
        let dollars = (3.0 * sent as f64 + 15.0 * got as f64) / 1e6;
        assert!(dollars > 0.002 && dollars <= 0.05, "{dollars}");
    }
}

#[test]
fn whatever_determines_an_answer_changes_its_folder_and_the_rest_does_not() {
    let api = Api::new(Rules::default());
    let fingerprint = |with: Value| params(&api, with).settings().unwrap().fingerprint();
    let plain = fingerprint(json!({}));
    for with in [
        json!({ "model": "other" }),
        json!({ "base_url": "http://localhost:1/v1" }),
        json!({ "documents_per_request": 2 }),
        json!({ "response_format": "none" }),
        json!({ "verdict": "logprobs" }),
        json!({ "max_tokens": 2 }),
        json!({ "temperature": "none" }),
        json!({ "extra_body": { "seed": 1 } }),
    ] {
        assert_ne!(plain, fingerprint(with.clone()), "{with}");
    }
    for with in [
        json!({ "key_variable": null, "max_tokens_field": "max_completion_tokens", "max_requests": 5 }),
        json!({ "base_url": format!("{}/v1/", api.address), "retry": "failed", "swap_share": 1 }),
    ] {
        assert_eq!(plain, fingerprint(with.clone()), "{with}");
    }
}
