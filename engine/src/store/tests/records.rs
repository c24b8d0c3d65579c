use std::fs;

use super::{TestSpace, instance, record, writable};
use crate::names::Digest;
use crate::store::{ActionRecord, RecordResult, Resolution, resolve_conflict, verify};

#[test]
fn the_first_record_at_a_key_wins() {
    let space = TestSpace::new();
    let (a, b) = (space.commit(&[("a", b"1")]).0, space.commit(&[("a", b"2")]).0);
    let (first, second) = (record(1, a), record(1, b));
    assert_eq!(space.store.recorded_digest(&first.key).unwrap(), None);
    assert_eq!(space.store.record(&first).unwrap(), RecordResult::New);
    assert_eq!(space.store.record(&first).unwrap(), RecordResult::Same);
    assert_eq!(space.store.record(&second).unwrap(), RecordResult::Differs { first: Box::new(first.clone()) });
    assert_eq!(space.store.action(&first.key).unwrap(), Some(first.clone()));
    space.store.replace(&second).unwrap();
    assert_eq!(space.store.recorded_digest(&first.key).unwrap(), Some(b));
    let names = fs::read_dir(space.store.root().join("actions")).unwrap();
    assert_eq!(names.count(), 1, "a temporary file was left");
}

#[test]
fn a_record_reads_back_with_its_key() {
    let space = TestSpace::new();
    let mut written = record(1, space.commit(&[("a", b"1")]).0);
    written.recipe.params =
        serde_json::json!({ "lr": 1e-4, "third": 1.0 / 3.0, "tiny": 5e-324, "n": u64::MAX, "m": -3, "s": "ü\n" });
    written.key = written.recipe.key();
    space.store.record(&written).unwrap();
    let read = space.store.action(&written.key).unwrap().unwrap();
    assert_eq!(read, written);
    assert_eq!(read.recipe.key(), written.key);
    assert_eq!(space.store.actions().unwrap(), [written]);
}

#[test]
fn a_damaged_record_counts_as_none_and_is_replaced() {
    let space = TestSpace::new();
    let whole = record(1, space.commit(&[("a", b"1")]).0);
    space.store.record(&whole).unwrap();
    let path = space.store.action_file(&whole.key);
    let text = fs::read_to_string(&path).unwrap();
    let other_digest = text.replace(&whole.digest.to_string(), &Digest::of(b"other").to_string());
    assert_ne!(other_digest, text);
    for damaged in [&text[..text.len() / 2], "", &text.replace("\"n\": 1", "\"n\": 2"), &other_digest] {
        fs::write(&path, damaged).unwrap();
        assert_eq!(space.store.action(&whole.key).unwrap(), None);
        assert_eq!(verify(&space.store).unwrap().broken_records, std::slice::from_ref(&path));
        assert_eq!(space.store.record(&whole).unwrap(), RecordResult::New);
        assert_eq!(space.store.action(&whole.key).unwrap(), Some(whole.clone()));
    }
}

#[test]
fn verify_notices_every_flipped_bit_of_a_record_and_of_a_manifest() {
    let space = TestSpace::new();
    let (digest, _) = space.commit(&[("a", b"1")]);
    let mut whole = record(1, digest);
    whole.provenance.warnings = vec!["a warning".into()];
    space.store.record(&whole).unwrap();
    let manifest = space.store.artifact_folder(&digest).join("manifest.json");
    drop(writable(&manifest));
    for path in [space.store.action_file(&whole.key), manifest] {
        let bytes = fs::read(&path).unwrap();
        for bit in 0..8 * bytes.len() {
            let mut damaged = bytes.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            fs::write(&path, damaged).unwrap();
            let place = format!("bit {} of byte {} of {}", bit % 8, bit / 8, path.display());
            let noticed = match path.ends_with("manifest.json") {
                true => space.store.open_artifact(&digest).is_err(),
                false => space.store.action(&whole.key).unwrap().is_none(),
            };
            assert!(noticed, "{place}");
            // `verify` is slower and uses the same check, so test one bit of each byte.
            assert!(bit / 8 % 8 != bit % 8 || !verify(&space.store).unwrap().is_intact(), "{place}");
        }
        fs::write(&path, bytes).unwrap();
        assert!(verify(&space.store).unwrap().is_intact());
    }
    assert_eq!(space.store.action(&whole.key).unwrap(), Some(whole.clone()));
}

#[test]
fn a_record_of_an_older_temper_is_still_read() {
    let space = TestSpace::new();
    let whole = record(1, space.commit(&[("a", b"1")]).0);
    let text = serde_json::to_string_pretty(&whole).unwrap();
    let seal = Digest::of(format!("{} {}", whole.key, whole.digest).as_bytes());
    let old = format!("{{\n  \"seal\": \"{seal}\",{}\n", &text[1..]);
    let path = space.store.action_file(&whole.key);
    fs::write(&path, &old).unwrap();
    assert_eq!(space.store.action(&whole.key).unwrap(), Some(whole.clone()));
    assert_eq!(space.store.recorded_digest(&whole.key).unwrap(), Some(whole.digest));
    let other_key =
        old.replace(&format!("\"key\": \"{}", whole.key), &format!("\"key\": \"{}", record(2, whole.digest).key));
    assert_ne!(other_key, old);
    fs::write(&path, other_key).unwrap();
    assert_eq!(space.store.recorded_digest(&whole.key).unwrap(), None);
    assert_eq!(space.store.action(&whole.key).unwrap(), None);
}

#[test]
fn no_record_is_written_for_an_artifact_that_is_not_there_or_of_another_key() {
    let space = TestSpace::new();
    assert!(space.store.record(&record(1, Digest::of(b"never"))).is_err());
    let mut wrong = record(1, space.commit(&[("a", b"1")]).0);
    wrong.key = record(2, wrong.digest).key;
    assert!(space.store.record(&wrong).is_err());
    assert!(space.store.actions().unwrap().is_empty());
}

#[test]
fn a_second_digest_is_an_internal_error_only_for_a_deterministic_kind_on_one_platform() {
    let first = record(1, Digest::of(b"1"));
    let second = record(1, Digest::of(b"2"));
    let mut elsewhere = second.clone();
    elsewhere.provenance.platform.instructions = "other".into();
    let judged = |second: &ActionRecord, deterministic, whole, forced| {
        resolve_conflict(&first, second, deterministic, whole, forced)
    };
    assert_eq!(judged(&first, true, true, false), Resolution::KeepFirst);
    assert_eq!(judged(&second, true, true, false), Resolution::Bug);
    assert_eq!(judged(&second, true, true, true), Resolution::Bug);
    assert_eq!(judged(&elsewhere, true, true, true), Resolution::KeepFirst);
    assert_eq!(judged(&elsewhere, true, false, false), Resolution::Replace);
    assert_eq!(judged(&second, false, true, false), Resolution::KeepFirst);
    assert_eq!(judged(&second, false, true, true), Resolution::Replace);
    assert_eq!(judged(&second, false, false, false), Resolution::Replace);
}

#[test]
fn the_latest_attempt_is_that_at_the_instance_else_at_its_stage() {
    let space = TestSpace::new();
    let digest = space.commit(&[("a", b"1")]).0;
    for (n, stage, seconds) in [(1, "rl[a,1]", 10.0), (2, "rl[b,1]", 20.0), (3, "rl[a,1]", 12.0)] {
        let mut record = record(n, digest);
        (record.provenance.stage, record.provenance.seconds) = (instance(stage), seconds);
        space.store.record(&record).unwrap();
    }
    let timings = space.store.timings().unwrap();
    assert_eq!(timings.latest("test.work", &instance("rl[b,1]")).unwrap().key, Some(record(2, digest).key));
    let expected = |kind, stage| timings.latest(kind, &instance(stage)).map(|timing| timing.seconds);
    assert_eq!(expected("test.work", "rl[a,1]"), Some(12.0));
    assert_eq!(expected("test.work", "rl[b,1]"), Some(20.0));
    assert_eq!(expected("test.work", "rl[c,1]"), Some(12.0));
    assert_eq!(expected("test.other", "rl[a,1]"), None);
    assert_eq!(expected("test.work", "other"), None);
}
