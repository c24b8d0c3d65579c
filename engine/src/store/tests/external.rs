use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::time::{Duration, SystemTime};

use serde_json::json;

use super::{TestSpace, flip_bit_keeping_mtime};
use crate::error::Result;
use crate::external::{ExternalInput, InputPath};
use crate::names::Digest;
use crate::store::Store;
use crate::store::files::Stat;

fn of(store: &Store, path: &Path) -> Digest {
    store.content_of(&ExternalInput::Path(InputPath(path.to_owned()))).unwrap().digest
}

/// The content of the files that `written` names in `folder`.
fn of_files(store: &Store, folder: &Path, written: serde_json::Value) -> Result<Digest> {
    let files = ExternalInput::Files(serde_json::from_value(written).unwrap());
    store.content_of(&files.from_base(folder)).map(|content| content.digest)
}

#[test]
fn a_files_digest_depends_on_its_bytes() {
    let space = TestSpace::new();
    let path = space.folder.path().join("data.jsonl");
    fs::write(&path, b"one").unwrap();
    assert_eq!(of(&space.store, &path), Digest::of(b"one"));
    assert_eq!(of_files(&space.store, space.folder.path(), json!("data.jsonl")).unwrap(), Digest::of(b"one"));
    fs::write(&path, b"two").unwrap();
    assert_eq!(of(&space.store, &path), Digest::of(b"two"));
}

#[test]
fn a_change_that_keeps_size_and_mtime_is_seen() {
    let space = TestSpace::new();
    let folder = space.folder.path();
    let path = folder.join("first");
    let old = SystemTime::now() - Duration::from_secs(60);
    let write = |path: &Path, text: &str| {
        fs::write(path, text).unwrap();
        fs::File::options().write(true).open(path).unwrap().set_modified(old).unwrap();
    };
    write(&path, "Anna");
    assert_eq!(of(&space.store, &path), Digest::of(b"Anna"));
    // Programs that reset mtime (`cp -p`, `tar`, an editor): in place ...
    write(&path, "Jane");
    assert_eq!(of(&space.store, &path), Digest::of(b"Jane"));
    std::thread::sleep(Duration::from_millis(60));
    of(&space.store, &path);
    write(&path, "Mary");
    assert_eq!(of(&space.store, &path), Digest::of(b"Mary"));
    // ... and by renaming another file to this name.
    write(&folder.join("second"), "Lucy");
    fs::rename(folder.join("second"), &path).unwrap();
    assert_eq!(of(&space.store, &path), Digest::of(b"Lucy"));
    assert_eq!(of(&space.reopen(), &path), Digest::of(b"Lucy"));
}

#[test]
fn committing_a_link_to_a_store_file_leaves_that_file_alone() {
    let space = TestSpace::new();
    let digest = space.commit(&[("a", b"good")]).0;
    let file = space.store.artifact_folder(&digest).join("a");
    let params = json!({ "file": ExternalInput::Path(InputPath(file.clone())).to_value() });
    let before = space.store.input_stats(&params).unwrap();
    std::thread::sleep(Duration::from_millis(20));
    fs::hard_link(&file, space.folder.path().join("link")).unwrap();
    assert_eq!(space.store.input_stats(&params).unwrap(), before);
}

#[test]
fn an_old_file_is_read_once_and_a_recent_one_each_time() {
    let space = TestSpace::new();
    let path = space.folder.path().join("data");
    let known = |path: &Path| space.store.index.lookup(&Stat::of_input(&fs::metadata(path).unwrap())).unwrap();
    fs::write(&path, b"one").unwrap();
    // Written just now: a second write might not change its times.
    of(&space.store, &path);
    assert_eq!(known(&path), None);
    std::thread::sleep(Duration::from_millis(60));
    of(&space.store, &path);
    assert_eq!(known(&path), Some(Digest::of(b"one")));
    flip_bit_keeping_mtime(&path);
    assert_eq!(known(&path), None);
}

#[test]
fn a_folders_digest_depends_on_the_names_and_bytes_of_its_files() {
    let space = TestSpace::new();
    let of = |files: &[(&str, &[u8])]| of(&space.store, &space.out(files));
    let base = of(&[("a", b"1"), ("sub/b", b"2")]);
    assert_eq!(base, of(&[("sub/b", b"2"), ("a", b"1"), (".DS_Store", b"3"), (".git/config", b"4")]));
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
fn links_are_followed_and_each_name_counts() {
    let space = TestSpace::new();
    let plain = space.out(&[("a", b"1"), ("sub/b", b"2")]);
    let linked = space.out(&[]);
    symlink(plain.join("a"), linked.join("a")).unwrap();
    symlink(plain.join("sub"), linked.join("sub")).unwrap();
    let content = of(&space.store, &linked);
    assert_eq!(content, of(&space.store, &plain));
    // A second name for a file or folder changes the content, because readers may go by name.
    symlink("sub", linked.join("again")).unwrap();
    let again = of(&space.store, &linked);
    assert_ne!(again, content);
    fs::remove_file(linked.join("again")).unwrap();
    symlink("a", linked.join("c")).unwrap();
    assert!(![again, content].contains(&of(&space.store, &linked)));
    symlink(&linked, linked.join("loop")).unwrap();
    of(&space.store, &linked);
}

#[test]
fn a_patterns_digest_depends_on_the_paths_and_bytes_that_it_matches() {
    let space = TestSpace::new();
    let folder = space.folder.path().join("data");
    let write = |name: &str, text: &str| {
        let path = folder.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    };
    ["v1/b.jsonl", "v1/a.jsonl", "v1/notes.txt"].iter().for_each(|name| write(name, name));
    let content = || of_files(&space.store, &folder, json!("**/*.jsonl")).unwrap();
    let before = content();
    write("v1/notes.txt", "others");
    write("v1/.c.jsonl", "hidden");
    assert_eq!(content(), before);
    write("v1/c.jsonl", "");
    let more = content();
    assert_ne!(more, before);
    fs::rename(folder.join("v1"), folder.join("v2")).unwrap();
    assert_ne!(content(), more, "a folder within the pattern has another name");
    let all = of_files(&space.store, &folder, json!("v2")).unwrap();
    let some = json!({ "$files": ["v2"], "matching": "*.jsonl" });
    assert_ne!(of_files(&space.store, &folder, some.clone()).unwrap(), all);
    let before = of_files(&space.store, &folder, some.clone()).unwrap();
    write("v2/notes.txt", "others again");
    assert_eq!(of_files(&space.store, &folder, some).unwrap(), before, "a file that is not read does not count");
    let twice = json!(["v2/a.jsonl", "v2/a.jsonl"]);
    of_files(&space.store, &folder, twice).unwrap();
    assert!(of_files(&space.store, &folder, json!("*.parquet")).unwrap_err().message.contains("no file matches"));
}

#[test]
fn a_file_that_was_changed_and_changed_back_has_another_stat() {
    let space = TestSpace::new();
    let folder = space.folder.path();
    fs::write(folder.join("a"), "one").unwrap();
    let params = json!({ "deep": [ExternalInput::Path(InputPath(folder.join("a"))).to_value()] });
    let before = space.store.input_stats(&params).unwrap();
    assert_eq!(space.store.input_stats(&params).unwrap(), before);
    // The clock for file times ticks every few milliseconds.
    std::thread::sleep(Duration::from_millis(20));
    fs::write(folder.join("a"), "two").unwrap();
    fs::write(folder.join("a"), "one").unwrap();
    assert_ne!(space.store.input_stats(&params).unwrap(), before);
}
