//! Models and data from a hub, through the real binary, with a server on this machine as the hub.

mod space;

use std::path::{Path, PathBuf};
use std::process::Output;
use std::time::{Duration, Instant};

use space::hub::{FakeServer, Response};
use space::{TestSpace, repository, text};

const OLD: &str = "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa";
const NEW: &str = "bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb";
const FILES: [&str; 3] = ["config.json", "model.safetensors", "tokenizer.json"];

/// A file of the model `tinytldr-s`.
fn asset(file: &str) -> Vec<u8> {
    let folder = if file == "tokenizer.json" { "assets/tinytldr" } else { "assets/tinytldr-s" };
    std::fs::read(repository(folder).join(file)).expect("the assets are part of the repository")
}

/// A hub with the model as `a/b`, and a space with a pipeline that imports it.
fn hub() -> (TestSpace, FakeServer) {
    let hub = FakeServer::new();
    put_model(&hub, "main", OLD);
    (fresh_space(), hub)
}

fn fresh_space() -> TestSpace {
    let space = TestSpace::new();
    space.write("p.yaml", "version: 1\nstages:\n  base: { uses: model.import, with: { hub: { id: a/b } } }\n");
    space
}

fn put_model(hub: &FakeServer, revision: &str, commit: &str) {
    let files = FILES.map(|file| (file, asset(file)));
    hub.put_repository("models", "a/b", revision, commit, &files.each_ref().map(|(name, body)| (*name, &body[..])));
}

fn at(commit: &str, file: &str) -> String {
    format!("/a/b/resolve/{commit}/{file}")
}

fn run(space: &TestSpace, hub: &FakeServer, token: Option<&str>, more: &[&str]) -> Output {
    let mut command = space.command(&[&["run", "p.yaml"], more].concat());
    command.env("HF_ENDPOINT", &hub.address).env_remove("HF_TOKEN");
    if let Some(token) = token {
        command.env("HF_TOKEN", token);
    }
    command.output().expect("the binary starts")
}

#[track_caller]
fn assert_imported(out: &Output, space: &TestSpace) {
    assert!(out.status.success(), "{}{}", text(&out.stdout), text(&out.stderr));
    let folder = space.json(&["path", "p.yaml", "base", "--json"]);
    let folder = Path::new(folder["folder"].as_str().expect("a path"));
    for file in FILES {
        assert_eq!(std::fs::read(folder.join(file)).expect("a file of the model"), asset(file), "{file}");
    }
}

#[track_caller]
fn assert_refused(out: &Output, code: i32, parts: &[&str]) {
    let stderr = text(&out.stderr);
    assert_eq!(out.status.code(), Some(code), "{stderr}");
    for part in parts {
        assert!(stderr.contains(part), "`{part}` is not in: {stderr}");
    }
}

/// All files below `folder`.
fn files(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
    entries.flat_map(|path| if path.is_dir() { files(&path) } else { vec![path] }).collect()
}

/// The partial download of an incomplete file.
fn part(space: &TestSpace, name: &str) -> Option<PathBuf> {
    files(&space.path("cache")).into_iter().find(|path| path.ends_with(Path::new("parts").join(name)))
}

#[test]
fn a_redirect_is_followed_and_the_token_stays_with_the_hub() {
    let (space, hub) = hub();
    let store = FakeServer::new();
    let weights = asset("model.safetensors");
    store.put("/blob?signature=x", Response::of(weights.clone()));
    hub.put(
        &at(OLD, "model.safetensors"),
        Response::redirect_to(format!("{}/blob?signature=x", store.address), &weights),
    );
    // Redirect small files to another path on the same host, as hubs do.
    hub.put("/cache/config", Response::in_git(&asset("config.json")));
    hub.change(&at(OLD, "config.json"), |response| {
        *response = Response { status: 307, headers: vec![("location", "/cache/config".into())], ..Response::of("") };
    });
    for path in hub_pages() {
        hub.change(&path, |response| response.token = Some("hf_secret"));
    }
    let out = run(&space, &hub, Some("hf_secret"), &[]);
    assert_imported(&out, &space);
    assert!(
        hub.requests().iter().all(|request| request.token.as_deref() == Some("Bearer hf_secret")),
        "{:?}",
        hub.requests()
    );
    assert_eq!(store.requests().len(), 1);
    assert_eq!(store.requests()[0].token, None);
    let holds_the_token =
        |path: &PathBuf| text(&std::fs::read(path).expect("a file of the store")).contains("hf_secret");
    assert_eq!(files(&space.path("cache")).into_iter().find(holds_the_token), None);

    // Existing files are not requested again.
    let before = hub.requests().len();
    assert_imported(&run(&space, &hub, None, &[]), &space);
    assert_eq!(hub.requests().len(), before);
}

fn hub_pages() -> Vec<String> {
    let mut responses = FILES.map(|file| at(OLD, file)).to_vec();
    responses.extend(["/api/models/a/b/revision/main".to_owned(), "/cache/config".to_owned()]);
    responses
}

#[test]
fn a_download_that_is_cut_goes_on_where_it_stopped() {
    let (space, hub) = hub();
    let weights = at(OLD, "model.safetensors");
    // The third attempt receives nothing; the stage is then retried after a second.
    hub.change(&weights, |response| response.cut_after = vec![1000, 2000, 0]);
    assert_imported(&run(&space, &hub, None, &[]), &space);
    let range = |start: &str| Some(format!("bytes={start}-"));
    assert_eq!(hub.ranges(&weights), [None, range("1000"), range("3000"), range("3000")]);
    assert_eq!(hub.ranges(&at(OLD, "config.json")).len(), 1);
}

#[test]
fn a_server_without_ranges_is_asked_for_the_whole_file() {
    let (space, hub) = hub();
    hub.change(&at(OLD, "model.safetensors"), |response| {
        (response.cut_after, response.supports_ranges) = (vec![1000], false);
    });
    assert_imported(&run(&space, &hub, None, &[]), &space);
}

#[test]
fn a_killed_run_leaves_what_came_and_the_next_goes_on_at_the_same_commit() {
    let (space, hub) = hub();
    let weights = at(OLD, "model.safetensors");
    hub.change(&weights, |response| response.stall_after = Some(5000));
    let mut child =
        space.command(&["run", "p.yaml"]).env("HF_ENDPOINT", &hub.address).spawn().expect("the binary starts");
    let came =
        || part(&space, "model.safetensors").and_then(|part| part.metadata().ok()).is_some_and(|m| m.len() == 5000);
    let started = Instant::now();
    while !came() {
        assert!(started.elapsed() < Duration::from_secs(60), "the download did not start");
        std::thread::sleep(Duration::from_millis(20));
    }
    child.kill().and_then(|()| child.wait()).expect("it runs until it is killed");

    // The branch moves meanwhile: files of two commits must not be mixed.
    put_model(&hub, "main", NEW);
    hub.change(&weights, |response| response.stall_after = None);
    assert_imported(&run(&space, &hub, None, &[]), &space);
    assert_eq!(hub.ranges(&weights), [None, Some("bytes=5000-".to_owned())]);
    assert!(!hub.requests().iter().any(|request| request.path.contains(NEW)));

    // The record is reused while the branch has moved; `--force` resolves the branch again.
    assert_imported(&run(&space, &hub, None, &[]), &space);
    assert!(!hub.requests().iter().any(|request| request.path.contains(NEW)));
    let out = run(&space, &hub, None, &["--force", "base"]);
    assert_imported(&out, &space);
    assert!(text(&out.stderr).contains(&format!("`a/b`: revision `main` is commit {NEW}")), "{}", text(&out.stderr));
    assert_eq!(hub.ranges(&at(NEW, "model.safetensors")), [None]);
}

#[test]
fn bytes_that_are_not_what_the_hub_says_are_refused_and_removed() {
    let (space, hub) = hub();
    hub.change(&at(OLD, "tokenizer.json"), |response| response.body.push(b'\n'));
    let out = run(&space, &hub, None, &[]);
    assert_refused(&out, 3, &["file `tokenizer.json`", "expected git blob ", ", found git blob "]);

    put_model(&hub, "main", OLD);
    let store = FakeServer::new();
    let weights = asset("model.safetensors");
    let mut other = weights.clone();
    *other.last_mut().expect("it is not empty") ^= 1;
    store.put("/blob", Response::of(other));
    hub.put(&at(OLD, "model.safetensors"), Response::redirect_to(format!("{}/blob", store.address), &weights));
    let out = run(&space, &hub, None, &[]);
    assert_refused(&out, 3, &["`a/b`", "file `model.safetensors`", "expected sha256 ", ", found sha256 ", "removed"]);
    assert_eq!(part(&space, "model.safetensors"), None);
}

#[test]
fn a_part_with_wrong_bytes_is_downloaded_again() {
    let (space, hub) = hub();
    let weights = at(OLD, "model.safetensors");
    hub.change(&weights, |response| {
        response.cut_after = vec![4000];
        response.body[10] ^= 1;
    });
    let mut child = space.command(&["run", "p.yaml"]).env("HF_ENDPOINT", &hub.address).spawn().expect("it starts");
    let started = Instant::now();
    while hub.ranges(&weights).len() < 2 {
        assert!(started.elapsed() < Duration::from_secs(60), "{:?}", hub.requests());
        std::thread::sleep(Duration::from_millis(5));
    }
    hub.change(&weights, |response| response.body[10] ^= 1);
    assert!(child.wait().expect("it ends").success());
    assert_eq!(hub.ranges(&weights), [None, Some("bytes=4000-".to_owned()), None]);
}

#[test]
fn refusals_of_the_hub_come_with_a_hint() {
    let (space, hub) = hub();
    let refuse = |path: &str, status| hub.put(path, Response { status, ..Response::of("") });
    let info = "/api/models/a/b/revision/main";
    refuse(info, 401);
    assert_refused(&run(&space, &hub, None, &[]), 3, &["model `a/b` (revision `main`)", "401", "set HF_TOKEN"]);
    assert_refused(&run(&space, &hub, Some("hf_old"), &[]), 3, &["401", "refuses this token"]);
    refuse(info, 403);
    assert_refused(&run(&space, &hub, Some("hf_old"), &[]), 3, &["403", "terms must be accepted"]);
    refuse(info, 404);
    assert_refused(
        &run(&space, &hub, None, &[]),
        3,
        &["model `a/b` (revision `main`)", "404", "check the repository, the revision"],
    );
    put_model(&hub, "main", OLD);
    refuse(&at(OLD, "tokenizer.json"), 404);
    assert_refused(&run(&space, &hub, None, &[]), 3, &["revision `main`, file `tokenizer.json`", "404"]);
    hub.put(info, Response::of("{\"sha\":\"main\"}"));
    assert_refused(&run(&space, &hub, None, &["--force", "base"]), 3, &["does not tell its commit"]);
    hub.put_repository("models", "a/b", "main", OLD, &[("config.json", b"{}")]);
    assert_refused(&run(&space, &hub, None, &["--force", "base"]), 2, &["a/b: file `tokenizer.json` is missing"]);
    let out = run(&space, &hub, None, &["--set", "stages.base.with.hub.id=a/../b"]);
    assert_refused(&out, 2, &["is no repository of a hub"]);
}

#[test]
fn errors_of_the_hub_name_what_they_refer_to() {
    let info = "/api/models/a/b/revision/main";
    let file = at(OLD, "tokenizer.json");
    let check = |path: &str, (status, code): (u16, &str), token: Option<&str>, parts: &[&str]| {
        let (space, hub) = hub();
        hub.put(path, Response { status, headers: vec![("x-error-code", code.into())], ..Response::of("") });
        let out = run(&space, &hub, token, &[]);
        assert_refused(&out, 3, parts);
        assert_refused(&out, 3, &[&status.to_string()]);
        assert!(!text(&out.stderr).contains("needs a token"), "{}", text(&out.stderr));
    };
    let none = "no such repository, or it is private";
    check(info, (401, "RepoNotFound"), None, &["`a/b`", none, "check the id `a/b`", "set HF_TOKEN to"]);
    check(info, (404, "RepoNotFound"), Some("hf_x"), &[none, "HF_TOKEN is set: it must"]);
    let gated = "the repository is gated";
    check(info, (401, "GatedRepo"), None, &[gated, "accept its terms at ", "/a/b; then set HF_TOKEN"]);
    check(info, (403, "GatedRepo"), Some("hf_x"), &[gated, "of the account that accepted them"]);
    check(info, (404, "RevisionNotFound"), None, &["revision `main`", "no such revision"]);
    check(&file, (404, "EntryNotFound"), None, &["file `tokenizer.json`", "the revision has no such file"]);
    // An unknown token gives no error code, only a message.
    let (space, hub) = hub();
    let headers = vec![("x-error-message", "Invalid username or password.".into())];
    hub.put(info, Response { status: 401, headers, ..Response::of("") });
    assert_refused(
        &run(&space, &hub, Some("hf_old"), &[]),
        3,
        &["401", ": Invalid username or password.", "refuses this token"],
    );
}

#[test]
fn safetensors_are_downloaded_and_pickles_are_not() {
    let (space, hub) = hub();
    let files = FILES.map(|file| (file, asset(file)));
    let mut files: Vec<(&str, &[u8])> = files.iter().map(|(name, body)| (*name, &body[..])).collect();
    files.extend([("pytorch_model.bin", &b"pickle"[..]), ("flax_model.msgpack", b"x"), ("README.md", b"x")]);
    hub.put_repository("models", "a/b", "main", OLD, &files);
    assert_imported(&run(&space, &hub, None, &[]), &space);
    assert_eq!(hub.requests().len(), 1 + FILES.len(), "{:?}", hub.requests());
}

#[test]
fn an_index_of_shards_cannot_lead_out_of_the_repository() {
    for (file, code, what) in [
        ("../../evil", 2, "a/b/model.safetensors.index.json: puts tensor `t` into `../../evil`"),
        ("/etc/passwd", 2, "expected a file in its own folder"),
        ("absent.safetensors", 2, "a/b: file `absent.safetensors` is missing"),
    ] {
        let (space, hub) = hub();
        let index = format!("{{\"weight_map\":{{\"t\":\"{file}\"}}}}");
        let (config, tokenizer) = (asset("config.json"), asset("tokenizer.json"));
        let files: [(&str, &[u8]); 3] = [
            ("config.json", &config),
            ("model.safetensors.index.json", index.as_bytes()),
            ("tokenizer.json", &tokenizer),
        ];
        hub.put_repository("models", "a/b", "main", OLD, &files);
        assert_refused(&run(&space, &hub, None, &[]), code, &[what]);
        assert!(!hub.requests().iter().any(|request| request.path.contains("evil") || request.path.contains("passwd")));
    }
}

#[test]
fn a_data_set_comes_from_the_hub_too() {
    let space = TestSpace::new();
    let pipeline = format!(
        "version: 1\nstages:\n  posts: {{ uses: dataset.tldr, with: {{ hub: {{ id: o/posts, revision: {OLD}, files: \"data/*.jsonl\" }} }} }}\n"
    );
    space.write("p.yaml", &pipeline);
    let hub = FakeServer::new();
    let row = b"{\"id\":\"a\",\"subreddit\":\"tifu\",\"title\":\"t\",\"post\":\"p\",\"summary\":\"s\"}\n";
    hub.put_repository("datasets", "o/posts", "main", OLD, &[("README.md", b"x"), ("data/a.jsonl", row)]);
    let out = run(&space, &hub, None, &[]);
    assert!(out.status.success(), "{}", text(&out.stderr));
    assert_eq!(space.json(&["show", "p.yaml", "posts", "--json"])["rows"]["posts.parquet"], 1);
    assert!(!hub.requests().iter().any(|request| request.path.contains("README")));
}

stages::table! {
    struct PromptPair { prompt: String, chosen: String, rejected: String }
}

#[test]
fn peoples_comparisons_come_from_the_splits_of_a_data_set_that_are_asked_for() {
    let space = TestSpace::new();
    let pipeline = format!(
        "version: 1\nstages:\n  people:\n    uses: annotate.human\n    with: {{ labels: majority, hub: {{ id: o/comparisons, revision: {OLD}, files: \"data/train*\" }} }}\n"
    );
    space.write("p.yaml", &pipeline);
    let row = |post: &str, chosen: &str, rejected: &str| PromptPair {
        prompt: format!("SUBREDDIT: r/tifu\nTITLE: T\nPOST: {post}"),
        chosen: format!("TL;DR:  {chosen}"),
        rejected: format!("TL;DR:  {rejected}"),
    };
    let file = space.path("train.parquet");
    stages::table::write(&file, [row("I fell.", "fell", "stood"), row("I sang.", "song", "cake")]).expect("a table");
    let train = std::fs::read(&file).expect("the table is there");
    let hub = FakeServer::new();
    let files: [(&str, &[u8]); 3] =
        [("README.md", b"x"), ("data/test-00000.parquet", b"not asked for"), ("data/train-00000.parquet", &train)];
    hub.put_repository("datasets", "o/comparisons", "main", OLD, &files);
    let out = run(&space, &hub, None, &[]);
    assert!(out.status.success(), "{}", text(&out.stderr));
    let shown = space.json(&["show", "p.yaml", "people", "--json"]);
    assert_eq!((&shown["type"], &shown["rows"]["preferences.parquet"]), (&"Preferences".into(), &2.into()));
    assert!(!hub.requests().iter().any(|request| request.path.contains("README") || request.path.contains("test-")));
}
