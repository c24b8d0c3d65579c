//! Reads an API's key from the environment, or from a file that the environment names. Errors never contain the key.

use std::path::Path;

use engine::error::{Error, Result};

use crate::http;

/// The variable that names a file which holds only the key of `variable`, for machines where others can see
/// environments.
pub fn file_variable(variable: &str) -> String {
    format!("{variable}_FILE")
}

/// Whichever of `variable` and its [`file_variable`] is set; `variable` if both are.
pub fn variable_set(variable: &str) -> Option<String> {
    [variable.to_owned(), file_variable(variable)].into_iter().find(|name| http::variable(name).is_some())
}

/// The key in `variable`, or in the file that its [`file_variable`] names.
///
/// # Errors
/// If there is no key, or more than one.
pub fn key(variable: &str) -> Result<String> {
    choose(variable, http::variable(variable), http::variable(&file_variable(variable)))
}

fn choose(variable: &str, value: Option<String>, file: Option<String>) -> Result<String> {
    let of_file = file_variable(variable);
    match (value, file) {
        (Some(_), Some(_)) => Err(Error::environment(format!("{variable} and {of_file} are both set"))
            .help("unset one of them: they may differ")),
        (Some(key), None) => Ok(key),
        (None, Some(file)) => read(&of_file, Path::new(&file)),
        (None, None) => Err(Error::environment(format!("no API key: {variable} is not set")).help(format!(
            "set it in the environment that `temper` runs in, or name a file that holds it in {of_file}"
        ))),
    }
}

fn read(of_file: &str, file: &Path) -> Result<String> {
    let told = |what: &str| Error::environment(format!("{of_file}: {}: {what}", file.display()));
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

    fn key(value: Option<String>, file: Option<String>) -> Result<String> {
        choose("ANTHROPIC_API_KEY", value, file)
    }

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
