//! Agreement between annotators: the page's section on a run's `Agreement` artifacts, and a sentence per pair of
//! judges.

use std::path::Path;

use stages::types::Agreement;
use stages::types::agreement::{AgreementInfo, Compared, Disagreement, Judge, Kappa, QuestionAgreement, Share};

use super::html::{escape, table};
use super::load::RunData;

/// One artifact: its instance and its contents, or the reason why it cannot be read.
pub struct AgreementResult {
    pub name: String,
    pub read: Result<(AgreementInfo, Vec<Disagreement>), String>,
}

/// Number of disagreements on the page; the artifact has more.
const SHOWN: usize = 8;

/// Every existing `Agreement` of the run, in pipeline order.
pub fn gather(run: &RunData) -> Vec<AgreementResult> {
    let made = run.instances.iter().filter(|instance| instance.output == Agreement::NAME);
    made.filter_map(|instance| {
        let folder = run.folder(instance)?;
        Some(AgreementResult { name: instance.name.clone(), read: read(&folder).map_err(|e| e.to_string()) })
    })
    .collect()
}

fn read(folder: &Path) -> engine::error::Result<(AgreementInfo, Vec<Disagreement>)> {
    Ok((Agreement::info(folder)?, Agreement::disagreements(folder)?.take(SHOWN).collect::<Result<_, _>>()?))
}

/// The findings of each artifact, in sentences.
pub fn sentences(measured: &[AgreementResult]) -> Vec<String> {
    let infos = measured.iter().filter_map(|m| m.read.as_ref().ok());
    infos
        .flat_map(|(info, _)| {
            let alone = info.judges.iter().flat_map(|judge| [consistency(judge), bias(judge)]).flatten();
            info.compared.iter().map(agreed).chain(info.questions.iter().flat_map(answered)).chain(alone)
        })
        .collect()
}

fn agreed(two: &Compared) -> String {
    let names = format!("{} and {}", two.first, two.second);
    match (two.agreement, two.kappa) {
        (None, _) => format!("{names} have no pair on which both have a preference."),
        (Some(share), kappa) => format!(
            "{names} agree on {} of {} pairs{}.",
            percent(share),
            share.of,
            kappa.map_or_else(String::new, |kappa| format!("; kappa {}", of_kappa(kappa)))
        ),
    }
}

/// Agreement on one of several questions.
fn answered(question: &QuestionAgreement) -> impl Iterator<Item = String> {
    question.compared.iter().map(|two| format!("On `{}`, {}", question.question, agreed(two)))
}

/// How often two labels of one pair are the same: in practice an upper bound on agreement with another judge.
fn consistency(judge: &Judge) -> Option<String> {
    let share = judge.with_itself?;
    Some(format!(
        "Two labels that {} has of one pair are the same in {} of {} cases.",
        judge.name,
        percent(share),
        share.of
    ))
}

/// A sentence on a judge whose preference depends on the order of the summaries.
fn bias(judge: &Judge) -> Option<String> {
    let share = judge.first_chosen.filter(|share| share.high < 0.5 || 0.5 < share.low)?;
    let which = if share.share > 0.5 { "first" } else { "second" };
    Some(format!(
        "{} leans to the summary that comes {which}: the first is chosen in {} of {} labels.",
        judge.name,
        percent(share),
        share.of
    ))
}

/// The page's section; empty if the run measured no agreement.
pub fn section(measured: &[AgreementResult]) -> String {
    let part = |m: &AgreementResult| match &m.read {
        Err(why) => {
            format!("<p class=\"bad\">{} is left out, since it cannot be read: {}</p>", escape(&m.name), escape(why))
        }
        Ok((info, disagreements)) => {
            let title = if measured.len() > 1 { format!("<h3>{}</h3>", escape(&m.name)) } else { String::new() };
            title + &tables(info, disagreements)
        }
    };
    let statements: String = sentences(measured).iter().map(|s| format!("<p>{}</p>", escape(s))).collect();
    let parts: String = measured.iter().map(part).collect();
    if measured.is_empty() { String::new() } else { statements + &parts }
}

fn tables(info: &AgreementInfo, disagreements: &[Disagreement]) -> String {
    let judges: Vec<Vec<String>> = info
        .judges
        .iter()
        .map(|judge| {
            let mut row = vec![escape(&judge.name)];
            row.extend([judge.rows, judge.pairs, judge.labelled].map(|n| n.to_string()));
            row.extend([judge.first_chosen, judge.longer_chosen, judge.with_itself].map(cell));
            row
        })
        .collect();
    let compared: Vec<Vec<String>> = info
        .compared
        .iter()
        .map(|two| {
            vec![
                escape(&two.first),
                escape(&two.second),
                two.matched.to_string(),
                two.agreement.map_or(0, |share| share.of).to_string(),
                cell(two.agreement),
                two.kappa.map_or_else(none, |kappa| {
                    interval(&format!("{:.2}", kappa.kappa), &format!("[{:.2}, {:.2}]", kappa.low, kappa.high))
                }),
            ]
        })
        .collect();
    format!(
        "<h3>Judges</h3>{}<h3>Two by two</h3>{}<p class=\"soft\">Pairs are matched by their texts. Agreement and kappa are of pairs on which both have a preference; \
         a judge with several labels of a pair speaks by majority, and \"with itself\" tells how often two of its labels of one \
         pair are the same. Intervals: 95%, from what varies between posts, since pairs of one post are not independent.</p>\
         <h3>By difference in length</h3>{}{}",
        table(
            &["judge", "rows", "pairs", "with a preference", "first chosen", "longer chosen", "with itself"],
            1,
            &judges
        ),
        table(&["judge", "and", "common pairs", "both prefer", "agreement", "kappa"], 2, &compared),
        by_length(&info.compared),
        disagreement_tables(disagreements)
    )
}

fn by_length(compared: &[Compared]) -> String {
    let rows = compared.iter().flat_map(|two| {
        let bins = two.by_length.iter().filter(|bin| bin.agreement.is_some()).enumerate();
        bins.map(move |(i, bin)| (two, i == 0, bin))
    });
    let rows: Vec<Vec<String>> = rows
        .map(|(two, is_first, bin)| {
            // Print the names only in the first of their rows.
            let name = |name: &str| if is_first { escape(name) } else { String::new() };
            vec![
                name(&two.first),
                name(&two.second),
                bin.most.map_or_else(|| format!("{} and more", bin.least), |most| format!("{} to {most}", bin.least)),
                bin.agreement.map_or(0, |share| share.of).to_string(),
                cell(bin.agreement),
                cell(bin.first_for_longer),
                cell(bin.second_for_longer),
            ]
        })
        .collect();
    table(
        &["judge", "and", "words apart", "pairs", "agreement", "the first for the longer", "the second for the longer"],
        3,
        &rows,
    )
}

fn disagreement_tables(disagreements: &[Disagreement]) -> String {
    if disagreements.is_empty() {
        return String::new();
    }
    let tables: String = disagreements
        .iter()
        .map(|row| {
            let sides = [(&row.for_a, &row.a_text), (&row.for_b, &row.b_text)];
            let rows: Vec<Vec<String>> =
                sides.map(|(judges, text)| vec![escape(&judges.join(", ")), escape(text)]).into();
            format!("<pre>{}</pre>{}", escape(&row.prompt), table(&["preferred by", "summary"], 2, &rows))
        })
        .collect();
    format!("<details><summary>Some on which they disagree</summary>{tables}</details>")
}

fn percent(share: Share) -> String {
    let format = |v: f64| format!("{:.1}", 100.0 * v);
    format!("{}% [{}, {}]", format(share.share), format(share.low), format(share.high))
}

fn of_kappa(kappa: Kappa) -> String {
    format!("{:.2} [{:.2}, {:.2}]", kappa.kappa, kappa.low, kappa.high)
}

fn cell(share: Option<Share>) -> String {
    share.map_or_else(none, |share| {
        let format = |v: f64| format!("{:.1}", 100.0 * v);
        interval(
            &format!("{}%", format(share.share)),
            &format!("[{}, {}] of {}", format(share.low), format(share.high), share.of),
        )
    })
}

fn interval(number: &str, ends: &str) -> String {
    format!("{number}<span class=\"interval\">{ends}</span>")
}

fn none() -> String {
    "–".to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn share(of: u64, share: f64) -> Option<Share> {
        Some(Share { of, share, low: share - 0.04, high: share + 0.04 })
    }

    fn measured(first_chosen: Option<Share>) -> AgreementResult {
        let judge = |name: &str, first_chosen| Judge {
            name: name.to_owned(),
            rows: 700,
            pairs: 600,
            labelled: 590,
            first_chosen,
            longer_chosen: None,
            with_itself: share(90, 0.77).filter(|_| name == "people"),
        };
        let two = Compared {
            first: "people".to_owned(),
            second: "<claude>".to_owned(),
            matched: 600,
            agreement: share(580, 0.7),
            kappa: Some(Kappa { kappa: 0.4, low: 0.32, high: 0.48 }),
            by_length: Vec::new(),
        };
        let accurate = Compared { agreement: share(580, 0.8), kappa: None, ..two.clone() };
        let questions = vec![QuestionAgreement { question: "accurate".to_owned(), compared: vec![accurate] }];
        let disagreement = Disagreement {
            pair: "p".to_owned(),
            post_id: "t3_1".to_owned(),
            prompt: "POST: <script>".to_owned(),
            a_text: "a <b>".to_owned(),
            b_text: "b".to_owned(),
            longer_by: 1,
            for_a: vec!["people".to_owned()],
            for_b: vec!["<claude>".to_owned()],
            for_neither: Vec::new(),
        };
        let judges = vec![judge("people", first_chosen), judge("<claude>", None)];
        let info = AgreementInfo { judges, compared: vec![two], questions };
        AgreementResult { name: "agreement".to_owned(), read: Ok((info, vec![disagreement])) }
    }

    #[test]
    fn agreement_is_stated_with_its_interval_and_bias_only_if_significant() {
        let sentences_of = |share| sentences(&[measured(share)]);
        assert_eq!(
            sentences_of(share(590, 0.52)),
            [
                "people and <claude> agree on 70.0% [66.0, 74.0] of 580 pairs; kappa 0.40 [0.32, 0.48].",
                "On `accurate`, people and <claude> agree on 80.0% [76.0, 84.0] of 580 pairs.",
                "Two labels that people has of one pair are the same in 77.0% [73.0, 81.0] of 90 cases."
            ]
        );
        assert_eq!(
            sentences_of(share(590, 0.44))[3],
            "people leans to the summary that comes second: the first is chosen in 44.0% [40.0, 48.0] of 590 labels."
        );
    }

    #[test]
    fn names_and_texts_of_judges_are_escaped_in_the_page() {
        let page = section(&[measured(None)]);
        assert!(
            page.contains("&lt;claude&gt;") && page.contains("a &lt;b&gt;") && page.contains("POST: &lt;script&gt;")
        );
        assert!(!page.contains("<claude>") && !page.contains("<script>") && !page.contains("<b>"));
        assert_eq!(section(&[]), "");
        let broken = AgreementResult { name: "a".to_owned(), read: Err("no <file>".to_owned()) };
        assert!(section(&[broken]).contains("cannot be read: no &lt;file&gt;"));
    }
}
