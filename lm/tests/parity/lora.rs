//! PEFT's adapters: active, merged and off.

use std::fs;

use crate::fixture::{Fixture, logprobs};
use crate::numbers::Within;

const TOLERANCE: Within = Within::Each(1e-5);

#[test]
fn an_adapter_that_peft_wrote_gives_what_it_gives_there() {
    for fixture in Fixture::all() {
        let ours = logprobs(&fixture.adapted(), &fixture.rows);
        fixture.numbers.claim("lora/logprobs", &ours, TOLERANCE);
        fixture.numbers.claim("lora/logprobs_f32", &ours, TOLERANCE);
    }
}

#[test]
fn merged_and_off_it_gives_what_pefts_merge_and_unmerged_model_give() {
    for fixture in Fixture::all() {
        let adapted = fixture.adapted();
        fixture.numbers.claim("lora/merged", &logprobs(&adapted.merged().unwrap(), &fixture.rows), TOLERANCE);
        fixture.numbers.claim("lora/off", &logprobs(&adapted.base(), &fixture.rows), TOLERANCE);
    }
}

#[test]
fn its_folder_written_again_gives_the_same() {
    for fixture in Fixture::all() {
        let folder = tempfile::tempdir().unwrap();
        fixture.adapted().save_adapter(folder.path(), "base").unwrap();
        let again = fixture.model().load_adapter(folder.path()).unwrap();
        fixture.numbers.claim("lora/logprobs", &logprobs(&again, &fixture.rows), TOLERANCE);
    }
}

#[test]
fn a_rank_stabilised_one_gives_what_peft_gives_with_it() {
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
