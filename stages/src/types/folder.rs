//! Shared checks of artifact folders: files that must exist, JSON that must parse, safetensors that must be complete.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use engine::artifact::Facts;
use engine::error::{AtPath, Error, Result};
use engine::text::{self, strip_bom};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// Path of the file `name` in an artifact's folder.
///
/// # Errors
/// If the file is missing; the message lists the folder's contents.
pub fn file(folder: &Path, name: &str) -> Result<PathBuf> {
    let path = folder.join(name);
    if path.is_file() {
        return Ok(path);
    }
    let mut found: Vec<String> = std::fs::read_dir(folder)
        .map(|entries| entries.flatten().map(|e| e.file_name().to_string_lossy().into_owned()).collect())
        .unwrap_or_default();
    found.sort();
    let found = if found.is_empty() { "nothing".to_owned() } else { found.join(", ") };
    Err(Error::user(format!("{}: file `{name}` is missing; found {found}", folder.display())))
}

/// # Errors
/// If the file is missing or does not parse as `T`; names the file and the position.
pub fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let text = std::fs::read(path).at(path)?;
    serde_json::from_slice(strip_bom(&text)).map_err(|e| Error::user(format!("{}: {e}", path.display())))
}

/// Writes pretty JSON with a newline at the end.
///
/// # Errors
/// If it cannot be written.
pub fn write_json<T: Serialize>(path: &Path, value: &T) -> Result<()> {
    let mut text = serde_json::to_vec_pretty(value).map_err(|e| Error::internal(format!("{}: {e}", path.display())))?;
    text.push(b'\n');
    std::fs::write(path, text).at(path)
}

/// Reads the numbers of `metrics.json` into `facts`, if the file exists.
///
/// # Errors
/// If the file is not a map of numbers (null stands for a number that is not finite).
pub fn metrics(folder: &Path, facts: &mut Facts) -> Result<()> {
    let path = folder.join("metrics.json");
    if path.is_file() {
        let metrics: BTreeMap<String, Option<f64>> = read_json(&path)?;
        facts.metrics = metrics.into_iter().filter_map(|(name, value)| Some((name, value?))).collect();
    }
    Ok(())
}

/// The tensors of a safetensors file by name, as (dtype, shape). Checks that the file is as long as its header says.
///
/// # Errors
/// If the file is missing, truncated or not a safetensors file.
pub fn tensors(folder: &Path, name: &str) -> Result<BTreeMap<String, (String, Vec<u64>)>> {
    #[derive(serde::Deserialize)]
    struct Entry {
        dtype: String,
        shape: Vec<u64>,
        data_offsets: (u64, u64),
    }
    let path = file(folder, name)?;
    let broken = |what: &str| Error::user(format!("{}: not a whole safetensors file: {what}", path.display()));
    let mut open = File::open(&path).at(&path)?;
    let bytes = open.metadata().at(&path)?.len();
    let mut length = [0; 8];
    open.read_exact(&mut length).map_err(|_| broken("it is shorter than 8 bytes"))?;
    let length = u64::from_le_bytes(length);
    if length > bytes.saturating_sub(8) || length > 100_000_000 {
        return Err(broken("its header is cut off"));
    }
    let mut header = Vec::new();
    open.take(length).read_to_end(&mut header).at(&path)?;
    let header: BTreeMap<String, serde_json::Value> =
        serde_json::from_slice(&header).map_err(|e| broken(&e.to_string()))?;
    let mut tensors = BTreeMap::new();
    let mut end = 0;
    for (name, entry) in header.into_iter().filter(|(name, _)| name != "__metadata__") {
        let entry: Entry = serde_json::from_value(entry).map_err(|e| broken(&format!("tensor `{name}`: {e}")))?;
        end = end.max(entry.data_offsets.1);
        tensors.insert(name, (entry.dtype, entry.shape));
    }
    if bytes != 8 + length + end {
        return Err(broken(&format!("expected {} bytes, found {bytes}", 8 + length + end)));
    }
    Ok(tensors)
}

/// A JSON file of an artifact as text for display.
///
/// # Errors
/// If the file cannot be read.
pub fn show(folder: &Path, name: &str) -> Result<String> {
    let path = file(folder, name)?;
    Ok(format!("{name}\n{}\n", text::read(&path).at(&path)?.trim_end()))
}
