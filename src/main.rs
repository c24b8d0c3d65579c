//! The `temper` command with its built-in kinds.

fn main() -> std::process::ExitCode {
    temper::main_with(&stages::registry())
}
