//! Schedules one round of a run: answers each node that dagrs asks about, using threads that decide and threads that
//! run attempts. A single thread owns all state; the others send it messages.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender};
use std::thread::Scope;
use std::time::{Duration, Instant};

use super::executor::{CHECKPOINT_PERIOD, KillHandle};
use super::flow::{self, NodeMessage, NodeQuery};
use super::gpu_locks::{self, GpuLock};
use super::interrupt::Interruption;
use super::node_runner::{AttemptOutcome, AttemptRequest, Digests, NodeDecision, NodeRunner, ReadyNode};
use super::node_state::{NodeState, ScheduledNode, SchedulerEvent};
use super::queue::{Amounts, SlotQueue, Start};
use super::runner_event::RunnerEvent;
use super::{Failure, InstanceResult, RunState, fit};
use crate::error::{Error, Result};
use crate::journal::Event;
use crate::names::{Digest, Key};
use crate::store::KeyLock;

/// Maximum number of concurrent decisions; a decision may hash a file.
const MAX_DECISIONS: usize = 4;
/// Minimum and maximum pause between tries to lock a key that another process holds.
const LOCK_POLL: (Duration, Duration) = (Duration::from_millis(20), Duration::from_millis(500));

/// Pause between tries to lock a GPU that another process holds.
const GPU_POLL: Duration = Duration::from_millis(500);

/// The result of a round.
#[derive(Default)]
pub(super) struct RoundResult {
    /// Instances whose inputs were damaged, with the input's digest and the error.
    pub damaged: Vec<(usize, Digest, Error)>,
}

pub(super) struct Scheduler<'scope, 'env, 'state, 'journal> {
    scope: &'scope Scope<'scope, 'env>,
    runner: &'env NodeRunner<'env>,
    run_state: &'state mut RunState<'journal>,
    events: Sender<SchedulerEvent>,
    nodes: BTreeMap<usize, ScheduledNode>,
    /// For what the attempts on this machine share.
    queue: SlotQueue,
    /// When to try again to lock GPUs that other processes held.
    gpu_poll: Instant,
    /// Jobs of batch systems, by executor.
    job_queues: BTreeMap<&'env str, SlotQueue>,
    ranks: &'env [u64],
    undecided: VecDeque<(usize, Option<KeyLock>)>,
    deciding: usize,
    /// Number of instances whose parents have all answered but about which dagrs has not asked yet.
    expected_queries: usize,
    /// Instances in the states `Locked` and `Backoff`.
    sleeping: BTreeSet<usize>,
    digests: Digests,
    round: RoundResult,
    flow_result: Option<Result<()>>,
}

impl<'scope, 'env, 'state, 'journal> Scheduler<'scope, 'env, 'state, 'journal> {
    /// `parents`: the instances of this round, each with its inputs among them.
    pub fn new(
        scope: &'scope Scope<'scope, 'env>,
        runner: &'env NodeRunner<'env>,
        run_state: &'state mut RunState<'journal>,
        ranks: &'env [u64],
        events: Sender<SchedulerEvent>,
        parents: &BTreeMap<usize, Vec<usize>>,
        digests: Vec<Option<Digest>>,
    ) -> Self {
        let mut children: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
        for (node, parents) in parents {
            parents.iter().for_each(|parent| children.entry(*parent).or_default().push(*node));
        }
        let nodes = parents.iter().map(|(node, parents)| {
            let children = children.remove(node).unwrap_or_default();
            let unanswered_parents = parents.len();
            (
                *node,
                ScheduledNode {
                    state: NodeState::Waiting,
                    reply: None,
                    unanswered_parents,
                    children,
                    tries: 0,
                    reported_waiting: false,
                },
            )
        });
        Self {
            scope,
            runner,
            run_state,
            events,
            nodes: nodes.collect(),
            queue: SlotQueue::new(runner.options.jobs, fit::limits(runner.options, &runner.graph.pools)),
            gpu_poll: Instant::now(),
            job_queues: BTreeMap::new(),
            ranks,
            undecided: VecDeque::new(),
            deciding: 0,
            expected_queries: parents.values().filter(|parents| parents.is_empty()).count(),
            sleeping: BTreeSet::new(),
            digests: Arc::new(digests),
            round: RoundResult::default(),
            flow_result: None,
        }
    }

    /// Lets dagrs ask about every instance of the round, and answers. `inbox` is dropped on return in every case, so
    /// that later queries get `NodeMessage::Lost` instead of blocking.
    ///
    /// # Errors
    /// When dagrs itself fails.
    pub fn run(mut self, inbox: Receiver<SchedulerEvent>, parents: BTreeMap<usize, Vec<usize>>) -> Result<RoundResult> {
        let events = self.events.clone();
        let queries = events.clone();
        let run_flow = move || {
            // A failed send drops the query, which the node's children receive as `NodeMessage::Lost`.
            let on_query = move |query| drop(queries.send(SchedulerEvent::Query(query)));
            drop(events.send(SchedulerEvent::FlowEnded(flow::carry_messages(&parents, on_query))));
        };
        std::thread::Builder::new()
            .name("flow".into())
            .spawn_scoped(self.scope, run_flow)
            .map_err(|e| Error::environment(format!("cannot start a thread: {e}")))?;
        loop {
            if let Some(result) = self.flow_result.take() {
                result?;
                return Ok(std::mem::take(&mut self.round));
            }
            if let Some(event) = self.next_event(&inbox) {
                self.handle(event);
            }
            // Process pending messages first, so that threads are shared among all instances that are ready.
            while let Ok(event) = inbox.try_recv() {
                self.handle(event);
            }
            self.wake();
            if self.run_state.stopping() {
                self.cancel_waiting();
            }
            if self.gpu_poll <= Instant::now() {
                self.queue.retry_gpus();
                self.gpu_poll = Instant::now() + GPU_POLL;
            }
            self.start_ready();
            self.report_waiting_for_gpus();
        }
    }

    /// The next message, or `None` when a sleeping instance is due or GPUs should be tried again.
    fn next_event(&self, inbox: &Receiver<SchedulerEvent>) -> Option<SchedulerEvent> {
        let retry_gpus = (!self.queue.waiting_for_gpus().is_empty()).then_some(self.gpu_poll);
        match self.sleeping.iter().filter_map(|node| self.nodes[node].state.due()).chain(retry_gpus).min() {
            // The scheduler holds a sender, so the channel cannot close.
            None => inbox.recv().ok(),
            Some(due) => inbox.recv_timeout(due.saturating_duration_since(Instant::now())).ok(),
        }
    }

    fn handle(&mut self, event: SchedulerEvent) {
        match event {
            SchedulerEvent::Query(query) => self.on_query(query),
            SchedulerEvent::Decided { node, lock, decided } => self.on_decided(node, lock, decided),
            SchedulerEvent::Runner { node, event } => self.on_runner_event(node, event),
            SchedulerEvent::AttemptEnded { node, outcome } => self.on_attempt_ended(node, outcome),
            SchedulerEvent::ThreadFailed { node, error } => self.on_thread_failed(node, error),
            SchedulerEvent::Interrupt(interruption) => self.on_interrupt(interruption),
            SchedulerEvent::FlowEnded(result) => self.flow_result = Some(result),
        }
    }

    fn on_query(&mut self, query: NodeQuery) {
        self.expected_queries = self.expected_queries.saturating_sub(1);
        let node = query.node;
        self.node(node).reply = Some(query.reply);
        if let Some(reason) = query.parent_messages.values().find_map(|m| match m {
            NodeMessage::Lost(reason) => Some(reason.clone()),
            _ => None,
        }) {
            let error = Error::internal(format!("the scheduler lost it: {reason}"));
            return self.fail(node, self.without_attempt(node, error));
        }
        // If several inputs failed, name the first in graph order, so that the result does not depend on timing.
        let root = query.parent_messages.iter().find_map(|(parent, message)| match message {
            NodeMessage::Failed => Some(*parent),
            NodeMessage::Skipped { root } => Some(*root),
            _ => None,
        });
        if let Some(root) = root {
            self.run_state.skip(node, root);
            self.finish(node, NodeMessage::Skipped { root });
        } else if query.parent_messages.values().any(|m| *m == NodeMessage::Cancelled) || self.run_state.stopping() {
            self.finish(node, NodeMessage::Cancelled);
        } else {
            self.decide(node, None);
        }
    }

    fn decide(&mut self, node: usize, lock: Option<KeyLock>) {
        self.node(node).state = NodeState::Deciding;
        self.undecided.push_back((node, lock));
    }

    fn on_decided(&mut self, node: usize, lock: Option<KeyLock>, decided: Result<NodeDecision>) {
        self.deciding -= 1;
        let decided = decided.and_then(|decided| {
            let key = match &decided {
                NodeDecision::Reuse { key, .. } => *key,
                NodeDecision::Run(ready) => ready.key,
            };
            self.run_state.duplicates.insert(&self.runner.instance(node).name, key)?;
            Ok(decided)
        });
        match decided {
            Ok(NodeDecision::Reuse { key, digest }) => self.reuse(node, key, digest),
            Ok(NodeDecision::Run(_)) if self.run_state.stopping() => self.finish(node, NodeMessage::Cancelled),
            Ok(NodeDecision::Run(ready)) => self.enqueue(node, ready, lock),
            Err(error) => self.fail(node, self.without_attempt(node, error)),
        }
    }

    fn enqueue(&mut self, node: usize, ready: Box<ReadyNode>, lock: Option<KeyLock>) {
        self.node(node).state = NodeState::Queued { ready, lock };
        let (rank, demand) = (self.ranks[node], self.runner.demand(node));
        self.queue_of(node).push(node, rank, demand);
    }

    /// The queue for the slots that an instance needs.
    fn queue_of(&mut self, node: usize) -> &mut SlotQueue {
        let runner = self.runner;
        match runner.placement(node) {
            None => &mut self.queue,
            Some((executor, _)) => self.job_queues.entry(executor).or_insert_with(|| {
                let max_jobs = runner.executors.batch(executor).map_or(1, |batch| batch.settings().max_jobs);
                SlotQueue::new(max_jobs, Amounts::new())
            }),
        }
    }

    fn on_runner_event(&mut self, node: usize, event: RunnerEvent) {
        let stage = self.runner.instance(node).name.to_string();
        self.run_state.emit(event.for_journal(stage));
    }

    fn on_attempt_ended(&mut self, node: usize, outcome: AttemptOutcome) {
        self.queue_of(node).release(node);
        match outcome {
            AttemptOutcome::Made { key, digest, seconds, peak_bytes } => {
                let stage = self.runner.instance(node).name.to_string();
                self.run_state.emit(Event::StageFinished { stage, key, digest, seconds, peak_bytes });
                self.run_state.results[node] = Some(InstanceResult::Ran);
                self.publish(node, digest);
            }
            AttemptOutcome::Reused { key, digest } => self.reuse(node, key, digest),
            AttemptOutcome::Killed | AttemptOutcome::Left => self.finish(node, NodeMessage::Cancelled),
            AttemptOutcome::InputDamaged { input, error } => {
                self.round.damaged.push((node, input, error));
                self.finish(node, NodeMessage::Cancelled);
            }
            _ if self.run_state.interrupted => self.finish(node, NodeMessage::Cancelled),
            AttemptOutcome::Busy { key } => {
                self.report_waiting(node, key);
                self.sleep(node, NodeState::Locked { key, at: Instant::now() + LOCK_POLL.0, pause: LOCK_POLL.0 });
            }
            AttemptOutcome::Failed { ready, lock, failure } => {
                let tries = self.node(node).tries + 1;
                self.node(node).tries = tries;
                let pause = self.runner.retry_pause(node, &failure.error, tries);
                if let Some(pause) = pause.filter(|_| !self.run_state.stopping()) {
                    let stage = self.runner.instance(node).name.to_string();
                    let seconds = pause.as_secs_f64();
                    self.run_state.emit(Event::Retrying { stage, error: failure.error, tries, seconds });
                    self.sleep(node, NodeState::Backoff { ready, lock, until: Instant::now() + pause });
                } else {
                    self.fail(node, failure);
                }
            }
        }
    }

    /// Reports once that an instance waits for GPUs which other processes hold.
    fn report_waiting_for_gpus(&mut self) {
        for node in self.queue.waiting_for_gpus() {
            if !std::mem::replace(&mut self.node(node).reported_waiting, true)
                && let NodeState::Queued { ready, .. } = &self.nodes[&node].state
            {
                let (stage, key) = (self.runner.instance(node).name.to_string(), ready.key);
                let holder = "a GPU, which other runs on this machine hold".to_owned();
                self.run_state.emit(Event::Waiting { stage, key, holder });
            }
        }
    }

    /// Reports once which process holds the key. The holder writes its name shortly after it takes the lock, so the
    /// name may not be there yet.
    fn report_waiting(&mut self, node: usize, key: Key) {
        if !self.node(node).reported_waiting
            && let Some(holder) = self.runner.holder(&key)
        {
            self.node(node).reported_waiting = true;
            let stage = self.runner.instance(node).name.to_string();
            self.run_state.emit(Event::Waiting { stage, key, holder });
        }
    }

    fn on_thread_failed(&mut self, node: usize, error: Error) {
        match &self.node(node).state {
            NodeState::Running { kill_handle } => {
                kill_handle.kill(Interruption::Cancel);
                self.queue_of(node).release(node);
            }
            _ => self.deciding -= 1,
        }
        self.fail(node, self.without_attempt(node, error));
    }

    fn without_attempt(&self, node: usize, error: Error) -> Failure {
        Failure::without_log(&self.runner.instance(node).name, error)
    }

    fn sleep(&mut self, node: usize, state: NodeState) {
        self.node(node).state = state;
        self.sleeping.insert(node);
    }

    fn reuse(&mut self, node: usize, key: Key, digest: Digest) {
        self.run_state.reuse(node, key, digest, true);
        self.publish(node, digest);
    }

    fn publish(&mut self, node: usize, digest: Digest) {
        // Copies the list only if another thread is reading it.
        Arc::make_mut(&mut self.digests)[node] = Some(digest);
        self.run_state.digests[node] = Some(digest);
        self.finish(node, NodeMessage::Available(digest));
    }

    fn fail(&mut self, node: usize, failure: Failure) {
        self.run_state.fail(node, failure);
        self.finish(node, NodeMessage::Failed);
    }

    /// Sends an instance's single message; every path ends here.
    fn finish(&mut self, node: usize, message: NodeMessage) {
        let state = self.node(node);
        state.state = NodeState::Done;
        let (reply, children) = (state.reply.take(), std::mem::take(&mut state.children));
        if let Some(reply) = reply {
            // Fails only if dagrs is gone, and then the round is over.
            let _ = reply.send(message);
        }
        for child in children {
            let child = self.node(child);
            child.unanswered_parents -= 1;
            self.expected_queries += usize::from(child.unanswered_parents == 0);
        }
    }

    fn start_ready(&mut self) {
        while self.deciding < MAX_DECISIONS
            && let Some((node, lock)) = self.undecided.pop_front()
        {
            self.deciding += 1;
            let (runner, digests) = (self.runner, self.digests.clone());
            self.spawn(node, move |_| {
                let decided = runner.decide(node, &digests);
                SchedulerEvent::Decided { node, lock, decided }
            });
        }
        let others = self.expected_queries + self.deciding + self.undecided.len();
        loop {
            self.rebalance(others);
            let Some((Start { node, threads }, gpus)) = self.next_ready(others) else { return };
            let runner = self.runner;
            let kill_handle = KillHandle::default();
            let running = NodeState::Running { kill_handle: kill_handle.clone() };
            let NodeState::Queued { ready, lock } = std::mem::replace(&mut self.node(node).state, running) else {
                // Unreachable: only queued instances are in the queue.
                continue;
            };
            let gpus = match gpus {
                Ok(gpus) => gpus,
                Err(error) => {
                    self.queue.release(node);
                    self.fail(node, self.without_attempt(node, error));
                    continue;
                }
            };
            let (tries, digests) = (self.node(node).tries, self.digests.clone());
            let request = AttemptRequest { node, ready, lock, kill_handle, threads, gpus, tries, digests };
            self.spawn(node, move |events| {
                let mut emit = |event| drop(events.send(SchedulerEvent::Runner { node, event }));
                let outcome = runner.execute(request, &mut emit);
                SchedulerEvent::AttemptEnded { node, outcome }
            });
        }
    }

    /// Moves threads between the running attempts of this machine, so that none stays idle or is held back from a waiting instance.
    fn rebalance(&mut self, others: usize) {
        for (node, threads) in self.queue.rebalance(others) {
            if let NodeState::Running { kill_handle } = &self.node(node).state {
                kill_handle.set_threads(threads);
            }
        }
    }

    /// The next instance to start, with its shares taken and its GPUs. `others` are about to wait.
    fn next_ready(&mut self, others: usize) -> Option<(Start, Result<Vec<GpuLock>>)> {
        let runner = self.runner;
        let mut gpus = Ok(Vec::new());
        let mut claim = |n: u64| {
            gpus = gpu_locks::lock(&runner.options.machine.gpus, n as usize).transpose().unwrap_or(Ok(Vec::new()));
            gpus.as_ref().map_or(true, |gpus| !gpus.is_empty())
        };
        if let Some(start) = self.queue.next(others, &mut claim) {
            return Some((start, gpus));
        }
        let Start { node, .. } = self.job_queues.values_mut().find_map(|queue| queue.next(0, &mut |_| true))?;
        let threads = runner.placement(node).map_or(1, |(_, threads)| threads);
        Some((Start { node, threads }, Ok(Vec::new())))
    }

    /// Runs `task` on a thread and sends its result; a panic becomes `SchedulerEvent::ThreadFailed`.
    fn spawn(&mut self, node: usize, task: impl FnOnce(&Sender<SchedulerEvent>) -> SchedulerEvent + Send + 'scope) {
        let events = self.events.clone();
        let guarded = move || {
            let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| task(&events)));
            let event = caught.unwrap_or_else(|panic| {
                let what = crate::attempt::panic_message(&*panic);
                SchedulerEvent::ThreadFailed {
                    node,
                    error: Error::internal(format!("the orchestrator panicked: {what}")),
                }
            });
            drop(events.send(event));
        };
        if let Err(e) = std::thread::Builder::new().name("stage".into()).spawn_scoped(self.scope, guarded) {
            let error = Error::environment(format!("cannot start a thread: {e}"));
            drop(self.events.send(SchedulerEvent::ThreadFailed { node, error }));
        }
    }

    /// Retries the locks of `Locked` instances and requeues those in `Backoff`, if they are due.
    fn wake(&mut self) {
        let now = Instant::now();
        let due = |node: &usize| self.nodes[node].state.due().is_some_and(|due| due <= now);
        let due: Vec<usize> = self.sleeping.iter().copied().filter(due).collect();
        for node in due {
            self.sleeping.remove(&node);
            match std::mem::replace(&mut self.node(node).state, NodeState::Done) {
                NodeState::Backoff { ready, lock, .. } => self.enqueue(node, ready, lock),
                NodeState::Locked { key, pause, .. } => match self.runner.store.try_lock(&key) {
                    Ok(None) => {
                        self.report_waiting(node, key);
                        let pause = (pause * 2).min(LOCK_POLL.1);
                        self.sleep(node, NodeState::Locked { key, at: now + pause, pause });
                    }
                    Ok(lock) => self.decide(node, lock),
                    Err(error) => self.fail(node, self.without_attempt(node, error)),
                },
                other => self.node(node).state = other,
            }
        }
    }

    /// Ends all attempts, or leaves the jobs among them; nothing new starts.
    fn on_interrupt(&mut self, interruption: Interruption) {
        self.run_state.interrupted = true;
        let stops = |node: &ScheduledNode| match &node.state {
            NodeState::Running { kill_handle } => kill_handle.stop(interruption),
            _ => false,
        };
        let stopping = self.nodes.values().filter(|node| stops(node)).count();
        if stopping > 0 {
            let seconds = CHECKPOINT_PERIOD.as_secs();
            let message = format!(
                "interrupted: running stages may write a checkpoint first, for at most {seconds} s; interrupt again to end them at once"
            );
            self.run_state.emit(Event::Warning { stage: None, message });
        }
    }

    fn kill_all(&self, interruption: Interruption) {
        for node in self.nodes.values() {
            if let NodeState::Running { kill_handle, .. } = &node.state {
                kill_handle.kill(interruption);
            }
        }
    }

    /// Cancels every instance that waits for slots, a lock or its next try.
    fn cancel_waiting(&mut self) {
        let mut waiting = self.queue.drain();
        waiting.extend(self.job_queues.values_mut().flat_map(SlotQueue::drain));
        waiting.extend(std::mem::take(&mut self.sleeping));
        for node in waiting {
            self.finish(node, NodeMessage::Cancelled);
        }
    }

    fn node(&mut self, node: usize) -> &mut ScheduledNode {
        // dagrs asks only about the nodes of this round.
        self.nodes.get_mut(&node).expect("an instance of this round")
    }
}

impl Drop for Scheduler<'_, '_, '_, '_> {
    /// Without the scheduler, no thread would receive the attempts' events.
    fn drop(&mut self) {
        self.kill_all(Interruption::Leave);
    }
}
