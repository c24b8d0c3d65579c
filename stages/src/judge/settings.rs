//! What is asked, of whom, and how answers are used: the parameters of a kind with the files that they name.

use std::sync::Arc;

use engine::error::Result;
use serde_json::Value;

use super::instructions::Instructions;
use super::params::{Mode, Shared};
use super::prices::Quote;
use super::provider::Provider;
use crate::types::Outcome;

#[derive(Clone, Debug)]
pub struct Settings {
    pub provider: Arc<dyn Provider>,
    pub model: String,
    pub documents_per_request: usize,
    pub instructions: Instructions,
    pub max_tokens: u32,
    pub strict_partner: bool,
    pub swap_share: f64,
    pub repeat_share: f64,
    pub retry: Vec<Outcome>,
    pub retries: u32,
    pub max_unlabelled: f64,
    pub mode: Mode,
    pub max_cost: Option<f64>,
    pub max_requests: Option<u64>,
    /// The price of the model's tokens, if it is known.
    pub quote: Option<Quote>,
    /// [`Provider::asked`].
    pub asked: Value,
}

impl Settings {
    /// # Errors
    /// If a file cannot be read or is invalid (already reported in planning).
    pub fn load(shared: Shared, quote: Option<Quote>, provider: Arc<dyn Provider>) -> Result<Self> {
        let instructions = Instructions::load(
            shared.template.as_ref(),
            shared.examples.as_ref(),
            shared.rubric.as_deref(),
            &shared.questions,
        )?;
        let mut settings = Self {
            provider: provider.clone(),
            model: shared.model,
            documents_per_request: shared.documents_per_request,
            instructions,
            max_tokens: shared.max_tokens,
            strict_partner: shared.strict_partner,
            swap_share: shared.swap_share,
            repeat_share: shared.repeat_share,
            retry: shared.retry.0,
            retries: shared.retries,
            max_unlabelled: shared.max_unlabelled,
            mode: shared.mode,
            max_cost: shared.max_cost,
            max_requests: shared.max_requests,
            quote,
            asked: Value::Null,
        };
        settings.asked = provider.asked(&settings);
        settings.instructions.add_to(&mut settings.asked);
        Ok(settings)
    }

    /// The kind, for messages.
    pub fn kind(&self) -> &'static str {
        self.provider.protocol().kind
    }

    /// BLAKE3 of [`Provider::asked`].
    pub fn fingerprint(&self) -> [u8; 32] {
        *blake3::hash(self.asked.to_string().as_bytes()).as_bytes()
    }

    /// Bytes of the fixed prefix of all requests with these settings.
    pub fn fixed_bytes(&self) -> u64 {
        Value::Array(self.provider.fixed(self, self.mode)).to_string().len() as u64
    }
}
