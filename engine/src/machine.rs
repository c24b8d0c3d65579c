//! What this machine has for attempts: memory and GPUs.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::document::resources::MIB;
use crate::error::{Error, Result};

/// The memory and the GPUs that the attempts of a run share.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Machine {
    /// MiB; `None`: not known, and then not limited.
    pub memory: Option<u64>,
    /// As `CUDA_VISIBLE_DEVICES` names them.
    pub gpus: Vec<String>,
}

impl Machine {
    /// This machine. Its GPUs are those of `nvidia-smi` that `CUDA_VISIBLE_DEVICES` allows; they are asked for only if
    /// `with_gpus`.
    ///
    /// # Errors
    /// When `nvidia-smi` exists and fails.
    pub fn detect(with_gpus: bool) -> Result<Self> {
        let gpus = if with_gpus { gpus()? } else { Vec::new() };
        Ok(Self { memory: memory().map(|memory| memory.total / MIB), gpus })
    }
}

/// The memory of this machine, or of this process's control group if that has less, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory {
    pub total: u64,
    pub available: u64,
}

/// `None` where the system does not say.
pub fn memory() -> Option<Memory> {
    let info = std::fs::read_to_string("/proc/meminfo").ok()?;
    let field = |name: &str| Some(1024 * number(info.lines().find_map(|line| line.strip_prefix(name))?)?);
    let machine = Memory { total: field("MemTotal:")?, available: field("MemAvailable:")? };
    let least = |a: Memory, b: Memory| Memory { total: a.total.min(b.total), available: a.available.min(b.available) };
    Some(groups().iter().filter_map(|group| group_memory(group)).fold(machine, least))
}

/// The first number in `text`.
fn number(text: &str) -> Option<u64> {
    text.split_whitespace().next()?.parse().ok()
}

/// The control groups (version 2) of this process, innermost first.
fn groups() -> Vec<PathBuf> {
    let root = Path::new("/sys/fs/cgroup");
    let own = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let Some(path) = own.lines().find_map(|line| line.strip_prefix("0::/")) else { return Vec::new() };
    root.join(path).ancestors().take_while(|group| group.starts_with(root)).map(Path::to_owned).collect()
}

/// The limit of a group's memory, and how much of it is left or can be reclaimed from file caches.
fn group_memory(group: &Path) -> Option<Memory> {
    let read = |file: &str| std::fs::read_to_string(group.join(file)).ok();
    let total = number(&read("memory.max")?)?;
    let used = number(&read("memory.current")?)?;
    let stat = read("memory.stat")?;
    let caches = ["inactive_file ", "active_file "];
    let cached: u64 =
        caches.iter().filter_map(|name| number(stat.lines().find_map(|line| line.strip_prefix(name))?)).sum();
    Some(Memory { total, available: total.saturating_sub(used.saturating_sub(cached)) })
}

/// The GPUs of this machine that this process may use.
fn gpus() -> Result<Vec<String>> {
    let listed = match Command::new("nvidia-smi").args(["--query-gpu=index,uuid", "--format=csv,noheader"]).output() {
        Ok(output) if output.status.success() => Some(String::from_utf8_lossy(&output.stdout).into_owned()),
        Ok(output) => {
            let said = [output.stdout, output.stderr].concat();
            let said = String::from_utf8_lossy(&said).trim().replace('\n', "; ");
            return Err(Error::environment(format!("`nvidia-smi` failed ({}): {said}", output.status))
                .help("check the NVIDIA driver, or run on the CPU (`--device cpu`)"));
        }
        // Some containers have the driver without its programs.
        Err(_) => std::fs::read_dir("/proc/driver/nvidia/gpus").ok().map(|gpus| {
            let indices = (0..gpus.count()).map(|index| format!("{index}, {index}\n"));
            indices.collect()
        }),
    };
    let visible = std::env::var("CUDA_VISIBLE_DEVICES").ok();
    Ok(visible_gpus(listed.as_deref(), visible.as_deref()))
}

/// The ids of the GPUs that `nvidia-smi` lists as `index, uuid` and that `CUDA_VISIBLE_DEVICES` allows, in its order.
/// Without a list, the ids are those of the variable.
fn visible_gpus(listed: Option<&str>, visible: Option<&str>) -> Vec<String> {
    let listed: Option<Vec<(&str, &str)>> = listed.map(|text| {
        text.lines().filter_map(|line| line.split_once(',')).map(|(index, id)| (index.trim(), id.trim())).collect()
    });
    match (listed, visible) {
        (Some(listed), None) => listed.into_iter().map(|(_, id)| id.to_owned()).collect(),
        (None, None) => Vec::new(),
        (listed, Some(visible)) => {
            let names = visible.split(',').map(str::trim);
            // As in CUDA, an unknown name hides itself and all that follow it; partitions (MIG) are not in the list.
            let ids = names.map_while(|name| match &listed {
                _ if name.is_empty() || name == "-1" => None,
                Some(listed) if !name.starts_with("MIG-") => {
                    let found = listed.iter().find(|(index, id)| *index == name || id.starts_with(name));
                    found.map(|(_, id)| (*id).to_owned())
                }
                _ => Some(name.to_owned()),
            });
            let mut seen = BTreeSet::new();
            ids.filter(|id| seen.insert(id.clone())).collect()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_visible_gpus_are_those_of_the_variable_by_index_or_id() {
        let listed = "0, GPU-aa\n1, GPU-bb\n2, GPU-cc\n";
        for (listed, visible, expected) in [
            (Some(listed), None, &["GPU-aa", "GPU-bb", "GPU-cc"][..]),
            (Some(listed), Some("2,0"), &["GPU-cc", "GPU-aa"]),
            (Some(listed), Some("GPU-b"), &["GPU-bb"]),
            (Some(listed), Some("1,7,0"), &["GPU-bb"]),
            (Some(listed), Some("0,0,1"), &["GPU-aa", "GPU-bb"]),
            (Some(listed), Some("MIG-1/2"), &["MIG-1/2"]),
            (Some(listed), Some(""), &[]),
            (Some(listed), Some("-1"), &[]),
            (None, Some("0,1"), &["0", "1"]),
            (None, None, &[]),
        ] {
            assert_eq!(visible_gpus(listed, visible), expected, "{visible:?}");
        }
    }
}
