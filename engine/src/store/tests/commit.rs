use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::Path;

use super::{Anything, TestSpace, flip_bit_keeping_mtime, writable};
use crate::artifact::{ArtifactType, Facts};
use crate::error::{Blame, Error, Result};
use crate::names::Digest;
use crate::store::{Presence, verify};

#[test]
fn an_artifact_is_its_files_as_read_only_links_to_blobs() {
    let space = TestSpace::new();
    let (digest, manifest) = space.commit(&[("a.txt", b"one"), ("deep/er/b.txt", b"two")]);
    let artifact = space.store.open_artifact(&digest).unwrap();
    assert_eq!(artifact.manifest, manifest);
    assert_eq!(manifest.files.keys().collect::<Vec<_>>(), ["a.txt", "deep/er/b.txt"]);
    for (name, entry) in &manifest.files {
        let (file, blob) = (artifact.folder.join(name), space.store.blob(&entry.digest));
        let (file, blob) = (fs::metadata(file).unwrap(), fs::metadata(blob).unwrap());
        assert_eq!(file.ino(), blob.ino());
        assert_eq!(file.permissions().mode() & 0o777, 0o444);
    }
    assert_eq!(fs::read(artifact.folder.join("deep/er/b.txt")).unwrap(), b"two");
    assert_eq!(space.store.presence(&digest).unwrap(), Presence::Intact);
    assert!(verify(&space.store).unwrap().is_intact());
}

#[test]
fn equal_content_of_different_recipes_is_one_artifact() {
    let space = TestSpace::new();
    let files: &[(&str, &[u8])] = &[("a", b"same"), ("b", b"other")];
    let (first, _) = space.commit(files);
    let digests: Vec<Digest> = std::thread::scope(|scope| {
        let threads: Vec<_> =
            (0..8).map(|_| scope.spawn(|| space.reopen().commit(&space.out(files), &Anything).unwrap().0)).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert!(digests.iter().all(|digest| *digest == first));
    let report = verify(&space.store).unwrap();
    assert!(report.is_intact() && report.leftovers.is_empty(), "{report:?}");
    assert_eq!(report.artifacts, 1);
}

#[test]
fn concurrent_commits_of_the_same_bytes_all_succeed() {
    for _ in 0..10 {
        let space = TestSpace::new();
        std::thread::scope(|scope| {
            for i in 0..6 {
                let (space, own) = (&space, [i]);
                scope.spawn(move || {
                    let out = space.out(&[("shared", b"the same in all"), ("own", &own[..(i as usize) % 2])]);
                    space.reopen().commit(&out, &Anything).unwrap();
                });
            }
        });
        let report = verify(&space.store).unwrap();
        assert!(report.is_intact() && report.leftovers.is_empty(), "{report:?}");
    }
}

#[test]
fn an_artifact_of_many_files_is_complete() {
    let space = TestSpace::new();
    let names: Vec<String> = (0..40).map(|i| format!("part{}/{i}", i % 3)).collect();
    let files: Vec<(&str, &[u8])> = names.iter().map(|name| (name.as_str(), name.as_bytes())).collect();
    let (digest, manifest) = space.commit(&files);
    assert_eq!(manifest.files.len(), 40);
    assert_eq!(space.store.presence(&digest).unwrap(), Presence::Intact);
}

#[test]
fn a_large_file_has_the_digest_of_its_bytes() {
    let space = TestSpace::new();
    let bytes: Vec<u8> = (0..(9 << 20) + 17_u32).map(|i| (i % 251) as u8).collect();
    for size in [0, 1, (1 << 20) - 1, 4 << 20, (4 << 20) + 1, bytes.len()] {
        let (_, manifest) = space.commit(&[("x", &bytes[..size])]);
        assert_eq!(manifest.files["x"].digest, Digest::of(&bytes[..size]), "{size}");
        assert_eq!(manifest.files["x"].bytes, size as u64);
    }
}

#[test]
fn symbolic_links_special_files_and_the_manifests_name_are_refused() {
    let space = TestSpace::new();
    let refused = |prepare: &dyn Fn(&std::path::Path)| {
        let out = space.out(&[("good", b"x")]);
        prepare(&out);
        let error = space.store.commit(&out, &Anything).unwrap_err();
        assert_eq!(error.blame, Blame::User);
        error.message
    };
    assert!(refused(&|out| symlink("/etc/hostname", out.join("link")).unwrap()).contains("symbolic"));
    assert!(refused(&|out| symlink("..", out.join("up")).unwrap()).contains("symbolic"));
    assert!(refused(&|out| fs::write(out.join("manifest.json"), "{}").unwrap()).contains("manifest"));
    assert!(refused(&|out| drop(std::os::unix::net::UnixListener::bind(out.join("s")).unwrap())).contains("regular"));
    assert_eq!(verify(&space.store).unwrap().artifacts, 0);
}

/// An artifact type that requires a file `wanted`.
struct Demanding;

impl ArtifactType for Demanding {
    fn name(&self) -> &'static str {
        "Demanding"
    }

    fn about(&self) -> &'static str {
        "a file `wanted`"
    }

    fn check(&self, folder: &std::path::Path) -> Result<Facts> {
        match folder.join("wanted").exists() {
            true => Ok(Facts { metrics: [("a".into(), 1.0), ("b".into(), f64::NAN)].into(), ..Facts::default() }),
            false => Err(Error::user("wanted: expected a file")),
        }
    }

    fn preview(&self, _: &std::path::Path, _: usize) -> Result<String> {
        Ok(String::new())
    }
}

#[test]
fn an_output_that_fails_its_types_check_is_not_committed() {
    let space = TestSpace::new();
    assert!(space.store.commit(&space.out(&[("a", b"x")]), &Demanding).is_err());
    let report = verify(&space.store).unwrap();
    assert_eq!((report.artifacts, report.files), (0, 0));
}

#[test]
fn a_manifest_reads_back_as_it_was_written() {
    let space = TestSpace::new();
    let (digest, manifest) = space.store.commit(&space.out(&[("wanted", b"x")]), &Demanding).unwrap();
    assert_eq!(space.store.open_artifact(&digest).unwrap().manifest, manifest);
    assert_eq!(manifest.facts.metrics.keys().collect::<Vec<_>>(), ["a"]);
}

#[test]
fn metrics_json_is_among_the_facts() {
    let space = TestSpace::new();
    let (_, manifest) = space.commit(&[("metrics.json", br#"{"loss": 0.25, "n": 3, "bad": null}"#)]);
    assert_eq!(manifest.facts.metrics, [("loss".into(), 0.25), ("n".into(), 3.0)].into());
}

#[test]
fn a_file_linked_from_an_input_is_not_hashed_again() {
    let space = TestSpace::new();
    let (input, manifest) = space.commit(&[("weights", b"many bytes")]);
    let file = space.store.artifact_folder(&input).join("weights");
    let out = space.out(&[("new", b"x")]);
    fs::hard_link(&file, out.join("weights")).unwrap();
    // If the file were read, the damage would be noticed.
    flip_bit_keeping_mtime(&file);
    let (_, taken) = space.store.commit(&out, &Anything).unwrap();
    assert_eq!(taken.files["weights"], manifest.files["weights"]);
}

#[test]
fn a_file_with_other_hard_links_is_copied() {
    let space = TestSpace::new();
    let theirs = space.folder.path().join("theirs");
    fs::write(&theirs, b"mine to change").unwrap();
    let out = space.out(&[]);
    fs::hard_link(&theirs, out.join("a")).unwrap();
    let (digest, _) = space.store.commit(&out, &Anything).unwrap();
    writable(&theirs);
    fs::write(&theirs, b"changed").unwrap();
    assert_eq!(space.store.presence(&digest).unwrap(), Presence::Intact);
    assert_eq!(fs::read(space.store.artifact_folder(&digest).join("a")).unwrap(), b"mine to change");
}

#[test]
fn an_output_on_another_file_system_is_copied() {
    let Ok(elsewhere) = tempfile::tempdir_in("/dev/shm") else { return };
    let space = TestSpace::new();
    fs::write(elsewhere.path().join("a"), b"from afar").unwrap();
    let (digest, _) = space.store.commit(elsewhere.path(), &Anything).unwrap();
    assert_eq!(space.store.presence(&digest).unwrap(), Presence::Intact);
    assert!(verify(&space.store).unwrap().is_intact());
}

#[test]
fn a_blob_without_links_left_is_copied() {
    let space = TestSpace::new();
    let (_, manifest) = space.commit(&[("a", b"popular")]);
    let blob = space.store.blob(&manifest.files["a"].digest);
    let links = space.folder.path().join("links");
    fs::create_dir(&links).unwrap();
    // 65,000 on ext4; on a file system without such a limit there is nothing to test.
    if !(0..70_000).any(|i| fs::hard_link(&blob, links.join(i.to_string())).is_err()) {
        return;
    }
    let (digest, _) = space.commit(&[("b", b"popular")]);
    assert_eq!(space.store.presence(&digest).unwrap(), Presence::Intact);
    let copy = fs::metadata(space.store.artifact_folder(&digest).join("b")).unwrap();
    assert_ne!(copy.ino(), fs::metadata(&blob).unwrap().ino());
}

/// Accepts any folder; executable bits and empty folders are content.
struct Tree;

impl ArtifactType for Tree {
    fn name(&self) -> &'static str {
        "Tree"
    }

    fn about(&self) -> &'static str {
        "any files"
    }

    fn keeps_tree(&self) -> bool {
        true
    }

    fn check(&self, _: &Path) -> Result<Facts> {
        Ok(Facts::default())
    }

    fn preview(&self, _: &Path, _: usize) -> Result<String> {
        Ok(String::new())
    }
}

#[test]
fn a_tree_keeps_executable_bits_and_empty_folders() {
    let space = TestSpace::new();
    let out = space.out(&[("run.sh", b"echo"), ("copy", b"echo"), ("sub/x", b"1")]);
    fs::create_dir_all(out.join("sub/empty/inner")).unwrap();
    fs::set_permissions(out.join("run.sh"), fs::Permissions::from_mode(0o755)).unwrap();
    let (digest, manifest) = space.store.commit(&out, &Tree).unwrap();
    let folder = space.store.artifact_folder(&digest);
    let mode = |name: &str| fs::metadata(folder.join(name)).unwrap().permissions().mode() & 0o777;
    assert_eq!([mode("run.sh"), mode("copy"), mode("sub/x")], [0o555, 0o444, 0o444]);
    assert!(folder.join("sub/empty/inner").is_dir());
    assert_eq!(manifest.folders.iter().collect::<Vec<_>>(), ["sub/empty/inner"]);
    for store in [&space.store, &space.reopen()] {
        assert_eq!(store.presence(&digest).unwrap(), Presence::Intact);
    }
    fs::remove_dir(folder.join("sub/empty/inner")).unwrap();
    assert_eq!(space.store.presence(&digest).unwrap(), Presence::Damaged { file: "sub/empty/inner".into() });
    // For other types they are not content: some file systems set executable bits by themselves.
    let plain = space.out(&[("run.sh", b"echo")]);
    let without = space.store.commit(&plain, &Anything).unwrap().0;
    fs::create_dir(plain.join("empty")).unwrap();
    fs::set_permissions(plain.join("run.sh"), fs::Permissions::from_mode(0o755)).unwrap();
    assert_eq!(space.store.commit(&plain, &Anything).unwrap().0, without);
}

#[test]
fn an_output_folder_that_is_a_link_is_refused_and_its_target_is_left_alone() {
    let space = TestSpace::new();
    let data = space.out(&[("mine", b"data")]);
    let out = space.folder.path().join("out");
    symlink(&data, &out).unwrap();
    let error = space.store.commit(&out, &Anything).unwrap_err();
    assert!(
        error.blame == Blame::User && error.message.ends_with("the output folder was replaced by a link"),
        "{error}"
    );
    let file = fs::metadata(data.join("mine")).unwrap();
    assert_eq!((file.nlink(), file.permissions().readonly()), (1, false));
}

#[test]
fn sparse_files_and_huge_metrics_are_refused() {
    let space = TestSpace::new();
    let out = space.out(&[("x", b"1")]);
    let file = fs::File::options().write(true).open(out.join("x")).unwrap();
    file.set_len((3 << 30) + 1).unwrap();
    // Data between holes, and at the end.
    file.write_all_at(b"1", 1 << 30).unwrap();
    file.write_all_at(b"1", 3 << 30).unwrap();
    let error = space.store.commit(&out, &Anything).unwrap_err();
    assert!(error.message.ends_with("x: the file is sparse, with 2 GiB of holes"), "{error}");
    let metrics = format!("{{\"{}\": 1}}", "x".repeat(4 << 20));
    let out = space.out(&[("metrics.json", metrics.as_bytes())]);
    let error = space.store.commit(&out, &Demanding).unwrap_err();
    assert!(error.message.ends_with("metrics.json: the file is larger than 4 MiB"), "{error}");
}
