//! Asks by Message Batches: sends all queued requests at once, and stores the results in groups.

use std::cell::RefCell;
use std::collections::{HashMap, HashSet};
use std::path::Path;

use engine::context::Context;
use engine::error::{Blame, Error, Result};
use tokio::sync::mpsc::UnboundedReceiver;

use super::POLL;
use super::desk::{Desk, Ready};
use super::till::{Admitted, Sent};
use crate::claude::batch::{Batches, Landed, Manners, News, Request};
use crate::claude::cache::{self, Cache, What};
use crate::claude::client::Client;
use crate::claude::document::AnswerKey;
use crate::claude::spool::Group;

/// Answers stored durably together; until then the API still has them.
const HANDFUL: usize = 256;
/// Number of consecutive rounds in which unanswered requests are sent again.
const PATIENCE: u32 = 3;
/// Subfolder beside the answers for the same settings.
const FOLDER: &str = "batches";

/// Whether batches of earlier attempts may still bring answers for these settings.
pub fn are_open(cache: &Cache) -> bool {
    Batches::are_open(&cache.folder().join(FOLDER))
}

/// State shared by the request iterator and the result handler; only one of them uses it at a time.
struct Counter<'a, 'b> {
    desk: &'a mut Desk<'b>,
    ctx: &'a mut Context,
    /// Requests of this attempt in progress, by the first key of each.
    under_way: HashMap<AnswerKey, (Group, Sent)>,
    handful: Vec<cache::Landed>,
    /// Groups whose answers are in `handful`.
    finished: Vec<Group>,
    /// Why requests of this round were not answered.
    unanswered: Option<String>,
    /// Number of consecutive rounds with unanswered requests.
    unlucky: u32,
    canceled: u64,
    answered: u64,
    /// Why no more requests are sent.
    stop: Option<Error>,
}

impl Counter<'_, '_> {
    /// The next request within the budget; a request beyond it is put back.
    fn next(&mut self) -> Option<Result<Request>> {
        let ready = match self.desk.next() {
            Ok(ready) => ready?,
            Err(e) => return Some(Err(e)),
        };
        match self.desk.admit(&ready) {
            Admitted::Now(sent) => {
                let Ready { group, body } = ready;
                let ticket: Vec<AnswerKey> = group.iter().map(|entry| entry.key).collect();
                self.under_way.insert(ticket[0], (group, sent));
                Some(Ok(Request { ticket, body }))
            }
            // The rest waits until the cost of this batch is known.
            Admitted::Later => self.desk.give_back(ready.group).err().map(Err),
            Admitted::Never(error) => {
                self.stop = Some(error);
                self.desk.give_back(ready.group).err().map(Err)
            }
        }
    }

    fn hear(&mut self, news: News<'_>) -> Result<()> {
        match news {
            News::Landed { ticket, landed } => self.landed(ticket, landed)?,
            News::Whole => self.flush()?,
            News::Waiting { left } => {
                self.desk.progress(self.ctx, Some(("requests of a batch left", left as f64)));
            }
            News::Note(note) => self.ctx.warn(format!("annotate.claude: {note}")),
        }
        Ok(())
    }

    fn landed(&mut self, ticket: &[AnswerKey], landed: Landed) -> Result<()> {
        // A request of an earlier attempt is not in `under_way`; its answers are found in the cache.
        let ours = ticket.first().and_then(|key| self.under_way.remove(key));
        let sent = ours.as_ref().map_or_else(Sent::default, |(_, sent)| *sent);
        let lost = matches!(landed, Landed::Lost(_));
        match landed {
            Landed::Answer(answer) => {
                self.answered += 1;
                // The number of queued documents that an earlier attempt's batch answers is unknown until its end.
                let left = if ours.is_some() { self.desk.requests_left() } else { 0 };
                let noted = self.desk.till.landed(sent, &answer.body, left);
                self.handful.push(cache::Landed { documents: ticket.to_vec(), what: What::Answer(answer.body) });
                self.finished.extend(ours.map(|(group, _)| group));
                if self.handful.len() >= HANDFUL {
                    self.flush()?;
                }
                noted?;
            }
            Landed::Refused(error) => {
                self.desk.till.unpaid(sent)?;
                match ours {
                    Some((group, _)) if error.blame == Blame::User => self.desk.faulty.push((group, error)),
                    Some((group, _)) => {
                        self.stop.get_or_insert(error);
                        self.desk.give_back(group)?;
                    }
                    None => {}
                }
            }
            Landed::Unanswered(why) | Landed::Lost(why) => {
                if lost && let Err(error) = self.desk.till.purse().lost(sent) {
                    self.stop.get_or_insert(error);
                }
                self.desk.till.unpaid(sent)?;
                self.unanswered.get_or_insert(why);
                ours.map_or(Ok(()), |(group, _)| self.desk.give_back(group))?;
            }
            Landed::Canceled => {
                self.desk.till.unpaid(sent)?;
                self.canceled += 1;
                ours.map_or(Ok(()), |(group, _)| self.desk.give_back(group))?;
            }
        }
        Ok(())
    }

    /// Stores the collected answers durably.
    fn flush(&mut self) -> Result<()> {
        self.desk.keep(std::mem::take(&mut self.handful))?;
        for group in self.finished.drain(..) {
            self.desk.finish(&group)?;
        }
        self.desk.tell(self.ctx);
        Ok(())
    }

    /// Puts requests that were not sent back into the queue.
    fn all_back(&mut self) -> Result<()> {
        for (_, (group, sent)) in self.under_way.drain() {
            self.desk.till.unpaid(sent)?;
            self.desk.give_back(group)?;
        }
        Ok(())
    }

    /// Whether there is more to ask after a round.
    fn more(&mut self) -> Result<bool> {
        if let Some(error) = self.stop.take() {
            return Err(error);
        }
        if self.canceled > 0 {
            let message = format!("a batch was canceled: {} of its requests have no answer", self.canceled);
            return Err(Error::environment(message).help("the answers so far are kept; run again to ask the others"));
        }
        let unanswered = self.unanswered.take();
        self.unlucky = if unanswered.is_some() { self.unlucky + 1 } else { 0 };
        if let Some(why) = unanswered.filter(|_| self.unlucky >= PATIENCE) {
            let message = format!("{why}: requests were sent {PATIENCE} times and not answered");
            return Err(Error::environment(message).help("the answers so far are kept; run again later"));
        }
        if self.answered > 0 {
            self.desk.blame_documents()?;
        }
        Ok(self.desk.judge_faulty()? || self.desk.has_more())
    }
}

/// Sends all queued requests as batches, in rounds, until none is left.
pub async fn in_batches(
    desk: &mut Desk<'_>,
    client: &Client,
    waits: &mut UnboundedReceiver<String>,
    ctx: &mut Context,
) -> Result<()> {
    with_counter(desk, client, waits, ctx, async |batches, counter, wanted| {
        let wanted = |key: AnswerKey| wanted.contains(&key);
        loop {
            {
                let mut requests = std::iter::from_fn(|| counter.borrow_mut().next());
                let mut news = |news: News<'_>| counter.borrow_mut().hear(news);
                if !batches.send(&wanted, &mut requests, &mut news).await? {
                    counter.borrow_mut().all_back()?;
                    batches.settle_open(&wanted, &mut news).await?;
                }
            }
            if !counter.borrow_mut().more()? {
                return Ok(());
            }
            if counter.borrow().desk.only_elsewhere() {
                tokio::time::sleep(POLL).await;
            }
            counter.borrow_mut().desk.look_again();
        }
    })
    .await
}

/// Waits for batches that earlier attempts sent.
pub async fn settle(
    desk: &mut Desk<'_>,
    client: &Client,
    waits: &mut UnboundedReceiver<String>,
    ctx: &mut Context,
) -> Result<()> {
    with_counter(desk, client, waits, ctx, async |batches, counter, wanted| {
        let mut news = |news: News<'_>| counter.borrow_mut().hear(news);
        batches.settle_open(&|key| wanted.contains(&key), &mut news).await.map(drop)
    })
    .await
}

/// Runs `work` and reports the client's waits meanwhile.
async fn with_counter<'a, 'b>(
    desk: &'a mut Desk<'b>,
    client: &Client,
    waits: &mut UnboundedReceiver<String>,
    ctx: &'a mut Context,
    work: impl AsyncFnOnce(&Batches<'_>, &RefCell<Counter<'a, 'b>>, &HashSet<AnswerKey>) -> Result<()>,
) -> Result<()> {
    let folder = desk.folder().join(Path::new(FOLDER));
    let batches = Batches::open(client, &folder, Manners::of_environment()?)?;
    let wanted = desk.wanted();
    let counter = RefCell::new(Counter {
        desk,
        ctx,
        under_way: HashMap::new(),
        handful: Vec::new(),
        finished: Vec::new(),
        unanswered: None,
        unlucky: 0,
        canceled: 0,
        answered: 0,
        stop: None,
    });
    let done = {
        let mut work = std::pin::pin!(work(&batches, &counter, &wanted));
        loop {
            tokio::select! {
                biased;
                Some(wait) = waits.recv() => counter.borrow_mut().ctx.warn(format!("annotate.claude: {wait}")),
                done = &mut work => break done,
            }
        }
    };
    // Answers received before a failure are paid for, so they are stored.
    let flushed = counter.borrow_mut().flush();
    done.and(flushed)
}
