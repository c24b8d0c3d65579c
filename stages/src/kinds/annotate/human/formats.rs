//! Parses records of human comparisons in the supported layouts.

use serde_json::{Map, Value};

use crate::prompt::{Parts, bare_summary};
use crate::text::clean::printable;
use crate::text::lines::NO_OBJECT;
use crate::types::comparisons::Comparison;

crate::words! {
    /// Layouts of records.
    pub enum Format {
        /// The layout of Stiennon et al.: `info`, `summaries`, `choice`, and about the label `worker`, `batch`,
        /// `split`, `extra`.
        Comparisons = "comparisons",
        /// `prompt`, `chosen`, `rejected`: texts, or lists of messages with `role` and `content`.
        Preference = "preference",
    }
}

/// The columns of all layouts.
pub const COLUMNS: &[&str] =
    &["info", "summaries", "choice", "worker", "batch", "split", "extra", "summary", "prompt", "chosen", "rejected"];

/// A parsed record.
#[derive(Debug)]
pub enum Record {
    Choice(Box<Choice>),
    /// A comparison about a news article, which does not fit the prompt template.
    Article,
}

/// One human choice. Texts are printable and trimmed.
#[derive(Debug, Default, PartialEq)]
pub struct Choice {
    /// The post's id in the source.
    pub post_id: Option<String>,
    /// The A.1 prompt.
    pub prompt: String,
    pub post: String,
    pub chosen: String,
    pub rejected: String,
    /// `None` if the source has only the texts.
    pub about: Option<About>,
}

/// Information of a source about a label.
#[derive(Debug, Default, PartialEq)]
pub struct About {
    /// Index of the chosen summary in the order of display: 0 or 1.
    pub place: usize,
    pub policies: [Option<String>; 2],
    pub worker: Option<String>,
    pub batch: Option<String>,
    pub split: Option<String>,
    pub confidence: Option<f64>,
}

impl Format {
    /// Detects the layout of a record from its fields.
    ///
    /// # Errors
    /// Lists the fields found if no layout matches.
    pub fn of(record: &Value) -> Result<Self, String> {
        let fields = record.as_object().ok_or(NO_OBJECT)?;
        let has = |name: &str| fields.contains_key(name);
        if has("summaries") || (has("info") && (has("choice") || has("summary"))) {
            Ok(Self::Comparisons)
        } else if has("chosen") && has("rejected") {
            Ok(Self::Preference)
        } else {
            Err(format!(
                "neither a comparison (`info`, `summaries`, `choice`) nor a preference (`prompt`, `chosen`, \
                 `rejected`): found {}",
                named(fields.keys().map(String::as_str))
            ))
        }
    }

    /// # Errors
    /// Describes the fault in the record.
    pub fn read(self, record: Value) -> Result<Record, String> {
        match self {
            Self::Comparisons => Comparison::of(record).and_then(of_comparison),
            Self::Preference => of_preference(record.as_object().ok_or(NO_OBJECT)?),
        }
    }
}

/// Names from an untrusted file, for a message.
pub fn named<'a>(names: impl Iterator<Item = &'a str>) -> String {
    const MOST: usize = 12;
    let mut told: Vec<String> = names.take(MOST + 1).map(|name| crate::table::cut(&printable(name), 40)).collect();
    if told.len() > MOST {
        told[MOST] = "…".to_owned();
    }
    if told.is_empty() { "no field".to_owned() } else { told.join(", ") }
}

fn of_comparison(comparison: Comparison) -> Result<Record, String> {
    let info = comparison.info;
    let Some(post) = info.post.filter(|post| !post.trim().is_empty()) else {
        return match info.article {
            Some(_) => Ok(Record::Article),
            None => Err("`info.post` is missing or empty".to_owned()),
        };
    };
    let place = comparison.choice;
    let [first, second]: [_; 2] = comparison
        .summaries
        .try_into()
        .map_err(|all: Vec<_>| format!("`summaries` holds {}, expected 2", all.len()))?;
    let text = |text: &str, name: &str| summary(text, &format!("summaries[{name}].text"));
    let (a, b) = (text(&first.text, "0")?, text(&second.text, "1")?);
    let (chosen, rejected) = if place == 0 { (a, b) } else { (b, a) };
    let (subreddit, title) = (info.subreddit.unwrap_or_default(), info.title.unwrap_or_default());
    let choice = choice(Parts { subreddit: &subreddit, title: &title, post: &post }, chosen, rejected)?;
    Ok(Record::Choice(Box::new(Choice {
        post_id: Some(one_line(&info.id)).filter(|id| !id.is_empty()),
        about: Some(About {
            place,
            policies: [first.policy, second.policy],
            worker: comparison.worker.map(|worker| one_line(&worker)),
            batch: comparison.batch,
            split: comparison.split,
            confidence: comparison.extra.and_then(|extra| extra.confidence),
        }),
        ..choice
    })))
}

fn of_preference(fields: &Map<String, Value>) -> Result<Record, String> {
    let answer = |name: &str| said(fields.get(name), name, "assistant");
    let (chosen, rejected) = (answer("chosen")?, answer("rejected")?);
    let prompt = match fields.get("prompt") {
        // The prompt may be part of the conversation.
        None if fields.get("chosen").is_some_and(Value::is_array) => said(fields.get("chosen"), "chosen", "user")?,
        prompt => said(prompt, "prompt", "user")?,
    };
    let (chosen, rejected) = (summary(chosen, "chosen")?, summary(rejected, "rejected")?);
    let prompt = clean(prompt);
    match Parts::parse(&prompt) {
        Some(parts) => Ok(Record::Choice(Box::new(choice(parts, chosen, rejected)?))),
        None if is_article(&prompt) => Ok(Record::Article),
        None => Err("`prompt` does not read SUBREDDIT: … TITLE: … POST: …".to_owned()),
    }
}

/// A plain text, or the last message of `role` in a list of messages.
fn said<'a>(value: Option<&'a Value>, name: &str, role: &str) -> Result<&'a str, String> {
    match value {
        None => Err(format!("`{name}` is missing")),
        Some(Value::Null) => Err(format!("`{name}` is null")),
        Some(Value::String(text)) => Ok(text),
        Some(Value::Array(messages)) => {
            let last = messages.iter().rev().find(|message| message["role"] == role);
            let last = last.ok_or_else(|| format!("`{name}` holds no message of role `{role}`"))?;
            last["content"].as_str().ok_or_else(|| format!("`{name}`: the content of a message is no text"))
        }
        Some(Value::Object(_)) => Err(format!("`{name}` holds an object, expected a text or a list of messages")),
        Some(other) => Err(format!("`{name}` is no text: {other}")),
    }
}

/// Starts of article prompts in data sets that mix posts with CNN/DailyMail.
fn is_article(prompt: &str) -> bool {
    ["Article:", "TITLE:"].iter().any(|label| prompt.get(..label.len()).is_some_and(|h| h.eq_ignore_ascii_case(label)))
}

fn choice(parts: Parts<'_>, chosen: String, rejected: String) -> Result<Choice, String> {
    let post = clean(parts.post);
    if post.is_empty() {
        return Err("the post is empty".to_owned());
    }
    let (subreddit, title) = (one_line(parts.subreddit), one_line(parts.title));
    let prompt = Parts { subreddit: &subreddit, title: &title, post: &post }.text();
    Ok(Choice { prompt, post, chosen, rejected, ..Choice::default() })
}

fn summary(text: &str, name: &str) -> Result<String, String> {
    let bare = bare_summary(&printable(text)).to_owned();
    if bare.is_empty() { Err(format!("`{name}` is empty")) } else { Ok(bare) }
}

fn clean(text: &str) -> String {
    printable(text).trim().to_owned()
}

fn one_line(text: &str) -> String {
    clean(text).replace(['\n', '\t'], " ")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(record: Value) -> Result<Choice, String> {
        match Format::of(&record)?.read(record)? {
            Record::Choice(choice) => Ok(*choice),
            Record::Article => Err("an article".to_owned()),
        }
    }

    #[test]
    fn one_comparison_reads_the_same_from_every_source() {
        let expected = Choice {
            prompt: "Subreddit: r/tifu\nTITLE: My day\nPOST: I fell.\n\nThen I got up.\nTL;DR:".into(),
            post: "I fell.\n\nThen I got up.".into(),
            chosen: "fell, got up".into(),
            rejected: "fell".into(),
            ..Choice::default()
        };
        let [user, good, bad] = [
            ("user", "SUBREDDIT: r/tifu\n\nTITLE: My day\n\nPOST: I fell.\n\nThen I got up.\n\nTL;DR:"),
            ("assistant", "fell, got up"),
            ("assistant", "fell"),
        ]
        .map(|(role, content)| json!({ "role": role, "content": content }));
        let prompt = &user["content"];
        for record in [
            json!({ "prompt": "SUBREDDIT: r/tifu\nTITLE: My day\nPOST: I fell.\n\nThen I got up.",
                "chosen": "TL;DR:  fell, got up", "rejected": "TL;DR: fell" }),
            json!({ "prompt": prompt, "chosen": " fell, got up", "rejected": " fell" }),
            json!({ "prompt": [user], "chosen": [good], "rejected": [bad] }),
            json!({ "prompt": prompt, "chosen": [user, good], "rejected": [user, bad] }),
            json!({ "chosen": [user, good], "rejected": [user, bad] }),
        ] {
            assert_eq!(read(record.clone()).as_ref(), Ok(&expected), "{record}");
        }
        let full = json!({
            "info": { "id": "t3_1", "post": "I fell.\r\n\r\nThen I got up.\n", "title": "My\nday", "subreddit": "tifu",
                "site": null, "article": null },
            "summaries": [{ "text": " fell", "policy": "sup2", "note": null }, { "text": " fell, got up\n" }],
            "choice": 1, "worker": "w", "batch": "batch5", "split": "train", "extra": { "confidence": 8 }
        });
        let found = read(full).unwrap();
        let about = About {
            place: 1,
            policies: [Some("sup2".into()), None],
            worker: Some("w".into()),
            batch: Some("batch5".into()),
            split: Some("train".into()),
            confidence: Some(8.0),
        };
        assert_eq!(found, Choice { post_id: Some("t3_1".into()), about: Some(about), ..expected });
    }

    #[test]
    fn articles_are_told_from_posts_in_every_layout() {
        let texts = [json!("a"), json!("b")];
        for prompt in ["Article:\nA shop burned.\n\nTL;DR:", "TITLE: Fire\n\nA shop burned.\n\nTL;DR:"] {
            let error = read(json!({ "prompt": prompt, "chosen": texts[0], "rejected": texts[1] })).unwrap_err();
            assert_eq!(error, "an article");
        }
        let record = json!({ "info": { "id": "x", "article": "A shop burned.", "post": null },
            "summaries": [{ "text": "a" }, { "text": "b" }], "choice": 0 });
        assert_eq!(read(record).unwrap_err(), "an article");
    }

    #[test]
    fn what_no_layout_has_is_told_with_what_was_found() {
        let fault = |record| read(record).unwrap_err();
        assert_eq!(fault(json!([1])), "expected one JSON object a line");
        assert!(fault(json!({ "question": "q", "answer\u{1b}[2J": "a" })).ends_with("found question, answer[2J"));
        assert!(fault(json!({})).ends_with("found no field"));
        let prompt = "SUBREDDIT: r/x\nTITLE: t\nPOST: p";
        for (record, told) in [
            (json!({ "chosen": "a", "rejected": "b" }), "`prompt` is missing"),
            (json!({ "prompt": "what?", "chosen": "a", "rejected": "b" }), "does not read SUBREDDIT"),
            (json!({ "prompt": "POST: \nTL;DR:", "chosen": "a", "rejected": "b" }), "the post is empty"),
            (json!({ "prompt": prompt, "chosen": null, "rejected": "b" }), "`chosen` is null"),
            (json!({ "prompt": prompt, "chosen": 3, "rejected": "b" }), "`chosen` is no text: 3"),
            (json!({ "prompt": prompt, "chosen": { "a": 1 }, "rejected": "b" }), "`chosen` holds an object"),
            (json!({ "prompt": prompt, "chosen": [], "rejected": "b" }), "holds no message of role `assistant`"),
            (json!({ "prompt": prompt, "chosen": ["a"], "rejected": "b" }), "holds no message of role `assistant`"),
            (json!({ "prompt": prompt, "chosen": [{ "role": "assistant" }], "rejected": "b" }), "is no text"),
            (json!({ "prompt": prompt, "chosen": "a", "rejected": "TL;DR: \u{0}" }), "`rejected` is empty"),
        ] {
            let found = fault(record.clone());
            assert!(found.contains(told), "{record}: {found}");
        }
    }

    #[test]
    fn a_comparison_with_a_wrong_choice_or_an_empty_text_says_which() {
        let record = |choice: Value, text: &str, post: &str| json!({ "info": { "id": "x", "post": post }, "summaries": [{ "text": "a" }, { "text": text }], "choice": choice });
        for (record, told) in [
            (record(json!(2), "b", "p"), "`choice` is 2, expected 0 or 1"),
            (record(json!(-1), "b", "p"), "not a comparison"),
            (record(json!("1"), "b", "p"), "not a comparison"),
            (record(json!(null), "b", "p"), "not a comparison"),
            (record(json!(1), " \n", "p"), "`summaries[1].text` is empty"),
            (record(json!(1), "b", "\t"), "`info.post` is missing or empty"),
            (json!({ "info": {}, "choice": 0 }), "not a comparison: missing field"),
        ] {
            let found = read(record.clone()).unwrap_err();
            assert!(found.contains(told), "{record}: {found}");
        }
    }
}
