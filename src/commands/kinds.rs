//! `temper kinds` and `temper schema`: describe the kinds available to a pipeline, from the kinds' own types.

use engine::error::Error;
use engine::kind::{AnyKind, Arity, Port, Registry, Signature};
use serde_json::{Value, json};

use super::{CommandResult, print_json};

pub fn kinds(kind: Option<&str>, as_json: bool, registry: &Registry) -> CommandResult {
    let chosen: Vec<&dyn AnyKind> = match kind {
        None => registry.kinds().collect(),
        Some(name) => vec![registry.get_kind(name).ok_or_else(|| {
            let near = engine::diagnostics::did_you_mean(name, registry.kinds().map(AnyKind::name));
            let error = Error::user(format!("unknown kind `{name}`"));
            error.help(near.unwrap_or_else(|| "`temper kinds` lists them".to_owned()))
        })?],
    };
    if as_json {
        let all: Vec<Value> = chosen.iter().map(|k| describe(*k)).collect();
        print_json(&json!(all));
        return Ok(0);
    }
    for (i, k) in chosen.iter().enumerate() {
        if kind.is_none() {
            outln!("{:<20} {}", k.name(), k.about());
            if let Some(signature) = default_signature(*k) {
                outln!("{:<20} {}", "", signature_line(&signature));
            }
        } else {
            if i > 0 {
                outln!("");
            }
            print_details(*k);
        }
    }
    Ok(0)
}

pub fn schema(registry: &Registry) -> CommandResult {
    outln!("{:#}", engine::schema::schema(registry));
    Ok(0)
}

/// The signature at default parameters; `None` if a parameter is required.
fn default_signature(kind: &dyn AnyKind) -> Option<Signature> {
    kind.normalise(&json!({})).ok().and_then(|params| kind.signature(&params).ok())
}

fn signature_line(signature: &Signature) -> String {
    let mut ports: Vec<String> = signature.ports.iter().map(port).collect();
    if signature.open {
        ports.push("any".to_owned());
    }
    format!("{} -> {}", if ports.is_empty() { "()".to_owned() } else { ports.join(", ") }, signature.output)
}

fn port(port: &Port) -> String {
    let types = if port.accepts.is_empty() { "any".to_owned() } else { port.accepts.join(" | ") };
    let mark = match port.arity {
        Arity::One => "",
        Arity::Optional => "?",
        Arity::Many => "…",
    };
    format!("{}: {types}{mark}", port.name)
}

fn print_details(kind: &dyn AnyKind) {
    outln!("{} (version {})\n  {}", kind.name(), kind.version(), kind.about());
    if let Some(signature) = default_signature(kind) {
        outln!("  {}", signature_line(&signature));
        if signature.seeded {
            outln!("  seeded: the stage's seed is part of its key");
        }
        if !signature.env.is_empty() {
            outln!("  sees the environment variables {}", signature.env.join(", "));
        }
    }
    let schema = json!(kind.schema());
    let defaults = kind.normalise(&json!({})).ok();
    outln!("parameters");
    for (name, property) in schema["properties"].as_object().into_iter().flatten() {
        let required = schema["required"].as_array().is_some_and(|r| r.iter().any(|n| n == name));
        let default = match defaults.as_ref().and_then(|d| d.get(name)) {
            _ if required => "required".to_owned(),
            Some(value) => value.to_string(),
            None => String::new(),
        };
        outln!("  {name}: {default}");
        if let Some(about) = property["description"].as_str() {
            outln!("      {}", about.replace('\n', " "));
        }
    }
}

fn describe(kind: &dyn AnyKind) -> Value {
    json!({
        "kind": kind.name(),
        "version": kind.version(),
        "about": kind.about(),
        "signature": default_signature(kind),
        "defaults": kind.normalise(&json!({})).ok(),
        "schema": kind.schema(),
    })
}
