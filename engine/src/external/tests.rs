use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use proptest::prelude::*;
use serde_json::json;
use tempfile::TempDir;

use super::*;
use crate::error::Blame;

/// A folder with empty files; a name that ends in ` -> TARGET` is a symlink.
fn folder(names: &[&str]) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    fill(folder.path(), names);
    folder
}

fn fill(root: &Path, names: &[&str]) {
    for name in names {
        let (name, link) = name.split_once(" -> ").map_or((*name, None), |(name, target)| (name, Some(target)));
        let path = root.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        match link {
            Some(target) => symlink(target, path).unwrap(),
            None => fs::write(path, "").unwrap(),
        }
    }
}

fn files(root: &Path, value: Value) -> ExternalInput {
    ExternalInput::Files(serde_json::from_value(value).unwrap()).from_base(root)
}

/// The files that `written` names in a folder, relative to it.
fn read(root: &Path, written: Value) -> Result<Vec<String>> {
    let listing = walk::list(&files(root, written), None)?;
    let relative = |path: PathBuf| path.strip_prefix(root).unwrap().to_str().unwrap().to_owned();
    Ok(listing.files().into_iter().map(relative).collect())
}

#[test]
fn one_path_and_a_list_normalise_alike_and_read_back() {
    let one: InputFiles = serde_json::from_value(json!("a.jsonl")).unwrap();
    let many: InputFiles = serde_json::from_value(json!(["a.jsonl"])).unwrap();
    assert_eq!(one, many);
    let normal = serde_json::to_value(&one).unwrap();
    assert_eq!(normal, json!({ "$files": ["a.jsonl"] }));
    assert_eq!(ExternalInput::from_value(&normal), Some(ExternalInput::Files(one)));
    let path: InputPath = serde_json::from_value(json!("m")).unwrap();
    assert_eq!(ExternalInput::from_value(&serde_json::to_value(&path).unwrap()), Some(ExternalInput::Path(path)));
    for other in [json!("a.jsonl"), json!({ "$path": "a", "b": 1 }), json!({ "$files": ["a"], "b": 1 }), json!({})] {
        assert_eq!(ExternalInput::from_value(&other), None, "{other}");
    }
    assert!(serde_json::from_value::<InputFiles>(json!([""])).is_err());
}

#[test]
fn a_kind_sees_files_only_after_they_are_listed() {
    let folder = folder(&["b.jsonl", "a.jsonl"]);
    let params = json!({ "n": 1, "deep": [{ "files": files(folder.path(), json!("*.jsonl")).to_value() }] });
    let of = |params: &Value| serde_json::from_value::<InputFiles>(params["deep"][0]["files"].clone()).unwrap();
    assert_eq!(of(&params).files().unwrap_err().blame, Blame::Internal);
    let listed = with_listed_files(&params, None).unwrap();
    assert_eq!(of(&listed).files().unwrap(), [folder.path().join("a.jsonl"), folder.path().join("b.jsonl")]);
    assert_eq!(listed["n"], 1);
    assert_eq!(InputFiles::default().files().unwrap(), [""; 0].map(PathBuf::from));
}

#[test]
fn files_folders_and_patterns_stand_for_files_in_a_stated_order() {
    let names = ["b.jsonl", "a.jsonl", "sub/c.jsonl", "sub/deep/d.jsonl", "sub/deep/e.txt", "other/f.jsonl"];
    let folder = folder(&names);
    let read = |written| read(folder.path(), written).unwrap();
    assert_eq!(read(json!("b.jsonl")), ["b.jsonl"]);
    assert_eq!(read(json!(["b.jsonl", "./a.jsonl"])), ["b.jsonl", "a.jsonl"]);
    assert_eq!(read(json!("sub")), ["sub/c.jsonl", "sub/deep/d.jsonl", "sub/deep/e.txt"]);
    assert_eq!(read(json!("*.jsonl")), ["a.jsonl", "b.jsonl"]);
    assert_eq!(read(json!("[!b].jsonl")), ["a.jsonl"]);
    assert_eq!(read(json!("?ub/*.jsonl")), ["sub/c.jsonl"]);
    let all = ["a.jsonl", "b.jsonl", "other/f.jsonl", "sub/c.jsonl", "sub/deep/d.jsonl"];
    assert_eq!(read(json!("**/*.jsonl")), all);
    assert_eq!(read(json!("**/**/*.jsonl")), all);
    assert_eq!(read(json!("sub/**")), ["sub/c.jsonl", "sub/deep/d.jsonl", "sub/deep/e.txt"]);
    assert_eq!(read(json!("**/deep/../*.jsonl")), ["sub/deep/../c.jsonl"]);
    assert_eq!(read(json!("**/deep/*.jsonl")), ["sub/deep/d.jsonl"]);
    assert_eq!(read(json!(["sub/../other/*", "other"])), ["sub/../other/f.jsonl"]);
    let matching = json!({ "$files": ["sub", "a.jsonl"], "matching": "*.txt" });
    assert_eq!(read(matching), ["sub/deep/e.txt", "a.jsonl"], "`matching` is for folders");
}

#[test]
fn only_a_path_written_as_a_pattern_is_expanded() {
    let parent = folder(&["run [v1]/a.jsonl", "run v/a.jsonl", "run [v1]/x[1].jsonl", "run [v1]/x1.jsonl"]);
    let base = parent.path().join("run [v1]");
    assert_eq!(read(&base, json!("a.*")).unwrap(), ["a.jsonl"]);
    assert_eq!(read(&base, json!("x[1].jsonl")).unwrap(), ["x[1].jsonl"], "what exists is itself");
    assert_eq!(read(parent.path(), json!("run [v1]/*1.jsonl")).unwrap(), ["run [v1]/x1.jsonl"]);
    assert_eq!(read(parent.path(), json!("run [v]/a.jsonl")).unwrap(), ["run v/a.jsonl"]);
    assert_eq!(read(parent.path(), json!("run?[[]v1]/a.jsonl")).unwrap(), ["run [v1]/a.jsonl"]);
    // A path is literal, whatever its folder is called.
    let path = ExternalInput::Path(InputPath("*.jsonl".into())).from_base(&base);
    assert!(walk::list(&path, None).unwrap_err().message.ends_with("*.jsonl: no such file or folder"));
    fill(&base, &["sub/*", "sub/y"]);
    assert_eq!(read(&base, json!("sub")).unwrap(), ["sub/*", "sub/y"], "a file named `*` hides no other");
}

#[test]
fn hidden_names_are_left_out_unless_the_path_names_the_dot() {
    let folder = folder(&[
        "data/a.jsonl",
        "data/.ipynb_checkpoints/a.jsonl",
        "data/._a.jsonl",
        "data/.DS_Store",
        "data/.#a.jsonl -> nobody@host.1",
        ".cache/b.jsonl",
    ]);
    let read = |written| read(folder.path(), written).unwrap();
    for written in [json!("data"), json!("data/*.jsonl"), json!("**/*.jsonl"), json!("data/**"), json!("data/*")] {
        assert_eq!(read(written.clone()), ["data/a.jsonl"], "{written}");
    }
    assert_eq!(read(json!("data/._*")), ["data/._a.jsonl"]);
    assert_eq!(read(json!(".cache")), [".cache/b.jsonl"]);
    assert_eq!(read(json!("**/.ipynb_checkpoints/*.jsonl")), ["data/.ipynb_checkpoints/a.jsonl"]);
    assert_eq!(read(json!(".c*/*")), [".cache/b.jsonl"]);
}

#[test]
fn loops_of_links_end_and_each_real_file_is_read_once() {
    let folder = folder(&[
        "data/v1/a.jsonl",
        "data/v1/loop -> ..",
        "data/v2/b.jsonl",
        "data/v2/one -> ../v1",
        "data/v2/two -> ../v1",
        "data/all.jsonl -> v1/a.jsonl",
        "data/latest -> v2",
    ]);
    let read = |written| read(folder.path(), written).unwrap();
    let both = ["data/v1/a.jsonl", "data/v2/b.jsonl"];
    for written in [json!("data"), json!("data/**/*.jsonl"), json!(["data/v*/*", "data/**/a.jsonl", "data"])] {
        assert_eq!(read(written.clone()), both, "{written}");
    }
    assert_eq!(read(json!("data/latest/*.jsonl")), ["data/latest/b.jsonl"]);
    assert_eq!(read(json!(["data/v1/a.jsonl", "data/*/*.jsonl"])), both);
    assert_eq!(read(json!(["data/all.jsonl", "data/v1/a.jsonl"])), ["data/v1/a.jsonl"]);
    assert_eq!(read(json!(["data/v1/a.jsonl", "data/v1/../v1/a.jsonl"])), ["data/v1/a.jsonl"]);
}

#[test]
fn the_store_is_left_out_and_cannot_be_an_input() {
    let folder = folder(&["a.jsonl", "cache/artifacts/x/b.jsonl", "cache/runs/c.jsonl", "link -> cache"]);
    let root = folder.path();
    let store = root.join("cache");
    let list = |written| walk::list(&files(root, written), Some(&store));
    for written in [json!("**/*.jsonl"), json!("."), json!(["a.jsonl", "."])] {
        let listing = list(written).unwrap();
        assert_eq!(listing.files().iter().filter(|path| path.ends_with("a.jsonl")).count(), 1);
        assert_eq!(listing.files().len(), 1);
    }
    assert!(list(json!("**/*.jsonl")).unwrap().store_excluded);
    assert!(!list(json!("*.jsonl")).unwrap().store_excluded);
    for written in
        [json!("cache"), json!("link"), json!("cache/**/*.jsonl"), json!("cache/runs"), json!("cache/artifacts/*/*")]
    {
        let error = list(written.clone()).unwrap_err();
        assert!(error.blame == Blame::User && error.message.contains("store"), "{written}: {error}");
    }
    assert_eq!(list(json!("cache/artifacts/x")).unwrap().files().len(), 1, "an artifact never changes");
    let none = list(json!("**/b.jsonl")).unwrap_err();
    assert!(none.message.ends_with("**/b.jsonl: no file outside the store matches"), "{none}");
}

#[test]
fn a_path_without_a_file_is_a_user_error_that_names_it() {
    let folder = folder(&["a.jsonl", "broken.jsonl -> gone", "self -> self", "sub/x.txt"]);
    fs::create_dir(folder.path().join("empty")).unwrap();
    rustix::fs::mkfifoat(rustix::fs::CWD, folder.path().join("pipe"), 0o600.into()).unwrap();
    for (written, expected) in [
        (json!("no-such-file"), "no-such-file: no such file or folder"),
        (json!("a.jsonl/x"), "a.jsonl/x: no such file or folder"),
        (json!("*.parquet"), "*.parquet: no file matches"),
        (json!("a.jsonl/*.x"), "a.jsonl/*.x: no file matches"),
        (json!("empty"), "empty: no file"),
        (json!("pipe"), "pipe: expected a file or a folder"),
        (json!("b*.jsonl"), "broken.jsonl: the link has no target: No such file or directory (os error 2)"),
        (json!("s*f"), "self: the link has no target: Too many levels of symbolic links (os error 40)"),
        (json!("[a.jsonl"), "[a.jsonl: invalid pattern: invalid range pattern"),
        (json!("sub/a**b"), "sub/a**b: invalid pattern: recursive wildcards must form a single path component"),
        (json!({ "$files": ["sub"], "matching": "*.gz" }), "sub: no file matches `*.gz`"),
    ] {
        let error = read(folder.path(), written.clone()).unwrap_err();
        assert!(error.blame == Blame::User && error.message.ends_with(expected), "{written}: {error}");
    }
    assert_eq!(read(folder.path(), json!("pip[e]*")).unwrap_err().blame, Blame::User, "a pipe is no file");
}

/// Files and links in folders `a` to `c`; a link leads to `.`, to `..` or to a path below the root.
fn trees() -> impl Strategy<Value = Vec<String>> {
    let name = prop::sample::select(vec!["a", "b", "c"]);
    let path = prop::collection::vec(name, 0..4).prop_map(|parts| parts.join("/"));
    let leaf = prop::sample::select(vec!["x", "y", "l -> .", "l -> ..", "l -> a", "m -> b", "m -> a/x"]);
    prop::collection::vec((path, leaf).prop_map(|(path, leaf)| format!("./{path}/{leaf}")), 1..12)
}

proptest! {
    #[test]
    fn a_folder_holds_each_real_file_once(tree in trees()) {
        let outer = tempfile::tempdir().unwrap();
        // Nested, so that a link out of the root (`..`) leads back into it.
        let root = outer.path().join("1/2");
        fill(&root, &["a/x", "b/y"]);
        for name in &tree {
            let (path, target) = name.split_once(" -> ").map_or((name.as_str(), None), |(path, to)| (path, Some(to)));
            let path = root.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            match target {
                // The name may exist already.
                Some(dots @ ("." | "..")) => drop(symlink(dots, &path)),
                Some(target) => drop(symlink(root.join(target), &path)),
                None => fs::write(&path, "").unwrap(),
            }
        }
        let found = walk::list(&files(&root, json!(".")), None).unwrap().files();
        let real: std::collections::BTreeSet<PathBuf> = found.iter().map(|path| path.canonicalize().unwrap()).collect();
        prop_assert_eq!(real.len(), found.len());
        for name in tree.iter().filter(|name| !name.contains(" -> ")) {
            prop_assert!(real.contains(&root.join(name).canonicalize().unwrap()), "{} is missing", name);
        }
        let pattern = walk::list(&files(&root, json!("**/*")), None).unwrap();
        prop_assert_eq!(pattern.files(), found);
    }
}
