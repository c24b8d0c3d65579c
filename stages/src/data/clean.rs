//! Text that others wrote: made safe to show, and compared without regard to how it is set. Knows no format.

use std::borrow::Cow;

/// Without control characters other than newline and tab, byte order marks and marks that turn the direction of text;
/// `\r\n` and `\r` become `\n`.
pub fn printable(text: &str) -> Cow<'_, str> {
    let unwanted = |c: char| {
        (c.is_control() && c != '\n' && c != '\t')
            || matches!(c, '\u{feff}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
    };
    if !text.contains(unwanted) {
        return Cow::Borrowed(text);
    }
    let lines = text.replace("\r\n", "\n").replace('\r', "\n");
    Cow::Owned(lines.chars().filter(|&c| !unwanted(c)).collect())
}

/// Letters and digits in lower case, words parted by one space. A text without any is only trimmed.
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

/// Equal for texts with equal [`normalised`] form; else different but for chance of 2^-128.
pub fn fingerprint(text: &str) -> [u8; 16] {
    let hash = blake3::hash(normalised(text).as_bytes());
    let mut short = [0; 16];
    short.copy_from_slice(&hash.as_bytes()[..16]);
    short
}

/// An id for a post that came without one: the first 64 bits of its fingerprint, in hexadecimal.
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
