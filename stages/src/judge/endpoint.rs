//! Address and key of an API, validated before anything is sent.

use engine::error::{Error, Result};
use reqwest::Url;
use reqwest::header::{HeaderMap, HeaderValue};
use serde_json::Value;

use super::provider::Protocol;

/// Address and key of an API.
#[derive(Clone)]
pub struct Endpoint {
    pub protocol: &'static Protocol,
    base: Url,
    key: Option<String>,
    /// The headers of each request, with the key. Its debug output is `Sensitive`.
    headers: HeaderMap,
    /// The variable or parameter that holds the address, for messages.
    pub address_name: String,
    /// The variable that holds the key, for messages; `None` without a key.
    pub key_name: Option<String>,
}

impl Endpoint {
    /// Address and key each come with the name of the variable or parameter that holds them.
    ///
    /// # Errors
    /// If address or key cannot be used in a request: gives the name, never the key.
    pub fn new(
        protocol: &'static Protocol,
        (base, address_name): (&str, &str),
        key: Option<(&str, &str)>,
    ) -> Result<Self> {
        // The base is checked alone first, because `https://` with a path would parse the path as a host.
        let plain = Url::parse(base).ok().filter(|url| matches!(url.scheme(), "http" | "https") && url.has_host());
        let base =
            plain.and_then(|_| Url::parse(&format!("{}/", base.trim_end_matches('/'))).ok()).ok_or_else(|| {
                Error::user(format!("{address_name}: `{base}` is no address of an API")).help(protocol.address_help)
            })?;
        let mut headers = HeaderMap::new();
        for (name, value) in protocol.headers {
            headers.insert(*name, HeaderValue::from_static(value));
        }
        if let Some((key, key_name)) = key {
            let (header, prefix) = protocol.key_header;
            // Stricter than a header value: keys are plain ASCII, so anything else is a mistake.
            let plain = !key.is_empty() && key.bytes().all(|b| b.is_ascii_graphic());
            let value = HeaderValue::from_str(&format!("{prefix}{key}")).ok().filter(|_| plain);
            let mut value = value.ok_or_else(|| {
                Error::user(format!("{key_name} holds a character that no key has, such as a space or a line break"))
                    .help("set it to the key alone")
            })?;
            value.set_sensitive(true);
            headers.insert(header, value);
        }
        let (key, key_name) = key.map(|(key, name)| (key.to_owned(), name.to_owned())).unzip();
        Ok(Self { protocol, base, key, headers, address_name: address_name.to_owned(), key_name })
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

    pub fn headers(&self) -> &HeaderMap {
        &self.headers
    }

    /// What a rejected key calls for.
    pub fn key_help(&self) -> String {
        match &self.key_name {
            Some(name) => format!("check {name}"),
            None => "the endpoint wants a key: name the variable that holds it in `key_variable`".to_owned(),
        }
    }

    /// Removes the key from a text, and from any JSON in it: a response that repeats the key must not be stored with
    /// it.
    pub fn without_key_in(&self, mut text: Vec<u8>) -> Vec<u8> {
        let Some(key) = &self.key else { return text };
        if text.windows(key.len()).any(|window| window == key.as_bytes()) {
            text = String::from_utf8_lossy(&text).replace(key, "***").into_bytes();
        }
        // JSON may contain the key in escaped form.
        if text.contains(&b'\\')
            && let Ok(mut value) = serde_json::from_slice(&text)
            && redact(&mut value, key)
        {
            text = value.to_string().into_bytes();
        }
        text
    }

    /// Removes the key from an error.
    pub fn without_key(&self, mut error: Error) -> Error {
        if let Some(key) = &self.key {
            error.message = error.message.replace(key, "***");
            error.help = error.help.map(|help| help.replace(key, "***"));
        }
        error
    }
}

/// Returns whether the value contained the key.
fn redact(value: &mut Value, key: &str) -> bool {
    let redacted = |text: &str| text.contains(key).then(|| text.replace(key, "***"));
    match value {
        Value::String(text) => redacted(text).map(|new| *text = new).is_some(),
        Value::Array(all) => all.iter_mut().fold(false, |found, value| redact(value, key) | found),
        Value::Object(fields) => {
            let mut found = false;
            *fields = std::mem::take(fields)
                .into_iter()
                .map(|(name, mut value)| {
                    let new = redacted(&name);
                    found |= redact(&mut value, key) | new.is_some();
                    (new.unwrap_or(name), value)
                })
                .collect();
            found
        }
        Value::Null | Value::Bool(_) | Value::Number(_) => false,
    }
}

#[cfg(test)]
mod tests {
    use crate::judge::providers::anthropic::endpoint_at;

    #[test]
    fn the_key_is_nowhere_in_a_text_however_json_spells_it() {
        let endpoint = endpoint_at("http://localhost", "sk-secret").unwrap();
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
