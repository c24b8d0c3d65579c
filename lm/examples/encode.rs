//! Tokenizes texts: reads one JSON string per line, writes one JSON list of ids per line. Used by
//! `tests/fixtures/check_tokens.py`.
//!
//! `cargo run --release -p temper-lm --example encode -- tokenizer.json < texts.jsonl`

use std::error::Error;
use std::io::{BufRead, Write, stdin, stdout};
use std::path::PathBuf;

use lm::Tokenizer;

fn main() -> Result<(), Box<dyn Error>> {
    let file = std::env::args().nth(1).map(PathBuf::from).ok_or("usage: encode tokenizer.json < texts.jsonl")?;
    let tokenizer = Tokenizer::load(&file)?;
    let mut output = stdout().lock();
    for line in stdin().lock().lines() {
        let text: String = serde_json::from_str(&line?)?;
        writeln!(output, "{}", serde_json::json!(tokenizer.encode(&text)))?;
    }
    Ok(())
}
