//! A temporary folder for one test, and the real binary running in it.
#![allow(dead_code, reason = "each test binary uses its own part of this")]

pub mod hub;

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

pub struct TestSpace {
    folder: tempfile::TempDir,
}

impl TestSpace {
    pub fn new() -> Self {
        Self { folder: tempfile::tempdir().expect("a temporary folder can be made") }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub fn write(&self, name: &str, text: &str) -> PathBuf {
        let path = self.path(name);
        std::fs::write(&path, text).expect("the temporary folder can be written to");
        path
    }

    /// Runs the binary with `arguments` in this folder.
    pub fn temper(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().expect("the binary starts")
    }

    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_temper"));
        command.args(arguments).current_dir(self.folder.path()).env_remove("TEMPER_STORE");
        command
    }

    /// The last line printed by a successful command, parsed as JSON.
    pub fn json(&self, arguments: &[&str]) -> serde_json::Value {
        let out = self.temper(arguments);
        assert!(out.status.success(), "{arguments:?}: {}{}", text(&out.stdout), text(&out.stderr));
        let stdout = text(&out.stdout);
        let last = stdout.lines().last().unwrap_or_else(|| panic!("{arguments:?} printed nothing"));
        serde_json::from_str(last).unwrap_or_else(|e| panic!("{arguments:?} printed {last}: {e}"))
    }
}

pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Path of a file in the repository.
pub fn repository(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(name)
}

/// The strings of a JSON list.
pub fn names(list: &serde_json::Value) -> Vec<&str> {
    list.as_array().into_iter().flatten().filter_map(serde_json::Value::as_str).collect()
}
