//! `temper kinds` and `temper schema`: describe the kinds and artifact types available to a pipeline, from their own
//! types.

use engine::artifact::{ArtifactType, ColumnSpec};
use engine::describe::{Description, Param, PortSpec, describe};
use engine::error::Error;
use engine::kind::{AnyKind, Arity, Port, Registry};
use serde_json::{Value, json};

use super::{CommandResult, print_json};

pub fn kinds(kind: Option<&str>, as_json: bool, registry: &Registry) -> CommandResult {
    let chosen: Vec<&dyn AnyKind> = match kind {
        None => registry.kinds().collect(),
        Some(name) => {
            let found = registry.get_kind(name);
            vec![found.ok_or_else(|| unknown("kind", name, "kinds", registry.kinds().map(AnyKind::name)))?]
        }
    };
    if as_json {
        let all: Vec<Value> = chosen.iter().map(|k| kind_json(*k)).collect();
        print_json(&json!(all));
        return Ok(0);
    }
    for k in chosen {
        let description = describe(k);
        if kind.is_some() {
            print_details(k, &description);
        } else {
            outln!("{:<20} {}", k.name(), k.about());
            outln!("{:<20} {}", "", signature_line(&description));
        }
    }
    Ok(0)
}

pub fn types(name: Option<&str>, as_json: bool, registry: &Registry) -> CommandResult {
    let chosen: Vec<&dyn ArtifactType> = match name {
        None => registry.types().collect(),
        Some(name) => {
            let found = registry.get_type(name);
            let names = registry.types().map(ArtifactType::name);
            vec![found.ok_or_else(|| unknown("artifact type", name, "kinds --type", names))?]
        }
    };
    if as_json {
        let all = chosen.iter().map(|t| {
            json!({ "type": t.name(), "schema_version": t.schema_version(), "about": t.about(), "files": t.files() })
        });
        print_json(&json!(all.collect::<Vec<_>>()));
        return Ok(0);
    }
    for t in chosen {
        match name {
            Some(_) => print_type(t),
            None => outln!("{:<20} {}", t.name(), t.about()),
        }
    }
    Ok(0)
}

pub fn schema(registry: &Registry) -> CommandResult {
    outln!("{:#}", engine::schema::schema(registry));
    Ok(0)
}

fn unknown<'a>(what: &str, name: &str, list: &str, names: impl Iterator<Item = &'a str>) -> Error {
    let near = engine::diagnostics::did_you_mean(name, names);
    Error::user(format!("unknown {what} `{name}`")).help(near.unwrap_or_else(|| format!("`temper {list}` lists them")))
}

/// The signature at default parameters, in one line.
fn signature_line(description: &Description) -> String {
    let Some(signature) = &description.signature else { return String::new() };
    let mut ports: Vec<String> = signature.ports.iter().map(port_text).collect();
    if signature.open {
        ports.push("any".to_owned());
    }
    format!("{} -> {}", if ports.is_empty() { "()".to_owned() } else { ports.join(", ") }, signature.output)
}

fn port_text(port: &Port) -> String {
    let mark = match port.arity {
        Arity::One => "",
        Arity::Optional => "?",
        Arity::Many => "…",
    };
    format!("{}: {}{mark}", port.name, accepted(port))
}

fn accepted(port: &Port) -> String {
    if port.accepts.is_empty() { "any".to_owned() } else { port.accepts.join(" | ") }
}

fn print_details(kind: &dyn AnyKind, description: &Description) {
    outln!("{} (version {})\n  {}", kind.name(), kind.version(), kind.about());
    let signature = description.signature.as_ref();
    if signature.is_some_and(|signature| signature.seeded) {
        outln!("  seeded: the stage's seed is part of its key");
    }
    if let Some(signature) = signature.filter(|signature| !signature.env.is_empty()) {
        outln!("  sees the environment variables {}", signature.env.join(", "));
    }
    outln!("ports");
    description.ports.iter().for_each(print_port);
    match signature {
        Some(signature) if signature.open => outln!("  any name: any artifact, one or more"),
        _ if description.ports.is_empty() => outln!("  none"),
        _ => {}
    }
    if let Some(signature) = signature {
        outln!("output\n  {}", signature.output);
    }
    outln!("parameters");
    if description.params.is_empty() {
        outln!("  none");
    }
    print_params(&description.params, 2);
}

fn print_port(spec: &PortSpec) {
    let count = match spec.port.arity {
        Arity::One => "",
        Arity::Optional => ", optional",
        Arity::Many => ", one or more",
    };
    let condition = spec.condition();
    let condition = if condition.is_empty() { condition } else { format!("; {condition}") };
    outln!("  {}: {}{count}{condition}", spec.port.name, accepted(&spec.port));
}

fn print_params(params: &[Param], indent: usize) {
    for param in params {
        let remark = match &param.default {
            _ if param.required => "  (required)".to_owned(),
            Some(default) => default_text(default).map_or_else(String::new, |text| format!("  (default {text})")),
            None => String::new(),
        };
        outln!("{:indent$}{}: {}{remark}", "", param.name, param.values);
        if !param.about.is_empty() {
            outln!("{:indent$}    {}", "", param.about);
        }
        let width = param.words.iter().map(|(word, _)| word.chars().count()).max().unwrap_or(0);
        for (word, about) in &param.words {
            outln!("{:indent$}    - {word:<width$}  {about}", "");
        }
        print_params(&param.fields, indent + 6);
    }
}

/// `None` if the parameter is absent by default.
fn default_text(default: &Value) -> Option<String> {
    match default {
        Value::Null => None,
        // The engine's form of a list of paths.
        Value::Object(fields) if fields.get("$files").is_some_and(|files| files == &json!([])) => None,
        Value::String(text) if !text.is_empty() => Some(text.clone()),
        Value::Object(fields) if !fields.is_empty() => {
            let fields = fields
                .iter()
                .map(|(name, value)| format!("{name}: {}", default_text(value).unwrap_or_else(|| "null".to_owned())));
            Some(format!("{{ {} }}", fields.collect::<Vec<_>>().join(", ")))
        }
        other => Some(other.to_string()),
    }
}

fn print_type(artifact_type: &dyn ArtifactType) {
    outln!("{} (schema version {})\n  {}", artifact_type.name(), artifact_type.schema_version(), artifact_type.about());
    for file in artifact_type.files() {
        let optional = if file.optional { "  (optional)" } else { "" };
        outln!("\n{}{optional}\n  {}", file.name, file.about);
        let widest =
            |of: fn(&ColumnSpec) -> &str| file.columns.iter().map(|c| of(c).chars().count()).max().unwrap_or(0);
        let (name, kind) = (widest(|c| c.name), widest(|c| &c.data_type) + 1);
        for column in &file.columns {
            let data_type = format!("{}{}", column.data_type, if column.nullable { "?" } else { "" });
            outln!("  {:<name$}  {data_type:<kind$}  {}", column.name, column.about);
            for (word, about) in &column.words {
                let about = if about.is_empty() { String::new() } else { format!(": {about}") };
                outln!("  {:<name$}  {:<kind$}  - {word}{about}", "", "");
            }
        }
    }
    if artifact_type.files().iter().any(|file| file.columns.iter().any(|column| column.nullable)) {
        outln!("\n`?`: may be null; the table may also lack the column");
    }
}

fn kind_json(kind: &dyn AnyKind) -> Value {
    let description = describe(kind);
    json!({
        "kind": kind.name(),
        "version": kind.version(),
        "about": kind.about(),
        "signature": description.signature,
        "ports": description.ports,
        "parameters": description.params,
        "defaults": kind.normalise(&json!({})).ok(),
        "schema": kind.schema(),
    })
}
