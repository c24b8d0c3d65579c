//! The remote services that kinds use, for `temper doctor`: address, credentials (never their values), whether it
//! answers.

use std::time::Duration;

use engine::error::{Error, Result};
use reqwest::Url;

use crate::{annotate, http, hub};

/// Longest time to wait for an answer.
const TIMEOUT: Duration = Duration::from_secs(5);

/// A remote service and its settings in the environment.
pub struct Service {
    pub name: &'static str,
    /// Environment variable of the address. The signature of a kind that uses the service lists it in `env`.
    pub endpoint: &'static str,
    /// An error if the variable holds no address.
    pub address: Result<Url>,
    /// Environment variables that may hold credentials, for messages.
    pub credentials: &'static str,
    /// The variable that holds credentials; `None` if no variable is set, an error if they cannot be used.
    pub set: Result<Option<&'static str>>,
    /// What uses the service and what needs its credentials, for messages.
    pub users: &'static str,
    pub key_for: &'static str,
}

/// Every service, with the settings of this process's environment.
pub fn all() -> [Service; 2] {
    [hub::service(), annotate::claude::service()]
}

impl Service {
    /// The address without user name, password and query.
    ///
    /// # Errors
    /// If the variable holds no address.
    pub fn public_address(&self) -> Result<Url> {
        let mut url = self.address.clone()?;
        // Neither can fail for a URL with a host.
        let _ = (url.set_username(""), url.set_password(None));
        url.set_query(None);
        Ok(url)
    }

    /// Sends a request without credentials and returns the status of the answer.
    ///
    /// # Errors
    /// If there is no address, or no answer from it within a few seconds.
    pub fn answer(&self) -> Result<u16> {
        let url = self.public_address()?;
        let client = http::client(Some(TIMEOUT), http::Redirects::Never)?;
        let runtime = http::runtime()?;
        let answer = runtime.block_on(client.head(url).send());
        // A name that is still being looked up must not hold up the end.
        runtime.shutdown_background();
        answer
            .map(|response| response.status().as_u16())
            .map_err(|e| Error::surroundings(http::causes(&e.without_url())))
    }
}
