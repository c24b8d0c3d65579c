//! The `temper` command: arguments in, exit code out.

/// Prints a line to standard output, as [`output::print`] does.
macro_rules! say {
    ($($what:tt)*) => {{
        $crate::output::print(std::io::stdout(), format_args!("{}\n", format_args!($($what)*)));
    }};
}

/// As [`say`], without the line's end.
macro_rules! put {
    ($($what:tt)*) => {{
        $crate::output::print(std::io::stdout(), format_args!($($what)*));
    }};
}

/// As [`say`], to standard error.
macro_rules! note {
    ($($what:tt)*) => {{
        $crate::output::print(std::io::stderr(), format_args!("{}\n", format_args!($($what)*)));
    }};
}

mod args;
mod commands;
mod graph_view;
mod output;
mod progress;
mod report;

/// Training frees and takes large buffers all the time; the system's allocator gives their pages back each time.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Of a panic, which is always our fault.
const OURS: u8 = 4;

fn main() -> std::process::ExitCode {
    let cli = args::parse();
    std::panic::catch_unwind(|| commands::main(cli)).unwrap_or(std::process::ExitCode::from(OURS))
}
