//! `remote` in a pipeline file: the store that is shared with other machines.

use std::path::Path;

use serde::Serialize;

use super::known_keys;
use super::node::{Node, Value};
use crate::diagnostics::{Diagnostics, Fault};
use crate::remote::Address;

const REMOTE_KEYS: &[&str] = &["url", "read_only"];

/// Where the remote store is, as written.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct RemoteAt {
    /// A URL, or the path of a folder relative to the pipeline file.
    pub url: String,
    /// Whether nothing is uploaded.
    pub read_only: bool,
}

/// Parses `remote: URL` or `remote: { url: URL, read_only: true }`; null means no remote.
pub fn read(node: &Node, faults: &mut Diagnostics) -> Option<RemoteAt> {
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
                    let message = format!("remote: `read_only`: expected true or false, found {}", node.what());
                    faults.push(Fault::new(node.span, message));
                }
            }
            match map.get("url") {
                Some(url) => url,
                None => {
                    faults.push(Fault::new(node.span, "`remote` does not say its `url`"));
                    return None;
                }
            }
        }
        _ => node,
    };
    let Value::Str(text) = &url.value else {
        faults.push(Fault::new(url.span, format!("`remote`: expected a URL or a folder, found {}", url.what())));
        return None;
    };
    match Address::parse(text, Path::new("")) {
        Ok(_) => Some(RemoteAt { url: text.clone(), read_only }),
        Err(error) => {
            // A fault with a place shows its line, which may hold a password.
            let place = (!text.contains(['@', '?', '#'])).then_some(url.span);
            faults.push(Fault { span: place, ..Fault::nowhere(error.message) }.maybe_help(error.help));
            None
        }
    }
}
