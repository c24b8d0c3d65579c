//! Selectors such as `sft`, `sft[s]`, `proxy[*,11]`, and the instances that they match.

use super::draft_index::DraftIndex;
use crate::diagnostics::did_you_mean;

/// Message and help of a selector that matches nothing.
pub type SelectError = (String, Option<String>);

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Selector<'a> {
    pub stage: &'a str,
    /// One label per dimension, `*` for any; `None`: every instance of the stage.
    pub labels: Option<Vec<&'a str>>,
}

/// The instances that a selector matches.
#[derive(Debug)]
pub enum Selection {
    Instances {
        /// Indices of drafts, in declared order.
        drafts: Vec<usize>,
        /// Whether the notation allows several instances.
        allows_many: bool,
    },
    /// The stage's matrix has faults, which have been reported.
    Faulty,
}

impl<'a> Selector<'a> {
    /// # Errors
    /// When `text` is not a valid selector.
    pub fn parse(text: &'a str) -> Result<Self, SelectError> {
        let malformed = || {
            let help = "a stage's name, with one label for each matrix variable: `sft[s]`, `proxy[*,11]`";
            (format!("`{text}` is not a selector"), Some(help.to_owned()))
        };
        let text = text.trim();
        let Some((stage, rest)) = text.split_once('[') else {
            return if text.is_empty() || text.contains([']', ',']) {
                Err(malformed())
            } else {
                Ok(Self { stage: text, labels: None })
            };
        };
        let inside = rest.strip_suffix(']').ok_or_else(malformed)?;
        let labels: Vec<&str> = inside.split(',').map(str::trim).collect();
        if labels.iter().any(|label| label.is_empty() || label.contains(['[', ']'])) {
            return Err(malformed());
        }
        Ok(Self { stage: stage.trim(), labels: Some(labels) })
    }
}

impl DraftIndex<'_> {
    /// Finds the instances that a selector matches.
    ///
    /// # Errors
    /// When there is no such stage, dimension or label.
    pub fn select(&self, selector: &Selector) -> Result<Selection, SelectError> {
        let name = selector.stage;
        let Some(&at) = self.by_name.get(name) else {
            return Err((
                format!("unknown stage `{name}`"),
                did_you_mean(name, self.document.stages.iter().map(|s| s.name.as_str())),
            ));
        };
        let stage = &self.document.stages[at];
        let drafts = self.drafts_of(at);
        if drafts.is_empty() {
            return Ok(Selection::Faulty);
        }
        let Some(labels) = &selector.labels else {
            return Ok(Selection::Instances { drafts: drafts.collect(), allows_many: !stage.matrix.is_empty() });
        };
        if stage.matrix.is_empty() {
            return Err((format!("stage `{name}` has no matrix"), Some(format!("write `{name}`"))));
        }
        if labels.len() != stage.matrix.len() {
            let expected = stage.matrix.len();
            let names: Vec<&str> = stage.matrix.iter().map(|d| d.name.as_str()).collect();
            let s = if expected == 1 { "" } else { "s" };
            let message =
                format!("stage `{name}` has {expected} matrix variable{s}, but the selector has {}", labels.len());
            return Err((message, Some(format!("write `{name}[{}]`", names.join(",")))));
        }
        // Each dimension multiplies the indices chosen so far.
        let mut chosen = vec![0];
        for (dimension, expected) in stage.matrix.iter().zip(labels) {
            let count = dimension.labels.len();
            let positions = if *expected == "*" {
                0..count
            } else {
                match dimension.labels.iter().position(|label| label.text == *expected) {
                    Some(at) => at..at + 1,
                    None if !dimension.valid => return Ok(Selection::Faulty),
                    None => {
                        let message =
                            format!("matrix variable `{}` of stage `{name}` has no value `{expected}`", dimension.name);
                        return Err((
                            message,
                            did_you_mean(expected, dimension.labels.iter().map(|l| l.text.as_str())),
                        ));
                    }
                }
            };
            chosen = chosen.iter().flat_map(|base| positions.clone().map(move |at| base * count + at)).collect();
        }
        let drafts = chosen.into_iter().map(|at| drafts.start + at).collect();
        Ok(Selection::Instances { drafts, allows_many: labels.contains(&"*") })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn selectors_are_read_or_refused() {
        let labels = |labels: &[&'static str]| Some(labels.to_vec());
        let cases = [
            ("sft", Some(("sft", None))),
            (" sft[ s , * ] ", Some(("sft", labels(&["s", "*"])))),
            ("rl[0.005]", Some(("rl", labels(&["0.005"])))),
            ("", None),
            ("sft[]", None),
            ("sft[s", None),
            ("sft[s]]", None),
            ("sft]", None),
            ("a,b", None),
        ];
        for (text, expected) in cases {
            let got = Selector::parse(text).ok().map(|s| (s.stage, s.labels));
            assert_eq!(got, expected, "{text}");
        }
    }
}
