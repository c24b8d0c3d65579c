//! Parameters that name files: one path or several, a folder for what is in it, a wildcard for what it matches.

use std::borrow::Cow;
use std::path::{Path, PathBuf};

use engine::error::{At, Error, Result};
use engine::kind::InputPath;
use engine::wildcard;
use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde::{Deserialize, Serialize};

/// One path or a list of paths; each enters the key by content.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct Paths(pub Vec<InputPath>);

impl<'de> Deserialize<'de> for Paths {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged, expecting = "expected a path or a list of paths")]
        enum Either {
            Many(Vec<InputPath>),
            One(InputPath),
        }
        Ok(Self(match Either::deserialize(d)? {
            Either::Many(paths) => paths,
            Either::One(path) => vec![path],
        }))
    }
}

impl JsonSchema for Paths {
    fn schema_name() -> Cow<'static, str> {
        "Paths".into()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        let path = generator.subschema_for::<InputPath>();
        schemars::json_schema!({ "anyOf": [path, { "type": "array", "items": path, "minItems": 1 }] })
    }
}

impl Paths {
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The files, sorted within a folder or a wildcard, in the order of the paths; `matching` is a pattern that the names of
    /// a folder's files must match. Hidden files of a folder are left out.
    ///
    /// # Errors
    /// If a path does not exist, or stands for no file.
    pub fn files(&self, matching: Option<&str>) -> Result<Vec<PathBuf>> {
        let pattern = matching
            .map(|pattern| glob::Pattern::new(pattern).map_err(|e| Error::yours(format!("`matching: {pattern}`: {e}"))))
            .transpose()?;
        let mut files = Vec::new();
        for InputPath(path) in &self.0 {
            let found = expand(path, pattern.as_ref())?;
            if found.is_empty() {
                let pattern = matching.map_or(String::new(), |pattern| format!(" that matches `{pattern}`"));
                return Err(Error::yours(format!("{}: no file{pattern}", path.display())));
            }
            files.extend(found);
        }
        Ok(files)
    }
}

fn expand(path: &Path, matching: Option<&glob::Pattern>) -> Result<Vec<PathBuf>> {
    if path.is_dir() {
        return below(path, matching);
    }
    if path.exists() {
        return Ok(vec![path.to_owned()]);
    }
    if !wildcard::is_wildcard(path) {
        return Err(Error::yours(format!("{}: no such file", path.display())));
    }
    wildcard::files(path)
}

fn below(folder: &Path, matching: Option<&glob::Pattern>) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    let mut entries: Vec<PathBuf> =
        std::fs::read_dir(folder).at(folder)?.map(|entry| entry.map(|e| e.path()).at(folder)).collect::<Result<_>>()?;
    entries.sort();
    for path in entries {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if name.starts_with('.') {
        } else if path.is_dir() {
            files.extend(below(&path, matching)?);
        } else if matching.is_none_or(|pattern| pattern.matches(&name)) {
            files.push(path);
        }
    }
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn paths(paths: &[PathBuf]) -> Paths {
        Paths(paths.iter().cloned().map(InputPath).collect())
    }

    #[test]
    fn one_path_and_a_list_normalise_alike() {
        let one: Paths = serde_json::from_str("\"a.jsonl\"").unwrap();
        let many: Paths = serde_json::from_str("[\"a.jsonl\"]").unwrap();
        assert_eq!(one, many);
        let normal = serde_json::to_value(&one).unwrap();
        assert_eq!(normal, serde_json::json!([{ "$path": "a.jsonl" }]));
        assert_eq!(serde_json::from_value::<Paths>(normal).unwrap(), one);
    }

    #[test]
    fn folders_and_wildcards_stand_for_their_files_in_order() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path();
        std::fs::create_dir(root.join("sub")).unwrap();
        for name in ["b.jsonl", "a.jsonl", "sub/c.jsonl", "notes.txt", ".hidden"] {
            std::fs::write(root.join(name), "").unwrap();
        }
        let names = |files: Vec<PathBuf>| -> Vec<String> {
            files.iter().map(|f| f.strip_prefix(root).unwrap().display().to_string()).collect()
        };
        let all = paths(&[root.to_owned()]);
        assert_eq!(names(all.files(Some("*.jsonl")).unwrap()), ["a.jsonl", "b.jsonl", "sub/c.jsonl"]);
        assert_eq!(names(all.files(None).unwrap()).len(), 4);
        let wild = paths(&[root.join("*.jsonl")]);
        assert_eq!(names(wild.files(None).unwrap()), ["a.jsonl", "b.jsonl"]);
        let missing = paths(&[root.join("x.jsonl")]).files(None).unwrap_err().message;
        assert!(missing.ends_with("x.jsonl: no such file"), "{missing}");
        assert!(all.files(Some("*.gz")).unwrap_err().message.contains("no file that matches `*.gz`"));
    }
}
