//! Describes a kind for users: its ports and parameters, from its own types.

use serde::Serialize;
use serde_json::{Value, json};

use crate::kind::{AnyKind, Arity, Port, Signature};

/// A kind's ports and parameters.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Description {
    /// The ports of `signature`, then those that exist only at other values of a parameter.
    pub ports: Vec<PortSpec>,
    /// At default parameters. A required parameter has its first possible value, or its name in angle brackets: the
    /// output of `command` is `<output>`. `None` if there is no such signature.
    pub signature: Option<Signature>,
    pub params: Vec<Param>,
}

/// A port, and the parameters that it depends on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct PortSpec {
    #[serde(flatten)]
    pub port: Port,
    /// Whether it exists at default parameters.
    pub by_default: bool,
    pub exceptions: Vec<Exception>,
}

/// Values of one parameter that change a port.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Exception {
    pub param: String,
    pub values: Vec<String>,
    /// `None`: there is no such port.
    pub arity: Option<Arity>,
}

/// A parameter, or a field of one.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Param {
    pub name: String,
    /// The possible values: `integer`, `sft | gold`, `[text, …]`.
    #[serde(rename = "type")]
    pub values: String,
    pub required: bool,
    /// `None` if it is required or does not say.
    pub default: Option<Value>,
    pub about: String,
    /// The words among the values that say what they mean: (word, meaning).
    pub words: Vec<(String, String)>,
    /// The fields of a map.
    pub fields: Vec<Param>,
}

pub fn describe(kind: &dyn AnyKind) -> Description {
    let schema = kind.schema().to_value();
    let root = Node { root: &schema, schema: &schema };
    let defaults = root.placeholder("");
    let signature = kind.signature(&defaults).ok();
    let ports = signature.as_ref().map_or_else(Vec::new, |signature| ports(kind, &root, &defaults, signature));
    Description { ports, signature, params: root.params(DEPTH) }
}

/// Varies each parameter that has a closed set of words, one at a time.
fn ports(kind: &dyn AnyKind, root: &Node<'_>, defaults: &Value, signature: &Signature) -> Vec<PortSpec> {
    let spec = |port: &Port, by_default| PortSpec { port: port.clone(), by_default, exceptions: Vec::new() };
    let mut specs: Vec<PortSpec> = signature.ports.iter().map(|port| spec(port, true)).collect();
    for (param, node) in root.properties() {
        for (word, _) in node.words() {
            let mut params = defaults.clone();
            params[param] = word.as_str().into();
            let Ok(other) = kind.signature(&params) else { continue };
            for port in &other.ports {
                if specs.iter().all(|spec| spec.port.name != port.name) {
                    specs.push(spec(port, false));
                }
            }
            for spec in &mut specs {
                let arity = other.ports.iter().find(|port| port.name == spec.port.name).map(|port| port.arity);
                if arity != spec.by_default.then_some(spec.port.arity) {
                    spec.except(param, &word, arity);
                }
            }
        }
    }
    specs
}

impl PortSpec {
    fn except(&mut self, param: &str, value: &str, arity: Option<Arity>) {
        match self.exceptions.iter_mut().find(|e| e.param == param && e.arity == arity) {
            Some(exception) => exception.values.push(value.to_owned()),
            None => {
                self.exceptions.push(Exception { param: param.to_owned(), values: vec![value.to_owned()], arity });
            }
        }
    }

    /// How the port depends on parameters: `` optional with `by: facts` ``; empty if it does not.
    pub fn condition(&self) -> String {
        let conditions = self.exceptions.iter().map(|Exception { param, values, arity }| {
            let values: Vec<String> = values.iter().map(|value| format!("`{param}: {value}`")).collect();
            let what = match arity {
                _ if !self.by_default => "only with",
                None => "not with",
                Some(Arity::One) => "required with",
                Some(Arity::Optional) => "optional with",
                Some(Arity::Many) => "one or more with",
            };
            format!("{what} {}", values.join(", "))
        });
        conditions.collect::<Vec<_>>().join("; ")
    }
}

/// A node of a JSON schema.
#[derive(Clone, Copy)]
struct Node<'a> {
    root: &'a Value,
    schema: &'a Value,
}

/// Maximum depth of nested fields and alternatives, since a schema may contain itself.
const DEPTH: usize = 8;

impl<'a> Node<'a> {
    fn at(self, schema: &'a Value) -> Self {
        Self { schema, ..self }
    }

    fn get(self, key: &str) -> Option<&'a Value> {
        self.schema.get(key)
    }

    /// The schema that a reference names.
    fn resolved(self) -> Self {
        let target = self.get("$ref").and_then(Value::as_str).and_then(|r| self.root.pointer(r.strip_prefix('#')?));
        target.map_or(self, |schema| self.at(schema))
    }

    /// The schemas of which a value must match one, without `null`.
    fn alternatives(self) -> Vec<Self> {
        let mut found = Vec::new();
        self.collect_alternatives(&mut found, DEPTH);
        found
    }

    fn collect_alternatives(self, found: &mut Vec<Self>, depth: usize) {
        let node = self.resolved();
        let inner = ["anyOf", "oneOf"].into_iter().find_map(|key| node.get(key)?.as_array());
        match inner {
            Some(inner) if depth > 0 => {
                inner.iter().for_each(|schema| node.at(schema).collect_alternatives(found, depth - 1));
            }
            _ if node.get("type").is_some_and(|t| t == "null") => {}
            _ => found.push(node),
        }
    }

    fn properties(self) -> impl Iterator<Item = (&'a str, Self)> {
        let properties = self.get("properties").and_then(Value::as_object).into_iter().flatten();
        properties.map(move |(name, schema)| (name.as_str(), self.at(schema)))
    }

    fn is_required(self, name: &str) -> bool {
        self.get("required").and_then(Value::as_array).is_some_and(|all| all.iter().any(|one| one == name))
    }

    /// The words that a value may be, each with its description.
    fn words(self) -> Vec<(String, String)> {
        self.alternatives().into_iter().flat_map(Self::own_words).collect()
    }

    fn own_words(self) -> Vec<(String, String)> {
        let listed = self.get("enum").and_then(Value::as_array).into_iter().flatten();
        let words = listed.chain(self.get("const")).filter_map(Value::as_str);
        words.map(|word| (word.to_owned(), self.about())).collect()
    }

    fn about(self) -> String {
        self.get("description").and_then(Value::as_str).unwrap_or_default().replace('\n', " ")
    }

    /// The JSON type, without `null`.
    fn kind(self) -> Option<&'a str> {
        match self.get("type")? {
            Value::Array(several) => several.iter().filter_map(Value::as_str).find(|one| *one != "null"),
            one => one.as_str(),
        }
    }

    /// A value that parses, for a required parameter.
    fn placeholder(self, name: &str) -> Value {
        let Some(node) = self.alternatives().into_iter().next() else { return Value::Null };
        if let Some((word, _)) = node.own_words().into_iter().next() {
            return word.into();
        }
        match node.kind() {
            Some("string") => format!("<{name}>").into(),
            Some("integer" | "number") => json!(1),
            Some("boolean") => json!(false),
            Some("array") => json!([]),
            Some("object") => {
                let required = node.properties().filter(|(name, _)| node.is_required(name));
                Value::Object(required.map(|(name, inner)| (name.to_owned(), inner.placeholder(name))).collect())
            }
            _ => Value::Null,
        }
    }

    /// The properties, with their own down to `depth`.
    fn params(self, depth: usize) -> Vec<Param> {
        let param = |(name, node): (&str, Self)| {
            let alternatives = node.alternatives();
            let mut words: Vec<(String, String)> = alternatives.iter().flat_map(|one| one.own_words()).collect();
            words.retain(|(_, about)| !about.is_empty());
            let maps = if depth == 0 { &[][..] } else { &alternatives };
            let about = Some(node.about()).filter(|about| !about.is_empty());
            Param {
                name: name.to_owned(),
                values: values(&alternatives, depth),
                required: self.is_required(name),
                default: node.get("default").cloned(),
                about: about.unwrap_or_else(|| node.resolved().about()),
                words,
                fields: maps.iter().flat_map(|map| map.params(depth - 1)).collect(),
            }
        };
        self.properties().map(param).collect()
    }

    /// The possible values in a few words.
    fn values(self, depth: usize) -> String {
        if let [first, rest @ ..] = &self.own_words()[..] {
            return rest.iter().fold(first.0.clone(), |text, (word, _)| text + " | " + word);
        }
        let inner = |schema: Option<&'a Value>| match schema {
            Some(schema) if depth > 0 => values(&self.at(schema).alternatives(), depth - 1),
            _ => "any".to_owned(),
        };
        match self.kind() {
            Some("string") if self.get("format").is_some_and(|format| format == "path") => "path".to_owned(),
            Some("string") => "text".to_owned(),
            Some("boolean") => "true | false".to_owned(),
            Some("array") => {
                let item = inner(self.get("items"));
                match self.get("minItems").and_then(Value::as_u64) {
                    Some(n @ 2..=4) if self.get("maxItems").and_then(Value::as_u64) == Some(n) => {
                        format!("[{}]", vec![item; n as usize].join(", "))
                    }
                    _ => format!("[{item}, …]"),
                }
            }
            Some("object") => {
                let names: Vec<&str> = self.properties().map(|(name, _)| name).collect();
                match self.get("additionalProperties").filter(|more| more.is_object()) {
                    Some(more) if names.is_empty() => format!("{{name: {}, …}}", inner(Some(more))),
                    _ => format!("{{{}}}", names.join(", ")),
                }
            }
            Some(other) => other.to_owned(),
            None => "any".to_owned(),
        }
    }
}

fn values(alternatives: &[Node<'_>], depth: usize) -> String {
    let mut all: Vec<String> = Vec::new();
    for text in alternatives.iter().map(|one| one.values(depth)) {
        if !all.contains(&text) {
            all.push(text);
        }
    }
    all.join(" | ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::graph::tests::kinds::registry;

    fn of(kind: &str) -> Description {
        describe(registry().get_kind(kind).expect("a kind of the registry"))
    }

    #[test]
    fn a_required_parameter_hides_neither_ports_nor_defaults() {
        let command = of("command");
        let signature = command.signature.unwrap();
        assert_eq!((signature.open, signature.output.as_str()), (true, "Files"));
        let params: Vec<_> = command.params.iter().map(|p| (p.name.as_str(), p.values.as_str(), p.required)).collect();
        let env = ("env", "{name: text, …}", false);
        assert_eq!(
            params,
            [("run", "[text, …]", true), ("output", "text", false), env, ("files", "path | [path, …]", false)]
        );
        assert_eq!(command.params[1].default, Some(json!("Files")));
        assert_eq!(of("base").params[0].default, None);
    }

    #[test]
    fn values_are_listed_and_fields_of_maps_are_described() {
        let posts = of("dataset").params;
        let style = posts.iter().find(|p| p.name == "style").unwrap();
        assert_eq!((style.values.as_str(), style.default.as_ref()), ("plain | wild", Some(&json!("plain"))));
        let train = of("train").params;
        let lora = train.iter().find(|p| p.name == "lora").unwrap();
        assert_eq!((lora.values.as_str(), &lora.default), ("{rank, alpha}", &Some(Value::Null)));
        assert_eq!(
            lora.fields.iter().map(|f| (f.name.as_str(), f.required)).collect::<Vec<_>>(),
            [("rank", true), ("alpha", false)]
        );
    }

    #[test]
    fn a_port_names_the_parameter_that_it_depends_on() {
        let dataset = of("dataset");
        let ports: Vec<_> = dataset.ports.iter().map(|port| (port.port.name.as_str(), port.condition())).collect();
        assert_eq!(ports, [("wildlife", "only with `style: wild`".to_owned())]);
        let train: Vec<_> = of("train").ports.iter().map(|port| (port.port.name.clone(), port.condition())).collect();
        assert_eq!(train, [("base".to_owned(), String::new()), ("posts".to_owned(), String::new())]);
    }
}
