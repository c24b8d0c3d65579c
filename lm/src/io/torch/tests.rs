//! Hand-made PyTorch files, valid and malicious. The valid pickles are as torch 2.15 writes them.

use std::io::{Cursor, Write};
use std::path::Path;

use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipWriter};

use super::super::{Checkpoint, check_torch};
use super::*;

/// An archive as torch writes it.
fn archive(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut zip = ZipWriter::new(Cursor::new(Vec::new()));
    let stored = SimpleFileOptions::default().compression_method(CompressionMethod::Stored);
    for (name, bytes) in files {
        zip.start_file(format!("model/{name}"), stored).unwrap();
        zip.write_all(bytes).unwrap();
    }
    zip.finish().unwrap().into_inner()
}

fn text(text: &str) -> Vec<u8> {
    [b"X", &(text.len() as u32).to_le_bytes()[..], text.as_bytes()].concat()
}

/// BININT, which has a sign.
fn int(int: i32) -> Vec<u8> {
    [b"J", &int.to_le_bytes()[..]].concat()
}

fn tuple(items: impl IntoIterator<Item = Vec<u8>>) -> Vec<u8> {
    [b"(".to_vec(), items.into_iter().collect::<Vec<_>>().concat(), b"t".to_vec()].concat()
}

fn ints(values: &[i32]) -> Vec<u8> {
    tuple(values.iter().map(|&value| int(value)))
}

/// A tensor of storage `0`, as torch pickles one.
fn tensor(class: &str, storage_len: i32, offset: i32, shape: &[i32], stride: &[i32]) -> Vec<u8> {
    let storage =
        tuple([text("storage"), format!("ctorch\n{class}\n").into_bytes(), text("0"), text("cpu"), int(storage_len)]);
    let hooks = b"ccollections\nOrderedDict\n)R".to_vec();
    let storage = [storage, b"Q".to_vec()].concat();
    let arguments = tuple([storage, int(offset), ints(shape), ints(stride), b"\x89".to_vec(), hooks]);
    [b"ctorch._utils\n_rebuild_tensor_v2\n".to_vec(), arguments, b"R".to_vec()].concat()
}

/// A state dict of named values, with a module's `_metadata`.
fn dict(entries: &[(&str, Vec<u8>)]) -> Vec<u8> {
    let items: Vec<u8> = entries.iter().flat_map(|(name, value)| [text(name), value.clone()].concat()).collect();
    let metadata = [b"}", &text("_metadata")[..], b"ccollections\nOrderedDict\n)Rsb"].concat();
    [b"\x80\x02ccollections\nOrderedDict\n)Rq\x01(".to_vec(), items, b"u".to_vec(), metadata, b".".to_vec()].concat()
}

/// Storage `0`: the f32 numbers 0 to 5.
fn storage() -> Vec<u8> {
    (0..6).flat_map(|i| (i as f32).to_le_bytes()).collect()
}

fn file(pickle: &[u8]) -> Vec<u8> {
    archive(&[("data.pkl", pickle), ("byteorder", b"little"), ("data/0", &storage()), ("version", b"3\n")])
}

fn open(bytes: Vec<u8>) -> Result<Checkpoint> {
    Checkpoint::parse(Path::new("pytorch_model.bin"), Source::from_memory(bytes), locate_tensors)
}

#[track_caller]
fn assert_refused(bytes: &[u8], why: &str) {
    let message = check_torch(bytes).expect_err("accepted").to_string();
    assert!(message.contains(why), "{message}");
}

fn values(checkpoint: &Checkpoint, name: &str, shape: &[usize]) -> Vec<f32> {
    checkpoint.get(name, shape).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

#[test]
fn files_written_by_torch_are_read() {
    // a: 0 to 5 as f32, b: ones as f16, c: i64, e: a parameter of ones, f: ones as bf16.
    let checkpoint = open(include_bytes!("../../../fuzz/seeds/torch/state_dict.bin").to_vec()).unwrap();
    assert_eq!(checkpoint.names().collect::<Vec<_>>(), ["a", "b", "c", "e", "f"]);
    assert_eq!(values(&checkpoint, "a", &[2, 3]), [0., 1., 2., 3., 4., 5.]);
    assert_eq!(values(&checkpoint, "b", &[4]), [1.; 4]);
    assert_eq!(values(&checkpoint, "e", &[2]), [1.; 2]);
    assert_eq!(values(&checkpoint, "f", &[2, 2]), [1.; 4]);
    // A module's state dict, with its `_metadata`.
    check_torch(include_bytes!("../../../fuzz/seeds/torch/linear.bin")).unwrap();
}

#[test]
fn tensors_that_share_a_storage_are_read_at_their_offsets() {
    let whole = tensor("FloatStorage", 6, 0, &[2, 3], &[3, 1]);
    let parameter = [
        b"ctorch._utils\n_rebuild_parameter\n".to_vec(),
        tuple([
            tensor("FloatStorage", 6, 4, &[2, 1], &[1, 1]),
            b"\x88".to_vec(),
            b"ccollections\nOrderedDict\n)R".to_vec(),
        ]),
        b"R".to_vec(),
    ]
    .concat();
    let mask = tensor("BoolStorage", 24, 0, &[2, 2], &[2, 1]);
    let checkpoint = open(file(&dict(&[("whole", whole), ("tail", parameter), ("mask", mask)]))).unwrap();
    assert_eq!(checkpoint.names().collect::<Vec<_>>(), ["mask", "tail", "whole"]);
    assert_eq!(values(&checkpoint, "whole", &[2, 3]), [0., 1., 2., 3., 4., 5.]);
    assert_eq!(values(&checkpoint, "tail", &[2, 1]), [4., 5.]);
    let message = checkpoint.get("mask", &[2, 2]).unwrap_err().to_string();
    assert!(message.contains("tensor `mask` is BOOL, expected F32, F16 or BF16"), "{message}");
}

#[test]
fn a_dictionary_memoized_before_it_is_filled_is_shared() {
    // torch memoizes the dictionary before filling it; getting it from the memo gives the same one.
    let whole = tensor("FloatStorage", 6, 0, &[6], &[1]);
    let pickle = [b"\x80\x02}q\x05(".to_vec(), text("w"), whole, b"u0h\x05.".to_vec()].concat();
    assert_refused(&file(&pickle), "opcode 0x30");
    let pickle = [&pickle[..pickle.len() - 4], b"h\x05."].concat();
    assert_eq!(values(&open(file(&pickle)).unwrap(), "w", &[6]).len(), 6);
}

#[test]
fn a_pickle_that_calls_other_functions_is_refused_by_name() {
    for (call, name) in [
        (&b"cos\nsystem\n"[..], "calls `os.system`"),
        (b"cposix\nsystem\n", "calls `posix.system`"),
        (b"cbuiltins\neval\n", "calls `builtins.eval`"),
        (b"c__builtin__\nexec\n", "calls `__builtin__.exec`"),
        (b"ctorch\nload\n", "calls `torch.load`"),
        (b"ctorch._utils\n_rebuild_tensor_v2.__globals__\n", "calls `torch._utils._rebuild_tensor_v2.__globals__`"),
        (b"\x8c\x05posix\x8c\x06system\x93", "calls `posix.system`"),
    ] {
        let pickle = [b"\x80\x02", call, &text("touch /tmp/owned"), b"\x85R."].concat();
        assert_refused(&file(&pickle), name);
        // The same call as one value among tensors.
        let value = [call, &text("true"), b"\x85R"].concat();
        assert_refused(&file(&dict(&[("w", value)])), name);
    }
    assert_refused(&file(b"\x80\x02(X\x04\0\0\0trueios\nsystem\n."), "calls `os.system`");
    for opcode in [b'o', 0x81, 0x92, b'P', b'S', b'I', 0x82, b'a', b'e', b'd', b'l', 0x97] {
        assert_refused(&file(&[0x80, 2, opcode, b'.']), "which no state dict needs");
    }
}

#[test]
fn allowed_functions_are_called_only_as_torch_calls_them() {
    for (pickle, why) in [
        (b"\x80\x02ctorch\nFloatStorage\n)R.".to_vec(), "makes a storage by a call"),
        (b"\x80\x02ccollections\nOrderedDict\nNR.".to_vec(), "where a tuple is expected"),
        (b"\x80\x02ccollections\nOrderedDict\nN\x85R.".to_vec(), "passes 1 arguments"),
        (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R.".to_vec(), "passes 0 arguments"),
        (b"\x80\x02ctorch._utils\n_rebuild_parameter\nNNN\x87R.".to_vec(), "something that is not a tensor"),
        (b"\x80\x02N)R.".to_vec(), "something that is not a function"),
        (b"\x80\x02NNb.".to_vec(), "not a dictionary"),
        (b"\x80\x02N.".to_vec(), "is not a dictionary"),
        (dict(&[("epoch", int(3))]), "entry `epoch` is not a tensor"),
        (dict(&[("w", b"}".to_vec())]), "entry `w` is not a tensor"),
    ] {
        assert_refused(&file(&pickle), why);
    }
}

#[test]
fn a_tensor_beyond_its_storage_is_refused() {
    for (value, why) in [
        (tensor("FloatStorage", 7, 0, &[7], &[1]), "that storage has only 24 bytes"),
        (tensor("FloatStorage", i32::MAX, 0, &[7], &[1]), "that storage has only 24 bytes"),
        (tensor("FloatStorage", 6, 1, &[6], &[1]), "its storage ends at 6"),
        (tensor("FloatStorage", 6, i32::MAX, &[1], &[1]), "its storage ends at 6"),
        (tensor("FloatStorage", 6, 0, &[i32::MAX; 3], &[1, 1, 1]), "its storage ends at 6"),
        (tensor("FloatStorage", 6, -1, &[1], &[1]), "has -1 where a size or an offset is expected"),
        (tensor("FloatStorage", 6, 5, &[6], &[-1]), "has -1 where a size or an offset is expected"),
        (tensor("FloatStorage", 6, 0, &[-6], &[1]), "has -6 where a size"),
        (tensor("FloatStorage", -6, 0, &[6], &[1]), "has -6 where a size"),
        (tensor("FloatStorage", 6, 0, &[1; 9], &[1; 9]), "has 9 dimensions"),
        (tensor("DoubleStorage", 6, 0, &[6], &[1]), "that storage has only 24 bytes"),
    ] {
        assert_refused(&file(&dict(&[("w", value)])), why);
    }
}

#[test]
fn only_contiguous_tensors_are_read() {
    for (shape, stride) in [(&[2, 3][..], &[1, 2][..]), (&[6], &[0]), (&[2, 3], &[1, 1]), (&[3], &[2]), (&[2, 3], &[1])]
    {
        assert_refused(&file(&dict(&[("w", tensor("FloatStorage", 6, 0, shape, stride))])), "only contiguous tensors");
    }
    // The stride of a dimension of size 1 is ignored.
    let single = tensor("FloatStorage", 6, 0, &[1, 6], &[1, 1]);
    check_torch(&file(&dict(&[("w", single)]))).unwrap();
}

#[test]
fn a_pickle_bomb_is_refused_before_it_expands() {
    // Nested tuples: two to the power of half a million leaves, if anything were copied.
    let doubling = [b"\x80\x02N".to_vec(), b"q\x01h\x01\x86".repeat(500_000)].concat();
    assert_refused(&file(&doubling), "truncated");
    let deep = [b"\x80\x02N".to_vec(), b"\x85".repeat(3 << 20)].concat();
    assert_refused(&file(&deep), "values");
    let marks = [b"\x80\x02".to_vec(), b"(".repeat(1 << 20)].concat();
    assert_refused(&file(&marks), "more than 256 marks open at once");
    let large = vec![b'('; 9 << 20];
    assert_refused(&file(&large), "at most 8388608 are supported");
    // A text of 4 GB in ten bytes.
    assert_refused(&file(b"\x80\x02X\xff\xff\xff\xff."), "truncated");
    assert_refused(&file(b"\x80\x02\x8a\xff\x01."), "truncated");
    assert_refused(&file(b"\x80\x02\x8a\x09123456789."), "integer of 9 bytes");
}

#[test]
fn a_damaged_pickle_is_refused() {
    for pickle in [
        &b""[..],
        b".",
        b"\x80",
        b"t.",
        b"(.",
        b"(NQ.",
        b"N(Q.",
        b"h\x07.",
        b"Ns.",
        b"NNs.",
        b"(Nu.",
        b"}(Nu.",
        b"q\0.",
        b"R.",
    ] {
        check_torch(&file(pickle)).unwrap_err();
    }
    let whole = dict(&[("w", tensor("FloatStorage", 6, 0, &[6], &[1]))]);
    for len in 0..whole.len() {
        check_torch(&file(&whole[..len])).unwrap_err();
    }
    check_torch(&file(&whole)).unwrap();
    let w = tensor("FloatStorage", 6, 0, &[6], &[1]);
    assert_refused(&file(&dict(&[("w", w.clone()), ("w", w)])), "tensor `w` is listed twice");
}

#[test]
fn an_archive_without_a_state_dict_is_refused() {
    let pickle = dict(&[("w", tensor("FloatStorage", 6, 0, &[6], &[1]))]);
    let data = storage();
    for (bytes, why) in [
        (archive(&[("data/0", &data)]), "expected one `data.pkl`"),
        (archive(&[("data.pkl", &pickle), ("x/data.pkl", &pickle), ("data/0", &data)]), "expected one `data.pkl`"),
        (archive(&[("data.pkl", &pickle)]), "uses storage `0`, which does not exist"),
        (archive(&[("data.pkl", &pickle), ("data/0", &data[..20])]), "that storage has only 20 bytes"),
        (archive(&[("data.pkl", &pickle), ("data/0", &data), ("byteorder", b"big")]), "not little-endian"),
        (b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.".to_vec(), "written by a PyTorch before 1.6"),
        (b"PK".to_vec(), "only 2 bytes"),
        (b"PK\x03\x04".to_vec(), "its archive has no end"),
    ] {
        assert_refused(&bytes, why);
    }
}

/// The end record of an archive with 64-bit sizes, and its locator.
fn end_64(files: u64, len: u64, start: u64, location: u64) -> Vec<u8> {
    let fixed = [&b"PK\x06\x06"[..], &44u64.to_le_bytes(), &[45, 0, 45, 0], &[0; 8]].concat();
    let counts = [files, files, len, start].map(u64::to_le_bytes).concat();
    let locator = [&b"PK\x06\x07"[..], &[0; 4], &location.to_le_bytes(), &1u32.to_le_bytes()].concat();
    let end = [&b"PK\x05\x06"[..], &[0; 4], &[0xff; 12], &[0; 2]].concat();
    [fixed, counts, locator, end].concat()
}

#[test]
fn an_archive_with_64_bit_sizes_is_read() {
    let mut bytes = file(&dict(&[("w", tensor("FloatStorage", 6, 0, &[6], &[1]))]));
    let end = bytes.split_off(bytes.len() - 22);
    let field = |at: usize| u64::from(u32::from_le_bytes([end[at], end[at + 1], end[at + 2], end[at + 3]]));
    bytes.extend(end_64(4, field(12), field(16), bytes.len() as u64));
    check_torch(&bytes).unwrap();
}

#[test]
fn an_archive_with_false_sizes_is_refused_before_allocation() {
    let honest = file(&dict(&[("w", tensor("FloatStorage", 6, 0, &[6], &[1]))]));
    let location = honest.len() as u64;
    for (files, len, start) in [
        (u64::MAX, u64::MAX, 0),
        (1 << 40, 46 << 40, 0),
        (1, 46, u64::MAX),
        (1, u64::MAX, u64::MAX),
        (1, 65 << 20, 0),
        (location, location + 200, 0),
    ] {
        assert_refused(&[honest.clone(), end_64(files, len, start, location)].concat(), "its directory claims");
    }
    assert_refused(&[honest.clone(), end_64(1, 46, 0, u64::MAX)].concat(), "cannot be read at byte");
    assert_refused(&[honest.clone(), end_64(1, 46, 0, 0)].concat(), "its archive's end is not where it says");
}

#[test]
fn a_compressed_or_encrypted_archive_is_refused() {
    let honest = file(&dict(&[("w", tensor("FloatStorage", 6, 0, &[6], &[1]))]));
    let entry = honest.windows(4).position(|at| at == b"PK\x01\x02").unwrap();
    for (at, value) in [(8, 1), (10, 8), (10, 12), (20, 1), (24, 1)] {
        let mut bytes = honest.clone();
        bytes[entry + at] = value;
        assert_refused(&bytes, "compressed or encrypted");
    }
    let mut elsewhere = honest.clone();
    elsewhere[entry + 42] = 1;
    assert_refused(&elsewhere, "is not where it says");
}

#[test]
fn a_truncated_archive_is_refused_at_any_length() {
    let whole = file(&dict(&[("w", tensor("FloatStorage", 6, 0, &[6], &[1]))]));
    for sixteenth in 0..16 {
        check_torch(&whole[..whole.len() * sixteenth / 16]).unwrap_err();
    }
    check_torch(&whole).unwrap();
}

#[test]
fn every_flipped_byte_gives_the_tensor_or_an_error() {
    let whole = file(&dict(&[("w", tensor("FloatStorage", 6, 0, &[2, 3], &[3, 1]))]));
    for at in 0..whole.len() {
        for bit in 0..8 {
            let mut bytes = whole.clone();
            bytes[at] ^= 1 << bit;
            // Any result will do: only a panic or an abort fails this test.
            let _ = check_torch(&bytes);
        }
    }
}
