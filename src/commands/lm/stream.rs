//! Reads and writes JSON lines in windows, in order; each answer carries its line's `id`.

use std::io::{BufRead, BufWriter, ErrorKind, Read, Write};

use engine::error::{Error, Result};
use engine::text::strip_bom;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use stages::text::lines;

/// The optional `id` of a line, returned with its answer.
#[derive(Deserialize)]
struct LineId {
    #[serde(default)]
    id: Option<Value>,
}

#[derive(Serialize)]
struct AnswerLine<A> {
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<Value>,
    #[serde(flatten)]
    answer: A,
}

/// Answers lines of standard input on standard output, `window` lines at a time. `prepare` converts a line's question
/// into a model input, given the line's index from 0; `answer` computes the answers of a window. Ends early and without
/// error if standard output is closed.
///
/// # Errors
/// Names the line. Earlier lines are answered first.
pub fn answer_lines<Q: DeserializeOwned, R, A: Serialize>(
    window: usize,
    prepare: impl Fn(u64, Q) -> Result<R>,
    answer: impl Fn(Vec<R>) -> Result<Vec<A>>,
) -> Result<()> {
    answer_all(std::io::stdin().lock(), std::io::stdout().lock(), window, prepare, answer)
}

fn answer_all<Q: DeserializeOwned, R, A: Serialize>(
    mut input: impl BufRead,
    output: impl Write,
    window: usize,
    prepare: impl Fn(u64, Q) -> Result<R>,
    answer: impl Fn(Vec<R>) -> Result<Vec<A>>,
) -> Result<()> {
    let mut output = BufWriter::new(output);
    let mut read = 0;
    loop {
        let first = read + 1;
        let (mut ids, mut rows) = (Vec::new(), Vec::new());
        // A bad line ends the window; the lines before it are still answered.
        let mut end = None;
        while rows.len() < window && end.is_none() {
            let prepared = next_line(&mut input).map(|line| {
                line.map(|line| question(&line, read == 0).and_then(|(id, q)| Ok((id, prepare(read, q)?))))
            });
            match prepared {
                Ok(None) => end = Some(Ok(())),
                Ok(Some(Ok((id, row)))) => {
                    ids.push(id);
                    rows.push(row);
                    read += 1;
                }
                Ok(Some(Err(e))) | Err(e) => end = Some(Err(e.context(format!("line {}", read + 1)))),
            }
        }
        if !rows.is_empty() {
            let answers = answer(rows).map_err(|e| e.context(format!("lines {first} to {read}")))?;
            match write(&mut output, ids, answers) {
                Err(e) if e.kind() == ErrorKind::BrokenPipe => return Ok(()),
                written => written.map_err(|e| Error::environment(format!("standard output: {e}")))?,
            }
        }
        if let Some(end) = end {
            return end;
        }
    }
}

/// The next line without its line ending; `None` after the last.
fn next_line(input: &mut impl BufRead) -> Result<Option<Vec<u8>>> {
    let mut line = Vec::new();
    let n = input
        .take(lines::LONGEST)
        .read_until(b'\n', &mut line)
        .map_err(|e| Error::environment(format!("standard input: {e}")))?;
    if line.pop_if(|byte| *byte == b'\n').is_none() && n as u64 == lines::LONGEST {
        return Err(Error::user(format!("longer than {} MiB", lines::LONGEST >> 20)));
    }
    Ok((n > 0).then_some(line))
}

fn question<Q: DeserializeOwned>(mut line: &[u8], is_first: bool) -> Result<(Option<Value>, Q)> {
    if is_first {
        line = strip_bom(line);
        if let Some(what) = lines::foreign(line) {
            return Err(Error::user(format!("this is {what}, not JSON lines")));
        }
    }
    let line = std::str::from_utf8(line).map_err(|_| Error::user("not UTF-8"))?;
    let line_id: LineId = lines::object(line).map_err(Error::user)?;
    Ok((line_id.id, lines::object(line).map_err(Error::user)?))
}

fn write<A: Serialize>(output: &mut impl Write, ids: Vec<Option<Value>>, answers: Vec<A>) -> std::io::Result<()> {
    for (id, answer) in ids.into_iter().zip(answers) {
        writeln!(output, "{}", crate::output::json(&AnswerLine { id, answer })?)?;
    }
    output.flush()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Deserialize)]
    struct Question {
        n: f32,
    }

    #[derive(Debug, Serialize)]
    struct Answer {
        place: u64,
        half: f32,
        of: usize,
    }

    fn answers(input: &[u8], window: usize) -> (String, Result<()>) {
        let mut output = Vec::new();
        let done = answer_all(
            input,
            &mut output,
            window,
            |place, Question { n }| {
                if n < 0.0 { Err(Error::user("below 0")) } else { Ok((place, n)) }
            },
            |rows| {
                let of = rows.len();
                Ok(rows.into_iter().map(|(place, n)| Answer { place, half: n / 2.0, of }).collect())
            },
        );
        (String::from_utf8(output).unwrap(), done)
    }

    #[test]
    fn lines_are_answered_in_order_by_windows_and_keep_their_id() {
        let (output, done) = answers(b"{\"n\":1,\"id\":[7]}\n{\"n\":0.2,\"more\":{}}\n{\"n\":4}", 2);
        done.unwrap();
        let expected = [
            r#"{"id":[7],"place":0,"half":0.5,"of":2}"#,
            r#"{"place":1,"half":0.1,"of":2}"#,
            r#"{"place":2,"half":2.0,"of":1}"#,
        ];
        assert_eq!(output.lines().collect::<Vec<_>>(), expected);
        assert_eq!(answers(b"", 2).0, "");
    }

    #[test]
    fn a_byte_order_mark_is_no_part_of_the_first_line() {
        let (output, done) = answers(b"\xef\xbb\xbf{\"n\":1}\n{\"n\":2}\n", 1);
        done.unwrap();
        assert_eq!(output.lines().count(), 2);
        let (output, done) = answers(b"{\"n\":1}\n\xef\xbb\xbf{\"n\":1}\n", 1);
        assert_eq!(
            (output.lines().count(), done.unwrap_err().message.as_str()),
            (1, "line 2: expected one JSON object a line")
        );
    }

    #[test]
    fn a_binary_file_is_described_instead_of_printed() {
        let done = answers(b"\xfd7zXZ\0\0\x04", 1).1;
        assert_eq!(done.unwrap_err().message, "line 1: this is xz, not JSON lines");
    }

    #[test]
    fn a_bad_line_is_named_and_those_before_it_are_answered() {
        for (line, what) in [
            (&b"{\"n\":\"x\"}"[..], "line 2: invalid type: string \"x\", expected f32 (column 8)"),
            (b"{\"m\":1}", "line 2: missing field `n` (column 7)"),
            (b"[1]", "line 2: expected one JSON object a line"),
            (b"", "line 2: expected one JSON object a line"),
            (b"{\"n\":1}{\"n\":1}", "line 2: trailing characters (column 8)"),
            (b"\xff", "line 2: not UTF-8"),
            (b"{\"n\":-1}", "line 2: below 0"),
        ] {
            let input = [b"{\"n\":1}\n", line, b"\n{\"n\":1}\n"].concat();
            let (output, done) = answers(&input, 8);
            let error = done.unwrap_err();
            assert_eq!((error.message.as_str(), error.exit_code()), (what, 2));
            assert_eq!(output, "{\"place\":0,\"half\":0.5,\"of\":1}\n");
        }
    }

    #[test]
    fn a_closed_output_pipe_ends_the_program() {
        struct Gone;
        impl Write for Gone {
            fn write(&mut self, _: &[u8]) -> std::io::Result<usize> {
                Err(ErrorKind::BrokenPipe.into())
            }
            fn flush(&mut self) -> std::io::Result<()> {
                Ok(())
            }
        }
        let lines = b"{\"n\":1}\n".repeat(9);
        let windows = std::cell::Cell::new(0);
        let count = |rows: Vec<f32>| {
            windows.set(windows.get() + 1);
            Ok(rows)
        };
        #[derive(Serialize)]
        struct N {
            n: f32,
        }
        let count = |rows: Vec<f32>| count(rows).map(|rows| rows.into_iter().map(|n| N { n }).collect());
        answer_all(&lines[..], Gone, 3, |_, q: Question| Ok(q.n), count).unwrap();
        assert_eq!(windows.get(), 1);
    }
}
