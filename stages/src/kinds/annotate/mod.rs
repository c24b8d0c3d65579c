//! Kinds that label pairs, and their agreement.

pub mod agreement;
pub mod claude;
pub mod gold;
pub mod human;
pub mod local;
pub mod openai;
pub mod reference;

pub use agreement::Agree;
pub use claude::Claude;
pub use gold::Gold;
pub use human::Human;
pub use local::Local;
pub use openai::Openai;
pub use reference::Reference;

#[cfg(test)]
mod tests {
    use engine::kind::Kind;

    use super::*;
    use crate::table::Row;
    use crate::types::Preference;

    #[test]
    fn a_column_more_or_less_raises_the_versions_of_all_who_write_the_table() {
        let columns: Vec<&str> = Preference::columns().iter().map(|column| column.name).collect();
        let versions =
            [Claude::VERSION, Gold::VERSION, Human::VERSION, Reference::VERSION, Openai::VERSION, Local::VERSION];
        let expected = "id post_id prompt prompt_ids facts chosen_text chosen_ids chosen_ended rejected_text rejected_ids \
                        rejected_ended corruption outcome annotator confidence chosen_first reason";
        // Without new versions, an older table in the store would be reused for the new one.
        assert_eq!((columns.join(" ").as_str(), versions), (expected, [3, 3, 4, 3, 1, 1]), "raise all six, then this");
    }
}
