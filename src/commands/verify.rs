//! `temper verify`: rehashes the store and reads the paid answers. Repairs nothing; a run that needs what is damaged makes it again.

use engine::store::{self, ActionRecord};
use serde_json::json;

use super::{Done, existing_store, print_json};
use crate::args::StoreAt;

/// Exit code of a store in which something is damaged: the surroundings' fault.
const DAMAGED: u8 = 3;

pub fn verify(at: &StoreAt) -> Done {
    let store = existing_store(at)?;
    let found = store::verify(&store)?;
    let answers = stages::annotate::claude::verify(&store.requests())?;
    let is_sound = found.is_sound() && answers.damaged.is_empty();
    if at.json {
        let mut all = json!(found);
        all["paid_answers"] = json!(answers);
        print_json(&all);
    } else {
        say!("{} artifacts, {} files, {} bytes, {} records", found.artifacts, found.files, found.bytes, found.records);
        let makers: Vec<ActionRecord> = if found.rotten.is_empty() { Vec::new() } else { store.actions()? };
        for broken in &found.rotten {
            let made = makers.iter().filter(|record| record.digest == broken.artifact);
            let stages: Vec<String> = made.map(|record| record.provenance.stage.to_string()).collect();
            say!("damaged: {} in artifact {} ({})", broken.file, broken.artifact.short(), stages.join(", "));
        }
        for path in found.rotten_blobs.iter().chain(&found.broken_records) {
            say!("damaged: {}", path.display());
        }
        say!("{} paid answers", answers.answers);
        for (log, byte) in &answers.damaged {
            say!("damaged: {}: the paid answer at byte {byte}; `temper run … --pay` pays for it again", log.display());
        }
        say!(
            "{}",
            if is_sound {
                "all bytes are as they should be"
            } else {
                "a run that needs what is damaged makes it again; `temper run … --force STAGE` does so in any case"
            }
        );
    }
    Ok(if is_sound { 0 } else { DAMAGED })
}
