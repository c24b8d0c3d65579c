//! Matrix products with a packed right operand and in bf16 against those of the `gemm` crate, at the shapes of training
//! and decoding, on one thread and on all: GFLOP/s and ratios. Run it with nothing else on the machine:
//!
//!     MIMALLOC_PURGE_DELAY=-1 cargo bench -p temper-gemm --bench matmul [-- rounds]
//!
//! Medians of interleaved rounds. "Packed" excludes the packing of the right operand, which several products share.

use std::time::Instant;

use temper_gemm::dense::gemm;
use temper_gemm::matmul::matmul_unpacked_into;
use temper_gemm::{Mat, PackedRhs, Precision, Rhs, Threads, WriteMode, matmul};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Rows, inner dimension, columns; whether each operand is transposed in memory.
type Shape = (usize, usize, usize, bool, bool);

/// Tokens, width and vocabulary of the two models: 14M and 124M parameters.
const SIZES: [(usize, usize, usize); 2] = [(1024, 384, 8192), (1792, 768, 50257)];

/// The products of a model of width `d` over `n` tokens: forward, input gradient, weight gradient; LM head;
/// decoding; an adapter.
fn shapes((n, d, vocab): (usize, usize, usize)) -> Vec<Shape> {
    let linears = [(d, d), (d, 3 * d), (d, 4 * d), (4 * d, d)];
    let mut all: Vec<Shape> = linears.iter().map(|&(i, o)| (n, i, o, false, false)).collect();
    all.extend(linears.iter().map(|&(i, o)| (n, o, i, false, true)));
    all.extend(linears.iter().map(|&(i, o)| (i, n, o, true, false)));
    all.extend([(256, d, vocab, false, true), (256, vocab, d, false, false), (vocab, 256, d, true, false)]);
    all.extend([1, 16, 64].map(|rows| (rows, d, 4 * d, false, false)));
    // An adapter of rank 8 on a chunk of rows: its forward product, and its gradients.
    all.extend([(256, d, 8, false, true), (256, 4 * d, 8, false, false)]);
    all.extend([(8, 256, d, true, false), (8, 256, 4 * d, true, false)]);
    all
}

fn seconds(f: impl FnOnce()) -> f64 {
    let start = Instant::now();
    f();
    start.elapsed().as_secs_f64()
}

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

fn measure((m, k, n, a_t, b_t): Shape, threads: Threads, rounds: usize) {
    let noise = |len: usize| (0..len).map(|i| (i * 7919 % 1009) as f32 / 504.0 - 1.0).collect::<Vec<_>>();
    let (a, b) = (noise(m * k), noise(k * n));
    let a = if a_t { Mat::new(&a, k, m).t() } else { Mat::new(&a, m, k) };
    let b = if b_t { Mat::new(&b, n, k).t() } else { Mat::new(&b, k, n) };
    let packed = [Precision::F32, Precision::Bf16].map(|precision| PackedRhs::new(b, None, precision));
    let mut out = vec![0.0; m * n];
    let mut times = [const { Vec::new() }; 4];
    // Several products per round if one is too short to time.
    let repeat = (50_000_000 / (m * k * n)).max(1);
    for round in 0..=rounds {
        let mut time = |which: usize, f: &mut dyn FnMut()| {
            let time = seconds(|| (0..repeat).for_each(|_| f()));
            // The first round warms up.
            if round > 0 {
                times[which].push(time);
            }
        };
        let mut run_packed = |which: usize, b: &PackedRhs| {
            time(which, &mut || matmul(&mut out, WriteMode::Overwrite, 1.0, a, Rhs::Packed(b), threads));
        };
        run_packed(2, &packed[1]);
        if !a_t {
            run_packed(3, &packed[0]);
        }
        time(0, &mut || gemm(&mut out, WriteMode::Overwrite, 1.0, a, b, threads));
        if threads == Threads::Pool {
            time(1, &mut || matmul_unpacked_into(&mut out, WriteMode::Overwrite, 1.0, a, b, Precision::Bf16));
        }
    }
    let [f32, bf16, bf16_packed, f32_packed] =
        times.map(|t| (!t.is_empty()).then(|| 2e-9 * (m * k * n * repeat) as f64 / median(t)));
    let side = |transposed| if transposed { "'" } else { " " };
    let format_rate = |rate: Option<f64>| match (rate, f32) {
        (Some(rate), Some(f32)) => format!("{rate:9.1} {:6.2}x", rate / f32),
        _ => " ".repeat(17),
    };
    println!(
        "{m:6}{} x {k:5} x {n:5}{}  {:9.1} {} {} {}",
        side(a_t),
        side(b_t),
        f32.unwrap_or_default(),
        format_rate(f32_packed),
        format_rate(bf16),
        format_rate(bf16_packed)
    );
}

fn main() {
    let rounds = std::env::args().skip(1).find_map(|a| a.parse().ok()).unwrap_or(9);
    for (threads, name) in [(Threads::One, "one thread"), (Threads::Pool, "all threads")] {
        println!("\n{name}");
        println!("{:<26} {:>9} {:>17} {:>17} {:>17}", "GFLOP/s", "gemm", "f32 packed", "bf16", "bf16 packed");
        for shape in SIZES.into_iter().flat_map(shapes) {
            measure(shape, threads, rounds);
        }
    }
}
