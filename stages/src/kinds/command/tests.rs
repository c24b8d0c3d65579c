use std::time::Duration;

use serde_json::json;

use super::*;
use crate::table;
use crate::testing::{Bench, run, toys};
use crate::types::{Files, Pair, Pairs, Preference, Preferences, Split};

#[test]
fn access_is_no_part_of_the_key_and_takes_absolute_paths() {
    let access = json!({ "write": ["~/x", "/y", "z"] });
    let params = json!({ "run": ["sh"], "output": "Files", "env": { "DATA": "/data" }, "access": access });
    let params: Params = serde_json::from_value(params).unwrap();
    let fault = "`z`: expected an absolute path, or one that starts with `~/`".to_owned();
    assert_eq!(Command.check(&params), [("access.write".to_owned(), fault)]);
    assert_eq!(Command.signature(&params).excluded_from_key, ["access"]);
    let found = Command.access(&params);
    assert!(found.read.contains(&"/data".into()) && found.write.contains(&"/y".into()), "{found:?}");
    assert!(found.read.iter().any(|path| path.ends_with("usr") || path.ends_with("sh")), "{found:?}");
}

#[test]
fn a_program_finds_its_inputs_parameters_and_output() {
    let mut bench = Bench::new();
    bench.input("posts", "Files", |folder| {
        std::fs::write(folder.join("x.txt"), "from the input").map_err(|e| Error::internal(e.to_string()))
    });
    let script = bench.write(
        "s.sh",
        "cat \"$TEMPER_INPUT_posts/x.txt\" > \"$TEMPER_OUTPUT/y.txt\"; echo \"$TEMPER_PARAMS|$MINE|$1|${USER-none}\" >> \"$TEMPER_OUTPUT/y.txt\"; pwd > \"$TEMPER_OUTPUT/cwd\"; echo out",
    );
    let with = json!({ "run": ["sh", "./s.sh", "arg"], "output": Files::NAME, "files": script, "env": { "MINE": "a b" }, "params": { "n": 3 } });
    let out = run(&Command, with, bench.inputs()).unwrap();
    let text = std::fs::read_to_string(out.path().join("y.txt")).unwrap();
    assert_eq!(text, "from the input{\"n\":3}|a b|arg|none\n");
    let cwd = std::fs::read_to_string(out.path().join("cwd")).unwrap();
    assert_eq!(Path::new(cwd.trim()).canonicalize().unwrap(), out.path().parent().unwrap().canonicalize().unwrap());
}

#[test]
fn a_program_that_fails_is_told_without_its_log_and_without_secrets() {
    let secret = std::env::var("HOME").expect("tests run with a home");
    let with =
        json!({ "run": ["sh", "-c", "echo said >&2; exit 3", &secret], "output": "Files", "pass_env": ["HOME"] });
    let error = run(&Command, with, Bench::new().inputs()).map(drop).unwrap_err();
    assert_eq!(error.exit_code(), 2);
    assert_eq!(error.message, "`sh -c echo said >&2; exit 3 <HOME>` failed with exit status: 3");
}

#[test]
fn a_variable_that_is_not_set_and_a_removed_folder_are_told() {
    let with = json!({ "run": ["true"], "output": "Files", "pass_env": ["NO_SUCH_VARIABLE_HERE"] });
    let error = run(&Command, with, Bench::new().inputs()).map(drop).unwrap_err();
    assert_eq!((error.exit_code(), error.message.as_str()), (3, "`pass_env`: NO_SUCH_VARIABLE_HERE is not set"));
    let params = |names: Value| {
        serde_json::from_value(json!({ "run": ["true"], "output": "Files", "pass_env": names })).unwrap()
    };
    assert_eq!(Kind::check_environment(&Command, &params(json!(["HOME", "NO_SUCH_VARIABLE_HERE"]))), Err(error));
    assert_eq!(Kind::check_environment(&Command, &params(json!(["HOME"]))), Ok(()));
    let with = json!({ "run": ["sh", "-c", "rm -r \"$TEMPER_OUTPUT\""], "output": "Files" });
    let error = run(&Command, with, Bench::new().inputs()).map(drop).unwrap_err();
    assert_eq!(error.exit_code(), 2);
    assert!(error.message.ends_with("the output folder was removed"), "{error}");
}

const ROW: &str = r#"{"id": "p", "post_id": "t3_x", "prompt": "POST", "chosen_text": "a", "chosen_ended": true, "rejected_text": "b", "rejected_ended": true, "rejected_ids": [7], "outcome": "labelled", "annotator": "me", "confidence": 0.1}"#;

/// Runs a program that writes `text` as `preferences.jsonl`.
fn written(text: &str) -> Result<crate::testing::Out> {
    let bench = Bench::new();
    let rows = bench.write("rows", text);
    let with =
        json!({ "run": ["sh", "-c", "cp \"$0\" \"$TEMPER_OUTPUT/preferences.jsonl\"", rows], "output": "Preferences" });
    run(&Command, with, bench.inputs())
}

#[test]
fn json_lines_become_the_table_that_the_output_type_asks_for() {
    let out = written(&format!("{ROW}\n{}\n", ROW.replace("labelled", "tie"))).unwrap();
    let rows: Vec<Preference> = table::read(&out.path().join(Preferences::FILE)).unwrap();
    assert_eq!(rows.iter().map(|row| row.outcome.as_str()).collect::<Vec<_>>(), ["labelled", "tie"]);
    assert_eq!(
        (rows[0].confidence, rows[0].rejected_ids.as_deref(), &rows[0].facts),
        (Some(0.1), Some(&[7][..]), &None)
    );
    assert!(!out.path().join("preferences.jsonl").exists());
}

#[test]
fn every_error_of_a_line_is_reported_with_its_line_number() {
    let message_of = |text: &str| written(text).map(drop).unwrap_err().message;
    let bad = ROW.replace("\"post_id\"", "\"post\"").replace("\"prompt\": \"POST\", ", "").replace("labelled", "good");
    let bad = bad.replace("\"chosen_ended\": true", "\"chosen_ended\": 1");
    let message = message_of(&format!("{ROW}\n{bad}\n"));
    let faults = "preferences.jsonl, line 2: columns `post_id` (utf8), `prompt` (utf8) are missing; column `chosen_ended`: \
                  expected bool, found 1; column `outcome`: `good` is none of labelled, tie, refused, truncated, unparsable, \
                  failed; unexpected column `post`; found id, post, chosen_text,";
    assert!(message.contains(faults), "{message}");
    for (text, fault) in [("[1]", "line 1: expected one JSON object a line"), ("{\"id\": NaN}", "line 1: ")] {
        assert!(message_of(text).contains(fault), "{text}");
    }
}

#[test]
fn a_table_in_parquet_is_kept_and_so_are_json_lines_beside_it() {
    let bench = Bench::new();
    table::write(&bench.path(Preferences::FILE), Vec::<Preference>::new()).unwrap();
    let folder = bench.path("");
    let script = "cp \"$0/preferences.parquet\" \"$TEMPER_OUTPUT\"; echo kept > \"$TEMPER_OUTPUT/preferences.jsonl\"";
    let with = json!({ "run": ["sh", "-c", script, folder], "output": "Preferences" });
    let out = run(&Command, with, bench.inputs()).unwrap();
    let bytes = |folder: &Path| std::fs::read(folder.join(Preferences::FILE)).unwrap();
    assert_eq!(bytes(&out.path()), bytes(&folder));
    assert_eq!(std::fs::read_to_string(out.path().join("preferences.jsonl")).unwrap(), "kept\n");
}

#[test]
fn tables_that_are_read_and_written_as_json_lines_come_back_byte_by_byte() {
    let mut bench = Bench::new();
    bench.input("pairs", Pairs::NAME, |folder| {
        std::fs::write(folder.join("metrics.json"), "{}").at(folder)?;
        let pairs = toys::pairs(3, Split::Gold).into_iter();
        toys::write_pairs(folder, pairs.map(|pair| Pair { facts: Some("\"\n".to_owned()), ..pair }))
    });
    let script = "cp \"$TEMPER_INPUT_pairs/pairs.jsonl\" \"$TEMPER_INPUT_pairs/metrics.json\" \"$TEMPER_OUTPUT\"; \
                  test ! -e \"$TEMPER_INPUT_pairs/pairs.parquet\"";
    let with = json!({ "run": ["sh", "-c", script], "output": "Pairs", "tables": "jsonl" });
    let out = run(&Command, with, bench.inputs()).unwrap();
    let bytes = |folder: &Path| std::fs::read(folder.join(Pairs::FILE)).unwrap();
    assert_eq!(bytes(&out.path()), bytes(&bench.inputs()["pairs"][0].folder));
    assert!(!out.path().parent().unwrap().join("inputs").exists());
}

#[test]
fn the_form_of_tables_is_in_the_key_only_if_it_is_set() {
    let normal = |with: Value| (&Command as &dyn engine::kind::AnyKind).normalise(&with).unwrap();
    let plain = normal(json!({ "run": ["x"], "output": "Files" }));
    assert!(plain.get("tables").is_none(), "older keys would change: {plain}");
    assert_eq!(normal(json!({ "run": ["x"], "output": "Files", "tables": "jsonl" }))["tables"], "jsonl");
}

#[test]
fn a_process_left_behind_does_not_hold_the_stage() {
    let started = std::time::Instant::now();
    let with = json!({ "run": ["sh", "-c", "sleep 20 & exit 0"], "output": "Files" });
    run(&Command, with, Bench::new().inputs()).unwrap();
    assert!(started.elapsed() < Duration::from_secs(15));
}

#[test]
fn a_process_left_behind_cannot_change_what_was_made() {
    let script =
        "exec 3>\"$TEMPER_OUTPUT/x\"; echo made >&3; (sleep 0.2; echo late >&3; echo x > \"$TEMPER_OUTPUT/../late\") &";
    let out = run(&Command, json!({ "run": ["sh", "-c", script], "output": "Files" }), Bench::new().inputs()).unwrap();
    let late = out.path().parent().unwrap().join("late");
    while !late.exists() {
        std::thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(std::fs::read_to_string(out.path().join("x")).unwrap(), "made\n");
}

#[test]
fn what_cannot_run_is_told() {
    let error = run(&Command, json!({ "run": ["no-such-program-here"], "output": "Files" }), Bench::new().inputs())
        .map(drop)
        .unwrap_err();
    assert!(error.message.starts_with("`no-such-program-here` cannot be started"), "{error}");
    for with in [
        json!({ "run": [], "output": "Files" }),
        json!({ "run": ["x"], "output": "Files", "env": { "A=B": "c" } }),
        json!({ "run": ["x"], "output": "Files", "pass_env": ["TEMPER_OUTPUT"] }),
    ] {
        assert!(run(&Command, with, Bench::new().inputs()).is_err());
    }
}

#[test]
fn long_parameters_come_by_file_and_short_ones_by_variable_too() {
    let script = "cat \"$TEMPER_PARAMS_FILE\" > \"$TEMPER_OUTPUT/p\"; echo \"${TEMPER_PARAMS-none}\" > \"$TEMPER_OUTPUT/v\"; \
                  cat \"$TEMPER_INPUTS_FILE\" > \"$TEMPER_OUTPUT/i\"";
    let mut bench = Bench::new();
    for _ in 0..2 {
        bench.input("parts", "Files", |_| Ok(()));
    }
    for (length, by_variable) in [(10, true), (4 << 20, false)] {
        let params = json!({ "text": "x".repeat(length) });
        let with = json!({ "run": ["sh", "-c", script], "output": "Files", "params": params });
        let out = run(&Command, with, bench.inputs()).unwrap();
        let read = |name: &str| std::fs::read_to_string(out.path().join(name)).unwrap();
        assert_eq!(read("p"), params.to_string());
        assert_eq!(read("v").trim(), if by_variable { params.to_string() } else { "none".into() }, "{length}");
        let inputs: BTreeMap<String, Vec<String>> = serde_json::from_str(&read("i")).unwrap();
        assert_eq!(inputs["parts"].len(), 2);
    }
}

#[test]
fn what_no_program_can_be_given_is_a_fault_of_the_file() {
    let long = "x".repeat(LONGEST + 1);
    let many = vec!["x".repeat(LONGEST); 10];
    for (with, field) in [
        (json!({ "run": ["x", long], "output": "Files" }), "run"),
        (json!({ "run": ["x"], "output": "Files", "env": { "A": long } }), "env.A"),
        (json!({ "run": many, "output": "Files" }), "run"),
    ] {
        let faults = (&Command as &dyn engine::kind::AnyKind).normalise(&with).unwrap_err();
        assert_eq!(faults[0].0, field);
    }
    let params = serde_json::from_value(json!({ "run": ["x"], "output": "Files" })).unwrap();
    let wired = |port| ConnectedInput { port, kind: "command", output: "Files", params: &Value::Null };
    let faults = Command.check_wiring(&params, &[wired("a-b"), wired("c"), wired("a_b")]);
    assert_eq!(faults[0].1.message, "inputs `a-b` and `a_b` would both be TEMPER_INPUT_a_b");
    assert!(Command.check_wiring(&params, &[wired("a-b"), wired("a-b"), wired("c")]).is_empty());
}

#[test]
fn an_output_folder_replaced_by_a_link_is_refused() {
    let bench = Bench::new();
    let mine = bench.write("mine", "data");
    let folder = mine.parent().unwrap().to_str().unwrap();
    let script = "rmdir \"$TEMPER_OUTPUT\" && ln -s \"$0\" \"$TEMPER_OUTPUT\"";
    let with = json!({ "run": ["sh", "-c", script, folder], "output": "Files" });
    let error = run(&Command, with, bench.inputs()).map(drop).unwrap_err();
    assert!(error.exit_code() == 2 && error.message.ends_with("the output folder was replaced by a link"), "{error}");
    assert!(!std::fs::metadata(mine).unwrap().permissions().readonly());
}

#[test]
fn a_pipe_under_the_name_of_a_copy_stops_nothing() {
    // The program's parent process is the attempt.
    let script = "for at in . ..; do mkfifo \"$TEMPER_OUTPUT/$at/.copy-$PPID\"; done; echo x > \"$TEMPER_OUTPUT/x\"";
    let out = run(&Command, json!({ "run": ["sh", "-c", script], "output": "Files" }), Bench::new().inputs());
    assert_eq!(std::fs::read_to_string(out.unwrap().path().join("x")).unwrap(), "x\n");
}

#[test]
fn arguments_that_name_files_become_their_paths() {
    let files = ["/p/tools/a.py", "/p/b.py", "/q/b.py"].map(PathBuf::from);
    assert_eq!(resolve("tools/a.py", &files).unwrap(), "/p/tools/a.py");
    assert_eq!(resolve("./a.py", &files).unwrap(), "/p/tools/a.py");
    assert_eq!(resolve("../tools/a.py", &files).unwrap(), "/p/tools/a.py");
    assert_eq!(resolve("--x", &files).unwrap(), "--x");
    assert_eq!(resolve("/abs/b.py", &files).unwrap(), "/abs/b.py");
    assert!(resolve("b.py", &files).unwrap_err().message.contains("`b.py` may be /p/b.py or /q/b.py"));
}
