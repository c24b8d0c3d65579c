//! `annotate.local`: a language model in this process labels pairs.

use engine::context::Context;
use engine::error::Result;
use engine::estimate::{Forecast, Scaling};
use engine::external::InputPath;
use engine::kind::{Kind, Signature};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::judge::instructions::{self, Criterion, Instructions};
use crate::judge::local::{self, JudgeModel, LocalJudge, PromptForm};
use crate::judge::params::{self, defaults};
use crate::model::forecast::{self, Models, memory};
use crate::train::params::Faults;
use crate::types::{Model, Pairs, Posts, Preferences};

pub struct Local;

#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Params {
    /// A GGUF file of a Llama, Qwen2, Qwen3 or Phi 3, in place of the input `model`. It runs with its quantised
    /// weights, on the CPU, with prompts of at most 4,096 tokens.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gguf: Option<InputPath>,
    /// The `tokenizer.json` of the model in `gguf`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokenizer: Option<InputPath>,
    /// A file with a request template instead of the built-in one, as for `annotate.claude`.
    #[serde(default)]
    pub template: Option<InputPath>,
    /// A file with worked examples instead of the two built-in ones, as for `annotate.claude`.
    #[serde(default)]
    pub examples: Option<InputPath>,
    /// Number of worked examples that each prompt shows, from the first. Absent: all. They take most of the time; small
    /// windows have no room for them.
    #[serde(default)]
    pub shots: Option<usize>,
    /// What counts in a good summary: a text that follows the template's instructions.
    #[serde(default)]
    pub rubric: Option<String>,
    /// Several questions about each pair instead of one: `[{name, text, weight}]`. The label is the weighted mean of their
    /// probabilities; the single answers are in `aspects.parquet`.
    #[serde(default)]
    pub questions: Vec<Criterion>,
    /// `auto`: the chat template if there is one, otherwise plain text. `chat`: the chat template. `plain`: plain text, for
    /// models without a chat format.
    #[serde(default)]
    pub prompt: PromptForm,
    /// A file with a chat template instead of the model's: a `tokenizer_config.json`, or the template itself.
    #[serde(default)]
    pub chat_template: Option<InputPath>,
    /// Maximum fraction of pairs that are too long for the model's window; those are marked `failed`.
    #[serde(default = "defaults::max_unlabelled")]
    pub max_unlabelled: f64,
}

impl Params {
    fn instructions(&self) -> Result<Instructions> {
        let (template, examples) = (self.template.as_ref(), self.examples.as_ref());
        let mut instructions = Instructions::load(template, examples, self.rubric.as_deref(), &self.questions)?;
        instructions.examples.truncate(self.shots.unwrap_or(usize::MAX));
        Ok(instructions)
    }
}

impl Kind for Local {
    type Params = Params;

    const NAME: &'static str = "annotate.local";
    const VERSION: u32 = 1;
    const ABOUT: &'static str = "judges pairs by a language model that runs in the process, without a server";

    fn signature(&self, p: &Params) -> Signature {
        let signature = Signature::producing(Preferences::NAME).many("pairs", &[Pairs::NAME]);
        match p.gguf {
            None => signature.one("model", &[Model::NAME]).optional("exclude", &[Posts::NAME]).numerics(lm::NUMERICS),
            // Its numbers are those of candle-transformers, which computes here on the CPU alone.
            Some(_) => Signature { parallel: true, ..signature.optional("exclude", &[Posts::NAME]) },
        }
    }

    fn check(&self, p: &Params) -> Vec<(String, String)> {
        let mut faults = Faults::default();
        faults.must(params::is_share(p.max_unlabelled), "max_unlabelled", "expected 0 to 1");
        if let Some(InputPath(file)) = &p.gguf {
            let is_gguf = file.extension().is_some_and(|end| end.eq_ignore_ascii_case("gguf"));
            faults.must(is_gguf, "gguf", "must be a .gguf file; `model.import` reads other models");
        }
        let (gguf, tokenizer) = (p.gguf.is_some(), p.tokenizer.is_some());
        faults.must(tokenizer || !gguf, "tokenizer", "`gguf` needs the model's tokenizer.json");
        faults.must(gguf || !tokenizer, "tokenizer", "is not used without `gguf`; a model artifact has its tokenizer");
        let unused = p.prompt == PromptForm::Plain && p.chat_template.is_some();
        faults.must(!unused, "chat_template", "is not used with `prompt: plain`");
        faults.0.extend(instructions::faults(&p.questions));
        faults.0
    }

    fn check_files(&self, p: &Params) -> Vec<(String, String)> {
        let mut faults = params::file_faults(p.template.as_ref(), p.examples.as_ref(), &p.questions);
        if let (true, Some(shots), Ok(instructions)) =
            (faults.is_empty(), p.shots, Params { shots: None, ..p.clone() }.instructions())
        {
            let there = instructions.examples.len();
            if shots > there {
                faults.push(("shots".to_owned(), format!("there are {there} worked examples")));
            }
        }
        if let Some(Err(error)) =
            p.gguf.as_ref().filter(|file| file.0.is_file()).map(|InputPath(file)| lm::QuantizedFile::open(file))
        {
            faults.push(("gguf".to_owned(), error.to_string()));
        }
        faults
    }

    fn scaling(&self, p: &Params, size: &dyn Fn(&str) -> Option<f64>) -> Option<Scaling> {
        let pairs = size("pairs")? * p.questions.len().max(1) as f64;
        let model = match &p.gguf {
            Some(InputPath(file)) => std::fs::metadata(file).ok()?.len() as f64,
            None => size("model")?,
        };
        Some(Scaling::new(pairs * model, pairs))
    }

    fn forecast(&self, p: &Params, inputs: &dyn Fn(&str) -> Vec<Value>) -> Forecast {
        memory(match &p.gguf {
            Some(InputPath(file)) => lm::QuantizedFile::open(file).ok().map(|file| forecast::quantised(&file)),
            None => Models::new(&inputs("model")).map(|models| models.scoring_tokens(local::MAX_BATCH_TOKENS)),
        })
    }

    fn run(&self, p: Params, ctx: &mut Context) -> Result<()> {
        let model = match (&p.gguf, &p.tokenizer) {
            (Some(InputPath(file)), Some(InputPath(tokenizer))) => JudgeModel::Gguf { file, tokenizer },
            _ => JudgeModel::Port,
        };
        let judge = LocalJudge {
            model,
            instructions: p.instructions()?,
            prompt: p.prompt,
            chat_template: p.chat_template.as_ref().map(|file| file.0.as_path()),
            max_unlabelled: p.max_unlabelled,
        };
        local::run(&judge, ctx)
    }
}
