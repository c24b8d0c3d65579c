//! A view of a JSON schema for checking property names.

use serde_json::{Map, Value as Json};

/// The alternatives that a schema allows at one place, with references resolved.
pub struct SchemaView<'a> {
    root: &'a Json,
    alternatives: Vec<&'a Map<String, Json>>,
    /// Whether any value is allowed (`true`, or a schema without constraints).
    allows_any: bool,
}

/// Maximum number of references and alternatives to follow at one place.
const MAX_FOLLOWED: usize = 256;

impl<'a> SchemaView<'a> {
    pub fn of(schema: &'a Json) -> Self {
        Self::from(schema, vec![schema])
    }

    fn from(root: &'a Json, mut pending: Vec<&'a Json>) -> Self {
        let mut view = Self { root, alternatives: Vec::new(), allows_any: pending.is_empty() };
        let mut followed = 0;
        while let Some(schema) = pending.pop() {
            followed += 1;
            let Some(object) = schema.as_object().filter(|_| followed <= MAX_FOLLOWED) else {
                view.allows_any |= schema != &Json::Bool(false);
                continue;
            };
            if let Some(target) =
                object.get("$ref").and_then(Json::as_str).and_then(|r| root.pointer(r.strip_prefix('#')?))
            {
                pending.push(target);
            }
            for key in ["anyOf", "oneOf", "allOf"] {
                pending.extend(object.get(key).and_then(Json::as_array).into_iter().flatten());
            }
            let constraints = ["type", "properties", "additionalProperties", "items", "enum", "const"];
            if constraints.iter().any(|key| object.contains_key(*key)) {
                view.alternatives.push(object);
            } else if !object.keys().any(|key| matches!(key.as_str(), "$ref" | "anyOf" | "oneOf" | "allOf")) {
                view.allows_any = true;
            }
        }
        view
    }

    fn objects(&self) -> impl Iterator<Item = &'a Map<String, Json>> {
        let is_object = |schema: &&&'a Map<String, Json>| match schema.get("type") {
            Some(Json::String(one)) => one == "object",
            Some(Json::Array(types)) => types.iter().any(|one| one == "object"),
            _ => schema.contains_key("properties"),
        };
        self.alternatives.iter().filter(is_object).copied()
    }

    /// Whether the schema describes objects here.
    pub fn is_object(&self) -> bool {
        !self.allows_any && self.objects().next().is_some()
    }

    /// Names of the properties of all alternatives.
    pub fn names(&self) -> impl Iterator<Item = &'a str> {
        self.objects().filter_map(|o| o.get("properties")?.as_object()).flat_map(|p| p.keys().map(String::as_str))
    }

    /// The schema of the property `name`; `None` if no alternative allows that name.
    pub fn property(&self, name: &str) -> Option<Self> {
        let mut schemas = Vec::new();
        let mut open = self.allows_any;
        for object in self.objects() {
            match object.get("properties").and_then(|p| p.get(name)) {
                Some(schema) => schemas.push(schema),
                None => match object.get("additionalProperties") {
                    None if object.contains_key("properties") => {}
                    Some(Json::Bool(false)) => {}
                    Some(schema) => schemas.push(schema),
                    None => open = true,
                },
            }
        }
        (open || !schemas.is_empty()).then(|| {
            let mut view = Self::from(self.root, schemas);
            view.allows_any |= open;
            view
        })
    }

    /// The schema of list items here.
    pub fn items(&self) -> Self {
        Self::from(self.root, self.alternatives.iter().filter_map(|o| o.get("items")).collect())
    }

    /// Whether a path is expected here.
    pub fn is_path(&self) -> bool {
        self.alternatives.iter().any(|o| o.get("format").is_some_and(|f| f == "path"))
    }
}
