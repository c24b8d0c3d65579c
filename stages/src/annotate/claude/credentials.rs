//! Reads the API's address and key from the environment, or from a file that it names. Errors never contain the key.

use std::path::Path;

use engine::error::{Error, Result};

use super::client::{self, BASE_URL, Endpoint, KEY};
use crate::http;
use crate::services::Service;

/// Names a file that holds only the key, for machines where others can see environments.
pub const KEY_FILE: &str = "ANTHROPIC_API_KEY_FILE";
const PUBLIC: &str = "https://api.anthropic.com";

/// # Errors
/// If there is no key, more than one, or one that cannot be sent.
pub fn endpoint() -> Result<Endpoint> {
    let key = key(http::variable(KEY), http::variable(KEY_FILE))?;
    Endpoint::new(&base(), &key)
}

/// The API's base address, unchecked.
fn base() -> String {
    http::variable(BASE_URL).unwrap_or_else(|| PUBLIC.to_owned())
}

/// The API as a service, for `temper doctor`.
pub fn service() -> Service {
    let (value, file) = (http::variable(KEY), http::variable(KEY_FILE));
    let name = if value.is_some() { KEY } else { KEY_FILE };
    let set = match (&value, &file) {
        (None, None) => Ok(None),
        _ => key(value, file).and_then(|key| Endpoint::new(PUBLIC, &key)).map(|_| Some(name)),
    };
    Service {
        name: "Claude",
        endpoint: BASE_URL,
        address: client::address(&base()),
        credentials: "ANTHROPIC_API_KEY or ANTHROPIC_API_KEY_FILE",
        set,
        users: "`annotate.claude`",
        key_for: "`annotate.claude`",
    }
}

fn key(value: Option<String>, file: Option<String>) -> Result<String> {
    match (value, file) {
        (Some(_), Some(_)) => Err(Error::surroundings(format!("{KEY} and {KEY_FILE} are both set"))
            .help("unset one of them: they may differ")),
        (Some(key), None) => Ok(key),
        (None, Some(file)) => read(Path::new(&file)),
        (None, None) => Err(Error::surroundings(format!("no API key: {KEY} is not set")).help(format!(
            "set it in the environment that `temper` runs in, or name a file that holds it in {KEY_FILE}"
        ))),
    }
}

fn read(file: &Path) -> Result<String> {
    let told = |what: &str| Error::surroundings(format!("{KEY_FILE}: {}: {what}", file.display()));
    if file.is_relative() {
        return Err(told("not an absolute path"));
    }
    let text = engine::text::read(file).map_err(|e| told(&e.to_string()))?;
    match text.trim() {
        "" => Err(told("the file is empty")),
        key => Ok(key.to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_comes_from_one_place() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("key");
        std::fs::write(&file, "\u{feff}sk-secret\r\n").unwrap();
        let name = || Some(file.display().to_string());
        assert_eq!(key(Some("sk-1".into()), None).unwrap(), "sk-1");
        assert_eq!(key(None, name()).unwrap(), "sk-secret");
        let both = key(Some("sk-1".into()), name()).unwrap_err();
        assert_eq!((both.exit_code(), both.message.contains("both set")), (3, true));
        for (file, told) in [("key", "not an absolute path"), ("/none/such", "No such file"), ("/dev/null", "is empty")]
        {
            let error = key(None, Some(file.into())).unwrap_err();
            assert!(error.message.starts_with(&format!("ANTHROPIC_API_KEY_FILE: {file}: ")), "{error}");
            assert!(error.message.contains(told), "{error}");
        }
        let none = key(None, None).unwrap_err();
        assert_eq!((none.exit_code(), none.message.as_str()), (3, "no API key: ANTHROPIC_API_KEY is not set"));
    }
}
