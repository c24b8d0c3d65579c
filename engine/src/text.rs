//! Handling of text from outside: reading it, and escaping it before it reaches a terminal or a page.

use std::borrow::Cow;
use std::io;
use std::path::Path;

/// U+FEFF in UTF-8, which some programs write at the start of a text file.
const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

/// The bytes of a text without a leading byte-order mark.
pub fn strip_bom(bytes: &[u8]) -> &[u8] {
    bytes.strip_prefix(BYTE_ORDER_MARK).unwrap_or(bytes)
}

/// Reads a whole UTF-8 file, without its byte-order mark.
///
/// # Errors
/// If it cannot be read or is not UTF-8.
pub fn read(path: &Path) -> io::Result<String> {
    let mut text = std::fs::read_to_string(path)?;
    text.drain(..text.len() - strip_bom(text.as_bytes()).len());
    Ok(text)
}

/// Whether a terminal may interpret this character instead of showing it: every control character except newline and
/// tab, and the marks that reverse the direction of surrounding text (Boucher and Anderson 2021, "Trojan Source").
pub fn is_terminal_control(c: char) -> bool {
    (c.is_control() && c != '\n' && c != '\t') || matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// `text` with each character for which [`is_terminal_control`] holds written as an escape such as `\u{1b}`.
pub fn escape_controls(text: &str) -> Cow<'_, str> {
    if !text.contains(is_terminal_control) {
        return Cow::Borrowed(text);
    }
    let mut escaped = String::with_capacity(text.len() + 16);
    for c in text.chars() {
        if is_terminal_control(c) {
            escaped.extend(c.escape_unicode());
        } else {
            escaped.push(c);
        }
    }
    Cow::Owned(escaped)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_byte_order_mark_counts_only_at_the_start() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("text");
        for (bytes, text) in [("\u{feff}a\u{feff}b", "a\u{feff}b"), ("\u{feff}", ""), ("a", "a"), ("", "")] {
            assert_eq!(strip_bom(bytes.as_bytes()), text.as_bytes());
            std::fs::write(&file, bytes).unwrap();
            assert_eq!(read(&file).unwrap(), text);
        }
    }

    #[test]
    fn control_characters_are_shown_escaped() {
        let text = "a\u{1b}]0;title\u{7}\r\n\tb\u{9b}31m\u{202e}c\u{7f}é";
        let shown = "a\\u{1b}]0;title\\u{7}\\u{d}\n\tb\\u{9b}31m\\u{202e}c\\u{7f}é";
        assert_eq!(escape_controls(text), shown);
        assert!(matches!(escape_controls("plain\n\ttext"), Cow::Borrowed(_)));
    }

    proptest! {
        #[test]
        fn escaped_text_has_no_terminal_controls_and_escaping_twice_changes_nothing(text in any::<String>()) {
            let escaped = escape_controls(&text);
            prop_assert!(!escaped.contains(is_terminal_control));
            prop_assert_eq!(escape_controls(&escaped), escaped.as_ref());
        }
    }
}
