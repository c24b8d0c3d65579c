//! Filters of human labels by batch, split, worker, policy and confidence.

use engine::error::{Error, Result};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::formats::About;

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Filters {
    /// Batches, as patterns such as `batch[3-9]`. A pattern after `!` excludes what it matches. The same holds for all
    /// four lists.
    pub batch: Vec<String>,
    pub split: Vec<String>,
    pub worker: Vec<String>,
    /// Policies that wrote the summaries; both summaries of a pair must match.
    pub policy: Vec<String>,
    /// Ranges of the recorded confidence, ends included: `[[7, 9]]`, or `[[1, 3], [7, 9]]` for a scale that runs from
    /// one summary to the other.
    pub confidence: Vec<[f64; 2]>,
}

crate::words! {
    /// Reason why a readable row gives no preference of its own.
    pub enum Reason {
        Article = "articles",
        Batch = "filtered_batch",
        Split = "filtered_split",
        Worker = "filtered_worker",
        Policy = "filtered_policy",
        Confidence = "filtered_confidence",
        /// Its post is one of those in `exclude`.
        HeldOut = "held_out_dropped",
        Duplicate = "duplicates",
        /// Another label of a pair whose majority counts.
        Merged = "merged_labels",
    }
}

impl Filters {
    /// Faults by field.
    pub fn check(&self) -> Vec<(String, String)> {
        let mut faults = Vec::new();
        for (field, patterns) in self.lists() {
            for pattern in patterns {
                if let Err(what) = Patterns::of(std::slice::from_ref(pattern)) {
                    faults.push((format!("filters.{field}"), what));
                }
            }
        }
        if let Some([low, high]) = self.confidence.iter().find(|[low, high]| low > high) {
            let what = format!("expected ranges with the lower end first, found [{low}, {high}]");
            faults.push(("filters.confidence".to_owned(), what));
        }
        faults
    }

    fn lists(&self) -> [(&'static str, &[String]); 4] {
        [("batch", &self.batch), ("split", &self.split), ("worker", &self.worker), ("policy", &self.policy)]
    }
}

/// The compiled [`Filters`].
pub struct RowFilter {
    lists: [Patterns; 4],
    confidence: Vec<[f64; 2]>,
}

impl RowFilter {
    /// # Errors
    /// If a pattern is invalid.
    pub fn new(filters: &Filters) -> Result<Self> {
        let [batch, split, worker, policy] = filters
            .lists()
            .map(|(field, list)| Patterns::of(list).map_err(|e| Error::user(format!("`filters.{field}`: {e}"))));
        Ok(Self { lists: [batch?, split?, worker?, policy?], confidence: filters.confidence.clone() })
    }

    /// Whether nothing is filtered.
    pub fn is_open(&self) -> bool {
        self.confidence.is_empty() && self.lists.iter().all(|list| list.these.is_empty() && list.not.is_empty())
    }

    /// The reason to drop a label, if any. A label without a filtered field is dropped.
    pub fn drops(&self, about: &About) -> Option<Reason> {
        let [batch, split, worker, policy] = &self.lists;
        let [first, second] = &about.policies;
        let confident = |c: f64| self.confidence.iter().any(|[low, high]| (*low..=*high).contains(&c));
        [
            (batch.holds(about.batch.as_deref()), Reason::Batch),
            (split.holds(about.split.as_deref()), Reason::Split),
            (worker.holds(about.worker.as_deref()), Reason::Worker),
            (policy.holds(first.as_deref()) && policy.holds(second.as_deref()), Reason::Policy),
            (self.confidence.is_empty() || about.confidence.is_some_and(confident), Reason::Confidence),
        ]
        .into_iter()
        .find_map(|(holds, reason)| (!holds).then_some(reason))
    }
}

/// One list of patterns: included (everything if empty) and excluded.
struct Patterns {
    these: Vec<glob::Pattern>,
    not: Vec<glob::Pattern>,
}

impl Patterns {
    fn of(patterns: &[String]) -> Result<Self, String> {
        let mut wanted = Self { these: Vec::new(), not: Vec::new() };
        for text in patterns {
            let (list, bare) = match text.strip_prefix('!') {
                Some(bare) => (&mut wanted.not, bare),
                None => (&mut wanted.these, text.as_str()),
            };
            if bare.is_empty() {
                return Err(format!("`{text}` matches nothing"));
            }
            list.push(glob::Pattern::new(bare).map_err(|e| format!("`{text}`: {e}"))?);
        }
        Ok(wanted)
    }

    fn holds(&self, value: Option<&str>) -> bool {
        let any = |list: &[glob::Pattern]| value.is_some_and(|value| list.iter().any(|p| p.matches(value)));
        (self.these.is_empty() || any(&self.these)) && !any(&self.not)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn about() -> About {
        About {
            policies: [Some("sup4".into()), Some("ref".into())],
            worker: Some("w1".into()),
            batch: Some("batch7".into()),
            split: Some("valid2".into()),
            confidence: Some(8.0),
            ..About::default()
        }
    }

    fn drops(filters: serde_json::Value, about: &About) -> Option<Reason> {
        let filters: Filters = serde_json::from_value(filters).unwrap();
        assert_eq!(filters.check(), []);
        RowFilter::new(&filters).unwrap().drops(about)
    }

    #[test]
    fn each_filter_drops_by_its_own_reason_and_patterns_leave_out() {
        for (filters, expected) in [
            (json!({}), None),
            (json!({ "batch": ["batch[3-9]", "batch1?"] }), None),
            (json!({ "batch": ["batch[3-6]"] }), Some(Reason::Batch)),
            (json!({ "batch": ["!batch7"] }), Some(Reason::Batch)),
            (json!({ "split": ["valid*"] }), None),
            (json!({ "split": ["train"] }), Some(Reason::Split)),
            (json!({ "worker": ["!w2"] }), None),
            (json!({ "worker": ["w*", "!w1"] }), Some(Reason::Worker)),
            (json!({ "policy": ["sup*", "ref"] }), None),
            (json!({ "policy": ["sup*"] }), Some(Reason::Policy)),
            (json!({ "policy": ["!ref"] }), Some(Reason::Policy)),
            (json!({ "confidence": [[1, 3], [8, 9]] }), None),
            (json!({ "confidence": [[1, 7.5]] }), Some(Reason::Confidence)),
        ] {
            assert_eq!(drops(filters.clone(), &about()), expected, "{filters}");
        }
    }

    #[test]
    fn a_label_that_does_not_say_is_dropped_where_it_is_asked() {
        let silent = About::default();
        assert_eq!(drops(json!({ "batch": ["*"] }), &silent), Some(Reason::Batch));
        assert_eq!(drops(json!({ "confidence": [[0, 9]] }), &silent), Some(Reason::Confidence));
        assert_eq!(drops(json!({ "worker": ["!w1"] }), &silent), None);
    }

    #[test]
    fn faults_in_filters_are_told_by_field() {
        let filters: Filters =
            serde_json::from_value(json!({ "batch": ["a[", "!"], "policy": [""], "confidence": [[9, 1]] })).unwrap();
        let fields: Vec<String> = filters.check().into_iter().map(|(field, _)| field).collect();
        assert_eq!(fields, ["filters.batch", "filters.batch", "filters.policy", "filters.confidence"]);
    }
}
