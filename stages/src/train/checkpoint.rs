//! Contents of a training checkpoint: an optimiser with its variables, and plain state.
//!
//! Only trained weights are written, with their moments: three numbers per trainable weight. A LoRA checkpoint is
//! therefore small whatever its base; one of a fully trained GPT-J with 6 billion weights takes 72 GB. A resumed stage
//! rebuilds everything that follows from its inputs (tables of sequences, batch order, metrics from before the
//! training).

use std::path::Path;

use engine::error::{Error, Result};
use lm::AdamW;
use rand_chacha::ChaCha12Rng;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::error::IntoStageResult;
use crate::types::folder::{read_json, write_json};

/// Format version of the files that the learning stages put into checkpoints. Raise it when one of them changes
/// meaning.
pub const FORMAT: u32 = 1;

const TRAINING: &str = "training.safetensors";
const STATE: &str = "state.json";

/// Writes optimiser, variables and `state` into a checkpoint's folder.
pub fn write<S: Serialize>(folder: &Path, optimiser: &AdamW, state: &S) -> Result<()> {
    optimiser.save(&folder.join(TRAINING)).into_stage_result()?;
    write_json(&folder.join(STATE), state)
}

/// Reads the state from a checkpoint's folder after checking that its tensors match `optimiser`. Changes nothing.
///
/// # Errors
/// If the checkpoint belongs to another training.
pub fn read<S: DeserializeOwned>(folder: &Path, optimiser: &AdamW) -> Result<S> {
    optimiser.check(&folder.join(TRAINING)).into_stage_result()?;
    read_json(&folder.join(STATE))
}

/// Restores optimiser and variables from a folder that [`read`] has accepted.
pub fn restore(folder: &Path, optimiser: &mut AdamW) -> Result<()> {
    optimiser.load(&folder.join(TRAINING)).into_stage_result()
}

/// A number stored as its bits, since the JSON parser may round it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(into = "u64", from = "u64")]
pub struct FloatBits(pub f64);

impl From<FloatBits> for u64 {
    fn from(x: FloatBits) -> Self {
        x.0.to_bits()
    }
}

impl From<u64> for FloatBits {
    fn from(bits: u64) -> Self {
        Self(f64::from_bits(bits))
    }
}

/// Number of 32-bit words that a generator has drawn; its key follows from the seed and its purpose.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GeneratorPosition(u64);

impl GeneratorPosition {
    /// # Errors
    /// Beyond 2^64 words, which no training reaches.
    pub fn of(rng: &ChaCha12Rng) -> Result<Self> {
        let words = u64::try_from(rng.get_word_pos());
        words.map(Self).map_err(|_| Error::internal("a generator has drawn more than 2^64 words"))
    }

    /// Moves a fresh generator with the same key to this position.
    pub fn restore(self, rng: &mut ChaCha12Rng) {
        rng.set_word_pos(self.0.into());
    }
}

#[cfg(test)]
mod tests {
    use rand_chacha::rand_core::RngCore;

    use super::*;
    use crate::random::fixed_generator;

    #[test]
    fn a_generator_goes_on_in_the_middle_of_a_block() {
        for words in [0, 1, 7, 16, 63, 64, 65, 1000] {
            let (mut whole, mut second) = (fixed_generator(1, "test"), fixed_generator(1, "test"));
            for _ in 0..words {
                whole.next_u32();
            }
            let at = serde_json::to_string(&GeneratorPosition::of(&whole).expect("few words")).expect("plain data");
            serde_json::from_str::<GeneratorPosition>(&at).expect("what was written").restore(&mut second);
            assert_eq!(whole.next_u64(), second.next_u64(), "after {words} words");
        }
    }

    #[test]
    fn numbers_come_back_to_the_last_bit() {
        for x in [0.1 + 0.2, -0.0, f64::MIN_POSITIVE, 2.676_199_999_999_999_6, f64::INFINITY] {
            let text = serde_json::to_string(&FloatBits(x)).expect("plain data");
            let back: FloatBits = serde_json::from_str(&text).expect("what was written");
            assert_eq!(back.0.to_bits(), x.to_bits());
        }
    }
}
