//! Encodes texts as sequences of one tokenizer that fit into one window.

use engine::error::{Error, Result};
use lm::{Sequence, Tokenizer};

use crate::prompt::{self, Fitted, Truncation};
use crate::types::Post;

/// Turns table rows into sequences for one model.
pub struct Encoder<'a> {
    tokenizer: &'a Tokenizer,
    /// Longest sequence of the model, in tokens.
    window: usize,
    longest_prompt: usize,
    pub truncation: Truncation,
}

impl<'a> Encoder<'a> {
    pub fn new(tokenizer: &'a Tokenizer, window: usize) -> Self {
        Self { tokenizer, window, longest_prompt: usize::MAX, truncation: Truncation::default() }
    }

    /// Limits prompts to this many tokens even if the window leaves more room.
    #[must_use]
    pub fn longest_prompt(mut self, tokens: Option<usize>) -> Self {
        self.longest_prompt = tokens.unwrap_or(usize::MAX);
        self
    }

    /// A post's prompt and its reference summary with EOS.
    pub fn reference(&mut self, post: &Post) -> Result<Sequence> {
        self.summary(post, &post.summary, true)
    }

    /// A post's prompt and any summary, with EOS if it `ended`.
    pub fn summary(&mut self, post: &Post, summary: &str, ended: bool) -> Result<Sequence> {
        let response = prompt::response_ids(self.tokenizer, summary, ended);
        let prompt = self.prompt(post, response.len())?;
        Ok(Sequence { prompt, response })
    }

    /// A post's prompt, fitted so that `room` tokens remain for the response.
    pub fn prompt(&mut self, post: &Post, room: usize) -> Result<Vec<u32>> {
        let fitted = prompt::fit(self.tokenizer, post, self.limit(&post.id, room)?);
        self.kept(fitted, &post.id, room)
    }

    /// The sequence of a row that has text and possibly ids. The ids are used only if `own`, that is if this tokenizer
    /// made them.
    pub fn row(
        &mut self,
        post_id: &str,
        prompt: Text<'_>,
        response: Text<'_>,
        ended: bool,
        own: bool,
    ) -> Result<Sequence> {
        // A table encoded with a bare tokenizer may end its responses with another EOS than the model's.
        let ends = |ids: &[u32]| !ended || ids.last().is_some_and(|&id| self.tokenizer.eos().contains(id));
        let response = match response.ids {
            Some(ids) if own && ends(ids) => ids.to_vec(),
            _ => prompt::response_ids(self.tokenizer, response.text, ended),
        };
        let limit = self.limit(post_id, response.len())?;
        let prompt = match prompt.ids {
            Some(ids) if own && ids.len() <= limit => {
                self.truncation.count(false);
                ids.to_vec()
            }
            _ => self.kept(prompt::fit_text(self.tokenizer, prompt.text, limit), post_id, response.len())?,
        };
        Ok(Sequence { prompt, response })
    }

    /// Whether this tokenizer made the ids. One row is enough to decide for a whole table.
    pub fn made(&self, prompt: Text<'_>) -> bool {
        prompt.ids.is_some_and(|ids| self.tokenizer.encode(prompt.text) == ids)
    }

    fn limit(&self, post_id: &str, room: usize) -> Result<usize> {
        let left = self.window.checked_sub(room).filter(|&left| left > 0);
        left.map(|left| left.min(self.longest_prompt)).ok_or_else(|| {
            Error::user(format!(
                "post `{post_id}`: a response of {room} tokens leaves no room for a prompt in a window of {}",
                self.window
            ))
            .help("use a model with a longer window, or shorter responses")
        })
    }

    fn kept(&mut self, fitted: Fitted, post_id: &str, room: usize) -> Result<Vec<u32>> {
        let limit = self.limit(post_id, room)?;
        self.truncation.count(fitted.truncated);
        whole(fitted, post_id, limit).map(|fitted| fitted.ids)
    }
}

/// Returns the row, or `None` and counts it in `dropped` if `drop_long` is set and the row does not fit into the
/// window. An [`Encoder`] fails for no other reason.
///
/// # Errors
/// Without `drop_long`, the reason why the row does not fit.
pub fn fitting<T>(row: Result<T>, drop_long: bool, dropped: &mut u64) -> Result<Option<T>> {
    match row {
        Ok(row) => Ok(Some(row)),
        Err(_) if drop_long => {
            *dropped += 1;
            Ok(None)
        }
        Err(error) => Err(error.help("use a model with a longer window, or leave such rows out: `drop_long: true`")),
    }
}

/// Number of prompt tokens that fit into a window beside `max_new_tokens`.
///
/// # Errors
/// If none are left.
pub fn room(window: usize, max_new_tokens: usize) -> Result<usize> {
    window.checked_sub(max_new_tokens).filter(|room| *room > 0).ok_or_else(|| {
        Error::user(format!(
            "`max_new_tokens` {max_new_tokens} leaves no room for a prompt in a window of {window} tokens"
        ))
    })
}

/// A text of a table row, with its ids if the table has them.
#[derive(Clone, Copy, Debug)]
pub struct Text<'a> {
    pub text: &'a str,
    pub ids: Option<&'a [u32]>,
}

/// A post's prompt in at most `most` tokens.
///
/// # Errors
/// If not even the template with the title fits.
pub fn fit(tokenizer: &Tokenizer, post: &Post, most: usize) -> Result<Fitted> {
    whole(prompt::fit(tokenizer, post, most), &post.id, most)
}

fn whole(fitted: Fitted, post_id: &str, most: usize) -> Result<Fitted> {
    if fitted.ids.len() <= most {
        return Ok(fitted);
    }
    let tokens = fitted.ids.len();
    Err(Error::user(format!("post `{post_id}`: its prompt without the post's text has {tokens} tokens, {most} fit"))
        .help("use a model with a longer window, or fewer new tokens"))
}

/// The text of sampled ids as stored in tables: without EOS and without surrounding white space.
pub fn response_text(tokenizer: &Tokenizer, ids: &[u32]) -> String {
    tokenizer.decode(ids).trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::toys;

    #[test]
    fn ids_of_another_end_of_text_are_made_again() {
        let tokenizer = toys::tokenizer();
        let eos = tokenizer.eos().first();
        let mut encoder = Encoder::new(&tokenizer, 200);
        let prompt = tokenizer.encode("a prompt");
        let mut response = |ids: &[u32], ended: bool| {
            let prompt = Text { text: "a prompt", ids: Some(&prompt) };
            let row = encoder.row("p", prompt, Text { text: "x", ids: Some(ids) }, ended, true);
            row.map(|row| row.response).expect("it fits")
        };
        assert_eq!(response(&[7, 8, eos], true), [7, 8, eos]);
        assert_eq!(response(&[7, 8], false), [7, 8]);
        assert_eq!(response(&[7, 8], true), prompt::response_ids(&tokenizer, "x", true));
        assert_eq!(response(&[7, 8, eos + 1], true), prompt::response_ids(&tokenizer, "x", true));
    }
}
