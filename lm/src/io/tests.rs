//! Valid and malicious folders and safetensors files.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use super::*;

/// A safetensors file of a header and the bytes behind it.
fn safetensors_of(header: &str, data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), data].concat()
}

/// A file with one f32 tensor `[2]`.
fn one(name: &str, values: [f32; 2]) -> Vec<u8> {
    let header = format!(r#"{{"{name}":{{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}}}"#);
    safetensors_of(&header, &values.map(f32::to_le_bytes).concat())
}

fn refusal(result: Result<impl Sized>) -> String {
    match result {
        Ok(_) => panic!("accepted"),
        Err(error) => error.to_string(),
    }
}

#[track_caller]
fn assert_refused(bytes: &[u8], why: &str) {
    let message = refusal(check_safetensors(bytes));
    assert!(message.contains(why), "{message}");
}

fn values(checkpoint: &Checkpoint, name: &str, shape: &[usize]) -> Vec<f32> {
    checkpoint.get(name, shape).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

#[test]
fn each_float_type_is_read_as_f32() {
    let folder = tempfile::tempdir().unwrap();
    let header = r#"{"__metadata__":{"format":"pt"},
        "b":{"dtype":"BF16","shape":[2],"data_offsets":[0,4]},
        "h":{"dtype":"F16","shape":[1,2],"data_offsets":[4,8]},
        "f":{"dtype":"F32","shape":[],"data_offsets":[8,12]},
        "i":{"dtype":"I64","shape":[1],"data_offsets":[12,20]}}"#;
    let data = [&[0x80, 0x3f, 0x00, 0xc0][..], &[0x00, 0x3c, 0x00, 0xc0], &0.25f32.to_le_bytes(), &7i64.to_le_bytes()]
        .concat();
    fs::write(folder.path().join("model.safetensors"), safetensors_of(header, &data)).unwrap();

    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    assert_eq!(checkpoint.names().collect::<Vec<_>>(), ["b", "f", "h", "i"]);
    assert_eq!(values(&checkpoint, "b", &[2]), [1.0, -2.0]);
    assert_eq!(values(&checkpoint, "h", &[1, 2]), [1.0, -2.0]);
    assert_eq!(values(&checkpoint, "f", &[]), [0.25]);
    assert_eq!(checkpoint.shape("h"), Some(&[1, 2][..]));
    assert!(checkpoint.has("i") && !checkpoint.has("j"));
    for (name, shape, why) in [
        ("i", &[1][..], "tensor `i` is I64, expected F32, F16 or BF16"),
        ("b", &[1, 2], "tensor `b` has shape [2], expected [1, 2]"),
        ("j", &[3], "tensor `j` is missing, expected one of shape [3]"),
    ] {
        let message = refusal(checkpoint.get(name, shape));
        assert!(message.contains(why) && message.contains("model.safetensors"), "{message}");
    }
}

#[test]
fn a_tensor_of_several_chunks_is_read_completely() {
    let numbers = CHUNK * 2 + 3;
    let header = format!(r#"{{"w":{{"dtype":"F32","shape":[{numbers}],"data_offsets":[0,{}]}}}}"#, numbers * 4);
    let expected: Vec<f32> = (0..numbers).map(|i| i as f32).collect();
    let data: Vec<u8> = expected.iter().flat_map(|v| v.to_le_bytes()).collect();
    let source = Source::from_memory(safetensors_of(&header, &data));
    let checkpoint = Checkpoint::parse(Path::new("w"), source, safetensors::locate_tensors).unwrap();
    assert_eq!(values(&checkpoint, "w", &[numbers]), expected);
}

#[test]
fn a_non_finite_number_is_reported_with_its_index() {
    assert_refused(&one("w", [1.0, f32::NAN]), "tensor `w` has NaN at flat index 1");
    assert_refused(&one("w", [f32::INFINITY, 1.0]), "tensor `w` has inf at flat index 0");
}

#[test]
fn an_inconsistent_header_is_refused() {
    let entry = |dtype: &str, shape: &str, offsets: &str| {
        format!(r#"{{"w":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}}}"#)
    };
    let data = [0; 16];
    for (header, why) in [
        (entry("F32", "[4]", "[0,20]"), "shape and type do not give its length"),
        (entry("F32", "[5]", "[0,20]"), "not what its header says"),
        (entry("F32", "[3]", "[0,12]"), "not what its header says"),
        (entry("F32", "[3]", "[4,16]"), "begins where no tensor ended"),
        (entry("F32", "[4]", "[16,0]"), "begins where no tensor ended"),
        (entry("F32", "[2,2,2]", "[0,16]"), "shape and type do not give its length"),
        (entry("F32", "[18446744073709551615,2]", "[0,16]"), "too large"),
        (entry("F32", "[4611686018427387905]", "[0,16]"), "too large"),
        (entry("F32", "[18446744073709551616]", "[0,16]"), "its header"),
        (entry("F32", "[-4]", "[0,16]"), "its header"),
        (entry("F32", "[4]", "[0,18446744073709551615]"), "shape and type do not give its length"),
        (entry("F33", "[4]", "[0,16]"), "unknown variant `F33`"),
        (entry("F32", &format!("[{}4]", "1,".repeat(8)), "[0,16]"), "has 9 dimensions; at most 8"),
        ("[]".to_owned(), "its header"),
        ("{".to_owned(), "its header"),
        ("[".repeat(100_000), "its header"),
        (format!("{{\"w\":{}", "[".repeat(100_000)), "its header"),
    ] {
        assert_refused(&safetensors_of(&header, &data), why);
    }
}

#[test]
fn duplicate_names_and_overlapping_tensors_are_refused() {
    let twice = r#"{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#;
    assert_refused(&safetensors_of(twice, &[0; 8]), "tensor `w` is listed twice");
    let shared = r#"{"v":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#;
    assert_refused(&safetensors_of(shared, &[0; 8]), "begins where no tensor ended");
}

#[test]
fn too_many_tensors_are_refused() {
    let entry = |i: usize| format!(r#""{i}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}"#);
    let header: Vec<String> = (0..=1 << 17).map(entry).collect();
    assert_refused(&safetensors_of(&format!("{{{}}}", header.join(",")), &[]), "more than 131072 tensors");
}

#[test]
fn a_header_length_beyond_the_file_is_refused_before_allocation() {
    for claimed in [u64::MAX, 1 << 63, 100_000_001, 99_999_999, 9, 3] {
        let bytes = [&claimed.to_le_bytes()[..], b"{}      "].concat();
        check_safetensors(&bytes).unwrap_err();
    }
}

#[test]
fn a_truncated_safetensors_file_is_refused_at_any_length() {
    let bytes = one("w", [1.0, 2.0]);
    for sixteenth in 0..16 {
        check_safetensors(&bytes[..bytes.len() * sixteenth / 16]).unwrap_err();
    }
    check_safetensors(&bytes).unwrap();
    assert_refused(&[&bytes[..], b"more"].concat(), "not what its header says");
}

/// A folder of two shards and an index with the given `weight_map`.
fn sharded(weight_map: &str) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("one.safetensors"), one("a", [1.0, 2.0])).unwrap();
    fs::write(folder.path().join("two.safetensors"), one("b", [3.0, 4.0])).unwrap();
    let index = format!(r#"{{"metadata":{{"total_size":16}},"weight_map":{weight_map}}}"#);
    fs::write(folder.path().join("model.safetensors.index.json"), index).unwrap();
    folder
}

#[test]
fn shards_are_one_checkpoint() {
    let folder = sharded(r#"{"b":"two.safetensors","a":"one.safetensors"}"#);
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    assert_eq!(checkpoint.names().collect::<Vec<_>>(), ["a", "b"]);
    assert_eq!(values(&checkpoint, "a", &[2]), [1.0, 2.0]);
    assert_eq!(values(&checkpoint, "b", &[2]), [3.0, 4.0]);
    let message = refusal(checkpoint.get("c", &[1]));
    assert!(message.contains("index.json: tensor `c` is missing"), "{message}");
}

#[test]
fn an_index_cannot_name_files_outside_its_folder() {
    let outside = tempfile::tempdir().unwrap();
    let target = outside.path().join("one.safetensors");
    fs::write(&target, one("a", [1.0, 2.0])).unwrap();
    let absolute = target.to_str().unwrap();
    let up = format!("../{}/one.safetensors", outside.path().file_name().unwrap().to_str().unwrap());
    for file in [
        absolute,
        &up,
        "../one.safetensors",
        "./one.safetensors",
        "x/../one.safetensors",
        "one.safetensors/",
        "..",
        ".",
        "",
        "..\\\\one.safetensors",
        "one.safetensors\\u0000",
    ] {
        let folder = sharded(&format!(r#"{{"a":"{file}"}}"#));
        let message = refusal(Checkpoint::open(folder.path()));
        assert!(message.contains("expected a file in its own folder"), "{file}: {message}");
    }
}

#[test]
fn a_wrong_index_is_refused() {
    for (map, why) in [
        (r#"{"a":"two.safetensors"}"#, "puts tensor `a` into"),
        (r#"{"a":"three.safetensors"}"#, "No such file"),
        (r#"{"a":"one.safetensors","a":"two.safetensors"}"#, "tensor `a` is listed twice"),
        (r#"{"a":1}"#, "not an index of weights"),
        (r#"[]"#, "not an index of weights"),
    ] {
        let message = refusal(Checkpoint::open(sharded(map).path()));
        assert!(message.contains(why), "{message}");
    }
}

#[test]
fn symlinked_weights_are_opened() {
    let blobs = tempfile::tempdir().unwrap();
    let folder = tempfile::tempdir().unwrap();
    fs::write(blobs.path().join("blob"), one("a", [1.0, 2.0])).unwrap();
    symlink(blobs.path().join("blob"), folder.path().join("model.safetensors")).unwrap();
    assert_eq!(values(&Checkpoint::open(folder.path()).unwrap(), "a", &[2]), [1.0, 2.0]);
}

#[test]
fn a_folder_without_weights_is_reported() {
    let folder = tempfile::tempdir().unwrap();
    let message = refusal(Checkpoint::open(folder.path()));
    assert!(message.contains("neither model.safetensors nor pytorch_model.bin"), "{message}");
    fs::create_dir(folder.path().join("model.safetensors")).unwrap();
    assert!(refusal(Checkpoint::open(folder.path())).contains("not a file"));
}
