//! Remote services: whether they answer, and which environment variables for them are set. Prints no variable's value.

use engine::error::{Error, Result};
use engine::graph::Instance;
use stages::http;
use stages::services::{self, Service};

use super::Check;

/// `open`: the instances that would run, if they are known. Services that none of them uses are not asked.
pub fn checks(open: Option<&[&Instance]>) -> Vec<Check> {
    let all = services::all();
    let users = |service: &Service| -> Option<Vec<String>> {
        let uses = |instance: &&&Instance| instance.signature.env.iter().any(|name| name == service.endpoint);
        open.map(|open| open.iter().filter(uses).map(|instance| instance.name.to_string()).collect())
    };
    // All at once: each may take seconds without a network.
    let answers: Vec<(&Service, Option<Vec<String>>, Option<Result<u16>>)> = std::thread::scope(|scope| {
        let asked: Vec<_> = all
            .iter()
            .map(|service| {
                let users = users(service);
                let is_unused = users.as_ref().is_some_and(Vec::is_empty);
                let answer = (!is_unused).then(|| scope.spawn(|| service.answer()));
                (service, users, answer)
            })
            .collect();
        asked
            .into_iter()
            .map(|(service, users, answer)| {
                let failed = |_| Err(Error::ours("the check of a service panicked"));
                (service, users, answer.map(|thread| thread.join().unwrap_or_else(failed)))
            })
            .collect()
    });
    let mut checks: Vec<Check> = proxy().into_iter().collect();
    for (service, users, answer) in answers {
        checks.push(match answer {
            None => Check::ok(service.name, "not used by the stages that would run"),
            Some(answer) => reached(service, users.unwrap_or_default(), answer),
        });
        checks.push(credentials(service));
    }
    checks
}

/// `users`: the stages that need the service.
fn reached(service: &Service, users: Vec<String>, answer: Result<u16>) -> Check {
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
                    service.endpoint
                )
            };
            let error = Error::surroundings(format!("{address} does not answer: {}", error.message)).help(need);
            Check::failed(service.name, error, !users.is_empty())
        }
    }
}

fn credentials(service: &Service) -> Check {
    let subject = format!("{} key", service.name);
    match &service.set {
        Ok(Some(name)) => Check::ok(&subject, format!("{name} is set")),
        Ok(None) => Check::ok(&subject, format!("{} is not set: only for {}", service.credentials, service.key_for)),
        // For a stage that needs them, the pipeline's check has found the fault.
        Err(error) => Check::failed(&subject, error.clone(), false),
    }
}

/// The variables that direct requests elsewhere.
fn proxy() -> Option<Check> {
    let set: Vec<&str> = http::ENV.into_iter().filter(|name| http::variable(name).is_some()).collect();
    (!set.is_empty()).then(|| Check::ok("proxy", format!("set: {}", set.join(", "))))
}
