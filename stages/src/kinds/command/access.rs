//! What a program may read and change besides its inputs, where the kernel has Landlock.

use std::path::{Path, PathBuf};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Further files and folders of a program: absolute paths, or paths in the home directory such as `~/.triton`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Access {
    /// Only for reading.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub read: Vec<String>,
    /// For reading and writing.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub write: Vec<String>,
}

impl Access {
    pub fn is_empty(&self) -> bool {
        self.read.is_empty() && self.write.is_empty()
    }
}

/// `~` stands for the home directory.
pub fn expanded(path: &str) -> PathBuf {
    match (path.strip_prefix("~/"), std::env::var_os("HOME")) {
        (Some(rest), Some(home)) => PathBuf::from(home).join(rest),
        _ => PathBuf::from(path),
    }
}

/// What a program reads to start: itself with its installation (a virtual environment has its own and its interpreter's), and
/// the files that its arguments name by absolute paths.
pub fn started_from(run: &[String]) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> =
        run.iter().map(PathBuf::from).filter(|path| path.is_absolute() && path.exists()).collect();
    let program = Path::new(run.first().map_or("", String::as_str));
    let places: Vec<PathBuf> = match program.components().count() {
        1 => {
            std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default()).map(|dir| dir.join(program)).collect()
        }
        _ => vec![program.to_owned()],
    };
    if let Some(place) = places.into_iter().find(|place| place.is_absolute() && place.is_file()) {
        let real = place.canonicalize().unwrap_or_else(|_| place.clone());
        for place in [place, real] {
            let bin = place.parent().filter(|parent| parent.ends_with("bin")).and_then(Path::parent);
            // Not the root directory, which `/bin` lies in.
            found.push(bin.filter(|prefix| prefix.parent().is_some()).map_or(place.clone(), Path::to_owned));
        }
    }
    found
}
