//! A run's evaluations gathered into arms and seeds. Knows no markup.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use engine::names::Digest;
use stages::types::{BestOfPoint, CurvePoint, Evaluation, EvaluationInfo, Example, FactSensitivity, Half};

use super::load::{Instance, RunData, SEED};

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
    /// Digests of what the seed should not vary: gold model, posts, SFT policy, rewards. None where one is not known.
    pub made_from: Option<Vec<Digest>>,
}

impl Run {
    /// The sampled steps on half B, in order.
    pub fn sampled(&self) -> impl Iterator<Item = &CurvePoint> {
        self.curve.iter().filter(|row| row.half == Half::B && !row.greedy)
    }

    pub fn at(&self, step: i64) -> Option<&CurvePoint> {
        self.sampled().find(|row| row.step == step)
    }

    /// The greedy responses of a step on half B; drawn at the first and the last unless the run was told otherwise.
    pub fn greedy(&self, step: i64) -> Option<&CurvePoint> {
        self.curve.iter().find(|row| row.half == Half::B && row.greedy && row.step == step)
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
    /// The stage that evaluates it.
    pub stage: String,
    /// (dimension, label) of that stage's matrix, but for the seed.
    pub labels: Vec<(String, String)>,
    /// What the report calls it.
    pub label: String,
    pub objective: String,
    pub scope: String,
    pub lambda: f64,
    pub runs: Vec<Run>,
}

impl Arm {
    /// Whether this is the paper's own arm: adaptive with each pair's own variance.
    pub fn is_papers_own(&self) -> bool {
        self.objective == "adaptive" && self.scope == "sample"
    }

    /// Whether the two come from one matrix and differ in one of its dimensions: size s is compared with s, m with m.
    fn stands_beside(&self, other: &Self) -> bool {
        let same_dimensions = self.labels.iter().map(|l| &l.0).eq(other.labels.iter().map(|l| &l.0));
        let apart = self.labels.iter().zip(&other.labels).filter(|(a, b)| a != b).count();
        self.stage == other.stage && same_dimensions && apart == 1
    }
}

/// The evaluations of best-of-n that differ in their seed only.
#[derive(Clone, Debug)]
pub struct BestOf {
    /// The stage with its matrix labels, but for the seed.
    pub label: String,
    /// The points of each seed.
    pub runs: Vec<Vec<BestOfPoint>>,
}

#[derive(Clone, Debug, Default)]
pub struct Study {
    pub arms: Vec<Arm>,
    /// Of the gold model(s) that judged: (instance, mean, low, high); low above 0 means that it reads the post.
    pub sensitivity: Vec<(String, Option<FactSensitivity>)>,
    /// The seeds that settings were chosen on, as the pipeline file says.
    pub tuning: Vec<u64>,
    /// The pipeline's own, which draws all that comes before PPO; none in runs of an older temper.
    pub seed: Option<u64>,
    /// Evaluations of best-of-n.
    pub best_of: Vec<BestOf>,
    /// Evaluations that could not be read, and why.
    pub unread: Vec<(String, String)>,
}

impl Study {
    /// Every `Evaluation` of the run that is there, in the pipeline's order.
    pub fn gather(run: &RunData) -> Self {
        let mut study = Self { seed: run.seed, ..Self::default() };
        let mut sensitivity: BTreeMap<String, Option<FactSensitivity>> = BTreeMap::new();
        for instance in run.instances.iter().filter(|i| i.output == "Evaluation") {
            let Some(folder) = run.folder(instance) else { continue };
            match Evaluation::best_of_n(&folder) {
                Ok(None) => {}
                Ok(Some(points)) => {
                    study.take_best_of(instance, points);
                    continue;
                }
                Err(error) => {
                    study.unread.push((instance.name.clone(), error.to_string()));
                    continue;
                }
            }
            let evaluated = match read(&folder) {
                Ok((about, curve, examples)) => {
                    Run { seed: about.seed, about, curve, examples, made_from: made_from(run, instance) }
                }
                Err(error) => {
                    study.unread.push((instance.name.clone(), error.to_string()));
                    continue;
                }
            };
            let gold = run.input(instance, "gold").map_or_else(String::new, |gold| gold.name.clone());
            sensitivity.insert(gold, evaluated.about.fact_sensitivity);
            study.take(instance, evaluated);
        }
        name_apart(&mut study.arms);
        study.sensitivity = sensitivity.into_iter().collect();
        study.tuning.clone_from(&run.settings.tuning_seeds);
        study
    }

    fn take_best_of(&mut self, instance: &Instance, points: Vec<BestOfPoint>) {
        let labels = instance.matrix.iter().filter(|(dimension, _)| dimension != SEED).map(|(_, label)| label.as_str());
        let label = std::iter::once(instance.stage()).chain(labels).collect::<Vec<_>>().join(", ");
        match self.best_of.iter_mut().find(|best_of| best_of.label == label) {
            Some(best_of) => best_of.runs.push(points),
            None => self.best_of.push(BestOf { label, runs: vec![points] }),
        }
    }

    fn take(&mut self, instance: &Instance, run: Run) {
        let labels: Vec<(String, String)> =
            instance.matrix.iter().filter(|(dimension, _)| dimension != SEED).cloned().collect();
        if let Some(arm) = self.arms.iter_mut().find(|arm| arm.stage == instance.stage() && arm.labels == labels) {
            arm.runs.push(run);
            return;
        }
        let scope = run.about.more.get("variance_scope").and_then(|s| s.as_str()).unwrap_or_default().to_owned();
        let label = if labels.is_empty() {
            instance.stage().to_owned()
        } else {
            labels.iter().map(|(_, label)| label.as_str()).collect::<Vec<_>>().join(", ")
        };
        self.arms.push(Arm {
            stage: instance.stage().to_owned(),
            labels,
            label,
            objective: run.about.objective.clone(),
            scope,
            lambda: run.about.lambda,
            runs: vec![run],
        });
    }

    /// Arms that differ from `arm` by their objective, which is `objective`, and not by lambda or another label.
    pub fn beside<'a>(&'a self, arm: &'a Arm, objective: &'a str) -> impl Iterator<Item = &'a Arm> {
        self.arms
            .iter()
            .filter(move |other| other.objective == objective && other.lambda == arm.lambda && arm.stands_beside(other))
    }

    pub fn seeds(&self) -> Vec<u64> {
        let mut seeds: Vec<u64> = self.arms.iter().flat_map(|arm| arm.runs.iter().map(|r| r.seed)).collect();
        seeds.sort_unstable();
        seeds.dedup();
        seeds
    }

    /// Which of the run's own seeds settings were chosen on, in a sentence; none if there are none.
    pub fn flattered(&self) -> Option<String> {
        let both: Vec<u64> = self.seeds().into_iter().filter(|s| self.tuning.contains(s)).collect();
        let mut told = Vec::new();
        if !both.is_empty() {
            told.push(format!("Settings were chosen on seeds that are reported here: {}.", list(&both)));
        }
        if let Some(seed) = self.seed.filter(|seed| self.tuning.contains(seed)) {
            told.push(format!("Settings were chosen on the pipeline's own seed, {seed}."));
        }
        (!told.is_empty()).then(|| told.join(" ") + " Their numbers flatter.")
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

fn read(folder: &Path) -> engine::error::Result<(EvaluationInfo, Vec<CurvePoint>, Vec<Example>)> {
    Ok((Evaluation::info(folder)?, Evaluation::curve(folder)?, Evaluation::examples(folder)?))
}

fn made_from(run: &RunData, evaluation: &Instance) -> Option<Vec<Digest>> {
    let policy = run.input(evaluation, "policy")?;
    [(evaluation, "gold"), (evaluation, "posts"), (policy, "policy"), (policy, "rewards"), (policy, "posts")]
        .into_iter()
        .map(|(instance, port)| run.fate(run.input(instance, port)?).digest)
        .collect()
}

/// Arms of several stages may have the same labels: the stage's name then stands before them.
fn name_apart(arms: &mut [Arm]) {
    let labels: BTreeSet<&str> = arms.iter().map(|arm| arm.label.as_str()).collect();
    if labels.len() == arms.len() {
        return;
    }
    for arm in arms.iter_mut().filter(|arm| !arm.labels.is_empty()) {
        arm.label = format!("{}: {}", arm.stage, arm.label);
    }
}

#[cfg(test)]
pub mod tests {
    use stages::types::{Mechanism, SftScale};

    use super::*;

    /// A point on half B with intervals of +-0.1 and 200 prompts.
    pub fn point(step: i64, greedy: bool, quality: Option<f64>, gold: f64, proxy: f64) -> CurvePoint {
        CurvePoint {
            step,
            half: Half::B,
            greedy,
            n: 200,
            gold,
            gold_low: gold - 0.1,
            gold_high: gold + 0.1,
            gold_sd: gold,
            gold_sd_low: gold - 0.1,
            gold_sd_high: gold + 0.1,
            win_rate: 0.5,
            win_rate_low: 0.4,
            win_rate_high: 0.6,
            proxy,
            proxy_low: proxy - 0.1,
            proxy_high: proxy + 0.1,
            mu: proxy,
            variance: Some(0.2),
            variance_offset: Some(0.05),
            variance_slope: Some(0.05),
            variance_rest: Some(0.1),
            kl: step as f64,
            kl_low: step as f64 - 0.1,
            kl_high: step as f64 + 0.1,
            kl_exact: step as f64,
            length: 20.0,
            length_low: 19.0,
            length_high: 21.0,
            eos_rate: 0.9,
            eos_rate_low: 0.8,
            eos_rate_high: 1.0,
            quality,
            quality_low: quality.map(|q| q - 0.1),
            quality_high: quality.map(|q| q + 0.1),
            coverage: None,
            invented: None,
            fluency: None,
            spearman_s2_error: None,
        }
    }

    /// A run of eight steps whose true quality and gold end at `end`.
    pub fn run(objective: &str, seed: u64, end: f64) -> Run {
        let about = EvaluationInfo {
            objective: objective.to_owned(),
            lambda: 0.005,
            seed,
            evaluation_seed: 0,
            steps: vec![0, 4, 8],
            chosen_step: 4,
            final_step: 8,
            sft: SftScale { gold_mean: 0.0, gold_std: 1.0 },
            fact_sensitivity: None,
            reads_the_post: false,
            mechanism: Mechanism::default(),
            prompt_count: 400,
            more: serde_json::Map::new(),
        };
        let curve = [(0, 0.5), (4, 0.6), (8, end)]
            .map(|(step, q)| point(step, false, Some(q), q, step as f64))
            .into_iter()
            .chain([point(0, true, Some(0.55), 0.1, 0.0), point(8, true, Some(end), end, 8.0)])
            .collect();
        Run { seed, about, curve, examples: Vec::new(), made_from: Some(vec![Digest::of(b"gold")]) }
    }

    pub fn arm(labels: &[(&str, &str)], objective: &str, ends: &[f64]) -> Arm {
        Arm {
            stage: "evaluate".to_owned(),
            labels: labels.iter().map(|(d, l)| ((*d).to_owned(), (*l).to_owned())).collect(),
            label: labels.iter().map(|(_, l)| *l).collect::<Vec<_>>().join(", "),
            objective: objective.to_owned(),
            scope: "sample".to_owned(),
            lambda: 0.005,
            runs: ends.iter().zip(1..).map(|(end, seed)| run(objective, seed, *end)).collect(),
        }
    }

    #[test]
    fn equal_labels_of_two_stages_are_two_arms() {
        let mut arms = [arm(&[("arm", "mean")], "mean", &[0.5]), arm(&[("arm", "mean")], "mean", &[0.5])];
        arms[1].stage = "other".to_owned();
        assert!(!arms[0].stands_beside(&arms[1]));
        name_apart(&mut arms);
        assert_eq!(arms.map(|arm| arm.label), ["evaluate: mean", "other: mean"]);
    }

    #[test]
    fn a_size_is_compared_with_itself() {
        let [s, m] = ["s", "m"].map(|size| {
            (
                arm(&[("size", size), ("arm", "adaptive")], "adaptive", &[0.5]),
                arm(&[("size", size), ("arm", "mean")], "mean", &[0.5]),
            )
        });
        let study = Study { arms: vec![s.0.clone(), s.1, m.0.clone(), m.1], ..Study::default() };
        for (adaptive, other) in [(&s.0, "s, mean"), (&m.0, "m, mean")] {
            assert_eq!(study.beside(adaptive, "mean").map(|a| a.label.as_str()).collect::<Vec<_>>(), [other]);
        }
    }

    #[test]
    fn the_pipelines_own_seed_can_flatter_as_well() {
        let arms = vec![arm(&[("arm", "mean")], "mean", &[0.5])];
        let study =
            |tuning: &[u64]| Study { arms: arms.clone(), tuning: tuning.to_vec(), seed: Some(17), ..Study::default() };
        assert_eq!(study(&[3]).flattered(), None);
        assert!(study(&[17]).flattered().unwrap().contains("the pipeline's own seed, 17"));
        assert!(study(&[1]).flattered().unwrap().contains("reported here: 1."));
    }
}
