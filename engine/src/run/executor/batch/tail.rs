//! Reads the events of an attempt from its file, from the beginning and as they come.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use crate::attempt::detached::EVENTS;
use crate::context::StageEvent;
use crate::run::executor::AttemptEvent;
use crate::run::redact::Secrets;

pub(super) struct EventTail {
    path: PathBuf,
    /// Number of bytes read.
    at: u64,
    /// The beginning of a line whose end has not been written.
    partial: Vec<u8>,
}

impl EventTail {
    pub fn new(folder: &Path) -> Self {
        Self { path: folder.join(EVENTS), at: 0, partial: Vec::new() }
    }

    /// Passes on the events written since the last call. A file that cannot be read has no news.
    pub fn pass_on(&mut self, secrets: &Secrets, on_event: &mut dyn FnMut(AttemptEvent)) {
        // Opened each time: network file systems show what others have written at opening.
        let read = || -> std::io::Result<Vec<u8>> {
            let mut file = File::open(&self.path)?;
            file.seek(SeekFrom::Start(self.at))?;
            let mut bytes = Vec::new();
            file.read_to_end(&mut bytes)?;
            Ok(bytes)
        };
        let Ok(bytes) = read() else { return };
        self.at += bytes.len() as u64;
        self.partial.extend(bytes);
        let Some(end) = self.partial.iter().rposition(|byte| *byte == b'\n') else { return };
        for line in self.partial.drain(..=end).collect::<Vec<u8>>().split(|byte| *byte == b'\n') {
            // A line may be cut short by the end of an earlier start of the job.
            if let Ok(event) = serde_json::from_slice::<StageEvent>(line) {
                on_event(AttemptEvent::Stage(secrets.redact_event(event)));
            }
        }
    }
}
