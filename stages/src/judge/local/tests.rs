mod gguf;

use serde_json::{Value, json};

use super::prompt::Choice;
use super::scorer::LmScorer;
use super::*;
use crate::kinds::annotate::Local;
use crate::testing::attempts::Attempts;
use crate::testing::{Bench, Out, assert_pinned, run, toys};
use crate::types::folder::write_json;
use crate::types::{Model, Preferences, Split};

fn bench_with(pairs: Vec<Pair>, window: usize, chat_template: Option<&str>) -> Bench {
    let mut bench = Bench::new();
    bench.input("pairs", Pairs::NAME, |folder| toys::write_pairs(folder, pairs));
    bench.input("model", Model::NAME, |folder| {
        toys::write_model_with(folder, 3, &toys::chat_tokenizer(), window)?;
        let config = chat_template.map(|template| json!({ "chat_template": template, "eos_token": "<|im_end|>" }));
        config.map_or(Ok(()), |config| write_json(&folder.join(Model::TOKENIZER_CONFIG), &config))
    });
    bench
}

fn bench(n: usize) -> Bench {
    bench_with(toys::pairs(n, Split::Proxy), 4096, Some(toys::CHATML))
}

fn rows(out: &Out) -> Vec<Preference> {
    Preferences::open(&out.path()).unwrap().collect::<Result<_>>().unwrap()
}

fn instructions(questions: Value) -> Instructions {
    let questions: Vec<crate::judge::instructions::Criterion> = serde_json::from_value(questions).unwrap();
    Instructions::load(None, None, None, &questions).unwrap()
}

/// A scorer with a strong preference for the first place, and a weak one for prompts that show `good` there.
struct Biased;

impl Scorer for Biased {
    fn window(&self) -> usize {
        10_000
    }

    fn score(&mut self, choices: &[Choice]) -> Result<Vec<[f32; 2]>> {
        let tokenizer = toys::chat_tokenizer();
        let good_first = |choice: &Choice| {
            let text = tokenizer.decode(&choice.prompt);
            let shown = text.rsplit_once(".summary.1>\n").map(|_| text.rsplit("<doc.3.summary.1>\n").next().unwrap());
            shown.is_some_and(|text| !text.starts_with("zzz"))
        };
        Ok(choices.iter().map(|choice| if good_first(choice) { [-0.5, -4.5] } else { [-0.5, -2.5] }).collect())
    }
}

#[test]
fn a_preference_for_a_place_cancels_and_is_told() {
    let (instructions, tokenizer) = (instructions(json!([])), toys::chat_tokenizer());
    let prompter = Prompter::new(&instructions, Layout::Plain, &tokenizer, 10_000);
    let pairs = toys::pairs(12, Split::Proxy);
    let scores = score(&pairs, &prompter, &mut Biased).unwrap();
    let mut counts = Counts::default();
    for (pair, scores) in pairs.into_iter().zip(scores.chunks_exact(4)) {
        let judgement = PairJudgement::of(&instructions, &pair, scores).unwrap();
        counts.add(&judgement);
        let row = judgement.row(pair, 10_000);
        assert_eq!((row.outcome, row.rejected_text.as_str()), (Outcome::Labelled, "zzz qqq zzz"));
        // The mean of 4 and -2 nats.
        assert!(row.confidence.is_some_and(|p| (p - sigmoid(1.0)).abs() < 1e-6), "{:?}", row.confidence);
        assert_eq!(row.chosen_first, None);
    }
    let share = |tally: Tally| tally.share().map(|share| (share.of, share.share));
    assert_eq!((share(counts.first_shown), share(counts.swapped)), (Some((24, 1.0)), Some((12, 0.0))));
}

#[test]
fn a_label_does_not_depend_on_the_sides_of_a_pair() {
    let turned = |pair: Pair| Pair { a_text: pair.b_text.clone(), b_text: pair.a_text.clone(), ..pair };
    let pairs = toys::pairs(6, Split::Proxy);
    let other: Vec<Pair> = pairs.iter().cloned().map(turned).collect();
    let label = |pairs| {
        let out = run(&Local, json!({}), bench_with(pairs, 4096, Some(toys::CHATML)).inputs()).unwrap();
        rows(&out).into_iter().map(|row| (row.chosen_text, row.confidence.unwrap())).collect::<Vec<_>>()
    };
    for ((chosen, confidence), (other_chosen, other_confidence)) in label(pairs).into_iter().zip(label(other)) {
        assert_eq!(chosen, other_chosen);
        assert!((confidence - other_confidence).abs() < 1e-6 && confidence > 0.5);
    }
}

#[test]
fn the_small_result_is_pinned_by_the_version() {
    use engine::kind::Kind;
    assert_eq!((Local::VERSION, lm::NUMERICS), (1, 5));
    let out = run(&Local, json!({}), bench(8).inputs()).unwrap();
    let names = ["labelled", "first_shown_share", "swap_consistency", "mean_confidence", "answer_probability"];
    assert_pinned(&out.metrics(&names), &[8.0, 1.0, 0.0, 0.500325, 0.00292]);
}

#[test]
fn a_killed_attempt_resumes_to_the_same_bytes() {
    let mut pairs = toys::pairs(40, Split::Proxy);
    pairs[3].b_text = pairs[3].a_text.clone();
    let bench = bench_with(pairs, 1024, None);
    let inputs = bench.inputs();
    let with = json!({ "shots": 0, "prompt": "plain" });
    let attempts = || Attempts::new(&Local, &with, inputs.clone(), 1).unwrap();
    let whole = attempts().undisturbed().unwrap();
    let attempts = attempts();
    assert!(attempts.killed_after(2).unwrap().killed);
    let rest = attempts.undisturbed().unwrap();
    assert_eq!((rest.resumed, rest.bytes()), (Some(32), whole.bytes()));
}

#[test]
fn the_number_of_threads_changes_no_byte() {
    let bytes = |threads: usize| {
        lm::set_threads(threads);
        toys::bytes_of(&run(&Local, json!({ "shots": 1 }), bench(5).inputs()).unwrap().path())
    };
    assert_eq!(bytes(1), bytes(2));
}

#[test]
fn a_pair_that_is_too_long_is_named_and_marked_and_the_rest_goes_on() {
    let mut pairs = toys::pairs(12, Split::Proxy);
    pairs[5].prompt = format!("Subreddit: r/x\nTITLE: t\nPOST: {}\nTL;DR:", "My cat is sad. ".repeat(200));
    pairs[7].b_text = pairs[7].a_text.clone();
    let run = |with: Value| run(&Local, with, bench_with(pairs.clone(), 1024, Some(toys::CHATML)).inputs());
    let out = run(json!({ "shots": 0, "max_unlabelled": 0.1 })).unwrap();
    let rows = rows(&out);
    assert_eq!((rows.len(), rows[5].outcome, rows[7].outcome), (12, Outcome::Failed, Outcome::Tie));
    let reason = rows[5].reason.as_deref().unwrap();
    assert!(
        reason.starts_with("the prompt has ") && reason.ends_with("more than the model's window of 1024"),
        "{reason}"
    );
    assert_eq!((out.metric("labelled"), out.metric("failed")), (10.0, 1.0));
    let error = run(json!({ "shots": 0 })).map(drop).unwrap_err();
    assert!(error.message.starts_with("1 of 11 pairs do not fit the model's window of 1024 tokens"), "{error}");
    assert!(error.exit_code() == 2 && error.help.is_some_and(|help| help.contains("shots: 0")));
}

#[test]
fn a_judge_stops_once_too_many_pairs_are_too_long() {
    let mut pairs = toys::pairs(40, Split::Proxy);
    for pair in &mut pairs[..20] {
        pair.prompt = format!("Subreddit: r/x\nTITLE: t\nPOST: {}\nTL;DR:", "My cat is sad. ".repeat(200));
    }
    // The pair after the sixteen that are in memory at once would be an error.
    pairs[16].a_text.clear();
    let error = run(&Local, json!({ "shots": 0 }), bench_with(pairs, 1024, None).inputs()).map(drop).unwrap_err();
    assert!(error.message.starts_with("16 of 40 pairs do not fit"), "{error}");
}

#[test]
fn an_answer_of_several_tokens_weighs_as_one_of_one_token() {
    let folder = tempfile::tempdir().unwrap();
    toys::write_model(folder.path(), 5).unwrap();
    let (mut scorer, tokenizer) = LmScorer::load(folder.path()).unwrap();
    let (prompt, more) = (tokenizer.encode("My cat is sad. The answer"), tokenizer.encode(" is"));
    let [one, two] = ["1", "2"].map(|text| tokenizer.encode(text));
    let short = Choice { prompt: [&prompt[..], &more].concat(), answers: [one.clone(), two.clone()] };
    let long = Choice { prompt, answers: [[&more[..], &one].concat(), [&more[..], &two].concat()] };
    // Together in one batch, alone, and in either order.
    let together = scorer.score(&[long.clone(), short.clone()]).unwrap();
    let alone = [scorer.score(&[long]).unwrap()[0], scorer.score(&[short]).unwrap()[0]];
    for [a, b] in [[together[0], together[1]], alone] {
        assert!(((a[0] - a[1]) - (b[0] - b[1])).abs() < 1e-4, "{a:?} {b:?}");
    }
    assert!((together[1][0] - alone[1][0]).abs() < 1e-5);
}

#[test]
fn several_questions_are_answered_singly_and_weighed() {
    let questions = json!([{ "name": "accurate", "text": "Which is true?", "weight": 3 }, { "name": "short", "text": "Which is short?" }]);
    let bench = bench(6);
    let out = run(&Local, json!({ "questions": questions, "rubric": "Facts first." }), bench.inputs()).unwrap();
    let rows: Vec<_> = Preferences::with_aspects(&out.path()).unwrap().unwrap().collect::<Result<_>>().unwrap();
    assert_eq!(rows.len(), 6);
    for (row, aspects) in rows {
        let names: Vec<_> = aspects.iter().map(|aspect| (aspect.question.as_str(), aspect.weight)).collect();
        assert_eq!(names, [("accurate", 3.0), ("short", 1.0)]);
        let for_chosen = |i: usize| {
            let p = aspects[i].confidence.unwrap();
            if aspects[i].for_chosen == Some(true) { p } else { 1.0 - p }
        };
        let p = 0.75 * for_chosen(0) + 0.25 * for_chosen(1);
        assert!(row.confidence.is_some_and(|confidence| (confidence - p).abs() < 1e-9), "{row:?}");
    }
    let plain = run(&Local, json!({}), bench.inputs()).unwrap();
    assert!(Preferences::with_aspects(&plain.path()).unwrap().is_none());
}

#[test]
fn the_form_of_the_prompt_is_chosen_or_told() {
    let run = |with: Value, template: Option<&str>| {
        run(&Local, with, bench_with(toys::pairs(3, Split::Proxy), 4096, template).inputs())
    };
    let out = run(json!({}), None).unwrap();
    assert!(out.warnings.iter().any(|warning| warning.contains("no chat template")), "{:?}", out.warnings);
    assert!(!run(json!({ "prompt": "plain" }), None).unwrap().warnings.iter().any(|w| w.contains("no chat template")));
    let confidence = |out: Out| rows(&out)[0].confidence;
    assert_eq!(confidence(run(json!({ "prompt": "plain" }), Some(toys::CHATML)).unwrap()), confidence(out));
    assert_ne!(confidence(run(json!({}), Some(toys::CHATML)).unwrap()), confidence(run(json!({}), None).unwrap()));
    let error = run(json!({ "prompt": "chat" }), None).map(drop).unwrap_err();
    assert!(
        error.message.contains("no chat template")
            && error.help.is_some_and(|help| help.contains("chat_template: true"))
    );
    let refusing = "{{ raise_exception('no assistants') }}";
    let error = run(json!({}), Some(refusing)).map(drop).unwrap_err();
    assert!(error.message.contains("no assistants") && error.exit_code() == 2, "{error}");
    let file = tempfile::Builder::new().suffix(".jinja").tempfile().unwrap();
    std::fs::write(file.path(), toys::CHATML).unwrap();
    let own = run(json!({ "chat_template": file.path() }), Some(refusing)).unwrap();
    assert_eq!(confidence(own), confidence(run(json!({}), Some(toys::CHATML)).unwrap()));
}

#[test]
fn what_cannot_work_is_told_before_anything_runs() {
    use engine::kind::AnyKind;
    let kind: &dyn AnyKind = &Local;
    let faults = |with: Value| -> Vec<String> {
        kind.normalise(&with).err().unwrap_or_default().into_iter().map(|(field, _)| field).collect()
    };
    assert_eq!(faults(json!({ "shots": 0, "prompt": "chat", "questions": [{ "name": "a", "text": "b" }] })), [""; 0]);
    assert_eq!(faults(json!({ "max_unlabelled": 2 })), ["max_unlabelled"]);
    assert_eq!(faults(json!({ "prompt": "plain", "chat_template": "t.jinja" })), ["chat_template"]);
    assert_eq!(faults(json!({ "questions": [{ "name": "a b", "text": "b" }] })), ["questions[0].name"]);
    let files = kind.check_files(&kind.normalise(&json!({ "shots": 3 })).unwrap()).unwrap();
    assert_eq!(files, [("shots".to_owned(), "there are 2 worked examples".to_owned())]);
    let examples = tempfile::NamedTempFile::new().unwrap();
    let line = |better: u8| {
        format!("{{\"prompt\":\"p\",\"summaries\":[\"a\",\"b\"],\"better\":{better},\"answers\":{{\"true\":1}}}}\n")
    };
    std::fs::write(examples.path(), line(1) + &line(2)).unwrap();
    let with = json!({ "examples": examples.path(), "questions": [{ "name": "covers", "text": "b" }] });
    let files = kind.check_files(&kind.normalise(&with).unwrap()).unwrap();
    assert!(files[0].1.ends_with("`answers` names `true`, which is none of `questions`"), "{files:?}");
}
