//! Fake API server on 127.0.0.1: the Messages API, its batches and chat completions as publicly documented, with scripted
//! faults and a count of billed requests.

mod batches;
mod chat;
mod messages;
mod wire;

use std::collections::BTreeMap;
use std::net::TcpListener;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Duration;

use serde_json::{Value, json};

pub use batches::Line;
pub use chat::choose;
pub use messages::{Limits, documents, judge};

/// The API key that every request must carry.
pub const KEY: &str = "sk-ant-test-0123456789";

/// Scripted fault of one request.
#[derive(Clone, Debug)]
pub enum Fault {
    /// An error in the documented format. Not billed.
    Error { status: u16, kind: &'static str, message: String, headers: Vec<(&'static str, String)>, details: Value },
    /// The connection closes instead of a response. The work is done and billed.
    Lost,
    /// The connection closes in the middle of the response body. Billed.
    Torn,
    /// The connection closes before any work is done. Not billed.
    Dropped,
    /// No response until the client disconnects. Billed.
    Stalled,
    /// Status 200 with a body that is not JSON.
    Garbage,
    /// This status, as from a proxy.
    Proxy(u16),
    /// Responds with this message, whatever the request. Billed.
    Says(Value),
    /// Status 200 with exactly this body. Not billed.
    Body(Value),
    /// This status with exactly this text. Not billed.
    Text(u16, &'static str),
}

impl Fault {
    pub fn status(status: u16, kind: &'static str) -> Self {
        let message = format!("scripted {kind}");
        Self::Error { status, kind, message, headers: vec![], details: Value::Null }
    }

    /// The same fault with another header.
    pub fn with(mut self, name: &'static str, value: impl ToString) -> Self {
        if let Self::Error { headers, .. } = &mut self {
            headers.push((name, value.to_string()));
        }
        self
    }
}

/// Decides on the n-th request of its type, counted from 0.
pub type Script<T> = Box<dyn Fn(usize, &Value) -> T + Send + Sync>;

/// Behaviour of the server.
pub struct Rules {
    /// Delay between a request and its response.
    pub latency: Duration,
    /// Applies to `POST /v1/messages` and `POST /v1/chat/completions`.
    pub message: Script<Option<Fault>>,
    /// Applies to `POST /v1/messages/batches`.
    pub create: Script<Option<Fault>>,
    /// Applies to `GET` of a batch, of the list and of results.
    pub get: Script<Option<Fault>>,
    /// Applies to each request within a batch, counted over all batches.
    pub line: Script<Line>,
    /// Number of times that a batch must be retrieved or listed before it ends.
    pub looks: usize,
    pub limits: Option<Limits>,
    /// Minimum tokens of a prefix that can be cached.
    pub cacheable: usize,
    /// Computes the response from a request's body.
    pub judge: Box<dyn Fn(&Value) -> Value + Send + Sync>,
    /// Computes the choice of a chat completion from a request's body.
    pub choose: Box<dyn Fn(&Value) -> Value + Send + Sync>,
    /// The model id that chat completions report, by the number of the request; `None`: the one asked for.
    pub model: Box<dyn Fn(usize) -> Option<&'static str> + Send + Sync>,
    /// Whether chat completions report their usage.
    pub usage: bool,
}

impl Default for Rules {
    fn default() -> Self {
        Self {
            latency: Duration::ZERO,
            message: Box::new(|_, _| None),
            create: Box::new(|_, _| None),
            get: Box::new(|_, _| None),
            line: Box::new(|_, _| Line::Succeeded),
            looks: 1,
            limits: None,
            cacheable: 1024,
            judge: Box::new(judge),
            choose: Box::new(choose),
            model: Box::new(|_| None),
            usage: true,
        }
    }
}

/// Recorded requests and billing.
#[derive(Default)]
struct State {
    requests: Vec<(String, Value)>,
    messages: usize,
    creates: usize,
    gets: usize,
    lines: usize,
    /// Number of times that each document was billed.
    paid: BTreeMap<String, usize>,
    paid_messages: usize,
    /// Billed (input, output) tokens.
    paid_tokens: (u64, u64),
    batches: Vec<batches::Batch>,
    /// Cached prompt prefixes.
    prefixes: std::collections::BTreeSet<String>,
    bucket: messages::Bucket,
    turned_away: usize,
}

struct Shared {
    rules: Rules,
    state: Mutex<State>,
    changed: Condvar,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no thread panics with it")
    }
}

/// A server that runs until the test process ends.
#[derive(Clone)]
pub struct Api {
    /// Value for `ANTHROPIC_BASE_URL`.
    pub address: String,
    shared: Arc<Shared>,
}

impl Api {
    pub fn new(rules: Rules) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port is free");
        let address = format!("http://{}", listener.local_addr().expect("it is bound"));
        let shared = Arc::new(Shared { rules, state: Mutex::default(), changed: Condvar::new() });
        let api = Self { address, shared: shared.clone() };
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let shared = shared.clone();
                // The client may disconnect at any time.
                std::thread::spawn(move || wire::serve(&stream, |asked| answer(&shared, asked)).unwrap_or_default());
            }
        });
        api
    }

    /// Number of message requests received, whatever their result.
    pub fn messages(&self) -> usize {
        self.shared.state().messages
    }

    /// Number of batch creations received, whatever their result.
    pub fn creates(&self) -> usize {
        self.shared.state().creates
    }

    /// Number of billed requests, single or in batches.
    pub fn paid_messages(&self) -> usize {
        self.shared.state().paid_messages
    }

    /// Billed (input, output) tokens.
    pub fn paid_tokens(&self) -> (u64, u64) {
        self.shared.state().paid_tokens
    }

    /// Number of documents billed at least once.
    pub fn paid_documents(&self) -> usize {
        self.shared.state().paid.len()
    }

    /// Documents billed more than once.
    pub fn paid_twice(&self) -> Vec<String> {
        let state = self.shared.state();
        state.paid.iter().filter(|(_, times)| **times > 1).map(|(document, _)| document.clone()).collect()
    }

    /// Number of requests rejected by the rate limits.
    pub fn turned_away(&self) -> usize {
        self.shared.state().turned_away
    }

    /// (head, body) of every request so far.
    pub fn requests(&self) -> Vec<(String, Value)> {
        self.shared.state().requests.clone()
    }

    /// Waits until the count `of` reaches `n`.
    ///
    /// # Panics
    /// If that takes a minute.
    pub fn wait_until(&self, n: usize, of: impl Fn(&Self) -> usize) {
        let started = std::time::Instant::now();
        while of(self) < n {
            assert!(started.elapsed() < Duration::from_secs(60), "the server waited in vain for {n}");
            let wait = self.shared.changed.wait_timeout(self.shared.state(), Duration::from_millis(20));
            drop(wait.expect("no thread panics with it"));
        }
    }

    /// Adds an ended batch of `count` requests, as if created by another client of the same workspace.
    pub fn create_foreign_batch(&self, count: usize) {
        let mut state = self.shared.state();
        let batch = batches::Batch::of_others(state.batches.len(), count);
        state.batches.push(batch);
    }
}

/// One HTTP request.
struct Asked {
    method: String,
    /// Path without the query.
    path: String,
    query: BTreeMap<String, String>,
    head: String,
    body: Vec<u8>,
}

/// The server's response.
struct Reply {
    status: u16,
    headers: Vec<(&'static str, String)>,
    body: String,
    end: End,
}

/// Where the response is cut.
#[derive(Clone, Copy, PartialEq, Eq)]
enum End {
    Whole,
    /// After half of the body.
    Torn,
    /// Before the first byte.
    Nothing,
    /// No response at all.
    Stalled,
}

impl Reply {
    fn ok(body: &Value) -> Self {
        Self { status: 200, headers: vec![], body: body.to_string(), end: End::Whole }
    }

    fn error(status: u16, kind: &str, message: &str) -> Self {
        let body = json!({ "type": "error", "error": { "type": kind, "message": message }, "request_id": "req_test" });
        Self { status, headers: vec![("request-id", "req_test".into())], body: body.to_string(), end: End::Whole }
    }

    fn ending(self, end: End) -> Self {
        Self { end, ..self }
    }

    /// The response to a fault that replaces the work; `None` for faults that apply to the result of the work.
    fn of(fault: &Fault) -> Option<Self> {
        Some(match fault {
            Fault::Error { status, kind, message, headers, details } => {
                let mut reply = Self::error(*status, kind, message);
                if !details.is_null() {
                    let error = json!({ "type": kind, "message": message, "details": details });
                    reply.body = json!({ "type": "error", "error": error, "request_id": "req_test" }).to_string();
                }
                reply.headers.retain(|(name, _)| !headers.iter().any(|(other, _)| other == name));
                reply.headers.extend(headers.iter().cloned());
                reply
            }
            Fault::Body(body) => Self::ok(body),
            Fault::Text(status, text) => Self { status: *status, body: (*text).to_owned(), ..Self::ok(&Value::Null) },
            Fault::Dropped => Self::ok(&Value::Null).ending(End::Nothing),
            Fault::Garbage => Self { body: "<html>of somebody's proxy".into(), ..Self::ok(&Value::Null) },
            Fault::Proxy(status) => Self { status: *status, body: "<html>".into(), ..Self::ok(&Value::Null) },
            Fault::Lost | Fault::Torn | Fault::Stalled | Fault::Says(_) => return None,
        })
    }

    /// The response of completed work, cut as the fault says.
    fn under(self, fault: Option<&Fault>) -> Self {
        match fault {
            Some(Fault::Lost) => self.ending(End::Nothing),
            Some(Fault::Torn) => self.ending(End::Torn),
            Some(Fault::Stalled) => self.ending(End::Stalled),
            _ => self,
        }
    }
}

fn answer(shared: &Shared, asked: Asked) -> Reply {
    let body: Value = serde_json::from_slice(&asked.body).unwrap_or(Value::Null);
    let reply = match wire::header(&asked.head, "x-api-key") {
        _ if asked.path == chat::PATH => chat::create(shared, &asked.head, &body),
        Some(KEY) => match wire::header(&asked.head, "anthropic-version") {
            Some("2023-06-01") => route(shared, &asked, &body),
            _ => Reply::error(400, "invalid_request_error", "anthropic-version: header is required"),
        },
        _ => Reply::error(401, "authentication_error", "invalid x-api-key"),
    };
    let Asked { head, .. } = asked;
    // A batch's body is large; the batch keeps its requests.
    let body = if asked.path.ends_with("/batches") { Value::Null } else { body };
    shared.state().requests.push((head, body));
    shared.changed.notify_all();
    reply
}

fn route(shared: &Shared, asked: &Asked, body: &Value) -> Reply {
    let parts: Vec<&str> = asked.path.split('/').filter(|part| !part.is_empty()).collect();
    match (asked.method.as_str(), &parts[..]) {
        ("POST", ["v1", "messages"]) => messages::create(shared, body),
        ("POST", ["v1", "messages", "batches"]) => batches::create(shared, asked.body.len(), body),
        ("GET", ["v1", "messages", "batches", rest @ ..]) => batches::get(shared, rest, &asked.query),
        _ => Reply::error(404, "not_found_error", "no such endpoint"),
    }
}
