//! All output of the command passes through this module, so that foreign text cannot control the terminal.

use std::ffi::OsStr;
use std::fmt::Arguments;
use std::io::{self, IsTerminal, Write};
use std::sync::OnceLock;

use engine::error::{Error, Result};
use engine::text::{escape_controls, is_terminal_control};
use serde::Serialize;
use serde::ser::Error as _;
use serde_json::ser::{Formatter, Serializer};

/// The first error of standard output.
static FAILED: OnceLock<io::Error> = OnceLock::new();

/// Prints text with its control characters escaped.
///
/// # Errors
/// If the text cannot be written.
pub fn print(mut to: impl Write, what: Arguments<'_>) -> io::Result<()> {
    to.write_all(escape_controls(&what.to_string()).as_bytes())
}

/// Prints to standard output; [`finish`] reports failures.
pub fn print_out(what: Arguments<'_>) {
    note_failure(print(io::stdout(), what));
}

/// Records a failure of standard output. A closed pipe, such as to `head`, is not a failure.
pub fn note_failure(written: io::Result<()>) {
    if let Err(error) = written
        && error.kind() != io::ErrorKind::BrokenPipe
    {
        // Keep only the first error.
        let _ = FAILED.set(error);
    }
}

/// Flushes standard output.
///
/// # Errors
/// If some output could not be written, for example on a full disk.
pub fn finish() -> Result<()> {
    note_failure(io::stdout().flush());
    FAILED.get().map_or(Ok(()), |e| Err(Error::environment(format!("standard output: {e}"))))
}

/// Whether text on `stream` may have colours: it is a terminal, and the user has not refused them.
pub fn colours(stream: &impl IsTerminal) -> bool {
    let variable = |name| std::env::var_os(name);
    stream.is_terminal() && accepts_colours(variable("NO_COLOR").as_deref(), variable("TERM").as_deref())
}

/// `no_color`: any text but the empty one refuses colours (https://no-color.org).
fn accepts_colours(no_color: Option<&OsStr>, term: Option<&OsStr>) -> bool {
    no_color.is_none_or(OsStr::is_empty) && term.is_none_or(|term| term != "dumb")
}

/// `1 stage`, `2 stages`: a number with its noun, which is given in the singular.
pub fn counted(n: usize, noun: &str) -> String {
    format!("{n} {noun}{}", if n == 1 { "" } else { "s" })
}

/// A value as one line of JSON, with terminal control characters escaped beyond what JSON requires.
///
/// # Errors
/// If the value cannot be serialised.
pub fn json(value: &impl Serialize) -> serde_json::Result<String> {
    let mut line = Vec::new();
    value.serialize(&mut Serializer::with_formatter(&mut line, Escaping))?;
    String::from_utf8(line).map_err(serde_json::Error::custom)
}

/// A compact JSON formatter that escapes terminal control characters.
struct Escaping;

impl Formatter for Escaping {
    fn write_string_fragment<W: ?Sized + Write>(&mut self, to: &mut W, fragment: &str) -> io::Result<()> {
        let mut rest = fragment;
        while let Some((at, c)) = rest.char_indices().find(|(_, c)| is_terminal_control(*c)) {
            to.write_all(&rest.as_bytes()[..at])?;
            // All of them are below U+10000, so one escape is enough.
            write!(to, "\\u{:04x}", u32::from(c))?;
            rest = &rest[at + c.len_utf8()..];
        }
        to.write_all(rest.as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "a\u{1b}[2Jb\u{9b}1mc\u{202e}d\u{7f}\n\té";

    #[test]
    fn foreign_text_is_printed_with_control_characters_escaped() {
        let mut out = Vec::new();
        print(&mut out, format_args!("{TEXT}\n")).unwrap();
        let expected = "a\\u{1b}[2Jb\\u{9b}1mc\\u{202e}d\\u{7f}\n\té\n";
        assert_eq!(String::from_utf8(out).unwrap(), expected);
    }

    #[test]
    fn one_is_not_many() {
        let texts = [0, 1, 2].map(|n| counted(n, "stage"));
        assert_eq!(texts, ["0 stages", "1 stage", "2 stages"]);
    }

    #[test]
    fn colours_can_be_refused() {
        let accepts = |no_color: Option<&'static str>, term: Option<&'static str>| {
            accepts_colours(no_color.map(OsStr::new), term.map(OsStr::new))
        };
        assert!(accepts(None, None) && accepts(Some(""), Some("xterm")));
        assert!(!accepts(Some("1"), Some("xterm")) && !accepts(Some("0"), None) && !accepts(None, Some("dumb")));
    }

    #[test]
    fn json_has_the_same_content_and_needs_no_escaping() {
        let value = serde_json::json!({ TEXT: [TEXT, 0.1, null] });
        let line = json(&value).unwrap();
        assert!(!line.contains(is_terminal_control) && !line.contains('\n'), "{line}");
        assert!(line.contains("b\\u009b1mc\\u202ed\\u007f\\n\\té"), "{line}");
        assert_eq!(serde_json::from_str::<serde_json::Value>(&line).unwrap(), value);
    }
}
