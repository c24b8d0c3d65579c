//! Tests of `annotate.agreement`.

use proptest::prelude::*;
use serde_json::json;

use super::*;
use crate::testing::{Bench, Out, run, toys};
use crate::types::{Outcome, Preference, Split};

/// Whether a judge prefers the toy pair's good summary; `None` if it did not judge the pair.
type Says = Option<bool>;

/// The table of a judge with these verdicts on the toy pairs.
fn table(says: &[Says]) -> Vec<Preference> {
    let rows = toys::preferences(says.len(), Split::Gold).into_iter().zip(says);
    rows.filter_map(|(row, says)| {
        let mut row = row;
        if !(*says)? {
            std::mem::swap(&mut row.chosen_text, &mut row.rejected_text);
            row.chosen_first = row.chosen_first.map(|first| !first);
        }
        Some(row)
    })
    .collect()
}

fn bench(tables: &[Vec<Preference>]) -> Bench {
    let mut bench = Bench::new();
    for rows in tables {
        bench.input("preferences", "Preferences", |folder| toys::write_preferences(folder, rows.clone()));
    }
    bench
}

fn agree(tables: &[Vec<Preference>]) -> Result<(Out, AgreementInfo, Vec<Disagreement>)> {
    let out = run(&Agree, json!({}), bench(tables).inputs())?;
    let info = Agreement::info(&out.path())?;
    let disagreements = Agreement::disagreements(&out.path())?.collect::<Result<_>>()?;
    Ok((out, info, disagreements))
}

/// Verdicts on `n` pairs, with every `k`th inverted.
fn but_every(n: usize, k: usize) -> Vec<Says> {
    (0..n).map(|i| Some(i % k != 0)).collect()
}

#[test]
fn agreement_is_the_share_of_common_pairs_with_the_same_preference() -> Result<()> {
    let mut first = but_every(200, 1000);
    (first[0], first[1]) = (None, Some(true));
    // Of 199 common pairs every fifth differs, except pair 0, which the first judge did not judge.
    let (out, info, disagreements) = agree(&[table(&first), table(&but_every(200, 5))])?;
    let two = &info.compared[0];
    let share = two.agreement.expect("common pairs");
    assert_eq!((two.matched, share.of, share.share), (199, 199, 160.0 / 199.0));
    assert!(share.low < share.share && share.share < share.high && share.high - share.low < 0.12);
    assert_eq!(out.metric("agreement"), share.share);
    assert_eq!(out.metric("kappa"), two.kappa.expect("both answers come").kappa);
    assert_eq!((disagreements.len(), out.metric("matched")), (39, 199.0));
    for row in &disagreements {
        assert_eq!((row.for_a.len(), row.for_b.len(), row.for_neither.len()), (1, 1, 0));
        let words = |text: &str| text.split_whitespace().count() as i64;
        assert_eq!(row.longer_by, words(&row.a_text) - words(&row.b_text));
        let (good, bad) =
            if row.a_text.starts_with("zzz") { (&row.for_b, &row.for_a) } else { (&row.for_a, &row.for_b) };
        assert_eq!((good[0].as_str(), bad[0].as_str()), ("input-0", "input-1"));
    }
    assert!(out.warnings.is_empty(), "{:?}", out.warnings);
    Ok(())
}

#[test]
fn pairs_match_by_content_whatever_their_ids_their_template_and_their_order() -> Result<()> {
    let says = but_every(150, 4);
    let mut rows = table(&says);
    rows.reverse();
    for row in &mut rows {
        row.id = format!("other {}", row.id);
        row.prompt = row.prompt.replace('\n', "\n\n").replace("Subreddit: r/", "SUBREDDIT: ");
        row.chosen_text = format!("  {}\n", row.chosen_text);
    }
    let (_, info, disagreements) = agree(&[table(&says), rows])?;
    let share = info.compared[0].agreement.expect("common pairs");
    assert_eq!((share.of, share.share, disagreements.len()), (150, 1.0, 0));
    Ok(())
}

#[test]
fn a_judge_who_takes_what_comes_first_or_what_is_longer_is_told() -> Result<()> {
    let fair = table(&but_every(400, 3));
    let first: Vec<Preference> = toys::preferences(400, Split::Gold)
        .into_iter()
        .map(|mut row| {
            if row.chosen_first == Some(false) {
                std::mem::swap(&mut row.chosen_text, &mut row.rejected_text);
                row.chosen_first = Some(true);
            }
            row
        })
        .collect();
    let longer: Vec<Preference> = toys::preferences(400, Split::Gold)
        .into_iter()
        .map(|mut row| {
            row.chosen_text += " and more of it";
            row.chosen_first = None;
            row
        })
        .collect();
    let (_, info, _) = agree(&[first, fair])?;
    let told = |judge: &Judge| judge.first_chosen.map(|share| (share.of, share.share));
    assert_eq!(told(&info.judges[0]), Some((400, 1.0)));
    assert!(told(&info.judges[1]).is_some_and(|(_, share)| (share - 0.5).abs() < 0.2));
    // A judge who guesses agrees with others only by chance.
    assert!(info.compared[0].kappa.is_some_and(|kappa| kappa.low < 0.0 && 0.0 < kappa.high), "{info:?}");
    let (_, info, _) = agree(&[longer.clone(), longer])?;
    assert_eq!(told(&info.judges[0]), None, "nobody knows what came first");
    assert_eq!(info.judges[0].longer_chosen.map(|share| share.share), Some(1.0));
    let bins = &info.compared[0].by_length;
    assert_eq!(bins.iter().filter_map(|bin| bin.agreement).map(|share| share.of).sum::<u64>(), 400);
    let bin = bins.iter().find(|bin| bin.agreement.is_some()).expect("one bin");
    assert_eq!((bin.least, bin.first_for_longer.map(|share| share.share)), (3, Some(1.0)));
    Ok(())
}

#[test]
fn several_labels_of_a_pair_are_one_voice_and_tell_how_far_a_judge_agrees_with_itself() -> Result<()> {
    let says = [but_every(120, 1000), but_every(120, 1000), but_every(120, 3)];
    let crowd: Vec<Preference> = says.iter().flat_map(|says| table(says)).collect();
    let (out, info, disagreements) = agree(&[crowd, table(&but_every(120, 1000))])?;
    let judge = &info.judges[0];
    assert_eq!((judge.rows, judge.pairs, judge.labelled), (360, 120, 120));
    // Where all labels of a pair agree, all three pairs of labels are equal; where the third differs, one of three is.
    let with_itself = judge.with_itself.expect("several labels");
    assert_eq!((with_itself.of, with_itself.share), (360, (81.0 * 3.0 + 39.0) / 360.0));
    assert_eq!(info.judges[1].with_itself, None);
    assert_eq!((out.metric("agreement"), disagreements.len()), (1.0, 0));
    // Equal votes, ties and answers without a label give no preference.
    let mut drawn = table(&but_every(120, 1000));
    drawn.extend(table(&[Some(true), Some(false)]));
    drawn[2].outcome = Outcome::Tie;
    drawn[3].outcome = Outcome::Refused;
    let (_, info, _) = agree(&[drawn, table(&but_every(120, 1000))])?;
    assert_eq!((info.judges[0].pairs, info.judges[0].labelled), (120, 116));
    assert_eq!((info.compared[0].matched, info.compared[0].agreement.map(|share| share.of)), (120, Some(116)));
    Ok(())
}

#[test]
fn three_judges_are_compared_two_by_two_and_equal_names_told_apart() -> Result<()> {
    let tables = [table(&but_every(110, 2)), table(&but_every(110, 5)), table(&but_every(110, 1000))];
    let mut inputs = bench(&tables);
    let out = run(&Agree, json!({ "disagreements": 7 }), inputs.inputs())?;
    let info = Agreement::info(&out.path())?;
    let twos: Vec<(&str, &str)> = info.compared.iter().map(|two| (two.first.as_str(), two.second.as_str())).collect();
    assert_eq!(twos, [("input-0", "input-1"), ("input-0", "input-2"), ("input-1", "input-2")]);
    assert_eq!(out.metric("agreement[input-1,input-2]"), info.compared[2].agreement.expect("common pairs").share);
    let kept: Vec<Disagreement> = Agreement::disagreements(&out.path())?.collect::<Result<_>>()?;
    let all: Vec<Disagreement> =
        Agreement::disagreements(&run(&Agree, json!({}), inputs.inputs())?.path())?.collect::<Result<_>>()?;
    assert_eq!(kept, all[..7], "the first of those that content draws");
    inputs.input("preferences", "Preferences", |folder| toys::write_preferences(folder, tables[0].clone()));
    let mut same = inputs.inputs();
    for input in same.get_mut("preferences").expect("the port") {
        input.label = "s".to_owned();
    }
    let names: Vec<String> = names(&same["preferences"]);
    assert_eq!(names, ["s", "s (2)", "s (3)", "s (4)"]);
    Ok(())
}

#[test]
fn answers_to_the_same_question_are_compared_by_its_name() -> Result<()> {
    let mut bench = Bench::new();
    // The judges agree on what is accurate, differ on every third length, and one alone was asked about style.
    for (judge, names) in [["accurate", "length", "style"].as_slice(), &["length", "accurate"]].into_iter().enumerate()
    {
        bench.input("preferences", "Preferences", |folder| {
            let mut writer = crate::labels::PreferenceWriter::with_aspects(folder)?;
            for (i, row) in table(&but_every(120, 4)).into_iter().enumerate() {
                // In the second table the rows have the other side chosen; so have the answers.
                let row = if judge == 0 {
                    row
                } else {
                    Preference { chosen_text: row.rejected_text.clone(), rejected_text: row.chosen_text.clone(), ..row }
                };
                for name in names {
                    let for_chosen = judge == 0 || (*name == "length" && i % 3 == 0);
                    writer.push_aspect(crate::types::Aspect {
                        id: row.id.clone(),
                        question: (*name).to_owned(),
                        weight: 1.0,
                        for_chosen: (i != 7).then_some(for_chosen),
                        confidence: None,
                    })?;
                }
                writer.push(row)?;
            }
            let mut ctx = Context::new("test", 1, BTreeMap::new(), folder.to_owned(), folder.to_owned());
            writer.finish(&mut ctx)
        });
    }
    let out = run(&Agree, json!({}), bench.inputs())?;
    let questions = Agreement::info(&out.path())?.questions;
    let told: Vec<_> = questions
        .iter()
        .map(|q| {
            (q.question.as_str(), q.compared[0].matched, q.compared[0].agreement.map(|share| (share.of, share.share)))
        })
        .collect();
    assert_eq!(told, [("accurate", 120, Some((119, 1.0))), ("length", 120, Some((119, 79.0 / 119.0)))]);
    assert_eq!(out.metric("agreement[length]"), 79.0 / 119.0);
    Ok(())
}

#[test]
fn tables_without_a_common_pair_or_with_few_are_told() -> Result<()> {
    let error = agree(&[table(&but_every(5, 2))]).map(drop).expect_err("one table");
    assert!(error.message.contains("agrees with none") && error.exit_code() == 2, "{error}");
    let mut other = table(&but_every(5, 2));
    other.iter_mut().for_each(|row| row.prompt += " more");
    let error = agree(&[table(&but_every(4, 2)), other]).map(drop).expect_err("no common pair");
    assert_eq!(error.message, "no pair was judged twice: `input-0` judged 4, `input-1` judged 5, and none is the same");
    assert!(error.help.is_some_and(|help| help.contains("dataset.pairs")));
    let (out, info, _) = agree(&[table(&but_every(5, 1000)), table(&but_every(5, 1000))])?;
    assert!(out.warnings[0].contains("on 5 pairs only (of 5 that both judged)"), "{:?}", out.warnings);
    assert_eq!(info.compared[0].agreement.map(|share| share.share), Some(1.0));
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]
    #[test]
    fn the_order_of_rows_and_of_judges_changes_no_number(
        says in prop::collection::vec((any::<bool>(), any::<bool>()), 3..40),
        by in 0usize..40,
    ) {
        let (first, second): (Vec<Says>, Vec<Says>) = says.iter().map(|(a, b)| (Some(*a), Some(*b))).unzip();
        let (straight, mut turned) = (table(&first), table(&first));
        let by = by % turned.len();
        turned.rotate_left(by);
        let bytes = |tables: &[Vec<Preference>]| toys::bytes_of(&agree(tables).expect("common pairs").0.path());
        prop_assert_eq!(bytes(&[straight.clone(), table(&second)]), bytes(&[turned, table(&second)]));
        let of = |a: Vec<Preference>, b: Vec<Preference>| {
            let two = agree(&[a, b]).expect("common pairs").1.compared.remove(0);
            (two.matched, two.agreement, two.kappa.map(|k| (k.kappa * 1e9).round()))
        };
        prop_assert_eq!(of(straight.clone(), table(&second)), of(table(&second), straight));
    }
}
