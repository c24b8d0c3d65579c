//! HTTP requests to a hub: addresses, access token, redirects, and the meaning of status codes.

use engine::error::{Error, Result};
use reqwest::header::{ETAG, HeaderMap, LOCATION, RANGE};
use reqwest::{Response, StatusCode, Url};
use serde::Deserialize;

use super::digest::ExpectedDigest;
use super::{HubId, Repo};
use crate::http;
use crate::table::cut;
use crate::text::clean::printable;

/// Environment variable: the address of another hub than the public one.
pub const ENDPOINT: &str = "HF_ENDPOINT";
/// Environment variable: the access token.
pub const TOKEN: &str = "HF_TOKEN";
const PUBLIC: &str = "https://huggingface.co";
/// More redirects than any hub needs to reach its object store.
const MOST_REDIRECTS: usize = 10;

/// The hub's address from the environment, unchecked.
pub fn endpoint() -> String {
    http::variable(ENDPOINT).unwrap_or_else(|| PUBLIC.to_owned())
}

/// Parses a hub's address.
///
/// # Errors
/// If the endpoint is not a valid address.
pub fn address(endpoint: &str) -> Result<Url> {
    Url::parse(endpoint).ok().filter(|url| ["http", "https"].contains(&url.scheme()) && url.has_host()).ok_or_else(
        || {
            Error::user(format!("the hub's endpoint `{endpoint}` is no address"))
                .help("HF_ENDPOINT is such as https://huggingface.co")
        },
    )
}

/// Client for one repository of one hub.
pub struct HubClient {
    repo: Repo,
    id: HubId,
    endpoint: Url,
    token: Option<String>,
    client: reqwest::Client,
}

/// Files of a repository at one commit.
#[derive(Debug, Deserialize)]
pub struct Info {
    pub sha: Option<String>,
    #[serde(default)]
    pub siblings: Vec<Sibling>,
}

#[derive(Debug, Deserialize)]
pub struct Sibling {
    pub rfilename: String,
}

/// Response to a download of a file's bytes.
pub struct Bytes {
    /// The whole file, or the requested part if the server supports ranges; `None` if the requested start is beyond the
    /// end.
    pub response: Option<Response>,
    /// Offset of the first byte in the response.
    pub start: u64,
    /// Digest of the whole file as reported by the hub itself, not by the object store that it redirects to.
    pub said: Option<ExpectedDigest>,
    /// Size of the whole file as reported by the server.
    pub size: Option<u64>,
}

impl HubClient {
    /// Uses the hub at `HF_ENDPOINT`, by default the public hub, and the token `HF_TOKEN` if it is set. Sends no
    /// request.
    ///
    /// # Errors
    /// If the endpoint is not a valid address.
    pub fn from_environment(repo: Repo, id: &HubId) -> Result<Self> {
        Self::new(repo, id, &endpoint(), http::variable(TOKEN))
    }

    /// # Errors
    /// If the endpoint is not a valid address.
    pub fn new(repo: Repo, id: &HubId, endpoint: &str, token: Option<String>) -> Result<Self> {
        let endpoint = address(endpoint)?;
        let client = http::client(None, http::Redirects::Never)?;
        Ok(Self { repo, id: id.clone(), endpoint, token: token.map(|token| token.trim().to_owned()), client })
    }

    /// Lists the files of the repository at a revision.
    pub async fn info(&self, revision: &str) -> Result<Info> {
        let kind = match self.repo {
            Repo::Model => "models",
            Repo::Dataset => "datasets",
        };
        let url = self.url(&["api", kind], &["revision", revision]);
        let answer = self.follow(&url, None).await?;
        let response = self.good(answer.response, None)?;
        let text = response.bytes().await.map_err(|e| self.failed(&http::causes(&e), None).transient())?;
        serde_json::from_slice(&text).map_err(|e| self.failed(&format!("{url} gave no listing: {e}"), None))
    }

    /// Requests a file's bytes from `start` to the end.
    pub async fn read(&self, commit: &str, file: &str, start: u64) -> Result<Bytes> {
        let prefix: &[&str] = if self.repo == Repo::Dataset { &["datasets"] } else { &[] };
        let parts: Vec<&str> = ["resolve", commit].into_iter().chain(file.split('/')).collect();
        let HubResponse { response, said, size, commit: at } =
            self.follow(&self.url(prefix, &parts), (start > 0).then_some(start)).await?;
        if let Some(at) = at.filter(|at| at != commit) {
            return Err(self.failed(&format!("the hub gave commit {at} for {commit}"), Some(file)));
        }
        if start > 0 && response.status() == StatusCode::RANGE_NOT_SATISFIABLE {
            let size = size.or_else(|| total(response.headers()));
            return Ok(Bytes { response: None, start, said, size });
        }
        let response = self.good(response, Some(file))?;
        let start = if response.status() == StatusCode::PARTIAL_CONTENT {
            let given = first(response.headers());
            if given != Some(start) {
                return Err(self.failed(&format!("asked for what follows byte {start}, got {given:?}"), Some(file)));
            }
            start
        } else {
            0
        };
        let told = if start > 0 { total(response.headers()) } else { response.content_length() };
        Ok(Bytes { response: Some(response), start, said, size: size.or(told) })
    }

    /// The error for an interrupted response.
    pub fn cut(&self, e: &reqwest::Error, file: &str) -> Error {
        self.failed(&http::causes(e), Some(file)).transient()
    }

    /// An error about this repository, with a common prefix and help.
    pub fn failed(&self, what: &str, file: Option<&str>) -> Error {
        let (what_it_is, field) = match self.repo {
            Repo::Model => ("model", "a folder or file"),
            Repo::Dataset => ("data set", "files"),
        };
        let HubId { id, revision, .. } = &self.id;
        let file = file.map_or_else(String::new, |file| format!(", file `{file}`"));
        Error::environment(format!("cannot get the {what_it_is} `{id}` (revision `{revision}`{file}): {what}")).help(
            format!("check the network, or download it elsewhere and give {field} on this machine instead of `hub`"),
        )
    }

    /// `endpoint/before…/owner/name/after…`. Each part is escaped, so a revision with a slash remains one part.
    fn url(&self, before: &[&str], after: &[&str]) -> Url {
        let mut url = self.endpoint.clone();
        // A URL with a host has path segments, and `new` has checked for the host.
        if let Ok(mut segments) = url.path_segments_mut() {
            segments.pop_if_empty().extend(before).extend(self.id.id.split('/')).extend(after);
        }
        url
    }

    /// Sends a request and follows redirects by hand, so that only the hub receives the token, and to keep what the hub
    /// says about a file before it redirects to its object store.
    async fn follow(&self, url: &Url, start: Option<u64>) -> Result<HubResponse> {
        let mut url = url.clone();
        let (mut said, mut size, mut commit) = (None, None, None);
        for _ in 0..=MOST_REDIRECTS {
            let at_the_hub = url.origin() == self.endpoint.origin();
            let mut request = self.client.get(url.clone());
            if let Some(token) = self.token.as_ref().filter(|_| at_the_hub) {
                request = request.bearer_auth(token);
            }
            if let Some(start) = start {
                request = request.header(RANGE, format!("bytes={start}-"));
            }
            let response = request.send().await.map_err(|e| self.failed(&http::causes(&e), None).transient())?;
            let header = |name: &str| response.headers().get(name).and_then(|value| value.to_str().ok());
            if at_the_hub {
                let etag = header("x-linked-etag").or_else(|| header(ETAG.as_str()));
                said = etag.and_then(ExpectedDigest::of_etag).or(said);
                size = header("x-linked-size").and_then(|size| size.parse().ok()).or(size);
                commit = header("x-repo-commit").map(str::to_owned).or(commit);
            }
            let next = header(LOCATION.as_str()).filter(|_| response.status().is_redirection());
            let Some(next) = next else { return Ok(HubResponse { response, said, size, commit }) };
            url = url.join(next).map_err(|_| self.failed("a redirect to no address", None))?;
        }
        Err(self.failed(&format!("more than {MOST_REDIRECTS} redirects"), None))
    }

    fn good(&self, response: Response, file: Option<&str>) -> Result<Response> {
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        // The query of an object store's address holds a signature, so it is removed.
        let mut url = response.url().clone();
        url.set_query(None);
        let header = |name: &str| response.headers().get(name).and_then(|value| value.to_str().ok());
        // The error code is more specific than the status: the hub answers 401 also for a repository that does not
        // exist.
        if let Some((what, help)) = header("x-error-code").and_then(|code| self.cause(code)) {
            return Err(self.failed(&format!("{what} ({url}: {status})"), file).help(help));
        }
        let said =
            header("x-error-message").map_or_else(String::new, |said| format!(": {}", cut(&printable(said), 200)));
        let error = self.failed(&format!("{url}: {status}{said}"), file);
        Err(match status.as_u16() {
            401 if self.token.is_none() => error.help("a private or gated repository needs a token: set HF_TOKEN"),
            401 => error.help("the hub refuses this token: set HF_TOKEN to one that is valid"),
            403 => error.help("a gated repository's terms must be accepted on its page; then set HF_TOKEN to a token that may read it"),
            404 => error.help("check the repository, the revision and the file; what is private looks as if it were not there: then set HF_TOKEN"),
            408 | 429 | 500.. => error.transient(),
            _ => error,
        })
    }

    /// The meaning of a hub's error code, and a suggested fix.
    fn cause(&self, code: &str) -> Option<(&'static str, String)> {
        let page = self.url(if self.repo == Repo::Dataset { &["datasets"] } else { &[] }, &[]);
        let token = match self.token {
            None => "set HF_TOKEN to a token",
            Some(_) => "HF_TOKEN is set: it must be a token",
        };
        Some(match code {
            "RepoNotFound" => (
                "no such repository, or it is private",
                format!("check the id `{}`; for a private repository, {token} that may read it", self.id.id),
            ),
            "GatedRepo" => (
                "the repository is gated",
                format!("accept its terms at {page}; then {token} of the account that accepted them"),
            ),
            "RevisionNotFound" => (
                "the repository has no such revision",
                format!("`revision` is a branch, a tag or a commit: those that there are stand at {page}"),
            ),
            "EntryNotFound" => (
                "the revision has no such file",
                format!("the files that there are stand at {page}; check `files` and `revision`"),
            ),
            _ => return None,
        })
    }
}

/// The last response of a chain of redirects.
struct HubResponse {
    response: Response,
    said: Option<ExpectedDigest>,
    size: Option<u64>,
    commit: Option<String>,
}

/// Offset of the first byte in `content-range: bytes 5-9/10`.
fn first(headers: &HeaderMap) -> Option<u64> {
    range(headers)?.split_once('-')?.0.trim().parse().ok()
}

/// Total size in `content-range: bytes 5-9/10` or `bytes */10`.
fn total(headers: &HeaderMap) -> Option<u64> {
    range(headers)?.split_once('/')?.1.trim().parse().ok()
}

fn range(headers: &HeaderMap) -> Option<&str> {
    headers.get("content-range")?.to_str().ok()?.trim().strip_prefix("bytes")
}

#[cfg(test)]
mod tests {
    use reqwest::header::HeaderValue;

    use super::*;

    fn client(endpoint: &str, id: &str, repo: Repo) -> Result<HubClient> {
        HubClient::new(repo, &HubId { id: id.into(), revision: "main".into(), files: None }, endpoint, None)
    }

    #[test]
    fn every_part_of_an_address_stays_one_part() {
        for endpoint in ["http://hub.test/mirror", "http://hub.test/mirror/"] {
            let client = client(endpoint, "a/b", Repo::Model).unwrap();
            let url = client.url(&["api", "models"], &["revision", "refs/pr/1"]);
            assert_eq!(url.as_str(), "http://hub.test/mirror/api/models/a/b/revision/refs%2Fpr%2F1");
            assert_eq!(client.url(&[], &["resolve", "x", "a b?#%"]).path(), "/mirror/a/b/resolve/x/a%20b%3F%23%25");
        }
    }

    #[test]
    fn an_endpoint_that_is_no_address_is_told() {
        for endpoint in ["hub.test", "file:///tmp", ""] {
            let error = client(endpoint, "a/b", Repo::Model).map(drop).unwrap_err();
            assert!(error.help.is_some_and(|help| help.contains("HF_ENDPOINT")));
        }
    }

    #[test]
    fn the_place_of_a_part_is_read() {
        let headers =
            |value| HeaderMap::from_iter([("content-range".parse().unwrap(), HeaderValue::from_static(value))]);
        assert_eq!((first(&headers("bytes 5-9/10")), total(&headers("bytes 5-9/10"))), (Some(5), Some(10)));
        assert_eq!((first(&headers("bytes */10")), total(&headers("bytes */10"))), (None, Some(10)));
        assert_eq!((first(&headers("lines 5-9/*")), total(&headers("bytes 5-9/*"))), (None, None));
    }
}
