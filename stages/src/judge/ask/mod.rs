//! Asks until every needed answer is in the log, by concurrent single requests or by batches.

mod batches;
mod gate;
mod queue;

use std::time::Duration;

use engine::context::Context;
use engine::error::{Error, Result};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};
use tokio::task::JoinSet;

use super::answer_log::AnswerLog;
use super::client::Client;
use super::endpoint::Endpoint;
use super::params::Mode;
use super::settings::Settings;
use super::spool::Waiting;
use crate::http;
use gate::{Admission, BudgetGate};
use queue::{Ready, WorkQueue};

pub use batches::are_open;

/// Default number of concurrent requests.
const CONCURRENCY: usize = 8;
/// Environment variable for the number of concurrent requests. Not a parameter, since it changes no label and so must
/// not be part of the key.
pub const CONCURRENCY_VARIABLE: &str = "TEMPER_REQUESTS";
/// Interval for checking documents that another process is asking about.
const POLL: Duration = Duration::from_millis(300);

/// Sends the requests of an attempt.
pub struct Asker<'a> {
    settings: &'a Settings,
    client: Client,
    /// Messages of the client about its waits.
    waits: UnboundedReceiver<String>,
    gate: BudgetGate,
}

impl<'a> Asker<'a> {
    /// # Errors
    /// If requests cannot be sent, or the spending of earlier attempts cannot be read.
    pub fn new(settings: &'a Settings, endpoint: Endpoint, log: &AnswerLog, ctx: &Context) -> Result<Self> {
        let (told, waits) = unbounded_channel();
        let (client, gate) = (Client::new(endpoint, told)?, BudgetGate::open(settings, log, ctx)?);
        Ok(Self { settings, client, waits, gate })
    }

    /// Asks all queued documents. After a failure nothing new is sent, but requests in progress are awaited and stored,
    /// since they are paid for.
    ///
    /// # Errors
    /// Whatever stops the stage: the API is unreachable or denies access, it rejects the settings, or the budget is
    /// spent.
    pub fn ask(&mut self, waiting: Waiting, log: &mut AnswerLog, ctx: &mut Context) -> Result<()> {
        let Self { settings, client, waits, gate } = self;
        let mut queue = WorkQueue::new(settings, waiting, log, gate);
        let done = match settings.mode {
            Mode::Single => http::runtime()?.block_on(singly(&mut queue, client, waits, ctx)),
            Mode::Batch => http::runtime()?.block_on(batches::in_batches(&mut queue, client, waits, ctx)),
        };
        while let Ok(wait) = waits.try_recv() {
            ctx.warn(format!("{}: {wait}", settings.kind()));
        }
        gate.report(ctx, true);
        done
    }

    /// Waits for batches of earlier attempts that answer queued documents, and stores their answers.
    ///
    /// # Errors
    /// As [`Asker::ask`].
    pub fn settle(&mut self, waiting: Waiting, log: &mut AnswerLog, ctx: &mut Context) -> Result<()> {
        let Self { settings, client, waits, gate } = self;
        let mut queue = WorkQueue::new(settings, waiting, log, gate);
        let done = http::runtime()?.block_on(batches::settle(&mut queue, client, waits, ctx));
        gate.report(ctx, true);
        done
    }
}

/// Sends requests one by one until the first is answered, so that the prompt cache is warm, then concurrently.
async fn singly(
    queue: &mut WorkQueue<'_>,
    client: &Client,
    waits: &mut UnboundedReceiver<String>,
    ctx: &mut Context,
) -> Result<()> {
    let many = http::variable(CONCURRENCY_VARIABLE).and_then(|n| n.parse().ok()).unwrap_or(CONCURRENCY).clamp(1, 256);
    let kind = queue.kind();
    let mut running = JoinSet::new();
    // A request that waits for the budget.
    let mut held: Option<Ready> = None;
    let mut failed: Option<Error> = None;
    let mut told_elsewhere = false;
    loop {
        let most = if queue.gate.is_warm() { many } else { 1 };
        while failed.is_none() && running.len() < most {
            let ready = match held.take() {
                Some(ready) => ready,
                None => match queue.next() {
                    Ok(Some(ready)) => ready,
                    Ok(None) => break,
                    Err(e) => {
                        failed = Some(e);
                        break;
                    }
                },
            };
            match queue.admit(&ready) {
                Admission::Now(sent) => {
                    let (client, losses, Ready { group, body }) = (client.clone(), queue.gate.losses(), ready);
                    running.spawn(async move {
                        let answer = client.post(&body, &|| losses.lost(sent)).await;
                        (group, sent, answer)
                    });
                }
                Admission::Later => {
                    held = Some(ready);
                    break;
                }
                Admission::Never(error) => {
                    failed = Some(queue.give_back(ready.group).err().unwrap_or(error));
                }
            }
        }
        let idle = running.is_empty();
        if idle && (failed.is_some() || queue.elsewhere.is_empty()) {
            match queue.judge_faulty() {
                Ok(true) if failed.is_none() => continue,
                Ok(_) => return failed.map_or(Ok(()), Err),
                Err(e) => return Err(failed.unwrap_or(e)),
            }
        }
        if !queue.elsewhere.is_empty() && !told_elsewhere {
            told_elsewhere = true;
            let told = "another process asks about some of the same pairs: its answers are waited for";
            ctx.warn(format!("{kind}: {told}"));
        }
        tokio::select! {
            // Waits come first, so that none is left unreported when the last request ends.
            biased;
            Some(wait) = waits.recv() => ctx.warn(format!("{kind}: {wait}")),
            Some(joined) = running.join_next(), if !idle => {
                let mut finished = vec![joined];
                // Answers that arrived meanwhile are made durable together.
                while let Some(joined) = running.try_join_next() {
                    finished.push(joined);
                }
                if let Err(e) = queue.record(finished) {
                    failed.get_or_insert(e);
                }
                queue.report(ctx);
            }
            () = tokio::time::sleep(POLL), if !queue.elsewhere.is_empty() => queue.look_again(),
        }
    }
}
