//! The remote services that kinds use, for `temper doctor`: their addresses, whether credentials are set (never their
//! values), and whether they answer.
//!
//! The endpoint of `annotate.openai` is not listed: a parameter of the stage names it, not the environment.

use std::time::Duration;

use engine::error::{Error, Result};
use reqwest::Url;

use crate::http;
use crate::hub::client as hub_client;
use crate::judge::providers::anthropic;

/// Longest time to wait for an answer.
const TIMEOUT: Duration = Duration::from_secs(5);

/// A remote service and its settings in the environment.
pub struct Service {
    pub name: &'static str,
    /// Environment variable of the address. Kinds that use the service list it in `env` of their signature.
    pub address_variable: &'static str,
    /// An error if the variable holds no valid address.
    pub address: Result<Url>,
    /// Environment variables that may hold credentials.
    pub credential_variables: Vec<String>,
    /// The variable that holds credentials; `None` if no variable is set, an error if they cannot be used.
    pub credentials: Result<Option<String>>,
    /// The stages that use the service, for messages.
    pub users: &'static str,
    /// The uses that need credentials, for messages.
    pub key_for: &'static str,
}

/// Every service, with the settings of this process's environment.
pub fn all() -> [Service; 2] {
    [hub(), claude()]
}

fn hub() -> Service {
    let token = hub_client::TOKEN;
    Service {
        name: "hub",
        address_variable: hub_client::ENDPOINT,
        address: hub_client::address(&hub_client::endpoint()),
        credential_variables: vec![token.to_owned()],
        credentials: Ok(http::variable(token).map(|_| token.to_owned())),
        users: "stages with a `hub` parameter",
        key_for: "private and gated repositories",
    }
}

fn claude() -> Service {
    Service {
        name: "Claude",
        address_variable: anthropic::BASE_URL,
        address: anthropic::address(),
        credential_variables: anthropic::key_variables().into(),
        credentials: anthropic::key_variable_set(),
        users: "`annotate.claude`",
        key_for: "`annotate.claude`",
    }
}

impl Service {
    /// The address without user name, password and query.
    ///
    /// # Errors
    /// If the variable holds no valid address.
    pub fn public_address(&self) -> Result<Url> {
        let mut url = self.address.clone()?;
        // Neither can fail for a URL with a host.
        let _ = (url.set_username(""), url.set_password(None));
        url.set_query(None);
        Ok(url)
    }

    /// Sends a request without credentials and returns the status of the response.
    ///
    /// # Errors
    /// If the address is invalid, or no response arrives within a few seconds.
    pub fn ping(&self) -> Result<u16> {
        let url = self.public_address()?;
        let client = http::client(Some(TIMEOUT), http::Redirects::Never)?;
        let runtime = http::runtime()?;
        let response = runtime.block_on(async { client.head(url).send().await });
        // A pending name lookup must not delay the exit.
        runtime.shutdown_background();
        response
            .map(|response| response.status().as_u16())
            .map_err(|e| Error::environment(http::causes(&e.without_url())))
    }
}
