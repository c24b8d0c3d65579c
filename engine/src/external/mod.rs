//! Parameters that name files outside the store. The files' content is part of the key; their location is provenance.
//!
//! A parameter is an [`InputPath`] (one file or folder, taken literally) or [`InputFiles`] (files, folders and
//! patterns). Only [`walk`] resolves them to files: the key, the checks at planning and the kind all use its listing,
//! so that the files hashed are exactly the files read.

#[cfg(test)]
mod tests;
pub mod walk;

use std::borrow::Cow;
use std::path::{Path, PathBuf};

use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::{Value, json};

use crate::error::{Error, Result};

/// The key that marks an [`InputPath`] in normalised parameters.
const PATH_KEY: &str = "$path";
/// The key that marks [`InputFiles`] in normalised parameters.
const FILES_KEY: &str = "$files";

/// A parameter that names one file or folder literally: `*` and `[` have no special meaning.
///
/// In the pipeline file a plain string, relative to the file's folder; in normalised parameters `{"$path": "…"}`. The
/// engine makes it absolute, and recipes contain a digest in its place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InputPath(pub PathBuf);

/// A parameter that names files: one path or a list of paths, each a file, a folder (the files below it) or a pattern.
///
/// - `*`, `?` and `[…]` match within a name, `**` matches any folders. A written name that exists is taken literally.
/// - Hidden files and folders (names that start with a dot) are left out unless the path contains the dot.
/// - Each real file is read once, preferably under a name that needs no symlink: in the order of the list, sorted by
///   path within a folder or pattern.
/// - The store is left out.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct InputFiles {
    /// As written in the pipeline file.
    paths: Vec<PathBuf>,
    /// Base folder of relative paths; always taken literally, unlike `paths`.
    base: PathBuf,
    /// A pattern that file names in folders must match.
    matching: Option<String>,
    /// The files, after listing them for an attempt.
    found: Option<Vec<PathBuf>>,
}

impl InputFiles {
    pub fn is_empty(&self) -> bool {
        self.paths.is_empty()
    }

    /// The files to read, in order.
    ///
    /// # Errors
    /// If the files have not been listed; the engine lists them for attempts.
    pub fn files(&self) -> Result<&[PathBuf]> {
        match &self.found {
            Some(found) => Ok(found),
            None if self.is_empty() => Ok(&[]),
            None => Err(Error::internal("the files of a parameter were not listed before the attempt")),
        }
    }

    /// The paths as written, made absolute; includes patterns.
    pub fn absolute_paths(&self) -> impl Iterator<Item = PathBuf> {
        self.paths.iter().map(|path| absolute(&self.base, path))
    }

    /// Restricts files in folders to names that match this pattern; for a kind's
    /// [`complete`](crate::kind::Kind::complete).
    pub fn set_matching(&mut self, pattern: Option<String>) {
        self.matching = pattern;
    }

    /// Each path of the list as a parameter of its own.
    fn split(&self) -> impl Iterator<Item = Self> {
        self.paths.iter().map(|path| Self { paths: vec![path.clone()], found: None, ..self.clone() })
    }
}

/// `path` relative to `base`, without `.` components.
fn absolute(base: &Path, path: &Path) -> PathBuf {
    base.join(path).components().collect()
}

/// A parameter, or part of one, that names files outside the store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ExternalInput {
    Path(InputPath),
    Files(InputFiles),
}

impl ExternalInput {
    /// Parses a value of normalised parameters; `None` if it does not name files.
    pub fn from_value(value: &Value) -> Option<Self> {
        let object = value.as_object()?;
        if object.contains_key(PATH_KEY) {
            serde_json::from_value(value.clone()).ok().map(Self::Path)
        } else if object.contains_key(FILES_KEY) {
            serde_json::from_value(value.clone()).ok().map(Self::Files)
        } else {
            None
        }
    }

    /// Whether it names no files.
    pub fn is_empty(&self) -> bool {
        matches!(self, Self::Files(files) if files.is_empty())
    }

    /// The absolute paths that it names.
    pub fn absolute_paths(&self) -> Vec<PathBuf> {
        match self {
            Self::Path(InputPath(path)) => vec![path.clone()],
            Self::Files(files) => files.absolute_paths().collect(),
        }
    }

    /// The first path that does not exist and is not a pattern.
    pub fn missing(&self) -> Option<PathBuf> {
        let (written, patterns): (Vec<PathBuf>, Vec<bool>) = match self {
            Self::Path(_) => (self.absolute_paths(), vec![false]),
            Self::Files(files) => {
                (self.absolute_paths(), files.paths.iter().map(|path| walk::is_pattern(path)).collect())
            }
        };
        written.into_iter().zip(patterns).find(|(path, pattern)| !pattern && !path.exists()).map(|(path, _)| path)
    }

    /// Each path, with a parameter that names only this path.
    pub fn split(&self) -> Vec<(PathBuf, Self)> {
        let parts: Vec<Self> = match self {
            Self::Path(_) => vec![self.clone()],
            Self::Files(files) => files.split().map(Self::Files).collect(),
        };
        self.absolute_paths().into_iter().zip(parts).collect()
    }

    /// The same parameter with relative paths resolved from `base`.
    pub fn from_base(self, base: &Path) -> Self {
        match self {
            Self::Path(InputPath(path)) => Self::Path(InputPath(absolute(base, &path))),
            Self::Files(files) => Self::Files(InputFiles { base: base.to_owned(), found: None, ..files }),
        }
    }

    pub fn to_value(&self) -> Value {
        match self {
            Self::Path(InputPath(path)) => json!({ PATH_KEY: path.to_string_lossy() }),
            Self::Files(files) => files.to_value(),
        }
    }
}

/// Replaces every [`ExternalInput`] in normalised parameters by the result of `change`.
///
/// # Errors
/// Those of `change`.
pub fn replace(params: &Value, change: &mut dyn FnMut(ExternalInput) -> Result<Value>) -> Result<Value> {
    if let Some(external) = ExternalInput::from_value(params) {
        return change(external);
    }
    Ok(match params {
        Value::Object(fields) => Value::Object(
            fields.iter().map(|(name, value)| Ok((name.clone(), replace(value, change)?))).collect::<Result<_>>()?,
        ),
        Value::Array(items) => Value::Array(items.iter().map(|item| replace(item, change)).collect::<Result<_>>()?),
        plain => plain.clone(),
    })
}

/// Parameters for an attempt, with the files of every [`InputFiles`] listed. The folder `store` is left out.
///
/// # Errors
/// Those of [`walk::list`].
pub fn with_listed_files(params: &Value, store: Option<&Path>) -> Result<Value> {
    replace(params, &mut |external| match external {
        ExternalInput::Files(files) if !files.is_empty() => {
            let found = walk::list(&ExternalInput::Files(files.clone()), store)?.files();
            Ok(InputFiles { found: Some(found), ..files }.to_value())
        }
        other => Ok(other.to_value()),
    })
}

impl InputFiles {
    fn to_value(&self) -> Value {
        let text = |path: &PathBuf| path.to_string_lossy().into_owned();
        let mut value = json!({ FILES_KEY: self.paths.iter().map(text).collect::<Vec<_>>() });
        if !self.base.as_os_str().is_empty() {
            value["base"] = text(&self.base).into();
        }
        if let Some(matching) = &self.matching {
            value["matching"] = matching.as_str().into();
        }
        if let Some(found) = &self.found {
            value["found"] = found.iter().map(text).collect();
        }
        value
    }
}

impl Serialize for InputPath {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        ExternalInput::Path(self.clone()).to_value().serialize(s)
    }
}

impl<'de> Deserialize<'de> for InputPath {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Marked {
            #[serde(rename = "$path")]
            path: PathBuf,
        }
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Either {
            Plain(PathBuf),
            Marked(Marked),
        }
        Ok(Self(match Either::deserialize(d)? {
            Either::Plain(path) => path,
            Either::Marked(marked) => marked.path,
        }))
    }
}

impl JsonSchema for InputPath {
    fn schema_name() -> Cow<'static, str> {
        "InputPath".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        schemars::json_schema!({ "type": "string", "format": "path" })
    }
}

impl Serialize for InputFiles {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        self.to_value().serialize(s)
    }
}

impl<'de> Deserialize<'de> for InputFiles {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Marked {
            #[serde(rename = "$files")]
            paths: Vec<PathBuf>,
            #[serde(default)]
            base: PathBuf,
            matching: Option<String>,
            found: Option<Vec<PathBuf>>,
        }
        #[derive(Deserialize)]
        #[serde(untagged, expecting = "expected a path or a list of paths")]
        enum Either {
            Many(Vec<PathBuf>),
            One(PathBuf),
            Marked(Marked),
        }
        let files = match Either::deserialize(d)? {
            Either::Many(paths) => Self { paths, ..Self::default() },
            Either::One(path) => Self { paths: vec![path], ..Self::default() },
            Either::Marked(Marked { paths, base, matching, found }) => Self { paths, base, matching, found },
        };
        match files.paths.iter().any(|path| path.as_os_str().is_empty()) {
            true => Err(D::Error::custom("a path is empty")),
            false => Ok(files),
        }
    }
}

impl JsonSchema for InputFiles {
    fn schema_name() -> Cow<'static, str> {
        "InputFiles".into()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        let path = generator.subschema_for::<InputPath>();
        schemars::json_schema!({ "anyOf": [path, { "type": "array", "items": path, "minItems": 1 }] })
    }
}
