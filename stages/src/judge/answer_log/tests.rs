//! Tests of the log of answers: reopening, sharing, cut-off and damaged lines.

use serde_json::{Value, json};

use super::*;
use crate::judge::providers::anthropic::tests::settings;

fn key(name: &str) -> AnswerKey {
    AnswerKey::of(&[name.as_bytes()])
}

fn answer(first: u8) -> Value {
    let text = format!("{{\"doc.3.chosen.summary\": {first}}}");
    json!({ "type": "message", "stop_reason": "end_turn", "content": [{ "type": "text", "text": text }],
            "usage": { "input_tokens": 7, "output_tokens": 3 } })
}

fn keys(names: &[&str]) -> Vec<AnswerKey> {
    names.iter().map(|name| key(name)).collect()
}

#[test]
fn a_request_that_says_nothing_of_one_document_keeps_the_other() {
    let folder = tempfile::tempdir().unwrap();
    let settings = settings(json!({}));
    let mut log = AnswerLog::open(folder.path(), &settings).unwrap();
    assert_eq!(log.answered(), 0);
    log.keep(vec![Line::answer(keys(&["a", "b"]), answer(2))]).unwrap();
    log.keep(vec![Line::failed(keys(&["c"]), "too long".into())]).unwrap();
    for log in [log, AnswerLog::open(folder.path(), &settings).unwrap()] {
        let replies = ["a", "b", "c"].map(|name| log.get(key(name)).unwrap());
        assert_eq!(replies.map(|kept| kept.reply), [Reply::Label(2), Reply::Unparsable, Reply::Failed]);
        assert_eq!(replies.map(|kept| kept.slot), [0, 1, 0]);
        let mut usages = Vec::new();
        log.usages(|request, usage| usages.push((request, usage))).unwrap();
        assert_eq!(usages, [(replies[1].request, Usage { input: 7, output: 3, ..Usage::default() })]);
        assert_eq!(replies[0].request, replies[1].request);
        assert_eq!(log.reason(replies[0]).unwrap(), None);
        assert_eq!(log.reason(replies[1]).unwrap().unwrap(), "no choice for it in `{\"doc.3.chosen.summary\": 2}`");
        assert_eq!(log.reason(replies[2]).unwrap().unwrap(), "too long");
        assert!(log.answered() == 1 && log.get(key("d")).is_none());
    }
}

#[test]
fn an_old_log_heals_by_being_read_again() {
    let folder = tempfile::tempdir().unwrap();
    let settings = settings(json!({}));
    let mut log = AnswerLog::open(folder.path(), &settings).unwrap();
    // Entries as an older temper stored them: an error document, and a label before an empty block.
    let error = json!({ "type": "error", "error": { "type": "overloaded_error", "message": "Overloaded" }, "usage": { "input_tokens": 7 } });
    let mut trailing = answer(1);
    trailing["content"].as_array_mut().unwrap().push(json!({ "type": "text", "text": "" }));
    log.keep(vec![Line::answer(keys(&["a", "b"]), error)]).unwrap();
    log.keep(vec![Line::answer(keys(&["c"]), trailing)]).unwrap();
    assert!(log.get(key("a")).is_none() && log.get(key("b")).is_none());
    assert_eq!(log.get(key("c")).unwrap().reply, Reply::Label(1));
    assert_eq!((log.answered(), log.torn(), log.damaged()), (1, 0, &[][..]));
    let mut usages = 0;
    log.usages(|_, _| usages += 1).unwrap();
    assert_eq!(usages, 1);
    // The answer received later counts.
    log.keep(vec![Line::answer(keys(&["a"]), answer(2))]).unwrap();
    let again = AnswerLog::open(folder.path(), &settings).unwrap();
    assert_eq!(again.get(key("a")).unwrap().reply, Reply::Label(2));
}

#[test]
fn other_settings_have_other_answers() {
    let folder = tempfile::tempdir().unwrap();
    AnswerLog::open(folder.path(), &settings(json!({})))
        .unwrap()
        .keep(vec![Line::answer(keys(&["a"]), answer(1))])
        .unwrap();
    let other = AnswerLog::open(folder.path(), &settings(json!({ "effort": "low" }))).unwrap();
    assert!(other.get(key("a")).is_none());
}

#[test]
fn a_line_cut_off_by_a_crash_loses_only_itself() {
    let folder = tempfile::tempdir().unwrap();
    let settings = settings(json!({}));
    let mut log = AnswerLog::open(folder.path(), &settings).unwrap();
    log.keep(vec![Line::answer(keys(&["a"]), answer(1))]).unwrap();
    let path = log.folder().join("answers.jsonl");
    let mut text = std::fs::read(&path).unwrap();
    text.extend(&text.clone()[..text.len() / 2]);
    std::fs::write(&path, &text).unwrap();
    assert_eq!(verify(folder.path()).unwrap(), Verified { answers: 1, damaged: vec![] });

    let mut after = AnswerLog::open(folder.path(), &settings).unwrap();
    after.keep(vec![Line::answer(keys(&["b"]), answer(2))]).unwrap();
    for log in [after, AnswerLog::open(folder.path(), &settings).unwrap()] {
        let replies = ["a", "b"].map(|name| log.get(key(name)).unwrap().reply);
        assert_eq!((replies, log.torn(), log.damaged()), ([Reply::Label(1), Reply::Label(2)], 1, &[][..]));
    }
}

#[test]
fn two_that_write_at_once_lose_nothing_and_the_first_answer_counts() {
    let folder = tempfile::tempdir().unwrap();
    let settings = settings(json!({}));
    let write = |name: &str| {
        let mut log = AnswerLog::open(folder.path(), &settings).unwrap();
        for i in 0..100 {
            log.keep(vec![Line::answer(keys(&[&format!("{name} {i}")]), answer(1))]).unwrap();
        }
    };
    std::thread::scope(|scope| {
        for name in ["x", "y", "z"] {
            scope.spawn(move || write(name));
        }
    });
    let mut log = AnswerLog::open(folder.path(), &settings).unwrap();
    let all = ["x", "y", "z"].iter().flat_map(|name| (0..100).map(move |i| format!("{name} {i}")));
    assert!(all.into_iter().all(|name| log.get(key(&name)).is_some()));
    assert_eq!((log.torn(), log.damaged()), (0, &[][..]));
    log.keep(vec![Line::answer(keys(&["x 0"]), answer(2))]).unwrap();
    assert_eq!(log.get(key("x 0")).unwrap().reply, Reply::Label(1));
}

#[test]
fn a_claim_holds_until_it_is_released_or_its_holder_ends() {
    let folder = tempfile::tempdir().unwrap();
    let settings = settings(json!({}));
    let open = || AnswerLog::open(folder.path(), &settings).unwrap();
    let (one, other) = (open(), open());
    assert!(one.claim(key("a")).unwrap() && one.claim(key("b")).unwrap());
    assert!(!other.claim(key("a")).unwrap() && other.claim(key("c")).unwrap());
    one.release(key("a")).unwrap();
    assert!(other.claim(key("a")).unwrap() && !other.claim(key("b")).unwrap());
    drop(one);
    assert!(other.claim(key("b")).unwrap());
}

#[test]
fn what_is_kept_of_an_answer_in_memory_is_all_there_and_small() {
    for reply in REPLIES {
        for (slot, request) in [(0, 0), (1, 77), (19, 1 << 40), (255, (1 << 48) - 1)] {
            let kept = Kept { reply, slot, request };
            assert_eq!(Packed::of(kept).map(Packed::kept), Some(kept));
        }
    }
    let label = Kept { reply: Reply::Label(1), slot: 0, request: 0 };
    assert!(
        Packed::of(Kept { slot: 256, ..label }).is_none() && Packed::of(Kept { request: 1 << 48, ..label }).is_none()
    );
    assert_eq!(size_of::<(AnswerKey, Packed)>(), 24);
}

/// Writes a log of a labelled pair, a failed request and another pair; returns its path and bytes.
fn small_log(folder: &Path) -> (PathBuf, Vec<u8>) {
    let mut log = AnswerLog::open(folder, &settings(json!({}))).unwrap();
    log.keep(vec![Line::answer(keys(&["a"]), answer(1))]).unwrap();
    log.keep(vec![Line::failed(keys(&["b"]), "too long".into())]).unwrap();
    log.keep(vec![Line::answer(keys(&["c"]), answer(2))]).unwrap();
    let path = log.folder().join("answers.jsonl");
    let bytes = std::fs::read(&path).unwrap();
    (path, bytes)
}

#[test]
fn every_flipped_bit_of_a_log_is_noticed_and_names_its_line() {
    let folder = tempfile::tempdir().unwrap();
    let (path, whole) = small_log(folder.path());
    assert_eq!(verify(folder.path()).unwrap(), Verified { answers: 3, damaged: vec![] });
    for bit in 0..whole.len() * 8 {
        let mut bytes = whole.clone();
        bytes[bit / 8] ^= 1 << (bit % 8);
        std::fs::write(&path, &bytes).unwrap();
        let line = whole[..bit / 8].iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at as u64 + 1);
        let damaged = verify(folder.path()).unwrap().damaged;
        assert_eq!(damaged.first(), Some(&(path.clone(), line)), "bit {bit}");
        // Opening the log reports the same lines, and no damaged line gives an answer.
        let log = AnswerLog::open(folder.path(), &settings(json!({}))).unwrap();
        assert_eq!((log.torn(), log.damaged().first()), (0, Some(&line)), "bit {bit}");
        for (name, reply) in [("a", Reply::Label(1)), ("b", Reply::Failed), ("c", Reply::Label(2))] {
            assert!(log.get(key(name)).is_none_or(|kept| kept.reply == reply), "bit {bit}");
        }
    }
}

#[test]
fn lines_without_a_checksum_are_read() {
    let folder = tempfile::tempdir().unwrap();
    let (path, bytes) = small_log(folder.path());
    let old: String = String::from_utf8(bytes)
        .unwrap()
        .lines()
        .map(|line| format!("{}}}\n", line.split_once(",\"sum\":").unwrap().0))
        .collect();
    std::fs::write(&path, &old).unwrap();
    assert_eq!(verify(folder.path()).unwrap(), Verified { answers: 3, damaged: vec![] });
    let log = AnswerLog::open(folder.path(), &settings(json!({}))).unwrap();
    assert_eq!(log.get(key("c")).unwrap().reply, Reply::Label(2));
    assert_eq!((log.torn(), log.damaged()), (0, &[][..]));
}

#[test]
fn a_damaged_line_is_set_aside_once_and_the_others_stay_where_they_are() {
    let folder = tempfile::tempdir().unwrap();
    let (path, whole) = small_log(folder.path());
    let mut bytes = whole.clone();
    bytes[20] ^= 1;
    std::fs::write(&path, &bytes).unwrap();
    let open = || AnswerLog::open(folder.path(), &settings(json!({}))).unwrap();
    let (mut one, mut other) = (open(), open());
    let aside = one.set_damaged_aside().unwrap();
    other.set_damaged_aside().unwrap();
    let length = whole.iter().position(|byte| *byte == b'\n').unwrap() + 1;
    assert_eq!(std::fs::read(aside).unwrap(), bytes[..length]);
    let now = std::fs::read(&path).unwrap();
    assert_eq!((now.len(), &now[length..]), (whole.len(), &whole[length..]));
    let again = open();
    assert!(again.damaged().is_empty() && again.get(key("a")).is_none());
    assert_eq!(again.get(key("c")), other.get(key("c")));
    assert_eq!(verify(folder.path()).unwrap(), Verified { answers: 2, damaged: vec![] });
}
