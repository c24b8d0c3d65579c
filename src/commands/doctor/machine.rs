//! The processor, its threads, the memory and the limit on open files.

use engine::machine::Memory;
use lm::Isa;
use rustix::process::{Resource, getrlimit};

use super::{Check, size};

/// Two concurrent stages of the shipped pipeline need about this much: each was measured at up to half of it.
const LITTLE_MEMORY: u64 = 1 << 30;
/// Below this many open files, a run may fail to start an attempt.
const FEW_FILES: u64 = 256;

pub fn checks() -> Vec<Check> {
    let version = format!("{} for {}-{}", env!("CARGO_PKG_VERSION"), std::env::consts::ARCH, std::env::consts::OS);
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    [Check::ok("temper", version), cpu(), Check::ok("threads", threads.to_string())]
        .into_iter()
        .chain(memory())
        .chain(open_files())
        .chain([landlock()])
        .collect()
}

fn cpu() -> Check {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    let model = model.map_or(String::new(), |(_, name)| format!("{name}: "));
    let bf16 = if lm::has_avx512_bf16() { "+BF16" } else { "" };
    match lm::isa() {
        Isa::V4 => Check::ok("cpu", format!("{model}AVX-512{bf16}")),
        Isa::V3 => Check::ok("cpu", format!("{model}AVX2")),
        Isa::Portable => Check::warning(
            "cpu",
            format!("{model}without AVX2 and FMA"),
            "models use the target's baseline instructions: expect slower training than on a newer CPU",
        ),
    }
}

fn memory() -> Option<Check> {
    let Memory { total, available } = engine::machine::memory()?;
    let message = format!("{} available of {}", size(available), size(total));
    if available >= LITTLE_MEMORY {
        return Some(Check::ok("memory", message));
    }
    let help = "end other programs, run one stage at a time (`-j 1`), or lower `batch` and `tokens_at_once` of stages";
    Some(Check::warning("memory", message, help))
}

fn landlock() -> Check {
    match engine::attempt::can_confine() {
        true => Check::ok("landlock", "stages can read only what they are given, and change only their own folders"),
        false => Check::ok("landlock", "not in this kernel: stages can read and change every file that this user can"),
    }
}

fn open_files() -> Option<Check> {
    let limit = getrlimit(Resource::Nofile).current?;
    if limit >= FEW_FILES {
        return Some(Check::ok("files", format!("{limit} may be open at once")));
    }
    Some(Check::warning("files", format!("only {limit} may be open at once"), "raise the limit with `ulimit -n 1024`"))
}
