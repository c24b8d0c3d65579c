//! The states of the instances of a round, and the messages that change them.

use std::time::{Duration, Instant};

use tokio::sync::oneshot;

use super::child::Leash;
use super::flow::{Ask, Message};
use super::node::{Decided, Ended, News, Ready};
use crate::error::{Error, Result};
use crate::names::Key;
use crate::store::KeyLock;

/// A message to the conductor.
pub(super) enum Word {
    Ask(Ask),
    Decided {
        node: usize,
        lock: Option<KeyLock>,
        decided: Result<Decided>,
    },
    News {
        node: usize,
        news: News,
    },
    Ended {
        node: usize,
        ended: Ended,
    },
    /// A thread of this orchestrator panicked or could not start.
    Lost {
        node: usize,
        error: Error,
    },
    Interrupt,
    FlowOver(Result<()>),
}

/// The state of an instance in this round, with the data that the state needs.
pub(super) enum State {
    /// Its inputs are being made.
    Waiting,
    /// Its inputs are known; a thread looks for its record, or soon will.
    Deciding,
    /// It must run and waits for slots.
    Queued {
        ready: Box<Ready>,
        lock: Option<KeyLock>,
    },
    /// Another process holds its key; the lock is tried again at `at`.
    Locked {
        key: Key,
        at: Instant,
        pause: Duration,
    },
    /// Its last try failed; the next one starts at `until`.
    Resting {
        ready: Box<Ready>,
        lock: Option<KeyLock>,
        until: Instant,
    },
    Running {
        threads: usize,
        leash: Leash,
    },
    /// It has sent its message.
    Over,
}

impl State {
    pub fn due(&self) -> Option<Instant> {
        match self {
            Self::Locked { at, .. } => Some(*at),
            Self::Resting { until, .. } => Some(*until),
            _ => None,
        }
    }
}

pub(super) struct Node {
    pub state: State,
    pub reply: Option<oneshot::Sender<Message>>,
    /// Number of parents in this round that have not answered.
    pub silent: usize,
    pub children: Vec<usize>,
    pub tries: u32,
    pub told_waiting: bool,
}
