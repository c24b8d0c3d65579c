//! The gradient of one next-token loss, and twenty steps of AdamW on all weights or on an adapter.

use lm::{AdamW, AdamWConfig, CausalLm, LrDecay, LrSchedule};

use crate::fixture::{Fixture, batch};
use crate::numbers::{Within, gradients};

const STEPS: u64 = 20;
const TOLERANCE: Within = Within::Each(2e-5);

/// The loss before each step on the fixture's rows.
fn losses(lm: &CausalLm, fixture: &Fixture) -> Vec<f64> {
    let batch = batch(&fixture.rows);
    let schedule = LrSchedule { peak: 1e-3, warmup: 4, total: STEPS, shape: LrDecay::Cosine };
    let config = AdamWConfig { weight_decay: 0.1, ..AdamWConfig::default() };
    let mut adam = AdamW::new(lm.variables(), config).unwrap();
    (0..STEPS)
        .map(|step| {
            let loss = lm.lm_loss(&batch, 1.0, None).unwrap().loss;
            adam.step(&lm::backward(&loss).unwrap(), schedule.at(step), None).unwrap();
            f64::from(loss.to_scalar::<f32>().unwrap())
        })
        .collect()
}

#[test]
fn gradients_agree_with_autograd() {
    for fixture in Fixture::all() {
        let lm = fixture.model().with_full_training().unwrap();
        let grads = lm::backward(&lm.lm_loss(&batch(&fixture.rows), 1.0, None).unwrap().loss).unwrap();
        fixture.numbers.claim_gradients("gradient", &gradients(&lm.variables(), &grads), 1e-4);
    }
}

#[test]
fn full_training_agrees_with_pytorch() {
    for fixture in Fixture::all() {
        let ours = losses(&fixture.model().with_full_training().unwrap(), &fixture);
        fixture.numbers.claim("losses", &ours, TOLERANCE);
        fixture.numbers.claim("losses_f32", &ours, TOLERANCE);
    }
}

#[test]
fn adapter_training_agrees_with_peft() {
    for fixture in Fixture::all() {
        let ours = losses(&fixture.adapted().with_trainable_adapter().unwrap(), &fixture);
        fixture.numbers.claim("lora/losses", &ours, TOLERANCE);
        fixture.numbers.claim("lora/losses_f32", &ours, TOLERANCE);
    }
}
