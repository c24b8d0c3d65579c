//! The `temper` command: arguments in, exit code out.

/// Prints a line. A reader that has gone away, such as `head`, is no reason to fail: what it did not read is not missed.
macro_rules! say {
    ($($what:tt)*) => {{
        let _ = std::io::Write::write_fmt(&mut std::io::stdout(), format_args!("{}\n", format_args!($($what)*)));
    }};
}

/// As [`say`], without the line's end.
macro_rules! put {
    ($($what:tt)*) => {{
        let _ = std::io::Write::write_fmt(&mut std::io::stdout(), format_args!($($what)*));
    }};
}

/// Prints a line to standard error, which may have gone away as well.
macro_rules! note {
    ($($what:tt)*) => {{
        let _ = std::io::Write::write_fmt(&mut std::io::stderr(), format_args!("{}\n", format_args!($($what)*)));
    }};
}

mod args;
mod commands;
mod graph_view;
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
