//! Compares loading, planning and deciding with an oracle: the definitions written down as plain recursion, without
//! keys, caches, sets of changes or an order of work. Each case is drawn from its own seed.
//!
//!     TEMPER_CASES=1000000 cargo test -p temper-engine plans_and_runs_agree_with_a_slow_oracle
//!     TEMPER_SEED=4711 TEMPER_CASES=1 cargo test -p temper-engine plans_and_runs_agree_with_a_slow_oracle

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

use super::MemoryStore;
use super::law::run;
use crate::graph::tests::kinds::registry;
use crate::graph::{Graph, LoadOptions, load};
use crate::kind::Registry;
use crate::names::Digest;
use crate::plan::{ArtifactNeed, Decision, Flags, PlannedState, Reason, Recipe, RecipeState, plan_with, recipe};

const LABELS: [&str; 3] = ["a", "b", "c"];

struct Draw(ChaCha8Rng);

impl Draw {
    /// A number below `end`, which is not 0.
    fn below(&mut self, end: usize) -> usize {
        self.0.next_u32() as usize % end
    }

    fn percent(&mut self, chance: usize) -> bool {
        self.below(100) < chance
    }

    /// Some of the numbers below `end`.
    fn some(&mut self, end: usize, chance: usize) -> BTreeSet<usize> {
        (0..end).filter(|_| self.percent(chance)).collect()
    }
}

/// How a stage names an input.
#[derive(Clone, Copy, Debug)]
enum Need {
    /// `s0`: with a matrix, every instance.
    Stage(usize),
    /// `s0[a]`
    Label(usize, usize),
    /// `s0[${k}]`: the instance with the same label.
    SameLabel(usize),
    /// `s0[*]`
    Any(usize),
}

#[derive(Debug)]
struct Stage {
    /// How many labels its matrix has; 0: no matrix.
    labels: usize,
    /// Whether the label is among its parameters.
    label_in_params: bool,
    /// A port with several needs lists them.
    ports: Vec<Vec<Need>>,
}

/// A pipeline with its earlier versions, what happened to the store since, and the arguments of a command.
#[derive(Debug)]
struct Case {
    stages: Vec<Stage>,
    /// The parameter of each stage, by version; the command is given the last one.
    versions: Vec<Vec<usize>>,
    targets: Vec<String>,
    until: Vec<String>,
    force: Vec<String>,
    from: Vec<String>,
    /// Positions among the records and artifacts that the earlier versions left.
    lost_records: BTreeSet<usize>,
    lost_artifacts: BTreeSet<usize>,
    damaged_artifacts: BTreeSet<usize>,
    /// Whether a forced stage makes other bytes than before.
    surprising: bool,
}

impl Case {
    fn draw(seed: u64) -> Self {
        let draw = &mut Draw(ChaCha8Rng::seed_from_u64(seed));
        let mut stages: Vec<Stage> = Vec::new();
        for n in 0..1 + draw.below(7) {
            let labels = if draw.percent(30) { 2 + draw.below(2) } else { 0 };
            let mut ports = Vec::new();
            for _ in 0..if n == 0 { 0 } else { draw.below(3) } {
                let sources = if draw.percent(20) { draw.some(n, 50) } else { BTreeSet::from([draw.below(n)]) };
                let needs = sources.into_iter().map(|source| match stages[source].labels {
                    0 => Need::Stage(source),
                    count => match draw.below(4) {
                        0 => Need::Stage(source),
                        1 => Need::Any(source),
                        2 if labels > 0 && labels <= count => Need::SameLabel(source),
                        _ => Need::Label(source, draw.below(count)),
                    },
                });
                let needs: Vec<Need> = needs.collect();
                if !needs.is_empty() {
                    ports.push(needs);
                }
            }
            // A variable of the matrix that changes nothing is a fault of the file.
            let used = ports.iter().flatten().any(|need| matches!(need, Need::SameLabel(_)));
            let label_in_params = labels > 0 && (!used || draw.percent(40));
            stages.push(Stage { labels, label_in_params, ports });
        }
        let versions = 1 + draw.below(3);
        let selectors = |draw: &mut Draw, chance| -> Vec<String> {
            let chosen = draw.some(stages.len(), chance);
            chosen.into_iter().map(|stage| selector(stage, stages[stage].labels, draw)).collect()
        };
        let mut targets = selectors(draw, 40);
        if targets.is_empty() {
            targets.push(format!("s{}", stages.len() - 1));
        }
        let until = if draw.percent(30) { selectors(draw, 40) } else { Vec::new() };
        let force = if draw.percent(40) { selectors(draw, 25) } else { Vec::new() };
        let from = if draw.percent(30) { selectors(draw, 25) } else { Vec::new() };
        let (lost, damaged) = ([0, 0, 10, 30][draw.below(4)], [0, 0, 10][draw.below(3)]);
        Self {
            versions: (0..versions).map(|_| (0..stages.len()).map(|_| draw.below(4) / 3).collect()).collect(),
            targets,
            until,
            force,
            from,
            lost_records: draw.some(40, lost),
            lost_artifacts: draw.some(40, lost),
            damaged_artifacts: draw.some(40, damaged),
            surprising: draw.percent(30),
            stages,
        }
    }

    fn text(&self, version: usize) -> String {
        let mut text = format!("version: 1\ntargets: [{}]\nstages:\n", quoted(&self.targets));
        for (n, stage) in self.stages.iter().enumerate() {
            let label = if stage.label_in_params { ", '${k}'" } else { "" };
            let value = self.versions[version][n];
            write!(text, "  s{n}: {{ uses: command, with: {{ run: ['{n}', '{value}'{label}] }}").unwrap();
            if stage.labels > 0 {
                write!(text, ", matrix: {{ k: [{}] }}", LABELS[..stage.labels].join(", ")).unwrap();
            }
            text.push_str(", needs: {");
            for (p, needs) in stage.ports.iter().enumerate() {
                let needs: Vec<String> = needs.iter().map(|need| need.to_string()).collect();
                match needs.as_slice() {
                    [one] => write!(text, " p{p}: '{one}',").unwrap(),
                    many => write!(text, " p{p}: [{}],", quoted(many)).unwrap(),
                }
            }
            text.push_str(" } }\n");
        }
        text
    }

    fn load(&self, version: usize, folder: &Path, registry: &Registry) -> Graph {
        let file = folder.join("p.yaml");
        std::fs::write(&file, self.text(version)).unwrap();
        let options = LoadOptions { until: self.until.clone(), ..LoadOptions::default() };
        load(&file, &options, registry).unwrap_or_else(|faults| panic!("{faults}"))
    }
}

impl std::fmt::Display for Need {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Stage(stage) => write!(f, "s{stage}"),
            Self::Label(stage, label) => write!(f, "s{stage}[{}]", LABELS[*label]),
            Self::SameLabel(stage) => write!(f, "s{stage}[${{k}}]"),
            Self::Any(stage) => write!(f, "s{stage}[*]"),
        }
    }
}

fn quoted(words: &[String]) -> String {
    words.iter().map(|word| format!("'{word}'")).collect::<Vec<_>>().join(", ")
}

fn selector(stage: usize, labels: usize, draw: &mut Draw) -> String {
    match draw.below(3) {
        0 if labels > 0 => format!("s{stage}[*]"),
        1 if labels > 0 => format!("s{stage}[{}]", LABELS[draw.below(labels)]),
        _ => format!("s{stage}"),
    }
}

/// One instance of a stage as the oracle sees it.
struct Node {
    name: String,
    stage: usize,
    label: Option<usize>,
    /// Its parameters, as words.
    words: Vec<String>,
    ports: Vec<Port>,
}

struct Port {
    from: Vec<usize>,
    /// Whether labels distinguish its inputs.
    many: bool,
}

impl Node {
    fn inputs(&self) -> impl Iterator<Item = usize> + '_ {
        self.ports.iter().flat_map(|port| port.from.iter().copied())
    }

    fn matches(&self, selector: &str) -> bool {
        let any = self.label.map(|_| format!("s{}[*]", self.stage));
        self.name == selector || selector == format!("s{}", self.stage) || any.as_deref() == Some(selector)
    }
}

/// Every instance of the pipeline's last version.
fn nodes(case: &Case) -> Vec<Node> {
    let mut nodes: Vec<Node> = Vec::new();
    for (n, stage) in case.stages.iter().enumerate() {
        let labels = if stage.labels == 0 { vec![None] } else { (0..stage.labels).map(Some).collect() };
        for label in labels {
            let of = |wanted: &Need| -> Vec<usize> {
                let fits = |node: &Node| match *wanted {
                    Need::Stage(stage) | Need::Any(stage) => node.stage == stage,
                    Need::Label(stage, label) => node.stage == stage && node.label == Some(label),
                    Need::SameLabel(stage) => node.stage == stage && node.label == label,
                };
                (0..nodes.len()).filter(|i| fits(&nodes[*i])).collect()
            };
            let has_matrix = |source: &usize| case.stages[*source].labels > 0;
            let many = |needs: &Vec<Need>| match needs.as_slice() {
                [Need::Stage(source)] => has_matrix(source),
                [Need::Label(..) | Need::SameLabel(_)] => false,
                _ => true,
            };
            let ports = stage.ports.iter();
            let ports = ports.map(|needs| Port { from: needs.iter().flat_map(of).collect(), many: many(needs) });
            let ports = ports.collect();
            let mut words = vec![n.to_string(), case.versions[case.versions.len() - 1][n].to_string()];
            words.extend(label.filter(|_| stage.label_in_params).map(|label| LABELS[label].to_owned()));
            let name = label.map_or_else(|| format!("s{n}"), |label| format!("s{n}[{}]", LABELS[label]));
            nodes.push(Node { name, stage: n, label, words, ports });
        }
    }
    nodes
}

/// Everything that an attempt knows, as text: the oracle's replacement for keys.
fn recipe_text(words: &[String], ports: &[Vec<(Option<String>, Digest)>]) -> String {
    format!("{words:?} {ports:?}")
}

/// The same of a real recipe.
fn text_of(recipe: &Recipe) -> String {
    let words = recipe.params["run"].as_array().unwrap().iter().map(|word| word.as_str().unwrap().to_owned());
    let ports = recipe.inputs.iter().map(|port| port.from.iter().map(|i| (i.label.clone(), i.digest)).collect());
    recipe_text(&words.collect::<Vec<_>>(), &ports.collect::<Vec<_>>())
}

/// The bytes that an attempt makes: so few values that different recipes often give the same bytes.
fn outcome(recipe: &str, surprising: bool) -> Digest {
    let stage = recipe.split('"').nth(1).unwrap_or_default();
    Digest::of(format!("{stage} {} {surprising}", Digest::of(recipe.as_bytes()).as_bytes()[0] % 3).as_bytes())
}

/// The definitions.
struct Oracle<'a> {
    nodes: Vec<Node>,
    records: BTreeMap<String, Digest>,
    store: &'a MemoryStore,
    targets: BTreeSet<usize>,
    forced: BTreeSet<usize>,
    surprising: bool,
}

#[derive(Debug, PartialEq)]
enum State {
    Reuse(Digest),
    Run(Reason),
    Pending(BTreeSet<String>),
}

impl Oracle<'_> {
    /// Whether a target needs the instance.
    fn kept(&self, i: usize) -> bool {
        self.targets.contains(&i) || (0..self.nodes.len()).any(|j| self.needs(j, i) && self.kept(j))
    }

    fn needs(&self, user: usize, input: usize) -> bool {
        self.nodes[user].inputs().any(|i| i == input)
    }

    fn any_user(&self, i: usize, is: impl Fn(usize) -> bool) -> bool {
        (0..self.nodes.len()).any(|j| self.needs(j, i) && self.kept(j) && is(j))
    }

    /// `None` if the digest of an input is not known.
    fn recipe(&self, i: usize, digest: &dyn Fn(usize) -> Option<Digest>) -> Option<String> {
        let node = &self.nodes[i];
        let input = |port: &Port, i: usize| {
            let label = self.nodes[i].label.map_or_else(|| self.nodes[i].name.clone(), |l| LABELS[l].to_owned());
            Some((port.many.then_some(label), digest(i)?))
        };
        let ports = node.ports.iter().map(|port| port.from.iter().map(|i| input(port, *i)).collect());
        Some(recipe_text(&node.words, &ports.collect::<Option<Vec<Vec<_>>>>()?))
    }

    fn damage(&self, digest: &Digest) -> Option<Reason> {
        match (self.store.damaged.contains(digest), self.store.intact.contains(digest)) {
            (true, _) => Some(Reason::ArtifactDamaged { file: "x".into() }),
            (false, false) => Some(Reason::ArtifactMissing),
            (false, true) => None,
        }
    }

    /// What the instance's record says, if everything above has one too.
    fn recorded(&self, i: usize) -> Option<Digest> {
        let recipe = self.recipe(i, &|input| self.recorded(input))?;
        if self.forced.contains(&i) { None } else { self.records.get(&recipe).copied() }
    }

    /// Whether the instance must run for itself, not because its bytes are lost.
    fn starts(&self, i: usize) -> bool {
        self.recipe(i, &|input| self.recorded(input)).is_some() && self.recorded(i).is_none()
    }

    /// Why the bytes of a recorded artifact must be made again.
    fn lost(&self, i: usize) -> Option<Reason> {
        let damage = self.damage(&self.recorded(i)?)?;
        let needed = self.targets.contains(&i) || self.any_user(i, |j| self.starts(j) || self.lost(j).is_some());
        needed.then_some(damage)
    }

    /// The state before the run.
    fn state(&self, i: usize) -> State {
        let unknown = self.nodes[i].inputs().filter(|input| !matches!(self.state(*input), State::Reuse(_)));
        let unknown: BTreeSet<String> = unknown.map(|input| self.nodes[input].name.clone()).collect();
        match (self.recorded(i), self.lost(i)) {
            _ if !unknown.is_empty() => State::Pending(unknown),
            _ if self.forced.contains(&i) => State::Run(Reason::Forced),
            (None, _) => State::Run(Reason::NoRecord),
            (Some(_), Some(reason)) => State::Run(reason),
            (Some(digest), None) => State::Reuse(digest),
        }
    }

    /// The digest after the run.
    fn result(&self, i: usize) -> Digest {
        let recipe = self.recipe_of_run(i);
        match self.records.get(&recipe) {
            Some(digest) if !self.forced.contains(&i) => *digest,
            _ => outcome(&recipe, self.surprising && self.forced.contains(&i)),
        }
    }

    fn recipe_of_run(&self, i: usize) -> String {
        self.recipe(i, &|input| Some(self.result(input))).unwrap()
    }

    /// Why the instance is among those that the run executes.
    fn runs(&self, i: usize) -> Option<Reason> {
        if self.forced.contains(&i) {
            return Some(Reason::Forced);
        }
        let Some(digest) = self.records.get(&self.recipe_of_run(i)) else { return Some(Reason::NoRecord) };
        let damage = self.damage(digest)?;
        let needed = self.targets.contains(&i) || self.any_user(i, |j| self.runs(j).is_some());
        needed.then_some(damage)
    }

    /// Whether two instances of one stage have the same recipe; an input that is not known counts by its name.
    fn has_duplicates(&self, recipe: &dyn Fn(usize) -> String) -> bool {
        let mut seen = BTreeSet::new();
        (0..self.nodes.len()).filter(|i| self.kept(*i)).any(|i| !seen.insert((self.nodes[i].stage, recipe(i))))
    }

    /// Whether two instances have the same artifact and it is lost: the one that makes it first does so for both, and
    /// which one that is depends on the order of work.
    fn shares_lost_artifact(&self) -> bool {
        let mut seen = BTreeSet::new();
        let kept = (0..self.nodes.len()).filter(|i| self.kept(*i)).map(|i| self.result(i));
        kept.filter(|digest| self.damage(digest).is_some()).any(|digest| !seen.insert(digest))
    }

    /// As far as records say.
    fn planned_recipe(&self, i: usize) -> String {
        let unknown = |input: usize| Digest::of(self.nodes[input].name.as_bytes());
        self.recipe(i, &|input| Some(self.recorded(input).unwrap_or_else(|| unknown(input)))).unwrap()
    }

    /// Whether every instance above those of `--from` is reused.
    fn from_is_possible(&self, from: &BTreeSet<usize>) -> bool {
        let above = |i: usize| from.iter().any(|start| self.is_above(i, *start));
        (0..self.nodes.len()).all(|i| from.contains(&i) || !above(i) || matches!(self.state(i), State::Reuse(_)))
    }

    fn is_above(&self, i: usize, below: usize) -> bool {
        self.nodes[below].inputs().any(|input| input == i || self.is_above(i, input))
    }
}

/// What the cases met, so that a drawing that misses something is noticed.
type Tally = BTreeMap<&'static str, u64>;

fn count(tally: &mut Tally, what: &'static str) {
    *tally.entry(what).or_default() += 1;
}

fn check(case: &Case, folder: &Path, registry: &Registry, tally: &mut Tally) {
    let mut store = MemoryStore::default();
    let mut records: BTreeMap<String, Digest> = BTreeMap::new();
    let (last, earlier) = (case.versions.len() - 1, 0..case.versions.len() - 1);
    for version in earlier {
        let graph = case.load(version, folder, registry);
        let mut known = Vec::new();
        for i in 0..graph.instances.len() {
            let RecipeState::Ready(recipe) = recipe(&graph, registry, &store, i, &known).unwrap() else {
                panic!("the inputs of an instance come first")
            };
            let text = text_of(&recipe);
            let digest = outcome(&text, false);
            store.put(recipe.key(), digest);
            records.insert(text.clone(), digest);
            known.push(Some(digest));
        }
    }
    // By digest and by text, whose order has nothing to do with the pipeline.
    let texts: Vec<String> = records.keys().cloned().collect();
    let keys: BTreeMap<String, _> = {
        let graphs = (0..last).map(|version| case.load(version, folder, registry));
        let all = graphs.flat_map(|graph| keys_by_text(&graph, registry, &store));
        all.collect()
    };
    assert_eq!(keys.len(), store.records.len(), "recipes and keys do not correspond one to one");
    for text in case.lost_records.iter().filter_map(|n| texts.get(*n)) {
        records.remove(text);
        store.records.remove(&keys[text]);
    }
    let digests: Vec<Digest> = store.intact.iter().copied().collect();
    store.intact.retain(|digest| !case.lost_artifacts.iter().any(|n| digests.get(*n) == Some(digest)));
    store.damaged.extend(case.damaged_artifacts.iter().filter_map(|n| digests.get(*n)));

    let graph = case.load(last, folder, registry);
    let nodes = nodes(case);
    let select = |selectors: &[String]| -> BTreeSet<usize> {
        (0..nodes.len()).filter(|i| selectors.iter().any(|selector| nodes[*i].matches(selector))).collect()
    };
    let targets = select(if case.until.is_empty() { &case.targets } else { &case.until });
    let (force, from) = (select(&case.force), select(&case.from));
    let (before, surprising) = (store.clone(), case.surprising);
    let mut oracle = Oracle { nodes, records, store: &before, targets, forced: BTreeSet::new(), surprising };

    let kept: BTreeSet<usize> = (0..oracle.nodes.len()).filter(|i| oracle.kept(*i)).collect();
    let names = |some: &mut dyn Iterator<Item = String>| some.collect::<BTreeSet<String>>();
    let in_graph = names(&mut graph.instances.iter().map(|instance| instance.name.to_string()));
    assert_eq!(in_graph, names(&mut kept.iter().map(|i| oracle.nodes[*i].name.clone())), "the instances");
    let in_graph = names(&mut graph.targets.iter().map(|target| graph.instances[*target].name.to_string()));
    assert_eq!(in_graph, names(&mut oracle.targets.iter().map(|i| oracle.nodes[*i].name.clone())), "the targets");

    let some_match = |selector: &String| kept.iter().any(|i| oracle.nodes[*i].matches(selector));
    let valid = case.force.iter().chain(&case.from).all(some_match);
    let flags = Flags::new(&graph, &case.force, &case.from);
    assert_eq!(flags.is_ok(), valid, "{flags:?}");
    let Ok(flags) = flags else { return count(tally, "flags that name no stage of the graph") };
    oracle.forced = force.intersection(&kept).copied().collect();

    // By position in the graph.
    let node_of = |name: String| oracle.nodes.iter().position(|node| node.name == name).unwrap();
    let order: Vec<usize> = graph.instances.iter().map(|instance| node_of(instance.name.to_string())).collect();
    let plan = plan_with(&graph, registry, &store, &flags, &[]);
    assert_eq!(plan.is_err(), oracle.has_duplicates(&|i| oracle.planned_recipe(i)), "duplicates at planning: {plan:?}");
    let Ok(plan) = plan else { return count(tally, "duplicates at planning") };
    for (planned, &i) in plan.stages.iter().zip(&order) {
        let name = &oracle.nodes[i].name;
        let state = match &planned.state {
            PlannedState::Reuse { digest, .. } => State::Reuse(*digest),
            PlannedState::Run { reason, .. } => State::Run(reason.clone()),
            PlannedState::Pending { waits_on } => {
                State::Pending(names(&mut waits_on.iter().map(|on| graph.instances[*on].name.to_string())))
            }
        };
        assert_eq!(state, oracle.state(i), "the plan of {name}");
        let needed = oracle.targets.contains(&i) || oracle.lost(i).is_some();
        assert_eq!(planned.need == ArtifactNeed::Bytes, needed, "whether the bytes of {name} are needed");
        count(
            tally,
            match state {
                State::Reuse(_) => "planned to be reused",
                State::Run(Reason::Forced) => "forced",
                State::Run(Reason::NoRecord) => "without a record",
                State::Run(Reason::ArtifactMissing) => "missing",
                State::Run(Reason::ArtifactDamaged { .. }) => "damaged",
                State::Pending(_) => "pending",
            },
        );
    }
    let possible = flags.check_from(&graph, &plan).is_ok();
    let from = from.intersection(&kept).copied().collect();
    assert_eq!(possible, oracle.from_is_possible(&from), "--from");
    count(tally, if possible { "--from is possible" } else { "--from is not possible" });

    let found: Vec<Option<Digest>> = order.iter().map(|i| Some(oracle.result(*i))).collect();
    let again = plan_with(&graph, registry, &before, &flags, &found);
    assert_eq!(again.is_err(), oracle.has_duplicates(&|i| oracle.recipe_of_run(i)), "duplicates of the run: {again:?}");
    let Ok(again) = again else { return count(tally, "duplicates while running") };
    if oracle.shares_lost_artifact() {
        return count(tally, "one lost artifact of two instances");
    }
    let ran = run(&graph, registry, &mut store, &flags, &|_, recipe, forced| {
        outcome(&text_of(recipe), case.surprising && forced)
    });
    for (at, &i) in order.iter().enumerate() {
        let expected = oracle.runs(i).map_or(Decision::Reuse(oracle.result(i)), Decision::Run);
        let name = &oracle.nodes[i].name;
        assert_eq!((&ran.decisions[at], ran.digests[at]), (&expected, oracle.result(i)), "the run of {name}");
        let planned = match &again.stages[at].state {
            PlannedState::Reuse { digest, .. } => Decision::Reuse(*digest),
            PlannedState::Run { reason, .. } => Decision::Run(reason.clone()),
            PlannedState::Pending { waits_on } => panic!("{name} still waits on {waits_on:?}"),
        };
        assert_eq!(planned, expected, "the plan of {name} with the digests of the run");
        if matches!((&plan.stages[at].state, &expected), (PlannedState::Pending { .. }, Decision::Reuse(_))) {
            count(tally, "cut off early");
        }
    }
}

fn keys_by_text(graph: &Graph, registry: &Registry, store: &MemoryStore) -> Vec<(String, crate::names::Key)> {
    let (mut known, mut keys) = (Vec::new(), Vec::new());
    for i in 0..graph.instances.len() {
        let RecipeState::Ready(recipe) = recipe(graph, registry, store, i, &known).unwrap() else {
            panic!("the inputs of an instance come first")
        };
        known.push(Some(store.records[&recipe.key()]));
        keys.push((text_of(&recipe), recipe.key()));
    }
    keys
}

fn from_environment(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |value| value.parse().unwrap_or_else(|e| panic!("{name}={value}: {e}")))
}

#[test]
fn plans_and_runs_agree_with_a_slow_oracle() {
    let (first, cases) = (from_environment("TEMPER_SEED", 0), from_environment("TEMPER_CASES", 10_000));
    let (next, total, failure) = (AtomicU64::new(0), Mutex::new(Tally::new()), Mutex::new(None));
    let work = || {
        let (folder, registry, mut tally) = (tempfile::tempdir().unwrap(), registry(), Tally::new());
        loop {
            let n = next.fetch_add(1, Ordering::Relaxed);
            if n >= cases || failure.lock().unwrap().is_some() {
                break;
            }
            let case = Case::draw(first + n);
            let checked = catch_unwind(AssertUnwindSafe(|| check(&case, folder.path(), &registry, &mut tally)));
            if let Err(panic) = checked {
                let why = crate::attempt::panic_message(&*panic);
                *failure.lock().unwrap() = Some((first + n, why, case));
            }
        }
        for (what, count) in tally {
            *total.lock().unwrap().entry(what).or_default() += count;
        }
    };
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| (0..threads).for_each(|_| drop(scope.spawn(work))));
    if let Some((seed, why, case)) = failure.into_inner().unwrap() {
        let text = case.text(case.versions.len() - 1);
        panic!("{why}\nreplay with TEMPER_SEED={seed} TEMPER_CASES=1\n{case:?}\n{text}");
    }
    let total = total.into_inner().unwrap();
    println!("{cases} cases from seed {first}: {total:?}");
    assert!(cases < 1_000 || total.len() == 13, "the cases no longer meet everything: {total:?}");
}
