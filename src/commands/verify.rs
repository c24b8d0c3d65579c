//! `temper verify`: rehashes the store and checks the paid answers; `--repair` sets damaged files aside. A run that
//! needs them makes them again.

use engine::store::{self, ActionRecord};
use serde_json::json;

use super::{Done, existing_store, print_json};
use crate::args::StoreAt;
use crate::output::counted;

/// Exit code for a damaged store, which counts as a fault of the environment.
const DAMAGED: u8 = 3;

pub fn verify(at: &StoreAt, repair: bool) -> Done {
    let store = existing_store(at)?;
    let found = store::verify(&store)?;
    let answers = stages::annotate::claude::verify(&store.requests())?;
    let is_sound = found.is_sound() && answers.damaged.is_empty();
    if at.json {
        let mut all = json!(found);
        all["paid_answers"] = json!(answers);
        print_json(&all);
    } else {
        let counts =
            [(found.artifacts, "artifact"), (found.files, "file"), (found.bytes, "byte"), (found.records, "record")];
        say!("{}", counts.map(|(n, noun)| counted(n as usize, noun)).join(", "));
        let makers: Vec<ActionRecord> = if found.rotten.is_empty() { Vec::new() } else { store.actions()? };
        for broken in &found.rotten {
            let made = makers.iter().filter(|record| record.digest == broken.artifact);
            let stages: Vec<String> = made.map(|record| record.provenance.stage.to_string()).collect();
            say!("damaged: {} in artifact {} ({})", broken.file, broken.artifact.short(), stages.join(", "));
        }
        for path in found.rotten_blobs.iter().chain(&found.broken_records) {
            say!("damaged: {}", path.display());
        }
        say!("{}", counted(answers.answers as usize, "paid answer"));
        for (log, byte) in &answers.damaged {
            say!("damaged: {}: the paid answer at byte {byte}; `temper run … --pay` pays for it again", log.display());
        }
    }
    if is_sound {
        if !at.json {
            say!("all bytes are as they should be");
        }
        return Ok(0);
    }
    if repair {
        let count = store::repair(&store, &found)?;
        note!(
            "set aside: {count}, in {}; a run that needs them makes them again",
            store.root().join("quarantine").display()
        );
        // A damaged paid answer cannot be repaired, only paid for again.
        return Ok(if answers.damaged.is_empty() { 0 } else { DAMAGED });
    }
    if !at.json {
        say!("`temper verify --repair` sets aside what is damaged; a run that needs it makes it again");
    }
    Ok(DAMAGED)
}
