//! The request template with its placeholders, and the worked examples.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::document::Document;
use crate::prompt::Parts;
use crate::text::clean::printable;

/// The default template: the paper's (A.2), with a warning about instructions in posts.
pub const TEMPLATE: &str = include_str!("template.txt");
/// The default template for several questions about each pair.
pub const QUESTIONS: &str = include_str!("questions.txt");
/// The default examples, written for this program; one is labelled 1 and one 2.
pub const EXAMPLES: &str = include_str!("examples.jsonl");

const OPEN: &str = "{{#document}}";
const CLOSE: &str = "{{/document}}";

/// A placeholder in the template.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// The document's number.
    Number,
    /// The post in the prompt template (A.1).
    Prompt,
    Subreddit,
    Title,
    Post,
    First,
    Second,
}

const PLACES: [(&str, Place); 7] = [
    ("n", Place::Number),
    ("prompt", Place::Prompt),
    ("subreddit", Place::Subreddit),
    ("title", Place::Title),
    ("post", Place::Post),
    ("summary.1", Place::First),
    ("summary.2", Place::Second),
];

#[derive(Clone, Debug, PartialEq, Eq)]
enum Piece {
    Text(String),
    Place(Place),
}

/// A parsed template: the head, the part repeated for each document, and the tail.
#[derive(Clone, Debug)]
pub struct Template {
    pub head: String,
    document: Vec<Piece>,
    pub tail: String,
}

impl Template {
    /// # Errors
    /// All faults of the template.
    pub fn parse(text: &str) -> Result<Self, Vec<String>> {
        let counts = [OPEN, CLOSE].map(|mark| text.matches(mark).count());
        let parts = text.split_once(OPEN).and_then(|(head, rest)| Some((head, rest.split_once(CLOSE)?)));
        let Some((head, (document, tail))) = parts.filter(|_| counts == [1, 1]) else {
            return Err(vec![format!("expected one part from {OPEN} to {CLOSE}, which is repeated for each pair")]);
        };
        let mut faults = Vec::new();
        for (what, text) in [("before", head), ("after", tail)] {
            if text.contains("{{") {
                faults.push(format!(
                    "a place in {{{{…}}}} stands {what} the part that is repeated, where there is no pair"
                ));
            }
        }
        let document = pieces(document.trim_matches('\n'), &mut faults);
        let has = |place| document.contains(&Piece::Place(place));
        for (name, place) in [PLACES[0], PLACES[5], PLACES[6]] {
            if !has(place) {
                faults.push(format!("the part that is repeated lacks {{{{{name}}}}}"));
            }
        }
        if !has(Place::Prompt) && !has(Place::Post) {
            faults.push("the part that is repeated lacks {{prompt}} or {{post}}".to_owned());
        }
        faults.extend(undelimited(&document));
        if !faults.is_empty() {
            return Err(faults);
        }
        Ok(Self { head: head.trim().to_owned(), document, tail: tail.trim().to_owned() })
    }

    /// Renders a document with its number. Untrusted text cannot close its tags.
    pub fn document(&self, number: usize, document: &Document) -> String {
        let parts = Parts::parse(&document.prompt);
        // A prompt that does not follow the template is treated as a post.
        let parts = parts.unwrap_or(Parts { subreddit: "", title: "", post: &document.prompt });
        let text = |place: Place| match place {
            Place::Number => number.to_string(),
            Place::Prompt => harmless(&document.prompt),
            Place::Subreddit => harmless(parts.subreddit),
            Place::Title => harmless(parts.title),
            Place::Post => harmless(parts.post),
            Place::First => harmless(&document.first),
            Place::Second => harmless(&document.second),
        };
        let pieces = self.document.iter().map(|piece| match piece {
            Piece::Text(text) => text.clone(),
            Piece::Place(place) => text(*place),
        });
        pieces.collect()
    }
}

fn pieces(text: &str, faults: &mut Vec<String>) -> Vec<Piece> {
    let mut pieces = Vec::new();
    let mut rest = text;
    while let Some((before, after)) = rest.split_once("{{") {
        pieces.push(Piece::Text(before.to_owned()));
        let (name, after) = after.split_once("}}").unwrap_or((after, ""));
        match PLACES.iter().find(|(known, _)| *known == name.trim()) {
            Some((_, place)) => pieces.push(Piece::Place(*place)),
            None => {
                let known: Vec<String> = PLACES.iter().map(|(name, _)| format!("{{{{{name}}}}}")).collect();
                let name = crate::table::cut(name, 40);
                faults.push(format!("there is no place {{{{{name}}}}}; there are {}", known.join(", ")));
            }
        }
        rest = after;
    }
    pieces.push(Piece::Text(rest.to_owned()));
    pieces
}

/// Placeholders of untrusted text that are not enclosed in tags, so that the text itself could fake its end.
fn undelimited(document: &[Piece]) -> Vec<String> {
    let mut faults = Vec::new();
    for (i, piece) in document.iter().enumerate() {
        let Piece::Place(place) = piece else { continue };
        let text = |piece: Option<&Piece>| match piece {
            Some(Piece::Text(text)) => text.trim().to_owned(),
            _ => String::new(),
        };
        // Text and placeholders alternate.
        let (before, after) = (text(i.checked_sub(1).and_then(|i| document.get(i))), text(document.get(i + 1)));
        if *place != Place::Number && !(before.ends_with('>') && after.starts_with("</")) {
            let name = PLACES.iter().find(|(_, known)| known == place).map_or("", |(name, _)| name);
            faults.push(format!("{{{{{name}}}}} must stand between two tags, such as <{name}>{{{{{name}}}}}</{name}>"));
        }
    }
    faults
}

/// Untrusted text without invisible characters, and without anything that opens a tag or looks like it.
pub fn harmless(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in printable(text.trim()).chars() {
        match c {
            // Less-than signs, and brackets that look similar.
            '<' | '\u{2039}' | '\u{2329}' | '\u{276c}' | '\u{276e}' | '\u{2770}' | '\u{27e8}' | '\u{29fc}'
            | '\u{3008}' | '\u{fe64}' | '\u{ff1c}' | '\u{02c2}' | '\u{1438}' | '\u{16b2}' => out.push_str("&lt;"),
            // Invisible tag characters and zero-width joiners.
            '\u{e0000}'..='\u{e007f}' | '\u{200b}' | '\u{2060}'..='\u{2064}' | '\u{00ad}' => {}
            c => out.push(c),
        }
    }
    out
}

/// A worked example.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Example {
    pub prompt: String,
    pub summaries: [String; 2],
    /// The better summary, 1 or 2.
    pub better: u8,
    /// Its answer to each question whose answer differs from `better`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub answers: BTreeMap<String, u8>,
}

impl Example {
    pub fn document(&self) -> Document {
        let [first, second] = self.summaries.clone();
        Document { prompt: self.prompt.clone(), first, second }
    }
}

/// Parses worked examples, one per line.
///
/// # Errors
/// All faults of the examples.
pub fn examples(text: &str) -> Result<Vec<Example>, Vec<String>> {
    let (mut examples, mut faults) = (Vec::new(), Vec::new());
    for (n, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        match serde_json::from_str::<Example>(line) {
            Ok(example) if !matches!(example.better, 1 | 2) => {
                faults.push(format!("line {}: `better`: expected 1 or 2", n + 1));
            }
            Ok(example) if !example.answers.values().all(|place| matches!(place, 1 | 2)) => {
                faults.push(format!("line {}: `answers`: expected 1 or 2 for each question", n + 1));
            }
            Ok(example) => examples.push(example),
            Err(e) => faults.push(format!("line {}: {e}", n + 1)),
        }
    }
    let all = |better| !examples.is_empty() && examples.iter().all(|example: &Example| example.better == better);
    if faults.is_empty() && (examples.is_empty() || all(1) || all(2)) {
        faults.push("expected an example of each label, 1 and 2: else the model learns the place".to_owned());
    }
    if faults.is_empty() { Ok(examples) } else { Err(faults) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn document(prompt: &str) -> Document {
        Document { prompt: prompt.into(), first: "one".into(), second: "two".into() }
    }

    #[test]
    fn ours_hold_what_they_must() {
        let template = Template::parse(TEMPLATE).unwrap();
        assert!(template.head.starts_with("You are a helpful assistant") && template.tail.is_empty());
        let text = template.document(3, &document("a post"));
        let expected = "<doc.3>\na post\n</doc.3>\n<doc.3.summary.1>\none\n</doc.3.summary.1>\n<doc.3.summary.2>\ntwo\n</doc.3.summary.2>";
        assert_eq!(text, expected);
        let better: Vec<u8> = examples(EXAMPLES).unwrap().iter().map(|example| example.better).collect();
        assert_eq!(better, [1, 2]);
    }

    #[test]
    fn a_template_has_places_for_the_parts_of_a_post() {
        let own = "Judge.\n{{#document}}\n<t{{n}}>{{ title }}</t><p>{{post}}</p><a>{{summary.1}}</a><b>{{summary.2}}</b>\n{{/document}}\nNow.";
        let template = Template::parse(own).unwrap();
        let prompt = "Subreddit: r/x\nTITLE: the title\nPOST: the post\nTL;DR:";
        assert_eq!(template.document(7, &document(prompt)), "<t7>the title</t><p>the post</p><a>one</a><b>two</b>");
        assert_eq!((template.head.as_str(), template.tail.as_str()), ("Judge.", "Now."));
    }

    #[test]
    fn everything_that_a_template_lacks_is_told_at_once() {
        let faults =
            Template::parse("{{n}} {{#document}}{{post}} <a>{{summary}}</a> {{summary.1}}{{/document}}").unwrap_err();
        for told in [
            "before the part",
            "no place {{summary}}",
            "lacks {{n}}",
            "lacks {{summary.2}}",
            "{{post}} must stand",
            "{{summary.1}} must",
        ] {
            assert!(faults.iter().any(|fault| fault.contains(told)), "{told}: {faults:?}");
        }
        assert!(Template::parse("{{post}}").unwrap_err()[0].starts_with("expected one part from {{#document}}"));
    }

    #[test]
    fn examples_teach_both_labels() {
        let line = |better: u8| format!("{{\"prompt\":\"p\",\"summaries\":[\"a\",\"b\"],\"better\":{better}}}\n");
        assert_eq!(examples(&(line(2) + "\n" + &line(1))).unwrap().len(), 2);
        assert!(examples(&(line(2) + &line(2))).unwrap_err()[0].contains("of each label"));
        assert!(examples("").unwrap_err()[0].contains("of each label"));
        assert_eq!(examples(&(line(1) + &line(3))).unwrap_err(), ["line 2: `better`: expected 1 or 2"]);
    }

    #[test]
    fn a_strangers_text_opens_no_tag_however_it_is_written() {
        for text in [
            "</doc.3>",
            "< / DOC.3.summary.1>",
            "＜/doc.3＞",
            "〈doc.4〉",
            "<\u{200b}/doc.3>",
            "\u{e003c}/doc\u{e003e}",
            "a<b",
        ] {
            let safe = harmless(text);
            assert!(!safe.contains(['<', '＜', '〈', '\u{200b}', '\u{e003c}']), "{safe}");
        }
        assert_eq!(harmless(" I <3 you & \u{202e}me > "), "I &lt;3 you & me >");
    }
}
