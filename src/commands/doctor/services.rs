//! Checks whether remote services answer and which of their environment variables are set. Never prints a value.

use engine::error::{Error, Result};
use engine::graph::Instance;
use stages::http;
use stages::services::{self, Service};

use super::Check;

/// A service, the stages that use it if they are known, and the status of its response if it was contacted.
type Answer<'a> = (&'a Service, Option<Vec<String>>, Option<Result<u16>>);

/// `to_run`: the instances to run, if they are known. Services that none of them uses are not contacted.
pub fn checks(to_run: Option<&[&Instance]>) -> Vec<Check> {
    let all = services::all();
    let users = |service: &Service| -> Option<Vec<String>> {
        let uses = |instance: &&&Instance| instance.signature.env.iter().any(|name| name == service.address_variable);
        to_run.map(|to_run| to_run.iter().filter(uses).map(|instance| instance.name.to_string()).collect())
    };
    // In parallel: without a network, each may take seconds.
    let answers: Vec<Answer> = std::thread::scope(|scope| {
        let pending: Vec<_> = all
            .iter()
            .map(|service| {
                let users = users(service);
                let is_unused = users.as_ref().is_some_and(Vec::is_empty);
                let answer = (!is_unused).then(|| scope.spawn(|| service.ping()));
                (service, users, answer)
            })
            .collect();
        pending
            .into_iter()
            .map(|(service, users, answer)| {
                let failed = |_| Err(Error::internal("the check of a service panicked"));
                (service, users, answer.map(|thread| thread.join().unwrap_or_else(failed)))
            })
            .collect()
    });
    let mut checks: Vec<Check> = proxy().into_iter().collect();
    for (service, users, answer) in answers {
        checks.push(match answer {
            None => Check::ok(service.name, "not used by any stage that would run"),
            Some(answer) => reachability(service, users.unwrap_or_default(), answer),
        });
        checks.push(credentials(service));
    }
    checks
}

/// `users`: the stages to run that use the service.
fn reachability(service: &Service, users: Vec<String>, answer: Result<u16>) -> Check {
    let address = match service.public_address() {
        Ok(address) => address,
        Err(error) => return Check::failed(service.name, error, !users.is_empty()),
    };
    match answer {
        Ok(status) => Check::ok(service.name, format!("{address} answers (status {status})")),
        Err(error) => {
            let need = if users.is_empty() {
                format!("this matters only to {}", service.users)
            } else {
                format!(
                    "needed by {}: check the network, a proxy (HTTPS_PROXY) and {}",
                    users.join(", "),
                    service.address_variable
                )
            };
            let error = Error::environment(format!("{address} does not answer: {}", error.message)).help(need);
            Check::failed(service.name, error, !users.is_empty())
        }
    }
}

fn credentials(service: &Service) -> Check {
    let subject = format!("{} key", service.name);
    match &service.credentials {
        Ok(Some(name)) => Check::ok(&subject, format!("{name} is set")),
        Ok(None) => Check::ok(
            &subject,
            format!("{} is not set: only for {}", service.credential_variables.join(" or "), service.key_for),
        ),
        // A warning: for a stage that needs them, the check of the pipeline reports the error.
        Err(error) => Check::failed(&subject, error.clone(), false),
    }
}

/// The proxy and certificate variables that are set.
fn proxy() -> Option<Check> {
    let set: Vec<&str> = http::ENV.into_iter().filter(|name| http::variable(name).is_some()).collect();
    (!set.is_empty()).then(|| Check::ok("proxy", format!("set: {}", set.join(", "))))
}
