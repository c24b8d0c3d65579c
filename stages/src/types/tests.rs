//! The artifact types accept their writers' output and reject broken folders, naming the place.

use engine::artifact::ArtifactType;

use super::*;

fn post(id: &str, splits: &[Split]) -> Post {
    Post {
        id: id.into(),
        subreddit: "r/tifu".into(),
        title: String::new(),
        post: "I dropped the cake.\nIt fell.".into(),
        summary: "cake fell".into(),
        splits: splits.to_vec(),
        facts: None,
    }
}

#[test]
fn posts_are_checked_previewed_and_loaded_by_split() {
    let folder = tempfile::tempdir().unwrap();
    let mut writer = Posts::create(folder.path()).unwrap();
    writer.push(post("a", &[Split::Sft, Split::Rl])).unwrap();
    writer.push(post("b", &[Split::Valid])).unwrap();
    writer.finish().unwrap();
    std::fs::write(folder.path().join("metrics.json"), "{\"dropped\": 3, \"odd\": null}").unwrap();
    let facts = Posts.check(folder.path()).unwrap();
    assert_eq!(facts.rows["posts.parquet"], 2);
    assert_eq!(facts.metrics.len(), 1);
    assert_eq!(Posts::load_split(folder.path(), Split::Rl).unwrap(), [post("a", &[Split::Sft, Split::Rl])]);
    let shown = Posts.preview(folder.path(), 1).unwrap();
    assert!(shown.contains("I dropped the cake. / It fell."), "{shown}");
    assert!(!shown.contains("row 2"));
}

#[test]
fn a_missing_file_is_named_with_what_is_there() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("post.parquet"), "").unwrap();
    let message = Posts.check(folder.path()).unwrap_err().message;
    assert!(message.ends_with("file `posts.parquet` is missing; found post.parquet"), "{message}");
}

fn safetensors(values: &[f32]) -> Vec<u8> {
    let header = format!(
        "{{\"w\":{{\"dtype\":\"F32\",\"shape\":[{}],\"data_offsets\":[0,{}]}}}}",
        values.len(),
        4 * values.len()
    );
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.extend(values.iter().flat_map(|v| v.to_le_bytes()));
    bytes
}

#[test]
fn a_model_with_cut_weights_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    std::fs::write(path("config.json"), "{\"vocab_size\": 10}").unwrap();
    std::fs::write(path("tokenizer.json"), "{\"model\": {}}").unwrap();
    let bytes = safetensors(&[1.0, 2.0]);
    std::fs::write(path("model.safetensors"), &bytes).unwrap();
    let facts = Model.check(folder.path()).unwrap();
    assert_eq!((facts.metrics["parameters"], facts.rows.len()), (2.0, 0));
    let point = LearningPoint { step: 1, loss: 0.5, lr: 1e-3, grad_norm: 2.0 };
    LearningPoint::write(folder.path(), vec![point.clone()]).unwrap();
    assert_eq!(Model.check(folder.path()).unwrap().rows[LEARNING], 1);
    assert_eq!(LearningPoint::read(folder.path()).unwrap(), [point]);
    std::fs::write(path(LEARNING), "no table").unwrap();
    assert!(Model.check(folder.path()).unwrap_err().message.contains(LEARNING));
    std::fs::remove_file(path(LEARNING)).unwrap();
    std::fs::write(path("model.safetensors"), &bytes[..bytes.len() - 1]).unwrap();
    let message = Model.check(folder.path()).unwrap_err().message;
    assert!(message.contains("model.safetensors: not a whole safetensors file"), "{message}");
    std::fs::write(path("config.json"), "{").unwrap();
    assert!(Model.check(folder.path()).unwrap_err().message.contains("config.json"));
}

#[test]
fn comparisons_come_back_and_a_bad_line_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let line = r#"{"info":{"id":"t3_x","post":"p","title":"t","subreddit":"tifu"},"summaries":[{"text":" a","policy":"ref","note":"n"},{"text":" b"}],"choice":1,"worker":"w","batch":"b","split":"train","extra":{"confidence":8}}"#;
    let comparison = Comparison::parse(line).unwrap();
    Comparisons::write(folder.path(), [comparison.clone()]).unwrap();
    let read: Vec<_> = Comparisons::open(folder.path()).unwrap().collect::<engine::error::Result<_>>().unwrap();
    assert_eq!(read, [comparison]);
    assert!(Comparisons.preview(folder.path(), 3).unwrap().contains("chosen     b"));
    std::fs::write(
        folder.path().join(Comparisons::FILE),
        format!("{line}\n{}\n", line.replace("\"choice\":1", "\"choice\":2")),
    )
    .unwrap();
    let message = Comparisons.check(folder.path()).unwrap_err().message;
    assert!(message.ends_with("comparisons.jsonl, line 2: `choice` is 2, expected 0 or 1"), "{message}");
}

use super::comparisons::Comparison;

#[test]
fn a_reward_model_and_an_ensemble_are_checked_whole() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    let digest = engine::names::Digest::of(b"base");
    let info = RewardInfo {
        pool: Pooling::Last,
        centre: 0.5,
        scale: 1.0,
        base_digest: digest,
        member_seed: 1,
        fact_sensitivity: None,
        more: serde_json::Map::new(),
    };
    let member = root.join("members/1");
    for sub in ["base", "members/1/adapter"] {
        std::fs::create_dir_all(root.join(sub)).unwrap();
    }
    std::fs::write(root.join("base/config.json"), "{\"vocab_size\": 10}").unwrap();
    std::fs::write(root.join("base/tokenizer.json"), "{\"model\": {}}").unwrap();
    std::fs::write(root.join("base/model.safetensors"), safetensors(&[1.0])).unwrap();
    std::fs::write(member.join("adapter/adapter_config.json"), "{}").unwrap();
    std::fs::write(member.join("adapter/adapter_model.safetensors"), safetensors(&[1.0])).unwrap();
    std::fs::write(member.join("head.safetensors"), safetensors(&[1.0])).unwrap();
    folder::write_json(&member.join("reward.json"), &info).unwrap();
    let ensemble = EnsembleInfo { members: vec!["1".into()], base_digest: digest, more: serde_json::Map::new() };
    folder::write_json(&root.join("ensemble.json"), &ensemble).unwrap();
    assert_eq!(Ensemble.check(root).unwrap().metrics["members"], 1.0);

    folder::write_json(&root.join("reward.json"), &info).unwrap();
    std::fs::write(root.join("head.safetensors"), safetensors(&[1.0])).unwrap();
    assert_eq!(RewardModel.check(root).unwrap().metrics["centre"], 0.5);
    std::fs::write(root.join(LEARNING), "no table").unwrap();
    assert!(RewardModel.check(root).unwrap_err().message.contains(LEARNING));

    let other = RewardInfo { base_digest: engine::names::Digest::of(b"other"), ..info };
    folder::write_json(&member.join("reward.json"), &other).unwrap();
    assert!(Ensemble.check(root).unwrap_err().message.contains("member `1` is made from the base"));
}

#[test]
fn every_type_of_the_registry_has_its_own_name() {
    let registry = crate::registry();
    let names: Vec<_> = registry.types().map(|t| t.name()).collect();
    assert_eq!(names.len(), 13, "{names:?}");
}

#[test]
fn every_column_of_every_table_says_what_it_holds() {
    let registry = crate::registry();
    for artifact_type in registry.types().filter(|t| t.name() != Files::NAME) {
        let files = artifact_type.files();
        assert!(!files.is_empty(), "{}", artifact_type.name());
        for column in files.iter().flat_map(|file| &file.columns) {
            assert!(!column.about.is_empty(), "{}: {}", artifact_type.name(), column.name);
        }
    }
}

const INTRODUCTION: &str = "\
# Artifact types

Made from the types in `stages/src/types/` by a test, which also checks that it is up to date. `temper kinds --type TYPE` prints
the part on one type.

An artifact is a folder with the files below. It may also hold `metrics.json`, numbers by name, and the store adds `manifest.json`.
Tables are Parquet; `?` after a column's type means that it may be null, and that a table may lack the column. A program of the
kind `command` may read tables as JSON lines (`tables: jsonl`), and may write a required table so, such as `preferences.jsonl` for
`preferences.parquet` ([pipeline.md](pipeline.md)): one object per line, with a field per column.
";

/// `docs/artifacts.md`.
fn documentation() -> String {
    // A bar would end the cell.
    let cell = |text: &str| text.replace('|', "\\|");
    let mut text = INTRODUCTION.to_owned();
    for artifact_type in crate::registry().types() {
        text += &format!("\n## {}\n\n", artifact_type.name());
        text += &format!("Schema version {}: {}.\n", artifact_type.schema_version(), artifact_type.about());
        let (tables, plain): (Vec<_>, Vec<_>) =
            artifact_type.files().into_iter().partition(|file| !file.columns.is_empty());
        if !plain.is_empty() {
            text += "\n| file | content |\n|---|---|\n";
        }
        for file in plain {
            let optional = if file.optional { " (optional)" } else { "" };
            text += &format!("| `{}`{optional} | {} |\n", file.name, cell(&file.about));
        }
        for file in tables {
            let optional = if file.optional { " (optional)" } else { "" };
            text += &format!("\n### `{}`{optional}\n\nA row: {}\n\n", file.name, file.about);
            text += "| column | type | meaning |\n|---|---|---|\n";
            for column in file.columns {
                let nullable = if column.nullable { "?" } else { "" };
                let words = column.words.iter().map(|(word, about)| match about.trim_end_matches('.') {
                    "" => format!("`{word}`"),
                    about => format!("`{word}` ({about})"),
                });
                let words: Vec<String> = words.collect();
                let words = if words.is_empty() { String::new() } else { format!(" One of {}.", words.join(", ")) };
                text += &format!(
                    "| `{}` | `{}{nullable}` | {}{words} |\n",
                    column.name,
                    column.data_type,
                    cell(&column.about)
                );
            }
        }
    }
    text
}

#[test]
fn the_documentation_of_the_artifact_types_is_up_to_date() {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/artifacts.md");
    let (expected, found) = (documentation(), std::fs::read_to_string(&path).unwrap_or_default());
    if found != expected {
        std::fs::write(&path, expected).unwrap();
        panic!("docs/artifacts.md was not up to date; this test has written it anew: commit it");
    }
}
