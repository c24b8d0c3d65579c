//! `temper init`: creates a small commented pipeline, the JSON schema that editors check it with, and a `.gitignore`.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use engine::error::{AtPath, Error, Result};
use engine::kind::Registry;

use super::CommandResult;

/// Its first line names the schema's file.
const PIPELINE: &str = include_str!("init.yaml");
const GITIGNORE: &str =
    "# temper's store of artifacts and runs. A run makes everything in it again, except paid answers (cache/requests).
/cache/
";

pub fn init(folder: &Path, registry: &Registry) -> CommandResult {
    let schema = format!("{:#}\n", engine::schema::schema(registry));
    // Paths are shown to the user: without a leading `./`.
    let base = if folder == Path::new(".") { Path::new("") } else { folder };
    let files = [("pipeline.yaml", PIPELINE), ("pipeline.schema.json", &schema), (".gitignore", GITIGNORE)]
        .map(|(name, text)| (base.join(name), text));
    if folder.exists() && !folder.is_dir() {
        return Err(Error::user(format!("{}: not a folder", folder.display())).into());
    }
    let existing: Vec<String> = files
        .iter()
        .filter(|(path, _)| path.symlink_metadata().is_ok())
        .map(|(path, _)| path.display().to_string())
        .collect();
    if !existing.is_empty() {
        let verb = if existing.len() == 1 { "exists" } else { "exist" };
        return Err(Error::user(format!("{} already {verb}: nothing was created", existing.join(", ")))
            .help("choose another folder: `temper init FOLDER`")
            .into());
    }
    fs::create_dir_all(folder).at(folder)?;
    let mut created = Vec::new();
    if let Err(error) = files.iter().try_for_each(|(path, text)| create(path, text, &mut created)) {
        for path in created {
            // The first error is the one to report.
            let _ = fs::remove_file(path);
        }
        return Err(error.into());
    }
    for (path, _) in &files {
        outln!("created {}", path.display());
    }
    outln!("\nrun it: temper run {}", files[0].0.display());
    Ok(0)
}

/// Writes a file that must not exist yet, and adds it to `created` as soon as it does.
fn create(path: &Path, text: &str, created: &mut Vec<PathBuf>) -> Result<()> {
    let mut file = fs::File::create_new(path).at(path)?;
    created.push(path.to_owned());
    file.write_all(text.as_bytes()).at(path)
}
