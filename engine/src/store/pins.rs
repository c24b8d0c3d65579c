//! Pins: named results that garbage collection keeps.

use std::fs;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::{Store, files};
use crate::disk;
use crate::error::{AtPath, Error, Result};
use crate::names::{Digest, Key};

/// Maximum length of a pin's name in bytes: an instance's name with its labels fits.
const MAX_NAME: usize = 200;

/// Results kept under a name.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Pin {
    pub name: String,
    /// The pipeline's name.
    pub pipeline: String,
    /// Seconds since 1970.
    pub at: f64,
    pub results: Vec<PinnedResult>,
}

/// One pinned artifact. The artifacts that it was made from are not pinned with it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PinnedResult {
    /// The instance's name.
    pub stage: String,
    pub key: Key,
    pub digest: Digest,
}

impl Store {
    /// Every pin, sorted by name.
    ///
    /// # Errors
    /// When a pin cannot be read: nothing may be deleted while it is not known what is pinned.
    pub fn pins(&self) -> Result<Vec<Pin>> {
        let folder = self.pin_folder();
        if files::metadata_if_exists(&folder)?.is_none() {
            return Ok(Vec::new());
        }
        let mut pins = Vec::new();
        for entry in fs::read_dir(&folder).at(&folder)? {
            let path = entry.at(&folder)?.path();
            if files::is_temporary_name(path.file_name().unwrap_or_default()) {
                continue;
            }
            let bytes = files::read_if_file(&path)?.unwrap_or_default();
            let pin: Pin = serde_json::from_slice(&bytes).map_err(|e| {
                Error::environment(format!("{}: not a readable pin: {e}", path.display()))
                    .help("delete the file, and pin its results again")
            })?;
            pins.push(pin);
        }
        pins.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(pins)
    }

    /// Writes a pin.
    ///
    /// # Errors
    /// When the name is not valid, or is that of a pin with other results (user errors).
    pub fn pin(&self, pin: &Pin) -> Result<()> {
        let valid = |b: u8| b.is_ascii_alphanumeric() || b"_.,*[]-".contains(&b);
        if !(1..=MAX_NAME).contains(&pin.name.len()) || pin.name.starts_with('.') || !pin.name.bytes().all(valid) {
            return Err(Error::user(format!(
                "`{}` is not a valid name for a pin: expected [A-Za-z0-9_.,*[]-]{{1,{MAX_NAME}}} that does not start with a dot",
                pin.name
            )));
        }
        let existing = self.pins()?.into_iter().find(|other| other.name == pin.name);
        if existing.is_some_and(|other| other.results != pin.results) {
            return Err(Error::user(format!("the pin `{}` exists and has other results", pin.name))
                .help("choose another name with `--name`, or remove the pin with `temper unpin`"));
        }
        let folder = self.pin_folder();
        disk::create_dir_all(&folder).at(&folder)?;
        files::write_atomically(
            &self.pin_file(&pin.name),
            &serde_json::to_vec_pretty(pin).expect("a pin is plain data"),
        )
    }

    /// Removes a pin; its results stay until the next garbage collection.
    ///
    /// # Errors
    /// When there is no such pin (user error).
    pub fn unpin(&self, name: &str) -> Result<()> {
        if !self.pins()?.iter().any(|pin| pin.name == name) {
            return Err(Error::user(format!("there is no pin `{name}`")).help("`temper pins` lists them"));
        }
        let path = self.pin_file(name);
        disk::remove_file(&path).at(&path)
    }

    // Created by the first pin, so that older stores on read-only disks can still be opened.
    fn pin_folder(&self) -> PathBuf {
        self.root().join("pins")
    }

    fn pin_file(&self, name: &str) -> PathBuf {
        self.pin_folder().join(format!("{name}.json"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pin(name: &str, of: &str) -> Pin {
        let result = PinnedResult { stage: "a".into(), key: Key::of(of.as_bytes()), digest: Digest::of(of.as_bytes()) };
        Pin { name: name.into(), pipeline: "p".into(), at: 1.5, results: vec![result] }
    }

    #[test]
    fn a_pin_is_kept_until_it_is_removed_and_never_replaced_by_other_results() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        assert_eq!(store.pins().unwrap(), []);
        store.pin(&pin("rl[mean,301]", "x")).unwrap();
        store.pin(&pin("rl[mean,301]", "x")).unwrap();
        assert_eq!(store.pin(&pin("rl[mean,301]", "y")).unwrap_err().exit_code(), 2);
        for name in ["", ".x", "a/b", "../x", "ä", &"n".repeat(201)] {
            assert_eq!(store.pin(&pin(name, "x")).unwrap_err().exit_code(), 2, "{name}");
        }
        store.pin(&pin("best", "y")).unwrap();
        assert_eq!(store.pins().unwrap(), [pin("best", "y"), pin("rl[mean,301]", "x")]);
        store.unpin("best").unwrap();
        assert_eq!(store.unpin("best").unwrap_err().exit_code(), 2);
        std::fs::write(dir.path().join("pins/x.json"), "{").unwrap();
        assert_eq!(store.pins().unwrap_err().exit_code(), 3);
    }
}
