//! A local server that acts as a hub, or as the object store to which a hub redirects.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex, MutexGuard};

use ring::digest::{SHA1_FOR_LEGACY_USE_ONLY, SHA256, digest};

/// A server that ends with the test process.
#[derive(Clone)]
pub struct FakeServer {
    pub address: String,
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    responses: BTreeMap<String, Response>,
    requests: Vec<Request>,
}

/// A request received by the server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    pub path: String,
    pub range: Option<String>,
    pub token: Option<String>,
}

/// An answer of the server.
#[derive(Clone)]
pub struct Response {
    pub status: u16,
    pub headers: Vec<(&'static str, String)>,
    pub body: Vec<u8>,
    /// Bytes of the body that each of the next answers sends before it closes the connection.
    pub cut_after: Vec<usize>,
    /// Sends this many bytes of the body and then nothing, without closing the connection.
    pub stall_after: Option<usize>,
    pub supports_ranges: bool,
    /// The expected token; requests without it get status 401.
    pub token: Option<&'static str>,
}

impl Response {
    pub fn of(body: impl Into<Vec<u8>>) -> Self {
        let body = body.into();
        Self {
            status: 200,
            headers: vec![],
            body,
            cut_after: vec![],
            stall_after: None,
            supports_ranges: true,
            token: None,
        }
    }

    /// A file stored in git itself.
    pub fn in_git(body: &[u8]) -> Self {
        let blob = [format!("blob {}\0", body.len()).as_bytes(), body].concat();
        Self { headers: vec![("etag", format!("\"{}\"", hex(&SHA1_FOR_LEGACY_USE_ONLY, &blob)))], ..Self::of(body) }
    }

    /// A file stored in the object store at `address`.
    pub fn redirect_to(address: String, body: &[u8]) -> Self {
        let headers = vec![
            ("location", address),
            ("x-linked-etag", format!("\"{}\"", hex(&SHA256, body))),
            ("x-linked-size", body.len().to_string()),
            // The digest of the LFS pointer, not of the file.
            ("etag", "\"0123456789012345678901234567890123456789\"".to_owned()),
        ];
        Self { status: 302, headers, ..Self::of("Found") }
    }
}

fn hex(algorithm: &'static ring::digest::Algorithm, bytes: &[u8]) -> String {
    digest(algorithm, bytes).as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}

impl FakeServer {
    pub fn new() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port is free");
        let address = format!("http://{}", listener.local_addr().expect("it is bound"));
        let server = Self { address, state: Arc::default() };
        let state = server.state.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let state = state.clone();
                // The client may close the connection at any time.
                std::thread::spawn(move || answer(&stream, &state).unwrap_or_default());
            }
        });
        server
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no thread panics with it")
    }

    pub fn put(&self, path: &str, response: Response) {
        self.state().responses.insert(path.to_owned(), response);
    }

    pub fn change(&self, path: &str, change: impl FnOnce(&mut Response)) {
        change(self.state().responses.get_mut(path).expect("the path has a response"));
    }

    /// A repository with all its files in git; `kind` is `models` or `datasets`.
    pub fn put_repository(&self, kind: &str, id: &str, revision: &str, commit: &str, files: &[(&str, &[u8])]) {
        let names: Vec<String> = files.iter().map(|(name, _)| format!("{{\"rfilename\":\"{name}\"}}")).collect();
        let info = format!("{{\"id\":\"{id}\",\"sha\":\"{commit}\",\"siblings\":[{}]}}", names.join(","));
        for revision in [revision, commit] {
            self.put(&format!("/api/{kind}/{id}/revision/{revision}"), Response::of(info.clone()));
        }
        let prefix = if kind == "datasets" { "/datasets" } else { "" };
        for (name, body) in files {
            let mut response = Response::in_git(body);
            response.headers.push(("x-repo-commit", commit.to_owned()));
            self.put(&format!("{prefix}/{id}/resolve/{commit}/{name}"), response);
        }
    }

    /// The requests received so far.
    pub fn requests(&self) -> Vec<Request> {
        self.state().requests.clone()
    }

    /// The ranges of the requests for one path.
    pub fn ranges(&self, path: &str) -> Vec<Option<String>> {
        self.requests().into_iter().filter(|request| request.path == path).map(|request| request.range).collect()
    }
}

fn answer(stream: &TcpStream, state: &Mutex<State>) -> std::io::Result<()> {
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    let first = lines.next().unwrap_or_else(|| Ok(String::new()))?;
    let path = first.split(' ').nth(1).unwrap_or_default().to_owned();
    let mut request = Request { path, range: None, token: None };
    for line in lines {
        let line = line?;
        match line.split_once(": ") {
            None => break,
            Some((name, value)) if name.eq_ignore_ascii_case("range") => request.range = Some(value.to_owned()),
            Some((name, value)) if name.eq_ignore_ascii_case("authorization") => request.token = Some(value.to_owned()),
            _ => {}
        }
    }
    let (response, cut) = {
        let mut state = state.lock().expect("no thread panics with it");
        state.requests.push(request.clone());
        match state.responses.get_mut(&request.path) {
            Some(response) => (
                response.clone(),
                if response.cut_after.is_empty() { None } else { Some(response.cut_after.remove(0)) },
            ),
            None => (Response { status: 404, ..Response::of("not found") }, None),
        }
    };
    send(stream, &request, response, cut)
}

fn send(mut stream: &TcpStream, request: &Request, mut response: Response, cut: Option<usize>) -> std::io::Result<()> {
    if response.token.is_some_and(|token| request.token != Some(format!("Bearer {token}"))) {
        response = Response { status: 401, ..Response::of("unauthorized") };
    }
    let size = response.body.len();
    let start = request.range.as_ref().and_then(|r| r.strip_prefix("bytes=")?.strip_suffix('-')?.parse::<usize>().ok());
    let mut body = &response.body[..];
    if let Some(start) = start.filter(|_| response.status == 200 && response.supports_ranges) {
        if start < size {
            response.status = 206;
            response.headers.push(("content-range", format!("bytes {start}-{}/{size}", size - 1)));
            body = &body[start..];
        } else {
            response.status = 416;
            response.headers.push(("content-range", format!("bytes */{size}")));
            body = &[];
        }
    }
    let mut head = format!("HTTP/1.1 {} -\r\ncontent-length: {}\r\nconnection: close\r\n", response.status, body.len());
    for (name, value) in &response.headers {
        head += &format!("{name}: {value}\r\n");
    }
    stream.write_all(format!("{head}\r\n").as_bytes())?;
    stream.write_all(&body[..cut.or(response.stall_after).unwrap_or(body.len()).min(body.len())])?;
    if response.stall_after.is_some() && cut.is_none() {
        std::thread::park();
    }
    stream.shutdown(std::net::Shutdown::Write)?;
    // Read the request to its end, so that closing the connection does not reset the answer.
    stream.read(&mut [0]).map(drop)
}
