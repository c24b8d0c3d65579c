//! Cleans texts from external sources: removes unsafe characters, and normalises texts for comparison.

use std::borrow::Cow;

use engine::text::is_terminal_control;

/// Removes byte-order marks, bidirectional controls, and control characters other than newline and tab. Controls that
/// separate words become a space; those that end a line or paragraph become a newline.
pub fn printable(text: &str) -> Cow<'_, str> {
    let is_unwanted = |c: char| is_terminal_control(c) || matches!(c, '\u{feff}' | '\u{2028}' | '\u{2029}');
    if !text.contains(is_unwanted) {
        return Cow::Borrowed(text);
    }
    let lines = text.replace("\r\n", "\n");
    Cow::Owned(
        lines
            .chars()
            .filter_map(|c| match c {
                '\r' | '\u{2028}' | '\u{2029}' => Some('\n'),
                // Vertical tab, form feed, the four information separators, and U+0085: officially "next line", but in
                // practice mostly an ellipsis that was decoded as Latin-1.
                '\u{b}' | '\u{c}' | '\u{1c}'..='\u{1f}' | '\u{85}' => Some(' '),
                c => (!is_unwanted(c)).then_some(c),
            })
            .collect(),
    )
}

/// Letters and digits in lower case, with one space between words. A text without any is only trimmed.
pub fn normalised(text: &str) -> String {
    let mut words = String::with_capacity(text.len());
    let mut gap = false;
    for c in text.chars() {
        if c.is_alphanumeric() {
            if gap && !words.is_empty() {
                words.push(' ');
            }
            gap = false;
            words.extend(c.to_lowercase());
        } else {
            gap = true;
        }
    }
    if words.is_empty() { text.trim().to_owned() } else { words }
}

/// A 128-bit hash of the [`normalised`] text.
pub fn fingerprint(text: &str) -> [u8; 16] {
    let hash = blake3::hash(normalised(text).as_bytes());
    let mut short = [0; 16];
    short.copy_from_slice(&hash.as_bytes()[..16]);
    short
}

/// An id for a post without one: the first 64 bits of its fingerprint, in hexadecimal.
pub fn id_of(text: &str) -> String {
    fingerprint(text)[..8].iter().map(|b| format!("{b:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn control_characters_go_and_newlines_stay() {
        assert_eq!(printable("a\u{0}b\r\nc\rd\te\u{1b}[31m\u{202e}f\u{feff}"), "ab\nc\nd\te[31mf");
        assert!(matches!(printable("plain\n\ttext"), Cow::Borrowed(_)));
    }

    #[test]
    fn characters_that_separate_words_leave_them_apart() {
        for c in ['\u{b}', '\u{c}', '\u{1c}', '\u{1d}', '\u{1e}', '\u{1f}', '\u{85}'] {
            assert_eq!(printable(&format!("three{c}four")), "three four", "{c:?}");
        }
        for c in ["\r", "\r\n", "\n", "\u{2028}", "\u{2029}"] {
            assert_eq!(printable(&format!("three{c}four")), "three\nfour", "{c:?}");
        }
        // All white-space characters of Unicode.
        for c in (0..=0x3000).filter_map(char::from_u32).filter(|c| c.is_whitespace()) {
            let text = format!("three{c}four");
            assert_eq!(printable(&text).split_whitespace().collect::<Vec<_>>(), ["three", "four"], "{c:?}");
            assert_eq!(fingerprint(&text), fingerprint("three four"), "{c:?}");
        }
    }

    #[test]
    fn case_space_and_marks_do_not_tell_texts_apart() {
        assert_eq!(normalised("  Hello,\n WORLD!! it's "), "hello world it s");
        assert_eq!(fingerprint("Hello, world"), fingerprint("hello   WORLD."));
        assert_ne!(fingerprint("ab c"), fingerprint("a bc"));
        assert_ne!(fingerprint(":-)"), fingerprint(":-("));
    }

    proptest! {
        #[test]
        fn both_are_idempotent(text in any::<String>()) {
            let once = printable(&text).into_owned();
            prop_assert_eq!(printable(&once), once.as_str());
            prop_assert!(once.chars().all(|c| !c.is_control() || c == '\n' || c == '\t'));
        }
    }
}
