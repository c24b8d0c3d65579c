//! Faults of pipeline files as they are reported.

use super::*;

/// Valid stages that each test extends.
const GOOD: &str = "
  posts: { uses: dataset }
  base: { uses: base, with: { size: 1 } }
  sft: { uses: train, needs: { base: base, posts: posts } }
";

/// Loads `stages` (after `version: 1
/// stages:`) and compares the reported message, position and help.
fn check(stages: &str, expected: &[&str]) {
    check_with(stages, &LoadOptions::default(), expected);
}

fn check_with(stages: &str, options: &LoadOptions, expected: &[&str]) {
    let output = load_text(&format!("version: 1\nstages:{stages}"), options).expect_err("something is wrong");
    let lines: Vec<&str> = output
        .lines()
        .filter_map(|line| {
            let line = line.trim_start();
            ["error: ", "--> ", ":::", "= "].iter().any(|start| line.starts_with(start)).then_some(line)
        })
        .collect();
    assert_eq!(lines, expected, "\n{output}\n");
}

fn with_good(more: &str) -> String {
    format!("{GOOD}{more}\n")
}

#[test]
fn an_error_message_shows_the_location_and_a_hint() {
    let text = "version: 1
stages:
  posts: { uses: dataset, with: { post: 5, style: wyld } }
  sft: { uses: train, needs: { base: posts } }
";
    let expected = "error: stage `posts`: dataset has no parameter `post`
 --> p.yaml:3:35
  |
3 |   posts: { uses: dataset, with: { post: 5, style: wyld } }
  |                                   ^^^^
  = help: did you mean `posts`?

error: stage `posts`: `style`: unknown value `wyld`
 --> p.yaml:3:51
  |
3 |   posts: { uses: dataset, with: { post: 5, style: wyld } }
  |                                                   ^^^^
  = help: did you mean `wild`?

error: stage `sft` has no input at port `posts`, which train requires
 --> p.yaml:4:3
  |
4 |   sft: { uses: train, needs: { base: posts } }
  |   ^^^
  = help: Posts or Preferences is produced by `posts`: `needs: { posts: posts }`

error: port `base` of stage `sft` takes Model, but `posts` produces Posts
 --> p.yaml:4:38
  |
4 |   sft: { uses: train, needs: { base: posts } }
  |                                      ^^^^^

4 errors";
    assert_eq!(load_text(text, &LoadOptions::default()).expect_err("four errors"), expected);
}

#[test]
fn an_override_is_shown_as_it_was_typed() {
    let text = format!("version: 1\nstages:{GOOD}");
    let output = load_text(&text, &options(&[], &["stages.sft.with.lr=fast"], &[])).expect_err("no number");
    let expected = "error: stage `sft`: `lr`: expected a number, found text \"fast\"
 --> --set:1:20
  |
1 | stages.sft.with.lr=fast
  |                    ^^^^";
    assert_eq!(output, expected);
}

#[test]
fn unknown_kinds_parameters_stages_and_labels_are_reported() {
    check(
        "\n  a: { uses: datset }",
        &["error: unknown kind `datset`", "--> p.yaml:3:14", "= help: did you mean `dataset`?"],
    );
    check(
        "\n  a: { uses: dataset, with: { shuffel: true } }",
        &["error: stage `a`: dataset has no parameter `shuffel`", "--> p.yaml:3:31", "= help: did you mean `shuffle`?"],
    );
    check(
        &with_good("  x: { uses: ensemble, needs: { members: sft }, with: { x: 1 } }"),
        &["error: stage `x`: ensemble has no parameter `x`", "--> p.yaml:6:57", "= help: ensemble takes no parameters"],
    );
    check(
        &with_good("  x: { uses: train, needs: { base: bas, posts: 'sft[s]' } }"),
        &[
            "error: unknown stage `bas`",
            "--> p.yaml:6:36",
            "= help: did you mean `base`?",
            "error: stage `sft` has no matrix",
            "--> p.yaml:6:48",
            "= help: write `sft`",
        ],
    );
    check(
        &with_good(
            "  m: { uses: base, matrix: { size: [1, 2] }, with: { size: '${size}' } }
  x: { uses: train, needs: { base: 'm[3]', posts: posts } }
  y: { uses: train, needs: { base: 'm[1,2]', posts: posts } }",
        ),
        &[
            "error: matrix variable `size` of stage `m` has no value `3`",
            "--> p.yaml:7:36",
            "= help: expected one of `1`, `2`",
            "error: stage `m` has 1 matrix variable, but the selector has 2",
            "--> p.yaml:8:36",
            "= help: write `m[size]`",
        ],
    );
}

#[test]
fn nested_parameters_are_checked_by_name() {
    check(
        &with_good(
            "  x:
    uses: train
    needs: { base: base, posts: posts }
    with: { lora: { rnak: 2 }, schedule: [{ at: 1, lr: 1 }, { at: 2, lr: 1, tl: 3 }] }",
        ),
        &[
            "error: stage `x`: train has no parameter `lora.rnak`",
            "--> p.yaml:9:21",
            "= help: did you mean `rank`?",
            "error: stage `x`: train has no parameter `schedule[1].tl`",
            "--> p.yaml:9:77",
            "= help: expected one of `at`, `lr`",
        ],
    );
}

#[test]
fn several_wrong_types_of_one_stage_are_reported_at_once() {
    check(
        "
  a: { uses: dataset, with: { posts: -1, style: 3, shuffle: yes, from: [1] } }
  b: { uses: base, with: { size: big } }
  c: { uses: base }
  d: { uses: base, with: { size: [1] }, matrix: 5 }",
        &[
            "error: stage `a`: `posts`: expected a whole number, at least 0, found `-1`",
            "--> p.yaml:3:38",
            "error: stage `a`: `style`: expected text or a map, found `3`",
            "--> p.yaml:3:49",
            "error: stage `a`: `shuffle`: expected true or false, found text \"yes\"",
            "--> p.yaml:3:61",
            "= help: YAML booleans are `true` and `false`",
            "error: stage `a`: `from`: expected a path",
            "--> p.yaml:3:72",
            "error: stage `b`: `size`: expected a whole number, at least 0, found text \"big\"",
            "--> p.yaml:4:34",
            "error: stage `c`: required parameter `size` is missing",
            "--> p.yaml:5:3",
            "error: `matrix` must be a map; this is a number",
            "--> p.yaml:6:49",
        ],
    );
}

#[test]
fn errors_found_by_a_kinds_own_checks_have_a_location() {
    check(
        &with_good("  x: { uses: train, with: { epochs: 2, lr: 0 }, needs: { base: base, posts: posts } }"),
        &["error: stage `x`: `lr`: must be above 0", "--> p.yaml:6:44"],
    );
}

#[test]
fn duplicate_keys_and_names_that_differ_only_in_case_are_refused() {
    check(
        "\n  a: { uses: dataset }\n  b: { uses: dataset }\n  a: { uses: base }",
        &["error: duplicate key `a`", "--> p.yaml:5:3", "::: p.yaml:3:3"],
    );
    check(
        "\n  a: { uses: dataset }\n  A: { uses: dataset }\n  a b: { uses: dataset }",
        &[
            "error: stage `A` differs from `a` only by case",
            "--> p.yaml:4:3",
            "::: p.yaml:3:3",
            "error: `a b` is not a valid name for a stage: expected [A-Za-z0-9_-]{1,64}",
            "--> p.yaml:5:3",
        ],
    );
}

#[test]
fn cycles_are_reported_with_their_path() {
    check(
        "
  a: { uses: command, with: { run: [a] }, needs: { x: c } }
  b: { uses: command, with: { run: [b] }, needs: { x: a } }
  c: { uses: command, with: { run: [c] }, needs: { x: b } }
  d: { uses: command, with: { run: [d] }, needs: { x: d } }",
        &[
            "error: cycle: a -> c -> b -> a",
            "--> p.yaml:3:55",
            "= help: each stage needs the next one: remove one of these inputs",
            "error: cycle: d -> d",
            "--> p.yaml:6:55",
            "= help: each stage needs the next one: remove one of these inputs",
        ],
    );
    check(
        "
  a: { uses: command, matrix: { n: [1, 2] }, with: { run: ['${n}'] }, needs: { x: 'b[${n}]' } }
  b: { uses: command, matrix: { n: [1, 2] }, with: { run: ['${n}'] }, needs: { x: 'a[${n}]' } }",
        &[
            "error: cycle: a[1] -> b[1] -> a[1]",
            "--> p.yaml:3:83",
            "= help: each stage needs the next one: remove one of these inputs",
        ],
    );
}

#[test]
fn wrong_wiring_is_reported() {
    check(
        &with_good(
            "  a: { uses: train, needs: { base: posts, posts: base, bsae: base } }
  f: { uses: command, with: { run: [x] } }
  p: { uses: pairs, needs: { models: [base, base], posts: f } }
  q: { uses: dataset, needs: { x: f } }
  m: { uses: base, matrix: { n: [1, 2] }, with: { size: '${n}' } }
  n: { uses: train, needs: { base: m, posts: posts } }
  o: { uses: pairs, needs: { models: [], posts: posts } }
  r: { uses: command, with: { run: [x], output: Post } }",
        ),
        &[
            "error: port `base` of stage `a` takes Model, but `posts` produces Posts",
            "--> p.yaml:6:36",
            "error: port `posts` of stage `a` takes Posts or Preferences, but `base` produces Model",
            "--> p.yaml:6:50",
            "error: stage `a`: train has no port `bsae`",
            "--> p.yaml:6:56",
            "= help: did you mean `base`?",
            "error: port `models` of stage `p` is connected to `base` twice",
            "--> p.yaml:8:45",
            "error: port `posts` of stage `p` takes Posts, but `f` produces Files",
            "--> p.yaml:8:59",
            "error: stage `q`: dataset has no port `x`",
            "--> p.yaml:9:32",
            "= help: dataset takes no inputs",
            "error: port `base` of stage `n` takes one input, but is connected to 2",
            "--> p.yaml:11:36",
            "= help: choose one of them, such as `m[1]`",
            "error: stage `o` has no input at port `models`, which pairs requires",
            "--> p.yaml:12:3",
            "= help: Model is produced by `base`, `sft`, `a`: `needs: { models: base }`",
            "error: stage `r` produces `Post`, which is not an artifact type",
            "--> p.yaml:13:49",
            "= help: did you mean `Posts`?",
        ],
    );
}

#[test]
fn wiring_errors_found_by_a_kind_have_the_selectors_location() {
    check(
        &with_good(
            "  t: { uses: train, matrix: { n: [0, 1, 2] }, with: { epochs: '${n}' }, needs: { base: base, posts: posts } }
  a: { uses: ensemble, matrix: { n: [0, 1] }, needs: { members: [sft, 't[${n}]'] } }
  b: { uses: ensemble, needs: { members: base } }
  c: { uses: ensemble, needs: { members: ['t[1]', 't[2]'] } }",
        ),
        &[
            "error: stage `a`: a member was not trained",
            "--> p.yaml:7:66",
            "= in: a[0]",
            "= help: train it",
            "error: stage `b`: a member was not trained",
            "--> p.yaml:8:42",
            "= help: train it",
        ],
    );
}

#[test]
fn a_matrix_variable_must_be_used() {
    check(
        "\n  a: { uses: dataset, matrix: { n: [1, 2] } }\n  b: { uses: dataset, matrix: { n: { x: {}, y: } } }",
        &[
            "error: matrix variable `n` of stage `a` is not used",
            "--> p.yaml:3:33",
            "= help: all instances would be equal: use `${n}` in `with`, `needs` or `seed`",
            "error: matrix variable `n` of stage `b` is not used",
            "--> p.yaml:4:33",
            "= help: all instances would be equal: use `${n}` in `with`, `needs` or `seed`",
        ],
    );
    check(
        "\n  a: { uses: base, matrix: { member: [1, 2, 3, 4, 5] }, seed: '${member}', with: { size: 1 } }",
        &[
            "error: instances `a[1]`, `a[2]`, `a[3]`, `a[4]` and 1 more are equal: same kind, parameters, seed and inputs",
            "--> p.yaml:3:30",
            "= help: they differ only in their seed, and base draws no random numbers with these parameters",
        ],
    );
    check(
        "\n  a: { uses: dataset, matrix: { m: { x: { with: { posts: 100 } }, y: {} } } }",
        &[
            "error: instances `a[x]`, `a[y]` are equal: same kind, parameters, seed and inputs",
            "--> p.yaml:3:33",
            "= help: make them differ, for example by `seed`, or remove the values that change nothing",
        ],
    );
}

#[test]
fn matrix_values_are_checked() {
    check(
        "
  a: { uses: dataset, matrix: { n: [1, 1, a b, [2]], N: [], m: 3 }, with: { posts: '${n}${N}${m}' } }
  b: { uses: dataset, with: { posts: '${n}' }, seed: '${' }
  c: { uses: dataset, matrix: { n: [x, 2] }, seed: '${n}' }
  d: { uses: dataset, matrix: { n: { x: { wiht: { posts: 1 } } } } }",
        &[
            "error: matrix variable `n` has the value `1` twice",
            "--> p.yaml:3:40",
            "::: p.yaml:3:37",
            "error: `a b` is not a valid name for a matrix label: expected [A-Za-z0-9_.-]{1,64}",
            "--> p.yaml:3:43",
            "error: matrix variable `n`: expected text or a number, found a list",
            "--> p.yaml:3:48",
            "= help: to change a stage by label, use a map of labels to `with`, `needs` and `seed`",
            "error: matrix variable `N` differs from `n` only by case",
            "--> p.yaml:3:54",
            "::: p.yaml:3:33",
            "error: matrix variable `N` of stage `a` has no values",
            "--> p.yaml:3:57",
            "error: matrix variable `m` must be a list of values or a map of labels",
            "--> p.yaml:3:64",
            "error: unknown matrix variable `n`",
            "--> p.yaml:4:39",
            "= help: stage `b` has no matrix; write `$${n}` for the literal text",
            "error: `${` without a closing `}`",
            "--> p.yaml:4:55",
            "= help: write `$${` for the literal text `${`",
            "error: seed of stage `c`: expected a whole number from 0 to 2^64 - 1, found `x`",
            "--> p.yaml:5:52",
            "= in: c[x]",
            "error: a matrix label has no key `wiht`",
            "--> p.yaml:6:43",
            "= help: did you mean `with`?",
        ],
    );
}

#[test]
fn names_on_the_command_line_must_exist() {
    let good = with_good("");
    let check = |options: LoadOptions, expected: &[&str]| check_with(&good, &options, expected);
    check(
        options(&["papre"], &[], &[]),
        &["error: unknown profile `papre`", "--> --profile:1:1", "= help: the file has no profiles"],
    );
    check(
        options(&[], &[], &["sfd", "sft[s]"]),
        &[
            "error: target: unknown stage `sfd`",
            "--> --until:1:1",
            "= help: did you mean `sft`?",
            "error: target: stage `sft` has no matrix",
            "--> --until:1:1",
            "= help: write `sft`",
        ],
    );
    check(
        LoadOptions { stage: Some("sft[s]".to_owned()), ..LoadOptions::default() },
        &["error: stage `sft` has no matrix", "--> STAGE:1:1", "= help: write `sft`"],
    );
    let cases: &[(&str, &[&str])] = &[
        ("stages.sfd.with.lr=1", &["error: unknown stage `sfd`", "--> --set:1:8", "= help: did you mean `sft`?"]),
        ("stages.sft.wth.lr=1", &["error: unknown key `wth`", "--> --set:1:12", "= help: did you mean `with`?"]),
        (
            "stages.sft.with.rl=1",
            &["error: stage `sft`: train has no parameter `rl`", "--> --set:1:17", "= help: did you mean `lr`?"],
        ),
        ("stage.sft.with.lr=1", &["error: unknown key `stage`", "--> --set:1:1", "= help: did you mean `stages`?"]),
        ("stages.sft.matrix.n.a.with.lr=1", &["error: unknown matrix variable `n`", "--> --set:1:19"]),
        ("stages.sft.uses.x=1", &["error: `uses` has no keys", "--> --set:1:12"]),
        ("profiles.x=1", &["error: profiles are applied before `--set`: set the value itself", "--> --set:1:1"]),
        ("stages.sft.with.lr", &["error: expected `path=YAML`, such as `stages.sft.with.lr=1e-4`", "--> --set:1:1"]),
        (
            "stages.sft.with.lr=",
            &["error: no value", "--> --set:1:19", "= help: write `=null` to delete, `=''` for empty text"],
        ),
        ("stages.sft.with.epochs=null", &["error: unknown entry `epochs`", "--> --set:1:17"]),
        (
            "stages.new=null",
            &["error: unknown stage `new`", "--> --set:1:8", "= help: expected one of `posts`, `base`, `sft`"],
        ),
        ("version=2", &["error: `version` cannot be set: it says how to read the file", "--> --set:1:1"]),
        ("stages.sft.with={lr: [1}", &["error: invalid YAML: mismatched bracket '[' closed by '}'", "--> --set:1:22"]),
    ];
    for (set, expected) in cases {
        check(options(&[], &[set], &[]), expected);
    }
}

#[test]
fn the_report_section_is_checked_wherever_it_stands() {
    let check = |report: &str, options: &LoadOptions, expected: &[&str]| {
        check_with(&format!("{GOOD}{report}\n"), options, expected);
    };
    check(
        "report: { tunning_seeds: [1, 17], titel: x }",
        &LoadOptions::default(),
        &[
            "error: `report` has no key `tunning_seeds`",
            "--> p.yaml:6:11",
            "= help: did you mean `tuning_seeds`?",
            "error: `report` has no key `titel`",
            "--> p.yaml:6:35",
            "= help: expected one of `notes`, `tuning_seeds`, `deviations`",
        ],
    );
    check(
        "report: { tuning_seeds: 17, deviations: { a: b } }",
        &LoadOptions::default(),
        &[
            "error: report: `tuning_seeds`: expected a list, found a number",
            "--> p.yaml:6:25",
            "= help: write `tuning_seeds: [17]`",
            "error: report: `deviations`: expected a list, found a map",
            "--> p.yaml:6:41",
        ],
    );
    check(
        "report: { tuning_seeds: [1, -1, '3', 1.5], deviations: [fine, 3] }",
        &LoadOptions::default(),
        &[
            "error: report: `tuning_seeds`: expected a whole number from 0 to 2^64 - 1, found `-1`",
            "--> p.yaml:6:29",
            "error: report: `tuning_seeds`: expected a whole number from 0 to 2^64 - 1, found `'3'`",
            "--> p.yaml:6:33",
            "error: report: `tuning_seeds`: expected a whole number from 0 to 2^64 - 1, found `1.5`",
            "--> p.yaml:6:38",
            "error: report: `deviations`: expected text, found `3`",
            "--> p.yaml:6:63",
        ],
    );
    let profile = "profiles: { p: { report: { tunning_seeds: [1] } } }";
    let output =
        ["error: `report` has no key `tunning_seeds`", "--> p.yaml:6:28", "= help: did you mean `tuning_seeds`?"];
    check(profile, &LoadOptions::default(), &output);
    check(profile, &options(&["p"], &[], &[]), &output);
    check(
        "",
        &options(&[], &["report.tunning_seeds=[1]"], &[]),
        &["error: `report` has no key `tunning_seeds`", "--> --set:1:8", "= help: did you mean `tuning_seeds`?"],
    );
    for fine in
        ["report:", "report: { tuning_seeds: , deviations: [] }", "report: { tuning_seeds: [0, 18446744073709551615] }"]
    {
        load_text(&format!("version: 1\nstages:{GOOD}{fine}\n"), &LoadOptions::default()).expect("nothing is wrong");
    }
}

#[test]
fn one_mistake_gives_one_error() {
    // Faults of the users of `a`, and its missing parameter, are not reported.
    check(
        "
  a: { uses: bse, matrix: { n: [1, 2] }, wiht: { size: '${n}' }, with: { size: '${n}' } }
  b: { uses: train, needs: { base: 'a[1]', posts: p } }
  c: { uses: ensemble, needs: { members: ['a[*]', b] } }
  p: { uses: dataset }",
        &[
            "error: unknown kind `bse`",
            "--> p.yaml:3:14",
            "= help: did you mean `base`?",
            "error: a stage has no key `wiht`",
            "--> p.yaml:3:42",
            "= help: did you mean `with`?",
        ],
    );
}

#[test]
fn missing_files_are_reported_if_they_are_needed() {
    let stages = "\n  a: { uses: dataset, with: { from: data/x.txt } }\n  b: { uses: dataset }";
    check(
        stages,
        &[
            "error: no file or folder at `data/x.txt`",
            "--> p.yaml:3:37",
            "= help: relative paths start from the folder of the pipeline file",
        ],
    );
    load_text(&format!("version: 1\nstages:{stages}"), &options(&[], &[], &["b"])).expect("not needed");
    // A single path is literal; a list of files may have patterns, which are matched when their content is needed.
    check(
        "\n  a: { uses: dataset, with: { from: 'data/*.txt' } }",
        &[
            "error: no file or folder at `data/*.txt`",
            "--> p.yaml:3:37",
            "= help: relative paths start from the folder of the pipeline file",
        ],
    );
    let command = "\n  a: { uses: command, with: { run: [x], files: ['data/*.txt', data/x.txt] } }";
    check(
        command,
        &[
            "error: no file or folder at `data/x.txt`",
            "--> p.yaml:3:63",
            "= help: relative paths start from the folder of the pipeline file",
        ],
    );
}

#[test]
fn a_pipeline_file_has_the_required_structure() {
    let whole = |text: &str, expected: &[&str]| {
        let output = load_text(text, &LoadOptions::default()).expect_err("something is wrong");
        let messages: Vec<&str> =
            output.lines().filter(|l| l.starts_with("error") || l.contains("help:")).map(str::trim).collect();
        assert_eq!(messages, expected, "\n{output}\n");
    };
    whole("", &["error: the file is empty", "= help: a pipeline file starts with `version: 1`"]);
    whole("[1]", &["error: a pipeline file is a map with `version` and `stages`; this is a list"]);
    whole("version: 1", &["error: the file has no `stages`"]);
    whole(
        "version: 1\nstages: {}",
        &["error: nothing to run: the file has no stages, or its list of targets is empty"],
    );
    whole(
        "stage: {}\nseed: -1\ntargets: [3, x]\nreport: 5\nstages: { a: { uses: dataset, seed: 1.5 }, b: 3, c: { needs: {} } }\nprofiles: { p: { stagse: 1 }, q: { stages: { a: { with: {}, neds: {} } } } }",
        &[
            "error: `version` is missing",
            "= help: start the file with `version: 1`",
            "error: a pipeline file has no key `stage`",
            "= help: did you mean `stages`?",
            "error: seed of the pipeline: expected a whole number from 0 to 2^64 - 1, found `-1`",
            "error: targets: expected `stage` or `stage[label]`, found a number",
            "error: target: unknown stage `x`",
            "= help: expected one of `a`, `b`, `c`",
            "error: `report` must be a map; this is a number",
            "error: seed of stage `a`: expected a whole number from 0 to 2^64 - 1, found `1.5`",
            "error: stage `b` must be a map; this is a number",
            "error: stage `c` has no `uses`",
            "= help: name a kind: `temper kinds` lists them",
            "error: a profile has no key `stagse`",
            "= help: did you mean `stages`?",
            "error: a stage has no key `neds`",
            "= help: did you mean `needs`?",
        ],
    );
    let gone =
        load(Path::new("gone.yaml"), &LoadOptions::default(), &kinds::registry()).expect_err("there is no such file");
    assert!(gone.to_string().starts_with("error: cannot read the pipeline file `gone.yaml`: "), "{gone}");
    assert_eq!(gone.exit_code(), 2);
}

/// `n` values of a matrix variable, separated by commas.
fn values(n: usize) -> String {
    (0..n).map(|i| i.to_string()).collect::<Vec<_>>().join(", ")
}

#[test]
fn the_expansion_of_a_matrix_is_bounded_in_bytes() {
    let large = "x".repeat(100_000);
    let stage = format!(
        "
  posts:
    uses: dataset
    matrix: {{ a: [{0}], b: [{0}] }}
    with: {{ posts: '${{a}}${{b}}', style: '{large}' }}
",
        values(300)
    );
    let output = load_text(&format!("version: 1\nstages:{stage}"), &LoadOptions::default()).unwrap_err();
    assert!(
        output
            .starts_with("error: with the instances of stage `posts` the pipeline's parameters take more than 128 MiB"),
        "{output}"
    );
    assert!(output.len() < 2_000, "{output}");
    // A value that grows when its variables are filled in, and many stages of moderate size.
    let grown = stage.replace(&large, &"${a}".repeat(25_000));
    let many: String = (0..40)
        .map(|n| {
            format!(
                "\n  s{n}: {{ uses: dataset, matrix: {{ a: [{0}], b: [{0}] }}, with: {{ posts: '${{a}}${{b}}' }} }}",
                values(300)
            )
        })
        .collect();
    for stages in [grown, many] {
        let output = load_text(&format!("version: 1\nstages:{stages}"), &LoadOptions::default()).unwrap_err();
        assert!(output.contains("the pipeline's parameters take more than 128 MiB"), "{output}");
        assert_eq!(output.matches("error: ").count(), 1, "{output}");
    }
}

#[test]
fn the_number_of_wired_inputs_is_bounded() {
    let stages = format!(
        "
  posts: {{ uses: dataset, with: {{ posts: '${{n}}' }}, matrix: {{ n: [{0}] }} }}
  base: {{ uses: base, with: {{ size: 1 }} }}
  sft: {{ uses: train, needs: {{ base: base, posts: 'posts[*]' }}, seed: '${{n}}', matrix: {{ n: [{0}] }} }}
",
        values(1_500)
    );
    let output = load_text(&format!("version: 1\nstages:{stages}"), &LoadOptions::default()).unwrap_err();
    assert!(output.contains("all ports together are connected to more than 2000000 instances"), "{output}");
}

#[test]
fn the_first_fifty_errors_are_shown_and_the_others_counted() {
    let wrong: String = (0..10_000).map(|n| format!("    key{n}: 1\n")).collect();
    let output =
        load_text(&format!("version: 1\nstages:\n  posts:\n    uses: dataset\n{wrong}"), &LoadOptions::default())
            .unwrap_err();
    assert_eq!(output.matches("error: ").count(), 50);
    assert!(output.starts_with("error: a stage has no key `key0`\n"), "{output}");
    assert!(output.ends_with("\n… and 9950 more\n\n10000 errors"), "{}", &output[output.len() - 200..]);
}

#[test]
fn an_error_in_a_very_long_text_is_shown_in_few_lines() {
    let output = load_text(
        &format!("version: 1\nstages:\n  posts: {{ uses: {} }}\n", "x".repeat(1 << 20)),
        &LoadOptions::default(),
    )
    .unwrap_err();
    assert!(output.len() < 3_000 && output.starts_with("error: unknown kind `xxx"), "{}", output.len());
}
