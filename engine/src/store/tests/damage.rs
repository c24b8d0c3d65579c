use std::fs;
use std::path::Path;

use super::{Anything, TestSpace, flip_bit, flip_bit_keeping_mtime, record, writable};
use crate::names::Digest;
use crate::store::{Presence, repair, verify};

#[test]
fn a_flipped_bit_is_found_quarantined_and_repaired_by_computing_again() {
    let space = TestSpace::new();
    let files: &[(&str, &[u8])] = &[("a", b"good"), ("b", b"also good")];
    let (digest, manifest) = space.commit(files);
    flip_bit(&space.store.blob(&manifest.files["a"].digest));
    for store in [&space.store, &space.reopen()] {
        assert_eq!(store.check_before_reading(&digest).unwrap(), Presence::Damaged { file: "a".into() });
    }
    let aside = space.store.quarantine(&digest).unwrap();
    assert!(aside.join("a").exists() && aside.starts_with(space.store.root().join("quarantine")));
    assert_eq!(space.store.presence(&digest).unwrap(), Presence::Missing);
    assert_eq!(space.commit(files).0, digest);
    assert_eq!(space.store.presence(&digest).unwrap(), Presence::Intact);
    assert!(verify(&space.store).unwrap().is_intact());
}

#[test]
fn computing_again_repairs_damage_that_was_not_quarantined() {
    let space = TestSpace::new();
    let (digest, manifest) = space.commit(&[("a", b"good")]);
    flip_bit(&space.store.blob(&manifest.files["a"].digest));
    space.commit(&[("a", b"good")]);
    assert_eq!(space.store.presence(&digest).unwrap(), Presence::Intact);
    assert!(verify(&space.store).unwrap().is_intact());
}

#[test]
fn a_damaged_blob_is_not_linked_into_another_artifact() {
    let space = TestSpace::new();
    let (_, manifest) = space.commit(&[("a", b"good")]);
    flip_bit(&space.store.blob(&manifest.files["a"].digest));
    let (other, _) = space.commit(&[("b", b"good"), ("c", b"more")]);
    assert_eq!(space.store.presence(&other).unwrap(), Presence::Intact);
    assert_eq!(fs::read(space.store.artifact_folder(&other).join("b")).unwrap(), b"good");
}

#[test]
fn a_file_that_grew_shrank_or_vanished_is_found() {
    for bytes in [Some(&b"goo"[..]), Some(b"good!"), Some(b""), None] {
        let space = TestSpace::new();
        let (digest, _) = space.commit(&[("a", b"good")]);
        let file = space.store.artifact_folder(&digest).join("a");
        fs::remove_file(&file).unwrap();
        if let Some(bytes) = bytes {
            fs::write(&file, bytes).unwrap();
        }
        assert_eq!(space.store.presence(&digest).unwrap(), Presence::Damaged { file: "a".into() });
    }
}

#[test]
fn a_damaged_or_missing_manifest_is_found() {
    let space = TestSpace::new();
    let damaged = Presence::Damaged { file: "manifest.json".into() };
    let (digest, _) = space.commit(&[("a", b"good")]);
    flip_bit_keeping_mtime(&space.store.artifact_folder(&digest).join("manifest.json"));
    assert_eq!(space.store.presence(&digest).unwrap(), damaged);
    space.store.quarantine(&digest).unwrap();
    space.commit(&[("a", b"good")]);
    fs::remove_file(space.store.artifact_folder(&digest).join("manifest.json")).unwrap();
    assert_eq!(space.store.presence(&digest).unwrap(), damaged);
    space.commit(&[("a", b"good")]);
    assert_eq!(space.store.presence(&digest).unwrap(), Presence::Intact);
}

#[test]
fn an_artifact_that_is_not_there_is_missing() {
    let space = TestSpace::new();
    let (digest, _) = space.commit(&[("a", b"good")]);
    assert_eq!(space.store.presence(&Digest::of(b"never")).unwrap(), Presence::Missing);
    fs::remove_dir_all(space.store.artifact_folder(&digest)).unwrap();
    assert_eq!(space.store.presence(&digest).unwrap(), Presence::Missing);
    assert!(space.store.open_artifact(&digest).is_err());
}

#[test]
fn damage_that_leaves_stat_unchanged_is_found_by_verify_and_then_by_every_reader() {
    let space = TestSpace::new();
    let other = space.reopen();
    let (digest, manifest) = space.commit(&[("a", b"good")]);
    flip_bit_keeping_mtime(&space.store.blob(&manifest.files["a"].digest));
    assert_eq!(space.store.presence(&digest).unwrap(), Presence::Intact);
    assert_eq!(other.presence(&digest).unwrap(), Presence::Intact);
    let report = verify(&space.store).unwrap();
    assert_eq!((report.damaged.len(), report.damaged_blobs.len()), (1, 1));
    for store in [&space.store, &space.reopen()] {
        assert_eq!(store.presence(&digest).unwrap(), Presence::Damaged { file: "a".into() });
    }
    space.store.quarantine(&digest).unwrap();
    space.commit(&[("a", b"good")]);
    assert!(verify(&space.store).unwrap().is_intact());
}

#[test]
fn quarantine_leaves_an_intact_artifact_where_it_is() {
    let space = TestSpace::new();
    let (digest, _) = space.commit(&[("a", b"good")]);
    space.store.quarantine(&digest).unwrap();
    assert_eq!(space.store.presence(&digest).unwrap(), Presence::Intact);
}

#[test]
fn a_copied_store_is_hashed_once_and_then_trusted() {
    let space = TestSpace::new();
    let (digest, manifest) = space.commit(&[("a", b"good")]);
    // Another inode, another mtime, not a link to the blob.
    let file = space.store.artifact_folder(&digest).join("a");
    fs::remove_file(&file).unwrap();
    fs::write(&file, b"good").unwrap();
    assert_eq!(space.store.presence(&digest).unwrap(), Presence::Intact);
    flip_bit_keeping_mtime(&file);
    assert_eq!(space.reopen().presence(&digest).unwrap(), Presence::Intact, "it was hashed a second time");
    assert_eq!(manifest.files.len(), 1);
}

#[test]
fn a_write_to_an_artifact_and_a_file_added_to_it_are_found() {
    let space = TestSpace::new();
    let (digest, _) = space.commit(&[("a", b"good"), ("sub/b", b"x")]);
    let folder = space.store.artifact_folder(&digest);
    assert!(space.store.unlisted_files(&digest).unwrap().is_empty());
    fs::write(folder.join("sub/new"), b"added").unwrap();
    assert_eq!(space.store.unlisted_files(&digest).unwrap(), ["sub/new"]);
    assert_eq!(space.store.presence(&digest).unwrap(), Presence::Intact);
    writable(&folder.join("a"));
    fs::write(folder.join("a"), b"evil").unwrap();
    assert_eq!(space.store.presence(&digest).unwrap(), Presence::Damaged { file: "a".into() });
}

/// Functions that replace a file by something else: a non-empty folder, a link loop, a FIFO, a dangling link.
fn displacements() -> [fn(&Path); 4] {
    [
        |path| {
            fs::create_dir(path).unwrap();
            fs::write(path.join("x"), "x").unwrap();
        },
        |path| std::os::unix::fs::symlink(path, path).unwrap(),
        |path| rustix::fs::mkfifoat(rustix::fs::CWD, path, 0o600.into()).unwrap(),
        |path| std::os::unix::fs::symlink("/nowhere/at/all", path).unwrap(),
    ]
}

#[test]
fn an_obstacle_at_a_files_path_is_quarantined_and_the_next_run_repairs_it() {
    let files: &[(&str, &[u8])] = &[("a", b"good")];
    for displace in displacements() {
        for place in ["record", "manifest", "artifact", "file", "blob", "index", "timings", "version"] {
            let space = TestSpace::new();
            let (digest, manifest) = space.commit(files);
            let made = record(1, digest);
            space.store.record(&made).unwrap();
            let (root, folder) = (space.store.root(), space.store.artifact_folder(&digest));
            let path = match place {
                "record" => space.store.action_file(&made.key),
                "manifest" => folder.join("manifest.json"),
                "artifact" => folder,
                "file" => folder.join("a"),
                "blob" => space.store.blob(&manifest.files["a"].digest),
                other => root.join(other),
            };
            match path.is_dir() {
                true => fs::remove_dir_all(&path).unwrap(),
                false => fs::remove_file(&path).unwrap(),
            }
            displace(&path);
            let store = space.reopen();
            if ["index", "timings", "version"].contains(&place) {
                assert!(!fs::symlink_metadata(&path).is_ok_and(|found| !found.is_file()), "{place}");
            } else {
                assert!(!verify(&store).unwrap().is_intact(), "{place}");
            }
            displace(&store.root().join("locks").join(made.key.to_string()));
            assert!(store.holder(&made.key).is_none());
            // The steps of a run: lock, artifact, record.
            let _lock = store.try_lock(&made.key).unwrap().expect("the lock is free");
            assert_eq!(store.commit(&space.out(files), &Anything).unwrap().0, digest, "{place}");
            store.record(&made).unwrap();
            assert_eq!(store.presence(&digest).unwrap(), Presence::Intact, "{place}");
            assert_eq!(store.action(&made.key).unwrap(), Some(made.clone()), "{place}");
            assert!(store.timings().is_ok());
            let found = verify(&store).unwrap();
            // A run does not repair a blob that an intact artifact does not need.
            assert_eq!(found.is_intact(), place != "blob", "{place}: {found:?}");
            repair(&store, &found).unwrap();
            assert!(verify(&store).unwrap().is_intact(), "{place}");
        }
    }
}

#[test]
fn an_obstacle_at_a_folders_path_is_moved_aside_when_the_store_opens() {
    // The first displacement creates a folder.
    for displace in &displacements()[1..] {
        for name in ["quarantine", "blobs", "artifacts", "actions", "work", "requests", "runs", "locks"] {
            let space = TestSpace::new();
            let folder = space.store.root().join(name);
            fs::remove_dir_all(&folder).unwrap();
            displace(&folder);
            let store = space.reopen();
            assert!(fs::symlink_metadata(&folder).unwrap().is_dir(), "{name}");
            store.commit(&space.out(&[("a", b"good")]), &Anything).unwrap();
            assert!(verify(&store).unwrap().is_intact(), "{name}");
        }
    }
}

#[test]
fn a_damaged_blob_whose_artifact_is_intact_is_quarantined_by_repair() {
    let space = TestSpace::new();
    let (digest, manifest) = space.commit(&[("a", b"good")]);
    let blob = space.store.blob(&manifest.files["a"].digest);
    fs::remove_file(&blob).unwrap();
    fs::write(&blob, "evil").unwrap();
    let found = verify(&space.store).unwrap();
    assert_eq!((found.damaged.len(), &found.damaged_blobs[..]), (0, std::slice::from_ref(&blob)));
    assert_eq!(repair(&space.store, &found).unwrap(), 1);
    assert!(!blob.exists() && verify(&space.store).unwrap().is_intact());
    assert_eq!(space.store.presence(&digest).unwrap(), Presence::Intact);
}

#[test]
fn repair_quarantines_what_is_damaged_and_nothing_else() {
    let space = TestSpace::new();
    let (intact, damaged) = (space.commit(&[("a", b"1")]).0, space.commit(&[("b", b"2")]).0);
    flip_bit(&space.store.artifact_folder(&damaged).join("b"));
    let (kept, broken) = (record(1, intact), record(2, damaged));
    space.store.record(&kept).unwrap();
    space.store.record(&broken).unwrap();
    fs::write(space.store.action_file(&broken.key), "{}").unwrap();
    repair(&space.store, &verify(&space.store).unwrap()).unwrap();
    assert!(verify(&space.store).unwrap().is_intact());
    assert_eq!(space.store.presence(&damaged).unwrap(), Presence::Missing);
    assert_eq!(space.store.presence(&intact).unwrap(), Presence::Intact);
    assert_eq!(space.store.actions().unwrap(), [kept]);
}

#[test]
fn verify_counts_bytes_once_and_lists_leftovers_and_unexpected_entries() {
    let space = TestSpace::new();
    let (digest, _) = space.commit(&[("a", b"1234"), ("b", b"1234")]);
    let folder = space.store.artifact_folder(&digest);
    fs::write(folder.join("extra"), b"x").unwrap();
    fs::create_dir(folder.with_file_name(".new-1-2-3")).unwrap();
    let report = verify(&space.store).unwrap();
    assert_eq!((report.files, report.bytes, report.artifacts), (1, 4, 1));
    assert_eq!(report.unlisted_files, [folder.join("extra")]);
    assert_eq!(report.leftovers.len(), 1);
    assert!(report.is_intact());
    let out = space.out(&[("a", b"1234")]);
    space.store.commit(&out, &Anything).unwrap();
}
