//! `temper verify`: rehashes the store and checks the paid answers; `--repair` sets damaged files aside. A run that
//! needs them makes them again.

use engine::store::{self, ActionRecord};
use serde_json::json;

use super::{CommandResult, existing_store, print_json};
use crate::args::StoreArgs;
use crate::output::counted;

/// Exit code for a damaged store, which counts as a fault of the environment.
const DAMAGED: u8 = 3;

pub fn verify(at: &StoreArgs, repair: bool) -> CommandResult {
    let store = existing_store(at)?;
    let found = store::verify(&store)?;
    let answers = stages::judge::verify(&store.requests())?;
    let is_intact = found.is_intact() && answers.damaged.is_empty();
    if at.json {
        let mut all = json!(found);
        all["paid_answers"] = json!(answers);
        print_json(&all);
    } else {
        let counts =
            [(found.artifacts, "artifact"), (found.files, "file"), (found.bytes, "byte"), (found.records, "record")];
        outln!("{}", counts.map(|(n, noun)| counted(n as usize, noun)).join(", "));
        let records: Vec<ActionRecord> = if found.damaged.is_empty() { Vec::new() } else { store.actions()? };
        for broken in &found.damaged {
            let producers = records.iter().filter(|record| record.digest == broken.artifact);
            let stages: Vec<String> = producers.map(|record| record.provenance.stage.to_string()).collect();
            outln!("damaged: {} in artifact {} ({})", broken.file, broken.artifact.short(), stages.join(", "));
        }
        for path in found.damaged_blobs.iter().chain(&found.broken_records) {
            outln!("damaged: {}", path.display());
        }
        outln!("{}", counted(answers.answers as usize, "paid answer"));
        for (log, byte) in &answers.damaged {
            outln!(
                "damaged: {}: the paid answer at byte {byte}; `temper run … --pay` pays for it again",
                log.display()
            );
        }
    }
    if is_intact {
        if !at.json {
            outln!("no damage found");
        }
        return Ok(0);
    }
    if repair {
        let count = store::repair(&store, &found)?;
        errln!(
            "moved {count} damaged items to {}; a run that needs them makes them again",
            store.root().join("quarantine").display()
        );
        // A damaged paid answer cannot be repaired, only paid for again.
        return Ok(if answers.damaged.is_empty() { 0 } else { DAMAGED });
    }
    if !at.json {
        outln!(
            "`temper verify --repair` moves damaged items to the quarantine; a run that needs them makes them again"
        );
    }
    Ok(DAMAGED)
}
