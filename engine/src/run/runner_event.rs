//! Events while an instance is executed, and how they are written to the journal.

use super::executor::AttemptEvent;
use crate::context::StageEvent;
use crate::journal::Event;
use crate::names::Key;
use crate::store::AttemptFolder;

/// What happens while an instance is executed.
pub(super) enum RunnerEvent {
    Started { key: Key, threads: usize, folder: AttemptFolder },
    Attempt(AttemptEvent),
    Warning(String),
}

impl RunnerEvent {
    pub fn for_journal(self, stage: String) -> Event {
        match self {
            Self::Started { key, threads, folder } => {
                Event::StageStarted { stage, key, threads, attempt: folder.name(), log: folder.log }
            }
            Self::Attempt(AttemptEvent::Stage(StageEvent::Progress { done, total, unit, headline })) => {
                Event::Progress { stage, done, total, unit, headline }
            }
            Self::Attempt(AttemptEvent::Stage(StageEvent::Activity { what })) => Event::Activity { stage, what },
            Self::Attempt(AttemptEvent::Stage(StageEvent::Timing { what, seconds })) => {
                Event::Timing { stage, what, seconds }
            }
            Self::Attempt(AttemptEvent::Stage(StageEvent::Checkpoint { done, total, unit })) => {
                Event::Checkpoint { stage, done, total, unit }
            }
            Self::Attempt(AttemptEvent::Stage(StageEvent::Resumed { done, total, unit })) => {
                Event::Resumed { stage, done, total, unit }
            }
            Self::Attempt(AttemptEvent::Stage(StageEvent::Paid(paid))) => Event::Paid { stage, paid },
            Self::Attempt(AttemptEvent::Job { executor, id, attached }) => {
                Event::Job { stage, executor, job: id, attached }
            }
            Self::Attempt(AttemptEvent::Stage(StageEvent::Warning { message }) | AttemptEvent::Warning(message))
            | Self::Warning(message) => Event::Warning { stage: Some(stage), message },
        }
    }
}
