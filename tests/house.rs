//! The project's own rules: dependencies between crates, and module documentation.

mod space;

/// The workspace crates that a manifest depends on.
fn workspace_dependencies(manifest: &str) -> Vec<String> {
    let text = std::fs::read_to_string(space::repository(manifest)).expect("the manifest is part of the repository");
    let dependencies = text.split("[dependencies]").nth(1).unwrap_or_default();
    let dependencies = dependencies.split("\n[").next().unwrap_or_default();
    ["engine", "lm", "stages", "temper_gemm"]
        .into_iter()
        .filter(|name| {
            dependencies
                .lines()
                .any(|line| line.starts_with(&format!("{name}.")) || line.starts_with(&format!("{name} ")))
        })
        .map(str::to_owned)
        .collect()
}

#[test]
fn dependencies_point_one_way() {
    assert_eq!(workspace_dependencies("Cargo.toml"), ["engine", "lm", "stages"]);
    assert_eq!(workspace_dependencies("stages/Cargo.toml"), ["engine", "lm"]);
    assert!(workspace_dependencies("engine/Cargo.toml").is_empty());
    assert_eq!(workspace_dependencies("lm/Cargo.toml"), ["temper_gemm"]);
    assert!(workspace_dependencies("gemm/Cargo.toml").is_empty());
}

#[test]
fn every_module_has_a_header_comment() {
    let mut missing = Vec::new();
    for root in ["src", "engine/src", "gemm/src", "lm/src", "stages/src"] {
        let mut folders = vec![space::repository(root)];
        while let Some(folder) = folders.pop() {
            for entry in std::fs::read_dir(&folder).expect("a source folder can be read") {
                let path = entry.expect("an entry can be read").path();
                // Test modules need no header: the names of the tests say what they claim.
                if path.file_stem().is_some_and(|name| name == "tests" || name.to_string_lossy().ends_with("_tests")) {
                    continue;
                }
                if path.is_dir() {
                    folders.push(path);
                } else if path.extension().is_some_and(|e| e == "rs")
                    && !std::fs::read_to_string(&path).expect("a source file can be read").starts_with("//!")
                {
                    missing.push(path);
                }
            }
        }
    }
    assert!(missing.is_empty(), "these files do not open with a `//!` sentence: {missing:?}");
}

/// The modules of `stages`, from the lowest layer up: text, tables, types, models and training, services, kinds, the paper.
/// A module uses only those before it.
const LAYERS: [&str; 21] = [
    "error", "random", "stats", "http", "text", "table", "types", "prompt", "corpus", "assets", "hub", "source",
    "labels", "train", "model", "reward", "rl", "judge", "services", "kinds", "paper",
];

/// The source files of `stages` without tests: the path inside `src` as module names, and the text.
fn sources_of_stages() -> Vec<(Vec<String>, String)> {
    let root = space::repository("stages/src");
    let mut found = Vec::new();
    let mut folders = vec![root.clone()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).expect("a source folder can be read") {
            let path = entry.expect("an entry can be read").path();
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            let relative = path.strip_prefix(&root).expect("it lies below").with_extension("");
            let module: Vec<String> =
                relative.iter().map(|part| part.to_string_lossy().into_owned()).filter(|part| part != "mod").collect();
            let is_test =
                |part: &String| ["tests", "testing", "parity"].contains(&part.as_str()) || part.ends_with("_tests");
            if path.extension().is_some_and(|e| e == "rs") && !module.iter().any(is_test) && module != ["lib"] {
                let text = std::fs::read_to_string(&path).expect("a source file can be read");
                let tests = ["#[cfg(test)]\nmod tests {", "#[cfg(test)]\npub mod tests {"];
                let end = tests.iter().filter_map(|start| text.find(start)).min().unwrap_or(text.len());
                found.push((module, text[..end].to_owned()));
            }
        }
    }
    found
}

/// The modules that a text names behind `crate::`, each with the name after it.
fn uses(code: &str) -> impl Iterator<Item = (&str, &str)> {
    let word = |text: &str| text.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(text.len());
    code.split("crate::").skip(1).map(move |rest| {
        let (first, rest) = rest.split_at(word(rest));
        let second = rest.strip_prefix("::").unwrap_or_default();
        (first, &second[..word(second)])
    })
}

#[test]
fn modules_of_stages_use_lower_layers_only() {
    let layer = |name: &str| LAYERS.iter().position(|known| *known == name);
    let mut upward = Vec::new();
    for (module, code) in sources_of_stages() {
        let own = layer(&module[0]).unwrap_or_else(|| panic!("`{}` is in no layer", module[0]));
        for (used, item) in uses(&code) {
            let upwards = layer(used).is_some_and(|used| used > own);
            // Families of kinds share nothing with each other: what two of them need lies below `kinds`.
            let sideways = used == "kinds" && module[0] == "kinds" && module.get(1).is_some_and(|own| own != item);
            if upwards || sideways {
                upward.push(format!("{} uses {used}::{item}", module.join("::")));
            }
        }
    }
    assert!(upward.is_empty(), "{upward:#?}");
}

#[test]
fn the_path_of_a_kind_is_its_name() {
    let registry = stages::registry();
    let sources = sources_of_stages();
    for kind in registry.kinds() {
        let path: Vec<&str> = std::iter::once("kinds").chain(kind.name().split('.')).collect();
        let code = sources.iter().find(|(module, _)| *module == path).map(|(_, code)| code);
        let code = code.unwrap_or_else(|| panic!("kind `{}` is not in stages/src/{}", kind.name(), path.join("/")));
        assert!(code.contains(&format!("{:?}", kind.name())), "stages/src/{} declares another kind", path.join("/"));
    }
}

/// The parts of the engine that write what other processes read, or what must survive a crash.
const THROUGH_DISK: [&str; 6] = ["attempt/job.rs", "checkpoint.rs", "gc", "journal.rs", "run/run_state.rs", "store"];

/// Each step of a commit is then a fault point of the tests.
#[test]
fn the_engine_changes_files_through_one_module() {
    let changes = [
        "fs::write(",
        "fs::rename(",
        "fs::create_dir(",
        "fs::create_dir_all(",
        "fs::remove_file(",
        "fs::remove_dir_all(",
        "fs::set_permissions(",
        "File::create",
        ".write_all(",
        ".sync_all(",
        ".set_len(",
        "syncfs(",
        "renameat",
    ];
    // Nothing reads what may be left behind there.
    let exceptions = ["impl Drop for TemporaryPath"];
    let mut found = Vec::new();
    let mut open: Vec<_> = THROUGH_DISK.iter().map(|name| space::repository("engine/src").join(name)).collect();
    while let Some(path) = open.pop() {
        if path.ends_with("tests") || path.ends_with("tests.rs") {
            continue;
        }
        if path.is_dir() {
            open.extend(
                std::fs::read_dir(&path).expect("a source folder can be read").flatten().map(|entry| entry.path()),
            );
            continue;
        }
        let text = std::fs::read_to_string(&path).expect("a source file can be read");
        let code = text.split("#[cfg(test)]\nmod tests {").next().unwrap_or_default();
        // Items, roughly: an exception covers the one that names it.
        for item in code.split("\n}\n").filter(|item| !exceptions.iter().any(|name| item.contains(name))) {
            let direct = changes.iter().filter(|change| item.lines().any(|line| calls_directly(line, change)));
            found.extend(direct.map(|change| format!("{}: {change}", path.display())));
        }
    }
    assert!(found.is_empty(), "use `disk` instead: {found:#?}");
}

fn calls_directly(line: &str, call: &str) -> bool {
    line.contains(call) && !line.contains("disk::")
}
