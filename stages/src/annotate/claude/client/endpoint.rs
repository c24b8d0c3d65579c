//! Address and key of the API, validated before anything is sent.

use engine::error::{Error, Result};
use reqwest::Url;
use reqwest::header::HeaderValue;
use serde_json::Value;

use super::{BASE_URL, KEY};

/// Address and key of the API.
#[derive(Clone)]
pub struct Endpoint {
    base: Url,
    key: String,
    header: HeaderValue,
}

/// The base address that paths are joined to.
///
/// # Errors
/// If it is not a valid address.
pub fn address(base: &str) -> Result<Url> {
    // The base is checked alone first, because `https://` with a path would parse the path as a host.
    let plain = Url::parse(base).ok().filter(|url| matches!(url.scheme(), "http" | "https") && url.has_host());
    plain.and_then(|_| Url::parse(&format!("{}/", base.trim_end_matches('/'))).ok()).ok_or_else(|| {
        Error::yours(format!("{BASE_URL}: `{base}` is no address of an API"))
            .help("expected one like https://api.anthropic.com; unset it for that one")
    })
}

impl Endpoint {
    /// # Errors
    /// If address or key cannot be used in a request: names the variable, never the key.
    pub fn new(base: &str, key: &str) -> Result<Self> {
        let base = address(base)?;
        // Stricter than a header value: keys are plain ASCII, so anything else is a mistake.
        let plain = !key.is_empty() && key.bytes().all(|b| b.is_ascii_graphic());
        let mut header = HeaderValue::from_str(key).ok().filter(|_| plain).ok_or_else(|| {
            Error::yours(format!("{KEY} holds a character that no key has, such as a space or a line break"))
                .help("set it to the key alone")
        })?;
        header.set_sensitive(true);
        Ok(Self { base, key: key.to_owned(), header })
    }

    /// The base address, which identifies the endpoint.
    pub fn base(&self) -> &str {
        self.base.as_str()
    }

    /// The address of `path`, such as `v1/messages`. Callers must check path segments that come from a server.
    pub fn at(&self, path: &str) -> Url {
        // Joining a valid base with a relative path of this program cannot fail.
        self.base.join(path).unwrap_or_else(|_| self.base.clone())
    }

    /// The value of `x-api-key`; its debug output is `Sensitive`.
    pub fn header(&self) -> &HeaderValue {
        &self.header
    }

    /// Removes the key from a text, and from any JSON in it: a response that repeats the key must not be stored with
    /// it.
    pub fn without_key_in(&self, mut text: Vec<u8>) -> Vec<u8> {
        let key = self.key.as_bytes();
        if text.windows(key.len()).any(|window| window == key) {
            text = String::from_utf8_lossy(&text).replace(&self.key, "***").into_bytes();
        }
        // JSON may contain the key in escaped form.
        if text.contains(&b'\\')
            && let Ok(mut value) = serde_json::from_slice(&text)
            && self.redact(&mut value)
        {
            text = value.to_string().into_bytes();
        }
        text
    }

    /// Returns whether the value contained the key.
    fn redact(&self, value: &mut Value) -> bool {
        let redacted = |text: &str| text.contains(&self.key).then(|| text.replace(&self.key, "***"));
        match value {
            Value::String(text) => redacted(text).map(|new| *text = new).is_some(),
            Value::Array(all) => all.iter_mut().fold(false, |found, value| self.redact(value) | found),
            Value::Object(fields) => {
                let mut found = false;
                *fields = std::mem::take(fields)
                    .into_iter()
                    .map(|(name, mut value)| {
                        let new = redacted(&name);
                        found |= self.redact(&mut value) | new.is_some();
                        (new.unwrap_or(name), value)
                    })
                    .collect();
                found
            }
            Value::Null | Value::Bool(_) | Value::Number(_) => false,
        }
    }

    /// Removes the key from an error.
    pub fn without_key(&self, mut error: Error) -> Error {
        error.message = error.message.replace(&self.key, "***");
        error.help = error.help.map(|help| help.replace(&self.key, "***"));
        error
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_key_is_nowhere_in_a_text_however_json_spells_it() {
        let endpoint = Endpoint::new("http://localhost", "sk-secret").unwrap();
        let without = |text: &str| String::from_utf8(endpoint.without_key_in(text.into())).unwrap();
        for said in ["sk-secret", r"sk\u002dsecret", r"\u0073k-secre\u0074"] {
            let text = format!(r#"{{"a":[1,{{"x {said}":"your key\n{said}!"}}]}}"#);
            assert_eq!(without(&text), r#"{"a":[1,{"x ***":"your key\n***!"}]}"#, "{said}");
        }
        let others = [r#"{"a": "b\n"}"#, r"no JSON \", "", r#"{"a":"sk\\u002dsecret"}"#];
        others.iter().for_each(|text| assert_eq!(without(text), *text));
        assert_eq!(without("<html>sk-secret"), "<html>***");
    }
}
