//! The instructions of a judge: the paper's request (A.2), or several questions about each pair. Pure.

use std::collections::BTreeSet;

use engine::error::{AtPath, Error, Result};
use engine::external::InputPath;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::document::Document;
use super::template::{EXAMPLES, Example, QUESTIONS, TEMPLATE, Template, examples};

/// A question about each pair: an entry of the parameter `questions`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Criterion {
    /// A short name of letters, digits and underscores, such as `accurate`.
    pub name: String,
    /// The question, such as `Which summary says only what the post says?`.
    pub text: String,
    /// The weight of its answer.
    #[serde(default = "one")]
    pub weight: f64,
}

fn one() -> f64 {
    1.0
}

/// Most questions about one pair.
const MAX_CRITERIA: usize = 8;

/// Faults of questions, each as (field, message).
pub fn faults(questions: &[Criterion]) -> Vec<(String, String)> {
    let mut faults = Vec::new();
    let mut names = BTreeSet::new();
    if questions.len() > MAX_CRITERIA {
        faults.push(("questions".to_owned(), format!("expected at most {MAX_CRITERIA}")));
    }
    for (i, Criterion { name, text, weight }) in questions.iter().enumerate() {
        let mut fault = |wrong: bool, field: &str, what: &str| {
            if wrong {
                faults.push((format!("questions[{i}].{field}"), what.to_owned()));
            }
        };
        let is_name = (1..=40).contains(&name.len()) && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_');
        fault(!is_name, "name", "expected 1 to 40 letters, digits and underscores");
        fault(!names.insert(name), "name", "another question has this name");
        fault(text.trim().is_empty(), "text", "expected a question");
        fault(!(*weight > 0.0 && weight.is_finite()), "weight", "expected a number above 0");
    }
    faults
}

/// A turn of the conversation with the judge.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Message {
    pub role: &'static str,
    pub content: String,
}

/// The part of a request that is the same for all documents.
#[derive(Clone, Debug)]
pub struct Instructions {
    template: Template,
    /// The template's text, which is part of the key of answers.
    pub template_text: String,
    pub examples: Vec<Example>,
    pub rubric: Option<String>,
    /// Empty: the one question of the template.
    pub criteria: Vec<Criterion>,
}

impl Instructions {
    /// # Errors
    /// If a file cannot be read or is invalid (already reported in planning).
    pub fn load(
        template: Option<&InputPath>,
        examples_file: Option<&InputPath>,
        rubric: Option<&str>,
        criteria: &[Criterion],
    ) -> Result<Self> {
        let text = |file: Option<&InputPath>, ours: &str| match file {
            Some(InputPath(path)) => engine::text::read(path).at(path),
            None => Ok(ours.to_owned()),
        };
        let faulty = |field: &str, faults: Vec<String>| Error::user(format!("`{field}`: {}", faults.join("; ")));
        let template_text = text(template, if criteria.is_empty() { TEMPLATE } else { QUESTIONS })?;
        Ok(Self {
            template: Template::parse(&template_text).map_err(|faults| faulty("template", faults))?,
            template_text,
            examples: examples(&text(examples_file, EXAMPLES)?).map_err(|faults| faulty("examples", faults))?,
            rubric: rubric.map(|rubric| rubric.trim().to_owned()).filter(|rubric| !rubric.is_empty()),
            criteria: criteria.to_vec(),
        })
    }

    /// The number of the first document after the examples.
    pub fn first(&self) -> usize {
        self.examples.len() + 1
    }

    /// Number of questions about each pair.
    pub fn criteria_per_pair(&self) -> usize {
        self.criteria.len().max(1)
    }

    /// The weights of the questions about a pair, in order.
    pub fn weights(&self) -> Vec<f64> {
        if self.criteria.is_empty() {
            vec![1.0]
        } else {
            self.criteria.iter().map(|criterion| criterion.weight).collect()
        }
    }

    /// The fields of an answer about document `n`, one per question.
    pub fn fields(&self, n: usize) -> Vec<String> {
        match &self.criteria[..] {
            [] => vec![format!("doc.{n}.chosen.summary")],
            criteria => criteria.iter().map(|criterion| format!("doc.{n}.{}", criterion.name)).collect(),
        }
    }

    /// The fields of an answer about `documents` documents, one per document and question.
    pub fn all_fields(&self, documents: usize) -> Vec<String> {
        (0..documents).flat_map(|i| self.fields(self.first() + i)).collect()
    }

    /// The worked examples as turns: the same for all requests with the same settings.
    pub fn worked_examples(&self) -> Vec<Message> {
        let mut messages = Vec::with_capacity(2 * self.examples.len());
        for (i, example) in self.examples.iter().enumerate() {
            let text = self.template.document(i + 1, &example.document());
            let head = if i == 0 { self.head() } else { String::new() };
            let content = paragraphs(&[&head, &text, &self.template.tail]);
            messages.push(Message { role: "user", content });
            let place = |name: &str| example.answers.get(name).copied().unwrap_or(example.better);
            let places: Vec<u8> = match &self.criteria[..] {
                [] => vec![example.better],
                criteria => criteria.iter().map(|criterion| place(&criterion.name)).collect(),
            };
            let fields = self.fields(i + 1).into_iter().zip(places.into_iter().map(Value::from));
            let answer = Value::Object(fields.collect()).to_string();
            messages.push(Message { role: "assistant", content: answer });
        }
        messages
    }

    /// The turn about the documents.
    pub fn final_turn(&self, documents: &[Document]) -> Message {
        let text = |(i, document)| self.template.document(self.first() + i, document);
        let texts: Vec<String> = documents.iter().enumerate().map(text).collect();
        let head = if self.examples.is_empty() { self.head() } else { String::new() };
        Message { role: "user", content: paragraphs(&[&head, &texts.join("\n\n"), &self.template.tail]) }
    }

    /// The schema of exactly one choice for each field of `documents` documents.
    pub fn schema(&self, documents: usize) -> Value {
        let names = self.all_fields(documents);
        let properties: Map<String, Value> =
            names.iter().map(|name| (name.clone(), json!({ "type": "integer", "enum": [1, 2] }))).collect();
        json!({ "type": "object", "properties": properties, "required": names, "additionalProperties": false })
    }

    /// The template's head, the rubric and the questions.
    fn head(&self) -> String {
        let rubric = self.rubric.as_ref().map(|rubric| format!("<rubric>\n{rubric}\n</rubric>"));
        let questions = (!self.criteria.is_empty()).then(|| {
            let list: String = self.criteria.iter().map(|q| format!("- {}: {}\n", q.name, q.text.trim())).collect();
            let example = |n, place| self.fields(n).into_iter().map(move |field| (field, Value::from(place)));
            let example: Map<String, Value> = example(1, 2).chain(example(2, 1)).collect();
            format!(
                "The questions about each document:\n{list}Write one JSON object with one field for each document and question. \
                 For example, {} means that the second summary of the first document and the first summary of the second \
                 document do better in everything.",
                Value::Object(example)
            )
        });
        paragraphs(&[&self.template.head, &rubric.unwrap_or_default(), &questions.unwrap_or_default()])
    }

    /// The parts of `self` that are beside the template and the examples, for the document that is hashed into the keys
    /// of answers. Weights change no answer.
    pub fn add_to(&self, asked: &mut Value) {
        if let Some(rubric) = &self.rubric {
            asked["rubric"] = json!(rubric);
        }
        if !self.criteria.is_empty() {
            let questions = self.criteria.iter().map(|q| json!({ "name": q.name, "text": q.text.trim() }));
            asked["questions"] = questions.collect();
        }
    }
}

fn paragraphs(parts: &[&str]) -> String {
    parts.iter().filter(|part| !part.is_empty()).copied().collect::<Vec<_>>().join("\n\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn criterion(name: &str, weight: f64) -> Criterion {
        Criterion { name: name.to_owned(), text: format!("Which one is {name}?"), weight }
    }

    #[test]
    fn questions_have_distinct_names_and_positive_weights() {
        let fields =
            |questions: &[Criterion]| faults(questions).into_iter().map(|(field, _)| field).collect::<Vec<_>>();
        assert_eq!(fields(&[criterion("accurate", 2.0), criterion("covers_most", 0.5)]), [""; 0]);
        assert_eq!(fields(&[criterion("a", 1.0), criterion("a", 0.0)]), ["questions[1].name", "questions[1].weight"]);
        assert_eq!(fields(&[criterion("doc.1", f64::NAN)]), ["questions[0].name", "questions[0].weight"]);
        assert_eq!(fields(&(0..9).map(|i| criterion(&format!("q{i}"), 1.0)).collect::<Vec<_>>()), ["questions"]);
    }

    #[test]
    fn each_question_has_a_field_per_document_and_examples_answer_it() {
        let criteria = [criterion("accurate", 1.0), criterion("covers", 2.0)];
        let mut instructions = Instructions::load(None, None, Some(" Facts first.\n"), &criteria).unwrap();
        instructions.examples[1].answers.insert("covers".to_owned(), 1);
        assert_eq!(instructions.all_fields(2), ["doc.3.accurate", "doc.3.covers", "doc.4.accurate", "doc.4.covers"]);
        let turns = instructions.worked_examples();
        assert!(
            turns[0]
                .content
                .contains("<rubric>\nFacts first.\n</rubric>\n\nThe questions about each document:\n- accurate")
        );
        assert!(!turns[0].content.contains("chosen.summary") && !turns[2].content.contains("rubric"));
        assert_eq!(turns[1].content, r#"{"doc.1.accurate":1,"doc.1.covers":1}"#);
        assert_eq!(turns[3].content, r#"{"doc.2.accurate":2,"doc.2.covers":1}"#);
        assert_eq!(instructions.schema(1)["required"], json!(["doc.3.accurate", "doc.3.covers"]));
        // Without examples, the instructions come with the documents.
        instructions.examples.clear();
        let document = Document { prompt: "p".into(), first: "a".into(), second: "b".into() };
        let question = instructions.final_turn(&[document]).content;
        assert!(question.starts_with("You are a helpful assistant") && question.contains("<doc.1>"), "{question}");
    }
}
