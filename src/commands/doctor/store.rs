//! Checks the store and its disk.

use std::path::Path;

use engine::error::{Error, Result};
use engine::store::{self, Store};

use super::{Check, nearest_folder, size};
use crate::commands::counted;

/// Below this much free space, artifacts and checkpoints may fill the disk. An estimate, not measured.
const LITTLE_SPACE: u64 = 2 << 30;
/// Below this much free space, not even a small stage can store its artifact.
const NO_SPACE: u64 = 16 << 20;
/// Below this many free inodes, a file system may run out of them in a large run.
const FEW_INODES: u64 = 10_000;

pub fn checks(root: &Path, store: &Result<Option<Store>>) -> Vec<Check> {
    let mut checks: Vec<Check> = disk(root).into_iter().collect();
    let place = root.display();
    let writable = match store {
        Err(error) => {
            checks.push(Check::error("store", error.clone()));
            return checks;
        }
        Ok(None) => {
            checks.push(Check::ok("store", format!("{place}: does not exist yet; a run creates it")));
            true
        }
        Ok(Some(store)) => {
            checks.push(content(store));
            store.is_writable()
        }
    };
    if writable {
        checks.push(file_system(&nearest_folder(root)));
    } else {
        let help = "cached stages can be reused, shown and reported; to run others, choose another store with `--store FOLDER`";
        checks.push(Check::warning("store", format!("{place}: read-only"), help));
    }
    checks
}

fn disk(root: &Path) -> Option<Check> {
    let folder = nearest_folder(root);
    let disk = rustix::fs::statvfs(&folder).ok()?;
    let free = disk.f_bavail.saturating_mul(disk.f_frsize);
    let message = format!("{} free at {}", size(free), folder.display());
    let help = "free some space, or put the store on another disk with `--store FOLDER`";
    Some(if free < NO_SPACE {
        Check::error("disk", Error::environment(message).help(help))
    } else if free < LITTLE_SPACE {
        Check::warning("disk", message, help)
    } else if disk.f_files > 0 && disk.f_favail < FEW_INODES {
        Check::warning("disk", format!("{message}, but only {}", counted(disk.f_favail as usize, "free inode")), help)
    } else {
        Check::ok("disk", message)
    })
}

fn content(store: &Store) -> Check {
    let entries = |folder: &str| std::fs::read_dir(store.root().join(folder)).map_or(0, Iterator::count);
    let message =
        format!("{}: version {}, {}", store.root().display(), store::VERSION, counted(entries("actions"), "record"));
    // Each quarantined item has a note beside it.
    match entries("quarantine").div_ceil(2) {
        0 => Check::ok("store", message),
        items => {
            let help =
                "`temper verify` checks the other files; delete the folder `quarantine` when you no longer need it";
            Check::warning("store", format!("{message}, {} in quarantine", counted(items, "damaged item")), help)
        }
    }
}

/// Checks that the file system supports what a store needs.
fn file_system(folder: &Path) -> Check {
    match store::probe_file_system(folder) {
        Err(error) => Check::error("file system", error.help("choose another folder with `--store FOLDER`")),
        Ok(found) if !found.locks => Check::warning(
            "file system",
            "locks have no effect",
            "never start two runs with this store at the same time, or put it on a local disk with `--store FOLDER`",
        ),
        Ok(found) if !found.hard_links => Check::warning(
            "file system",
            "no hard links",
            "the store keeps copies and needs up to twice the space; a local disk (`--store FOLDER`) avoids that",
        ),
        Ok(_) => Check::ok("file system", "can be written to; locks and hard links work"),
    }
}
