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

/// The weighted verdict of the answers to a pair's questions, each as (weight, reply, probability that the first summary
/// is better): of the probabilities if all are known, otherwise of the votes. An answer that is missing leaves none.
/// Returns the probability of the label, if known.
pub fn verdict(answers: &[(f64, Reply, Option<f64>)]) -> (Reply, Option<f64>) {
    if let Some((_, missing, _)) = answers.iter().find(|(_, reply, _)| !matches!(reply, Reply::Label(_))) {
        return (*missing, None);
    }
    let all: f64 = answers.iter().map(|(weight, ..)| weight).sum();
    let probabilities: Option<Vec<f64>> = answers.iter().map(|(weight, _, p)| Some(weight / all * (*p)?)).collect();
    let first = match &probabilities {
        Some(weighted) => weighted.iter().sum(),
        None => answers.iter().filter(|(_, reply, _)| *reply == Reply::Label(1)).map(|(w, ..)| w / all).sum::<f64>(),
    };
    let confidence = probabilities.map(|_| first.max(1.0 - first));
    // Weights such as 0.1 and 0.2 sum to their whole but for rounding.
    if answers.len() > 1 && (first - 0.5).abs() < 1e-9 {
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
        let votes = |answers: &[(f64, u8)]| {
            verdict(&answers.iter().map(|(w, place)| (*w, Reply::Label(*place), None)).collect::<Vec<_>>())
        };
        assert_eq!(votes(&[(1.0, 2)]), (Reply::Label(2), None));
        assert_eq!(votes(&[(1.0, 1), (1.0, 2), (1.5, 2)]), (Reply::Label(2), None));
        assert_eq!(votes(&[(0.3, 1), (0.1, 2), (0.2, 2)]), (Reply::Tie, None));
        // Two doubtful answers weigh less than a sure one.
        let sure =
            [(1.0, Reply::Label(1), Some(0.55)), (1.0, Reply::Label(1), Some(0.55)), (1.0, Reply::Label(2), Some(0.1))];
        let (reply, confidence) = verdict(&sure);
        assert_eq!(reply, Reply::Label(2));
        assert!(confidence.is_some_and(|p| (p - 0.6).abs() < 1e-9), "{confidence:?}");
        assert_eq!(verdict(&[(1.0, Reply::Label(1), Some(0.5))]), (Reply::Label(1), Some(0.5)));
        let missing = [(1.0, Reply::Label(1), None), (1.0, Reply::Unparsable, None)];
        assert_eq!(verdict(&missing), (Reply::Unparsable, None));
    }
}
