//! Selects the answer for a question: the first with a label, within the allowed retries.

use std::collections::{HashMap, HashSet};

use super::answer_log::{AnswerLog, Kept};
use super::document::{AnswerKey, Purpose, Question};
use super::settings::Settings;
use crate::types::Outcome;

/// Result of looking up a question.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    Kept(Kept),
    /// No usable answer yet: one is needed under this key.
    Wanted(AnswerKey),
}

/// Rules for selecting answers. They depend only on the parameters, so the same log gives the same table.
pub struct Answers {
    retry: Vec<Outcome>,
    retries: u32,
    /// If answers are valid only next to the same other documents: the key of each question in its request.
    company: Option<HashMap<AnswerKey, AnswerKey>>,
}

impl Answers {
    pub fn new(settings: &Settings) -> Self {
        Self { retry: settings.retry.clone(), retries: settings.retries, company: None }
    }

    /// Makes answers valid only in the groups of `n` that all questions form in the order of requests.
    #[must_use]
    pub fn in_company(mut self, mut all: Vec<(Purpose, u64, AnswerKey)>, n: usize) -> Self {
        all.sort_unstable();
        let mut seen = HashSet::with_capacity(all.len());
        all.retain(|(_, _, key)| seen.insert(*key));
        let mut company = HashMap::with_capacity(all.len());
        for group in all.chunks(n) {
            let keys: Vec<AnswerKey> = group.iter().map(|(_, _, key)| *key).collect();
            company.extend(keys.iter().enumerate().map(|(slot, key)| (*key, key.among(&keys, slot))));
        }
        self.company = Some(company);
        self
    }

    /// Whether answers are valid only within their group, so that groups are never split.
    pub fn are_strict(&self) -> bool {
        self.company.is_some()
    }

    /// Maximum number of answers to the same question.
    pub fn rounds(&self) -> u32 {
        if self.retry.is_empty() { 1 } else { 1 + self.retries }
    }

    /// The key of a question's first answer.
    pub fn key(&self, question: &Question) -> AnswerKey {
        let company = self.company.as_ref().and_then(|company| company.get(&question.key));
        company.copied().unwrap_or(question.key)
    }

    pub fn find(&self, log: &AnswerLog, question: &Question) -> Found {
        let first = self.key(question);
        let mut attempt = 1;
        loop {
            let key = first.attempt(attempt);
            match log.get(key) {
                None => return Found::Wanted(key),
                Some(kept) if attempt < self.rounds() && self.retry.contains(&kept.reply.outcome()) => attempt += 1,
                Some(kept) => return Found::Kept(kept),
            }
        }
    }
}
