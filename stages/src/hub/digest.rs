//! File digests that a hub reports: SHA-256 for large-file storage, the git object id for other files.

use std::fmt;
use std::fs::File;
use std::io::Read;
use std::path::Path;

use engine::error::{AtPath, Result};
use ring::digest::{Context, SHA1_FOR_LEGACY_USE_ONLY, SHA256};

/// A digest in lower-case hexadecimal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ExpectedDigest {
    /// SHA-256 of the bytes: files in large-file storage.
    Sha256(String),
    /// SHA-1 of `blob <size>\0` and the bytes: files in git itself.
    GitBlob(String),
}

impl ExpectedDigest {
    /// Parses an entity tag; `None` if it is neither kind of digest.
    pub fn of_etag(etag: &str) -> Option<Self> {
        let hex = etag.trim().trim_start_matches("W/").trim_matches('"').to_ascii_lowercase();
        if !hex.bytes().all(|b| b.is_ascii_hexdigit()) {
            return None;
        }
        match hex.len() {
            64 => Some(Self::Sha256(hex)),
            40 => Some(Self::GitBlob(hex)),
            _ => None,
        }
    }

    /// Computes the same kind of digest of the file at `path`.
    pub fn found(&self, path: &Path) -> Result<Self> {
        let file = File::open(path).at(path)?;
        let bytes = file.metadata().at(path)?.len();
        Ok(match self {
            Self::Sha256(_) => Self::Sha256(hash(Context::new(&SHA256), file, path)?),
            Self::GitBlob(_) => {
                let mut context = Context::new(&SHA1_FOR_LEGACY_USE_ONLY);
                context.update(format!("blob {bytes}\0").as_bytes());
                Self::GitBlob(hash(context, file, path)?)
            }
        })
    }
}

impl fmt::Display for ExpectedDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Sha256(hex) => write!(f, "sha256 {hex}"),
            Self::GitBlob(hex) => write!(f, "git blob {hex}"),
        }
    }
}

fn hash(mut context: Context, mut file: File, path: &Path) -> Result<String> {
    let mut buffer = vec![0; 1 << 18];
    loop {
        match file.read(&mut buffer).at(path)? {
            0 => return Ok(context.finish().as_ref().iter().map(|byte| format!("{byte:02x}")).collect()),
            n => context.update(&buffer[..n]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digests_are_those_that_git_and_sha256sum_give() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a");
        std::fs::write(&path, "hello\n").unwrap();
        for (etag, shown) in [
            ("\"ce013625030ba8dba906f756967f9e9ca394464a\"", "git blob ce013625030ba8dba906f756967f9e9ca394464a"),
            ("W/\"CE013625030BA8DBA906F756967F9E9CA394464A\"", "git blob ce013625030ba8dba906f756967f9e9ca394464a"),
            (
                "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03",
                "sha256 5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03",
            ),
        ] {
            let said = ExpectedDigest::of_etag(etag).unwrap();
            assert_eq!(said.to_string(), shown);
            assert_eq!(said.found(&path).unwrap(), said);
        }
        // The etag of a multipart upload to an object store, and an empty one: neither is a digest.
        assert_eq!(ExpectedDigest::of_etag("\"d41d8cd98f00b204e9800998ecf8427e-38\""), None);
        assert_eq!(ExpectedDigest::of_etag(""), None);
    }
}
