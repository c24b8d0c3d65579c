//! Asks until every wanted answer is in the cache: a number of requests at once, or batches. Knows no pair.

mod batches;
mod desk;
mod till;

use std::time::Duration;

use engine::context::Context;
use engine::error::{Error, Result};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};
use tokio::task::JoinSet;

use super::cache::Cache;
use super::client::{Client, Endpoint};
use super::params::{Mode, Params};
use super::settings::Settings;
use super::spool::Waiting;
use crate::http;
use desk::{Desk, Ready};
use till::{Admitted, Till};

pub use batches::are_open;

/// Requests under way at once, if the environment does not say.
const CONCURRENCY: usize = 8;
/// Says otherwise. Not a parameter: how many requests are under way changes no label and so belongs to no key.
pub const CONCURRENCY_VARIABLE: &str = "TEMPER_REQUESTS";
/// How often documents that another process is asking about are looked for.
const POLL: Duration = Duration::from_millis(300);

/// Who asks, for how much, and how.
pub struct Asker<'a> {
    settings: &'a Settings,
    /// Whether groups are asked whole.
    strict: bool,
    mode: Mode,
    client: Client,
    /// What the client says of its waits.
    waits: UnboundedReceiver<String>,
    till: Till,
}

impl<'a> Asker<'a> {
    /// # Errors
    /// If no request could be sent, or what earlier attempts spent cannot be read.
    pub fn new(
        params: &Params,
        settings: &'a Settings,
        strict: bool,
        endpoint: Endpoint,
        cache: &Cache,
        ctx: &Context,
    ) -> Result<Self> {
        let (told, waits) = unbounded_channel();
        let (client, till) = (Client::new(endpoint, told)?, Till::open(params, settings, cache, ctx)?);
        Ok(Self { settings, strict, mode: params.mode, client, waits, till })
    }

    /// Asks all that waits. After a failure nothing new is sent, and what is under way is awaited and kept: it is paid for.
    ///
    /// # Errors
    /// Whatever stops the stage: an API that cannot be reached or does not let us in, settings that it takes for faulty, money
    /// that is spent.
    pub fn ask(&mut self, waiting: Waiting, cache: &mut Cache, ctx: &mut Context) -> Result<()> {
        let Self { settings, strict, mode, client, waits, till } = self;
        let mut desk = Desk::new(settings, *mode, *strict, waiting, cache, till);
        let done = match mode {
            Mode::Single => http::runtime()?.block_on(singly(&mut desk, client, waits, ctx)),
            Mode::Batch => http::runtime()?.block_on(batches::in_batches(&mut desk, client, waits, ctx)),
        };
        while let Ok(wait) = waits.try_recv() {
            ctx.warn(format!("annotate.claude: {wait}"));
        }
        till.tell(ctx, true);
        done
    }

    /// Waits for batches that earlier attempts sent, as far as they answer what waits, and keeps their answers.
    ///
    /// # Errors
    /// As [`Asker::ask`].
    pub fn settle(&mut self, waiting: Waiting, cache: &mut Cache, ctx: &mut Context) -> Result<()> {
        let Self { settings, strict, mode, client, waits, till } = self;
        let mut desk = Desk::new(settings, *mode, *strict, waiting, cache, till);
        let done = http::runtime()?.block_on(batches::settle(&mut desk, client, waits, ctx));
        till.tell(ctx, true);
        done
    }
}

/// One request after the other until the first is answered, so that the prompt cache is warm; then many at once.
async fn singly(
    desk: &mut Desk<'_>,
    client: &Client,
    waits: &mut UnboundedReceiver<String>,
    ctx: &mut Context,
) -> Result<()> {
    let many = http::variable(CONCURRENCY_VARIABLE).and_then(|n| n.parse().ok()).unwrap_or(CONCURRENCY).clamp(1, 256);
    let mut running = JoinSet::new();
    // A request that waits for money.
    let mut held: Option<Ready> = None;
    let mut failed: Option<Error> = None;
    let mut told_elsewhere = false;
    loop {
        let most = if desk.till.is_warm() { many } else { 1 };
        while failed.is_none() && running.len() < most {
            let ready = match held.take() {
                Some(ready) => ready,
                None => match desk.next() {
                    Ok(Some(ready)) => ready,
                    Ok(None) => break,
                    Err(e) => {
                        failed = Some(e);
                        break;
                    }
                },
            };
            match desk.admit(&ready) {
                Admitted::Now(sent) => {
                    let (client, purse, Ready { group, body }) = (client.clone(), desk.till.purse(), ready);
                    running.spawn(async move {
                        let answer = client.post(&body, &|| purse.lost(sent)).await;
                        (group, sent, answer)
                    });
                }
                Admitted::Later => {
                    held = Some(ready);
                    break;
                }
                Admitted::Never(error) => {
                    failed = Some(desk.give_back(ready.group).err().unwrap_or(error));
                }
            }
        }
        let idle = running.is_empty();
        if idle && (failed.is_some() || desk.elsewhere.is_empty()) {
            match desk.judge_faulty() {
                Ok(true) if failed.is_none() => continue,
                Ok(_) => return failed.map_or(Ok(()), Err),
                Err(e) => return Err(failed.unwrap_or(e)),
            }
        }
        if !desk.elsewhere.is_empty() && !told_elsewhere {
            told_elsewhere = true;
            ctx.warn("annotate.claude: another process asks about some of the same pairs: its answers are waited for");
        }
        tokio::select! {
            // Waits first, so that none is left when the last request ends.
            biased;
            Some(wait) = waits.recv() => ctx.warn(format!("annotate.claude: {wait}")),
            Some(joined) = running.join_next(), if !idle => {
                let mut landed = vec![joined];
                // Those that landed meanwhile are made durable together.
                while let Some(joined) = running.try_join_next() {
                    landed.push(joined);
                }
                if let Err(e) = desk.land(landed) {
                    failed.get_or_insert(e);
                }
                desk.tell(ctx);
            }
            () = tokio::time::sleep(POLL), if !desk.elsewhere.is_empty() => desk.look_again(),
        }
    }
}
