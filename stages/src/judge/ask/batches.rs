//! Asks by Message Batches: sends all queued requests at once, and stores the results in groups.

use std::cell::RefCell;
use std::collections::{HashMap, HashSet};
use std::path::Path;

use engine::context::Context;
use engine::error::{Error, Result};
use tokio::sync::mpsc::UnboundedReceiver;

use super::POLL;
use super::gate::Reservation;
use super::queue::{Ready, WorkQueue, keys};
use crate::judge::answer_log::AnswerLog;
use crate::judge::batch::{BatchConfig, BatchEvent, Batches, Request, RequestOutcome};
use crate::judge::client::Client;
use crate::judge::document::AnswerKey;
use crate::judge::spool::Group;

/// Answers stored durably together; until then the API still has them.
const FLUSH_AT: usize = 256;
/// Number of consecutive rounds in which unanswered requests are sent again.
const MAX_UNANSWERED_ROUNDS: u32 = 3;
/// Subfolder beside the answers for the same settings.
const FOLDER: &str = "batches";

/// Whether batches of earlier attempts may still bring answers for these settings.
pub fn are_open(log: &AnswerLog) -> bool {
    Batches::are_open(&log.folder().join(FOLDER))
}

/// State shared by the request iterator and the result handler; only one of them uses it at a time.
struct BatchRound<'a, 'b> {
    queue: &'a mut WorkQueue<'b>,
    ctx: &'a mut Context,
    /// Requests of this attempt in progress, by the first key of each.
    under_way: HashMap<AnswerKey, (Group, Reservation)>,
    /// Why requests of this round were not answered.
    unanswered: Option<String>,
    /// Number of consecutive rounds with unanswered requests.
    unlucky: u32,
    canceled: u64,
}

impl BatchRound<'_, '_> {
    /// The next request within the budget; the rest waits until the cost of this batch is known.
    fn next(&mut self) -> Result<Option<Request>> {
        let Some((Ready { group, body }, sent)) = self.queue.take()? else { return Ok(None) };
        let ticket = keys(&group);
        self.under_way.insert(ticket[0], (group, sent));
        Ok(Some(Request { ticket, body }))
    }

    fn handle(&mut self, event: BatchEvent<'_>) -> Result<()> {
        match event {
            BatchEvent::Done { ticket, outcome } => {
                match &outcome {
                    RequestOutcome::Unanswered(why) | RequestOutcome::Lost(why) => {
                        self.unanswered.get_or_insert_with(|| why.clone());
                    }
                    RequestOutcome::Canceled => self.canceled += 1,
                    RequestOutcome::Answer(_) | RequestOutcome::Refused(_) => {}
                }
                let ours = ticket.first().and_then(|key| self.under_way.remove(key));
                self.queue.record(ticket.to_vec(), ours, outcome)?;
                if self.queue.unsaved() >= FLUSH_AT {
                    self.queue.flush(self.ctx)?;
                }
            }
            BatchEvent::Whole => self.queue.flush(self.ctx)?,
            BatchEvent::Waiting { left } => {
                self.queue.progress(self.ctx, Some(("requests of a batch left", left as f64)));
            }
            BatchEvent::Note(note) => self.ctx.warn(format!("{}: {note}", self.queue.kind())),
        }
        Ok(())
    }

    /// Puts requests that were not sent back into the queue.
    fn all_back(&mut self) -> Result<()> {
        for (_, (group, sent)) in self.under_way.drain() {
            self.queue.gate.unpaid(sent)?;
            self.queue.give_back(group)?;
        }
        Ok(())
    }

    /// Whether there is more to ask after a round.
    fn more(&mut self) -> Result<bool> {
        if let Some(error) = self.queue.stop.take() {
            return Err(error);
        }
        if self.canceled > 0 {
            let message = format!("a batch was canceled: {} of its requests have no answer", self.canceled);
            return Err(Error::environment(message).help("the answers so far are kept; run again to ask the others"));
        }
        let unanswered = self.unanswered.take();
        self.unlucky = if unanswered.is_some() { self.unlucky + 1 } else { 0 };
        if let Some(why) = unanswered.filter(|_| self.unlucky >= MAX_UNANSWERED_ROUNDS) {
            let message = format!("{why}: requests were sent {MAX_UNANSWERED_ROUNDS} times and not answered");
            return Err(Error::environment(message).help("the answers so far are kept; run again later"));
        }
        Ok(self.queue.judge_faulty()? || self.queue.has_more())
    }
}

/// Sends all queued requests as batches, in rounds, until none is left.
pub async fn in_batches(
    queue: &mut WorkQueue<'_>,
    client: &Client,
    waits: &mut UnboundedReceiver<String>,
    ctx: &mut Context,
) -> Result<()> {
    with_round(queue, client, waits, ctx, async |batches, round, wanted| {
        let wanted = |key: AnswerKey| wanted.contains(&key);
        loop {
            {
                let mut requests = std::iter::from_fn(|| round.borrow_mut().next().transpose());
                let mut event = |event: BatchEvent<'_>| round.borrow_mut().handle(event);
                if !batches.send(&wanted, &mut requests, &mut event).await? {
                    round.borrow_mut().all_back()?;
                    batches.settle_open(&wanted, &mut event).await?;
                }
            }
            if !round.borrow_mut().more()? {
                return Ok(());
            }
            if round.borrow().queue.only_elsewhere() {
                tokio::time::sleep(POLL).await;
            }
            round.borrow_mut().queue.look_again();
        }
    })
    .await
}

/// Waits for batches that earlier attempts sent.
pub async fn settle(
    queue: &mut WorkQueue<'_>,
    client: &Client,
    waits: &mut UnboundedReceiver<String>,
    ctx: &mut Context,
) -> Result<()> {
    with_round(queue, client, waits, ctx, async |batches, round, wanted| {
        let mut event = |event: BatchEvent<'_>| round.borrow_mut().handle(event);
        batches.settle_open(&|key| wanted.contains(&key), &mut event).await.map(drop)
    })
    .await
}

/// Runs `work` and reports the client's waits meanwhile.
async fn with_round<'a, 'b>(
    queue: &'a mut WorkQueue<'b>,
    client: &Client,
    waits: &mut UnboundedReceiver<String>,
    ctx: &'a mut Context,
    work: impl AsyncFnOnce(&Batches<'_>, &RefCell<BatchRound<'a, 'b>>, &HashSet<AnswerKey>) -> Result<()>,
) -> Result<()> {
    let folder = queue.folder().join(Path::new(FOLDER));
    let batches = Batches::open(client, &folder, BatchConfig::of_environment()?)?;
    let wanted = queue.wanted();
    let round =
        RefCell::new(BatchRound { queue, ctx, under_way: HashMap::new(), unanswered: None, unlucky: 0, canceled: 0 });
    let done = {
        let mut work = std::pin::pin!(work(&batches, &round, &wanted));
        loop {
            tokio::select! {
                biased;
                Some(wait) = waits.recv() => {
                    let BatchRound { queue, ctx, .. } = &mut *round.borrow_mut();
                    ctx.warn(format!("{}: {wait}", queue.kind()));
                },
                done = &mut work => break done,
            }
        }
    };
    // Answers received before a failure are paid for, so they are stored.
    let BatchRound { queue, ctx, .. } = round.into_inner();
    done.and(queue.flush(ctx))
}
