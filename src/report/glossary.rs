//! Definitions of the page's own terms, shown for the terms that the page uses.

use super::html::escape;

/// (term, lower-case words that stand for it on the page, meaning).
const TERMS: [(&str, &[&str], &str); 11] = [
    (
        "arm",
        &["arm", "arms"],
        "One setting of the RL stage: objective and parameters. Runs of one arm differ in their seed alone.",
    ),
    (
        "proxy",
        &["proxy"],
        "The reward that the policy is trained on: what the arm's objective makes of its reward models' scores, before the KL penalty.",
    ),
    (
        "gold",
        &["gold"],
        "A larger reward model in the place of a human judge. It labels the pairs that the proxy reward models learn from and \
         judges the policies' samples; RL never reads it.",
    ),
    (
        "true quality",
        &["true quality"],
        "A score of a summary computed from the facts that its invented post was made from, at most 1: facts told, less facts \
         told wrongly, bad grammar, repetition and a missing end.",
    ),
    (
        "half A, half B",
        &["half a", "half b", "chosen on a"],
        "The held-out prompts in two parts, by a hash of the post's id. Steps are chosen on half A; the numbers come from half B.",
    ),
    (
        "SFT deviations (SFT sd)",
        &["sft deviations", "sft sd"],
        "Gold reward less its mean over the SFT model's samples, divided by the standard deviation of the gold reward over those samples.",
    ),
    (
        "fact sensitivity",
        &["fact sensitivity"],
        "Mean score of reference summaries less that of the same summaries with facts swapped, with its 95% interval. A model \
         whose interval lies above 0 reads the post.",
    ),
    (
        "KL",
        &["kl"],
        "How far the policy is from the SFT model that it started from: the sum over a response's tokens of \
         log policy less log SFT, averaged over sampled responses, in nats.",
    ),
    (
        "s²",
        &["s²", "s2", "variance"],
        "Variance of the ensemble members' scores of one response: the reward's uncertainty.",
    ),
    (
        "c",
        &["c/λ", "c/lambda", "mean(1 − c)", "mean(c)"],
        "The adaptive objective's weight of the KL penalty, s² / (b + s²): its reward is (1 − c) · mean score − c · KL. \
         b is set on the first batch so that c is about λ there.",
    ),
    (
        "λ (lambda)",
        &["λ", "lambda", "lambda_effective"],
        "The weight of the KL penalty in the other objectives, and where the adaptive c starts.",
    ),
];

/// The terms that occur in `words`, the page's text in lower case; empty if none does.
pub fn glossary(words: &str) -> String {
    let entries: String = TERMS
        .iter()
        .filter(|(_, needles, _)| needles.iter().any(|needle| occurs(words, needle)))
        .map(|(term, _, meaning)| format!("<dt>{}</dt><dd>{}</dd>", escape(term), escape(meaning)))
        .collect();
    if entries.is_empty() { entries } else { format!("<dl>{entries}</dl>") }
}

/// Whether `needle` occurs in `text` as a whole word.
fn occurs(text: &str, needle: &str) -> bool {
    let is_word = |c: Option<char>| c.is_some_and(|c| c.is_alphanumeric() || c == '_');
    text.match_indices(needle).any(|(at, found)| {
        !is_word(text[..at].chars().next_back()) && !is_word(text[at + found.len()..].chars().next())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_terms_of_the_page_are_explained() {
        let terms = |words: &str| {
            let html = glossary(words);
            TERMS
                .iter()
                .filter(|(term, ..)| html.contains(&format!("<dt>{}</dt>", escape(term))))
                .map(|t| t.0)
                .collect::<Vec<_>>()
        };
        assert_eq!(terms("stages alarm swarm golden klaxon"), [""; 0]);
        assert_eq!(terms("the gold model of each arm"), ["arm", "gold"]);
        assert_eq!(terms("kl by phase, c/λ max"), ["KL", "c", "λ (lambda)"]);
        assert_eq!(glossary("nothing"), "");
    }
}
