//! The states of the instances of a round, and the messages that change them.

use std::time::{Duration, Instant};

use tokio::sync::oneshot;

use super::executor::KillHandle;
use super::flow::{NodeMessage, NodeQuery};
use super::interrupt::Interruption;
use super::node_runner::{AttemptOutcome, NodeDecision, ReadyNode};
use super::runner_event::RunnerEvent;
use crate::error::{Error, Result};
use crate::names::Key;
use crate::store::KeyLock;

/// A message to the scheduler.
pub(super) enum SchedulerEvent {
    Query(NodeQuery),
    Decided {
        node: usize,
        lock: Option<KeyLock>,
        decided: Result<NodeDecision>,
    },
    Runner {
        node: usize,
        event: RunnerEvent,
    },
    AttemptEnded {
        node: usize,
        outcome: AttemptOutcome,
    },
    /// A thread of this orchestrator panicked or could not start.
    ThreadFailed {
        node: usize,
        error: Error,
    },
    Interrupt(Interruption),
    FlowEnded(Result<()>),
}

/// The state of an instance in this round, with the data that the state needs.
pub(super) enum NodeState {
    /// Its inputs are being made.
    Waiting,
    /// Its inputs are known; a thread looks for its record, or soon will.
    Deciding,
    /// It must run and waits for slots.
    Queued {
        ready: Box<ReadyNode>,
        lock: Option<KeyLock>,
    },
    /// Another process holds its key; the lock is tried again at `at`.
    Locked {
        key: Key,
        at: Instant,
        pause: Duration,
    },
    /// Its last try failed; the next one starts at `until`.
    Backoff {
        ready: Box<ReadyNode>,
        lock: Option<KeyLock>,
        until: Instant,
    },
    Running {
        kill_handle: KillHandle,
    },
    /// It has sent its message.
    Done,
}

impl NodeState {
    pub fn due(&self) -> Option<Instant> {
        match self {
            Self::Locked { at, .. } => Some(*at),
            Self::Backoff { until, .. } => Some(*until),
            _ => None,
        }
    }
}

pub(super) struct ScheduledNode {
    pub state: NodeState,
    pub reply: Option<oneshot::Sender<NodeMessage>>,
    /// Number of parents in this round that have not answered.
    pub unanswered_parents: usize,
    pub children: Vec<usize>,
    pub tries: u32,
    pub reported_waiting: bool,
}
