//! Number encodings in model files and their decoding to f32.

use std::borrow::Cow;

use candle_core::Device;
use candle_core::quantized::{GgmlDType, QStorage, QTensor};
use half::{bf16, f16};

/// At least the alignment that candle's quantised blocks require, which is at most f32's.
const BLOCK_ALIGNMENT: usize = 16;

/// The encoding of a tensor's numbers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Encoding {
    F32,
    F16,
    Bf16,
    /// ggml's blocks of numbers that share a scale.
    Quantized(GgmlDType),
    /// An encoding that is not supported for weights, by its name: integers, f64, newer quantisations.
    Other(Cow<'static, str>),
}

impl Encoding {
    /// The name in messages.
    pub fn name(&self) -> Cow<'_, str> {
        match self {
            Self::F32 => "F32".into(),
            Self::F16 => "F16".into(),
            Self::Bf16 => "BF16".into(),
            Self::Quantized(kind) => format!("{kind:?}").into(),
            Self::Other(name) => name.as_ref().into(),
        }
    }

    /// Numbers and bytes of the smallest piece that can be decoded alone; `None` if unsupported.
    pub fn block(&self) -> Option<(usize, usize)> {
        match self {
            Self::F32 => Some((1, 4)),
            Self::F16 | Self::Bf16 => Some((1, 2)),
            Self::Quantized(kind) => Some((kind.block_size(), kind.type_size())),
            Self::Other(_) => None,
        }
    }

    /// Bytes of `numbers` numbers; `None` if that is not a whole number of blocks, too many, or unsupported.
    pub fn size(&self, numbers: usize) -> Option<usize> {
        let (per_block, bytes) = self.block()?;
        numbers.is_multiple_of(per_block).then(|| (numbers / per_block).checked_mul(bytes)).flatten()
    }

    /// Appends the numbers of whole blocks to `out`. Errors come from candle's quantised blocks.
    pub fn decode(&self, bytes: &[u8], out: &mut Vec<f32>) -> candle_core::Result<()> {
        match self {
            Self::F32 => out.extend(bytes.as_chunks().0.iter().map(|&b| f32::from_le_bytes(b))),
            Self::F16 => out.extend(bytes.as_chunks().0.iter().map(|&b| f16::from_le_bytes(b).to_f32())),
            Self::Bf16 => out.extend(bytes.as_chunks().0.iter().map(|&b| bf16::from_le_bytes(b).to_f32())),
            Self::Quantized(kind) => {
                let numbers = bytes.len() / kind.type_size() * kind.block_size();
                // candle reads the blocks in place and requires their alignment.
                let mut aligned = vec![0; bytes.len() + BLOCK_ALIGNMENT];
                let start = aligned.as_ptr().align_offset(BLOCK_ALIGNMENT);
                let aligned = &mut aligned[start..start + bytes.len()];
                aligned.copy_from_slice(bytes);
                let blocks = QStorage::from_data(Cow::Borrowed(aligned), &Device::Cpu, *kind)?;
                out.extend(QTensor::new(blocks, numbers)?.dequantize(&Device::Cpu)?.to_vec1::<f32>()?);
            }
            Self::Other(name) => candle_core::bail!("{name} is not supported for weights"),
        }
        Ok(())
    }
}
