//! Shared parts of kinds that label pairs: the writer of preferences, the held-out posts, the identity of a pair, agreement.

pub mod agreement;
pub mod pair_key;
pub mod scores;
pub mod trl;

use std::collections::{BTreeMap, HashSet};
use std::path::Path;

use engine::context::Context;
use engine::error::{Error, Result};

use crate::table;
use crate::text::clean::fingerprint;
use crate::types::{Aspect, Outcome, Post, Posts, Preference, Preferences, Split};

/// Writes a table of preferences, with the answers to single questions if there are several, and counts outcomes.
pub struct PreferenceWriter {
    writer: table::Writer<Preference>,
    aspects: Option<table::Writer<Aspect>>,
    outcomes: BTreeMap<Outcome, u64>,
}

impl PreferenceWriter {
    /// # Errors
    /// If the table cannot be created.
    pub fn create(folder: &Path) -> Result<Self> {
        Ok(Self { writer: Preferences::create(folder)?, aspects: None, outcomes: BTreeMap::new() })
    }

    /// With a table of answers to single questions: each call of [`PreferenceWriter::push`] follows as many calls of
    /// [`PreferenceWriter::push_aspect`] as there are questions.
    ///
    /// # Errors
    /// If a table cannot be created.
    pub fn with_aspects(folder: &Path) -> Result<Self> {
        let aspects = table::Writer::create(&folder.join(Preferences::ASPECTS))?;
        Ok(Self { aspects: Some(aspects), ..Self::create(folder)? })
    }

    /// # Errors
    /// If the table cannot be written.
    pub fn push_aspect(&mut self, row: Aspect) -> Result<()> {
        self.aspects.as_mut().map_or(Ok(()), |aspects| aspects.push(row))
    }

    /// # Errors
    /// If the table cannot be written.
    pub fn push(&mut self, row: Preference) -> Result<()> {
        *self.outcomes.entry(row.outcome).or_default() += 1;
        self.writer.push(row)
    }

    pub fn rows(&self) -> u64 {
        self.writer.rows()
    }

    pub fn count(&self, outcome: Outcome) -> u64 {
        self.outcomes.get(&outcome).copied().unwrap_or(0)
    }

    /// Completes the table and records its counts as metrics.
    ///
    /// # Errors
    /// If no row is labelled, since nothing can be learned from such a table.
    pub fn finish(self, ctx: &mut Context) -> Result<()> {
        for &outcome in Outcome::ALL {
            ctx.metric(outcome.as_str(), self.count(outcome) as f64);
        }
        let labelled = self.count(Outcome::Labelled);
        let others = Outcome::ALL.iter().filter(|&&o| self.count(o) > 0).map(|&o| format!("{} {o}", self.count(o)));
        let told = others.collect::<Vec<_>>().join(", ");
        let rows = self.writer.finish()?;
        self.aspects.map(table::Writer::finish).transpose()?;
        ctx.metric("rows", rows as f64);
        if labelled == 0 {
            let told = if rows == 0 { "the table is empty".to_owned() } else { format!("{rows} rows: {told}") };
            return Err(Error::user(format!("no preference can be learned from these judgements, {told}")));
        }
        Ok(())
    }
}

/// Posts of `valid` and `calibration`, which must not occur in preferences.
#[derive(Default)]
pub struct HeldOut {
    ids: HashSet<String>,
    texts: HashSet<[u8; 16]>,
    /// Rows dropped so far.
    pub dropped: u64,
}

impl HeldOut {
    /// # Errors
    /// If the table of posts cannot be read.
    pub fn load(folder: &Path) -> Result<Self> {
        let mut held = Self::default();
        for post in Posts::open(folder)? {
            let post: Post = post?;
            if post.is_in(Split::Valid) || post.is_in(Split::Calibration) {
                held.texts.insert(fingerprint(&post.post));
                held.ids.insert(post.id);
            }
        }
        Ok(held)
    }

    /// The held-out posts of the optional input `exclude`; empty without it.
    ///
    /// # Errors
    /// As [`HeldOut::load`].
    pub fn of(ctx: &Context) -> Result<Self> {
        ctx.optional("exclude").map_or_else(|| Ok(Self::default()), |input| Self::load(&input.folder))
    }

    /// Whether a post is held out, by its id or its normalised text. Counts it if so.
    pub fn holds(&mut self, id: &str, text: &str) -> bool {
        let held = self.ids.contains(id) || (!self.texts.is_empty() && self.texts.contains(&fingerprint(text)));
        self.dropped += u64::from(held);
        held
    }
}
