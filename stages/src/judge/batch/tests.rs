//! Tests of batches against a local API server: lost responses, killed clients, results in any order, nothing paid
//! twice.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};

use serde_json::json;

use super::*;
use crate::judge::providers::anthropic::endpoint_at;
use fake_api::{Api, Fault, KEY, Line, Rules};

const QUICK: BatchConfig = BatchConfig {
    poll: Duration::from_millis(2),
    give_up: Duration::from_secs(3),
    requests: 100_000,
    bytes: 256_000_000,
};

fn document(i: usize) -> Value {
    let text = format!(
        "<doc.3>\npost {i}\n</doc.3>\n<doc.3.summary.1>\ngood\n</doc.3.summary.1>\n<doc.3.summary.2>\nbad\n</doc.3.summary.2>"
    );
    json!({ "model": "m", "max_tokens": 9, "messages": [{ "role": "user", "content": text }] })
}

fn key(i: usize) -> AnswerKey {
    AnswerKey::of(&[&i.to_le_bytes()])
}

/// The number of the document in a request.
fn number(ticket: &[AnswerKey]) -> usize {
    (0..1000).find(|i| key(*i) == ticket[0]).unwrap()
}

/// The outcomes received by clients of a store.
#[derive(Default)]
struct Heard {
    answers: BTreeMap<usize, usize>,
    others: Vec<String>,
    notes: Vec<String>,
}

/// A store's folder, and the outcomes that its clients have received.
#[derive(Clone)]
struct Store {
    folder: Arc<tempfile::TempDir>,
    heard: Arc<Mutex<Heard>>,
    /// Index of the event at which the client is killed.
    dies_at: Option<usize>,
}

impl Store {
    fn new() -> Self {
        Self { folder: Arc::new(tempfile::tempdir().unwrap()), heard: Arc::default(), dies_at: None }
    }

    fn heard(&self) -> std::sync::MutexGuard<'_, Heard> {
        self.heard.lock().unwrap()
    }

    /// Asks for documents 0..n like a stage: settles open batches, then sends the rest, until nothing is left.
    fn ask(&self, api: &Api, n: usize, config: BatchConfig) -> Result<()> {
        let (waits, _told) = tokio::sync::mpsc::unbounded_channel();
        let client = Client::new(endpoint_at(&api.address, KEY)?, waits)?.in_a_hurry();
        let batches = Batches::open(&client, self.folder.path(), config)?;
        let mut count = 0;
        let mut on_event = |event: BatchEvent<'_>| {
            count += 1;
            if Some(count) == self.dies_at {
                return Err(Error::environment("killed"));
            }
            self.hear(event);
            Ok(())
        };
        http::runtime()?.block_on(async {
            for _ in 0..3 {
                batches.settle_open(&|_| true, &mut on_event).await?;
                let left: BTreeSet<usize> = (0..n).filter(|i| !self.heard().answers.contains_key(i)).collect();
                if left.is_empty() {
                    break;
                }
                let request = |i: &usize| Ok(Request { ticket: vec![key(*i)], body: document(*i) });
                let wanted = |asked| left.iter().any(|i| key(*i) == asked);
                batches.send(&wanted, &mut left.iter().map(request), &mut on_event).await?;
            }
            Ok(())
        })
    }

    fn hear(&self, event: BatchEvent<'_>) {
        let mut heard = self.heard();
        match event {
            BatchEvent::Done { ticket, outcome: RequestOutcome::Answer(answer) } => {
                assert_eq!(answer["stop_reason"], "end_turn");
                *heard.answers.entry(number(ticket)).or_default() += 1;
            }
            BatchEvent::Done { ticket, outcome } => heard.others.push(match outcome {
                RequestOutcome::Refused(error) => format!("{}: {}", number(ticket), error.message),
                RequestOutcome::Unanswered(why) | RequestOutcome::Lost(why) => format!("{}: {why}", number(ticket)),
                _ => format!("{}: canceled", number(ticket)),
            }),
            BatchEvent::Waiting { .. } | BatchEvent::Whole => {}
            BatchEvent::Note(note) => heard.notes.push(note),
        }
    }

    fn files(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.folder.path()).unwrap();
        let names = entries.map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned());
        names.filter(|name| name != "lock").collect()
    }

    #[track_caller]
    fn assert_all_once(&self, api: &Api, n: usize) {
        assert_eq!((self.heard().answers.len(), api.paid_documents()), (n, n));
        assert_eq!(api.paid_twice(), [""; 0]);
        assert!(self.heard().answers.values().all(|times| *times == 1), "an answer was handed on twice");
        assert_eq!(self.files(), [""; 0]);
    }
}

#[test]
fn answers_come_back_to_what_asked_for_them_whatever_their_order() {
    let api = Api::new(Rules { looks: 3, ..Rules::default() });
    let store = Store::new();
    store.ask(&api, 50, QUICK).unwrap();
    store.assert_all_once(&api, 50);
    assert_eq!(api.creates(), 1);
    assert!(store.heard().notes.is_empty(), "{:?}", store.heard().notes);
}

#[test]
fn more_than_fits_becomes_several_batches_by_number_and_by_size() {
    let store = Store::new();
    let api = Api::new(Rules::default());
    store.ask(&api, 25, BatchConfig { requests: 10, ..QUICK }).unwrap();
    store.assert_all_once(&api, 25);
    assert_eq!(api.creates(), 3);
    let store = Store::new();
    let api = Api::new(Rules::default());
    store.ask(&api, 25, BatchConfig { bytes: 2_000, ..QUICK }).unwrap();
    store.assert_all_once(&api, 25);
    assert!(api.creates() > 3, "{}", api.creates());
}

#[test]
fn a_batch_whose_reply_was_lost_is_found_again_among_others_and_never_sent_twice() {
    let lost = |n: usize, _: &Value| (n == 0).then_some(Fault::Lost);
    let api = Api::new(Rules { create: Box::new(lost), looks: 2, ..Rules::default() });
    (0..30).for_each(|_| api.create_foreign_batch(7));
    let store = Store::new();
    store.ask(&api, 7, QUICK).unwrap();
    store.assert_all_once(&api, 7);
    assert_eq!(api.creates(), 1);
    assert!(store.heard().notes[0].contains("looked up, not tried again"), "{:?}", store.heard().notes);
}

#[test]
fn a_batch_that_never_was_is_sent_again_after_the_time_that_one_may_take_to_show() {
    let dropped = |n: usize, _: &Value| (n == 0).then_some(Fault::Dropped);
    let api = Api::new(Rules { create: Box::new(dropped), ..Rules::default() });
    api.create_foreign_batch(4);
    let store = Store::new();
    store.ask(&api, 4, BatchConfig { give_up: Duration::from_millis(50), ..QUICK }).unwrap();
    store.assert_all_once(&api, 4);
    assert_eq!(api.creates(), 2);
    assert_eq!(store.heard().notes[1], "no batch of 4 requests was created: they are sent again");
    assert_eq!(store.heard().others.len(), 4, "who waits for an answer is not told that there is none");
}

#[test]
fn a_client_killed_at_any_point_leaves_what_the_next_one_goes_on_with() {
    for dies_at in 1..=11 {
        let api = Api::new(Rules { looks: 2, ..Rules::default() });
        let mut store = Store { dies_at: Some(dies_at), ..Store::new() };
        assert_eq!(store.ask(&api, 8, QUICK).unwrap_err().message, "killed");
        assert_eq!(store.files().len(), 1, "killed at {dies_at}");
        store.dies_at = None;
        // Results delivered before the kill are delivered again, because they may not have been stored.
        store.heard().answers.clear();
        store.ask(&api, 8, QUICK).unwrap();
        store.assert_all_once(&api, 8);
        assert_eq!(api.creates(), 1, "killed at {dies_at}");
    }
}

#[test]
fn what_was_written_down_and_never_sent_is_sent_by_the_next_client() {
    let api = Api::new(Rules::default());
    let store = Store::new();
    let tickets = vec![vec![key(0)], vec![key(1)]];
    let base = format!("{}/", api.address);
    let hour_ago = SystemTime::now() - Duration::from_secs(3600);
    drop(Intent::create(store.folder.path(), Intent::fresh_nonce(), &base, hour_ago, tickets).unwrap());
    std::fs::write(store.folder.path().join("dead.body"), "half a body").unwrap();
    store.ask(&api, 2, QUICK).unwrap();
    store.assert_all_once(&api, 2);
}

#[test]
fn expired_and_failed_requests_are_asked_again_and_a_refused_one_is_told_apart() {
    let line = |n: usize, _: &Value| match n {
        0 | 3 => Line::Expired,
        1 => Line::Errored("api_error", "internal"),
        2 => Line::Errored("invalid_request_error", "max_tokens: too many"),
        4 => Line::Canceled,
        5 => Line::Missing,
        _ => Line::Succeeded,
    };
    let api = Api::new(Rules { line: Box::new(line), ..Rules::default() });
    let store = Store::new();
    store.ask(&api, 9, QUICK).unwrap();
    store.assert_all_once(&api, 9);
    assert_eq!(api.creates(), 2);
    let mut others = store.heard().others.clone();
    others.sort();
    let expected = [
        "0: batch msgbatch_0000: expired",
        "1: batch msgbatch_0000: api_error: internal",
        "2: batch msgbatch_0000: invalid_request_error: max_tokens: too many",
        "3: batch msgbatch_0000: expired",
        "4: canceled",
        "5: batch msgbatch_0000: no result of a request",
    ];
    assert_eq!(others, expected);
}

#[test]
fn results_that_are_cut_off_are_read_again_and_handed_on_once() {
    let torn = |n: usize, rest: &Value| (rest[1] == "results" && n < 6).then_some(Fault::Torn);
    let api = Api::new(Rules { get: Box::new(torn), ..Rules::default() });
    let store = Store::new();
    store.ask(&api, 6, QUICK).unwrap();
    store.assert_all_once(&api, 6);
}

#[test]
fn two_clients_at_once_pay_once() {
    let api = Api::new(Rules { looks: 20, ..Rules::default() });
    let store = Store::new();
    std::thread::scope(|scope| {
        let clients = [0, 1].map(|_| scope.spawn(|| store.ask(&api, 12, QUICK)));
        clients.into_iter().for_each(|client| client.join().unwrap().unwrap());
    });
    store.assert_all_once(&api, 12);
    assert_eq!(api.creates(), 1);
}

#[test]
fn a_batch_that_the_api_does_not_know_any_more_is_told_with_the_file_that_holds_it() {
    let api = Api::new(Rules::default());
    let store = Store::new();
    let base = format!("{}/", api.address);
    let tickets = vec![vec![key(0)]];
    let nonce = Intent::fresh_nonce();
    let mut intent = Intent::create(store.folder.path(), nonce.clone(), &base, SystemTime::now(), tickets).unwrap();
    intent.became("msgbatch_old").unwrap();
    drop(intent);
    let error = store.ask(&api, 1, QUICK).unwrap_err();
    assert!(error.message.starts_with("a batch that was sent: "), "{error}");
    assert!(error.help.as_ref().is_some_and(|help| help.contains(&format!("{nonce}.jsonl"))), "{error}");
    assert_eq!(api.creates(), 0);
}

#[test]
fn a_result_without_a_message_is_no_answer() {
    let error = |kind: &str| json!({ "type": "error", "error": { "type": kind, "message": "not now" } });
    let line = move |n: usize, _: &Value| match n {
        0 => Line::Says(error("overloaded_error")),
        1 => Line::Says(error("invalid_request_error")),
        2 => Line::Says(json!({ "completion": "{}" })),
        3 => Line::Says(Value::Null),
        _ => Line::Succeeded,
    };
    let api = Api::new(Rules { line: Box::new(line), ..Rules::default() });
    let store = Store::new();
    store.ask(&api, 6, QUICK).unwrap();
    store.assert_all_once(&api, 6);
    let told: Vec<String> =
        store.heard().others.iter().map(|told| told.split_once("msgbatch_0000: ").unwrap().1.to_owned()).collect();
    let other = "a result is something else than a message";
    assert_eq!(told, [other, other, "invalid_request_error: not now", "overloaded_error: not now"]);
}
