//! Splits text into words and punctuation.

use std::ops::Range;

/// Byte ranges of the words of `text`: runs of letters, digits and inner apostrophes, and every other character except
/// white space by itself.
pub(crate) fn spans(text: &str) -> Vec<Range<usize>> {
    let mut spans: Vec<Range<usize>> = Vec::new();
    let mut in_word = false;
    for (at, c) in text.char_indices() {
        let next = text[at + c.len_utf8()..].chars().next();
        let word =
            c.is_alphanumeric() || (in_word && matches!(c, '\'' | '’') && next.is_some_and(char::is_alphanumeric));
        match spans.last_mut() {
            Some(last) if word && in_word => last.end = at + c.len_utf8(),
            _ if !c.is_whitespace() => spans.push(at..at + c.len_utf8()),
            _ => {}
        }
        in_word = word;
    }
    spans
}

/// The words and punctuation marks of `text`, in lower case.
pub(crate) fn words(text: &str) -> Vec<String> {
    spans(text).into_iter().map(|span| text[span].to_lowercase()).collect()
}

/// Joins pieces to running text: separated by spaces, but without one before a closing mark.
pub(crate) fn join<S: AsRef<str>>(pieces: &[S]) -> String {
    let mut text = String::new();
    for piece in pieces {
        let piece = piece.as_ref();
        if !text.is_empty() && !matches!(piece, "." | "," | "?" | "!" | ":" | ";") {
            text.push(' ');
        }
        text.push_str(piece);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn punctuation_stands_by_itself_and_apostrophes_stay_inside() {
        assert_eq!(words("24F, don't Go... 'so'"), ["24f", ",", "don't", "go", ".", ".", ".", "'", "so", "'"]);
        assert_eq!(words("  "), Vec::<String>::new());
        assert_eq!(words("é-à"), ["é", "-", "à"]);
    }

    #[test]
    fn joined_words_read_as_they_were() {
        let text = "My boss keeps yelling, and I feel sad. Should I leave?";
        let pieces: Vec<&str> = spans(text).into_iter().map(|s| &text[s]).collect();
        assert_eq!(join(&pieces), text);
    }
}
