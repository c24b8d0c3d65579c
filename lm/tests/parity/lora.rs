//! PEFT's adapters: active, merged and off.

use std::fs;

use crate::fixture::{Fixture, logprobs};
use crate::numbers::Within;

const TOLERANCE: Within = Within::Each(1e-5);

#[test]
fn an_adapter_written_by_peft_gives_the_same_log_probabilities() {
    for fixture in Fixture::all() {
        let ours = logprobs(&fixture.adapted(), &fixture.rows);
        fixture.numbers.claim("lora/logprobs", &ours, TOLERANCE);
        fixture.numbers.claim("lora/logprobs_f32", &ours, TOLERANCE);
    }
}

#[test]
fn merging_and_disabling_an_adapter_agree_with_peft() {
    for fixture in Fixture::all() {
        let adapted = fixture.adapted();
        fixture.numbers.claim("lora/merged", &logprobs(&adapted.merged().unwrap(), &fixture.rows), TOLERANCE);
        fixture.numbers.claim("lora/off", &logprobs(&adapted.base(), &fixture.rows), TOLERANCE);
    }
}

#[test]
fn an_adapter_folder_round_trips() {
    for fixture in Fixture::all() {
        let folder = tempfile::tempdir().unwrap();
        fixture.adapted().save_adapter(folder.path(), "base").unwrap();
        let again = fixture.model().load_adapter(folder.path()).unwrap();
        fixture.numbers.claim("lora/logprobs", &logprobs(&again, &fixture.rows), TOLERANCE);
    }
}

#[test]
fn a_rank_stabilised_adapter_agrees_with_peft() {
    for fixture in Fixture::all() {
        let (from, to) = (fixture.folder.join("adapter"), tempfile::tempdir().unwrap());
        let config = fs::read_to_string(from.join("adapter_config.json")).unwrap();
        let stabilised = config.replace("\"use_rslora\": false", "\"use_rslora\": true");
        assert_ne!(stabilised, config);
        fs::write(to.path().join("adapter_config.json"), stabilised).unwrap();
        let weights = "adapter_model.safetensors";
        fs::copy(from.join(weights), to.path().join(weights)).unwrap();
        let adapted = fixture.model().load_adapter(to.path()).unwrap();
        // Recorded as a mutant, which plain LoRA's comparison must reject.
        fixture.numbers.claim("mutants/scale_by_root_r/lora/logprobs", &logprobs(&adapted, &fixture.rows), TOLERANCE);
        let folder = tempfile::tempdir().unwrap();
        adapted.save_adapter(folder.path(), "base").unwrap();
        let again = fixture.model().load_adapter(folder.path()).unwrap();
        fixture.numbers.claim("mutants/scale_by_root_r/lora/logprobs", &logprobs(&again, &fixture.rows), TOLERANCE);
    }
}
