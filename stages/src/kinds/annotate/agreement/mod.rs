//! `annotate.agreement`: measures the agreement of several judges on the same pairs.

#[cfg(test)]
mod tests;
mod verdicts;

use std::collections::{BTreeMap, BTreeSet};

use engine::context::{Context, Input};
use engine::error::{Error, Result};
use engine::kind::{ConnectedInput, Kind, Signature};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use self::verdicts::{JudgedPair, Pairs, Verdict, key_of, words};
use crate::labels::agreement::{ByLength, Counts, LengthCounts};
use crate::labels::pair_key::{PairKey, Text};
use crate::table;
use crate::types::Preferences;
use crate::types::agreement::{Agreement, AgreementInfo, Compared, Disagreement, Judge, QuestionAgreement};
use crate::types::folder::write_json;

pub struct Agree;

#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Params {
    /// Number of disagreements to write out for reading; a random sample drawn by content.
    pub disagreements: usize,
}

impl Default for Params {
    fn default() -> Self {
        Self { disagreements: 500 }
    }
}

/// With fewer pairs, an interval is about 20 points wide.
const FEW: u64 = 100;

impl Kind for Agree {
    type Params = Params;

    const NAME: &'static str = "annotate.agreement";
    const VERSION: u32 = 2;
    const ABOUT: &'static str = "measures how far two or more judges of the same pairs agree, matched by content";

    fn signature(&self, _: &Params) -> Signature {
        Signature::producing(Agreement::NAME).many("preferences", &[Preferences::NAME])
    }

    fn check_wiring(&self, _: &Params, inputs: &[ConnectedInput<'_>]) -> Vec<(&'static str, Error)> {
        Vec::from_iter((inputs.len() < 2).then(|| ("preferences", too_few())))
    }

    fn run(&self, params: Params, ctx: &mut Context) -> Result<()> {
        let inputs = ctx.many("preferences").to_vec();
        if inputs.len() < 2 {
            return Err(too_few());
        }
        let names = names(&inputs);
        let mut pairs = Pairs::of(inputs.len());
        let mut judges = Vec::with_capacity(inputs.len());
        for (i, input) in inputs.iter().enumerate() {
            let rows = pairs.hear(i, &input.folder)?;
            judges.push((names[i].clone(), rows));
            ctx.progress(i as u64 + 1, inputs.len() as u64, "tables", None);
        }
        let judges: Vec<Judge> = judges
            .into_iter()
            .enumerate()
            .map(|(i, (name, rows))| {
                let (judged, labelled) = pairs.judged(i);
                Judge {
                    name,
                    rows: rows.rows,
                    pairs: judged,
                    labelled,
                    first_chosen: rows.first_chosen.share(),
                    longer_chosen: rows.longer_chosen.share(),
                    with_itself: pairs.with_itself(i).share(),
                }
            })
            .collect();
        let compared = compare(&pairs, &names);
        if compared.iter().all(|two| two.matched == 0) {
            let told: Vec<String> = judges.iter().map(|j| format!("`{}` judged {}", j.name, j.pairs)).collect();
            return Err(Error::user(format!("no pair was judged twice: {}, and none is the same", told.join(", ")))
                .help("let both judge the same pairs: `dataset.pairs` takes those of a table without their labels"));
        }
        for two in &compared {
            let of = two.agreement.map_or(0, |share| share.of);
            if of < FEW {
                ctx.warn(format!(
                    "{} and {} both have a preference on {of} pairs only (of {} that both judged): too few to say much",
                    two.first, two.second, two.matched
                ));
            }
        }
        tell(ctx, &judges, &compared);
        disagreements(&pairs, &inputs, &names, params.disagreements, ctx)?;
        let questions = questions(&inputs, &names, ctx)?;
        write_json(&ctx.out().join(Agreement::INFO), &AgreementInfo { judges, compared, questions })
    }
}

fn too_few() -> Error {
    Error::user("one table of preferences agrees with none").help("list two or more stages at port `preferences`")
}

/// The labels of the inputs; repeated labels are numbered.
fn names(inputs: &[Input]) -> Vec<String> {
    let mut seen: BTreeMap<&str, usize> = BTreeMap::new();
    inputs
        .iter()
        .map(|input| {
            let times = seen.entry(&input.label).or_default();
            *times += 1;
            if *times == 1 { input.label.clone() } else { format!("{} ({times})", input.label) }
        })
        .collect()
}

/// Compares every two judges.
fn compare(pairs: &Pairs, names: &[String]) -> Vec<Compared> {
    let posts = pairs.by_post();
    let mut all = Vec::new();
    for (i, first) in names.iter().enumerate() {
        for (j, second) in names.iter().enumerate().skip(i + 1) {
            let (mut matched, mut square, mut by_length) = (0, Counts::<4>::default(), ByLength::default());
            for post in &posts {
                let (mut of_post, mut lengths) = ([0; 4], LengthCounts::default());
                for pair in post {
                    let verdicts = [i, j].map(|judge| pair.verdict(judge));
                    matched += u64::from(!verdicts.contains(&Verdict::Absent));
                    let [Verdict::For(a), Verdict::For(b)] = verdicts else { continue };
                    of_post[2 * usize::from(a == Text::High) + usize::from(b == Text::High)] += 1;
                    let for_longer = [a, b].map(|text| (text == Text::Low) == (pair.longer_by > 0));
                    lengths.count(pair.longer_by.unsigned_abs(), a == b, for_longer);
                }
                square.add_post(of_post);
                by_length.add_post(&lengths);
            }
            all.push(Compared {
                first: first.clone(),
                second: second.clone(),
                matched,
                agreement: square.agreement().share(),
                kappa: square.kappa(),
                by_length: by_length.bins(),
            });
        }
    }
    all
}

/// Compares the answers to each question that at least two judges were asked about a pair, and records agreement and kappa
/// as metrics `name[question]`, or `name[question,first,second]` for more than two judges.
fn questions(inputs: &[Input], names: &[String], ctx: &mut Context) -> Result<Vec<QuestionAgreement>> {
    let mut questions = Vec::new();
    for (question, pairs) in verdicts::questions(inputs)? {
        let mut compared = compare(&pairs, names);
        compared.retain(|two| two.matched > 0);
        for two in &compared {
            let of = if names.len() == 2 { String::new() } else { format!(",{},{}", two.first, two.second) };
            if let Some(share) = two.agreement {
                ctx.metric(format!("agreement[{question}{of}]"), share.share);
            }
            if let Some(kappa) = two.kappa {
                ctx.metric(format!("kappa[{question}{of}]"), kappa.kappa);
            }
        }
        if !compared.is_empty() {
            questions.push(QuestionAgreement { question, compared });
        }
    }
    Ok(questions)
}

/// Records metrics: under plain names for two judges, under `name[first,second]` for more.
fn tell(ctx: &mut Context, judges: &[Judge], compared: &[Compared]) {
    for two in compared {
        let name = |what: &str| {
            if judges.len() == 2 { what.to_owned() } else { format!("{what}[{},{}]", two.first, two.second) }
        };
        ctx.metric(name("matched"), two.matched as f64);
        if let Some(share) = two.agreement {
            ctx.metric(name("labelled_by_both"), share.of as f64);
            ctx.metric(name("agreement"), share.share);
            ctx.metric(name("agreement_low"), share.low);
            ctx.metric(name("agreement_high"), share.high);
        }
        if let Some(kappa) = two.kappa {
            ctx.metric(name("kappa"), kappa.kappa);
            ctx.metric(name("kappa_low"), kappa.low);
            ctx.metric(name("kappa_high"), kappa.high);
        }
    }
    for judge in judges {
        for (what, share) in [
            ("first_chosen", judge.first_chosen),
            ("longer_chosen", judge.longer_chosen),
            ("with_itself", judge.with_itself),
        ] {
            if let Some(share) = share {
                ctx.metric(format!("{what}[{}]", judge.name), share.share);
            }
        }
    }
}

/// Writes the `most` disagreements with the smallest keys, in order of their keys: a sample that depends only on
/// content.
fn disagreements(pairs: &Pairs, inputs: &[Input], names: &[String], most: usize, ctx: &Context) -> Result<()> {
    let differ = |pair: &JudgedPair| {
        let is_chosen = |text: Text| (0..names.len()).any(|judge| pair.verdict(judge) == Verdict::For(text));
        is_chosen(Text::Low) && is_chosen(Text::High)
    };
    let keys: BTreeSet<PairKey> = pairs.all().filter(|(_, pair)| differ(pair)).map(|(key, _)| key).collect();
    let mut wanted: BTreeSet<PairKey> = keys.into_iter().take(most).collect();
    let mut rows: BTreeMap<PairKey, Disagreement> = BTreeMap::new();
    for input in inputs {
        if wanted.is_empty() {
            break;
        }
        for row in Preferences::open(&input.folder)? {
            let row = row?;
            let (key, chosen) = key_of(&row);
            if !wanted.remove(&key) {
                continue;
            }
            let (a, b) = if chosen == Some(Text::High) {
                (row.rejected_text, row.chosen_text)
            } else {
                (row.chosen_text, row.rejected_text)
            };
            let who = |verdict: Verdict| -> Vec<String> {
                let judges = names.iter().enumerate().filter(|(i, _)| pairs.verdict(&key, *i) == verdict);
                judges.map(|(_, name)| name.clone()).collect()
            };
            rows.insert(
                key,
                Disagreement {
                    pair: key.to_string(),
                    post_id: row.post_id,
                    prompt: row.prompt,
                    longer_by: words(&a) - words(&b),
                    a_text: a,
                    b_text: b,
                    for_a: who(Verdict::For(Text::Low)),
                    for_b: who(Verdict::For(Text::High)),
                    for_neither: who(Verdict::Neither),
                },
            );
        }
    }
    table::write(&ctx.out().join(Agreement::DISAGREEMENTS), rows.into_values()).map(drop)
}
