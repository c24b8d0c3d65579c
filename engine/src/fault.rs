//! Fault points: the steps at which tests kill the process or make the disk fail. Every change of a file is one (`disk`).
//!
//! With the feature `faults`, which only this crate's tests turn on, `TEMPER_FAULT=LOG:N:HOW` makes the N-th step of all
//! processes with this variable fail. Each step appends its name to the file LOG, which is how the processes count
//! together. Without the feature there is nothing here.

#[cfg(feature = "faults")]
pub(crate) use enabled::next;

/// The fault of the next step, which is named by what it does and to which path; `None`: it goes well.
#[cfg(not(feature = "faults"))]
#[inline(always)]
pub(crate) fn next(_: &str, _: &std::path::Path) -> Option<Fault> {
    None
}

/// Cannot exist.
#[cfg(not(feature = "faults"))]
pub(crate) enum Fault {}

#[cfg(not(feature = "faults"))]
impl Fault {
    pub fn strike(self) -> std::io::Error {
        match self {}
    }
}

#[cfg(feature = "faults")]
mod enabled {
    use std::fs::File;
    use std::io::{Error, Seek, Write};
    use std::path::{Path, PathBuf};
    use std::sync::LazyLock;

    use rustix::process::{Signal, getpid, kill_process};

    /// Bytes of a step in the log; its number follows from where it was appended.
    const WIDTH: usize = 96;

    static FAULT: LazyLock<Option<Settings>> = LazyLock::new(|| {
        let text = std::env::var("TEMPER_FAULT").ok()?;
        let mut parts = text.rsplitn(3, ':');
        let how = match parts.next()? {
            "kill" => Fault::Kill,
            "eio" => Fault::InputOutput,
            "full" => Fault::DiskFull,
            _ => return None,
        };
        let at = parts.next()?.parse().ok()?;
        Some(Settings { how, at, log: parts.next()?.into() })
    });

    struct Settings {
        log: PathBuf,
        at: u64,
        how: Fault,
    }

    #[derive(Clone, Copy, PartialEq)]
    pub(crate) enum Fault {
        Kill,
        /// One step fails.
        InputOutput,
        /// This step and all later ones fail.
        DiskFull,
    }

    impl Fault {
        pub fn strike(self) -> Error {
            match self {
                Self::Kill => {
                    let _ = kill_process(getpid(), Signal::KILL);
                    std::process::abort()
                }
                Self::InputOutput => Error::from_raw_os_error(libc::EIO),
                Self::DiskFull => Error::from_raw_os_error(libc::ENOSPC),
            }
        }
    }

    pub(crate) fn next(step: &str, path: &Path) -> Option<Fault> {
        let Settings { log, at, how } = FAULT.as_ref()?;
        let parts: Vec<_> = path.iter().rev().take(2).map(|part| part.to_string_lossy()).collect();
        let name = format!("{step} {}", parts.into_iter().rev().collect::<Vec<_>>().join("/"));
        let line: String = name.chars().filter(char::is_ascii).take(WIDTH - 1).collect();
        let mut log = File::options().append(true).create(true).open(log).ok()?;
        log.write_all(format!("{line:<width$}\n", width = WIDTH - 1).as_bytes()).ok()?;
        let n = log.stream_position().ok()? / WIDTH as u64 - 1;
        (n == *at || (n > *at && *how == Fault::DiskFull)).then_some(*how)
    }
}
