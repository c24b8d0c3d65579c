//! The `temper` command as a library: [`main_with`] runs the command line with your own kinds beside the built-in ones.
//! `examples/custom_kind.rs` shows how.

/// Prints a line to standard output through [`output::print_out`].
macro_rules! outln {
    ($($what:tt)*) => {{
        $crate::output::print_out(format_args!("{}\n", format_args!($($what)*)));
    }};
}

/// Like [`outln`], without the line ending.
macro_rules! out {
    ($($what:tt)*) => {{
        $crate::output::print_out(format_args!($($what)*));
    }};
}

/// Like [`outln`], to standard error. A failure to write there cannot be reported and is ignored.
macro_rules! errln {
    ($($what:tt)*) => {{
        let _ = $crate::output::print(std::io::stderr(), format_args!("{}\n", format_args!($($what)*)));
    }};
}

mod args;
mod commands;
mod compare;
mod flatten;
mod graph_view;
mod metrics;
mod output;
mod progress;
mod report;

use std::panic::AssertUnwindSafe;
use std::process::ExitCode;

use engine::kind::Registry;

// Re-exported so that a program with its own kinds depends on `temper` alone, at one version.
pub use {engine, stages};

/// Training allocates and frees large buffers all the time; the system allocator would return their pages each time.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Exit code of a panic: our fault, unless the system refused a resource.
const INTERNAL: u8 = 4;
const ENVIRONMENT: u8 = 3;

/// Runs the command line with the kinds and artifact types of `registry`, which usually extends [`stages::registry`],
/// and returns the exit code.
///
/// A program must call this first in its `main`: every attempt at a stage is a new process of the same program.
pub fn main_with(registry: &Registry) -> ExitCode {
    std::panic::set_hook(Box::new(|panic| {
        let (text, location) =
            (panic_message(panic.payload()), panic.location().map(ToString::to_string).unwrap_or_default());
        let backtrace = std::backtrace::Backtrace::capture();
        if is_refusal(text) {
            errln!(
                "error: the system refuses this process more files or threads\n  help: raise `ulimit -n` or `ulimit -u`"
            );
        } else if backtrace.status() == std::backtrace::BacktraceStatus::Captured {
            errln!("error: a bug in temper, at {location}: {text}\n{backtrace}");
        } else {
            errln!("error: a bug in temper, at {location}: {text}");
        }
    }));
    let cli = args::parse();
    // Nothing is used after a panic: the process ends.
    std::panic::catch_unwind(AssertUnwindSafe(|| commands::main(cli, registry)))
        .unwrap_or_else(|panic| ExitCode::from(if is_refusal(panic_message(&*panic)) { ENVIRONMENT } else { INTERNAL }))
}

/// The message of a panic.
fn panic_message(panic: &(dyn std::any::Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("no message")
}

/// Whether a library panicked because the system had no file (EMFILE, ENFILE) or thread (EAGAIN) left. Some libraries
/// report this only by a panic.
fn is_refusal(message: &str) -> bool {
    [11, 23, 24].iter().any(|code| {
        message.contains(&format!("(os error {code})")) || message.contains(&format!("Os {{ code: {code},"))
    })
}
