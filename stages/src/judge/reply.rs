//! The result for each document of a request. Answers are parsed again at every read, so a better parser costs nothing.

use crate::table::cut;
use crate::text::clean::printable;
use crate::types::Outcome;

/// The result for one document.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reply {
    /// Position of the better summary, 1 or 2.
    Label(u8),
    /// The answers to several questions outweigh each other.
    Tie,
    Refused,
    Truncated,
    Unparsable,
    /// The API rejected the request.
    Failed,
}

impl Reply {
    pub fn outcome(self) -> Outcome {
        match self {
            Self::Label(_) => Outcome::Labelled,
            Self::Tie => Outcome::Tie,
            Self::Refused => Outcome::Refused,
            Self::Truncated => Outcome::Truncated,
            Self::Unparsable => Outcome::Unparsable,
            Self::Failed => Outcome::Failed,
        }
    }
}

/// The answer to one question about a pair.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Answer {
    /// Of the question.
    pub weight: f64,
    pub reply: Reply,
    /// The probability that the first summary is better, if known.
    pub first_wins: Option<f64>,
}

/// The mean of values, each after its weight.
pub fn weighted_mean(values: impl Iterator<Item = (f64, f64)> + Clone) -> f64 {
    let all: f64 = values.clone().map(|(weight, _)| weight).sum();
    values.map(|(weight, value)| weight / all * value).sum()
}

/// Whether a probability is a half. Weights such as 0.1 and 0.2 sum to their whole but for rounding.
pub fn is_even(p: f64) -> bool {
    (p - 0.5).abs() < 1e-9
}

/// The weighted verdict of the answers to a pair's questions: of the probabilities if all are known, otherwise of the
/// votes. An answer that is missing leaves none. Returns the probability of the label, if known.
pub fn verdict(answers: &[Answer]) -> (Reply, Option<f64>) {
    if let Some(missing) = answers.iter().find(|answer| !matches!(answer.reply, Reply::Label(_))) {
        return (missing.reply, None);
    }
    let vote = |answer: &Answer| if answer.reply == Reply::Label(1) { 1.0 } else { 0.0 };
    let are_known = answers.iter().all(|answer| answer.first_wins.is_some());
    let value = |answer: &Answer| answer.first_wins.filter(|_| are_known).unwrap_or_else(|| vote(answer));
    let first = weighted_mean(answers.iter().map(|answer| (answer.weight, value(answer))));
    let confidence = are_known.then(|| first.max(1.0 - first));
    if answers.len() > 1 && is_even(first) {
        return (Reply::Tie, confidence);
    }
    (Reply::Label(if first >= 0.5 { 1 } else { 2 }), confidence)
}

/// A reason as one short, printable line.
pub fn one_line(text: &str) -> String {
    cut(&printable(text), 300)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn several_answers_are_one_weighted_vote() {
        let answer = |weight: f64, place: u8, first_wins| Answer { weight, reply: Reply::Label(place), first_wins };
        let votes = |answers: &[(f64, u8)]| {
            verdict(&answers.iter().map(|(weight, place)| answer(*weight, *place, None)).collect::<Vec<_>>())
        };
        assert_eq!(votes(&[(1.0, 2)]), (Reply::Label(2), None));
        assert_eq!(votes(&[(1.0, 1), (1.0, 2), (1.5, 2)]), (Reply::Label(2), None));
        assert_eq!(votes(&[(0.3, 1), (0.1, 2), (0.2, 2)]), (Reply::Tie, None));
        // Two doubtful answers weigh less than a sure one.
        let sure = [answer(1.0, 1, Some(0.55)), answer(1.0, 1, Some(0.55)), answer(1.0, 2, Some(0.1))];
        let (reply, confidence) = verdict(&sure);
        assert_eq!(reply, Reply::Label(2));
        assert!(confidence.is_some_and(|p| (p - 0.6).abs() < 1e-9), "{confidence:?}");
        assert_eq!(verdict(&[answer(1.0, 1, Some(0.5))]), (Reply::Label(1), Some(0.5)));
        let even = [answer(1.0, 1, Some(0.7)), answer(1.0, 2, Some(0.3))];
        assert_eq!(verdict(&even), (Reply::Tie, Some(0.5)));
        let missing = [answer(1.0, 1, None), Answer { reply: Reply::Unparsable, ..answer(1.0, 1, None) }];
        assert_eq!(verdict(&missing), (Reply::Unparsable, None));
    }
}
