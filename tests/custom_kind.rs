//! `examples/custom_kind.rs`: a program with a kind of its own has the whole command line, attempts included.

mod space;

use std::path::Path;
use std::process::Command;

use space::{TestSpace, repository, text};

#[test]
fn a_kind_of_ones_own_runs_through_the_same_command_line() {
    let example = Path::new(env!("CARGO_BIN_EXE_temper")).with_file_name("examples").join("custom_kind");
    assert!(example.is_file(), "{} is not built: `cargo build --example custom_kind` does it", example.display());
    let space = TestSpace::new();
    let pipeline = repository("examples/custom_kind.yaml").display().to_string();
    let run = |arguments: &[&str]| {
        let mut command = Command::new(&example);
        command.args(arguments).env("TEMPER_STORE", space.path("cache"));
        let out = command.output().expect("the example starts");
        (out.status.code(), text(&out.stdout) + &text(&out.stderr))
    };
    let (code, told) = run(&["kinds", "annotate.shorter"]);
    assert!(
        code == Some(0) && told.contains("margin: integer  (default 1)") && told.contains("pairs: Pairs\n"),
        "{told}"
    );
    let (code, told) = run(&["plan", &pipeline, "--set", "stages.labels.with.margin=0"]);
    assert!(code == Some(2) && told.contains("must be at least 1"), "{told}");
    let (code, told) = run(&["run", &pipeline]);
    assert!(code == Some(0) && told.contains("5 ran, 0 reused, 0 failed"), "{told}");
    let (code, told) = run(&["show", &pipeline, "labels"]);
    assert!(code == Some(0) && told.contains("rows: 200") && told.contains("shorter"), "{told}");
    // The built-in program does not know it.
    let out = space.temper(&["plan", &pipeline]);
    assert!(text(&out.stderr).contains("unknown kind `annotate.shorter`"), "{}", text(&out.stderr));
}
