//! Locates the tensors of a PyTorch `.bin`, a zip of `data.pkl` (a pickled state dict) and storages (`data/0` and so
//! on). Reads the pickle, but no storage.

mod archive;
mod pickle;
mod state_dict;
#[cfg(test)]
mod tests;

use std::path::Path;

use self::archive::ArchiveFile;
use self::state_dict::TensorDescription;
use super::source::Source;
use super::{TensorLocation, TensorLocations};
use crate::{Error, Result};

const PICKLE: &str = "data.pkl";
const ZIP: [u8; 4] = *b"PK\x03\x04";

/// The tensors of a file. Errors name whatever is not an archive of plain tensors.
pub(super) fn locate_tensors(source: &Source, path: &Path) -> Result<TensorLocations> {
    let bad = |message: String| Error::model(path, message);
    let mut magic = [0; 4];
    if source.len() < 4 {
        return Err(bad(format!("not a PyTorch file: it has only {} bytes", source.len())));
    }
    source.read_at(0, &mut magic).map_err(Error::io(path))?;
    if magic != ZIP {
        return Err(bad(
            "not a zip archive: either damaged, or written by a PyTorch before 1.6, whose pickles are not \
             supported; load it with torch and save it again, best as model.safetensors"
                .to_owned(),
        ));
    }

    let files = archive::files(source).map_err(|message| bad(format!("not a PyTorch file: {message}")))?;
    let mut pickles = files.iter().filter_map(|(name, file)| Some((name.strip_suffix(PICKLE)?, file)));
    let (folder, pickle) = match (pickles.next(), pickles.next()) {
        (Some(only), None) if only.0.ends_with('/') => only,
        _ => return Err(bad(format!("not a PyTorch file: expected one `{PICKLE}` in a folder of its archive"))),
    };
    if pickle.len > pickle::MAX_BYTES {
        return Err(bad(format!("its {PICKLE} has {} bytes; at most {} are supported", pickle.len, pickle::MAX_BYTES)));
    }
    if let Some(order) = files.get(&format!("{folder}byteorder")) {
        let mut text = [0; 6];
        if order.len != 6 || source.read_at(order.start, &mut text).is_err() || &text != b"little" {
            return Err(bad("its numbers are not little-endian".to_owned()));
        }
    }

    // At most MAX_BYTES, so it fits a usize.
    let mut bytes = vec![0; pickle.len as usize];
    source.read_at(pickle.start, &mut bytes).map_err(Error::io(path))?;
    let tensors = state_dict::read(&bytes).map_err(|message| bad(format!("its {PICKLE} {message}")))?;
    tensors
        .into_iter()
        .map(|(name, tensor)| {
            let storage = files.get(&format!("{folder}data/{}", tensor.storage));
            let location = locate(tensor, storage).map_err(|message| bad(format!("tensor `{name}` {message}")))?;
            Ok((name, location))
        })
        .collect()
}

/// The file location of a view of a storage. Errors: a view that exceeds its storage, or is not contiguous.
fn locate(tensor: TensorDescription, storage: Option<&ArchiveFile>) -> Result<TensorLocation, String> {
    let storage = storage.ok_or_else(|| format!("uses storage `{}`, which does not exist", tensor.storage))?;
    if tensor.storage_len.checked_mul(tensor.item).is_none_or(|bytes| bytes > storage.len) {
        return Err(format!(
            "uses storage `{}` of {} numbers, but that storage has only {} bytes",
            tensor.storage, tensor.storage_len, storage.len
        ));
    }
    let numbers = tensor.shape.iter().try_fold(1u64, |all, &size| all.checked_mul(size as u64));
    let end = numbers.and_then(|numbers| tensor.offset.checked_add(numbers));
    if end.is_none_or(|end| end > tensor.storage_len) {
        return Err(format!(
            "has shape {:?} from number {} on, but its storage ends at {}",
            tensor.shape, tensor.offset, tensor.storage_len
        ));
    }
    if !is_contiguous(&tensor.shape, &tensor.stride) {
        return Err(format!(
            "has shape {:?} with strides {:?}; only contiguous tensors are supported: call .contiguous() and save it again",
            tensor.shape, tensor.stride
        ));
    }
    Ok(TensorLocation {
        file: 0,
        shape: tensor.shape,
        encoding: tensor.encoding,
        // Within the storage, which is within the file.
        start: storage.start + tensor.offset * tensor.item,
        interleaved: None,
    })
}

/// As in PyTorch: the stride of a dimension of size 1 is ignored, and so are all strides of empty tensors.
fn is_contiguous(shape: &[usize], stride: &[usize]) -> bool {
    if shape.len() != stride.len() {
        return false;
    }
    if shape.contains(&0) {
        return true;
    }
    let mut expected = 1;
    for (&size, &stride) in shape.iter().zip(stride).rev() {
        if size != 1 && stride != expected {
            return false;
        }
        // The product of all sizes was checked to be within the storage.
        expected *= size;
    }
    true
}
