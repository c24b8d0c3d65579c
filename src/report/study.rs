//! A run's evaluations gathered into arms and seeds. Knows no markup.

use std::collections::BTreeMap;

use engine::error::Result;
use stages::types::{CurvePoint, Evaluation, EvaluationInfo, Example, FactSensitivity, Half};

use super::load::{Instance, RunData};

/// The name of the matrix dimension that repeats an arm.
const SEED: &str = "seed";

/// Numbers in a sentence.
pub fn list(seeds: &[u64]) -> String {
    if seeds.is_empty() {
        return "none".to_owned();
    }
    seeds.iter().map(u64::to_string).collect::<Vec<_>>().join(", ")
}

/// One policy run and its evaluation.
#[derive(Clone, Debug)]
pub struct Run {
    pub seed: u64,
    pub about: EvaluationInfo,
    pub curve: Vec<CurvePoint>,
    pub examples: Vec<Example>,
}

impl Run {
    /// The sampled steps on half B, in order.
    pub fn sampled(&self) -> impl Iterator<Item = &CurvePoint> {
        self.curve.iter().filter(|row| row.half == Half::B && !row.greedy)
    }

    pub fn at(&self, step: i64) -> Option<&CurvePoint> {
        self.sampled().find(|row| row.step == step)
    }

    pub fn start(&self) -> Option<&CurvePoint> {
        self.at(0)
    }

    pub fn end(&self) -> Option<&CurvePoint> {
        self.sampled().last()
    }

    /// The step that was best by gold on half A, seen on half B.
    pub fn chosen(&self) -> Option<&CurvePoint> {
        self.at(self.about.chosen_step)
    }

    pub fn has_quality(&self) -> bool {
        self.sampled().all(|row| row.quality.is_some())
    }
}

/// The runs that differ in their seed only.
#[derive(Clone, Debug)]
pub struct Arm {
    pub label: String,
    pub objective: String,
    pub scope: String,
    pub lambda: f64,
    pub runs: Vec<Run>,
}

#[derive(Clone, Debug, Default)]
pub struct Study {
    pub arms: Vec<Arm>,
    /// Of the gold model(s) that judged: (instance, mean, low, high); low above 0 means that it reads the post.
    pub sensitivity: Vec<(String, Option<FactSensitivity>)>,
    /// The seeds that settings were chosen on, as the pipeline file says.
    pub tuning: Vec<u64>,
}

impl Study {
    /// Every `Evaluation` of the run that is there, in the pipeline's order.
    pub fn gather(run: &RunData) -> Result<Self> {
        let mut arms: Vec<Arm> = Vec::new();
        let mut sensitivity: BTreeMap<String, Option<FactSensitivity>> = BTreeMap::new();
        for instance in run.instances.iter().filter(|i| i.output == "Evaluation") {
            let Some(folder) = run.folder(instance) else { continue };
            let about = Evaluation::info(&folder)?;
            let gold = run.input(instance, "gold").map_or_else(String::new, |gold| gold.name.clone());
            sensitivity.insert(gold, about.fact_sensitivity);
            let policy_run = Run {
                seed: about.seed,
                curve: Evaluation::curve(&folder)?,
                examples: Evaluation::examples(&folder)?,
                about,
            };
            let label = arm_label(instance);
            match arms.iter_mut().find(|arm| arm.label == label) {
                Some(arm) => arm.runs.push(policy_run),
                None => arms.push(Arm {
                    label,
                    objective: policy_run.about.objective.clone(),
                    scope: policy_run
                        .about
                        .more
                        .get("variance_scope")
                        .and_then(|s| s.as_str())
                        .unwrap_or_default()
                        .to_owned(),
                    lambda: policy_run.about.lambda,
                    runs: vec![policy_run],
                }),
            }
        }
        let tuning =
            run.settings["tuning_seeds"].as_array().into_iter().flatten().filter_map(|seed| seed.as_u64()).collect();
        Ok(Self { arms, sensitivity: sensitivity.into_iter().collect(), tuning })
    }

    /// The paper's own arm: adaptive with each pair's own variance.
    pub fn adaptive(&self) -> Option<&Arm> {
        self.arms.iter().find(|arm| arm.objective == "adaptive" && arm.scope == "sample")
    }

    pub fn seeds(&self) -> Vec<u64> {
        let mut seeds: Vec<u64> = self.arms.iter().flat_map(|arm| arm.runs.iter().map(|r| r.seed)).collect();
        seeds.sort_unstable();
        seeds.dedup();
        seeds
    }

    /// The reported seeds that settings were chosen on, in a sentence; none if there are none.
    pub fn flattered(&self) -> Option<String> {
        let both: Vec<u64> = self.seeds().into_iter().filter(|s| self.tuning.contains(s)).collect();
        let told =
            || format!("Settings were chosen on seeds that are reported here: {}. Their numbers flatter.", list(&both));
        (!both.is_empty()).then(told)
    }

    /// Whether any judging gold model is known not to read the post, or was not tested.
    pub fn gold_heading(&self) -> String {
        let told: Vec<String> = self
            .sensitivity
            .iter()
            .map(|(name, s)| match s {
                None => format!("fact sensitivity of {name} not measured: its posts carry no facts"),
                Some(s) => {
                    let numbers = format!("{:.2} [{:.2}, {:.2}]", s.mean, s.low, s.high);
                    if s.reads_the_post() {
                        format!("fact sensitivity of {name} {numbers}")
                    } else {
                        format!("the gold model does not read the post: fact sensitivity of {name} {numbers}")
                    }
                }
            })
            .collect();
        told.join("; ")
    }
}

fn arm_label(instance: &Instance) -> String {
    let labels: Vec<&str> =
        instance.matrix.iter().filter(|(dimension, _)| dimension != SEED).map(|(_, label)| label.as_str()).collect();
    if labels.is_empty() { instance.stage().to_owned() } else { labels.join(", ") }
}
