//! Downloads files of one commit of a repository from a hub with Hugging Face's protocol. Downloads resume after a
//! killed attempt, and their digests are checked.

pub(crate) mod client;
mod digest;

use std::fs::{File, OpenOptions};
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use engine::context::Context;
use engine::error::{AtPath, Error, Result};
use engine::kind::Signature;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::http;
use client::HubClient;

/// The type of a repository.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Repo {
    Model,
    Dataset,
}

/// A repository of the hub at a revision.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct HubId {
    /// `owner/name`.
    pub id: String,
    /// A commit, a tag or a branch. A tag or branch is resolved once and its artifacts are reused until `--force`; give
    /// a commit to get the same files elsewhere.
    #[serde(default = "main_branch")]
    pub revision: String,
    /// A pattern that file names must match; absent: every file of a readable format.
    #[serde(default)]
    pub files: Option<String>,
}

fn main_branch() -> String {
    "main".to_owned()
}

impl HubId {
    /// # Errors
    /// If it cannot name a repository and a revision.
    fn check(&self) -> Result<()> {
        let safe = |part: &str| {
            !part.is_empty()
                && part.split('/').all(|part| !["", ".", ".."].contains(&part))
                && part.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_./".contains(&b))
        };
        if safe(&self.id) && self.id.split('/').count() <= 2 && safe(&self.revision) {
            return Ok(());
        }
        Err(Error::user(format!("`{}` at `{}` is no repository of a hub: expected owner/name", self.id, self.revision)))
    }
}

fn is_commit(revision: &str) -> bool {
    revision.len() == 40 && revision.bytes().all(|b| b.is_ascii_hexdigit())
}

/// Declares the use of [`Hub`] in a kind's signature: the environment variables that it reads, and that the files of a
/// branch or tag, unlike those of a commit, may change later.
#[must_use]
pub fn declare(mut signature: Signature, id: Option<&HubId>) -> Signature {
    let Some(id) = id else { return signature };
    signature.deterministic &= is_commit(&id.revision);
    signature.env.extend([client::ENDPOINT, client::TOKEN].into_iter().chain(http::ENV).map(str::to_owned));
    signature.secrets.push(client::TOKEN.to_owned());
    signature
}

/// One repository at one commit.
pub struct Hub {
    client: HubClient,
    commit: String,
    files: Vec<String>,
    kept: PathBuf,
    runtime: tokio::runtime::Runtime,
}

impl Hub {
    /// Resolves the revision and lists its files. The commit and the downloaded files are kept with the checkpoints, so
    /// that the next attempt at the same key continues with the same commit even if the branch has moved.
    ///
    /// # Errors
    /// Names the id that could not be reached and suggests a fix.
    pub fn open(repo: Repo, id: &HubId, ctx: &mut Context) -> Result<Self> {
        id.check()?;
        let client = HubClient::from_environment(repo, id)?;
        let runtime = http::runtime()?;
        let kept = ctx.checkpoints().join("hub");
        std::fs::create_dir_all(&kept).at(&kept)?;
        let noted = kept.join("commit");
        let before = std::fs::read_to_string(&noted).ok().filter(|commit| is_commit(commit));
        let info = runtime.block_on(client.info(before.as_deref().unwrap_or(&id.revision)))?;
        let pinned = is_commit(&id.revision).then(|| id.revision.to_ascii_lowercase());
        let commit = match before.or(pinned).or(info.sha) {
            Some(commit) if is_commit(&commit) => commit,
            _ => return Err(client.failed("the hub does not tell its commit", None)),
        };
        publish(commit.as_bytes(), &noted)?;
        if !is_commit(&id.revision) {
            ctx.warn(format!(
                "`{}`: revision `{}` is commit {commit}: pin that to get the same again",
                id.id, id.revision
            ));
        }
        let mut files: Vec<String> = info.siblings.into_iter().map(|s| s.rfilename).collect();
        files.sort();
        Ok(Self { client, commit, files, kept, runtime })
    }

    /// The folder of downloaded files.
    pub fn folder(&self) -> PathBuf {
        self.kept.join("files")
    }

    /// The names of all files, sorted.
    pub fn files(&self) -> &[String] {
        &self.files
    }

    pub fn has(&self, file: &str) -> bool {
        self.files.binary_search_by(|name| name.as_str().cmp(file)).is_ok()
    }

    /// Downloads files in order into [`Hub::folder`], reporting progress.
    ///
    /// # Errors
    /// As [`Hub::fetch`].
    pub fn fetch_all(&self, files: &[String], ctx: &mut Context) -> Result<Vec<PathBuf>> {
        let fetch = |file: &String| {
            let unit = format!("bytes of {file}");
            self.fetch(file, &mut |there, size| ctx.progress(there, size, &unit, None))
        };
        files.iter().map(fetch).collect()
    }

    /// Downloads one file unless it exists; the final path only ever holds a complete, checked file. `told` receives
    /// the number of bytes present and the total (0 if unknown).
    ///
    /// # Errors
    /// Names the id and the file, and suggests a fix. A partial download is kept for the next attempt; a file with a
    /// wrong digest or size is removed.
    fn fetch(&self, file: &str, told: &mut dyn FnMut(u64, u64)) -> Result<PathBuf> {
        if !is_safe(file) {
            return Err(self.client.failed(&format!("refuses the file name `{}`", file.escape_debug()), None));
        }
        let (path, part) = (self.folder().join(file), self.kept.join("parts").join(file));
        if path.is_file() {
            return Ok(path);
        }
        for path in [&path, &part] {
            let folder = path.parent().unwrap_or(&self.kept);
            std::fs::create_dir_all(folder).at(folder)?;
        }
        loop {
            let before = length(&part)?;
            match self.runtime.block_on(self.go_on(file, &part, told)) {
                Ok(()) => break,
                // A connection that was cut after some progress is retried at once.
                Err(e) if e.transient && length(&part)? > before => {}
                Err(e) => return Err(e),
            }
        }
        std::fs::rename(&part, &path).at(&path)?;
        Ok(path)
    }

    /// Downloads the missing part of a file and checks the whole.
    async fn go_on(&self, file: &str, part: &Path, told: &mut dyn FnMut(u64, u64)) -> Result<()> {
        let before = length(part)?;
        let mut answer = self.client.read(&self.commit, file, before).await?;
        if answer.response.is_none() && answer.size != Some(before) {
            // The partial file is longer than the whole file, so it cannot be a part of it.
            std::fs::remove_file(part).at(part)?;
            answer = self.client.read(&self.commit, file, 0).await?;
        }
        if let Some(mut response) = answer.response {
            let mut out = OpenOptions::new().create(true).truncate(false).write(true).open(part).at(part)?;
            // A server may ignore the range: the file then starts from the beginning.
            out.set_len(answer.start).at(part)?;
            let mut there = out.seek(SeekFrom::End(0)).at(part)?;
            while let Some(bytes) = response.chunk().await.map_err(|e| self.client.cut(&e, file))? {
                out.write_all(&bytes).at(part)?;
                let step = there / STEP;
                there += bytes.len() as u64;
                if there / STEP > step {
                    told(there, answer.size.unwrap_or(0));
                }
            }
            out.sync_all().at(part)?;
        }
        let size = length(part)?;
        let wrong = match (&answer.said, answer.size) {
            (Some(said), _) => {
                let found = said.found(part)?;
                (found != *said).then(|| format!("expected {said}, found {found}"))
            }
            (None, Some(expected)) => (size != expected).then(|| format!("expected {expected} bytes, found {size}")),
            (None, None) => None,
        };
        let Some(wrong) = wrong else { return Ok(()) };
        std::fs::remove_file(part).at(part)?;
        let error = self.client.failed(&format!("{wrong}; what came is removed"), Some(file));
        // The earlier part of a resumed download may be at fault, so another try is worthwhile.
        Err(if before > 0 { error.transient() } else { error })
    }
}

/// Bytes between two progress reports.
const STEP: u64 = 4 << 20;

/// Whether a joined file name stays inside its folder.
fn is_safe(file: &str) -> bool {
    !file.split('/').any(|part| ["", ".", ".."].contains(&part)) && !file.contains(['\\', '\0'])
}

/// The length of a file; zero if it does not exist.
fn length(path: &Path) -> Result<u64> {
    match std::fs::metadata(path) {
        Ok(metadata) => Ok(metadata.len()),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(0),
        Err(e) => Err(e).at(path),
    }
}

/// Writes a small file atomically.
fn publish(bytes: &[u8], path: &Path) -> Result<()> {
    let new = path.with_added_extension("new");
    File::create(&new).and_then(|mut file| file.write_all(bytes).and_then(|()| file.sync_all())).at(&new)?;
    std::fs::rename(&new, path).at(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_lead_elsewhere_are_refused() {
        assert!(["a", "a/b.json", ".gitattributes", "a..b"].into_iter().all(is_safe));
        assert!(!["", "/a", "a/", "a//b", "..", "a/../b", "./a", "a\\b", "a\0"].into_iter().any(is_safe));
    }

    #[test]
    fn ids_and_revisions_are_such_as_a_hub_has() {
        let check = |id: &str, revision: &str| {
            HubId { id: id.into(), revision: revision.into(), files: None }.check().map_err(|e| e.exit_code())
        };
        for (id, revision) in [("a/b", "main"), ("gpt2", "v1.0"), ("a-b/c_d.e", "refs/pr/1")] {
            assert_eq!(check(id, revision), Ok(()));
        }
        for (id, revision) in
            [("a/../../b", "main"), ("a/b/c", "main"), ("a/b", ""), ("a/b", "x/../y"), ("a?b", "main")]
        {
            assert_eq!(check(id, revision), Err(2), "{id} {revision}");
        }
    }
}
