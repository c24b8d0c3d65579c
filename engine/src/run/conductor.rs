//! Schedules one round of a run: answers each node that dagrs asks about, using threads that decide and threads that
//! run attempts. A single thread owns all state; the others send it messages.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender};
use std::thread::Scope;
use std::time::{Duration, Instant};

use super::child::Leash;
use super::flow::{self, Ask, Message};
use super::node::{Decided, Digests, Ended, Go, News, Ready, Work};
use super::queue::Queue;
use super::state::{Node, State, Word};
use super::{Failure, Fate, Ledger};
use crate::context::Tell;
use crate::error::{Error, Result};
use crate::journal::Event;
use crate::names::{Digest, Key};
use crate::store::KeyLock;

/// Maximum number of concurrent decisions; a decision may hash a file.
const DECIDING: usize = 4;
/// Maximum number of tries of a stage that fails with transient errors.
const TRIES: u32 = 3;
/// Minimum and maximum pause between tries to lock a key that another process holds.
const POLL: (Duration, Duration) = (Duration::from_millis(20), Duration::from_millis(500));

/// The result of a round.
#[derive(Default)]
pub(super) struct Round {
    /// Instances whose inputs were damaged, with the input's digest and the error.
    pub damaged: Vec<(usize, Digest, Error)>,
}

pub(super) struct Conductor<'scope, 'env, 'l, 'j> {
    scope: &'scope Scope<'scope, 'env>,
    work: &'env Work<'env>,
    ledger: &'l mut Ledger<'j>,
    words: Sender<Word>,
    nodes: BTreeMap<usize, Node>,
    queue: Queue,
    ranks: &'env [u64],
    undecided: VecDeque<(usize, Option<KeyLock>)>,
    deciding: usize,
    /// Number of instances whose parents have all answered but about which dagrs has not asked yet.
    awaited: usize,
    /// Instances in the states `Locked` and `Resting`.
    asleep: BTreeSet<usize>,
    digests: Digests,
    round: Round,
    flow: Option<Result<()>>,
}

impl<'scope, 'env, 'l, 'j> Conductor<'scope, 'env, 'l, 'j> {
    /// `parents`: the instances of this round, each with its inputs among them.
    pub fn new(
        scope: &'scope Scope<'scope, 'env>,
        work: &'env Work<'env>,
        ledger: &'l mut Ledger<'j>,
        ranks: &'env [u64],
        words: Sender<Word>,
        parents: &BTreeMap<usize, Vec<usize>>,
        digests: Vec<Option<Digest>>,
    ) -> Self {
        let mut children: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
        for (node, parents) in parents {
            parents.iter().for_each(|parent| children.entry(*parent).or_default().push(*node));
        }
        let nodes = parents.iter().map(|(node, parents)| {
            let children = children.remove(node).unwrap_or_default();
            let silent = parents.len();
            (*node, Node { state: State::Waiting, reply: None, silent, children, tries: 0, told_waiting: false })
        });
        Self {
            scope,
            work,
            ledger,
            words,
            nodes: nodes.collect(),
            queue: Queue::new(work.options.jobs),
            ranks,
            undecided: VecDeque::new(),
            deciding: 0,
            awaited: parents.values().filter(|parents| parents.is_empty()).count(),
            asleep: BTreeSet::new(),
            digests: Arc::new(digests),
            round: Round::default(),
            flow: None,
        }
    }

    /// Lets dagrs ask about every instance of the round, and answers. `heard` is dropped on return in every case, so
    /// that later questions get `Message::Lost` instead of blocking.
    ///
    /// # Errors
    /// When dagrs itself fails.
    pub fn conduct(mut self, heard: Receiver<Word>, parents: BTreeMap<usize, Vec<usize>>) -> Result<Round> {
        let words = self.words.clone();
        let asks = words.clone();
        let carry = move || {
            // A failed send drops the question, which the node's children receive as `Message::Lost`.
            let ask = move |ask| drop(asks.send(Word::Ask(ask)));
            drop(words.send(Word::FlowOver(flow::carry(&parents, ask))));
        };
        std::thread::Builder::new()
            .name("flow".into())
            .spawn_scoped(self.scope, carry)
            .map_err(|e| Error::surroundings(format!("cannot start a thread: {e}")))?;
        loop {
            if let Some(over) = self.flow.take() {
                over?;
                return Ok(std::mem::take(&mut self.round));
            }
            if let Some(word) = self.next_word(&heard) {
                self.hear(word);
            }
            // Process pending messages first, so that threads are shared among all instances that are ready.
            while let Ok(word) = heard.try_recv() {
                self.hear(word);
            }
            self.wake();
            if self.ledger.stopping() {
                self.stop_sleepers();
            }
            self.start_what_can_start();
        }
    }

    /// The next message, or `None` when a sleeping instance is due.
    fn next_word(&self, heard: &Receiver<Word>) -> Option<Word> {
        match self.asleep.iter().filter_map(|node| self.nodes[node].state.due()).min() {
            // The conductor holds a sender, so the channel cannot close.
            None => heard.recv().ok(),
            Some(due) => heard.recv_timeout(due.saturating_duration_since(Instant::now())).ok(),
        }
    }

    fn hear(&mut self, word: Word) {
        match word {
            Word::Ask(ask) => self.asked(ask),
            Word::Decided { node, lock, decided } => self.decided(node, lock, decided),
            Word::News { node, news } => self.news(node, news),
            Word::Ended { node, ended } => self.ended(node, ended),
            Word::Lost { node, error } => self.lost(node, error),
            Word::Interrupt => self.interrupt(),
            Word::FlowOver(result) => self.flow = Some(result),
        }
    }

    fn asked(&mut self, ask: Ask) {
        self.awaited = self.awaited.saturating_sub(1);
        let node = ask.node;
        self.node(node).reply = Some(ask.reply);
        if let Some(reason) = ask.heard.values().find_map(|m| match m {
            Message::Lost(reason) => Some(reason.clone()),
            _ => None,
        }) {
            let error = Error::ours(format!("its turn was lost: {reason}"));
            return self.fail(node, self.no_attempt(node, error));
        }
        // If several inputs failed, name the first in graph order, so that the result does not depend on timing.
        let root = ask.heard.iter().find_map(|(parent, message)| match message {
            Message::Failed => Some(*parent),
            Message::Skipped { root } => Some(*root),
            _ => None,
        });
        if let Some(root) = root {
            self.ledger.skip(node, root);
            self.answer(node, Message::Skipped { root });
        } else if ask.heard.values().any(|m| *m == Message::Cancelled) || self.ledger.stopping() {
            self.answer(node, Message::Cancelled);
        } else {
            self.decide(node, None);
        }
    }

    fn decide(&mut self, node: usize, lock: Option<KeyLock>) {
        self.node(node).state = State::Deciding;
        self.undecided.push_back((node, lock));
    }

    fn decided(&mut self, node: usize, lock: Option<KeyLock>, decided: Result<Decided>) {
        self.deciding -= 1;
        let decided = decided.and_then(|decided| {
            let key = match &decided {
                Decided::Reuse { key, .. } => *key,
                Decided::Run(ready) => ready.key,
            };
            self.ledger.twins.insert(&self.work.instance(node).name, key)?;
            Ok(decided)
        });
        match decided {
            Ok(Decided::Reuse { key, digest }) => self.reuse(node, key, digest),
            Ok(Decided::Run(_)) if self.ledger.stopping() => self.answer(node, Message::Cancelled),
            Ok(Decided::Run(ready)) => self.enqueue(node, ready, lock),
            Err(error) => self.fail(node, self.no_attempt(node, error)),
        }
    }

    fn enqueue(&mut self, node: usize, ready: Box<Ready>, lock: Option<KeyLock>) {
        self.node(node).state = State::Queued { ready, lock };
        self.queue.push(node, self.ranks[node]);
    }

    fn news(&mut self, node: usize, news: News) {
        let stage = self.work.instance(node).name.to_string();
        self.ledger.tell(match news {
            News::Started { key, threads, folder } => {
                let attempt = folder.root.file_name().unwrap_or_default().to_string_lossy().into_owned();
                Event::StageStarted { stage, key, threads, attempt, log: folder.log }
            }
            News::Told(Tell::Progress { done, total, unit, headline }) => {
                Event::Progress { stage, done, total, unit, headline }
            }
            News::Told(Tell::Timing { what, seconds }) => Event::Timing { stage, what, seconds },
            News::Told(Tell::Checkpoint { done, total, unit }) => Event::Checkpoint { stage, done, total, unit },
            News::Told(Tell::Resumed { done, total, unit }) => Event::Resumed { stage, done, total, unit },
            News::Told(Tell::Paid(paid)) => Event::Paid { stage, paid },
            News::Told(Tell::Warning { message }) | News::Warning(message) => {
                Event::Warning { stage: Some(stage), message }
            }
        });
    }

    fn ended(&mut self, node: usize, ended: Ended) {
        if let State::Running { threads, .. } = self.node(node).state {
            self.queue.release(threads);
        }
        match ended {
            Ended::Made { key, digest, seconds, peak_bytes } => {
                let stage = self.work.instance(node).name.to_string();
                self.ledger.tell(Event::StageFinished { stage, key, digest, seconds, peak_bytes });
                self.ledger.fates[node] = Some(Fate::Ran);
                self.ready(node, digest);
            }
            Ended::Reused { key, digest } => self.reuse(node, key, digest),
            Ended::Killed => self.answer(node, Message::Cancelled),
            Ended::Damaged { input, error } => {
                self.round.damaged.push((node, input, error));
                self.answer(node, Message::Cancelled);
            }
            _ if self.ledger.interrupted => self.answer(node, Message::Cancelled),
            Ended::Busy { key } => {
                self.tell_waiting(node, key);
                self.sleep(node, State::Locked { key, at: Instant::now() + POLL.0, pause: POLL.0 });
            }
            Ended::Failed { ready, lock, failure } => {
                let tries = self.node(node).tries + 1;
                self.node(node).tries = tries;
                if failure.error.transient && tries < TRIES && !self.ledger.stopping() {
                    let pause = self.work.options.retry_delay * 4u32.pow(tries - 1);
                    let stage = self.work.instance(node).name.to_string();
                    let seconds = pause.as_secs_f64();
                    self.ledger.tell(Event::Retrying { stage, error: failure.error, tries, seconds });
                    self.sleep(node, State::Resting { ready, lock, until: Instant::now() + pause });
                } else {
                    self.fail(node, failure);
                }
            }
        }
    }

    /// Reports once which process holds the key. The holder writes its name shortly after it takes the lock, so the
    /// name may not be there yet.
    fn tell_waiting(&mut self, node: usize, key: Key) {
        if !self.node(node).told_waiting
            && let Some(holder) = self.work.holder(&key)
        {
            self.node(node).told_waiting = true;
            let stage = self.work.instance(node).name.to_string();
            self.ledger.tell(Event::Waiting { stage, key, holder });
        }
    }

    fn lost(&mut self, node: usize, error: Error) {
        match &self.node(node).state {
            State::Running { threads, leash } => {
                leash.kill();
                let threads = *threads;
                self.queue.release(threads);
            }
            _ => self.deciding -= 1,
        }
        self.fail(node, self.no_attempt(node, error));
    }

    fn no_attempt(&self, node: usize, error: Error) -> Failure {
        Failure::without_log(&self.work.instance(node).name, error)
    }

    fn sleep(&mut self, node: usize, state: State) {
        self.node(node).state = state;
        self.asleep.insert(node);
    }

    fn reuse(&mut self, node: usize, key: Key, digest: Digest) {
        self.ledger.reuse(node, key, digest, true);
        self.ready(node, digest);
    }

    fn ready(&mut self, node: usize, digest: Digest) {
        // Copies the list only if another thread is reading it.
        Arc::make_mut(&mut self.digests)[node] = Some(digest);
        self.ledger.digests[node] = Some(digest);
        self.answer(node, Message::Ready(digest));
    }

    fn fail(&mut self, node: usize, failure: Failure) {
        self.ledger.fail(node, failure);
        self.answer(node, Message::Failed);
    }

    /// Sends an instance's single message; every path ends here.
    fn answer(&mut self, node: usize, message: Message) {
        let state = self.node(node);
        state.state = State::Over;
        let (reply, children) = (state.reply.take(), std::mem::take(&mut state.children));
        if let Some(reply) = reply {
            // Fails only if dagrs is gone, and then the round is over.
            let _ = reply.send(message);
        }
        for child in children {
            let child = self.node(child);
            child.silent -= 1;
            self.awaited += usize::from(child.silent == 0);
        }
    }

    fn start_what_can_start(&mut self) {
        while self.deciding < DECIDING
            && let Some((node, lock)) = self.undecided.pop_front()
        {
            self.deciding += 1;
            let (work, digests) = (self.work, self.digests.clone());
            self.spawn(node, move |_| {
                let decided = work.decide(node, &digests);
                Word::Decided { node, lock, decided }
            });
        }
        let work = self.work;
        loop {
            let others = self.awaited + self.deciding + self.undecided.len();
            let parallel = |node: usize| work.instance(node).signature.parallel;
            let Some((node, threads)) = self.queue.next(others, parallel) else { return };
            let leash = Leash::default();
            let running = State::Running { threads, leash: leash.clone() };
            let State::Queued { ready, lock } = std::mem::replace(&mut self.node(node).state, running) else {
                // Unreachable: only queued instances are in the queue.
                continue;
            };
            let (tries, digests) = (self.node(node).tries, self.digests.clone());
            let go = Go { node, ready, lock, leash, threads, tries, digests };
            self.spawn(node, move |words| {
                let mut tell = |news| drop(words.send(Word::News { node, news }));
                let ended = work.go(go, &mut tell);
                Word::Ended { node, ended }
            });
        }
    }

    /// Runs `task` on a thread and sends its result; a panic becomes `Word::Lost`.
    fn spawn(&mut self, node: usize, task: impl FnOnce(&Sender<Word>) -> Word + Send + 'scope) {
        let words = self.words.clone();
        let guarded = move || {
            let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| task(&words)));
            let word = caught.unwrap_or_else(|panic| {
                let what = crate::attempt::panic_message(&*panic);
                Word::Lost { node, error: Error::ours(format!("the orchestrator failed at it: {what}")) }
            });
            drop(words.send(word));
        };
        if let Err(e) = std::thread::Builder::new().name("stage".into()).spawn_scoped(self.scope, guarded) {
            let error = Error::surroundings(format!("cannot start a thread: {e}"));
            drop(self.words.send(Word::Lost { node, error }));
        }
    }

    /// Retries the locks of `Locked` instances and requeues `Resting` ones, if they are due.
    fn wake(&mut self) {
        let now = Instant::now();
        let due = |node: &usize| self.nodes[node].state.due().is_some_and(|due| due <= now);
        let due: Vec<usize> = self.asleep.iter().copied().filter(due).collect();
        for node in due {
            self.asleep.remove(&node);
            match std::mem::replace(&mut self.node(node).state, State::Over) {
                State::Resting { ready, lock, .. } => self.enqueue(node, ready, lock),
                State::Locked { key, pause, .. } => match self.work.store.try_lock(&key) {
                    Ok(None) => {
                        self.tell_waiting(node, key);
                        let pause = (pause * 2).min(POLL.1);
                        self.sleep(node, State::Locked { key, at: now + pause, pause });
                    }
                    Ok(lock) => self.decide(node, lock),
                    Err(error) => self.fail(node, self.no_attempt(node, error)),
                },
                other => self.node(node).state = other,
            }
        }
    }

    /// Ctrl-C: kills all attempts; nothing new starts.
    fn interrupt(&mut self) {
        self.ledger.interrupted = true;
        self.kill_all();
    }

    fn kill_all(&self) {
        for node in self.nodes.values() {
            if let State::Running { leash, .. } = &node.state {
                leash.kill();
            }
        }
    }

    /// Cancels every instance that waits for slots, a lock or its next try.
    fn stop_sleepers(&mut self) {
        let mut sleepers = self.queue.drain();
        sleepers.extend(std::mem::take(&mut self.asleep));
        for node in sleepers {
            self.answer(node, Message::Cancelled);
        }
    }

    fn node(&mut self, node: usize) -> &mut Node {
        // dagrs asks only about the nodes of this round.
        self.nodes.get_mut(&node).expect("an instance of this round")
    }
}

impl Drop for Conductor<'_, '_, '_, '_> {
    /// Without the conductor, no thread would receive the attempts' events.
    fn drop(&mut self) {
        self.kill_all();
    }
}
