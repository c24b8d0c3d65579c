//! Writes the folders that `tests/fixtures/check_export.py` loads with transformers and PEFT: for each fixture model, a
//! fully trained one and two trained adapters, with the log-probabilities computed here.
//!
//! `cargo run --release -p temper-lm --example export -- OUT`

use std::error::Error;
use std::path::{Path, PathBuf};

use lm::{AdamW, AdamWConfig, Batch, CausalLm, LoraConfig, Sequence, StatOptions, WeightType};
use rand_chacha::ChaCha12Rng;
use rand_chacha::rand_core::SeedableRng;
use serde_json::{Value, json};

const FAMILIES: [&str; 5] = ["gpt2", "gptj", "llama", "llama_tied", "qwen3"];

fn main() -> Result<(), Box<dyn Error>> {
    let out = std::env::args().nth(1).map(PathBuf::from).ok_or("usage: export OUT")?;
    for family in FAMILIES {
        let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(family);
        export(&fixture, &out.join(family))?;
        println!("{}", out.join(family).display());
    }
    Ok(())
}

fn export(fixture: &Path, out: &Path) -> Result<(), Box<dyn Error>> {
    let batch = batch(&serde_json::from_slice(&std::fs::read(fixture.join("inputs.json"))?)?)?;
    let base = CausalLm::load(fixture)?;

    let full = base.clone().with_full_training()?;
    train(&full, &batch)?;
    full.save(&out.join("full"), WeightType::F32)?;

    // PEFT's own adapter, trained further, and a new one.
    let continued = base.load_adapter(&fixture.join("adapter"))?.with_trainable_adapter()?;
    let config = LoraConfig { r: 3, alpha: 12.0, dropout: 0.0 };
    let fresh = base.with_adapter(&config, &mut ChaCha12Rng::seed_from_u64(1))?;
    for (name, adapted) in [("continued", &continued), ("fresh", &fresh)] {
        train(adapted, &batch)?;
        adapted.save_adapter(&out.join(name), &fixture.display().to_string())?;
    }
    let merged = continued.merged()?;
    merged.save(&out.join("merged"), WeightType::F32)?;

    let logprobs = json!({
        "full": logprobs(&full, &batch)?,
        "continued": logprobs(&continued, &batch)?,
        "fresh": logprobs(&fresh, &batch)?,
        "merged": logprobs(&merged, &batch)?,
    });
    std::fs::write(out.join("logprobs.json"), logprobs.to_string())?;
    Ok(())
}

/// The fixture's rows, with every token from the second on predicted.
fn batch(inputs: &Value) -> Result<Batch, Box<dyn Error>> {
    let rows: Vec<Vec<u32>> = serde_json::from_value(inputs["rows"].clone())?;
    let rows: Vec<Sequence> = rows.iter().map(|row| Sequence::new(&row[..1], &row[1..])).collect();
    Ok(Batch::new(&rows.iter().collect::<Vec<_>>())?)
}

fn train(lm: &CausalLm, batch: &Batch) -> lm::Result<()> {
    let mut adam = AdamW::new(lm.variables(), AdamWConfig::default())?;
    for _ in 0..10 {
        adam.step(&lm::backward(&lm.lm_loss(batch, 1.0, None)?.loss)?, 1e-2, None)?;
    }
    Ok(())
}

fn logprobs(lm: &CausalLm, batch: &Batch) -> lm::Result<Vec<f32>> {
    let options = StatOptions { min_new_tokens: 0, eos: 0.into(), entropy: false };
    Ok(lm.token_stats(&lm.hidden_for_responses(batch, None)?, batch, &options)?.logprob.to_vec1()?)
}
