//! Kinds that label pairs, with a shared preference writer and the set of held-out posts.

pub mod agreement;
pub mod claude;
pub mod gold;
pub mod human;
pub mod pair_key;
pub mod reference;
pub mod rouge;
pub mod unjudged;

use std::collections::{BTreeMap, HashSet};
use std::path::Path;

pub use agreement::Agree;
pub use claude::Claude;
use engine::context::Context;
use engine::error::{Error, Result};
pub use gold::Gold;
pub use human::Human;
pub use reference::Reference;
pub use unjudged::DatasetPairs;

use crate::data::clean::fingerprint;
use crate::table;
use crate::types::{Outcome, Post, Posts, Preference, Preferences, Split};

/// Writes a table of preferences and counts outcomes.
pub struct Judged {
    writer: table::Writer<Preference>,
    outcomes: BTreeMap<Outcome, u64>,
}

impl Judged {
    /// # Errors
    /// If the table cannot be created.
    pub fn create(folder: &Path) -> Result<Self> {
        Ok(Self { writer: Preferences::create(folder)?, outcomes: BTreeMap::new() })
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

/// Uniform in [0, 1), from the hash of `parts` under a generator key: independent of a row's position and of other
/// rows.
pub fn draw(key: &[u8; 32], parts: &[&str]) -> f64 {
    (hash(key, parts) >> 11) as f64 / (1_u64 << 53) as f64
}

/// The first 64 bits of the keyed hash of `parts`, each prefixed with its length.
pub fn hash(key: &[u8; 32], parts: &[&str]) -> u64 {
    let mut hasher = blake3::Hasher::new_keyed(key);
    for part in parts {
        hasher.update(&(part.len() as u64).to_le_bytes());
        hasher.update(part.as_bytes());
    }
    let mut first = [0; 8];
    first.copy_from_slice(&hasher.finalize().as_bytes()[..8]);
    u64::from_le_bytes(first)
}

#[cfg(test)]
mod tests {
    use engine::kind::Kind;

    use super::*;
    use crate::table::Row;

    #[test]
    fn a_column_more_or_less_raises_the_versions_of_all_who_write_the_table() {
        let columns: Vec<&str> = Preference::columns().iter().map(|column| column.name).collect();
        let versions = [Claude::VERSION, Gold::VERSION, Human::VERSION, Reference::VERSION];
        let expected = "id post_id prompt prompt_ids facts chosen_text chosen_ids chosen_ended rejected_text rejected_ids \
                        rejected_ended corruption outcome annotator confidence chosen_first reason";
        // Without new versions, an older table in the store would be reused for the new one.
        assert_eq!((columns.join(" ").as_str(), versions), (expected, [3, 3, 4, 3]), "raise all four, then this");
    }
}
