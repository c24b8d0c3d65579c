use std::fs;
use std::io::Write;

use super::{TestSpace, flip_bit_keeping_mtime};
use crate::names::Digest;
use crate::store::Presence;
use crate::store::files::Stat;

/// A stat that no real file has.
fn stat(n: u64) -> Stat {
    Stat { device: 1, inode: n, size: n, mtime: 5, ctime: None }
}

#[test]
fn an_entry_counts_only_while_the_stat_is_the_same() {
    let space = TestSpace::new();
    let (index, digest) = (&space.store.index, Digest::of(b"x"));
    index.insert(&[(stat(1), digest)]).unwrap();
    assert_eq!(index.lookup(&stat(1)).unwrap(), Some(digest));
    assert_eq!(index.lookup(&Stat { mtime: 6, ..stat(1) }).unwrap(), None);
    assert_eq!(index.lookup(&Stat { size: 2, ..stat(1) }).unwrap(), None);
    assert_eq!(index.lookup(&Stat { device: 2, ..stat(1) }).unwrap(), None);
    let input = Stat { ctime: Some(7), ..stat(1) };
    assert_eq!(index.lookup(&input).unwrap(), None, "an input is known by its ctime too");
    index.insert(&[(input, Digest::of(b"y"))]).unwrap();
    assert_eq!(index.lookup(&input).unwrap(), Some(Digest::of(b"y")));
    assert_eq!(index.lookup(&Stat { ctime: Some(8), ..input }).unwrap(), None);
    assert_eq!(index.lookup(&stat(1)).unwrap(), Some(digest), "one does not replace the other");
    index.forget(&[stat(1)]).unwrap();
    assert_eq!(index.lookup(&stat(1)).unwrap(), None);
}

#[test]
fn processes_see_each_others_entries() {
    let space = TestSpace::new();
    let other = space.reopen();
    for n in 0..20 {
        let (writer, reader) = if n % 2 == 0 { (&space.store, &other) } else { (&other, &space.store) };
        writer.index.insert(&[(stat(n), Digest::of(&[1]))]).unwrap();
        assert_eq!(reader.index.lookup(&stat(n)).unwrap(), Some(Digest::of(&[1])));
    }
}

#[test]
fn entries_written_at_the_same_time_all_survive() {
    let space = TestSpace::new();
    std::thread::scope(|scope| {
        for t in 0..8 {
            let store = space.reopen();
            scope.spawn(move || {
                for n in 0..50 {
                    store.index.insert(&[(stat(t * 100 + n), Digest::of(&[2]))]).unwrap();
                }
            });
        }
    });
    let store = space.reopen();
    for n in (0..8).flat_map(|t| (0..50).map(move |n| t * 100 + n)) {
        assert!(store.index.lookup(&stat(n)).unwrap().is_some(), "{n}");
    }
}

#[test]
fn a_truncated_or_damaged_entry_is_ignored_and_harms_no_other() {
    let space = TestSpace::new();
    let file = space.store.root().join("index");
    for n in 0..3 {
        space.store.index.insert(&[(stat(n), Digest::of(&[3]))]).unwrap();
    }
    let mut bytes = fs::read(&file).unwrap();
    bytes[80 + 40] ^= 1;
    fs::write(&file, &bytes).unwrap();
    fs::File::options().append(true).open(&file).unwrap().write_all(&bytes[..50]).unwrap();

    let store = space.reopen();
    let known: Vec<bool> = (0..3).map(|n| store.index.lookup(&stat(n)).unwrap().is_some()).collect();
    assert_eq!(known, [true, false, true]);
    store.index.insert(&[(stat(9), Digest::of(&[3]))]).unwrap();
    assert!(space.reopen().index.lookup(&stat(9)).unwrap().is_some());
}

#[test]
fn an_index_with_many_replaced_entries_is_rewritten_and_says_the_same() {
    let space = TestSpace::new();
    let reader = space.reopen();
    for n in 0..6_000_u64 {
        let mtime = i64::try_from(n).unwrap();
        space.store.index.insert(&[(Stat { mtime, ..stat(n % 7) }, Digest::of(&n.to_le_bytes()))]).unwrap();
    }
    assert!(fs::metadata(space.store.root().join("index")).unwrap().len() < 4_000 * 80);
    for store in [&space.store, &reader, &space.reopen()] {
        let last = Stat { mtime: 5_999, ..stat(5_999 % 7) };
        assert_eq!(store.index.lookup(&last).unwrap(), Some(Digest::of(&5_999_u64.to_le_bytes())));
    }
}

#[test]
fn the_index_may_be_deleted() {
    let space = TestSpace::new();
    let (digest, _) = space.commit(&[("a", b"good")]);
    fs::remove_file(space.store.root().join("index")).unwrap();
    for store in [&space.store, &space.reopen()] {
        assert_eq!(store.presence(&digest).unwrap(), Presence::Intact);
    }
    flip_bit_keeping_mtime(&space.store.artifact_folder(&digest).join("a"));
    assert_eq!(space.reopen().presence(&digest).unwrap(), Presence::Intact, "what was hashed again was not noted");
}
