//! What every kind that talks to a server shares: a client with our TLS, a runtime, the environment. Knows no server.

use std::time::Duration;

use engine::error::{Error, Result};

/// Environment variables that a client may need to reach the network from behind a proxy or with a private authority.
pub const ENV: [&str; 8] =
    ["HTTPS_PROXY", "HTTP_PROXY", "NO_PROXY", "https_proxy", "http_proxy", "no_proxy", "SSL_CERT_FILE", "SSL_CERT_DIR"];

/// Whether an answer that points elsewhere is followed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Redirects {
    /// Followed; `Authorization` goes to no other host. Any other header that holds a secret would.
    Followed,
    /// The answer is the redirect itself: for requests with a secret in a header of the API's own.
    Never,
}

/// A client whose requests take `timeout` at most as a whole; without one, whose answers may take as long as they like, if
/// something comes every two minutes.
///
/// # Errors
/// If the machine has no TLS roots or the like.
pub fn client(timeout: Option<Duration>, redirects: Redirects) -> Result<reqwest::Client> {
    // An error says only that a provider is installed already.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let mut builder = reqwest::Client::builder().user_agent("temper").connect_timeout(Duration::from_secs(20));
    if redirects == Redirects::Never {
        builder = builder.redirect(reqwest::redirect::Policy::none());
    }
    builder = match timeout {
        Some(timeout) => builder.timeout(timeout),
        None => builder.read_timeout(Duration::from_secs(120)),
    };
    builder.build().map_err(|e| Error::surroundings(format!("no HTTP client: {}", causes(&e))))
}

/// # Errors
/// If the machine gives no runtime.
pub fn runtime() -> Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|e| Error::surroundings(format!("no runtime for requests: {e}")))
}

/// An error with its causes on one line, without the URL's query.
pub fn causes(e: &reqwest::Error) -> String {
    let mut text = String::new();
    let mut cause: Option<&dyn std::error::Error> = Some(e);
    while let Some(e) = cause {
        let part = e.to_string();
        if !text.contains(&part) {
            text = if text.is_empty() { part } else { format!("{text}: {part}") };
        }
        cause = e.source();
    }
    text
}

/// A variable that is set and not empty.
pub fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.trim().is_empty())
}
