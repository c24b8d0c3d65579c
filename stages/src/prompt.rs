//! The prompt template of the paper (A.1), truncation of prompts to a token limit, and token ids of responses.

use engine::context::Context;

use crate::types::Post;

/// The tokenizer operations that the template needs.
pub trait Encode {
    /// Encodes a whole text, with BOS if the tokenizer adds one.
    fn encode(&self, text: &str) -> Vec<u32>;
    /// Encodes a text that starts with a space and continues another text.
    fn encode_continuation(&self, text: &str) -> Vec<u32>;
    /// The id that ends a response (EOS).
    fn eos(&self) -> u32;
}

impl Encode for lm::Tokenizer {
    fn encode(&self, text: &str) -> Vec<u32> {
        Self::encode(self, text)
    }

    fn encode_continuation(&self, text: &str) -> Vec<u32> {
        Self::encode_continuation(self, text)
    }

    fn eos(&self) -> u32 {
        Self::eos(self).first()
    }
}

/// A prompt within its token limit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fitted {
    pub text: String,
    pub ids: Vec<u32>,
    /// Whether the end of the post was cut off.
    pub truncated: bool,
}

/// Counts of all prompts of a stage and of those whose post was truncated.
#[derive(Clone, Copy, Debug, Default)]
pub struct Truncation {
    prompts: u64,
    truncated: u64,
}

impl Truncation {
    pub fn count(&mut self, truncated: bool) {
        self.prompts += 1;
        self.truncated += u64::from(truncated);
    }

    /// Records the metric `truncated_prompts`, and warns as [`Truncation::warn`] does.
    pub fn tell(&self, ctx: &mut Context) {
        ctx.metric("truncated_prompts", self.truncated as f64);
        self.warn(ctx, "prompts");
    }

    /// Warns if more than a tenth of the prompts were truncated, because the model then summarises posts that it has
    /// not read to the end. `what` names the prompts in the message.
    pub fn warn(&self, ctx: &mut Context, what: &str) {
        let Self { prompts, truncated } = *self;
        if 10 * truncated > prompts {
            ctx.warn(format!(
                "{truncated} of {prompts} {what} lost the end of their post to fit: use a model with a longer window, allow \
                 longer prompts or fewer new tokens, or leave out long posts"
            ));
        }
    }
}

/// The A.1 prompt. Adds `r/` to a subreddit without it; an empty subreddit or title leaves an empty value on its line.
pub fn text(post: &Post) -> String {
    Parts::of(post).text()
}

/// The fields of the template.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Parts<'a> {
    pub subreddit: &'a str,
    pub title: &'a str,
    pub post: &'a str,
}

impl<'a> Parts<'a> {
    pub fn of(post: &'a Post) -> Self {
        Self { subreddit: &post.subreddit, title: &post.title, post: &post.post }
    }

    /// Parses a prompt that follows this template, as sources write it: labels in any case, single or double newlines,
    /// with or without the subreddit and title lines and the final `TL;DR:`. `None` if no line starts with `POST:`, or
    /// if other text precedes it.
    pub fn parse(prompt: &'a str) -> Option<Self> {
        let (head, post) = split_at_label(prompt.trim(), "POST:")?;
        let head = head.trim();
        let (subreddit, title) = match (after_label(head, "SUBREDDIT:"), after_label(head, "TITLE:")) {
            (Some(rest), _) => split_at_label(rest, "TITLE:").unwrap_or((rest, "")),
            (None, Some(title)) => ("", title),
            (None, None) if head.is_empty() => ("", ""),
            (None, None) => return None,
        };
        let post = TLDR.iter().find_map(|label| before_label(post, label)).unwrap_or(post);
        Some(Self { subreddit: subreddit.trim(), title: title.trim(), post: post.trim() })
    }

    /// The A.1 prompt.
    pub fn text(self) -> String {
        let subreddit = self.subreddit.trim();
        let prefix = if subreddit.is_empty() || subreddit.starts_with("r/") { "" } else { "r/" };
        format!("Subreddit: {prefix}{subreddit}\nTITLE: {}\nPOST: {}\nTL;DR:", self.title.trim(), self.post.trim())
    }
}

/// Spellings of the template's last label.
const TLDR: [&str; 2] = ["TL;DR:", "TLDR:"];

/// A summary without surrounding white space and without the `TL;DR:` label that some sources put in front.
pub fn bare_summary(text: &str) -> &str {
    let text = text.trim();
    TLDR.iter().find_map(|label| after_label(text, label)).map_or(text, str::trim)
}

fn after_label<'a>(text: &'a str, label: &str) -> Option<&'a str> {
    let head = text.get(..label.len())?;
    head.eq_ignore_ascii_case(label).then(|| &text[label.len()..])
}

fn before_label<'a>(text: &'a str, label: &str) -> Option<&'a str> {
    let text = text.trim_end();
    let end = text.len().checked_sub(label.len())?;
    text.get(end..)?.eq_ignore_ascii_case(label).then(|| &text[..end])
}

/// The text before the first line that starts with `label`, and the text after that label.
fn split_at_label<'a>(text: &'a str, label: &str) -> Option<(&'a str, &'a str)> {
    let mut lines = std::iter::once(0).chain(text.match_indices('\n').map(|(at, _)| at + 1));
    lines.find_map(|at| Some((&text[..at], after_label(&text[at..], label)?)))
}

/// The A.1 prompt in at most `max_tokens` ids. A prompt that does not fit loses the end of its post, at a line or
/// sentence break, or at a word break if even the first sentence is too long. The template itself is never cut: even
/// with an empty post, the prompt may be longer than `max_tokens`.
pub fn fit(tokenizer: &impl Encode, post: &Post, max_tokens: usize) -> Fitted {
    fit_parts(tokenizer, Parts::of(post), max_tokens)
}

/// As [`fit`], for an A.1 prompt given as text. A text that does not follow the template is treated as a post.
pub fn fit_text(tokenizer: &impl Encode, prompt: &str, max_tokens: usize) -> Fitted {
    fit_parts(tokenizer, Parts::parse(prompt).unwrap_or(Parts { subreddit: "", title: "", post: prompt }), max_tokens)
}

fn fit_parts(tokenizer: &impl Encode, parts: Parts<'_>, max_tokens: usize) -> Fitted {
    let fitted = |body: &str, truncated| {
        let text = Parts { post: body, ..parts }.text();
        let ids = tokenizer.encode(&text);
        Fitted { text, ids, truncated }
    };
    let whole = fitted(parts.post, false);
    if whole.ids.len() <= max_tokens {
        return whole;
    }
    let body = parts.post.trim();
    for breaks in [sentence_ends(body), word_ends(body)] {
        // More text means more ids, except for rare merges at the cut: so bisect, then step back until the prompt fits.
        let mut candidates = breaks.partition_point(|&end| fitted(&body[..end], true).ids.len() <= max_tokens);
        while candidates > 0 {
            let fit = fitted(&body[..breaks[candidates - 1]], true);
            if fit.ids.len() <= max_tokens {
                return fit;
            }
            candidates -= 1;
        }
    }
    fitted("", true)
}

/// The ids of a response: a space and the trimmed summary, then EOS if it `ended`. No token spans the border between
/// prompt and response: if tokenizing the concatenated text puts a token border there, prompt and response get the same
/// ids as in that text.
pub fn response_ids(tokenizer: &impl Encode, summary: &str, ended: bool) -> Vec<u32> {
    let mut ids = tokenizer.encode_continuation(&format!(" {}", summary.trim()));
    if ended {
        ids.push(tokenizer.eos());
    }
    ids
}

/// Byte offsets at which `body` may end: before a line break, or after `.`, `!`, `?`, `…`, `)` or `"` followed by white
/// space.
fn sentence_ends(body: &str) -> Vec<usize> {
    let mut ends = Vec::new();
    let mut previous = ' ';
    for (at, c) in body.char_indices() {
        let after_stop = c.is_whitespace() && matches!(previous, '.' | '!' | '?' | ')' | '"' | '…');
        if at > 0 && !previous.is_whitespace() && (c == '\n' || after_stop) {
            ends.push(at);
        }
        previous = c;
    }
    ends
}

/// Byte offsets of the ends of words.
fn word_ends(body: &str) -> Vec<usize> {
    let mut previous = ' ';
    let mut ends = Vec::new();
    for (at, c) in body.char_indices() {
        if c.is_whitespace() && !previous.is_whitespace() {
            ends.push(at);
        }
        previous = c;
    }
    ends
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A tokenizer with one token per byte.
    struct Bytes;

    impl Encode for Bytes {
        fn encode(&self, text: &str) -> Vec<u32> {
            text.bytes().map(u32::from).collect()
        }

        fn encode_continuation(&self, text: &str) -> Vec<u32> {
            self.encode(text)
        }

        fn eos(&self) -> u32 {
            256
        }
    }

    fn post(body: &str) -> Post {
        Post {
            id: "1".into(),
            subreddit: "relationships".into(),
            title: "My boss".into(),
            post: body.into(),
            summary: "s".into(),
            splits: vec![],
            facts: None,
        }
    }

    #[test]
    fn the_prompt_is_the_papers_template() {
        let expected = "Subreddit: r/relationships\nTITLE: My boss\nPOST: I quit.\nTL;DR:";
        assert_eq!(text(&post("I quit.")), expected);
        let bare = Post { subreddit: String::new(), title: String::new(), ..post("x") };
        assert_eq!(text(&bare), "Subreddit: \nTITLE: \nPOST: x\nTL;DR:");
        let marked = Post { subreddit: "r/tifu".into(), ..post("x") };
        assert!(text(&marked).starts_with("Subreddit: r/tifu\n"));
    }

    #[test]
    fn a_prompt_parses_however_its_source_writes_it() {
        let expected = Parts { subreddit: "r/tifu", title: "a: b", post: "x\n\nPOST: y" };
        for prompt in [
            "SUBREDDIT: r/tifu\nTITLE: a: b\nPOST: x\n\nPOST: y\nTL;DR:",
            "SUBREDDIT: r/tifu\n\nTITLE: a: b\n\nPOST: x\n\nPOST: y\n\nTL;DR:",
            "Subreddit: r/tifu\nTITLE: a: b\nPOST: x\n\nPOST: y\n",
        ] {
            assert_eq!(Parts::parse(prompt), Some(expected));
        }
        let empty = Parts { subreddit: "", title: "", post: "é" };
        assert_eq!(Parts::parse("Subreddit: \nTITLE: \nPOST: é\nTL;DR:"), Some(empty));
        let bare = Parts { subreddit: "", title: "", post: "y" };
        assert_eq!(Parts::parse("SUBREDDIT: x\nPOST: y"), Some(Parts { subreddit: "x", ..bare }));
        assert_eq!(Parts::parse("TITLE: t\n\nPOST: y\n\ntldr:"), Some(Parts { title: "t", ..bare }));
        assert_eq!(Parts::parse("Post: y\nTL;DR: "), Some(bare));
        for other in ["é", "", "TITLE: t\n\nAn article.\n\nTL;DR:", "Some text.\nPOST: y"] {
            assert_eq!(Parts::parse(other), None);
        }
    }

    #[test]
    fn a_summary_loses_its_label_whatever_its_case() {
        for text in [" a dog", "TL;DR:  a dog", "tldr: a dog\n", "a dog"] {
            assert_eq!(bare_summary(text), "a dog");
        }
        assert_eq!((bare_summary("TL;DR:"), bare_summary("é TL;DR: x")), ("", "é TL;DR: x"));
    }

    #[test]
    fn fitting_a_post_and_fitting_its_prompt_are_the_same() {
        let long = post("One two three. Four five six! Seven eight nine");
        for room in 50..100 {
            assert_eq!(fit(&Bytes, &long, room), fit_text(&Bytes, &text(&long), room));
        }
    }

    #[test]
    fn a_long_post_loses_its_end_at_a_sentence_break_and_the_template_stays() {
        let long = post("One two three. Four five six! Seven eight nine");
        let room = text(&post("One two three. Four five six!")).len();
        for extra in 0..5 {
            let fit = fit(&Bytes, &long, room + extra);
            assert!(fit.truncated);
            assert_eq!(fit.text, text(&post("One two three. Four five six!")));
        }
        let fit_less = fit(&Bytes, &long, room - 1);
        assert_eq!(fit_less.text, text(&post("One two three.")));
        let words = fit(&Bytes, &long, text(&post("One two")).len() + 1);
        assert_eq!(words.text, text(&post("One two")));
        let nothing = fit(&Bytes, &long, 5);
        assert_eq!(nothing.text, text(&post("")));
    }

    #[test]
    fn more_than_a_tenth_of_prompts_truncated_is_a_warning() {
        let told = |prompts, truncated| {
            let (send, receive) = std::sync::mpsc::channel();
            let mut ctx = Context::new("kind", 0, Default::default(), "out".into(), "checkpoints".into())
                .with_sink(move |tell| send.send(tell).expect("the test is listening"));
            let mut truncation = Truncation::default();
            (0..prompts).for_each(|i| truncation.count(i < truncated));
            truncation.tell(&mut ctx);
            drop(ctx);
            receive.into_iter().map(|tell| format!("{tell:?}")).collect::<Vec<_>>()
        };
        for (prompts, truncated) in [(0, 0), (10, 0), (10, 1), (54, 5)] {
            assert_eq!(told(prompts, truncated), [""; 0], "{truncated} of {prompts}");
        }
        for (prompts, truncated) in [(1, 1), (10, 2), (54, 6), (54, 54)] {
            let told = told(prompts, truncated);
            assert_eq!(told.len(), 1);
            assert!(
                told[0].contains(&format!("{truncated} of {prompts} prompts lost the end of their post")),
                "{told:?}"
            );
        }
    }

    #[test]
    fn a_post_that_fits_is_left_whole() {
        let short = post("One two.");
        let fitted = fit(&Bytes, &short, text(&short).len());
        assert!(!fitted.truncated);
        assert_eq!(fitted.text, text(&short));
    }

    #[test]
    fn a_response_starts_with_a_space_and_ends_with_eos_only_if_it_ended() {
        assert_eq!(response_ids(&Bytes, "  hi ", true), [32, 104, 105, 256]);
        assert_eq!(response_ids(&Bytes, "hi", false), [32, 104, 105]);
    }
}
