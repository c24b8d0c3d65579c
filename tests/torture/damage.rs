//! Damage to every file of a store: a flipped byte, a file cut in half, an empty file, a deleted file.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::space::{Digests, Options, PIPELINE, Space, digests, told};

/// What is done to a file.
#[derive(Clone, Copy, Debug)]
enum Damage {
    Flip,
    Truncate,
    Empty,
    Delete,
    /// Another file with changed bytes in its place: links elsewhere keep the old ones.
    Replace,
}

const DAMAGES: [Damage; 5] = [Damage::Flip, Damage::Truncate, Damage::Empty, Damage::Delete, Damage::Replace];

/// More steps than are done when the training stage is killed.
const STEPS: [&str; 2] = ["--set", "stages.base.with.steps=60"];
/// A version whose last stage must read the artifacts.
const ANOTHER_END: [&str; 4] =
    ["--set", "stages.base.with.steps=60", "--set", "stages.end.with.params={another: true}"];

/// Damages one file of a store after the other, each in a copy: one file of each kind, or with `--all` every file.
/// No command may panic or give a wrong result, and after `verify --repair` a run gives the digests of an intact store.
pub fn damage(options: &Options) {
    let space = prepare();
    let [same, other] = [&STEPS[..], &ANOTHER_END].map(|arguments| Space::new(PIPELINE).complete(arguments));
    let files = files(&space.store_folder());
    let mut kinds: BTreeMap<String, PathBuf> = BTreeMap::new();
    for file in &files {
        kinds.entry(kind(file)).or_insert_with(|| file.clone());
    }
    let chosen: Vec<&PathBuf> = if options.all { files.iter().collect() } else { kinds.values().collect() };
    let cases: Vec<(&PathBuf, Damage)> = chosen.iter().flat_map(|file| DAMAGES.map(|damage| (*file, damage))).collect();
    let (next, refused) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let work = || {
        while let Some((file, damage)) = cases.get(next.fetch_add(1, Ordering::Relaxed)) {
            let mut random = StdRng::seed_from_u64(options.seed);
            let copy = copy(&space);
            spoil(&copy.store_folder().join(file), *damage, &mut random);
            let what = format!("{damage:?} of {} with --seed {}", file.display(), options.seed);
            if !survives(&copy, &what, &same, &other) {
                // Only the user knows whether a folder with another version is a store.
                assert_eq!(kind(file), "version", "{what}: no run works any more");
                refused.fetch_add(1, Ordering::Relaxed);
            }
        }
    };
    std::thread::scope(|scope| (0..4).for_each(|_| drop(scope.spawn(work))));
    println!(
        "  {} damages of {} files of {} kinds; {} made runs refuse the store, all others were repaired or harmless",
        cases.len(),
        chosen.len(),
        kinds.len(),
        refused.into_inner()
    );
}

/// A store with finished results, a pin, and a stage that was killed after a checkpoint.
fn prepare() -> Space {
    let space = Space::new(PIPELINE);
    space.complete(&["--until", "end", "--until", "tokenizer"]);
    let pin = space.temper(&["pin", "p.yaml", "end"]);
    assert!(pin.status.success(), "{}", told(&pin));
    let mut run = space.start(&[&STEPS[..], &["--until", "base"]].concat());
    let has_checkpoint = || files(&space.store_folder()).iter().any(|file| kind(file).contains("checkpoint.json"));
    while !has_checkpoint() {
        assert!(run.try_wait().expect("a child can be waited for").is_none(), "it ended without a checkpoint");
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    run.kill().expect("it is at work");
    run.wait().expect("a child can be waited for");
    space.wait_for_attempts();
    space
}

/// All files below a folder, relative to it, in order.
fn files(root: &Path) -> Vec<PathBuf> {
    let (mut found, mut open) = (Vec::new(), vec![root.to_owned()]);
    while let Some(folder) = open.pop() {
        for entry in fs::read_dir(&folder).into_iter().flatten().flatten() {
            match entry.file_type() {
                Ok(file_type) if file_type.is_dir() => open.push(entry.path()),
                _ => found.push(entry.path().strip_prefix(root).expect("it lies below").to_owned()),
            }
        }
    }
    found.sort();
    found
}

/// The path with the names that differ from store to store replaced.
fn kind(file: &Path) -> String {
    let replaced = |part: &str| {
        let (stem, rest) = part.split_once('.').unwrap_or((part, ""));
        let is_hash = stem.len() >= 62 && stem.bytes().all(|b| b.is_ascii_hexdigit());
        let is_name = ["attempt-", "20", "checkpoint-"].iter().any(|prefix| stem.starts_with(prefix));
        match stem {
            _ if is_hash || is_name || stem.len() == 2 => format!("*{rest}"),
            _ => part.to_owned(),
        }
    };
    let parts: Vec<String> = file.iter().map(|part| replaced(&part.to_string_lossy())).collect();
    match parts[0].as_str() {
        "artifacts" if parts.len() > 2 && parts[2] != "manifest.json" => "artifacts/*/…".to_owned(),
        _ => parts.join("/"),
    }
}

/// The same store elsewhere, with its links, times and pipeline.
fn copy(space: &Space) -> Space {
    let copy = Space::new(PIPELINE);
    let copied = Command::new("cp").arg("-a").arg(space.store_folder()).arg(copy.path()).status();
    assert!(copied.is_ok_and(|status| status.success()), "the store cannot be copied");
    copy
}

fn spoil(path: &Path, damage: Damage, random: &mut StdRng) {
    let bytes = fs::read(path).expect("the file can be read");
    let mut changed = bytes.clone();
    if let Some(last) = bytes.len().checked_sub(1) {
        changed[random.random_range(0..=last)] ^= 1 << random.random_range(0..8);
    }
    let _ = fs::set_permissions(path, fs::Permissions::from_mode(0o644));
    let done = match damage {
        Damage::Flip => fs::write(path, changed),
        Damage::Truncate => fs::write(path, &bytes[..bytes.len() / 2]),
        Damage::Empty => fs::write(path, ""),
        Damage::Delete => fs::remove_file(path),
        Damage::Replace => fs::remove_file(path).and_then(|()| fs::write(path, changed)),
    };
    done.expect("the file can be changed");
}

/// Checks every command on a damaged store; returns whether no run refused to work with it.
fn survives(space: &Space, what: &str, same: &Digests, other: &Digests) -> bool {
    let worked = Cell::new(true);
    for arguments in [
        &["plan", "p.yaml"][..],
        &["show", "p.yaml", "end"],
        &["runs"],
        &["pins"],
        &["du", "p.yaml"],
        &["gc", "p.yaml"],
        &["verify"],
    ] {
        let output = space.temper(arguments);
        assert!(matches!(output.status.code(), Some(0 | 2 | 3)), "{what}: {arguments:?}: {}", told(&output));
    }
    let run = |arguments: &[&str], expected: &Digests| {
        let output = space.run(arguments);
        match output.status.code() {
            Some(0) => assert_eq!(digests(&output), *expected, "{what}: {arguments:?}: {}", told(&output)),
            Some(2 | 3) => worked.set(false),
            _ => panic!("{what}: {arguments:?}: {}", told(&output)),
        }
    };
    // Most is reused, and the training goes on from its checkpoint; then the artifacts are read.
    run(&STEPS, same);
    run(&ANOTHER_END, other);
    let repaired = space.temper(&["verify", "--repair"]);
    assert!(matches!(repaired.status.code(), Some(0 | 2 | 3)), "{what}: repair: {}", told(&repaired));
    if worked.get() {
        assert_eq!(repaired.status.code(), Some(0), "{what}: repair: {}", told(&repaired));
        run(&STEPS, same);
        let verified = space.temper(&["verify"]);
        assert!(verified.status.success(), "{what}: after the repair: {}", told(&verified));
    }
    worked.get()
}
