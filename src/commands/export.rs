//! `temper export`: writes the metrics and curves of a run, or its labels and posts, for other tools.

use std::path::{Path, PathBuf};

use engine::error::{AtPath, Error, Result};
use engine::kind::Registry;
use serde_json::json;
use stages::labels::trl::{Layout, write_posts, write_preferences};
use stages::types::{Posts, Preferences};

use super::{CommandResult, load, open_store, print_json, runs};
use crate::args::{ExportArgs, ExportFormat};
use crate::metrics::curves;
use crate::metrics::tensorboard::{Scalar, event_file};
use crate::output::counted;
use crate::report::csv_text;
use crate::report::load::{Instance, RunData};

/// The numbers of one instance; metrics have no step.
struct Exported<'a> {
    instance: &'a Instance,
    /// Seconds since 1970 at which its artifact was made, or used for the first time in this run.
    at: f64,
    /// Names, steps and values.
    numbers: Vec<(String, Option<i64>, f64)>,
}

pub fn export(args: &ExportArgs, registry: &Registry) -> CommandResult {
    // Reports the faults of the pipeline file.
    load(&args.file, &[], registry)?;
    let store = open_store(&args.file)?;
    let folder = runs::find_of(&store, args.run.as_deref().unwrap_or("latest"), &args.file)?;
    let run = RunData::read(&folder, &store)?;
    let chosen = chosen(&run, &args.stages)?;
    let layout = match args.format {
        ExportFormat::Trl => Some(Layout::Texts),
        ExportFormat::TrlMessages => Some(Layout::Messages),
        ExportFormat::Tensorboard | ExportFormat::Csv => None,
    };
    if let Some(layout) = layout {
        return rows(&run, &chosen, layout, args);
    }
    let mut exported = Vec::new();
    for instance in chosen {
        let Some(folder) = run.folder(instance) else { continue };
        let metrics = run.metrics(instance).into_iter().map(|(name, value)| (name, None, value));
        let mut numbers: Vec<_> = metrics.collect();
        for curve in curves(&folder)? {
            numbers.extend(curve.points.iter().map(|(step, value)| (curve.name.clone(), Some(*step), *value)));
        }
        if !numbers.is_empty() {
            let at = run.result(instance).ended.unwrap_or(run.started);
            exported.push(Exported { instance, at, numbers });
        }
    }
    std::fs::create_dir_all(&args.out).at(&args.out)?;
    let files = match args.format {
        ExportFormat::Tensorboard => tensorboard(&exported, &args.out)?,
        _ => vec![csv(&run, &exported, &args.out)?],
    };
    if args.file.store.json {
        print_json(&json!({ "run": run.id, "files": files }));
    } else {
        let count = counted(exported.len(), "instance");
        outln!("{count} of run {} written to {}", run.id, args.out.display());
        if matches!(args.format, ExportFormat::Tensorboard) {
            outln!("show them: tensorboard --logdir {}", args.out.display());
        }
    }
    Ok(0)
}

/// Writes a file of JSON lines for each instance that holds preferences or posts: `OUT/INSTANCE.jsonl`.
fn rows(run: &RunData, chosen: &[&Instance], layout: Layout, args: &ExportArgs) -> CommandResult {
    std::fs::create_dir_all(&args.out).at(&args.out)?;
    let mut written = Vec::new();
    for instance in chosen {
        let Some(folder) = run.folder(instance) else { continue };
        let path = args.out.join(format!("{}.jsonl", instance.name));
        let count = match instance.output.as_str() {
            Preferences::NAME => write_preferences(&folder, layout, &path)?,
            Posts::NAME => write_posts(&folder, layout, &path)?,
            _ => continue,
        };
        written.push((path, count));
    }
    if written.is_empty() {
        return Err(Error::user(format!("run {} has no preferences and no posts among these stages", run.id))
            .help("name a stage whose type is Preferences or Posts: `temper kinds` shows the types")
            .into());
    }
    if args.file.store.json {
        let files: Vec<_> = written.iter().map(|(path, count)| json!({ "file": path, "rows": count })).collect();
        print_json(&json!({ "run": run.id, "files": files }));
    } else {
        for (path, count) in &written {
            outln!("{}: {}", path.display(), counted(*count, "row"));
        }
    }
    Ok(0)
}

/// The instances that `stages` names: a stage (all its instances) or an instance; all if it names none.
fn chosen<'a>(run: &'a RunData, stages: &[String]) -> Result<Vec<&'a Instance>> {
    let is = |instance: &Instance, typed: &str| instance.name == typed || instance.stage() == typed;
    let typed: Vec<String> = stages.iter().map(|stage| stage.replace(' ', "")).collect();
    for name in &typed {
        if !run.instances.iter().any(|instance| is(instance, name)) {
            return Err(Error::user(format!("run {} has no stage `{name}`", run.id))
                .help("`temper plan PIPELINE` lists the stages of the pipeline"));
        }
    }
    let selected = run.instances.iter().filter(|i| typed.is_empty() || typed.iter().any(|name| is(i, name)));
    Ok(selected.collect())
}

/// A folder per instance, which TensorBoard shows as a run.
fn tensorboard(exported: &[Exported], out: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for Exported { instance, at, numbers } in exported {
        let scalars: Vec<Scalar> = numbers
            .iter()
            .map(|(name, step, value)| {
                // TensorBoard groups tags by the part before the first slash.
                let tag = if step.is_some() { name.replacen('.', "/", 1) } else { format!("metrics/{name}") };
                Scalar { tag, step: step.unwrap_or(0), value: *value }
            })
            .collect();
        let folder = out.join(&instance.name);
        std::fs::create_dir_all(&folder).at(&folder)?;
        // TensorBoard reads every file of a folder: those of an earlier export would be shown too.
        for entry in std::fs::read_dir(&folder).at(&folder)? {
            let path = entry.at(&folder)?.path();
            if path.extension().is_some_and(|e| e == "temper") {
                std::fs::remove_file(&path).at(&path)?;
            }
        }
        let path = folder.join(format!("events.out.tfevents.{:010}.temper", *at as u64));
        std::fs::write(&path, event_file(*at, &scalars)).at(&path)?;
        files.push(path);
    }
    Ok(files)
}

fn csv(run: &RunData, exported: &[Exported], out: &Path) -> Result<PathBuf> {
    let mut rows = Vec::new();
    for Exported { instance, numbers, .. } in exported {
        for (name, step, value) in numbers {
            let step = step.map_or_else(String::new, |step| step.to_string());
            rows.push(vec![run.id.clone(), instance.name.clone(), name.clone(), step, value.to_string()]);
        }
    }
    let path = out.join("metrics.csv");
    std::fs::write(&path, csv_text(&["run", "stage", "name", "step", "value"], &rows)).at(&path)?;
    Ok(path)
}
