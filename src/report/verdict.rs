//! The report's answers: gates, the registered hypotheses and the paper's claims.

use stages::stats::{detectable_effect, mean};
use stages::types::Half;

use super::gates::{COEFFICIENT_GROWN, Gate, KL_SHARE, gates};
use super::inference::{ALPHA, Family, MIN_SEEDS, Statement, Subject, Test, Verdict, judge, judge_registered};
use super::outcome::{self, MIN_POINTS, Measure};
use super::study::{Arm, Role, Run, Study};

/// H3 to H7: the registered family.
const HYPOTHESES: usize = 5;
pub const NO_QUALITY: &str = "the posts carry no facts to score true quality by";

/// All findings of the report on a study, in order.
#[derive(Clone, Debug, PartialEq)]
pub struct Findings {
    pub primary: Measure,
    /// Notes that apply to all answers: seeds, outcome, what the seeds redraw, power.
    pub notes: Vec<String>,
    pub gates: Vec<Gate>,
    pub hypotheses: Vec<Family>,
    pub claims: Vec<Family>,
    /// Paired differences between the mean arm and its repetition (A/A), in each measure.
    pub noise: Vec<(Measure, Test)>,
    /// (statement, reason)
    missing: Vec<(String, String)>,
}

impl Findings {
    pub fn of(study: &Study) -> Self {
        let has_quality = study.arms.iter().flat_map(|arm| &arm.runs).all(Run::has_quality);
        let primary = if has_quality { Measure::Quality } else { Measure::Gold };
        let mut findings = Self {
            primary,
            notes: notes(study, primary),
            gates: Vec::new(),
            hypotheses: Vec::new(),
            claims: Vec::new(),
            noise: Vec::new(),
            missing: Vec::new(),
        };
        let own: Vec<&Arm> = study.arms.iter().filter(|arm| arm.role == Role::Adaptive).collect();
        for adaptive in &own {
            let title = if own.len() > 1 { format!("{}: ", adaptive.label) } else { String::new() };
            findings.add_adaptive_arm(study, adaptive, &title);
        }
        if own.is_empty() {
            findings.missing("H1 to H7", "no adaptive arm with variance scope `sample` was evaluated");
            let arms: Vec<&Arm> = study.arms.iter().collect();
            findings.add_single_arm_claims(&arms, &arms, "");
        }
        if study.absent > 0 {
            // A test at each look at a growing study would err more often than it says.
            for statement in
                findings.hypotheses.iter_mut().chain(&mut findings.claims).flat_map(|family| &mut family.statements)
            {
                (statement.verdict, statement.corrected) = (Verdict::NotJudged, None);
            }
        }
        findings
    }

    /// Statements that cannot be judged, with reasons, in one line; empty if there are none.
    pub fn not_judged(&self) -> String {
        let mut by_reason: Vec<(&str, Vec<&str>)> = Vec::new();
        for (what, why) in &self.missing {
            match by_reason.iter_mut().find(|(reason, _)| reason == why) {
                Some((_, all)) => all.push(what),
                None => by_reason.push((why, vec![what])),
            }
        }
        let reasons: Vec<String> = by_reason.iter().map(|(why, what)| format!("{} ({why})", what.join(", "))).collect();
        if reasons.is_empty() { String::new() } else { format!("Not judged: {}.", reasons.join("; ")) }
    }

    /// The comparisons of H3 to H7 and of the claims in a measure, each pair of arms once.
    pub fn compared(&self, measure: Measure) -> Vec<&Test> {
        let families =
            self.hypotheses.iter().chain(&self.claims).filter(|family| family.subject == Subject::Outcomes(measure));
        families.flat_map(|family| &family.statements).flat_map(|statement| &statement.parts).collect()
    }

    fn missing(&mut self, what: impl Into<String>, why: impl Into<String>) {
        self.missing.push((what.into(), why.into()));
    }

    /// Adds the answers for one adaptive arm and the arms next to it.
    fn add_adaptive_arm(&mut self, study: &Study, adaptive: &Arm, title: &str) {
        let mut at_lambda = study.comparable(adaptive, Role::Mean);
        let mean = at_lambda.next();
        self.gates.extend(gates(adaptive, mean, title));
        let mut measures = vec![self.primary];
        if self.primary == Measure::Quality {
            measures.push(Measure::Gold);
        }
        if let Some(mean) = mean {
            for again in at_lambda {
                self.noise.extend(measures.iter().filter_map(|&measure| {
                    Some((measure, Test::paired(again, mean, |run| outcome::outcome(run, measure, Half::B))?))
                }));
            }
        }
        self.add_preconditions(adaptive, mean, title);
        for &measure in &measures {
            self.add_comparisons(study, adaptive, mean, measure, title);
        }
        self.add_supporting(study, adaptive, mean, title);

        let four: Vec<&Arm> = [Role::Standard, Role::Pessimistic]
            .into_iter()
            .flat_map(|role| study.comparable(adaptive, role))
            .chain([adaptive])
            .collect();
        let all: Vec<&Arm> = mean.into_iter().chain(four.iter().copied()).collect();
        self.add_paper_comparisons(study, adaptive, title);
        self.add_own_curves(adaptive, title);
        self.add_single_arm_claims(&four, &all, title);
    }

    fn add_preconditions(&mut self, adaptive: &Arm, mean: Option<&Arm>, title: &str) {
        let Some(mean) = mean else {
            return self.missing(
                format!("{title}H1, H2"),
                format!("no `mean` arm with lambda {} to compare with {}", adaptive.lambda, adaptive.label),
            );
        };
        let over = overoptimised("H1", mean, self.primary);
        let parts: Vec<Test> = [
            Test::over(format!("largest mean(c)/lambda − {COEFFICIENT_GROWN}"), mean, |run| {
                Some(run.about.mechanism.c_over_lambda_max? - COEFFICIENT_GROWN)
            }),
            Test::over(format!("largest share of c KL in the gain − {KL_SHARE}"), mean, |run| {
                Some(run.about.mechanism.c_kl_share_max? - KL_SHARE)
            }),
        ]
        .into_iter()
        .flatten()
        .collect();
        let mut statements: Vec<Statement> = over.into_iter().collect();
        if parts.len() == 2 {
            let sentence = format!("the adaptive mechanism is engaged on the path of {}", mean.label);
            statements.push(Statement::new("H2", sentence, parts));
        } else {
            self.missing(format!("{title}H2"), format!("{} logged no coefficient of Algorithm 1", mean.label));
        }
        // Each precondition must hold on its own, so none is corrected for the others.
        let statements = statements
            .into_iter()
            .flat_map(|statement| judge(Subject::Preconditions, String::new(), vec![statement]).statements)
            .collect();
        let title = format!("{title}Preconditions (not corrected)");
        self.hypotheses.push(Family { title, subject: Subject::Preconditions, statements, note: None });
    }

    /// Adds H3 to H7 in one measure.
    fn add_comparisons(&mut self, study: &Study, adaptive: &Arm, mean: Option<&Arm>, measure: Measure, title: &str) {
        let beside =
            |roles: &[Role]| -> Vec<&Arm> { roles.iter().flat_map(|&role| study.comparable(adaptive, role)).collect() };
        // A statement about several controls is none about some of them.
        let all_of = |roles: &[Role]| {
            let is_whole = roles.iter().all(|&role| study.comparable(adaptive, role).next().is_some());
            if is_whole { beside(roles) } else { Vec::new() }
        };
        let compared: [(&'static str, &str, Vec<&Arm>); HYPOTHESES] = [
            ("H3", "mean", mean.into_iter().collect()),
            ("H4", "matched", all_of(&[Role::MatchedConstant, Role::MatchedPhases])),
            ("H5", "shuffled and batch", all_of(&[Role::Shuffled, Role::Batch])),
            ("H6", "standard", beside(&[Role::Standard])),
            ("H7", "KL-target", study.comparable_at_any_lambda(adaptive, Role::KlTarget).collect()),
        ];
        let mut statements = Vec::new();
        for (name, what, others) in compared {
            match adaptive_above(name, adaptive, &others, measure) {
                Some(statement) => statements.push(statement),
                None if measure == self.primary => {
                    self.missing(format!("{title}{name}"), missing_arm(what, adaptive, &others))
                }
                None => {}
            }
        }
        let rank = if measure == self.primary { "primary" } else { "secondary" };
        if !statements.is_empty() {
            let title = format!("{title}H3 to H7 in {measure} ({rank})");
            self.hypotheses.push(judge_registered(HYPOTHESES, Subject::Outcomes(measure), title, statements));
        }
    }

    /// Adds the drop of H3 and the area of H4.
    fn add_supporting(&mut self, study: &Study, adaptive: &Arm, mean: Option<&Arm>, title: &str) {
        let measure = self.primary;
        let mut statements = Vec::new();
        // Positive if the adaptive arm drops less, so that all statements have the same direction.
        if let Some(test) = mean.and_then(|mean| Test::paired(mean, adaptive, |run| outcome::drop(run, measure))) {
            let test = Test { label: format!("drop of {}", test.label), ..test };
            let sentence =
                format!("{} falls less from its peak than {}", adaptive.label, mean.map_or("", |m| &m.label));
            statements.push(Statement::new("H3", sentence, vec![test]));
        }
        let fixed = fixed_lambdas(study, adaptive);
        let gap = Test::over(
            format!("mean gap over the common range of sqrt(KL), {} lambdas", fixed.len()),
            adaptive,
            |run| outcome::gap_to_frontier(run, &fixed, measure),
        );
        match gap {
            Some(test) => {
                let sentence =
                    format!("at equal KL the path of {} lies above the fixed lambdas' frontier", adaptive.label);
                statements.push(Statement::new("H4", sentence, vec![test]));
            }
            None => self.missing(
                format!("{title}H4, the area between frontiers"),
                "fewer than two fixed lambdas, or their KL and the adaptive arm's do not overlap",
            ),
        }
        if !statements.is_empty() {
            self.hypotheses.push(judge(Subject::Other, format!("{title}Supporting, in {measure}"), statements));
        }
    }

    /// Adds the paper's comparisons beyond H3 and H6.
    fn add_paper_comparisons(&mut self, study: &Study, adaptive: &Arm, title: &str) {
        let mut statements: Vec<Statement> = Vec::new();
        for (role, name) in [(Role::Pessimistic, "pessimistic"), (Role::Uwo, "UWO")] {
            let others: Vec<&Arm> = study.comparable(adaptive, role).collect();
            match adaptive_above("", adaptive, &others, self.primary) {
                Some(statement) => statements.push(statement),
                None => self.missing(format!("{title}adaptive above {name}"), missing_arm(name, adaptive, &others)),
            }
        }
        let fixed = fixed_lambdas(study, adaptive);
        match best_on_a(&fixed, self.primary).and_then(|best| adaptive_above("", adaptive, &[best], self.primary)) {
            Some(statement) if fixed.len() > 1 => {
                let sentence = format!("{}, the best of {} fixed lambdas on half A", statement.sentence, fixed.len());
                statements.push(Statement { sentence, ..statement });
            }
            _ => self.missing(format!("{title}adaptive above the best fixed lambda"), "fewer than two fixed lambdas"),
        }
        if !statements.is_empty() {
            let title = format!("{title}Adaptive against others, in {}", self.primary);
            self.claims.push(judge(Subject::Outcomes(self.primary), title, statements));
        }
    }

    /// Adds the paper's claims about its own arm's curves, rephrased as statements that a test can show.
    fn add_own_curves(&mut self, arm: &Arm, title: &str) {
        let name = &arm.label;
        let gold =
            Test::over("gold at its peak − gold at the end".into(), arm, |run| outcome::drop(run, Measure::Gold));
        let late =
            Test::over("the proxy's gain over the last third".into(), arm, |run| Some(outcome::proxy_gains(run)?.1));
        let slower = Test::over("gain over the first third − over the last".into(), arm, |run| {
            outcome::proxy_gains(run).map(|(first, last)| first - last)
        });
        let statements: Vec<Statement> = [
            (format!("{name}: gold falls from its peak (the paper: it does not)"), gold),
            (format!("{name}: the proxy still rises in the last third (the paper: not without end)"), late),
            (format!("{name}: the proxy rises less in the last third than in the first"), slower),
        ]
        .into_iter()
        .filter_map(|(sentence, test)| Some(Statement::new("", sentence, vec![test?])))
        .collect();
        if statements.len() < 3 {
            self.missing(format!("{title}growth of the proxy"), too_few_points());
        }
        if !statements.is_empty() {
            self.claims.push(judge(Subject::Other, format!("{title}The adaptive arm's own curves"), statements));
        }
    }

    /// Adds claims about single arms: over-optimisation of `over`, trends over steps of `all`.
    fn add_single_arm_claims(&mut self, over: &[&Arm], all: &[&Arm], title: &str) {
        let statements: Vec<Statement> = over.iter().filter_map(|arm| overoptimised("", arm, self.primary)).collect();
        if !statements.is_empty() {
            self.claims.push(judge(Subject::Other, format!("{title}Over-optimisation"), statements));
        }
        type Number = fn(&stages::types::CurvePoint) -> Option<f64>;
        let trends: [(&str, Number, Number); 2] = [
            ("gold followed true quality", |point| Some(point.gold), |point| point.quality),
            ("the ensemble's variance rose with KL", |point| point.variance, |point| Some(point.kl_exact)),
        ];
        for (claim, x, y) in trends {
            let statements: Vec<Statement> = all
                .iter()
                .filter_map(|arm| {
                    let test = Test::over("Spearman over steps".into(), arm, |run| outcome::trend(run, x, y))?;
                    Some(Statement::new("", format!("{}: {claim}", arm.label), vec![test]))
                })
                .collect();
            let mut points = all.iter().flat_map(|arm| &arm.runs).flat_map(Run::sampled);
            match () {
                () if !statements.is_empty() => {
                    self.claims.push(judge(Subject::Other, format!("{title}Over the steps: {claim}"), statements))
                }
                () if points.any(|point| x(point).is_some() && y(point).is_some()) => {
                    self.missing(format!("{title}{claim}"), too_few_points());
                }
                () if self.primary == Measure::Gold && claim.contains("quality") => {
                    self.missing(format!("{title}{claim}"), NO_QUALITY);
                }
                () => self.missing(format!("{title}{claim}"), "not measured in these arms"),
            }
        }
    }
}

fn too_few_points() -> String {
    format!("fewer than {MIN_POINTS} evaluations, or no change over them")
}

fn missing_arm(what: &str, adaptive: &Arm, others: &[&Arm]) -> String {
    match others {
        [] => format!("no {what} arm to compare with {}", adaptive.label),
        _ => format!("no seed was evaluated in both {} and the {what} arm", adaptive.label),
    }
}

/// `adaptive` above each of `others`; `None` if there are none, or if one of them shares no seed with it.
fn adaptive_above(name: &'static str, adaptive: &Arm, others: &[&Arm], measure: Measure) -> Option<Statement> {
    let tests = others.iter().map(|other| Test::paired(adaptive, other, |run| outcome::outcome(run, measure, Half::B)));
    let parts: Vec<Test> = tests.collect::<Option<_>>()?;
    let labels: Vec<&str> = others.iter().map(|other| other.label.as_str()).collect();
    let sentence = format!("{} above {}", adaptive.label, labels.join(" and "));
    (!parts.is_empty()).then(|| Statement::new(name, sentence, parts))
}

/// The measure dropped from its peak, and the proxy has risen since.
fn overoptimised(name: &'static str, arm: &Arm, measure: Measure) -> Option<Statement> {
    let parts = [
        Test::over(format!("{measure} at its peak − at the end"), arm, |run| outcome::drop(run, measure)),
        Test::over("the proxy's rise since".into(), arm, |run| outcome::proxy_rise(run, measure)),
    ];
    let parts: Vec<Test> = parts.into_iter().collect::<Option<_>>()?;
    Some(Statement::new(name, format!("{} over-optimises: {measure} falls while the proxy rises", arm.label), parts))
}

/// The mean arms beside `adaptive`, the first of each lambda.
pub fn fixed_lambdas<'a>(study: &'a Study, adaptive: &'a Arm) -> Vec<&'a Arm> {
    let mut fixed: Vec<&Arm> = Vec::new();
    for arm in study.comparable_at_any_lambda(adaptive, Role::Mean) {
        if fixed.iter().all(|other| other.lambda != arm.lambda) {
            fixed.push(arm);
        }
    }
    fixed
}

/// The arm with the best mean outcome on half A over its seeds. Noise shared by a run's two halves favours the chosen
/// arm, so the comparison errs against the adaptive arm.
fn best_on_a<'a>(arms: &[&'a Arm], measure: Measure) -> Option<&'a Arm> {
    let scored = arms.iter().filter_map(|arm| {
        let outcomes: Option<Vec<f64>> = arm.runs.iter().map(|run| outcome::outcome(run, measure, Half::A)).collect();
        Some((*arm, mean(&outcomes?)))
    });
    scored.max_by(|a, b| a.1.total_cmp(&b.1)).map(|(arm, _)| arm)
}

fn notes(study: &Study, primary: Measure) -> Vec<String> {
    let n = study.arms.iter().map(|arm| arm.runs.len()).max().unwrap_or(0);
    let mut notes = Vec::new();
    if study.absent > 0 {
        notes.push(format!(
            "Interim: {} evaluations of the study are not there yet; nothing is judged before all are.",
            study.absent
        ));
    }
    if n < MIN_SEEDS {
        let seeds = if n == 1 { "1 seed".to_owned() } else { format!("{n} seeds") };
        notes.push(format!(
            "A demonstration with {seeds}: no test is possible below {MIN_SEEDS}; differences are shown, not judged."
        ));
    } else if let (Some(one), Some(two)) = (detectable_effect(n, ALPHA), smallest_detected(n)) {
        notes.push(format!(
            "{n} seeds: with power 0.8 one test at level {ALPHA} detects a mean difference of {one:.2} standard deviations of the \
             paired differences{two}."
        ));
    }
    let rest = match primary {
        Measure::Quality => format!("; secondary: {} in the same way", Measure::Gold),
        Measure::Gold => format!(" (not true quality: {NO_QUALITY})"),
    };
    notes.push(format!(
        "Primary outcome: {primary} on half B, mean over the last third (ceil(n/3)) of the n sampled evaluations after the \
         start{rest}."
    ));
    if let Some((redrawn_stages, shared)) = study.redrawn_stages() {
        let shared = if shared.is_empty() { "nothing".to_owned() } else { shared.join(", ") };
        notes.push(if redrawn_stages.is_empty() {
            format!("Seeds vary RL only: the answers hold for the one draw of what all seeds share ({shared}).")
        } else {
            format!("Each seed redraws {} and RL; shared by all seeds: {shared}.", redrawn_stages.join(", "))
        });
    }
    notes
}

/// The smallest effect detected in the first step of a Holm family of five.
fn smallest_detected(n: usize) -> Option<String> {
    Some(match detectable_effect(n, ALPHA / HYPOTHESES as f64) {
        Some(effect) => format!(", the first of {HYPOTHESES} corrected ones {effect:.2}"),
        None => format!(", and a family of {HYPOTHESES} cannot be judged"),
    })
}

#[cfg(test)]
pub mod tests;
