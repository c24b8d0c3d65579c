//! Assets embedded in the binary: the tokenizer and base models of the default pipeline.

use std::borrow::Cow;
use std::path::Path;

use engine::error::{AtPath, Error, Result};
use engine::names::Digest;
use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde::{Deserialize, Serialize};

/// A named folder of embedded files.
pub struct Asset {
    pub name: &'static str,
    pub files: &'static [(&'static str, &'static [u8])],
}

macro_rules! model {
    ($name:literal) => {
        Asset {
            name: $name,
            files: &[
                ("config.json", include_bytes!(concat!("../../assets/", $name, "/config.json"))),
                ("model.safetensors", include_bytes!(concat!("../../assets/", $name, "/model.safetensors"))),
                ("tokenizer.json", TOKENIZER),
            ],
        }
    };
}

const TOKENIZER: &[u8] = include_bytes!("../../assets/tinytldr/tokenizer.json");

static EMBEDDED: &[Asset] = &[
    Asset { name: "tinytldr", files: &[("tokenizer.json", TOKENIZER)] },
    model!("tinytldr-s"),
    model!("tinytldr-m"),
    model!("tinytldr-l"),
    model!("tinytldr-s2"),
    model!("tinytldr-s3"),
    model!("tinytldr-s4"),
    model!("tinytldr-s5"),
];

fn names() -> impl Iterator<Item = &'static str> {
    EMBEDDED.iter().map(|asset| asset.name)
}

/// # Errors
/// If this binary has no asset of this name.
pub fn get(name: &str) -> Result<&'static Asset> {
    EMBEDDED.iter().find(|asset| asset.name == name).ok_or_else(|| {
        Error::user(format!("the asset `{name}` is not in this binary"))
            .help("make it with `--profile from-scratch`, or give a file or folder instead of `asset`")
    })
}

/// The `config.json` of an asset; `None` if it has none.
pub fn config(name: &str) -> Option<serde_json::Value> {
    let (_, bytes) = get(name).ok()?.files.iter().find(|(file, _)| *file == "config.json")?;
    serde_json::from_slice(bytes).ok()
}

/// Writes an asset's files into `folder`.
///
/// # Errors
/// As [`get`], or if a file cannot be written.
pub fn write(name: &str, folder: &Path) -> Result<()> {
    get(name)?.files.iter().try_for_each(|(file, bytes)| {
        let path = folder.join(file);
        std::fs::write(&path, bytes).at(&path)
    })
}

/// A parameter that names an asset. A pipeline file gives only the name. Normalised parameters, and so the key, hold
/// the name and the digest of its files: a binary with other asset bytes gets another key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AssetName(pub String);

impl AssetName {
    fn digest(&self) -> Option<Digest> {
        let asset = get(&self.0).ok()?;
        let mut hasher = blake3::Hasher::new();
        for (file, bytes) in asset.files {
            hasher.update(file.as_bytes());
            hasher.update(&[0]);
            hasher.update(blake3::hash(bytes).as_bytes());
        }
        Some(hasher.finalize().into())
    }
}

impl Serialize for AssetName {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        Marked { name: self.0.clone(), digest: self.digest() }.serialize(s)
    }
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Marked {
    name: String,
    #[serde(default)]
    digest: Option<Digest>,
}

impl<'de> Deserialize<'de> for AssetName {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged, expecting = "expected the name of an asset")]
        enum Either {
            Plain(String),
            Marked(Marked),
        }
        let name = match Either::deserialize(d)? {
            Either::Plain(name) => name,
            Either::Marked(marked) => marked.name,
        };
        if names().any(|known| known == name) {
            return Ok(Self(name));
        }
        let known = names().collect::<Vec<_>>().join(", ");
        Err(serde::de::Error::custom(format!("`{name}` is no asset: expected one of {known}")))
    }
}

impl JsonSchema for AssetName {
    fn schema_name() -> Cow<'static, str> {
        "AssetName".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        schemars::json_schema!({ "enum": names().collect::<Vec<_>>() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_asset_is_named_plainly_and_normalised_with_its_digest() {
        let name: AssetName = serde_json::from_str("\"tinytldr\"").unwrap();
        let normal = serde_json::to_value(&name).unwrap();
        assert_eq!(normal["name"], "tinytldr");
        assert!(normal.get("digest").is_some());
        assert_eq!(serde_json::from_value::<AssetName>(normal).unwrap(), name);
        let error = serde_json::from_str::<AssetName>("\"tiny\"").unwrap_err().to_string();
        assert!(error.contains("`tiny` is no asset: expected one of tinytldr"), "{error}");
    }
}
