//! Our side of the comparison with PyTorch: a process that reads figure names from standard input and measures each
//! once. `compare.py` runs both sides.
//!
//! Arguments: the path of `shapes.json` and the number of threads. Each line of input is `{"figure": …, "shape": …}`,
//! each line of output `{"seconds", "tokens", "flops", "start_rss", "peak_rss"}`, the last two in bytes. The figure
//! `inputs` is answered with `{"prompts", "sequences"}`, the ids for the other side if a shape has a tokenizer;
//! `score_bf16_error` is answered with `{"rms", "largest"}`, in nats.

mod figures;
mod flops;
mod inputs;
mod measure;
mod ppo;
mod scoring;
mod shapes;

use std::io::{BufRead, Write};
use std::path::Path;

use serde::{Deserialize, Serialize};

use measure::{MeasureFn, Measurement};
use shapes::Shapes;

/// Same allocator as in the `temper` command.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

#[derive(Debug, Deserialize, PartialEq)]
struct Request {
    figure: String,
    shape: String,
}

#[derive(Debug, Serialize)]
struct Reply {
    #[serde(flatten)]
    measurement: Measurement,
    /// Resident memory before the first request, in bytes; `peak_rss`: its maximum so far.
    start_rss: u64,
    peak_rss: u64,
}

#[derive(Debug, Serialize)]
struct Inputs {
    prompts: Vec<Vec<u32>>,
    /// Pairs of prompt and response.
    sequences: Vec<[Vec<u32>; 2]>,
}

const INPUTS: &str = "inputs";
const SCORE_BF16_ERROR: &str = "score_bf16_error";

fn main() -> Result<(), String> {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    let [file, threads] = arguments.as_slice() else {
        return Err(
            "run it with `benches/against_torch/run.sh`: it passes shapes.json and a number of threads".to_owned()
        );
    };
    lm::set_threads(threads.parse().map_err(|_| format!("`{threads}` is not a number of threads"))?);
    let shapes = Shapes::read(Path::new(file))?;
    let start_rss = memory("VmRSS:")?;
    let mut ready: Option<(Request, MeasureFn)> = None;
    for line in std::io::stdin().lock().lines() {
        let line = line.map_err(|e| format!("standard input: {e}"))?;
        let request: Request = serde_json::from_str(&line).map_err(|e| format!("not a request: {line}: {e}"))?;
        let shape = shapes.get(&request.shape)?;
        match request.figure.as_str() {
            INPUTS => {
                let sequences = inputs::sequences(shape, shape.rollouts)?;
                let sequences = sequences.into_iter().map(|s| [s.prompt, s.response]).collect();
                write_line(&Inputs { prompts: inputs::prompts(shape, shape.rollouts)?, sequences })?;
                continue;
            }
            SCORE_BF16_ERROR => {
                write_line(&scoring::bf16_error(shape)?)?;
                continue;
            }
            _ => {}
        }
        let mut run = match ready.take() {
            Some((prepared, run)) if prepared == request => run,
            _ => figures::prepare(&request.figure, &shapes, &request.shape)?,
        };
        let reply = Reply { measurement: run()?, start_rss, peak_rss: memory("VmHWM:")? };
        ready = Some((request, run));
        write_line(&reply)?;
    }
    Ok(())
}

/// Writes a reply as one line of JSON.
fn write_line(reply: &impl Serialize) -> Result<(), String> {
    let text = serde_json::to_string(reply).map_err(|e| format!("a reply: {e}"))?;
    let mut out = std::io::stdout().lock();
    writeln!(out, "{text}").and_then(|()| out.flush()).map_err(|e| format!("standard output: {e}"))
}

/// A field of this process's `/proc/self/status`, in bytes.
fn memory(field: &str) -> Result<u64, String> {
    let status = std::fs::read_to_string("/proc/self/status").map_err(|e| format!("/proc/self/status: {e}"))?;
    let kibibytes = status.lines().find_map(|line| line.strip_prefix(field)?.split_whitespace().next()?.parse().ok());
    kibibytes.map(|n: u64| n * 1024).ok_or_else(|| format!("/proc/self/status has no {field}"))
}
