use std::fs;
use std::os::fd::AsFd;

use super::{TestSpace, record};
use crate::error::Blame;
use crate::names::{Digest, Key};
use crate::store::{LockHolder, Store};

#[test]
fn several_processes_may_create_a_store_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().join("cache");
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| Store::open(&root).unwrap());
        }
    });
    assert_eq!(fs::read_to_string(root.join("version")).unwrap(), "1\n");
}

#[test]
fn a_store_of_a_newer_version_is_refused_by_both_versions() {
    let space = TestSpace::new();
    fs::write(space.store.root().join("version"), "7\n").unwrap();
    let error = Store::open(space.store.root()).unwrap_err();
    assert_eq!((error.blame, error.exit_code()), (Blame::User, 2));
    assert!(error.message.contains("version 7") && error.message.contains("version 1"), "{error}");
}

#[test]
fn a_folder_whose_version_file_has_other_content_is_refused() {
    let space = TestSpace::new();
    for text in ["v2 of my notes", "0", "-1"] {
        fs::write(space.store.root().join("version"), text).unwrap();
        assert_eq!(Store::open(space.store.root()).unwrap_err().blame, Blame::User);
    }
}

#[test]
fn a_key_lock_has_one_holder_and_names_it() {
    let space = TestSpace::new();
    let (key, other) = (Key::of(b"key"), space.reopen());
    let lock = space.store.try_lock(&key).unwrap().unwrap();
    let holder = LockHolder { pid: 12, run: "r1".into(), stage: "sft[s]".into() };
    lock.announce(&holder).unwrap();
    assert!(other.try_lock(&key).unwrap().is_none());
    assert_eq!(other.holder(&key), Some(holder));
    assert!(other.try_lock(&Key::of(b"another")).unwrap().is_some());
    drop(lock);
    assert!(other.try_lock(&key).unwrap().is_some());
    assert_eq!(other.holder(&key), None);
}

#[test]
fn a_key_stays_locked_while_a_child_holds_its_descriptor() {
    let space = TestSpace::new();
    let key = Key::of(b"key");
    let lock = space.store.try_lock(&key).unwrap().unwrap();
    let inherited = lock.as_fd().try_clone_to_owned().unwrap();
    drop(lock);
    assert!(space.reopen().try_lock(&key).unwrap().is_none());
    drop(inherited);
    assert!(space.reopen().try_lock(&key).unwrap().is_some());
}

#[test]
fn waiting_for_a_key_ends_when_it_is_released() {
    let space = TestSpace::new();
    let key = Key::of(b"key");
    let lock = space.store.try_lock(&key).unwrap().unwrap();
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| space.reopen().lock(&key).unwrap());
        drop(lock);
        let held = waiting.join().unwrap();
        assert!(space.store.try_lock(&key).unwrap().is_none());
        drop(held);
    });
}

#[test]
fn no_attempt_folder_is_ever_used_twice() {
    let space = TestSpace::new();
    let key = record(1, Digest::of(b"")).key;
    let mut seen = std::collections::BTreeSet::new();
    for _ in 0..50 {
        let attempt = space.store.new_attempt(&key).unwrap();
        assert!(attempt.out.read_dir().unwrap().next().is_none());
        assert!(seen.insert(attempt.root.clone()));
        attempt.discard().unwrap();
        attempt.discard().unwrap();
        fs::remove_dir_all(&attempt.root).unwrap();
    }
    let checkpoints = space.store.checkpoints(&key).unwrap();
    assert!(checkpoints.is_dir());
    space.store.clear_work(&key).unwrap();
    space.store.clear_work(&key).unwrap();
    assert!(!checkpoints.exists());
}

#[test]
fn a_store_without_its_version_file_still_opens_and_another_folder_does_not() {
    let space = TestSpace::new();
    fs::remove_file(space.store.root().join("version")).unwrap();
    space.reopen();
    assert_eq!(fs::read_to_string(space.store.root().join("version")).unwrap(), "1\n");
    let other = tempfile::tempdir().unwrap();
    fs::create_dir_all(other.path().join("version/1")).unwrap();
    assert_eq!(Store::open(other.path()).unwrap_err().blame, Blame::User);
    assert!(other.path().join("version/1").is_dir(), "somebody else's folder was moved");
}

#[test]
fn a_path_that_is_not_utf8_is_an_environment_error() {
    use std::os::unix::ffi::OsStrExt;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(std::ffi::OsStr::from_bytes(b"a\xff"));
    assert_eq!(Store::open(&path).unwrap_err().blame, Blame::Environment);
    assert!(!path.exists());
}
