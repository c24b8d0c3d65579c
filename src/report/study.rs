//! Groups a run's evaluations into arms and seeds.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use engine::names::Digest;
use serde_json::Value;
use stages::rl::objective::VarianceScope;
use stages::types::Objective;
use stages::types::{
    BestOfPoint, CalibrationBin, CurvePoint, Evaluation, EvaluationInfo, Example, FactSensitivity, Half, Phase,
    PolicyRun,
};

use super::load::{Instance, RunData, SEED};

/// Formats numbers as a list in a sentence.
pub fn list(seeds: &[u64]) -> String {
    if seeds.is_empty() {
        return "none".to_owned();
    }
    seeds.iter().map(u64::to_string).collect::<Vec<_>>().join(", ")
}

/// The part of an arm in the study's hypotheses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    Standard,
    /// The members' mean with a constant coefficient.
    Mean,
    Pessimistic,
    /// The paper's own: adaptive with each sample's own variance.
    Adaptive,
    /// Adaptive with the batch's mean variance.
    Batch,
    /// Adaptive with the variances permuted over the batch.
    Shuffled,
    /// Adaptive with the variance of the prompt's other responses.
    Prompt,
    /// The members' mean with the constant coefficient that matches an adaptive run.
    MatchedConstant,
    /// The members' mean with one matched coefficient per phase.
    MatchedPhases,
    /// The members' mean with a coefficient steered towards a KL target.
    KlTarget,
    /// The members' mean less k times their variance.
    Uwo,
    Other,
}

impl Role {
    pub fn of(about: &EvaluationInfo) -> Self {
        let more = |name: &str| about.more.get(name).cloned().unwrap_or_default();
        let is_steered = more("kl").get("controller").and_then(Value::as_str) == Some("target");
        match about.objective.parse() {
            Ok(Objective::Mean) if is_steered => Self::KlTarget,
            _ if is_steered => Self::Other,
            Ok(Objective::Standard) => Self::Standard,
            Ok(Objective::Mean) => Self::Mean,
            Ok(Objective::Pessimistic) => Self::Pessimistic,
            Ok(Objective::Uwo) => Self::Uwo,
            Ok(Objective::Matched) if more("matching") == "phases" => Self::MatchedPhases,
            Ok(Objective::Matched) => Self::MatchedConstant,
            Ok(Objective::Adaptive) => match serde_json::from_value(more("variance_scope")) {
                Ok(VarianceScope::Sample) => Self::Adaptive,
                Ok(VarianceScope::Batch) => Self::Batch,
                Ok(VarianceScope::Shuffled) => Self::Shuffled,
                Ok(VarianceScope::Prompt) => Self::Prompt,
                Err(_) => Self::Other,
            },
            _ => Self::Other,
        }
    }

    /// Whether the arm uses Algorithm 1's coefficient, with any variance.
    pub fn is_adaptive(self) -> bool {
        matches!(self, Self::Adaptive | Self::Batch | Self::Shuffled | Self::Prompt)
    }
}

/// One policy run and its evaluation.
#[derive(Clone, Debug)]
pub struct Run {
    /// The label of the matrix dimension `seed`, which pairs arms; without one, the policy run's own seed.
    pub seed: u64,
    pub about: EvaluationInfo,
    pub curve: Vec<CurvePoint>,
    pub examples: Vec<Example>,
    /// Mean variance of the ensemble on random text and on calibration samples.
    pub ensemble_s2: Option<(f64, f64)>,
    /// The ensemble's variance and its squared error, by KL.
    pub calibration: Vec<CalibrationBin>,
    /// The RL log of each phase; empty if the policy run is gone.
    pub phases: Vec<Phase>,
    /// The model that RL started from; `None` if unknown.
    pub policy: Option<Digest>,
    /// Digests of everything that the policy run was made from, by stage. `None` if one is unknown.
    pub input_digests: Option<BTreeMap<String, BTreeSet<Digest>>>,
}

impl Run {
    /// The sampled steps on half B, in order.
    pub fn sampled(&self) -> impl Iterator<Item = &CurvePoint> {
        self.sampled_on(Half::B)
    }

    /// The sampled steps on a half, in order.
    pub fn sampled_on(&self, half: Half) -> impl Iterator<Item = &CurvePoint> {
        self.curve.iter().filter(move |row| row.half == half && !row.greedy)
    }

    pub fn at(&self, step: i64) -> Option<&CurvePoint> {
        self.sampled().find(|row| row.step == step)
    }

    /// The greedy responses of a step on half B; by default drawn at the first and the last step only.
    pub fn greedy(&self, step: i64) -> Option<&CurvePoint> {
        self.curve.iter().find(|row| row.half == Half::B && row.greedy && row.step == step)
    }

    pub fn start(&self) -> Option<&CurvePoint> {
        self.at(0)
    }

    pub fn end(&self) -> Option<&CurvePoint> {
        self.sampled().last()
    }

    /// The step with the best gold on half A, with its values on half B.
    pub fn chosen(&self) -> Option<&CurvePoint> {
        self.at(self.about.chosen_step)
    }

    pub fn has_quality(&self) -> bool {
        self.curve.iter().all(|row| row.quality.is_some())
    }
}

/// The runs that differ only in their seed.
#[derive(Clone, Debug)]
pub struct Arm {
    /// The stage that evaluates it.
    pub stage: String,
    /// (dimension, label) of that stage's matrix, without the seed.
    pub labels: Vec<(String, String)>,
    /// The arm's name in the report.
    pub label: String,
    pub role: Role,
    pub lambda: f64,
    pub runs: Vec<Run>,
}

impl Arm {
    pub fn run(&self, seed: u64) -> Option<&Run> {
        self.runs.iter().find(|run| run.seed == seed)
    }

    /// Whether both arms come from one matrix and differ in exactly one dimension: size s is compared with s, m with m.
    fn differs_in_one_label(&self, other: &Self) -> bool {
        let same_dimensions = self.labels.iter().map(|l| &l.0).eq(other.labels.iter().map(|l| &l.0));
        let apart = self.labels.iter().zip(&other.labels).filter(|(a, b)| a != b).count();
        self.stage == other.stage && same_dimensions && apart == 1
    }
}

/// The evaluations of best-of-n that differ only in their seed.
#[derive(Clone, Debug)]
pub struct BestOf {
    /// The stage with its matrix labels, without the seed.
    pub label: String,
    /// The points of each seed.
    pub runs: Vec<Vec<BestOfPoint>>,
}

#[derive(Clone, Debug, Default)]
pub struct Study {
    pub arms: Vec<Arm>,
    /// Fact sensitivity of the judging gold model(s) by instance; absent if not measured. An interval above 0 means
    /// that the model reads the post.
    pub sensitivity: Vec<(String, Option<FactSensitivity>)>,
    /// The seeds used to choose settings, as stated in the pipeline file.
    pub tuning: Vec<u64>,
    /// The pipeline's own seed, which determines everything before PPO; `None` for runs of older versions.
    pub seed: Option<u64>,
    /// Evaluations of best-of-n.
    pub best_of: Vec<BestOf>,
    /// Evaluations of the graph that are not there: the run was cut short, or a stage failed.
    pub absent: usize,
    /// Evaluations that could not be read, and why.
    pub unreadable: Vec<(String, String)>,
}

impl Study {
    /// Every existing `Evaluation` of the run, in pipeline order.
    pub fn gather(run: &RunData) -> Self {
        let mut study = Self { seed: run.seed, ..Self::default() };
        let mut sensitivity: BTreeMap<String, Option<FactSensitivity>> = BTreeMap::new();
        for instance in run.instances.iter().filter(|i| i.output == "Evaluation") {
            let Some(folder) = run.folder(instance) else {
                study.absent += 1;
                continue;
            };
            match Evaluation::best_of_n(&folder) {
                Ok(None) => {}
                Ok(Some(points)) => {
                    study.add_best_of(instance, points);
                    continue;
                }
                Err(error) => {
                    study.unreadable.push((instance.name.clone(), error.to_string()));
                    continue;
                }
            }
            let evaluated = match read(&folder) {
                Ok((about, curve, examples)) => Run {
                    seed: label(instance, SEED).and_then(|label| label.parse().ok()).unwrap_or(about.seed),
                    about,
                    curve,
                    examples,
                    ensemble_s2: ensemble_s2(run, instance),
                    calibration: Evaluation::calibration(&folder).unwrap_or_default(),
                    phases: phases(run, instance),
                    policy: policy(run, instance),
                    input_digests: input_digests(run, instance),
                },
                Err(error) => {
                    study.unreadable.push((instance.name.clone(), error.to_string()));
                    continue;
                }
            };
            let gold = run.input(instance, "gold").map_or_else(String::new, |gold| gold.name.clone());
            sensitivity.insert(gold, evaluated.about.fact_sensitivity);
            study.add_run(instance, evaluated);
        }
        disambiguate_labels(&mut study.arms);
        study.sensitivity = sensitivity.into_iter().collect();
        study.tuning.clone_from(&run.settings.tuning_seeds);
        study
    }

    fn add_best_of(&mut self, instance: &Instance, points: Vec<BestOfPoint>) {
        let labels = instance.matrix.iter().filter(|(dimension, _)| dimension != SEED).map(|(_, label)| label.as_str());
        let label = std::iter::once(instance.stage()).chain(labels).collect::<Vec<_>>().join(", ");
        match self.best_of.iter_mut().find(|best_of| best_of.label == label) {
            Some(best_of) => best_of.runs.push(points),
            None => self.best_of.push(BestOf { label, runs: vec![points] }),
        }
    }

    fn add_run(&mut self, instance: &Instance, run: Run) {
        let labels: Vec<(String, String)> =
            instance.matrix.iter().filter(|(dimension, _)| dimension != SEED).cloned().collect();
        if let Some(arm) = self.arms.iter_mut().find(|arm| arm.stage == instance.stage() && arm.labels == labels) {
            arm.runs.push(run);
            return;
        }
        let label = if labels.is_empty() {
            instance.stage().to_owned()
        } else {
            labels.iter().map(|(_, label)| label.as_str()).collect::<Vec<_>>().join(", ")
        };
        self.arms.push(Arm {
            stage: instance.stage().to_owned(),
            labels,
            label,
            role: Role::of(&run.about),
            lambda: run.about.lambda,
            runs: vec![run],
        });
    }

    /// Policy runs in all.
    pub fn runs(&self) -> usize {
        self.arms.iter().map(|arm| arm.runs.len()).sum()
    }

    /// Arms of a role that differ from `arm` in one label of the matrix and have its lambda.
    pub fn comparable<'a>(&'a self, arm: &'a Arm, role: Role) -> impl Iterator<Item = &'a Arm> {
        self.comparable_at_any_lambda(arm, role).filter(move |other| other.lambda == arm.lambda)
    }

    /// Like [`Self::comparable`], with any lambda.
    pub fn comparable_at_any_lambda<'a>(&'a self, arm: &'a Arm, role: Role) -> impl Iterator<Item = &'a Arm> {
        self.arms.iter().filter(move |other| other.role == role && arm.differs_in_one_label(other))
    }

    /// The stages whose results differ between the seeds of every arm with several seeds, and the stages that all seeds
    /// share. `None` with a single seed, or if a digest is unknown.
    pub fn redrawn_stages(&self) -> Option<(Vec<&str>, Vec<&str>)> {
        let arms: Vec<&Arm> = self.arms.iter().filter(|arm| arm.runs.len() > 1).collect();
        let first = arms.first()?.runs.first()?.input_digests.as_ref()?;
        let known: Option<Vec<Vec<_>>> =
            arms.iter().map(|arm| arm.runs.iter().map(|run| run.input_digests.as_ref()).collect()).collect();
        let known = known?;
        let differs = |stage: &str| {
            known
                .iter()
                .all(|runs| runs.iter().map(|from| from.get(stage)).collect::<BTreeSet<_>>().len() == runs.len())
        };
        Some(first.keys().map(String::as_str).partition(|stage| differs(stage)))
    }

    /// The seeds of the policy runs and the seeds by which runs are paired.
    pub fn seeds(&self) -> Vec<u64> {
        let runs = self.arms.iter().flat_map(|arm| &arm.runs);
        let mut seeds: Vec<u64> = runs.flat_map(|run| [run.seed, run.about.seed]).collect();
        seeds.sort_unstable();
        seeds.dedup();
        seeds
    }

    /// A sentence that names the run's own seeds used to choose settings; `None` if there are none.
    pub fn tuning_overlap(&self) -> Option<String> {
        let both: Vec<u64> = self.seeds().into_iter().filter(|s| self.tuning.contains(s)).collect();
        let mut sentences = Vec::new();
        if !both.is_empty() {
            sentences.push(format!("Settings were chosen on seeds that are reported here: {}.", list(&both)));
        }
        if let Some(seed) = self.seed.filter(|seed| self.tuning.contains(seed)) {
            sentences.push(format!("Settings were chosen on the pipeline's own seed, {seed}."));
        }
        (!sentences.is_empty()).then(|| sentences.join(" ") + " The numbers of these seeds are biased upwards.")
    }

    /// Warns if a judging gold model does not read the post, or was not tested.
    pub fn gold_heading(&self) -> String {
        let findings: Vec<String> = self
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
        findings.join("; ")
    }
}

fn read(folder: &Path) -> engine::error::Result<(EvaluationInfo, Vec<CurvePoint>, Vec<Example>)> {
    Ok((Evaluation::info(folder)?, Evaluation::curve(folder)?, Evaluation::examples(folder)?))
}

fn label<'a>(instance: &'a Instance, dimension: &str) -> Option<&'a str> {
    instance.matrix.iter().find(|(of, _)| of == dimension).map(|(_, label)| label.as_str())
}

fn phases(run: &RunData, evaluation: &Instance) -> Vec<Phase> {
    let folder = run.input(evaluation, "policy").and_then(|policy| run.folder(policy));
    folder.and_then(|folder| PolicyRun::phases(&folder).ok()).unwrap_or_default()
}

fn policy(run: &RunData, evaluation: &Instance) -> Option<Digest> {
    let trained = run.input(evaluation, "policy")?;
    run.result(run.input(trained, "policy")?).digest
}

/// Everything upstream of the evaluated policy run, and the gold model, by stage.
fn input_digests(run: &RunData, evaluation: &Instance) -> Option<BTreeMap<String, BTreeSet<Digest>>> {
    let policy = run.input(evaluation, "policy")?;
    let mut queue: Vec<&str> = [evaluation, policy]
        .iter()
        .flat_map(|instance| instance.inputs.iter().flat_map(|port| &port.from).map(String::as_str))
        .collect();
    let (mut visited, mut stages) = (BTreeSet::new(), BTreeMap::<String, BTreeSet<Digest>>::new());
    while let Some(name) = queue.pop() {
        let instance = run.instances.iter().find(|instance| instance.name == name)?;
        // A matched arm reads an adaptive run of its own stage.
        if instance.stage() == policy.stage() || !visited.insert(name) {
            continue;
        }
        stages.entry(instance.stage().to_owned()).or_default().insert(run.result(instance).digest?);
        queue.extend(instance.inputs.iter().flat_map(|port| &port.from).map(String::as_str));
    }
    Some(stages)
}

fn ensemble_s2(run: &RunData, evaluation: &Instance) -> Option<(f64, f64)> {
    let rewards = run.input(run.input(evaluation, "policy")?, "rewards")?;
    let metrics = run.metrics(rewards);
    Some((*metrics.get("s2_random")?, *metrics.get("s2_calibration")?))
}

/// Prefixes labels with the stage's name if arms of several stages share a label.
fn disambiguate_labels(arms: &mut [Arm]) {
    let labels: BTreeSet<&str> = arms.iter().map(|arm| arm.label.as_str()).collect();
    if labels.len() == arms.len() {
        return;
    }
    for arm in arms.iter_mut().filter(|arm| !arm.labels.is_empty()) {
        arm.label = format!("{}: {}", arm.stage, arm.label);
    }
}

#[cfg(test)]
pub mod tests;
