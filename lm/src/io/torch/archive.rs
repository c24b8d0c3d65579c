//! Reads a zip archive with uncompressed files, as PyTorch writes it.
//!
//! The `zip` crate allocates for as many files as the archive claims, hundreds of times its size. Uncompressed files
//! need so little of the format that it is read here.

use std::collections::BTreeMap;

use crate::io::source::Source;

const END: u32 = 0x0605_4b50;
const END_64: u32 = 0x0606_4b50;
const LOCATOR_64: u32 = 0x0706_4b50;
const ENTRY: u32 = 0x0201_4b50;
const LOCAL: u32 = 0x0403_4b50;
const END_LEN: u64 = 22;
const LOCATOR_64_LEN: u64 = 20;
const ENTRY_LEN: usize = 46;
const LOCAL_LEN: u64 = 30;
/// A comment's length is a u16; the comment follows the end record.
const MAX_COMMENT: u64 = 0xffff;
/// Size limit for the directory, in bytes: half a million tensors.
const MAX_DIRECTORY: u64 = 64 << 20;
/// The extra field for values that do not fit into 32 bits.
const EXTRA_64: u16 = 1;
/// The flag of an encrypted file.
const ENCRYPTED: u16 = 1;

/// The byte range of a file in the archive, checked to lie within it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct ArchiveFile {
    pub start: u64,
    pub len: u64,
}

/// The archive's files by name. Errors: not a zip, a compressed or encrypted file, a duplicate name, or a file beyond
/// the archive's end.
pub(super) fn files(source: &Source) -> Result<BTreeMap<String, ArchiveFile>, String> {
    let (start, len) = directory(source)?;
    if start.checked_add(len).is_none_or(|end| end > source.len()) || len > MAX_DIRECTORY {
        return Err(format!("its directory claims {len} bytes from {start} on, but the file has {}", source.len()));
    }
    // At most MAX_DIRECTORY, so it fits a usize.
    let mut bytes = vec![0; len as usize];
    read(source, start, &mut bytes)?;
    let mut rest = &bytes[..];
    let mut files = BTreeMap::new();
    while !rest.is_empty() {
        let (name, file) = entry(source, &mut rest)?;
        if files.contains_key(&name) {
            return Err(format!("its archive has `{name}` twice"));
        }
        files.insert(name, file);
    }
    Ok(files)
}

/// Start and length of the directory of files, from the end record.
fn directory(source: &Source) -> Result<(u64, u64), String> {
    let longest = source.len().min(END_LEN + MAX_COMMENT);
    let tail_start = source.len() - longest;
    // At most 65,557.
    let mut tail = vec![0; longest as usize];
    read(source, tail_start, &mut tail)?;
    let at = tail
        .windows(END_LEN as usize)
        .rposition(|end| u32_at(end, 0) == END)
        .ok_or("its archive has no end record; the file is truncated")?;
    let end = &tail[at..];
    let end_start = tail_start + at as u64;

    if let Some(locator_start) = end_start.checked_sub(LOCATOR_64_LEN) {
        let mut locator = [0; LOCATOR_64_LEN as usize];
        read(source, locator_start, &mut locator)?;
        if u32_at(&locator, 0) == LOCATOR_64 {
            let mut end = [0; 56];
            read(source, u64_at(&locator, 8), &mut end)?;
            if u32_at(&end, 0) != END_64 {
                return Err("its archive's end is not where it says".to_owned());
            }
            return Ok((u64_at(&end, 48), u64_at(&end, 40)));
        }
    }
    Ok((u64::from(u32_at(end, 16)), u64::from(u32_at(end, 12))))
}

/// Parses one file's entry and advances `rest` past it.
fn entry(source: &Source, rest: &mut &[u8]) -> Result<(String, ArchiveFile), String> {
    let mut take = |len: usize| -> Result<&[u8], String> {
        let (taken, left) = rest.split_at_checked(len).ok_or("its archive's directory is truncated")?;
        *rest = left;
        Ok(taken)
    };
    let fixed = take(ENTRY_LEN)?;
    if u32_at(fixed, 0) != ENTRY {
        return Err("its archive's directory is damaged".to_owned());
    }
    let name = take(usize::from(u16_at(fixed, 28)))?;
    let extra = take(usize::from(u16_at(fixed, 30)))?;
    take(usize::from(u16_at(fixed, 32)))?;
    let name = std::str::from_utf8(name).map_err(|_| "a name in its archive is not UTF-8")?.to_owned();

    let mut zip64 = zip64_extra(extra).as_chunks::<8>().0.iter().map(|&bytes| u64::from_le_bytes(bytes));
    // Fields appear in this order, each only if its 32-bit value is all ones.
    let mut field = |at: usize| match u32_at(fixed, at) {
        u32::MAX => zip64.next().ok_or_else(|| format!("`{name}` in its archive has no size or offset")),
        value => Ok(u64::from(value)),
    };
    let (len, compressed_len, header) = (field(24)?, field(20)?, field(42)?);
    // PyTorch does not compress, because it memory-maps files: so nothing needs unpacking, and zip bombs are
    // impossible.
    let (flags, method) = (u16_at(fixed, 8), u16_at(fixed, 10));
    if method != 0 || compressed_len != len || flags & ENCRYPTED != 0 {
        return Err(format!("`{name}` in its archive is compressed or encrypted; PyTorch writes neither"));
    }
    let mut local = [0; LOCAL_LEN as usize];
    read(source, header, &mut local)?;
    if u32_at(&local, 0) != LOCAL {
        return Err(format!("`{name}` in its archive is not where it says"));
    }
    // `read` was within the file, so this is far from overflow.
    let start = header + LOCAL_LEN + u64::from(u16_at(&local, 26)) + u64::from(u16_at(&local, 28));
    if start.checked_add(len).is_none_or(|end| end > source.len()) {
        return Err(format!("`{name}` in its archive ends beyond the archive; the file is truncated"));
    }
    Ok((name, ArchiveFile { start, len }))
}

/// The contents of the extra field with 64-bit sizes; empty if there is none.
fn zip64_extra(mut extra: &[u8]) -> &[u8] {
    while let Some((head, rest)) = extra.split_first_chunk::<4>() {
        let len = usize::from(u16_at(head, 2));
        let Some((field, after)) = rest.split_at_checked(len) else { break };
        if u16_at(head, 0) == EXTRA_64 {
            return field;
        }
        extra = after;
    }
    &[]
}

fn read(source: &Source, start: u64, bytes: &mut [u8]) -> Result<(), String> {
    source.read_at(start, bytes).map_err(|e| format!("its archive cannot be read at byte {start}: {e}"))
}

// The caller's slice is long enough: it is a record of fixed length.
fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from(u16_at(bytes, at)) | u32::from(u16_at(bytes, at + 2)) << 16
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}
