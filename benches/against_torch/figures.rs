//! The benchmark figures by name: each is prepared once and then measured once per request.

use std::time::Instant;

use temper_gemm::{Mat, PackedRhs, Rhs, Threads, WriteMode, matmul};

use lm::{AdamW, AdamWConfig, Batch, CausalLm, CounterRng, Dropout, Precision, SampleOptions, Sequence};
use stages::random::fixed_generator;

use crate::flops::TrainedWeights;
use crate::inputs::{self, to_message};
use crate::measure::{MeasureFn, Measurement};
use crate::ppo;
use crate::scoring::scoring;
use crate::shapes::{Lora, Shape, Shapes};

/// Prepares the figure `figure` at shape `shape` for measuring.
///
/// # Errors
/// If the figure or shape does not exist; names it.
pub fn prepare(figure: &str, shapes: &Shapes, shape: &str) -> Result<MeasureFn, String> {
    let (s, lora) = (shapes.get(shape)?.clone(), shapes.lora);
    let base = |precision| inputs::base(&s).map(|base| base.with_precision(precision));
    let full = |precision| base(precision)?.with_full_training().map_err(to_message);
    let adapted = |precision, dropout| inputs::with_adapter(&base(precision)?, lora, dropout);
    match figure {
        "full_step" => training_step(full(Precision::F32)?, TrainedWeights::All, shapes, s),
        "full_step_bf16" => training_step(full(Precision::Bf16)?, TrainedWeights::All, shapes, s),
        "lora_step" => training_step(adapted(Precision::F32, 0.0)?, lora_weights(lora), shapes, s),
        "lora_step_bf16" => training_step(adapted(Precision::Bf16, 0.0)?, lora_weights(lora), shapes, s),
        "lora_dropout_step" => training_step(adapted(Precision::F32, 0.1)?, lora_weights(lora), shapes, s),
        "score" => scoring(s, Precision::F32),
        "score_bf16" => scoring(s, Precision::Bf16),
        "prefill" => sampling(s, lora, false),
        "decode" => sampling(s, lora, true),
        "phase_lora_1" => ppo::phase(s, shapes, lora_weights(lora), 1),
        "phase_lora_5" => ppo::phase(s, shapes, lora_weights(lora), 5),
        "phase_full_1" => ppo::phase(s, shapes, TrainedWeights::All, 1),
        "phase_full_5" => ppo::phase(s, shapes, TrainedWeights::All, 5),
        "fastest_matmul" => Ok(fastest_matmul(s)),
        other => Err(format!("no figure `{other}`")),
    }
}

fn lora_weights(lora: Lora) -> TrainedWeights {
    TrainedWeights::Lora(lora.r)
}

/// Runs consecutive optimiser steps on the loss of the response tokens; reports the cost of one step.
fn training_step(model: CausalLm, trained: TrainedWeights, shapes: &Shapes, s: Shape) -> Result<MeasureFn, String> {
    let optimiser = shapes.optimiser;
    let config = AdamWConfig { weight_decay: optimiser.weight_decay, ..AdamWConfig::default() };
    let mut adamw = AdamW::new(model.variables(), config).map_err(to_message)?;
    let mut dropout = Dropout::new(fixed_generator(6, "dropout"));
    let sequences = inputs::sequences(&s, s.train_batch)?;
    Ok(Box::new(move || {
        let clock = Instant::now();
        for _ in 0..s.steps {
            let batch = Batch::new(&sequences.iter().collect::<Vec<&Sequence>>()).map_err(to_message)?;
            let loss = model.lm_loss(&batch, 0.0, Some(&mut dropout)).map_err(to_message)?;
            let gradients = lm::backward(&loss.loss).map_err(to_message)?;
            adamw.step(&gradients, optimiser.lr, Some(optimiser.clip)).map_err(to_message)?;
        }
        Ok(Measurement {
            seconds: clock.elapsed().as_secs_f64() / s.steps as f64,
            tokens: (s.train_batch * (s.prompt + s.max_new)) as u64,
            flops: s.full_pass(s.train_batch, true).forward_and_backward(trained),
        })
    }))
}

/// Samples from a policy with an adapter: up to the first token, or the time of all further tokens. The latter is the
/// difference between two consecutive runs.
fn sampling(s: Shape, lora: Lora, decode: bool) -> Result<MeasureFn, String> {
    let policy = inputs::with_adapter(&inputs::base(&s)?, lora, 0.0)?.frozen();
    let prompts = inputs::prompts(&s, s.decode_batch)?;
    let rows: Vec<u64> = (0..prompts.len() as u64).collect();
    let time = move |new: usize| -> Result<f64, String> {
        let prompts: Vec<&[u32]> = prompts.iter().map(Vec::as_slice).collect();
        let options = SampleOptions {
            temperature: 1.0,
            top_p: 1.0,
            min_new_tokens: new,
            max_new_tokens: new,
            eos: 0.into(),
            greedy: false,
        };
        let clock = Instant::now();
        lm::sample(&policy, &prompts, &options, &CounterRng([7; 32]), &rows).map_err(to_message)?;
        Ok(clock.elapsed().as_secs_f64())
    };
    let n = s.decode_batch;
    Ok(Box::new(move || {
        let prefill = time(1)?;
        if !decode {
            return Ok(Measurement { seconds: prefill, tokens: (n * s.prompt) as u64, flops: s.prefill(n) });
        }
        let seconds = time(s.max_new)? - prefill;
        Ok(Measurement { seconds, tokens: (n * (s.max_new - 1)) as u64, flops: s.decode(n) })
    }))
}

/// The fastest of our matrix products among the shapes of a training step, with a packed right operand as for products
/// with weights, or by the library that the other kernels call.
fn fastest_matmul(s: Shape) -> MeasureFn {
    let rows = s.train_batch * (s.prompt + s.max_new);
    let (d, responses) = (s.d, s.train_batch * s.max_new);
    let sizes = [(rows, d, 3 * d), (rows, d, d), (rows, d, 4 * d), (rows, 4 * d, d), (responses, d, s.vocab)];
    Box::new(move || {
        let products = sizes
            .iter()
            .flat_map(|&(m, k, n)| matmul_seconds(m, k, n).map(|seconds| (seconds, 2.0 * (m * k * n) as f64)));
        let fastest = products.max_by(|a, b| (a.1 / a.0).total_cmp(&(b.1 / b.0)));
        let (seconds, flops) = fastest.ok_or("a training step has matrix products")?;
        Ok(Measurement { seconds, tokens: 0, flops })
    })
}

/// Seconds of the fastest of several products of `[m, k]` and `[k, n]`, for both methods.
fn matmul_seconds(m: usize, k: usize, n: usize) -> [f64; 2] {
    const REPEATS: usize = 5;
    let (a, b, mut out) = (vec![0.5_f32; m * k], vec![0.25_f32; k * n], vec![0.0_f32; m * n]);
    let packed = PackedRhs::new(Mat::new(&b, k, n), None, Precision::F32);
    let min_seconds = |run: &mut dyn FnMut()| {
        let seconds = (0..REPEATS).map(|_| {
            let clock = Instant::now();
            run();
            clock.elapsed().as_secs_f64()
        });
        seconds.fold(f64::INFINITY, f64::min)
    };
    [Rhs::Packed(&packed), Rhs::InPlace(Mat::new(&b, k, n))].map(|b| {
        min_seconds(&mut || {
            matmul(&mut out, WriteMode::Overwrite, 1.0, Mat::new(&a, m, k), b, Threads::Pool);
            std::hint::black_box(&mut out);
        })
    })
}
