//! The arguments of `temper lm`.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use stages::error::IntoStageResult;

/// The tasks of `temper lm`.
#[derive(Debug, Subcommand)]
pub enum LmTask {
    /// Log-probabilities: {"text": …} or {"ids": […]} gives {"ids": […], "logprobs": [null, …]}, log p(ids[t] |
    /// ids[<t]) in nats
    Logprobs {
        #[command(flatten)]
        model: ModelArgs,
        /// PEFT folder of a LoRA adapter to apply to the model
        #[arg(long, value_name = "FOLDER")]
        adapter: Option<PathBuf>,
    },
    /// Continue a prompt: {"prompt": …} gives {"prompt", "response", "ids"}, with text and ids of the response
    Generate {
        #[command(flatten)]
        model: ModelArgs,
        /// PEFT folder of a LoRA adapter to apply to the model
        #[arg(long, value_name = "FOLDER")]
        adapter: Option<PathBuf>,
        #[command(flatten)]
        sampling: SamplingArgs,
    },
    /// Score a response: {"prompt": …, "response": …} gives {"score"} for a RewardModel, {"scores", "mean", "variance"}
    /// for an Ensemble
    Score {
        #[command(flatten)]
        model: ModelArgs,
    },
}

#[derive(Debug, Args)]
pub struct ModelArgs {
    /// The model's folder (config.json, weights, tokenizer.json) or a .gguf file; for `score` an artifact's folder
    #[arg(long, value_name = "PATH")]
    pub model: PathBuf,
    /// Number of lines read, computed and answered together
    #[arg(long, value_name = "LINES", default_value_t = 32, value_parser = clap::value_parser!(u16).range(1..=4096))]
    pub batch: u16,
    /// CPU threads; results do not depend on their number [default: all]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub threads: Option<u16>,
    #[command(flatten)]
    pub device: DeviceArgs,
}

#[derive(Clone, Debug, Args)]
pub struct DeviceArgs {
    /// Where models compute: cpu, portable (the CPU by the operations that GPUs use), cuda, cuda:N or metal [default:
    /// $TEMPER_DEVICE, else cpu]
    #[arg(long, value_name = "DEVICE")]
    pub device: Option<String>,
}

impl DeviceArgs {
    /// The device's name, checked as far as that is possible without starting it.
    ///
    /// # Errors
    /// It names no device, or one that this program was not built for.
    pub fn name(&self) -> engine::error::Result<String> {
        let name = match &self.device {
            Some(name) => name.clone(),
            None => std::env::var(::lm::DEVICE_VARIABLE).unwrap_or_default(),
        };
        ::lm::check_device_name(&name).into_stage_result()?;
        Ok(if name.is_empty() { "cpu".to_owned() } else { name })
    }
}

/// Sampling options for a response.
#[derive(Debug, Args)]
pub struct SamplingArgs {
    #[arg(long, value_name = "N", default_value_t = 48)]
    pub max_new_tokens: usize,
    /// Minimum number of tokens before the text may end
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub min_new_tokens: usize,
    #[arg(long, value_name = "T", default_value_t = 1.0, value_parser = positive)]
    pub temperature: f64,
    /// Sample from the most probable tokens that together reach this probability
    #[arg(long, value_name = "P", default_value_t = 1.0, value_parser = probability)]
    pub top_p: f64,
    /// Always take the most probable token
    #[arg(long, conflicts_with_all = ["temperature", "top_p", "seed"])]
    pub greedy: bool,
    /// Random seed; a response depends on it, on its line number and on its prompt
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,
}

fn positive(text: &str) -> Result<f64, String> {
    let number = text.parse().ok().filter(|x: &f64| *x > 0.0 && x.is_finite());
    number.ok_or_else(|| "expected a number above 0 (for the most probable token: --greedy)".to_owned())
}

fn probability(text: &str) -> Result<f64, String> {
    let number = text.parse().ok().filter(|x| *x > 0.0 && *x <= 1.0);
    number.ok_or_else(|| "expected a number above 0 and at most 1".to_owned())
}
