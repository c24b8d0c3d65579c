use std::fs;
use std::path::PathBuf;
use std::process::Command;

use super::{Anything, TestSpace, record};
use crate::store::{Presence, RecordResult, Store, verify};

const FILES: &[(&str, &[u8])] = &[("a", b"first"), ("sub/b", b"second"), ("sub/c", b"first")];

/// The work of a child process until it is killed; not a test by itself.
#[test]
#[ignore = "run by the claim below, in a process that dies on the way"]
fn commits_and_records() {
    let Some(root) = std::env::var_os("TEMPER_TEST_STORE").map(PathBuf::from) else { return };
    let store = Store::open(&root.join("cache")).unwrap();
    let (digest, _) = store.commit(&root.join("out"), &Anything).unwrap();
    store.record(&record(1, digest)).unwrap();
}

#[test]
fn a_crash_between_any_two_steps_leaves_no_record_or_a_complete_one() {
    let key = record(1, crate::names::Digest::of(b"")).key;
    let (mut artifacts, mut records) = (0, 0);
    for step in 0.. {
        let space = TestSpace::new();
        let out = space.out(FILES);
        fs::rename(out, space.folder.path().join("out")).unwrap();
        let killed = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "store::tests::crash::commits_and_records", "--ignored", "--test-threads=1"])
            .env("TEMPER_FAULT", format!("{}:{step}:kill", space.folder.path().join("steps").display()))
            .env("TEMPER_TEST_STORE", space.folder.path())
            .output()
            .unwrap();

        let store = space.reopen();
        let report = verify(&store).unwrap();
        assert!(report.is_intact(), "killed at step {step}: {report:?}");
        artifacts += report.artifacts;
        if let Some(record) = store.action(&key).unwrap() {
            assert_eq!(store.presence(&record.digest).unwrap(), Presence::Intact);
            records += 1;
        }
        // Running again is sufficient.
        let (digest, _) = store.commit(&space.out(FILES), &Anything).unwrap();
        assert_ne!(matches!(store.record(&record(1, digest)).unwrap(), RecordResult::Same), report.records == 0);
        assert_eq!(store.presence(&digest).unwrap(), Presence::Intact);
        assert!(verify(&store).unwrap().is_intact());

        if killed.status.success() {
            assert!(step >= 25, "only {step} steps were tried");
            break;
        }
    }
    // Some died before the artifact was committed, some between artifact and record, and some after both.
    assert!(records >= 2 && artifacts > records, "{artifacts} artifacts, {records} records");
}
