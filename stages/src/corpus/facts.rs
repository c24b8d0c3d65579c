//! The six key facts of an invented post, and their vocabulary.

use std::collections::HashMap;
use std::sync::LazyLock;

use rand::Rng;
use rand::seq::IndexedRandom;
use serde::{Deserialize, Serialize};

/// A category of facts. Every post has exactly one value of each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Category {
    /// Age and gender of the author in one word: `24F`.
    Who,
    /// The person that the post is about.
    Relation,
    /// What that person does; a gerund.
    Problem,
    /// Where it happened; a noun that takes `the`.
    Event,
    /// How the author feels; an adjective.
    Feeling,
    /// What the author asks about doing; a bare verb.
    Action,
}

// Every value is one word, no value is in two categories, and none occurs in the grammar's own wording (tested).
// Relations and ages start with a consonant sound, so that `a` is always the right article.
const WHO: [&str; 30] = [
    "19F", "20F", "21F", "22F", "23F", "24F", "25F", "26F", "27F", "28F", "29F", "30F", "31F", "32F", "33F", "19M",
    "20M", "21M", "22M", "23M", "24M", "25M", "26M", "27M", "28M", "29M", "30M", "31M", "32M", "33M",
];
const RELATIONS: [&str; 20] = [
    "girlfriend",
    "boyfriend",
    "wife",
    "husband",
    "mother",
    "father",
    "sister",
    "brother",
    "grandmother",
    "cousin",
    "niece",
    "friend",
    "roommate",
    "neighbor",
    "landlord",
    "boss",
    "coworker",
    "teacher",
    "coach",
    "doctor",
];
const PROBLEMS: [&str; 20] = [
    "cheating",
    "lying",
    "drinking",
    "stealing",
    "yelling",
    "smoking",
    "gambling",
    "snoring",
    "flirting",
    "gossiping",
    "crying",
    "complaining",
    "bragging",
    "swearing",
    "singing",
    "texting",
    "spying",
    "nagging",
    "teasing",
    "shouting",
];
const EVENTS: [&str; 20] = [
    "wedding",
    "party",
    "funeral",
    "concert",
    "dinner",
    "meeting",
    "game",
    "festival",
    "reunion",
    "picnic",
    "graduation",
    "parade",
    "lunch",
    "brunch",
    "race",
    "dance",
    "prom",
    "ceremony",
    "barbecue",
    "interview",
];
const FEELINGS: [&str; 20] = [
    "angry", "sad", "scared", "confused", "guilty", "jealous", "lonely", "ashamed", "hurt", "anxious", "bored",
    "hopeless", "betrayed", "worried", "annoyed", "numb", "trapped", "tired", "upset", "helpless",
];
const ACTIONS: [&str; 20] = [
    "leave",
    "apologize",
    "wait",
    "quit",
    "stay",
    "sue",
    "move",
    "call",
    "forgive",
    "confess",
    "hide",
    "write",
    "pay",
    "listen",
    "argue",
    "explain",
    "refuse",
    "escape",
    "return",
    "reply",
];

impl Category {
    pub const ALL: [Category; 6] =
        [Category::Who, Category::Relation, Category::Problem, Category::Event, Category::Feeling, Category::Action];

    /// Every value of the category, in its original case.
    pub fn values(self) -> &'static [&'static str] {
        match self {
            Category::Who => &WHO,
            Category::Relation => &RELATIONS,
            Category::Problem => &PROBLEMS,
            Category::Event => &EVENTS,
            Category::Feeling => &FEELINGS,
            Category::Action => &ACTIONS,
        }
    }

    /// The category of a lower-case word.
    pub fn of(word: &str) -> Option<Category> {
        static OF: LazyLock<HashMap<String, Category>> = LazyLock::new(|| {
            let all = Category::ALL.iter();
            all.flat_map(|&c| c.values().iter().map(move |v| (v.to_lowercase(), c))).collect()
        });
        OF.get(word).copied()
    }

    /// A random value other than those of `not`, ignoring case; `None` if there is no other.
    pub(crate) fn other(self, not: &[&str], rng: &mut impl Rng) -> Option<&'static str> {
        let left: Vec<&'static str> =
            self.values().iter().copied().filter(|v| !not.iter().any(|n| n.eq_ignore_ascii_case(v))).collect();
        left.choose(rng).copied()
    }
}

/// The facts of one post; the `facts` column holds them as JSON.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Facts {
    pub who: String,
    pub relation: String,
    pub problem: String,
    pub event: String,
    pub feeling: String,
    pub action: String,
}

impl Facts {
    /// Draws one value of each category, independently and uniformly.
    pub fn draw(rng: &mut impl Rng) -> Self {
        let mut draw =
            |category: Category| (*category.values().choose(rng).expect("categories have values")).to_owned();
        Self {
            who: draw(Category::Who),
            relation: draw(Category::Relation),
            problem: draw(Category::Problem),
            event: draw(Category::Event),
            feeling: draw(Category::Feeling),
            action: draw(Category::Action),
        }
    }

    pub fn value(&self, category: Category) -> &str {
        match category {
            Category::Who => &self.who,
            Category::Relation => &self.relation,
            Category::Problem => &self.problem,
            Category::Event => &self.event,
            Category::Feeling => &self.feeling,
            Category::Action => &self.action,
        }
    }

    /// Parses the `facts` column.
    pub fn parse(json: &str) -> Result<Self, serde_json::Error> {
        serde_json::from_str(json)
    }

    pub fn to_json(&self) -> String {
        serde_json::to_string(self).expect("six strings are plain data")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_value_is_in_two_categories_or_twice_in_one() {
        let all: Vec<&str> = Category::ALL.iter().flat_map(|c| c.values().iter().copied()).collect();
        let distinct: std::collections::HashSet<String> = all.iter().map(|v| v.to_lowercase()).collect();
        assert_eq!(distinct.len(), all.len());
    }

    #[test]
    fn every_value_is_one_word_and_leads_back_to_its_category() {
        for category in Category::ALL {
            for value in category.values() {
                assert_eq!(crate::corpus::words::words(value).len(), 1, "{value}");
                assert_eq!(Category::of(&value.to_lowercase()), Some(category));
            }
        }
    }

    #[test]
    fn values_that_follow_an_article_start_with_a_consonant() {
        for value in WHO.iter().chain(&RELATIONS) {
            assert!(!value.starts_with(['a', 'e', 'i', 'o', 'u']) && !value.starts_with("18"), "{value}");
        }
    }

    #[test]
    fn facts_survive_their_column() {
        use rand::SeedableRng;
        let facts = Facts::draw(&mut rand_chacha::ChaCha12Rng::seed_from_u64(1));
        assert_eq!(Facts::parse(&facts.to_json()).unwrap(), facts);
        assert!(Facts::parse("{}").is_err());
    }
}
