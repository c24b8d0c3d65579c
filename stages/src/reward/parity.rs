//! Compares scores, Eq. 1 and its gradient with PyTorch (`lm/tests/fixtures/rlhf.py`).

use std::path::Path;

use lm::{Batch, CausalLm, RewardModel, RewardPooling, ScalarHead, Sequence};

use super::loss::preference_loss;
use crate::testing::numbers::{Mutants, Numbers, Within, floats, gradients};

const TOLERANCE: f64 = 1e-5;
/// The model's width, as in `rlhf.py`.
pub(crate) const WIDTH: usize = 16;

/// Mutants in the fixture file that concern reward models; `rl::parity` covers the others.
pub(crate) const MUTANTS: Mutants = &[
    ("last/gradient", "difference_squared eta_dropped"),
    ("last/loss", "difference_squared eta_dropped"),
    ("last/scores", "padded_end"),
    ("ppo/gradient", "clip_dropped eos_not_masked"),
    ("ppo/loss", "clip_dropped eos_not_masked"),
    ("sum/gradient", "difference_squared eta_dropped"),
    ("sum/loss", "difference_squared eta_dropped"),
    ("sum/scores", "sum_from_the_prompt"),
];

#[test]
fn scores_and_equation_1_with_its_gradient_are_those_of_autograd() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../lm/tests/fixtures/rlhf");
    let numbers = Numbers::load(&folder.join("expected.safetensors"), MUTANTS);
    let inputs: serde_json::Value =
        serde_json::from_slice(&std::fs::read(folder.join("inputs.json")).unwrap()).unwrap();
    let rows: Vec<(Vec<u32>, Vec<u32>)> = serde_json::from_value(inputs["rows"].clone()).unwrap();
    let rows: Vec<Sequence> = rows.into_iter().map(|(prompt, response)| Sequence { prompt, response }).collect();
    let batch = Batch::new(&rows.iter().collect::<Vec<_>>()).unwrap();
    let base = CausalLm::load(&folder).unwrap();
    let head = ScalarHead::load(&folder.join("head.safetensors"), WIDTH).unwrap();
    for (pool, name) in [(RewardPooling::Last, "last"), (RewardPooling::Sum, "sum")] {
        let model =
            RewardModel { lm: base.clone().with_full_training().unwrap(), head: head.trainable().unwrap(), pool };
        let scores = model.scores(&batch, None).unwrap();
        numbers.claim(&format!("{name}/scores"), &floats(&scores), Within::Each(TOLERANCE));
        let loss = preference_loss(&scores, inputs["eta"].as_f64().unwrap()).unwrap();
        numbers.claim(&format!("{name}/loss"), &floats(&loss), Within::Each(TOLERANCE));
        let ours = gradients(&model.variables(), &lm::backward(&loss).unwrap());
        numbers.claim_gradients(&format!("{name}/gradient"), &ours, TOLERANCE);
    }
}
