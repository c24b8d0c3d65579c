//! `--sweep`: one run, or one plan, for each combination of the values that `--set` lists.

use engine::error::Result;
use engine::kind::Registry;
use engine::store::Store;

use super::run::{Finished, run_once};
use super::{CommandResult, Failure, open_store, print_json};
use crate::args::RunArgs;
use crate::compare::{Format, Side, describe, differences, print};
use crate::report::load::RunData;

/// One combination of values.
pub struct Combination {
    /// The `--set` arguments, each with a single value.
    pub set: Vec<String>,
    /// The values that vary, for the user: `rl.with.lr=1e-4`.
    pub name: String,
}

/// The combinations, the last list varying fastest. A value that is not a list is the same in all.
///
/// # Errors
/// When an argument is not valid YAML, no argument has a list, or there are too many combinations.
pub fn combinations(set: &[String]) -> std::result::Result<Vec<Combination>, Failure> {
    let swept = engine::graph::sweep(set)?;
    let named = swept.into_iter().map(|set_of_one| {
        let varying = set_of_one.iter().zip(set).filter(|(one, all)| one != all).map(|(one, _)| one.as_str());
        let name: Vec<&str> = varying.map(|one| one.strip_prefix("stages.").unwrap_or(one)).collect();
        let name = name.join(" ");
        Combination { set: set_of_one, name }
    });
    Ok(named.collect())
}

/// Runs the combinations one after the other, over the same store, and compares their results.
pub fn run(args: &RunArgs, registry: &Registry) -> CommandResult {
    let combinations = combinations(&args.file.changes.set)?;
    let store = open_store(&args.file)?;
    let (mut sides, mut code, count) = (Vec::new(), 0, combinations.len());
    for (i, Combination { set, name }) in combinations.into_iter().enumerate() {
        if !args.file.store.json {
            outln!("{}--- {name} ({} of {count})", if i == 0 { "" } else { "\n" }, i + 1);
        }
        let mut one = args.clone();
        one.command_line = command_line(&args.file.changes.set, &set);
        one.file.changes.set = set;
        let Finished { code: own, folder } = run_once(&one, registry)?;
        code = if code == 0 { own } else { code };
        if let Some(folder) = folder {
            let run = RunData::read(&folder, &store)?;
            sides.push(side(name, &run, &store)?);
        }
        if own != 0 && !args.keep_going {
            break;
        }
    }
    if sides.len() > 1 {
        let as_json = args.file.store.json;
        let found = differences(&sides, !as_json)?;
        if as_json {
            print_json(&serde_json::json!({ "event": "sweep", "comparison": describe(&sides, &found) }));
        } else {
            outln!("\n--- comparison");
            out!("{}", print(&sides, &found, Format::Table, false));
        }
    }
    Ok(code)
}

fn side(name: String, run: &RunData, store: &Store) -> Result<Side> {
    Side::of_run(format!("{name} (run {})", run.id), run, store)
}

/// This process's command line as it would be for one combination, for the journal.
fn command_line(lists: &[String], set: &[String]) -> Vec<String> {
    let words = std::env::args_os().map(|word| word.to_string_lossy().into_owned());
    let of_one = words.filter(|word| word != "--sweep").map(|word| {
        let value = word.strip_prefix("--set=").unwrap_or(&word);
        match lists.iter().position(|list| list == value) {
            Some(at) => word.replace(value, &set[at]),
            None => word,
        }
    });
    of_one.collect()
}
