//! Faults in a pipeline file with their source positions, rendered as text or JSON.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fmt::{self, Write};

use serde::ser::SerializeSeq;
use serde::{Serialize, Serializer};

use crate::text::{escape_controls, is_terminal_control};

/// A range of a source: bytes `start..start + length` of source number `source`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Span {
    pub source: u32,
    pub start: u32,
    pub length: u32,
}

/// One fault: what is wrong, where, and what to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Diagnostic {
    /// `None`: the source as a whole, for example a file that cannot be read.
    pub span: Option<Span>,
    /// Lower-case, one line.
    pub message: String,
    /// Other relevant positions, each with a label.
    pub also: Vec<(Span, String)>,
    pub help: Option<String>,
    /// The affected instances, if the stage has a matrix.
    pub instances: Vec<String>,
}

impl Diagnostic {
    pub fn new(span: Span, message: impl Into<String>) -> Self {
        Self { span: Some(span), ..Self::without_span(message) }
    }

    pub fn without_span(message: impl Into<String>) -> Self {
        Self { span: None, message: message.into(), also: Vec::new(), help: None, instances: Vec::new() }
    }

    #[must_use]
    pub fn help(mut self, help: impl Into<String>) -> Self {
        self.help = Some(help.into());
        self
    }

    #[must_use]
    pub fn maybe_help(mut self, help: Option<String>) -> Self {
        self.help = help;
        self
    }

    #[must_use]
    pub fn also(mut self, span: Span, what: impl Into<String>) -> Self {
        self.also.push((span, what.into()));
        self
    }

    #[must_use]
    pub fn of_instance(mut self, name: Option<String>) -> Self {
        self.instances.extend(name);
        self
    }
}

/// Maximum number of rendered faults, in order of position; the rest is only counted.
const MAX_RENDERED: usize = 50;
/// Maximum number of faults kept during the checks.
const MAX_KEPT: usize = 1_000;
/// Maximum number of characters of a fault's message or help.
const MAX_TEXT_LENGTH: usize = 1_000;

/// Cuts a text that is too long.
fn clip(text: &mut String) {
    if text.len() > MAX_TEXT_LENGTH
        && let Some((at, _)) = text.char_indices().nth(MAX_TEXT_LENGTH)
    {
        text.truncate(at);
        text.push('…');
    }
}

#[derive(Clone, Debug)]
struct SourceText {
    /// The name shown after `-->`: a file's path, or `--set`.
    name: String,
    text: String,
}

/// The sources that were read and every fault found in them. `Display` renders the faults in order of position.
#[derive(Clone, Debug, Default)]
pub struct Diagnostics {
    sources: Vec<SourceText>,
    faults: Vec<Diagnostic>,
    /// Index into `faults` by position and message.
    index: HashMap<(Option<Span>, String), usize>,
    /// Number of faults reported; a fault of several instances counts once for each.
    count: usize,
    /// Number of faults that are not in `faults`.
    omitted: usize,
}

impl Diagnostics {
    /// Adds a source and returns its number; faults are sorted by it. The caller must refuse texts above 4 GiB.
    pub fn add_source(&mut self, name: impl Into<String>, text: impl Into<String>) -> u32 {
        self.sources.push(SourceText { name: name.into(), text: text.into() });
        (self.sources.len() - 1) as u32
    }

    /// Adds a fault. A fault that differs from an earlier one only by instance is merged with it; after the first
    /// [`MAX_KEPT`], faults are only counted.
    pub fn push(&mut self, mut fault: Diagnostic) {
        self.count += 1;
        clip(&mut fault.message);
        fault.help.iter_mut().for_each(clip);
        match self.index.entry((fault.span, fault.message.clone())) {
            Entry::Occupied(at) => self.faults[*at.get()].instances.extend(fault.instances),
            Entry::Vacant(_) if self.faults.len() == MAX_KEPT => self.omitted += 1,
            Entry::Vacant(at) => {
                at.insert(self.faults.len());
                self.faults.push(fault);
            }
        }
    }

    /// The faults that are kept.
    pub fn faults(&self) -> &[Diagnostic] {
        &self.faults
    }

    /// The number of faults so far, including those beyond [`MAX_KEPT`].
    pub fn count(&self) -> usize {
        self.count
    }

    /// The source text at `span`.
    pub fn slice(&self, span: Span) -> &str {
        let text = self.sources.get(span.source as usize).map_or("", |source| &source.text);
        text.get(span.start as usize..(span.start + span.length) as usize).unwrap_or("")
    }

    pub fn source(&self, source: u32) -> &str {
        &self.sources[source as usize].text
    }

    /// `value` if there are no faults; otherwise the first [`MAX_RENDERED`] faults, sorted by position.
    pub fn finish<T>(mut self, value: Option<T>) -> Result<T, Self> {
        if self.faults.is_empty()
            && let Some(value) = value
        {
            return Ok(value);
        }
        self.faults.sort_by_key(|fault| (fault.span.is_none(), fault.span));
        self.omitted += self.faults.len().saturating_sub(MAX_RENDERED);
        self.faults.truncate(MAX_RENDERED);
        self.index.clear();
        Err(self)
    }

    /// The exit code for user errors.
    pub fn exit_code(&self) -> u8 {
        2
    }

    /// Renders the faults for a terminal; `colour` adds ANSI colours. Escapes control characters of the file and of
    /// messages.
    pub fn render(&self, colour: bool) -> String {
        let paint = Colours { colour };
        let mut lines = LineStarts::default();
        let mut out = String::new();
        for (n, fault) in self.faults.iter().enumerate() {
            if n > 0 {
                out.push('\n');
            }
            self.render_one(fault, &paint, &mut lines, &mut out).expect("writing to a string cannot fail");
        }
        if self.omitted > 0 {
            let _ = writeln!(out, "\n… and {} more", self.omitted);
        }
        if self.faults.len() > 1 {
            let _ = writeln!(out, "\n{} errors", self.faults.len() + self.omitted);
        }
        out
    }

    fn render_one(&self, fault: &Diagnostic, paint: &Colours, lines: &mut LineStarts, out: &mut String) -> fmt::Result {
        writeln!(out, "{}: {}", paint.red("error"), paint.bold(&escape_controls(&fault.message)))?;
        let mut width = 1;
        let locations: Vec<(Location, &str)> = fault
            .span
            .iter()
            .map(|span| (*span, ""))
            .chain(fault.also.iter().map(|(span, what)| (*span, what.as_str())))
            .map(|(span, what)| (self.location(span, lines), what))
            .collect();
        for (location, _) in &locations {
            width = width.max(location.line.to_string().len());
        }
        let margin = " ".repeat(width);
        for (n, (location, what)) in locations.iter().enumerate() {
            let arrow = if n == 0 { "-->" } else { ":::" };
            writeln!(
                out,
                "{margin}{} {}:{}:{}",
                paint.blue(arrow),
                escape_controls(location.name),
                location.line,
                location.column
            )?;
            let bar = paint.blue("|");
            if n == 0 {
                writeln!(out, "{margin} {bar}")?;
            }
            let (shown, before) = window(location.text, location.column - 1, location.length);
            writeln!(out, "{} {bar} {shown}", paint.blue(&format!("{:>width$}", location.line)))?;
            let length = location.length.min(shown.chars().count().saturating_sub(before).max(1));
            let marks = if n == 0 { paint.red(&"^".repeat(length)) } else { paint.blue(&"-".repeat(length)) };
            writeln!(
                out,
                "{}",
                format!("{margin} {bar} {}{marks} {}", " ".repeat(before), escape_controls(what)).trim_end()
            )?;
        }
        let mut note =
            |kind: &str, text: &str| writeln!(out, "{margin} {} {kind}: {}", paint.blue("="), escape_controls(text));
        match fault.instances.as_slice() {
            [] => {}
            [one] => note("in", one)?,
            [one, rest @ ..] => note("in", &format!("{one} and {} more", rest.len()))?,
        }
        fault.help.iter().try_for_each(|help| note("help", help))
    }

    fn location<'a>(&'a self, span: Span, lines: &mut LineStarts) -> Location<'a> {
        let source = &self.sources[span.source as usize];
        let starts = lines.0.entry(span.source).or_insert_with(|| {
            std::iter::once(0).chain(source.text.match_indices('\n').map(|(at, _)| at + 1)).collect()
        });
        let at = (span.start as usize).min(source.text.len());
        let line = starts.partition_point(|start| *start <= at);
        let start = starts[line - 1];
        let text = source.text[start..].lines().next().unwrap_or("");
        let column = source.text.get(start..at).map_or(0, |before| before.chars().count());
        let end = (at + span.length as usize).min(start + text.len()).max(at);
        let length = source.text.get(at..end).map_or(1, |under| under.trim_end().chars().count().max(1));
        Location { name: &source.name, line, column: column + 1, length, text }
    }
}

/// Byte offsets of line starts, by source.
#[derive(Default)]
struct LineStarts(HashMap<u32, Vec<usize>>);

/// A span as line and column, both from 1, counted in characters.
struct Location<'a> {
    name: &'a str,
    line: usize,
    column: usize,
    length: usize,
    text: &'a str,
}

/// The part of a long line to show, and the number of characters before the caret in it.
fn window(line: &str, column: usize, length: usize) -> (String, usize) {
    const MAX_WIDTH: usize = 140;
    // Replaced one by one, so that the marks below stay aligned.
    let plain = |c: char| if c.is_control() || is_terminal_control(c) { ' ' } else { c };
    let total = line.chars().count();
    if total <= MAX_WIDTH {
        return (line.chars().map(plain).collect(), column);
    }
    let from = (column + length.min(MAX_WIDTH / 2)).saturating_sub(MAX_WIDTH * 2 / 3).min(column);
    let mut shown: String = line.chars().skip(from).take(MAX_WIDTH).map(plain).collect();
    if from + MAX_WIDTH < total {
        shown.push('…');
    }
    if from == 0 { (shown, column) } else { (format!("…{shown}"), column - from + 1) }
}

struct Colours {
    colour: bool,
}

impl Colours {
    fn with(&self, code: &str, text: &str) -> String {
        if self.colour { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }

    fn red(&self, text: &str) -> String {
        self.with("1;31", text)
    }

    fn blue(&self, text: &str) -> String {
        self.with("1;34", text)
    }

    fn bold(&self, text: &str) -> String {
        self.with("1", text)
    }
}

impl fmt::Display for Diagnostics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.render(false).trim_end())
    }
}

impl std::error::Error for Diagnostics {}

impl From<Diagnostics> for crate::error::Error {
    fn from(diagnostics: Diagnostics) -> Self {
        Self::user(diagnostics.to_string())
    }
}

/// A list of objects with message, file, line, column and length, and with also, help and instances where present.
impl Serialize for Diagnostics {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        let mut lines = LineStarts::default();
        let mut list = s.serialize_seq(Some(self.faults.len()))?;
        for fault in &self.faults {
            let location = |span: Span, lines: &mut LineStarts| {
                let Location { name, line, column, length, .. } = self.location(span, lines);
                serde_json::json!({ "file": name, "line": line, "column": column, "length": length })
            };
            let mut object = serde_json::json!({ "message": fault.message });
            if let Some(span) = fault.span
                && let serde_json::Value::Object(at) = location(span, &mut lines)
            {
                object.as_object_mut().expect("made as an object above").extend(at);
            }
            if !fault.also.is_empty() {
                let also = fault.also.iter().map(|(span, what)| {
                    let mut at = location(*span, &mut lines);
                    at["what"] = what.as_str().into();
                    at
                });
                object["also"] = also.collect();
            }
            if let Some(help) = &fault.help {
                object["help"] = help.as_str().into();
            }
            if !fault.instances.is_empty() {
                object["instances"] = fault.instances.iter().map(String::as_str).collect();
            }
            list.serialize_element(&object)?;
        }
        list.end()
    }
}

/// The candidate that `word` is probably a misspelling of.
pub fn nearest<'a>(word: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let allowed = (word.chars().count() / 3).max(1);
    let distance = |candidate: &str| {
        if candidate.eq_ignore_ascii_case(word) { 0 } else { strsim::damerau_levenshtein(word, candidate) }
    };
    let near =
        candidates.into_iter().map(|c| (distance(c), c)).filter(|(d, c)| *d <= allowed && *d < c.chars().count());
    near.min_by_key(|(d, _)| *d).map(|(_, c)| c)
}

/// Help for an unknown word: the nearest candidate, or else a list of candidates.
pub fn did_you_mean<'a>(word: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<String> {
    const MAX_LISTED: usize = 12;
    let candidates: Vec<&str> = candidates.into_iter().collect();
    if let Some(near) = nearest(word, candidates.iter().copied()) {
        return Some(format!("did you mean `{near}`?"));
    }
    let listed: Vec<String> = candidates.iter().take(MAX_LISTED).map(|c| format!("`{c}`")).collect();
    let more = if candidates.len() > MAX_LISTED { ", …" } else { "" };
    match listed.as_slice() {
        [] => None,
        [one] => Some(format!("expected {one}")),
        many => Some(format!("expected one of {}{more}", many.join(", "))),
    }
}
