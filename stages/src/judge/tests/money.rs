//! Tests of cost control: the prompt cache is warmed before concurrent requests, a limit is never exceeded, and a pilot
//! stops in time.

use std::time::{Duration, Instant};

use super::*;

fn endpoint(api: &Api) -> Endpoint {
    endpoint_at(&api.address, fake_api::KEY).unwrap()
}

fn thirty() -> Bench {
    bench((0..30).map(pair).collect())
}

#[test]
fn the_first_request_goes_alone_so_that_the_others_find_the_prompt_cache() {
    let latency = Duration::from_millis(50);
    let arrivals: Arc<Mutex<Vec<Instant>>> = Arc::default();
    let seen = arrivals.clone();
    let message = move |_: usize, _: &Value| {
        seen.lock().unwrap().push(Instant::now());
        None
    };
    let api = Api::new(Rules { message: Box::new(message), latency, cacheable: 100, ..Rules::default() });
    let store = tempfile::tempdir().unwrap();
    let seen = asked(&thirty(), &endpoint(&api), store.path(), json!({ "model": "claude-opus-5" }));
    assert_eq!(seen.rows().len(), 30);
    let arrivals = arrivals.lock().unwrap();
    assert!(arrivals[1] - arrivals[0] >= latency, "the second did not wait for the first one's answer");
    let metrics = seen.metrics();
    assert!(metrics["cache_written_tokens"] > 0.0);
    assert_eq!(metrics["cache_read_tokens"], 14.0 * metrics["cache_written_tokens"]);
    assert_eq!(seen.warnings, [""; 0]);
}

#[test]
fn a_prompt_cache_that_does_nothing_is_told_after_twenty_requests() {
    let warnings = |model: &str| {
        let api = Api::new(Rules { cacheable: usize::MAX, ..Rules::default() });
        let store = tempfile::tempdir().unwrap();
        let with = json!({ "model": model, "documents_per_request": 1 });
        let seen = asked(&thirty(), &endpoint(&api), store.path(), with);
        seen.warnings.iter().filter(|warning| warning.contains("have read nothing from the prompt cache")).count()
    };
    // The second model caches only prefixes longer than the built-in examples.
    assert_eq!([warnings("claude-opus-5"), warnings("claude-opus-4-6")], [1, 0]);
}

#[test]
fn the_first_twenty_answers_tell_what_the_rest_will_cost() {
    let api = Api::new(Rules::default());
    let store = tempfile::tempdir().unwrap();
    let with = json!({ "model": "claude-haiku-4-5", "documents_per_request": 1 });
    let seen = asked(&thirty(), &endpoint(&api), store.path(), with.clone());
    let told = |seen: &Seen| seen.warnings.iter().filter(|w| w.contains("after 20 requests: ")).count();
    assert_eq!(told(&seen), 1, "{:?}", seen.warnings);
    // The costs are known by now.
    let more = bench((30..70).map(pair).collect());
    assert_eq!(told(&asked(&more, &endpoint(&api), store.path(), with)), 0);
}

#[test]
fn whatever_the_answers_cost_the_limit_is_not_passed_and_what_was_paid_is_kept() {
    // The response uses ten times as many tokens as the judge reports; the limit holds nevertheless.
    let judge = |body: &Value| {
        let mut message = fake_api::judge(body);
        message["content"]
            .as_array_mut()
            .unwrap()
            .insert(0, json!({ "type": "thinking", "thinking": "hm ".repeat(250) }));
        message
    };
    for limit in [0.05, 0.1, 0.2] {
        let api = Api::new(Rules { judge: Box::new(judge), ..Rules::default() });
        let store = tempfile::tempdir().unwrap();
        let with =
            json!({ "model": "claude-opus-4-8", "documents_per_request": 1, "max_cost": limit, "max_tokens": 300 });
        let seen = asked(&thirty(), &endpoint(&api), store.path(), with);
        let error = seen.error();
        assert!(error.message.starts_with("max_cost: $0."), "{error}");
        assert_eq!((error.exit_code(), error.transient), (3, false));
        let spent: f64 = error.message.trim_start_matches("max_cost: $").split(' ').next().unwrap().parse().unwrap();
        assert!(spent <= limit && spent > 0.3 * limit, "{spent} of {limit}");
        let paid = api.paid_messages();
        assert!(paid > 0 && paid < 30, "{paid}");
        let with = json!({ "model": "claude-opus-4-8", "documents_per_request": 1, "max_tokens": 300 });
        assert_eq!(asked(&thirty(), &endpoint(&api), store.path(), with).rows().len(), 30);
        assert_eq!((api.paid_messages(), api.paid_twice()), (30, vec![]));
    }
}

#[test]
fn replies_that_are_lost_may_have_been_paid_and_the_limit_holds_with_them() {
    for fault in [Fault::Lost, Fault::Torn] {
        let message = move |n: usize, _: &Value| n.is_multiple_of(2).then(|| fault.clone());
        let api = Api::new(Rules { message: Box::new(message), cacheable: usize::MAX, ..Rules::default() });
        let store = tempfile::tempdir().unwrap();
        let with =
            json!({ "model": "claude-haiku-4-5", "documents_per_request": 1, "max_cost": 0.03, "max_tokens": 100 });
        let seen = asked(&thirty(), &endpoint(&api), store.path(), with);
        let error = seen.error().to_string();
        assert!(error.contains("of it perhaps, for what no answer came to"), "{error}");
        let (sent, got) = api.paid_tokens();
        let dollars = (sent as f64 + 5.0 * got as f64) / 1e6;
        assert!(dollars > 0.01 && dollars <= 0.03, "{dollars}");
    }
}

#[test]
fn a_limit_without_a_price_and_a_price_that_is_none_are_told_before_anything_is_asked() {
    let faults = |with: Value| (&Claude as &dyn AnyKind).normalise(&with).unwrap_err();
    let told = faults(json!({ "model": "my-model", "max_cost": 1 }));
    assert_eq!(told[0].0, "max_cost");
    assert!(told[0].1.contains("no price of `my-model` is known"), "{told:?}");
    let price = json!({ "input": 1, "output": -2, "cache_write": 1, "cache_read": 1 });
    let prices = json!({ "date": "2027-01-01", "models": { "my-model": price } });
    let told = faults(json!({ "model": "my-model", "max_cost": 1, "prices": prices }));
    assert_eq!(told[0].0, "prices.models.my-model.output");
    let halved = json!({ "date": "2027-01-01", "models": { "my-model": { "input": 1, "output": 2 } } });
    let told = faults(json!({ "model": "my-model", "max_cost": 1, "prices": halved }));
    let fields: Vec<&str> = told.iter().map(|(field, _)| field.as_str()).collect();
    assert_eq!(fields, ["prices.models.my-model.cache_write", "prices.models.my-model.cache_read"]);
    let fields: Vec<String> =
        faults(json!({ "model": "m", "max_requests": 0, "max_cost": 0 })).into_iter().map(|(field, _)| field).collect();
    assert_eq!(fields, ["max_cost", "max_requests", "max_cost"]);
}
