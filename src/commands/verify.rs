//! `temper verify`: rehashes the store. Repairs nothing; the next run recomputes what is found damaged.

use engine::store;
use serde_json::json;

use super::{Done, existing_store, print_json};
use crate::args::StoreAt;

/// Exit code of a store in which something is damaged: the surroundings' fault.
const DAMAGED: u8 = 3;

pub fn verify(at: &StoreAt) -> Done {
    let found = store::verify(&existing_store(at)?)?;
    if at.json {
        print_json(&json!(found));
    } else {
        say!("{} artifacts, {} files, {} bytes, {} records", found.artifacts, found.files, found.bytes, found.records);
        for broken in &found.rotten {
            say!("damaged: {} in artifact {}", broken.file, broken.artifact);
        }
        for path in found.rotten_blobs.iter().chain(&found.broken_records) {
            say!("damaged: {}", path.display());
        }
        say!(
            "{}",
            if found.is_sound() {
                "all bytes are as they should be"
            } else {
                "the next run recomputes what is damaged"
            }
        );
    }
    Ok(if found.is_sound() { 0 } else { DAMAGED })
}
