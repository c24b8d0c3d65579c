//! The project's own rules: dependencies between crates, and module documentation.

mod space;

/// The workspace crates that a manifest depends on.
fn workspace_dependencies(manifest: &str) -> Vec<String> {
    let text = std::fs::read_to_string(space::repository(manifest)).expect("the manifest is part of the repository");
    let dependencies = text.split("[dependencies]").nth(1).unwrap_or_default();
    let dependencies = dependencies.split("\n[").next().unwrap_or_default();
    ["engine", "lm", "stages"]
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
    assert!(workspace_dependencies("lm/Cargo.toml").is_empty());
}

#[test]
fn every_module_has_a_header_comment() {
    let mut missing = Vec::new();
    for root in ["src", "engine/src", "lm/src", "stages/src"] {
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
