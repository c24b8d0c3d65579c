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
use super::batch::RequestOutcome;
use super::client::Client;
use super::endpoint::Endpoint;
use super::params::Mode;
use super::settings::Settings;
use super::spool::Waiting;
use crate::http;
use gate::BudgetGate;
use queue::{Ready, WorkQueue, keys};

pub use batches::are_open;

/// Default number of concurrent requests.
const CONCURRENCY: usize = 8;
/// Environment variable for the number of concurrent requests. Not a parameter, since it changes no label and so must
/// not be part of the key.
pub const CONCURRENCY_VARIABLE: &str = "TEMPER_REQUESTS";
/// After this number of rejected requests without an answer between them, the settings are at fault.
const FAULTY_IN_A_ROW: usize = 8;
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
    let mut told_elsewhere = false;
    loop {
        let most = if queue.gate.is_warm() { many } else { 1 };
        while running.len() < most {
            match queue.take() {
                Ok(Some((Ready { group, body }, sent))) => {
                    let (client, losses) = (client.clone(), queue.gate.losses());
                    running.spawn(async move {
                        let answer = client.post(&body, &|| losses.lost(sent)).await;
                        (group, sent, answer.map_or_else(RequestOutcome::Refused, RequestOutcome::Answer))
                    });
                }
                Ok(None) => break,
                Err(error) => {
                    queue.stop.get_or_insert(error);
                }
            }
        }
        let idle = running.is_empty();
        if idle && (queue.stop.is_some() || queue.elsewhere.is_empty()) {
            let more = queue.judge_faulty();
            match (queue.stop.take(), more) {
                (Some(error), _) | (None, Err(error)) => return Err(error),
                (None, Ok(true)) => continue,
                (None, Ok(false)) => return Ok(()),
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
                // Answers that arrived meanwhile are made durable together.
                for joined in std::iter::once(joined).chain(std::iter::from_fn(|| running.try_join_next())) {
                    let recorded = match joined {
                        Ok((group, sent, outcome)) => queue.record(keys(&group), Some((group, sent)), outcome),
                        Err(e) => Err(Error::internal(format!("{kind}: a request's task ended: {e}"))),
                    };
                    if let Err(error) = recorded {
                        queue.stop.get_or_insert(error);
                    }
                }
                if let Err(error) = queue.flush(ctx) {
                    queue.stop.get_or_insert(error);
                }
                if queue.faulty.len() >= FAULTY_IN_A_ROW {
                    let error = queue.faulty.remove(0).1;
                    let error = error.context(format!("{FAULTY_IN_A_ROW} requests in a row were turned down"));
                    queue.stop.get_or_insert(error);
                }
            }
            () = tokio::time::sleep(POLL), if !queue.elsewhere.is_empty() => queue.look_again(),
        }
    }
}
