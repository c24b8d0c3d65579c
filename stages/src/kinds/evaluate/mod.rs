//! `evaluate`: judges the held-out samples of a policy run or of best-of-n with the gold model and, if posts carry
//! facts, by true quality.

mod best_of_n;
mod calibration;
mod curve;
mod examples;
mod judge;
mod mechanism;

pub use mechanism::kl_shares;

use engine::context::Context;
use engine::error::{Error, Result};
use engine::estimate::{Forecast, Scaling};
use engine::kind::{Kind, Signature};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::model::forecast::{Models, memory};
use crate::table;
use crate::types::folder::write_json;
use crate::types::{BestOfN, CurvePoint, Evaluation, EvaluationInfo, Half, PolicyRun, Sample, SftScale, Split};

#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Params {
    /// Bootstrap resamples over prompts for every interval.
    pub resamples: usize,
    /// Number of posts whose summaries are kept for reading (Table 1).
    pub examples: usize,
}

impl Default for Params {
    fn default() -> Self {
        Self { resamples: 1000, examples: 4 }
    }
}

pub struct Evaluate;

impl Kind for Evaluate {
    type Params = Params;

    const NAME: &'static str = "evaluate";
    const VERSION: u32 = 3;
    const ABOUT: &'static str = "gold reward, true quality, proxy, KL and variance of a policy run by step, or of best-of-n by n, with intervals";

    fn signature(&self, _: &Params) -> Signature {
        Signature::producing("Evaluation")
            .one("policy", &["PolicyRun", "BestOfN"])
            .one("gold", &["RewardModel"])
            .one("posts", &["Posts"])
            .numerics(lm::NUMERICS)
    }

    fn check(&self, params: &Params) -> Vec<(String, String)> {
        if params.resamples < 100 { vec![("resamples".into(), "must be at least 100".into())] } else { Vec::new() }
    }

    fn scaling(&self, _: &Params, size: &dyn Fn(&str) -> Option<f64>) -> Option<Scaling> {
        let policy = size("policy")?;
        let gold = size("gold")?;
        Some(Scaling::new(policy * gold, policy))
    }

    fn forecast(&self, _: &Params, inputs: &dyn Fn(&str) -> Vec<Value>) -> Forecast {
        memory(Models::new(&inputs("gold")).map(|models| models.scoring(judge::BATCH)))
    }

    fn run(&self, params: Params, ctx: &mut Context) -> Result<()> {
        lm::follow_threads(ctx.thread_limit().clone());
        if ctx.one("policy")?.artifact_type == BestOfN::NAME {
            return best_of_n::evaluate(&params, ctx);
        }
        let run = ctx.one("policy")?.folder.clone();
        let policy = PolicyRun::info(&run)?;
        let samples: Vec<Sample> = table::read(&run.join(PolicyRun::SAMPLES))?;
        let phases = PolicyRun::phases(&run)?;
        let scores = judge::judge(&samples, &policy, ctx)?;
        table::write(&ctx.out().join(Evaluation::SCORES), scores.iter().cloned())?;

        let steps = curve::steps(&scores);
        let last = *steps.last().ok_or_else(|| Error::internal("evaluate: the policy run holds no samples"))?;
        let fits = calibration::Fits::of(&scores);
        let rows = curve::curve(&scores, &fits, params.resamples);
        table::write(&ctx.out().join(Evaluation::CURVE), rows.iter().cloned())?;

        table::write(&ctx.out().join(Evaluation::CALIBRATION), calibration::bins(&scores, &fits))?;

        let at = |step: i64, half: Half| rows.iter().find(|r| r.step == step && r.half == half && !r.greedy);
        let chosen = curve::best_on(&rows, Half::A).unwrap_or(last);
        let examples =
            examples::pick(&samples, &scores, &[0, chosen, last], params.examples, &judge::posts(ctx, Split::Valid)?);
        table::write(&ctx.out().join(Evaluation::EXAMPLES), examples)?;

        for (name, step) in [("start", 0), ("final", last), ("chosen", chosen)] {
            if let Some(row) = at(step, Half::B) {
                note(name, row, ctx);
            }
        }
        let sft: Vec<f64> = curve::select(&scores, 0, Half::B, false).map(|s| s.gold).collect();
        let sensitivity = judge::gold_about(ctx)?.fact_sensitivity;
        let prompts = curve::select(&scores, 0, Half::A, false).count() + sft.len();
        let mut more = policy.more.clone();
        more.insert("phases".into(), json!(policy.phases));
        more.insert("members".into(), json!(policy.members));
        let evaluation_seed = more.remove("evaluation_seed").and_then(|seed| seed.as_u64()).unwrap_or_default();
        let info = EvaluationInfo {
            mechanism: mechanism::mechanism(&phases, &scores, &fits, last, &policy),
            objective: policy.objective,
            lambda: policy.lambda,
            seed: policy.seed,
            evaluation_seed,
            steps,
            chosen_step: chosen,
            final_step: last,
            sft: SftScale { gold_mean: crate::stats::mean(&sft), gold_std: crate::stats::std(&sft) },
            reads_the_post: sensitivity.as_ref().is_some_and(|s| s.reads_the_post()),
            fact_sensitivity: sensitivity,
            prompt_count: prompts as u64,
            more,
        };
        write_json(&ctx.out().join(Evaluation::INFO), &info)
    }
}

/// Records a step's numbers on half B as metrics: `final_gold_sd` and so on.
fn note(step: &str, row: &CurvePoint, ctx: &mut Context) {
    let mut put = |name: &str, value: Option<f64>| {
        if let Some(value) = value {
            ctx.metric(format!("{step}_{name}"), value);
        }
    };
    put("gold", Some(row.gold));
    put("gold_sd", Some(row.gold_sd));
    put("win_rate", Some(row.win_rate));
    put("proxy", Some(row.proxy));
    put("variance", row.variance);
    put("kl", Some(row.kl));
    put("kl_exact", Some(row.kl_exact));
    put("length", Some(row.length));
    put("eos_rate", Some(row.eos_rate));
    put("quality", row.quality);
}
