//! Lists the tensors of a pickled state dict, each a view of a storage.

use std::collections::BTreeMap;

use super::pickle::{Global, Id, MAX_NAME, Pickle, RebuiltTensor, Value};
use crate::io::encoding::Encoding;

const MAX_DIMS: usize = 8;

/// A tensor as described in the pickle, not yet checked against the storages.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct TensorDescription {
    /// The storage's name in the archive's `data/` folder.
    pub storage: String,
    pub encoding: Encoding,
    /// Bytes of one number.
    pub item: u64,
    /// In numbers, as are the fields below.
    pub storage_len: u64,
    pub offset: u64,
    pub shape: Vec<usize>,
    pub stride: Vec<usize>,
}

/// The tensors of a pickled state dict, by name. Errors say which part is not a state dict.
pub(super) fn read(bytes: &[u8]) -> Result<BTreeMap<String, TensorDescription>, String> {
    let pickle = Pickle::read(bytes)?;
    let Value::Dict(entries) = pickle.root() else {
        return Err("is not a dictionary, expected a state dict, from names to tensors".to_owned());
    };
    let mut tensors = BTreeMap::new();
    for &(key, value) in entries {
        let Value::Text(name) = pickle.value(key) else {
            return Err("a key of the state dict is not a string".to_owned());
        };
        let &Value::Tensor(tensor) = pickle.value(value) else {
            return Err(format!("entry `{name}` is not a tensor, expected a flat state dict, from names to tensors"));
        };
        if tensors.contains_key(*name) {
            return Err(format!("tensor `{name}` is listed twice"));
        }
        tensors.insert((*name).to_owned(), describe(&pickle, tensor).map_err(|e| format!("tensor `{name}` {e}"))?);
    }
    Ok(tensors)
}

fn describe(pickle: &Pickle, tensor: RebuiltTensor) -> Result<TensorDescription, String> {
    let &Value::Storage(id) = pickle.value(tensor.storage) else {
        return Err("has no storage".to_owned());
    };
    let &[kind, class, key, _, len] = pickle.tuple(id)? else {
        return Err("has a storage that is not described by five values".to_owned());
    };
    let &Value::Global(Global::Storage(numbers, item)) = pickle.value(class) else {
        return Err("has a storage without a type".to_owned());
    };
    let (kind, storage) = (pickle.text(kind)?, pickle.text(key)?);
    if kind != "storage" || storage.len() > MAX_NAME {
        return Err("has an invalid storage".to_owned());
    }
    Ok(TensorDescription {
        storage: storage.to_owned(),
        encoding: match numbers {
            "F32" => Encoding::F32,
            "F16" => Encoding::F16,
            "BF16" => Encoding::Bf16,
            other => Encoding::Other(other.into()),
        },
        item,
        storage_len: natural(pickle, len)?,
        offset: natural(pickle, tensor.offset)?,
        shape: sizes(pickle, tensor.shape)?,
        stride: sizes(pickle, tensor.stride)?,
    })
}

fn sizes(pickle: &Pickle, id: Id) -> Result<Vec<usize>, String> {
    let items = pickle.tuple(id)?;
    if items.len() > MAX_DIMS {
        return Err(format!("has {} dimensions; at most {MAX_DIMS} are supported", items.len()));
    }
    let size = |&item| {
        let size = natural(pickle, item)?;
        usize::try_from(size).map_err(|_| format!("has a size of {size}"))
    };
    items.iter().map(size).collect()
}

fn natural(pickle: &Pickle, id: Id) -> Result<u64, String> {
    match pickle.value(id) {
        &Value::Int(int) => u64::try_from(int).map_err(|_| format!("has {int} where a size or an offset is expected")),
        _ => Err("has something else where a number is expected".to_owned()),
    }
}
