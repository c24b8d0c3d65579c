//! The seeded grammar: draws a situation and writes its post and TL;DR.

use rand::Rng;
use rand::seq::IndexedRandom;

use super::facts::{Category, Facts};
use super::template::{expand, expansions};
use crate::types::{Post, Split};

/// One invented post.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Situation {
    pub facts: Facts,
    /// Without `r/`.
    pub subreddit: &'static str,
    pub title: String,
    pub post: String,
    pub summary: String,
    /// Index of the TL;DR's style, below [`STYLES`].
    pub style: usize,
}

impl Situation {
    /// The post as a table row.
    pub fn into_post(self, id: String, splits: Vec<Split>) -> Post {
        Post {
            id,
            subreddit: self.subreddit.to_owned(),
            title: self.title,
            post: self.post,
            summary: self.summary,
            splits,
            facts: Some(self.facts.to_json()),
        }
    }
}

// Slots: who, rel, prob, event, feel and act are the post's own values. With the suffix 2, a slot is another value of
// the category, drawn anew for each sentence. `he` is the relation's pronoun.
const SUBREDDITS: [&str; 5] = ["relationships", "advice", "offmychest", "family", "self"];

const TITLES: [&str; 8] = [
    "My {rel} keeps {prob}",
    "Should I {act}?",
    "Feeling {feel} after the {event}",
    "What should I do about my {rel}?",
    "My {rel} and the {event}",
    "I am {who} and {feel}",
    "I do not know what to do",
    "I need some advice",
];

const OPENINGS: [&str; 3] = ["Sorry for the long post.", "Here is the story.", "Sorry, I am on my phone."];

const INTRODUCTIONS: [&str; 6] = [
    "I am {who} and this is about my {rel}.",
    "So I am {who} and I have [some|real] trouble with my {rel}.",
    "{who} here, and I see my {rel} [almost|nearly] every day.",
    "Throwaway, since my {rel} reads this site. I am {who}.",
    "I am a {who} and I live close to my {rel}.",
    "I, a {who}, have known my {rel} for [two|three|five] years.",
];

const WHO_AGAIN: [&str; 5] = [
    "At {who} I should not feel {feel}.",
    "Nobody expects a {who} to feel {feel}.",
    "Being {who} and {feel} is not easy.",
    "I am {who} and I feel {feel}.",
    "A {who} should not have to feel this {feel}.",
];

const COMPLAINTS: [&str; 5] = [
    "The {prob} has to end.",
    "I cannot stand the {prob}.",
    "I am so done with the {prob}.",
    "All this {prob} is too much.",
    "Nobody else seems to mind the {prob}.",
];

const PROBLEMS: [&str; 5] = [
    "Lately my {rel} will not stop {prob}.",
    "My {rel} keeps {prob} [almost|nearly] every day.",
    "For [weeks|months] now my {rel} has been {prob}.",
    "[Now|These days] my {rel} is always {prob}.",
    "My {rel} knows that I hate {prob}, but {he} will not stop.",
];

const EVENTS: [&str; 5] = [
    "The {prob} [started|began] at the {event} last [week|month].",
    "We had a [big|bad] fight at the {event} about the {prob}.",
    "My {rel} was {prob} all through the {event}.",
    "After the {event} the {prob} [only|just] got worse.",
    "I could not enjoy the {event} because of the {prob}.",
];

const FEELINGS: [&str; 5] = [
    "Since the {event} I feel {feel}.",
    "[Honestly|To be honest], the {event} made me feel {feel}.",
    "I feel {feel} whenever I think of the {event}.",
    "Thinking of the {event} makes me feel {feel}.",
    "I felt {feel} at the {event} and I still do.",
];

const QUESTIONS: [&str; 5] = [
    "Part of me wants to {act} because I am so {feel}. Should I {act}?",
    "Is it wrong to {act} when I feel this {feel}? I [just|really] want to {act}.",
    "I am {feel} enough to {act}, but can I [just|really] {act}?",
    "Maybe I should {act}, since I am {feel}. Would you {act}?",
    "I feel too {feel} to decide. Do I {act}, or is it too [soon|late] to {act}?",
];

const DISTRACTORS: [&str; 10] = [
    "My {rel2} knows a {who2} with no such trouble.",
    "My {rel2} says that {prob2} would be much worse.",
    "People think I am {feel2}, but I am [not|really not].",
    "This has nothing to do with the {event2}, by the way.",
    "My {rel2} told me to never {act2}, no matter what.",
    "Last year I went to the {event2} with my {rel2} and it was fine.",
    "I used to know a {who2} who was always {prob2}.",
    "My {rel2} would be {feel2} and would {act2} by now.",
    "My {rel2} laughed about the {prob2} at some other {event2}.",
    "A {who2} at work said I should {act2}.",
];

const FILLERS: [&str; 5] = [
    "I do not know where else to ask.",
    "It is a long story.",
    "I need some advice.",
    "I have not told anyone.",
    "None of this is easy.",
];

const CLOSINGS: [&str; 3] = ["Thanks for reading.", "Any advice is welcome.", "What would you do?"];

// Every style states all six facts, so the style affects neither coverage nor, within a few words, the length.
const SUMMARIES: [&str; STYLES] = [
    "{who}, my {rel} has been {prob} since the {event} and I feel {feel}. [Should|Can] I {act}?",
    "My {rel} [would not stop|was always] {prob} after the {event}. I am {who} and feel {feel}. Should I {act}?",
    "I am {who} and I feel {feel} because my {rel} was {prob} at the {event}. [Should|Can] I {act}?",
    "{who} with a {rel} who will not stop {prob}. The {event} made me feel {feel}. Do I {act}?",
    "The {event} made me feel {feel}. My {rel} was {prob} and I am {who}. Do I {act}?",
    "I feel {feel} about the {event} because my {rel} was {prob}. Would you {act} if you were {who}?",
    "Should I {act}? My {rel} has been {prob} since the {event}. I am {who} and feel {feel}.",
    "I want to {act} because my {rel} was {prob} at the {event}. I am {who} and feel {feel}.",
    "As a {who}, I feel {feel} about my {rel} and the {prob} at the {event}. Do I {act}?",
    "Is it wrong to {act}? {who} here. I feel {feel} because my {rel} was {prob} at the {event}.",
    "My {rel} was {prob} at the {event}, so I feel {feel}. Can a {who} [just|really] {act}?",
    "Can a {who} [just|really] {act}? After the {event} I feel {feel}, and my {rel} keeps {prob}.",
];

/// Number of TL;DR styles.
pub const STYLES: usize = 12;

// Incomplete TL;DRs: the same wording with two to four of the facts.
const PARTIAL_SUMMARIES: [&str; 10] = [
    "My {rel} [would not stop|was always] {prob}. Should I {act}?",
    "I am {who} and feel {feel}. [Should|Can] I {act}?",
    "The {event} made me feel {feel}. Do I {act}?",
    "My {rel} was {prob} at the {event}.",
    "I feel {feel} about my {rel}. Do I {act}?",
    "{who}, my {rel} has been {prob} since the {event}.",
    "I feel {feel} because my {rel} was {prob}. Would you {act}?",
    "Should I {act}? My {rel} has been {prob} since the {event}.",
    "{who} with a {rel} who will not stop {prob}. The {event} made me feel {feel}.",
    "I want to {act} because my {rel} was {prob} at the {event}.",
];

/// Draws a situation, its post and its TL;DR. The TL;DR's style is independent of everything else.
pub fn draw(rng: &mut impl Rng) -> Situation {
    let facts = Facts::draw(rng);
    let he = pronoun(&facts.relation, rng);
    let write = |templates: &[&str], rng: &mut _| write(templates, &facts, he, rng);

    let title = write(&TITLES, rng);
    let mut story = vec![write(&PROBLEMS, rng), write(&EVENTS, rng), write(&FEELINGS, rng)];
    // The problem may come before or after the event; the feeling always comes last.
    if rng.random_bool(0.3) {
        story.swap(0, 1);
    }
    let mut asides = vec![write(&WHO_AGAIN, rng), write(&COMPLAINTS, rng)];
    let two = if rng.random_bool(0.4) { 2 } else { 1 };
    asides.extend(DISTRACTORS.choose_multiple(rng, two).map(|t| write(&[t], rng)).collect::<Vec<_>>());
    if rng.random_bool(0.15) {
        asides.push(write(&FILLERS, rng));
    }
    for aside in asides {
        story.insert(rng.random_range(0..=story.len()), aside);
    }
    story.insert(0, write(&INTRODUCTIONS, rng));
    if rng.random_bool(0.2) {
        story.insert(0, write(&OPENINGS, rng));
    }
    story.push(write(&QUESTIONS, rng));
    if rng.random_bool(0.2) {
        story.push(write(&CLOSINGS, rng));
    }

    let subreddit = SUBREDDITS.choose(rng).expect("there are subreddits");
    let style = rng.random_range(0..STYLES);
    let summary = summary(&facts, style, rng);
    Situation { subreddit, title, post: story.join(" "), summary, style, facts }
}

/// A TL;DR of all six facts in the given style.
pub fn summary(facts: &Facts, style: usize, rng: &mut impl Rng) -> String {
    write(&SUMMARIES[style..=style], facts, "they", rng)
}

/// A fluent TL;DR with only two to four of the facts.
pub fn partial_summary(facts: &Facts, rng: &mut impl Rng) -> String {
    write(&PARTIAL_SUMMARIES, facts, "they", rng)
}

/// Every TL;DR of `facts` that the grammar can write, including partial ones.
pub fn all_summaries(facts: &Facts) -> Vec<String> {
    let templates = SUMMARIES.iter().chain(&PARTIAL_SUMMARIES);
    templates.flat_map(|t| expansions(t, &mut |slot| own(facts, slot, "they"))).collect()
}

/// Every template, for the tests.
#[cfg(test)]
pub(super) fn wording() -> impl Iterator<Item = &'static str> {
    let lists: [&[&str]; 14] = [
        &TITLES,
        &OPENINGS,
        &INTRODUCTIONS,
        &WHO_AGAIN,
        &COMPLAINTS,
        &PROBLEMS,
        &EVENTS,
        &FEELINGS,
        &QUESTIONS,
        &DISTRACTORS,
        &FILLERS,
        &CLOSINGS,
        &SUMMARIES,
        &PARTIAL_SUMMARIES,
    ];
    lists.into_iter().flatten().copied()
}

fn write(templates: &[&str], facts: &Facts, he: &str, rng: &mut impl Rng) -> String {
    let template = templates.choose(rng).expect("there are templates");
    // Both callbacks need the generator, so the choices are drawn first: no template has more than two.
    let choices: [u32; 2] = rng.random();
    let mut at = 0;
    let mut choose = |n: usize| {
        at += 1;
        choices[at - 1] as usize % n
    };
    expand(template, &mut choose, &mut |slot| match slot.strip_suffix('2') {
        Some(slot) => other(facts, category(slot), rng).to_owned(),
        None => own(facts, slot, he),
    })
}

fn own(facts: &Facts, slot: &str, he: &str) -> String {
    if slot == "he" { he.to_owned() } else { facts.value(category(slot)).to_owned() }
}

fn category(slot: &str) -> Category {
    match slot {
        "who" => Category::Who,
        "rel" => Category::Relation,
        "prob" => Category::Problem,
        "event" => Category::Event,
        "feel" => Category::Feeling,
        "act" => Category::Action,
        _ => unreachable!("templates are constants, and a test expands every one"),
    }
}

/// A value that is not the post's own. Nobody gets two partners.
fn other(facts: &Facts, category: Category, rng: &mut impl Rng) -> &'static str {
    const PARTNERS: [&str; 4] = ["girlfriend", "boyfriend", "wife", "husband"];
    let own = facts.value(category);
    let not = if PARTNERS.contains(&own) { &PARTNERS[..] } else { &[own] };
    category.other(not, rng).expect("a category has more values than that")
}

fn pronoun(relation: &str, rng: &mut impl Rng) -> &'static str {
    match relation {
        "boyfriend" | "husband" | "father" | "brother" | "nephew" => "he",
        "girlfriend" | "wife" | "mother" | "sister" | "grandmother" | "niece" => "she",
        _ if rng.random() => "he",
        _ => "she",
    }
}
