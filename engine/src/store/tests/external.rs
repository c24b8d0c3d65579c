use std::fs;
use std::os::unix::fs::symlink;
use std::time::{Duration, SystemTime};

use super::{Space, rot};
use crate::error::Blame;
use crate::names::Digest;

#[test]
fn a_file_counts_by_its_bytes() {
    let space = Space::new();
    let path = space.folder.path().join("data.jsonl");
    fs::write(&path, b"one").unwrap();
    assert_eq!(space.store.content_of(&path).unwrap(), Digest::of(b"one"));
    fs::write(&path, b"two").unwrap();
    assert_eq!(space.store.content_of(&path).unwrap(), Digest::of(b"two"));
}

#[test]
fn an_unchanged_file_is_read_once_and_a_fresh_one_each_time() {
    let space = Space::new();
    let path = space.folder.path().join("data");
    fs::write(&path, b"one").unwrap();
    // Written just now: a second write could leave the mtime as it is.
    space.store.content_of(&path).unwrap();
    rot(&path);
    assert_ne!(space.store.content_of(&path).unwrap(), Digest::of(b"one"));

    fs::write(&path, b"old").unwrap();
    let file = fs::File::options().write(true).open(&path).unwrap();
    file.set_modified(SystemTime::now() - Duration::from_secs(60)).unwrap();
    assert_eq!(space.store.content_of(&path).unwrap(), Digest::of(b"old"));
    rot(&path);
    assert_eq!(space.again().content_of(&path).unwrap(), Digest::of(b"old"), "it was read again");
}

#[test]
fn a_folder_counts_by_the_names_and_bytes_of_its_files() {
    let space = Space::new();
    let of = |files: &[(&str, &[u8])]| space.store.content_of(&space.out(files)).unwrap();
    let base = of(&[("a", b"1"), ("sub/b", b"2")]);
    assert_eq!(base, of(&[("sub/b", b"2"), ("a", b"1")]));
    for other in [
        of(&[("a", b"1"), ("sub/b", b"3")]),
        of(&[("a", b"1"), ("sub/c", b"2")]),
        of(&[("a", b"1"), ("b", b"2")]),
        of(&[("a", b"2"), ("sub/b", b"1")]),
        of(&[("a", b"1")]),
    ] {
        assert_ne!(base, other);
    }
}

#[test]
fn symlinks_are_followed_and_their_loops_are_refused() {
    let space = Space::new();
    let plain = space.out(&[("a", b"1"), ("sub/b", b"2")]);
    let linked = space.out(&[]);
    symlink(plain.join("a"), linked.join("a")).unwrap();
    symlink(plain.join("sub"), linked.join("sub")).unwrap();
    assert_eq!(space.store.content_of(&linked).unwrap(), space.store.content_of(&plain).unwrap());
    symlink(&linked, linked.join("again")).unwrap();
    let error = space.store.content_of(&linked).unwrap_err();
    assert!(error.message.contains("again") || error.message.contains("deep"), "{error}");
}

#[test]
fn what_is_not_there_is_the_users_fault_and_named() {
    let space = Space::new();
    let error = space.store.content_of(&space.folder.path().join("no-such-file")).unwrap_err();
    assert!(error.blame == Blame::Yours && error.message.contains("no-such-file"));
}

#[test]
fn a_wildcard_counts_by_what_it_matches() {
    let space = Space::new();
    let folder = space.folder.path().join("data");
    fs::create_dir(&folder).unwrap();
    for name in ["b.jsonl", "a.jsonl", "notes.txt"] {
        fs::write(folder.join(name), name).unwrap();
    }
    let content = || space.store.content_of(&folder.join("*.jsonl"));
    let before = content().unwrap();
    fs::write(folder.join("notes.txt"), "others").unwrap();
    assert_eq!(content().unwrap(), before);
    fs::write(folder.join("c.jsonl"), "").unwrap();
    assert_ne!(content().unwrap(), before);
    let none = space.store.content_of(&folder.join("*.parquet")).unwrap_err();
    assert_eq!(none.blame, Blame::Yours);
    assert!(none.message.contains("no file matches"), "{none}");
}
