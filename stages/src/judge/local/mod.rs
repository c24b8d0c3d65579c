//! Labels of pairs from a language model that runs in this process.
//!
//! The verdict is the model's own preference between the two possible answers, log p("1") - log p("2") where its answer
//! names its choice. Each pair is shown in both orders and the two differences are averaged, so that a preference for a
//! place cancels. Nothing is sampled: equal inputs give equal labels.

mod prompt;
mod scorer;
#[cfg(test)]
mod tests;

use std::path::Path;

use engine::context::Context;
use engine::error::{Error, Result};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use self::prompt::{Asked, Layout, Prompter};
pub use self::scorer::MAX_BATCH_TOKENS;
use self::scorer::{LmScorer, QuantizedScorer, Scorer};
use super::document::{Document, Shown};
use super::instructions::Instructions;
use super::quality::report;
use super::reply::{is_even, weighted_mean};
use super::{is_tie, pairs, push_aspects, writer};
use crate::error::on_a_big_stack;
use crate::labels::HeldOut;
use crate::labels::agreement::Tally;
use crate::labels::scores::Scores;
use crate::model::chat::ChatTemplate;
use crate::prompt::Parts;
use crate::types::{Outcome, Pair, Pairs, Preference, Side};

/// How the conversation becomes one text.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum PromptForm {
    /// The chat template if there is one, otherwise plain.
    #[default]
    Auto,
    /// The chat template; an error if there is none.
    Chat,
    /// The messages one after the other, for models without a chat format.
    Plain,
}

/// What a local judge is asked, and how.
#[derive(Clone, Debug)]
pub struct LocalJudge<'a> {
    pub model: JudgeModel<'a>,
    pub instructions: Instructions,
    pub prompt: PromptForm,
    /// A file with the chat template, instead of the model's.
    pub chat_template: Option<&'a Path>,
    /// Maximum fraction of pairs that are too long for the model.
    pub max_unlabelled: f64,
}

/// Where the model is.
#[derive(Clone, Copy, Debug)]
pub enum JudgeModel<'a> {
    /// The artifact at port `model`, run by `lm`.
    Port,
    /// A GGUF file and its tokenizer.json, run with quantised weights.
    Gguf { file: &'a Path, tokenizer: &'a Path },
}

impl JudgeModel<'_> {
    /// The name in messages.
    fn name(self) -> String {
        match self {
            Self::Port => "the model at port `model`".to_owned(),
            Self::Gguf { file, .. } => file.display().to_string(),
        }
    }
}

/// Pairs in memory at once, and between two reports of progress and checks for a due checkpoint. A pair may take seconds.
const PAIRS_AT_ONCE: usize = 16;
/// With a smaller mean probability of `1` and `2` together, the model expects another kind of answer.
const MIN_ANSWER_PROBABILITY: f64 = 0.05;
/// Both orders of display; scores are in this order.
const ORDERS: [Shown; 2] = [Shown::AFirst, Shown::BFirst];

/// Labels the pairs of the inputs.
///
/// # Errors
/// If the model or a table cannot be read, if the chat template cannot be used, or if more than `max_unlabelled` of the
/// pairs are too long for the model.
pub(crate) fn run(judge: &LocalJudge, ctx: &mut Context) -> Result<()> {
    lm::follow_threads(ctx.thread_limit().clone());
    on_a_big_stack(|| annotate(judge, ctx))
}

fn annotate(judge: &LocalJudge, ctx: &mut Context) -> Result<()> {
    let path = match judge.model {
        JudgeModel::Port => ctx.one("model")?.folder.clone(),
        JudgeModel::Gguf { file, .. } => file.to_owned(),
    };
    // Before the weights, which take longer to read.
    let layout = layout(judge, &path, ctx)?;
    let (mut scorer, tokenizer): (Box<dyn Scorer>, _) = match judge.model {
        JudgeModel::Port => {
            let (scorer, tokenizer) = LmScorer::load(&path)?;
            (Box::new(scorer), tokenizer)
        }
        JudgeModel::Gguf { file, tokenizer } => {
            let (scorer, tokenizer) = QuantizedScorer::load(file, tokenizer)?;
            (Box::new(scorer), tokenizer)
        }
    };
    let window = scorer.window();
    let prompter = Prompter::new(&judge.instructions, layout, &tokenizer, window);
    let mut held_out = HeldOut::of(ctx)?;
    let tables = ctx.many("pairs").iter().map(|input| Pairs::open(&input.folder)).collect::<Result<Vec<_>>>()?;
    let total = tables.iter().map(|table| table.rows()).sum();
    let per_pair = judge.instructions.criteria_per_pair() * SCORES_PER_CRITERION;
    let mut scores = Scores::of(ctx, total, per_pair)?;
    let mut judged = writer(&judge.instructions, ctx)?;
    let mut counts = Counts::default();
    let mut done = 0;
    let mut rows = pairs(ctx).peekable();
    while rows.peek().is_some() {
        let chunk = rows.by_ref().take(PAIRS_AT_ONCE).collect::<Result<Vec<Pair>>>()?;
        done += chunk.len() as u64;
        let is_kept =
            |pair: &Pair| !held_out.holds(&pair.post_id, Parts::parse(&pair.prompt).map_or("", |parts| parts.post));
        let chunk: Vec<Pair> = chunk.into_iter().filter(is_kept).collect();
        let found = scores.next(ctx, chunk.len(), (done, total), || score(&chunk, &prompter, &mut *scorer))?;
        for (pair, found) in chunk.into_iter().zip(found.chunks_exact(per_pair)) {
            let judgement = PairJudgement::of(&judge.instructions, &pair, found)
                .map_err(|e| e.help(format!("look at {}", judge.model.name())))?;
            counts.add(&judgement);
            let aspects = judgement.for_chosen();
            push_aspects(&mut judged, &judge.instructions, &pair.id, &aspects)?;
            judged.push(judgement.row(pair, window))?;
        }
        let (too_long, asked) = (judged.count(Outcome::Failed), total - held_out.dropped - counts.equal);
        if too_long as f64 > judge.max_unlabelled * asked as f64 {
            return Err(Error::user(format!(
                "{too_long} of {asked} pairs do not fit the model's window of {window} tokens, more than max_unlabelled = {}",
                judge.max_unlabelled
            ))
            .help("show fewer worked examples (`shots: 0`), or use a model with a longer window"));
        }
        ctx.progress(done, total, "pairs", None);
    }
    counts.report(ctx);
    ctx.metric("held_out_dropped", held_out.dropped as f64);
    judged.finish(ctx)
}

/// The form of the prompt, by the parameters and the files of the model, a folder or a GGUF file.
fn layout(judge: &LocalJudge, model: &Path, ctx: &mut Context) -> Result<Layout> {
    let template = match (judge.prompt, judge.chat_template) {
        (PromptForm::Plain, _) => return Ok(Layout::Plain),
        (_, Some(file)) => Some(ChatTemplate::of_file(file, model)?),
        (_, None) => ChatTemplate::of_model(model)?,
    };
    let remedy = match judge.model {
        JudgeModel::Port => "import it with `chat_template: true`, or name a file by `chat_template`",
        JudgeModel::Gguf { .. } => "name a file by `chat_template`",
    };
    match template {
        Some(template) => Layout::chat(&template, &judge.instructions),
        None if judge.prompt == PromptForm::Chat => {
            Err(Error::user(format!("{} has no chat template", judge.model.name())).help(remedy))
        }
        None => {
            ctx.warn(format!(
                "{} has no chat template, so it is asked in plain text; `prompt: plain` says that this is meant, otherwise \
                 {remedy}",
                judge.model.name()
            ));
            Ok(Layout::Plain)
        }
    }
}

/// Scores of one question: log p("1") and log p("2") in each order.
const SCORES_PER_CRITERION: usize = 2 * ORDERS.len();

/// The scores of pairs, [`SCORES_PER_CRITERION`] for each question. A prompt that does not fit has NaN and its number of
/// tokens instead; two equal texts have zeros, since nothing is asked about them.
fn score(pairs: &[Pair], prompter: &Prompter, scorer: &mut dyn Scorer) -> Result<Vec<f32>> {
    let mut scores = Vec::new();
    let (mut choices, mut places) = (Vec::new(), Vec::new());
    for pair in pairs {
        for criterion in 0..prompter.criteria() {
            for shown in ORDERS {
                let place = scores.len();
                scores.extend([0.0; 2]);
                if is_tie(pair) {
                    continue;
                }
                match prompter.ask(&document(pair, shown), criterion)? {
                    Asked::Choice(choice) => {
                        choices.push(choice);
                        places.push(place);
                    }
                    Asked::TooLong { tokens } => scores[place..].copy_from_slice(&[f32::NAN, tokens as f32]),
                }
            }
        }
    }
    for (place, found) in places.into_iter().zip(scorer.score(&choices)?) {
        scores[place..place + 2].copy_from_slice(&found);
    }
    Ok(scores)
}

fn document(pair: &Pair, shown: Shown) -> Document {
    let text = |place| match shown.side(place) {
        Side::A => pair.a_text.clone(),
        Side::B => pair.b_text.clone(),
    };
    Document { prompt: pair.prompt.clone(), first: text(1), second: text(2) }
}

/// What a model's scores say about a pair.
enum PairJudgement {
    /// Both texts are equal.
    Equal,
    /// The longest prompt has this many tokens.
    TooLong { tokens: u64 },
    Preference {
        /// The probability that `a` is better.
        p: f64,
        /// The same by question.
        by_question: Vec<f64>,
        /// The probability that the summary shown first is better, by order.
        first_wins: [f64; 2],
        /// The mean probability of `1` and `2` together.
        expected: f64,
    },
}

impl PairJudgement {
    fn of(instructions: &Instructions, pair: &Pair, scores: &[f32]) -> Result<Self> {
        if is_tie(pair) {
            return Ok(Self::Equal);
        }
        let answers = scores.as_chunks::<2>().0;
        let too_long = answers.iter().filter(|[mark, _]| mark.is_nan()).map(|[_, tokens]| *tokens as u64);
        if let Some(tokens) = too_long.max().filter(|tokens| *tokens > 0) {
            return Ok(Self::TooLong { tokens });
        }
        if !scores.iter().all(|score| score.is_finite()) {
            return Err(Error::user(format!("pair `{}`: the model's log-probabilities are no numbers", pair.id)));
        }
        let odds = |[one, two]: [f32; 2]| f64::from(one) - f64::from(two);
        let by_question: Vec<[f64; 2]> = answers.as_chunks().0.iter().map(|orders| orders.map(odds)).collect();
        let weights = instructions.weights();
        let mean = |p: &dyn Fn(&[f64; 2]) -> f64| weighted_mean(weights.iter().copied().zip(by_question.iter().map(p)));
        let p_of_a = |odds: &[f64; 2]| sigmoid((odds[0] - odds[1]) / 2.0);
        let p = mean(&p_of_a);
        let first_wins = [0, 1].map(|order| mean(&|odds| sigmoid(odds[order])));
        let by_question = by_question.iter().map(p_of_a).collect();
        let expected: f64 = scores.iter().map(|score| f64::from(*score).exp()).sum::<f64>() / answers.len() as f64;
        Ok(Self::Preference { p, by_question, first_wins, expected })
    }

    /// The chosen side and the outcome.
    fn label(p: f64) -> (Side, Outcome) {
        let outcome = if is_even(p) { Outcome::Tie } else { Outcome::Labelled };
        (if p >= 0.5 { Side::A } else { Side::B }, outcome)
    }

    /// For each question, whether its answer prefers the chosen summary, and the answer's probability.
    fn for_chosen(&self) -> Vec<(Option<bool>, Option<f64>)> {
        let Self::Preference { p, by_question, .. } = self else { return Vec::new() };
        let chosen = Self::label(*p).0;
        let answer = |p: &f64| match Self::label(*p) {
            (_, Outcome::Tie) => (None, Some(0.5)),
            (side, _) => (Some(side == chosen), Some(p.max(1.0 - p))),
        };
        by_question.iter().map(answer).collect()
    }

    /// The row of the table. No summary came first, since both orders were shown.
    fn row(&self, pair: Pair, window: usize) -> Preference {
        let (side, outcome, confidence, reason) = match self {
            Self::Equal => (Side::A, Outcome::Tie, None, None),
            Self::TooLong { tokens } => {
                let reason = format!("the prompt has {tokens} tokens, more than the model's window of {window}");
                (Side::A, Outcome::Failed, None, Some(reason))
            }
            Self::Preference { p, .. } => {
                let (side, outcome) = Self::label(*p);
                (side, outcome, Some(p.max(1.0 - p)), None)
            }
        };
        let row = Preference::of(pair, side, outcome, "local");
        Preference { confidence, reason, chosen_first: None, ..row }
    }
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

/// Measures of the judge's quality.
#[derive(Default)]
struct Counts {
    /// Pairs with equal texts.
    equal: u64,
    /// Answers for the summary shown first.
    first_shown: Tally,
    /// Pairs: whether both orders choose the same summary.
    swapped: Tally,
    pairs: f64,
    confidence: f64,
    expected: f64,
}

impl Counts {
    fn add(&mut self, judgement: &PairJudgement) {
        match judgement {
            PairJudgement::Equal => self.equal += 1,
            PairJudgement::TooLong { .. } => {}
            PairJudgement::Preference { p, first_wins, expected, .. } => {
                let for_first = first_wins.map(|p| p >= 0.5);
                for_first.into_iter().for_each(|first| self.first_shown.count(first));
                self.swapped.count(for_first[0] != for_first[1]);
                self.pairs += 1.0;
                self.confidence += p.max(1.0 - p);
                self.expected += expected;
            }
        }
    }

    fn report(&self, ctx: &mut Context) {
        report(self.first_shown, "first_shown_share", ctx);
        report(self.swapped, "swap_consistency", ctx);
        if self.pairs == 0.0 {
            return;
        }
        let expected = self.expected / self.pairs;
        ctx.metric("mean_confidence", self.confidence / self.pairs);
        ctx.metric("answer_probability", expected);
        if expected < MIN_ANSWER_PROBABILITY {
            ctx.warn(format!(
                "where the answer names a summary, the model gives 1 and 2 together a probability of {expected:.3} only: it \
                 expects another kind of answer, and its labels say little; is its chat template the right one?"
            ));
        }
    }
}
