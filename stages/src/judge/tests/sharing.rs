//! Tests of sharing a store: no document is paid twice, whoever asks, in any order and any number of times.

use std::collections::BTreeMap;

use super::*;

/// How often each document was asked about, by its first summary and the other: the texts of its two summaries.
fn times(server: &Server) -> BTreeMap<String, usize> {
    let mut times = BTreeMap::new();
    for (_, first) in server.documents() {
        *times.entry(first).or_default() += 1;
    }
    times
}

#[test]
fn more_pairs_pay_only_for_the_new_ones_and_fewer_for_none() {
    let server = Server::fine();
    let store = tempfile::tempdir().unwrap();
    attempt(&bench((0..10).map(pair).collect()), &server, store.path()).unwrap();
    assert_eq!(server.count(), 5);
    let more = attempt(&bench((0..14).rev().map(pair).collect()), &server, store.path()).unwrap();
    assert_eq!(server.count(), 7);
    let fewer = attempt(&bench((3..8).map(pair).collect()), &server, store.path()).unwrap();
    assert_eq!(server.count(), 7);
    assert!(fewer.iter().all(|row| more.contains(row)));
    let twice = attempt(&bench([3, 3, 20, 20].map(pair).to_vec()), &server, store.path()).unwrap();
    assert_eq!((server.count(), twice.len()), (8, 4));
}

#[test]
fn what_is_asked_in_which_company_and_order_does_not_depend_on_the_tables_order() {
    let bodies = |pairs: Vec<Pair>, with: Value| {
        let server = Server::fine();
        let store = tempfile::tempdir().unwrap();
        assert_eq!(asked(&bench(pairs), &server.endpoint, store.path(), with).rows().len(), 24);
        let mut bodies: Vec<String> = server.api.requests().iter().map(|(_, body)| body.to_string()).collect();
        bodies.sort();
        bodies
    };
    for with in [json!({}), json!({ "swap_share": 0.5, "repeat_share": 0.5 }), json!({ "strict_partner": true })] {
        let pairs: Vec<Pair> = (0..24).map(pair).collect();
        let mut turned = pairs.clone();
        turned.rotate_left(7);
        turned.reverse();
        assert_eq!(bodies(pairs, with.clone()), bodies(turned, with));
    }
}

#[test]
fn what_decides_an_answer_pays_anew_and_what_does_not_is_free() {
    let server = Server::fine();
    let store = tempfile::tempdir().unwrap();
    let bench = bench((0..4).map(pair).collect());
    let mut count = 0;
    for (with, requests) in [
        (json!({}), 2),
        (json!({ "max_unlabelled": 1, "retry": "failed" }), 0),
        (json!({ "max_tokens": 2000 }), 2),
        (json!({ "model": "another" }), 2),
        (json!({ "choice": "prefill" }), 2),
        (json!({ "thinking": "adaptive" }), 2),
        (json!({}), 0),
    ] {
        let seen = asked(&bench, &server.endpoint, store.path(), with.clone());
        count += requests;
        assert_eq!(server.count(), count, "{with}: {:?}", seen.warnings);
    }
}

#[test]
fn a_template_and_examples_of_ones_own_are_other_questions_by_their_content() {
    let server = Server::fine();
    let store = tempfile::tempdir().unwrap();
    let bench = bench((0..4).map(pair).collect());
    let (template, examples) = (bench.path("template"), bench.path("examples"));
    let with = json!({ "template": template, "examples": examples });
    let mut count = 0;
    for (head, requests) in [("Judge.", 2), ("Judge well.", 2), ("Judge.", 0)] {
        std::fs::write(&template, template::TEMPLATE.replace("You are", head)).unwrap();
        std::fs::write(&examples, template::EXAMPLES).unwrap();
        asked(&bench, &server.endpoint, store.path(), with.clone()).rows();
        count += requests;
        assert_eq!(server.count(), count, "{head}");
    }
    let sent = server.api.requests()[2].1["messages"][0]["content"].as_str().unwrap().to_owned();
    assert!(sent.starts_with("Judge well."), "{sent}");
}

#[test]
fn a_pair_and_the_same_pair_the_other_way_round_share_their_answers() {
    for with in [json!({ "swap_share": 1 }), json!({ "swap_share": 1, "strict_partner": true })] {
        let server = Server::fine();
        let store = tempfile::tempdir().unwrap();
        let turned = |pair: Pair| Pair { a_text: pair.b_text.clone(), b_text: pair.a_text.clone(), ..pair };
        let pairs = (0..10).map(pair).chain((0..10).map(pair).map(turned)).collect();
        let seen = asked(&bench(pairs), &server.endpoint, store.path(), with);
        assert!(seen.rows().iter().all(|row| row.chosen_text.starts_with("good")));
        assert_eq!(server.count(), 10, "ten pairs in two orders, two to a request");
    }
}

#[test]
fn two_clients_at_once_pay_each_document_once() {
    let slow = Server::new(Rules { latency: std::time::Duration::from_millis(5), ..Rules::default() });
    let store = tempfile::tempdir().unwrap();
    let bench = bench((0..60).map(pair).collect());
    let both = std::thread::scope(|scope| {
        let ask = || asked(&bench, &slow.endpoint, store.path(), json!({ "swap_share": 0.5 }));
        let other = scope.spawn(ask);
        [ask(), other.join().unwrap()]
    });
    assert_eq!(both[0].rows(), both[1].rows());
    let times = times(&slow);
    assert!(times.len() > 60 && times.values().all(|times| *times == 1), "{times:?}");
}

#[test]
fn a_repair_takes_what_is_kept_and_stops_before_it_pays_again() {
    let server = Server::fine();
    let store = tempfile::tempdir().unwrap();
    let (some, more) = (bench((0..10).map(pair).collect()), bench((0..14).map(pair).collect()));
    let first = asked(&some, &server.endpoint, store.path(), json!({}));
    let repaired = attempted(&some, &server.endpoint, store.path(), json!({}), Pay::Nothing);
    assert_eq!((repaired.rows(), repaired.metrics(), server.count()), (first.rows(), first.metrics(), 5));
    let stopped = attempted(&more, &server.endpoint, store.path(), json!({}), Pay::Nothing);
    assert_eq!((stopped.error().exit_code(), server.count()), (3, 5));
    assert!(
        stopped.error().message.contains("4 of its questions")
            && stopped.error().message.contains("2 requests, for which no price")
    );
    assert!(stopped.error().help.as_ref().unwrap().contains("--pay"));
}

#[test]
fn a_damaged_answer_is_named_and_paid_again_only_if_that_is_allowed() {
    let server = Server::fine();
    let store = tempfile::tempdir().unwrap();
    let some = bench((0..10).map(pair).collect());
    let first = asked(&some, &server.endpoint, store.path(), json!({}));
    let folder = std::fs::read_dir(store.path().join("requests/annotate.claude")).unwrap().next().unwrap().unwrap();
    let log = folder.path().join("answers.jsonl");
    let mut bytes = std::fs::read(&log).unwrap();
    // Changes the label in the first answer.
    let digit = bytes.windows(11).position(|at| at == b".summary\\\":").unwrap() + 11;
    bytes[digit] ^= 3;
    std::fs::write(&log, &bytes).unwrap();

    let stopped = asked(&some, &server.endpoint, store.path(), json!({}));
    let damaged = format!("{}: 1 paid answers are damaged (the lines at bytes 0)", log.display());
    assert_eq!((stopped.error().exit_code(), server.count()), (3, 5));
    assert!(stopped.error().message.starts_with(&format!("{damaged}, and the store keeps no answer to 2 of")));
    assert!(stopped.error().help.as_ref().unwrap().contains("--pay"));
    // The remaining pairs need none of the damaged answers.
    assert_eq!(stopped.warnings, [format!("{damaged}: they are left out")]);

    let again = attempted(&some, &server.endpoint, store.path(), json!({}), Pay::Again);
    let aside = folder.path().join("damaged.jsonl");
    assert_eq!(again.warnings, [format!("{damaged}: they are set aside in {}", aside.display())]);
    assert_eq!((again.rows(), server.count()), (first.rows(), 6));
    let after = asked(&some, &server.endpoint, store.path(), json!({}));
    assert_eq!((after.rows(), &after.warnings[..], server.count()), (first.rows(), &[][..], 6));
}

#[test]
fn with_strict_partners_an_answer_counts_only_in_its_company() {
    let server = Server::fine();
    let store = tempfile::tempdir().unwrap();
    let strict = || json!({ "strict_partner": true });
    let some = bench((0..10).map(pair).collect());
    let first = asked(&some, &server.endpoint, store.path(), strict());
    assert_eq!((first.rows().len(), server.count()), (10, 5));
    assert_eq!(asked(&some, &server.endpoint, store.path(), strict()).rows(), first.rows());
    assert_eq!(server.count(), 5);
    // With more pairs, documents have other neighbours.
    asked(&bench((0..20).map(pair).collect()), &server.endpoint, store.path(), strict()).rows();
    assert!((11..=15).contains(&server.count()), "{}", server.count());
    // Without `strict_partner`, answers that depend on neighbours do not count.
    let before = server.count();
    asked(&some, &server.endpoint, store.path(), json!({})).rows();
    assert_eq!(server.count(), before + 5);
}
