//! The `remote` key of a pipeline file: the store that is shared with other machines.

use std::path::Path;

use serde::Serialize;

use super::known_keys;
use super::node::{Node, Value};
use crate::diagnostics::{Diagnostic, Diagnostics};
use crate::remote::Address;

const REMOTE_KEYS: &[&str] = &["url", "read_only"];

/// The address and mode of the remote store, as written.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct RemoteSettings {
    /// A URL, or the path of a folder relative to the pipeline file.
    pub url: String,
    /// Whether nothing is uploaded.
    pub read_only: bool,
}

/// Parses `remote: URL` or `remote: { url: URL, read_only: true }`; null means no remote.
pub fn read(node: &Node, faults: &mut Diagnostics) -> Option<RemoteSettings> {
    let mut read_only = false;
    let url = match &node.value {
        Value::Null => return None,
        Value::Str(_) => node,
        Value::Map(map) => {
            known_keys(map, REMOTE_KEYS, "`remote`", faults);
            match map.get("read_only").map(|node| (&node.value, node)) {
                None | Some((Value::Null, _)) => {}
                Some((Value::Bool(value), _)) => read_only = *value,
                Some((_, node)) => {
                    let message = format!("remote: `read_only`: expected true or false, found {}", node.type_name());
                    faults.push(Diagnostic::new(node.span, message));
                }
            }
            match map.get("url") {
                Some(url) => url,
                None => {
                    faults.push(Diagnostic::new(node.span, "`remote` has no `url`"));
                    return None;
                }
            }
        }
        _ => node,
    };
    let Value::Str(text) = &url.value else {
        faults.push(Diagnostic::new(
            url.span,
            format!("`remote`: expected a URL or a folder, found {}", url.type_name()),
        ));
        return None;
    };
    match Address::parse(text, Path::new("")) {
        Ok(_) => Some(RemoteSettings { url: text.clone(), read_only }),
        Err(error) => {
            // A diagnostic with a span shows the line, which may contain a password.
            let span = (!text.contains(['@', '?', '#'])).then_some(url.span);
            faults.push(Diagnostic { span, ..Diagnostic::without_span(error.message) }.maybe_help(error.help));
            None
        }
    }
}
