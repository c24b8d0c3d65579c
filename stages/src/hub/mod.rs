//! Files of a hub that speaks Hugging Face's protocol: list, fetch. Knows no model and no data set.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use engine::error::{At, Error, Result};
use engine::kind::Signature;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::http;

/// What a repository of the hub holds.
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
    /// A commit, a tag or a branch; pin a commit for a run that can be repeated.
    #[serde(default = "main_branch")]
    pub revision: String,
    /// A pattern that file names must match; every file that can be read if absent.
    #[serde(default)]
    pub files: Option<String>,
}

fn main_branch() -> String {
    "main".to_owned()
}

/// What a kind declares when it uses [`Hub`]: the environment variables that are read, and that a branch or a tag may give
/// other bytes later; a commit does not.
#[must_use]
pub fn declare(mut signature: Signature, id: Option<&HubId>) -> Signature {
    let Some(id) = id else { return signature };
    let commit = id.revision.len() == 40 && id.revision.bytes().all(|b| b.is_ascii_hexdigit());
    signature.deterministic &= commit;
    signature.env.extend(["HF_ENDPOINT", "HF_TOKEN"].into_iter().chain(http::ENV).map(str::to_owned));
    signature.secrets.push("HF_TOKEN".to_owned());
    signature
}

/// The files of one repository at one revision.
pub struct Hub {
    repo: Repo,
    id: HubId,
    endpoint: String,
    token: Option<String>,
    client: reqwest::Client,
    runtime: tokio::runtime::Runtime,
}

impl Hub {
    /// From `HF_ENDPOINT`, else the public hub, with `HF_TOKEN` if it is set. Sends nothing yet.
    ///
    /// # Errors
    /// If the id is no `owner/name`.
    pub fn new(repo: Repo, id: &HubId) -> Result<Self> {
        let endpoint = http::variable("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".to_owned());
        Self::at(repo, id, &endpoint, http::variable("HF_TOKEN"))
    }

    fn at(repo: Repo, id: &HubId, endpoint: &str, token: Option<String>) -> Result<Self> {
        let safe = |part: &str| {
            part.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_./".contains(&b)) && !part.contains("..")
        };
        if !safe(&id.id) || !safe(&id.revision) || id.id.is_empty() || id.revision.is_empty() {
            return Err(Error::yours(format!(
                "`{}` at `{}` is no repository of a hub: expected owner/name",
                id.id, id.revision
            )));
        }
        Ok(Self {
            repo,
            id: id.clone(),
            endpoint: endpoint.trim_end_matches('/').to_owned(),
            token,
            client: http::client(None, http::Redirects::Followed)?,
            runtime: http::runtime()?,
        })
    }

    /// The names of all files, sorted.
    ///
    /// # Errors
    /// Names the id that could not be reached and what to do.
    pub fn files(&self) -> Result<Vec<String>> {
        #[derive(Deserialize)]
        struct Info {
            siblings: Vec<Sibling>,
        }
        #[derive(Deserialize)]
        struct Sibling {
            rfilename: String,
        }
        let kind = match self.repo {
            Repo::Model => "models",
            Repo::Dataset => "datasets",
        };
        let url =
            format!("{}/api/{kind}/{}/revision/{}", self.endpoint, self.id.id, self.id.revision.replace('/', "%2F"));
        let text = self.runtime.block_on(async {
            let answer = self.get(&url).await?;
            answer.text().await.map_err(|e| self.unreachable(&http::causes(&e)).transient())
        })?;
        let info: Info = serde_json::from_str(&text).map_err(|e| self.unreachable(&format!("{url}: {e}")))?;
        let mut files: Vec<String> = info.siblings.into_iter().map(|s| s.rfilename).collect();
        files.sort();
        Ok(files)
    }

    /// Downloads one file into the folder `into`, unless it is there already; a file is there whole or not at all.
    ///
    /// # Errors
    /// Names the id that could not be reached and what to do.
    pub fn fetch(&self, file: &str, into: &Path) -> Result<PathBuf> {
        if file.split('/').any(|part| part.is_empty() || part == "." || part == "..") || file.contains('\\') {
            return Err(Error::surroundings(format!("hub `{}`: refuses the file name `{file}`", self.id.id)));
        }
        let path = into.join(&self.id.id).join(&self.id.revision).join(file);
        if path.is_file() {
            return Ok(path);
        }
        let folder = path.parent().unwrap_or(into);
        std::fs::create_dir_all(folder).at(folder)?;
        let part = path.with_added_extension("part");
        let datasets = if self.repo == Repo::Dataset { "/datasets" } else { "" };
        let url = format!(
            "{}{datasets}/{}/resolve/{}/{file}",
            self.endpoint,
            self.id.id,
            self.id.revision.replace('/', "%2F")
        );
        self.runtime.block_on(async {
            let mut answer = self.get(&url).await?;
            let mut out = File::create(&part).at(&part)?;
            while let Some(bytes) = answer.chunk().await.map_err(|e| self.unreachable(&http::causes(&e)).transient())? {
                out.write_all(&bytes).at(&part)?;
            }
            out.sync_all().at(&part)
        })?;
        std::fs::rename(&part, &path).at(&path)?;
        Ok(path)
    }

    async fn get(&self, url: &str) -> Result<reqwest::Response> {
        let mut request = self.client.get(url);
        if let Some(token) = &self.token {
            request = request.bearer_auth(token);
        }
        let answer = request.send().await.map_err(|e| self.unreachable(&http::causes(&e)))?;
        let status = answer.status();
        if status.is_success() {
            return Ok(answer);
        }
        let error = self.unreachable(&format!("{url}: {status}"));
        Err(match status.as_u16() {
            408 | 429 | 500.. => error.transient(),
            401 | 403 => error.help("a private or gated repository needs a token in HF_TOKEN"),
            _ => error,
        })
    }

    fn unreachable(&self, what: &str) -> Error {
        let (what_it_is, field) = match self.repo {
            Repo::Model => ("model", "a folder or file"),
            Repo::Dataset => ("data set", "files"),
        };
        Error::surroundings(format!(
            "cannot get the {what_it_is} `{}` (revision `{}`): {what}",
            self.id.id, self.id.revision
        ))
        .help(format!("check the network, or download it elsewhere and give {field} on this machine instead of `hub`"))
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader, Read};
    use std::net::TcpListener;

    use super::*;

    fn id(id: &str) -> HubId {
        HubId { id: id.into(), revision: "abc".into(), files: None }
    }

    /// Answers each request by its path until it is dropped with the test.
    fn server(answers: &'static [(&'static str, &'static str)]) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
                let first = lines.next().unwrap().unwrap();
                while lines.next().is_some_and(|line| !line.unwrap().is_empty()) {}
                let path = first.split(' ').nth(1).unwrap();
                let (status, body) = match answers.iter().find(|(p, _)| *p == path) {
                    Some((_, body)) => ("200 OK", *body),
                    None => ("404 Not Found", ""),
                };
                let _ = write!(
                    stream,
                    "HTTP/1.1 {status}\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}",
                    body.len()
                );
                let _ = stream.shutdown(std::net::Shutdown::Write);
                let _ = stream.read(&mut [0]);
            }
        });
        address
    }

    #[test]
    fn files_are_listed_and_fetched_once() {
        let endpoint = server(&[
            (
                "/api/datasets/a/b/revision/abc",
                r#"{"siblings":[{"rfilename":"z.jsonl"},{"rfilename":"data/a.parquet"}]}"#,
            ),
            ("/datasets/a/b/resolve/abc/data/a.parquet", "rows"),
        ]);
        let hub = Hub::at(Repo::Dataset, &id("a/b"), &endpoint, None).unwrap();
        assert_eq!(hub.files().unwrap(), ["data/a.parquet", "z.jsonl"]);
        let folder = tempfile::tempdir().unwrap();
        let path = hub.fetch("data/a.parquet", folder.path()).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "rows");
        std::fs::write(&path, "kept").unwrap();
        assert_eq!(hub.fetch("data/a.parquet", folder.path()).unwrap(), path);
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "kept");
        assert!(hub.fetch("../evil", folder.path()).is_err());
    }

    /// Answers one request, hands over its head, and ends.
    fn once(answer: String) -> (String, std::thread::JoinHandle<String>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let head = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let lines = BufReader::new(stream.try_clone().unwrap()).lines().map(|line| line.unwrap());
            let head = lines.take_while(|line| !line.is_empty()).collect::<Vec<_>>().join("\n");
            write!(stream, "{answer}").unwrap();
            head
        });
        (address, head)
    }

    #[test]
    fn a_redirect_is_followed_and_the_token_stays_with_the_hub() {
        let (store, seen_by_store) = once("HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nrows".into());
        let (hub, seen_by_hub) =
            once(format!("HTTP/1.1 302 Found\r\nlocation: {store}/blob\r\ncontent-length: 0\r\n\r\n"));
        let hub = Hub::at(Repo::Dataset, &id("a/b"), &hub, Some("hf_secret".into())).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let path = hub.fetch("a.jsonl", folder.path()).unwrap();
        assert_eq!(std::fs::read_to_string(path).unwrap(), "rows");
        assert!(seen_by_hub.join().unwrap().contains("hf_secret"));
        assert!(!seen_by_store.join().unwrap().contains("hf_secret"));
    }

    #[test]
    fn what_cannot_be_got_is_named_with_what_to_do() {
        let gone = {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            format!("http://{}", listener.local_addr().unwrap())
        };
        let hub = Hub::at(Repo::Model, &id("openai-community/gpt2"), &gone, None).unwrap();
        let error = hub.fetch("config.json", tempfile::tempdir().unwrap().path()).unwrap_err();
        assert_eq!(error.exit_code(), 3);
        assert!(error.message.starts_with("cannot get the model `openai-community/gpt2` (revision `abc`)"), "{error}");
        assert!(error.help.unwrap().contains("give a folder or file"));
        assert!(Hub::at(Repo::Model, &id("a/../../b"), &gone, None).is_err());
    }
}
