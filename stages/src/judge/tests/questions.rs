//! Tests of several questions about each pair, and of a rubric, for both APIs.

use super::*;
use crate::kinds::annotate::Openai;
use crate::kinds::annotate::openai;

const NAMES: [&str; 3] = ["good", "first", "short"];

fn questions(weights: [f64; 3]) -> Value {
    let question =
        |(name, weight): (&str, f64)| json!({ "name": name, "text": format!("Which is {name}?"), "weight": weight });
    NAMES.into_iter().zip(weights).map(question).collect()
}

/// The answers of a judge: `good` prefers what begins so, `first` the first place, `short` the second.
fn answers(body: &Value) -> Vec<(String, u8)> {
    let documents = documents(body).into_iter();
    documents
        .flat_map(|(n, first)| {
            let places = [if first.starts_with("good") { 1 } else { 2 }, 1, 2];
            NAMES.into_iter().zip(places).map(move |(name, place)| (format!("doc.{n}.{name}"), place))
        })
        .collect()
}

fn map(answers: Vec<(String, u8)>) -> String {
    Value::Object(answers.into_iter().map(|(field, place)| (field, json!(place))).collect()).to_string()
}

fn message(text: &str) -> Value {
    json!({ "stop_reason": "end_turn", "content": [{ "type": "text", "text": text }] })
}

/// The aspects of each row: whether the answer is for the chosen summary.
fn aspects(seen: &Seen) -> Vec<(Preference, Vec<Option<bool>>)> {
    let rows = Preferences::with_aspects(seen.out.path()).unwrap().expect("several questions");
    let of = |aspects: Vec<crate::types::Aspect>| {
        assert!(aspects.iter().map(|aspect| aspect.question.as_str()).eq(NAMES));
        aspects.into_iter().map(|aspect| aspect.for_chosen).collect()
    };
    rows.map(|row| row.map(|(row, aspects)| (row, of(aspects)))).collect::<Result<_>>().unwrap()
}

#[test]
fn one_request_answers_all_questions_and_new_weights_ask_nothing() {
    let judge = |body: &Value| message(&map(answers(body)));
    let server = Server::new(Rules { judge: Box::new(judge), ..Rules::default() });
    let bench = bench((0..12).map(pair).collect());
    let store = tempfile::tempdir().unwrap();
    let ask = |weights| {
        let with = json!({ "questions": questions(weights), "rubric": "Facts first.", "max_unlabelled": 1 });
        asked(&bench, &server.endpoint, store.path(), with)
    };
    let seen = ask([3.0, 1.0, 1.0]);
    for (row, for_chosen) in aspects(&seen) {
        assert!(row.outcome == Outcome::Labelled && row.chosen_text.starts_with("good"), "{row:?}");
        let place = row.chosen_first.unwrap();
        assert_eq!(for_chosen, [Some(true), Some(place), Some(!place)]);
    }
    let (_, body) = server.api.requests().pop().unwrap();
    let head = body["messages"][0]["content"].as_str().unwrap();
    assert!(head.contains("<rubric>\nFacts first.\n</rubric>") && head.contains("- short: Which is short?"), "{head}");
    let messages = server.count();
    // Other weights are another reading of the same answers: here the first place wins, or nothing does.
    let first = ask([1.0, 3.0, 1.0]);
    assert!(first.rows().iter().all(|row| row.chosen_first == Some(true)));
    let tied = ask([1.0, 1.0, 2.0]);
    assert!(tied.rows().iter().any(|row| row.outcome == Outcome::Tie));
    assert_eq!((server.count(), server.api.paid_twice()), (messages, vec![]));
    // Another question is another request; a question fewer writes no second table.
    let plain = asked(&bench, &server.endpoint, store.path(), json!({ "max_unlabelled": 1 }));
    assert!(server.count() > messages && !plain.out.path().join(Preferences::ASPECTS).exists());
}

#[test]
fn an_answer_that_is_missing_leaves_no_label_and_says_which_are_there() {
    let judge = |body: &Value| {
        let mut answers = answers(body);
        answers.retain(|(field, _)| !field.ends_with(".short") || field.starts_with("doc.3"));
        message(&map(answers))
    };
    let server = Server::new(Rules { judge: Box::new(judge), ..Rules::default() });
    let store = tempfile::tempdir().unwrap();
    let with = json!({ "questions": questions([1.0; 3]), "max_unlabelled": 1 });
    let seen = asked(&bench((0..8).map(pair).collect()), &server.endpoint, store.path(), with);
    let rows = aspects(&seen);
    let lost: Vec<_> = rows.iter().filter(|(row, _)| row.outcome == Outcome::Unparsable).collect();
    assert_eq!((rows.len(), lost.len()), (8, 4));
    assert!(lost.iter().all(|(row, aspects)| row.reason.is_some() && aspects[2].is_none()), "{lost:?}");
}

/// Rows of an endpoint that tells probabilities: surely of what is good, and hardly of the rest. `tells` says which fields of
/// the answer to a request it has.
fn told_probabilities(tells: fn(&Value, &str) -> bool, with: &Value) -> Seen {
    let choose = move |body: &Value| {
        let token = |token: &str, p: f64| json!({ "token": token, "logprob": p.ln() });
        let mut tokens = Vec::new();
        for (field, place) in answers(body).into_iter().filter(|(field, _)| tells(body, field)) {
            let (this, other) = if place == 1 { ("1", "2") } else { ("2", "1") };
            let p = if field.ends_with("good") { 0.9 } else { 0.6 };
            let mut chosen = token(this, p);
            chosen["top_logprobs"] = json!([token(this, p), token(other, 1.0 - p)]);
            tokens.extend([token(&format!("{{\"{field}"), 1.0), token("\":", 1.0), chosen, token(",", 1.0)]);
        }
        json!({ "message": { "content": map(answers(body)) }, "finish_reason": "stop", "logprobs": { "content": tokens } })
    };
    let api = Api::new(Rules { choose: Box::new(choose), ..Rules::default() });
    let mut all = json!({ "base_url": format!("{}/v1", api.address), "model": "m", "verdict": "logprobs",
                      "questions": questions([2.0, 1.0, 1.0]), "swap_share": 0, "repeat_share": 0 });
    all.as_object_mut().unwrap().extend(with.as_object().unwrap().clone());
    let with = all;
    let params: openai::Params = serde_json::from_value((&Openai as &dyn AnyKind).normalise(&with).unwrap()).unwrap();
    let settings = params.settings().unwrap();
    let endpoint = settings.provider.endpoint().unwrap();
    let store = tempfile::tempdir().unwrap();
    ran(&bench((0..10).map(pair).collect()), &settings, &endpoint, store.path(), Pay::Once)
}

#[test]
fn an_answer_without_one_of_the_probabilities_gives_no_label() {
    let tells = |body: &Value, field: &str| field.ends_with("good") || !body.to_string().contains("good 3");
    let seen = told_probabilities(tells, &json!({ "max_unlabelled": 1 }));
    let lost = |row: &Preference| row.outcome == Outcome::Unparsable && row.confidence.is_none();
    assert_eq!(seen.rows().iter().filter(|row| lost(row)).count(), 1, "{:?}", seen.rows());
}

#[test]
fn probabilities_of_several_questions_are_weighed_into_one() {
    let seen = told_probabilities(|_, _| true, &json!({}));
    for row in seen.rows() {
        assert!(row.chosen_text.starts_with("good"));
        // One of the other two answers is for it and one against it.
        let p = 0.5 * 0.9 + 0.25 * 0.6 + 0.25 * 0.4;
        assert!(row.confidence.is_some_and(|confidence| (confidence - p).abs() < 1e-9), "{row:?}");
    }
    assert_eq!(aspects(&seen).len(), 10);
}

#[test]
fn probabilities_that_outweigh_each_other_are_a_tie_of_one_half() {
    // What is good and shown first has 0.9 + 0.6 + 5 * 0.4 of 7.
    let seen = told_probabilities(|_, _| true, &json!({ "questions": questions([1.0, 1.0, 5.0]) }));
    let rows = seen.rows();
    let (tied, labelled): (Vec<_>, Vec<_>) = rows.iter().partition(|row| row.outcome == Outcome::Tie);
    assert!(!tied.is_empty() && !labelled.is_empty());
    assert!(tied.iter().all(|row| row.confidence.is_some_and(|p| (p - 0.5).abs() < 1e-9)), "{tied:?}");
}
