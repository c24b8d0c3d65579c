//! HTTP client, async runtime and environment variables shared by all kinds that make network requests.

use std::time::Duration;

use engine::error::{Error, Result};

/// Environment variables that a client may need behind a proxy or with a private certificate authority.
pub const ENV: [&str; 8] =
    ["HTTPS_PROXY", "HTTP_PROXY", "NO_PROXY", "https_proxy", "http_proxy", "no_proxy", "SSL_CERT_FILE", "SSL_CERT_DIR"];

/// Whether a client follows redirects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Redirects {
    /// Follows redirects. `Authorization` is not sent to another host, but any other header with a secret would be.
    Followed,
    /// Returns the redirect itself. For requests that carry a secret in a custom header.
    Never,
}

/// A client whose requests take at most `timeout` in total. Without a timeout, a response may take any time as long as
/// some data arrives every two minutes.
///
/// # Errors
/// If the client cannot be built, for example because the machine has no TLS roots.
pub fn client(timeout: Option<Duration>, redirects: Redirects) -> Result<reqwest::Client> {
    // Fails only if a provider is already installed.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let mut builder = reqwest::Client::builder().user_agent("temper").connect_timeout(Duration::from_secs(20));
    if redirects == Redirects::Never {
        builder = builder.redirect(reqwest::redirect::Policy::none());
    }
    builder = match timeout {
        Some(timeout) => builder.timeout(timeout),
        None => builder.read_timeout(Duration::from_secs(120)),
    };
    builder.build().map_err(|e| Error::environment(format!("no HTTP client: {}", causes(&e))))
}

/// # Errors
/// If the runtime cannot be created.
pub fn runtime() -> Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|e| Error::environment(format!("no runtime for requests: {e}")))
}

/// An error and its causes on one line, without the URL's query.
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

/// The value of an environment variable that is set and not blank.
pub fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.trim().is_empty())
}
