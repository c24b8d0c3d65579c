//! The same weights in every file format that transformers and PyTorch write.

use std::path::Path;

use lm::CausalLm;

use crate::fixture::logprobs;
use crate::numbers::{Mutants, Numbers, Within};

const TOLERANCE: Within = Within::Each(1e-4);
const MUTANTS: Mutants = &[("bf16", "not_rounded"), ("f16", "not_rounded")];

#[test]
fn every_file_format_gives_the_same_log_probabilities() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/formats");
    let numbers = Numbers::load(&folder.join("expected.safetensors"), MUTANTS);
    let inputs = std::fs::read(folder.join("inputs.json")).unwrap();
    let inputs: serde_json::Value = serde_json::from_slice(&inputs).unwrap();
    let rows: Vec<Vec<u32>> = serde_json::from_value(inputs["rows"].clone()).unwrap();
    for (name, precision) in
        [("shards", "f32"), ("bin", "f32"), ("bin_shards", "f32"), ("f16", "f16"), ("bf16", "bf16")]
    {
        let lm = CausalLm::load(&folder.join(name)).unwrap_or_else(|e| panic!("{name}: {e}"));
        numbers.claim(precision, &logprobs(&lm, &rows), TOLERANCE);
    }
}
