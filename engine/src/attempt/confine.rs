//! Confines what an attempt runs by Landlock, where the kernel has it: it reads its inputs and installed software, and changes
//! its own folders only.
//!
//! The restriction belongs to the thread that runs the kind, and to every thread and process that it starts. The commit runs
//! on another thread, since it writes to the store. A file of the store cannot be changed through a hard link either: links
//! that would give more rights are refused, and the rights of a path are those of the folder that it was opened in.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use landlock::{
    ABI, Access as _, AccessFs, CompatLevel, Compatible, Ruleset, RulesetAttr, RulesetCreatedAttr, RulesetStatus,
    path_beneath_rules,
};

use super::Job;
use crate::error::Result;
use crate::external;
use crate::kind::Access;
use crate::run::is_below;

/// Without the right to move files between folders, which version 2 brought, programs fail in unexpected places.
const OLDEST: ABI = ABI::V2;
/// The newest version whose rights are handled, as far as the kernel knows them.
const NEWEST: ABI = ABI::V5;

/// Where software and the system's settings are.
const SYSTEM: [&str; 15] = [
    "/bin", "/dev", "/etc", "/gnu", "/lib", "/lib32", "/lib64", "/nix", "/opt", "/proc", "/run", "/sbin", "/sys",
    "/usr", "/var",
];
/// Folders of the home directory where programs keep software, settings and downloads.
const OF_HOME: [&str; 3] = [".cache", ".config", ".local"];

/// The parts of the environment that name folders.
#[derive(Clone, Debug, Default)]
pub(crate) struct Surroundings {
    pub path: Option<OsString>,
    pub home: Option<PathBuf>,
    pub temporary: PathBuf,
    pub libraries: Option<OsString>,
    /// The values of the variables that the kind declares: files with credentials or certificates, for example.
    pub passed: Vec<PathBuf>,
}

impl Surroundings {
    /// `env`: the names of the variables that the kind declares.
    pub fn here(env: &[String]) -> Self {
        Self {
            path: std::env::var_os("PATH"),
            home: std::env::var_os("HOME").map(PathBuf::from),
            temporary: std::env::temp_dir(),
            libraries: std::env::var_os("LD_LIBRARY_PATH"),
            passed: env
                .iter()
                .filter_map(std::env::var_os)
                .flat_map(|value| std::env::split_paths(&value).collect::<Vec<_>>())
                .collect(),
        }
    }
}

/// Everything that an attempt may use; `of_kind` is what its kind adds.
///
/// # Errors
/// When the parameters do not name files as they should.
pub(crate) fn access(job: &Job, of_kind: Access, surroundings: &Surroundings) -> Result<Access> {
    let mut read: Vec<PathBuf> = SYSTEM.iter().map(PathBuf::from).collect();
    for folder in [&surroundings.path, &surroundings.libraries].into_iter().flatten().flat_map(std::env::split_paths) {
        let of_home = installation(&folder);
        let is_home = surroundings.home.as_deref() == Some(of_home);
        read.push(if is_home { folder } else { of_home.to_owned() });
    }
    let home = surroundings.home.as_deref().filter(|home| home.is_absolute());
    read.extend(home.into_iter().flat_map(|home| OF_HOME.map(|name| home.join(name))));
    read.extend(job.inputs.values().flatten().map(|input| input.folder.clone()));
    external::replace(&job.params, &mut |external| {
        let paths = Vec::from_iter(external.absolute_paths());
        paths.iter().for_each(|path| link_targets(path, &mut read));
        read.extend(paths);
        if let external::ExternalInput::Files(files) = &external
            && !files.is_empty()
        {
            // A pattern is no path, and a link may lead elsewhere.
            read.extend(files.files()?.iter().cloned());
        }
        Ok(external.to_value())
    })?;
    read.extend(surroundings.passed.iter().cloned());
    read.extend(of_kind.read);
    read.retain(|path| path.is_absolute());
    read.sort_unstable();
    read.dedup();

    // The folder of the attempt has the output, the job file, and what a kind keeps beside them.
    let attempt = job.out.parent().unwrap_or(&job.out).to_owned();
    let mut write = vec![attempt, job.checkpoints.clone(), job.requests.clone()];
    // Otherwise the attempt has a temporary folder of its own: `run/executor/local.rs`.
    if !is_below(&job.store, &surroundings.temporary) {
        write.push(surroundings.temporary.clone());
    }
    // Terminals, shared memory, GPUs.
    if !job.store.starts_with("/dev") {
        write.push("/dev".into());
    }
    // A GPU's driver keeps compiled kernels.
    write.extend(home.filter(|_| job.device != "cpu").map(|home| home.join(".nv")));
    write.extend(of_kind.write);
    Ok(Access { read, write })
}

/// The targets of the links below a folder: downloaded models are folders of links to files elsewhere.
fn link_targets(folder: &Path, targets: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        match entry.file_type() {
            Ok(kind) if kind.is_symlink() => targets.extend(entry.path().canonicalize()),
            Ok(kind) if kind.is_dir() => link_targets(&entry.path(), targets),
            _ => {}
        }
    }
}

/// The folder that a program's folder belongs to: `/opt/python` of `/opt/python/bin`.
fn installation(folder: &Path) -> &Path {
    let is_bin = folder.file_name().is_some_and(|name| ["bin", "sbin", "shims"].iter().any(|bin| name == *bin));
    folder.parent().filter(|parent| is_bin && parent.parent().is_some()).unwrap_or(folder)
}

/// Restricts this thread, and what it will start, to `access`. Returns whether the kernel does so. Paths that do not exist
/// are left out.
pub(crate) fn confine_thread(access: &Access) -> bool {
    let restrict = || -> std::result::Result<RulesetStatus, landlock::RulesetError> {
        let status = Ruleset::default()
            .set_compatibility(CompatLevel::HardRequirement)
            .handle_access(AccessFs::from_all(OLDEST))?
            .set_compatibility(CompatLevel::BestEffort)
            .handle_access(AccessFs::from_all(NEWEST))?
            .create()?
            .add_rules(path_beneath_rules(&access.read, AccessFs::from_read(NEWEST)))?
            .add_rules(path_beneath_rules(&access.write, AccessFs::from_all(NEWEST)))?
            .restrict_self()?;
        Ok(status.ruleset)
    };
    matches!(restrict(), Ok(RulesetStatus::FullyEnforced | RulesetStatus::PartiallyEnforced))
}

/// Whether attempts on this machine are confined.
pub fn can_confine() -> bool {
    let everything = || confine_thread(&Access { read: Vec::new(), write: vec!["/".into()] });
    // A restriction stays with its thread.
    std::thread::spawn(everything).join().unwrap_or(false)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::fs;
    use std::io::ErrorKind;
    use std::process::Command;

    use serde_json::json;

    use super::*;
    use crate::context::{Cadence, Input};
    use crate::names::Digest;

    fn job(store: &Path, params: serde_json::Value) -> Job {
        let input = Input {
            label: "a".into(),
            artifact_type: "Files".into(),
            digest: Digest::of(b"a"),
            folder: store.join("artifacts/a"),
        };
        Job {
            stage: "s".into(),
            kind: "test".into(),
            version: 1,
            params,
            seed: 0,
            inputs: BTreeMap::from([("x".to_owned(), vec![input])]),
            output: "Files".into(),
            store: store.to_owned(),
            out: store.join("work/k/attempt/out"),
            checkpoints: store.join("work/k/checkpoints"),
            requests: store.join("requests"),
            may_pay: false,
            may_pay_again: false,
            cadence: Cadence::default(),
            device: "cpu".into(),
            threads: 1,
            confine: true,
            detached: None,
        }
    }

    #[test]
    fn an_attempt_reads_inputs_and_software_and_writes_its_own_folders() {
        let surroundings = Surroundings {
            passed: vec!["/keys/api".into(), "not a path".into()],
            path: Some("/venv/bin:relative:/tools".into()),
            home: Some("/home/u".into()),
            temporary: "/tmp".into(),
            libraries: Some("/cuda/lib".into()),
        };
        let of_kind = Access { read: vec!["/data/judge".into()], write: vec!["/data/cache".into()] };
        let access = |job: &Job| access(job, of_kind.clone(), &surroundings).unwrap();
        let found = access(&job(Path::new("/store"), json!({ "file": { "$path": "/rows.jsonl" } })));
        let own =
            ["/store/work/k/attempt", "/store/work/k/checkpoints", "/store/requests", "/tmp", "/dev", "/data/cache"];
        assert_eq!(found.write, own.map(PathBuf::from));
        let mut beside: Vec<&str> =
            found.read.iter().filter_map(|path| path.to_str()).filter(|path| !SYSTEM.contains(path)).collect();
        beside.sort_unstable();
        let expected = [
            "/cuda/lib",
            "/data/judge",
            "/home/u/.cache",
            "/home/u/.config",
            "/home/u/.local",
            "/keys/api",
            "/rows.jsonl",
            "/store/artifacts/a",
            "/tools",
            "/venv",
        ];
        assert_eq!(beside, expected);
        let on_gpu = Job { device: "cuda".into(), ..job(Path::new("/store"), json!({})) };
        assert!(access(&on_gpu).write.contains(&"/home/u/.nv".into()));
    }

    #[test]
    fn the_rest_of_the_store_can_be_neither_read_nor_changed() {
        if !can_confine() {
            eprintln!("not tested: this kernel has no Landlock");
            return;
        }
        let folder = tempfile::tempdir().unwrap();
        let store = folder.path().join("store");
        let job = job(&store, json!({}));
        let (input, blob) = (job.inputs["x"][0].folder.join("x"), store.join("blobs/x"));
        let attempt = job.out.parent().unwrap();
        for made in [&job.out, &job.checkpoints, &job.requests, &job.inputs["x"][0].folder, &store.join("blobs")] {
            fs::create_dir_all(made).unwrap();
        }
        fs::write(&blob, "whole").unwrap();
        fs::hard_link(&blob, &input).unwrap();
        let surroundings = Surroundings { path: std::env::var_os("PATH"), ..Surroundings::default() };
        let access = access(&job, Access::default(), &surroundings).unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                assert!(confine_thread(&access));
                assert_eq!(fs::read_to_string(&input).unwrap(), "whole");
                let denied = |result: std::io::Result<()>| result.unwrap_err().kind() == ErrorKind::PermissionDenied;
                assert!(denied(fs::read(&blob).map(drop)) && denied(fs::write(&blob, "changed")));
                assert!(denied(fs::write(&input, "changed")) && denied(fs::remove_file(&input)));
                assert!(denied(fs::write(input.with_file_name("added"), "")));
                // A link in a folder of its own would let it change the file.
                assert!(fs::hard_link(&input, job.out.join("link")).is_err());
                fs::copy(&input, job.out.join("copy")).unwrap();
                fs::write(attempt.join("new"), "")
                    .and_then(|()| fs::rename(attempt.join("new"), job.out.join("moved")))
                    .unwrap();
                fs::write(job.checkpoints.join("c"), "").unwrap();
                let program =
                    Command::new("sh").arg("-c").arg(format!("echo changed > '{}'", input.display())).output().unwrap();
                assert!(!program.status.success(), "programs are restricted as well");
            });
        });
        assert_eq!(fs::read_to_string(&blob).unwrap(), "whole");
        fs::write(&blob, "the thread of the commit").unwrap();
    }
}
