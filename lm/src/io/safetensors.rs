//! Locates the tensors of a safetensors file; reads only the header.

use std::path::Path;

use safetensors::tensor::{Metadata, TensorInfo};
use safetensors::{Dtype, SafeTensorError};

use super::encoding::Encoding;
use super::source::Source;
use super::unique_map::UniqueMap;
use super::{TensorLocation, TensorLocations};
use crate::{Error, Result};

/// The format's own size limit for the header, in bytes.
const MAX_HEADER: u64 = 100_000_000;

/// As in the other formats; tensors of more dimensions are unsupported anyway, and would only fill the error message.
const MAX_DIMS: usize = 8;

/// The tensors of a file. Errors: an invalid header, or one that disagrees with the file's bytes.
pub(super) fn locate_tensors(source: &Source, path: &Path) -> Result<TensorLocations> {
    let bad = |message: String| Error::model(path, message);
    let wrong_len =
        || bad(format!("the file is truncated or padded: its {} bytes are not what its header says", source.len()));

    let mut prefix = [0; 8];
    if source.len() < 8 {
        return Err(wrong_len());
    }
    source.read_at(0, &mut prefix).map_err(Error::io(path))?;
    let header_len = u64::from_le_bytes(prefix);
    if header_len > MAX_HEADER {
        return Err(bad(format!(
            "not a safetensors file: it claims a header of {header_len} bytes; at most {MAX_HEADER} are allowed"
        )));
    }
    if header_len > source.len() - 8 {
        return Err(wrong_len());
    }
    // At most MAX_HEADER, so it fits a usize.
    let mut header = vec![0; header_len as usize];
    source.read_at(8, &mut header).map_err(Error::io(path))?;

    let UniqueMap(entries) = serde_json::from_slice::<UniqueMap<TensorInfo>>(&header)
        .map_err(|e| bad(format!("not a safetensors file: its header: {e}")))?;
    let mut tensors: Vec<(String, TensorInfo)> = entries.into_iter().collect();
    if let Some((name, info)) = tensors.iter().find(|(_, info)| info.shape.len() > MAX_DIMS) {
        return Err(bad(format!(
            "tensor `{name}` has {} dimensions; at most {MAX_DIMS} are supported",
            info.shape.len()
        )));
    }
    tensors.sort_by_key(|(_, info)| info.data_offsets);
    // The `safetensors` crate checks that shapes, types and offsets agree, without gaps or overlaps.
    let metadata = Metadata::new(None, tensors.clone()).map_err(|e| {
        let message = match e {
            SafeTensorError::InvalidOffset(name) => format!("tensor `{name}` begins where no tensor ended"),
            SafeTensorError::TensorInvalidInfo => "a tensor's shape and type do not give its length".to_owned(),
            SafeTensorError::ValidationOverflow => "a tensor's shape is too large".to_owned(),
            e => e.to_string(),
        };
        bad(format!("not a safetensors file: its header: {message}"))
    })?;
    if metadata.data_len() as u64 != source.len() - 8 - header_len {
        return Err(wrong_len());
    }

    let start = 8 + header_len;
    let location = |info: TensorInfo| TensorLocation {
        file: 0,
        encoding: match info.dtype {
            Dtype::F32 => Encoding::F32,
            Dtype::F16 => Encoding::F16,
            Dtype::BF16 => Encoding::Bf16,
            other => Encoding::Other(format!("{other:?}").into()),
        },
        start: start + info.data_offsets.0 as u64,
        shape: info.shape,
        interleaved: None,
    };
    Ok(tensors.into_iter().map(|(name, info)| (name, location(info))).collect())
}
