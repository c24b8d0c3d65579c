use std::fs;
use std::path::Path;

use super::{Anything, Space, flip, record, rot, writable};
use crate::names::Digest;
use crate::store::{Presence, repair, verify};

#[test]
fn a_flipped_bit_is_found_quarantined_and_repaired_by_computing_again() {
    let space = Space::new();
    let files: &[(&str, &[u8])] = &[("a", b"good"), ("b", b"also good")];
    let (digest, manifest) = space.commit(files);
    flip(&space.store.blob(&manifest.files["a"].digest));
    for store in [&space.store, &space.again()] {
        assert_eq!(store.check_before_reading(&digest).unwrap(), Presence::Rotten { file: "a".into() });
    }
    let aside = space.store.quarantine(&digest).unwrap();
    assert!(aside.join("a").exists() && aside.starts_with(space.store.root().join("quarantine")));
    assert_eq!(space.store.presence(&digest).unwrap(), Presence::Missing);
    assert_eq!(space.commit(files).0, digest);
    assert_eq!(space.store.presence(&digest).unwrap(), Presence::Whole);
    assert!(verify(&space.store).unwrap().is_sound());
}

#[test]
fn computing_again_repairs_also_what_nobody_quarantined() {
    let space = Space::new();
    let (digest, manifest) = space.commit(&[("a", b"good")]);
    flip(&space.store.blob(&manifest.files["a"].digest));
    space.commit(&[("a", b"good")]);
    assert_eq!(space.store.presence(&digest).unwrap(), Presence::Whole);
    assert!(verify(&space.store).unwrap().is_sound());
}

#[test]
fn a_rotten_blob_does_not_get_into_another_artifact() {
    let space = Space::new();
    let (_, manifest) = space.commit(&[("a", b"good")]);
    flip(&space.store.blob(&manifest.files["a"].digest));
    let (other, _) = space.commit(&[("b", b"good"), ("c", b"more")]);
    assert_eq!(space.store.presence(&other).unwrap(), Presence::Whole);
    assert_eq!(fs::read(space.store.artifact_folder(&other).join("b")).unwrap(), b"good");
}

#[test]
fn a_file_that_grew_shrank_or_vanished_is_found() {
    for bytes in [Some(&b"goo"[..]), Some(b"good!"), Some(b""), None] {
        let space = Space::new();
        let (digest, _) = space.commit(&[("a", b"good")]);
        let file = space.store.artifact_folder(&digest).join("a");
        fs::remove_file(&file).unwrap();
        if let Some(bytes) = bytes {
            fs::write(&file, bytes).unwrap();
        }
        assert_eq!(space.store.presence(&digest).unwrap(), Presence::Rotten { file: "a".into() });
    }
}

#[test]
fn a_damaged_or_missing_manifest_is_found() {
    let space = Space::new();
    let rotten = Presence::Rotten { file: "manifest.json".into() };
    let (digest, _) = space.commit(&[("a", b"good")]);
    rot(&space.store.artifact_folder(&digest).join("manifest.json"));
    assert_eq!(space.store.presence(&digest).unwrap(), rotten);
    space.store.quarantine(&digest).unwrap();
    space.commit(&[("a", b"good")]);
    fs::remove_file(space.store.artifact_folder(&digest).join("manifest.json")).unwrap();
    assert_eq!(space.store.presence(&digest).unwrap(), rotten);
    space.commit(&[("a", b"good")]);
    assert_eq!(space.store.presence(&digest).unwrap(), Presence::Whole);
}

#[test]
fn an_artifact_that_is_not_there_is_missing() {
    let space = Space::new();
    let (digest, _) = space.commit(&[("a", b"good")]);
    assert_eq!(space.store.presence(&Digest::of(b"never")).unwrap(), Presence::Missing);
    fs::remove_dir_all(space.store.artifact_folder(&digest)).unwrap();
    assert_eq!(space.store.presence(&digest).unwrap(), Presence::Missing);
    assert!(space.store.open_artifact(&digest).is_err());
}

#[test]
fn rot_that_leaves_stat_unchanged_is_found_by_verify_and_then_by_everybody() {
    let space = Space::new();
    let other = space.again();
    let (digest, manifest) = space.commit(&[("a", b"good")]);
    rot(&space.store.blob(&manifest.files["a"].digest));
    assert_eq!(space.store.presence(&digest).unwrap(), Presence::Whole);
    assert_eq!(other.presence(&digest).unwrap(), Presence::Whole);
    let report = verify(&space.store).unwrap();
    assert_eq!((report.rotten.len(), report.rotten_blobs.len()), (1, 1));
    for store in [&space.store, &space.again()] {
        assert_eq!(store.presence(&digest).unwrap(), Presence::Rotten { file: "a".into() });
    }
    space.store.quarantine(&digest).unwrap();
    space.commit(&[("a", b"good")]);
    assert!(verify(&space.store).unwrap().is_sound());
}

#[test]
fn quarantine_leaves_a_whole_artifact_where_it_is() {
    let space = Space::new();
    let (digest, _) = space.commit(&[("a", b"good")]);
    space.store.quarantine(&digest).unwrap();
    assert_eq!(space.store.presence(&digest).unwrap(), Presence::Whole);
}

#[test]
fn a_copied_store_is_hashed_once_and_then_believed() {
    let space = Space::new();
    let (digest, manifest) = space.commit(&[("a", b"good")]);
    // Another inode, another mtime, not a link to the blob.
    let file = space.store.artifact_folder(&digest).join("a");
    fs::remove_file(&file).unwrap();
    fs::write(&file, b"good").unwrap();
    assert_eq!(space.store.presence(&digest).unwrap(), Presence::Whole);
    rot(&file);
    assert_eq!(space.again().presence(&digest).unwrap(), Presence::Whole, "it was hashed a second time");
    assert_eq!(manifest.files.len(), 1);
}

#[test]
fn a_write_to_an_artifact_and_a_file_added_to_it_are_found() {
    let space = Space::new();
    let (digest, _) = space.commit(&[("a", b"good"), ("sub/b", b"x")]);
    let folder = space.store.artifact_folder(&digest);
    assert!(space.store.strangers(&digest).unwrap().is_empty());
    fs::write(folder.join("sub/new"), b"litter").unwrap();
    assert_eq!(space.store.strangers(&digest).unwrap(), ["sub/new"]);
    assert_eq!(space.store.presence(&digest).unwrap(), Presence::Whole);
    writable(&folder.join("a"));
    fs::write(folder.join("a"), b"evil").unwrap();
    assert_eq!(space.store.presence(&digest).unwrap(), Presence::Rotten { file: "a".into() });
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
fn whatever_stands_in_the_place_of_a_file_is_set_aside_and_the_next_run_mends_it() {
    let files: &[(&str, &[u8])] = &[("a", b"good")];
    for displace in displacements() {
        for place in ["record", "manifest", "artifact", "file", "blob", "index", "timings", "version"] {
            let space = Space::new();
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
            let store = space.again();
            if ["index", "timings", "version"].contains(&place) {
                assert!(!fs::symlink_metadata(&path).is_ok_and(|found| !found.is_file()), "{place}");
            } else {
                assert!(!verify(&store).unwrap().is_sound(), "{place}");
            }
            displace(&store.root().join("locks").join(made.key.to_string()));
            assert!(store.holder(&made.key).is_none());
            // The steps of a run: lock, artifact, record.
            let _lock = store.try_lock(&made.key).unwrap().expect("nobody holds it");
            assert_eq!(store.commit(&space.out(files), &Anything).unwrap().0, digest, "{place}");
            store.record(&made).unwrap();
            assert_eq!(store.presence(&digest).unwrap(), Presence::Whole, "{place}");
            assert_eq!(store.action(&made.key).unwrap(), Some(made.clone()), "{place}");
            assert!(store.timings().is_ok());
            let found = verify(&store).unwrap();
            // A run does not repair a blob that an intact artifact does not need.
            assert_eq!(found.is_sound(), place != "blob", "{place}: {found:?}");
            repair(&store, &found).unwrap();
            assert!(verify(&store).unwrap().is_sound(), "{place}");
        }
    }
}

#[test]
fn whatever_stands_in_the_place_of_a_folder_is_set_aside_when_the_store_opens() {
    // The first displacement creates a folder.
    for displace in &displacements()[1..] {
        for name in ["quarantine", "blobs", "artifacts", "actions", "work", "requests", "runs", "locks"] {
            let space = Space::new();
            let folder = space.store.root().join(name);
            fs::remove_dir_all(&folder).unwrap();
            displace(&folder);
            let store = space.again();
            assert!(fs::symlink_metadata(&folder).unwrap().is_dir(), "{name}");
            store.commit(&space.out(&[("a", b"good")]), &Anything).unwrap();
            assert!(verify(&store).unwrap().is_sound(), "{name}");
        }
    }
}

#[test]
fn a_rotten_blob_whose_artifact_is_whole_is_set_aside_by_repair() {
    let space = Space::new();
    let (digest, manifest) = space.commit(&[("a", b"good")]);
    let blob = space.store.blob(&manifest.files["a"].digest);
    fs::remove_file(&blob).unwrap();
    fs::write(&blob, "evil").unwrap();
    let found = verify(&space.store).unwrap();
    assert_eq!((found.rotten.len(), &found.rotten_blobs[..]), (0, std::slice::from_ref(&blob)));
    assert_eq!(repair(&space.store, &found).unwrap(), 1);
    assert!(!blob.exists() && verify(&space.store).unwrap().is_sound());
    assert_eq!(space.store.presence(&digest).unwrap(), Presence::Whole);
}

#[test]
fn repair_sets_aside_what_is_damaged_and_nothing_else() {
    let space = Space::new();
    let (whole, rotten) = (space.commit(&[("a", b"1")]).0, space.commit(&[("b", b"2")]).0);
    flip(&space.store.artifact_folder(&rotten).join("b"));
    let (kept, broken) = (record(1, whole), record(2, rotten));
    space.store.record(&kept).unwrap();
    space.store.record(&broken).unwrap();
    fs::write(space.store.action_file(&broken.key), "{}").unwrap();
    repair(&space.store, &verify(&space.store).unwrap()).unwrap();
    assert!(verify(&space.store).unwrap().is_sound());
    assert_eq!(space.store.presence(&rotten).unwrap(), Presence::Missing);
    assert_eq!(space.store.presence(&whole).unwrap(), Presence::Whole);
    assert_eq!(space.store.actions().unwrap(), [kept]);
}

#[test]
fn verify_counts_bytes_once_and_names_leftovers_and_strangers() {
    let space = Space::new();
    let (digest, _) = space.commit(&[("a", b"1234"), ("b", b"1234")]);
    let folder = space.store.artifact_folder(&digest);
    fs::write(folder.join("extra"), b"x").unwrap();
    fs::create_dir(folder.with_file_name(".new-1-2-3")).unwrap();
    let report = verify(&space.store).unwrap();
    assert_eq!((report.files, report.bytes, report.artifacts), (1, 4, 1));
    assert_eq!(report.strangers, [folder.join("extra")]);
    assert_eq!(report.leftovers.len(), 1);
    assert!(report.is_sound());
    let out = space.out(&[("a", b"1234")]);
    space.store.commit(&out, &Anything).unwrap();
}
