//! The Files artifact: arbitrary files. No typed port accepts it.

use std::path::Path;

use engine::artifact::{ArtifactType, Facts};
use engine::error::{AtPath, Result};

use super::folder;

/// The untyped artifact.
pub struct Files;

impl Files {
    pub const NAME: &'static str = "Files";
}

impl ArtifactType for Files {
    fn name(&self) -> &'static str {
        Self::NAME
    }

    fn about(&self) -> &'static str {
        "any files; no typed port accepts it"
    }

    fn keeps_tree(&self) -> bool {
        true
    }

    fn check(&self, folder: &Path) -> Result<Facts> {
        let mut facts = Facts::default();
        // Any program may write a `metrics.json`: one that is not a map of numbers is an ordinary file.
        let _ = folder::metrics(folder, &mut facts);
        Ok(facts)
    }

    fn preview(&self, folder: &Path, rows: usize) -> Result<String> {
        let mut names: Vec<String> = std::fs::read_dir(folder)
            .at(folder)?
            .map(|entry| entry.map(|e| e.file_name().to_string_lossy().into_owned()).at(folder))
            .collect::<Result<_>>()?;
        names.sort();
        Ok(names.iter().take(rows).map(|name| format!("{name}\n")).collect())
    }
}
