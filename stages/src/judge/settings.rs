//! Everything that determines an answer except the document, including the files named in the parameters.

use engine::error::{At, Error, Result};
use engine::external::InputPath;
use serde_json::{Value, json};

use super::params::{Choice, Effort, Params, Thinking};
use super::template::{EXAMPLES, Example, TEMPLATE, Template, examples};

/// Raise with any change of the request for the same settings, because another request gives other answers.
const REQUEST: u32 = 2;

#[derive(Clone, Debug)]
pub struct Settings {
    pub model: String,
    pub documents_per_request: usize,
    pub template: Template,
    pub examples: Vec<Example>,
    pub choice: Choice,
    pub max_tokens: u32,
    pub thinking: Thinking,
    pub effort: Option<Effort>,
    pub temperature: Option<f64>,
    pub top_p: Option<f64>,
    pub top_k: Option<u32>,
    template_text: String,
}

impl Settings {
    /// # Errors
    /// If a file cannot be read or is invalid (already reported in planning).
    pub fn load(params: &Params) -> Result<Self> {
        let text = |file: &Option<InputPath>, ours: &str| match file {
            Some(InputPath(path)) => engine::text::read(path).at(path),
            None => Ok(ours.to_owned()),
        };
        let faulty = |field: &str, faults: Vec<String>| Error::yours(format!("`{field}`: {}", faults.join("; ")));
        let template_text = text(&params.template, TEMPLATE)?;
        Ok(Self {
            model: params.model.clone(),
            documents_per_request: params.documents_per_request,
            template: Template::parse(&template_text).map_err(|faults| faulty("template", faults))?,
            examples: examples(&text(&params.examples, EXAMPLES)?).map_err(|faults| faulty("examples", faults))?,
            choice: params.choice,
            max_tokens: params.max_tokens,
            thinking: params.thinking,
            effort: params.effort,
            temperature: params.temperature,
            top_p: params.top_p,
            top_k: params.top_k,
            template_text,
        })
    }

    /// The JSON document that is hashed into the keys of answers.
    pub fn asked(&self) -> Value {
        json!({
            "request": REQUEST,
            "model": self.model,
            "documents_per_request": self.documents_per_request,
            "choice": self.choice,
            "max_tokens": self.max_tokens,
            "thinking": self.thinking,
            "effort": self.effort,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "template": self.template_text,
            "examples": self.examples,
        })
    }

    /// BLAKE3 of [`Settings::asked`].
    pub fn fingerprint(&self) -> [u8; 32] {
        *blake3::hash(self.asked().to_string().as_bytes()).as_bytes()
    }

    /// The number of the first document after the examples.
    pub fn first(&self) -> usize {
        self.examples.len() + 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_byte_order_mark_in_a_file_changes_no_question() {
        let folder = tempfile::tempdir().unwrap();
        let fingerprint = |mark: &str| {
            let file = |name: &str, text: &str| {
                let path = folder.path().join(name);
                std::fs::write(&path, format!("{mark}{text}")).unwrap();
                Some(InputPath(path))
            };
            let mut params: Params = serde_json::from_value(json!({ "model": "m" })).unwrap();
            params.template = file("template.txt", TEMPLATE);
            params.examples = file("examples.jsonl", EXAMPLES);
            assert_eq!(params.file_faults(), []);
            Settings::load(&params).unwrap().fingerprint()
        };
        assert_eq!(fingerprint("\u{feff}"), fingerprint(""));
    }
}
