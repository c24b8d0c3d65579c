//! Sentences on how a run's graph differs from the paper: corpus, models, annotator, pairs, members, arms. Each
//! sentence follows from the stages in the graph.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

use super::grouped;

/// One stage instance of a run.
#[derive(Clone, Debug)]
pub struct StageInstance<'a> {
    pub name: &'a str,
    pub kind: &'a str,
    pub params: &'a Value,
    /// (port, names of the instances wired to it)
    pub inputs: Vec<(&'a str, Vec<&'a str>)>,
    /// Metrics of its artifact; empty if there is none.
    pub metrics: BTreeMap<String, f64>,
}

/// All notes, in the order of the paper's own stages.
pub fn notes(held: &[StageInstance<'_>]) -> Vec<String> {
    let run = Run(held);
    [run.corpus(), run.models(), run.annotators(), run.pairs(), run.ensembles(), run.arms(), run.unstated()].concat()
}

/// Hub repositories of the paper's models.
const POLICIES: [&str; 2] = ["gpt2", "gpt2-medium"];
const GOLD: [&str; 1] = ["gpt-j-6b"];
const GENERATORS: [&str; 3] = ["gpt-j-6b", "gpt2", "gpt2-medium"];
const CORPUS: &str = "CarperAI/openai_summarize_tldr";
const PAIRS: f64 = 100_000.0;

struct Run<'a>(&'a [StageInstance<'a>]);

impl<'a> Run<'a> {
    fn of(&self, kind: &str) -> impl Iterator<Item = &'a StageInstance<'a>> {
        self.0.iter().filter(move |held| held.kind == kind)
    }

    /// The instances wired to a port.
    fn at(&self, user: &'a StageInstance<'a>, port: &str) -> Vec<&'a StageInstance<'a>> {
        let names = user.inputs.iter().filter(|(p, _)| *p == port).flat_map(|(_, names)| names);
        names.filter_map(|name| self.0.iter().find(|held| held.name == *name)).collect()
    }

    /// The instances wired to a port of any instance of a kind, without duplicates.
    fn at_any(&self, kind: &str, port: &str) -> Vec<&'a StageInstance<'a>> {
        let mut found: Vec<&StageInstance<'_>> = Vec::new();
        for held in self.of(kind).flat_map(|user| self.at(user, port)) {
            if !found.iter().any(|f| f.name == held.name) {
                found.push(held);
            }
        }
        found
    }

    fn corpus(&self) -> Vec<String> {
        let mut out = Vec::new();
        for filter in self.of("dataset.filter") {
            let kept = filter.metrics.get("kept").copied();
            let many = kept.map_or_else(String::new, |n| format!(", {} after the filter", grouped(n)));
            for posts in self.at(filter, "posts") {
                out.extend(match posts.kind {
                    "dataset.tldr" if text(posts.params, "/hub/id") == Some(CORPUS) => kept
                        .filter(|n| *n != 129_722.0)
                        .map(|n| format!("{} posts stay after the filter; the paper has 129,722.", grouped(n))),
                    "dataset.tldr" => Some(format!(
                        "The posts come from files or a data set of this pipeline's choosing{many}; the paper has 129,722 of {CORPUS}."
                    )),
                    "dataset.tinytldr" => Some(format!(
                        "The posts are procedural (dataset.tinytldr){many}, which lets true quality be scored beside the gold reward; \
                         the paper has 129,722 posts of Reddit."
                    )),
                    kind => Some(format!("The posts are made by `{kind}`{many}; the paper has 129,722 of {CORPUS}.")),
                });
            }
        }
        out
    }

    fn models(&self) -> Vec<String> {
        let golds = self.at_any("evaluate", "gold");
        let gold: Vec<&StageInstance<'_>> = golds.into_iter().flat_map(|gold| self.at(gold, "model")).collect();
        let mut out = Vec::new();
        let roles: [(&str, Vec<&StageInstance<'_>>, &[&str], &str); 3] = [
            ("Policies", self.at_any("rl.ppo", "policy"), &POLICIES, "GPT-2 137 M and GPT-2 380 M"),
            ("Gold reward model", gold, &GOLD, "GPT-J 6 B"),
            (
                "Summary generators",
                self.at_any("generate.pairs", "models"),
                &GENERATORS,
                "GPT-2 137 M, GPT-2 380 M, GPT-J 6 B",
            ),
        ];
        for (role, models, repositories, paper) in roles {
            let from: BTreeSet<String> = models.iter().map(|model| self.repository(model)).collect();
            if !models.is_empty() && !from.iter().map(String::as_str).eq(repositories.iter().copied()) {
                let sizes: Vec<String> = models.iter().map(|model| self.size(model)).collect();
                out.push(format!("{role}: {}; in the paper: {paper}.", sizes.join(", ")));
            }
        }
        let bases = self.at_any("sft", "base");
        if bases.iter().any(|base| base.kind == "model.import" && text(base.params, "/asset/name").is_some()) {
            out.push("The base models ship with temper, pre-trained on procedural posts of another seed.".to_owned());
        }
        for trained in bases.iter().filter(|base| base.kind == "model.pretrain").take(1) {
            let on: Vec<&str> = self.at(trained, "posts").iter().map(|posts| posts.name).collect();
            out.push(format!("The base models are pre-trained by this pipeline, on the posts of `{}`.", on.join(", ")));
        }
        if self.0.iter().any(|held| {
            held.kind == "tokenizer.train"
                || (held.kind == "tokenizer.import" && held.params.pointer("/hub/id").is_none())
        }) {
            out.push("The tokenizer is not GPT-2's.".to_owned());
        }
        out
    }

    /// The hub name, without its owner, of the model that this one was fine-tuned from; empty if there is none.
    fn repository(&self, model: &'a StageInstance<'a>) -> String {
        let base = if model.kind == "sft" { self.at(model, "base").first().copied() } else { Some(model) };
        let id = base.and_then(|base| text(base.params, "/hub/id")).unwrap_or_default();
        id.rsplit('/').next().unwrap_or(id).to_lowercase()
    }

    fn size(&self, model: &'a StageInstance<'a>) -> String {
        match model.metrics.get("parameters") {
            Some(n) if *n >= 1e9 => format!("{} {:.1} B", model.name, n / 1e9),
            Some(n) => format!("{} {:.2} M", model.name, n / 1e6),
            None => format!("{} (size not known)", model.name),
        }
    }

    /// The judges of the pairs that reward models were trained on. A judge used only for comparison is no deviation.
    fn annotators(&self) -> Vec<String> {
        let mut out = Vec::new();
        for held in self.at_any("reward.train", "preferences") {
            if held.kind == "annotate.claude" {
                out.extend(claude(held.params));
                continue;
            }
            let error = |default: f64| 100.0 * held.params.get("error_rate").and_then(Value::as_f64).unwrap_or(default);
            out.extend(match held.kind {
                "annotate.reference" if text(held.params, "/by") == Some("facts") => Some(format!(
                    "Annotator: the facts behind the posts, that is true quality with {:.0}% of the labels turned round, in Claude's place.",
                    error(0.05)
                )),
                "annotate.reference" => Some(format!(
                    "Annotator: ROUGE against the author's own summary with {:.0}% of the labels turned round, in Claude's place.",
                    error(0.0)
                )),
                "annotate.human" => Some(match self.at(held, "comparisons").first() {
                    Some(drawn) if drawn.kind == "dataset.comparisons" && !reads_elsewhere(held.params) => format!(
                        "Annotator: simulated labellers who err in {:.0}% of their choices stand in for the people of Stiennon et al. 2020, \
                         whom the paper names as the simpler way beside Claude.",
                        100.0 * drawn.params.get("error_rate").and_then(Value::as_f64).unwrap_or(0.1)
                    ),
                    _ => "Annotator: people's comparisons, which the paper names as the simpler way, in Claude's place.".to_owned(),
                }),
                "annotate.openai" => {
                    Some(format!("Annotator: {}, in Claude's place.", text(held.params, "/model").unwrap_or("another model")))
                }
                _ => None,
            });
        }
        out
    }

    fn pairs(&self) -> Vec<String> {
        let mut out = Vec::new();
        for contrast in self.of("generate.contrast") {
            let pairs = contrast.params.get("pairs").and_then(Value::as_f64).unwrap_or_default();
            let weight = |name: &str| {
                contrast.params.pointer(&format!("/weights/{name}")).and_then(Value::as_f64).unwrap_or(0.0)
            };
            let all: f64 = ["swap", "shuffle", "truncate", "repeat"].map(weight).iter().sum();
            let swapped = if all > 0.0 {
                format!(", {:.0}% of them with facts swapped", 100.0 * weight("swap") / all)
            } else {
                String::new()
            };
            out.push(format!(
                "{} of the gold model's pairs set sound summaries against corrupted copies (generate.contrast{swapped}); the paper has \
                 sampled pairs only.",
                grouped(pairs)
            ));
        }
        let learned = |models: Vec<&StageInstance<'_>>| -> BTreeSet<u64> {
            models
                .iter()
                .filter_map(|model| model.metrics.get("pairs"))
                .filter(|n| **n != PAIRS)
                .map(|n| *n as u64)
                .collect()
        };
        for (whose, models) in [
            ("The gold model", self.at_any("evaluate", "gold")),
            ("Each proxy", self.at_any("reward.ensemble", "members")),
        ] {
            for n in learned(models) {
                out.push(format!(
                    "{whose} learns from {} pairs, held-out ones left aside; the paper has 100,000.",
                    grouped(n as f64)
                ));
            }
        }
        if self.of("generate.pairs").any(|pairs| pairs.params.get("same_model") == Some(&Value::Bool(false))) {
            out.push("Two summaries of a pair come from two distinct models; the paper does not say.".to_owned());
        }
        out
    }

    /// Settings that the paper leaves open and a run must choose.
    fn unstated(&self) -> Vec<String> {
        const OPEN: [(&str, &str, &str); 11] = [
            ("reward.train", "/eta", "eta of Eq. 1"),
            ("rl.ppo", "/gae_lambda", "GAE lambda"),
            ("rl.ppo", "/gamma", "gamma"),
            ("rl.ppo", "/advantages", "normalisation of advantages by"),
            ("rl.ppo", "/value/trunk", "trunk of the value head"),
            ("rl.ppo", "/value/clip", "clip range of the value"),
            ("rl.ppo", "/value/coefficient", "value coefficient"),
            ("rl.ppo", "/beta1", "Adam's beta1"),
            ("rl.ppo", "/beta2", "Adam's beta2"),
            ("rl.ppo", "/greedy", "greedy responses at"),
            ("rl.ppo", "/evaluation_seed", "seed of held-out responses, at temperature 1"),
        ];
        let settled: Vec<String> = OPEN
            .iter()
            .filter_map(|(kind, pointer, what)| {
                let values: BTreeSet<String> =
                    self.of(kind).filter_map(|held| held.params.pointer(pointer)).map(super::tell).collect();
                (!values.is_empty()).then(|| format!("{what} {}", values.into_iter().collect::<Vec<_>>().join(" and ")))
            })
            .collect();
        if settled.is_empty() {
            Vec::new()
        } else {
            vec![format!("Left open by the paper; here: {}.", settled.join("; "))]
        }
    }

    fn ensembles(&self) -> Vec<String> {
        let sizes: BTreeSet<usize> = self.of("reward.ensemble").map(|e| self.at(e, "members").len()).collect();
        sizes.into_iter().filter(|m| *m != 5).map(|m| format!("Ensemble of M = {m}; the paper has 5.")).collect()
    }

    fn arms(&self) -> Vec<String> {
        const FOUR: [&str; 4] = ["standard", "mean", "pessimistic", "adaptive"];
        let mut run: BTreeSet<&str> = BTreeSet::new();
        let mut beyond: BTreeSet<String> = BTreeSet::new();
        for ppo in self.of("rl.ppo") {
            let objective = text(ppo.params, "/objective").unwrap_or_default();
            let scope = text(ppo.params, "/variance_scope").unwrap_or("sample");
            match objective {
                "adaptive" if scope != "sample" => drop(beyond.insert(format!("adaptive with variance scope {scope}"))),
                objective if FOUR.contains(&objective) => drop(run.insert(objective)),
                objective => drop(beyond.insert(objective.to_owned())),
            }
        }
        let mut out = Vec::new();
        let missing: Vec<&str> = FOUR.into_iter().filter(|arm| !run.contains(arm)).collect();
        let any = !run.is_empty() || !beyond.is_empty();
        if any && !missing.is_empty() {
            out.push(format!("Arms of the paper that are not here: {}.", missing.join(", ")));
        }
        if !beyond.is_empty() {
            out.push(format!("Arms beyond the paper's four: {}.", beyond.into_iter().collect::<Vec<_>>().join(", ")));
        }
        let standard = |ppo: &StageInstance<'_>| text(ppo.params, "/objective") == Some("standard");
        if self
            .of("rl.ppo")
            .any(|ppo| standard(ppo) && self.at(ppo, "rewards").iter().any(|r| r.kind == "reward.ensemble"))
        {
            out.push(
                "`standard` is trained on the first member alone, and its held-out samples are scored by every member of the ensemble."
                    .to_owned(),
            );
        }
        out
    }
}

/// Differences between our request to Claude and the paper's appendix A.2.
fn claude(params: &Value) -> Vec<String> {
    let given = |field: &str| params.get(field).is_some_and(|value| !value.is_null());
    let model = text(params, "/model").unwrap_or_default();
    let mut out = Vec::new();
    if model != "claude-2" && !model.starts_with("claude-2.") {
        out.push(format!("Annotator: {model}, in place of the paper's Claude v2, which is retired."));
    }
    let held_to = match text(params, "/choice") {
        Some("tool") => "as the input of a tool that it must call",
        Some("prefill") => "that is begun for it",
        _ => "held to a schema",
    };
    out.push(format!(
        "The annotator answers in JSON {held_to}, {{\"doc.1.chosen.summary\": 1}}; in the paper in tags, of which the first is \
         given, <doc.1.chosen.summary>1</doc.1.chosen.summary>."
    ));
    if !given("examples") {
        out.push(
            "The annotator's two worked examples are written for temper; the paper's are those of tables 24 and 25 of Stiennon \
             et al. 2020."
                .to_owned(),
        );
    }
    if !given("template") {
        out.push(
            "The annotator's instructions end with a sentence that the paper's lack: that the texts are by strangers, and only to \
             be judged."
                .to_owned(),
        );
    }
    out
}

/// Whether `annotate.human` reads files or the hub instead of its port.
fn reads_elsewhere(params: &Value) -> bool {
    let given =
        |field: &str| params.get(field).is_some_and(|v| !v.is_null() && v.as_array().is_none_or(|a| !a.is_empty()));
    given("files") || given("hub")
}

fn text<'a>(params: &'a Value, pointer: &str) -> Option<&'a str> {
    params.pointer(pointer)?.as_str()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn held<'a>(name: &'a str, kind: &'a str, params: &'a Value, inputs: &[(&'a str, &'a str)]) -> StageInstance<'a> {
        let inputs = inputs.iter().map(|(port, from)| (*port, vec![*from])).collect();
        StageInstance { name, kind, params, inputs, metrics: BTreeMap::new() }
    }

    fn told(run: &[StageInstance<'_>]) -> String {
        notes(run).join("\n")
    }

    #[test]
    fn the_annotator_is_whoever_judged_what_a_model_learned() {
        let (facts, claude, none) = (
            json!({ "by": "facts", "error_rate": 0.05 }),
            json!({ "model": "claude-2.1" }),
            json!({ "error_rate": 0.1 }),
        );
        let gold = held("gold", "reward.train", &Value::Null, &[("preferences", "annotate")]);
        let judged = held("annotate", "annotate.reference", &facts, &[]);
        assert!(told(&[judged.clone(), gold.clone()]).contains("5% of the labels turned round, in Claude's"));
        let compared = held("agreement", "annotate.agreement", &Value::Null, &[("preferences", "annotate")]);
        assert!(!told(&[judged, compared]).contains("Annotator"));
        assert!(!told(&[held("annotate", "annotate.claude", &claude, &[]), gold.clone()]).contains("Annotator:"));
        let stand_in = [
            held("drawn", "dataset.comparisons", &none, &[]),
            held("annotate", "annotate.human", &Value::Null, &[("comparisons", "drawn")]),
            gold.clone(),
        ];
        assert!(told(&stand_in).contains("simulated labellers who err in 10%"));
        let hub = json!({ "hub": { "id": "CarperAI/openai_summarize_comparisons" }, "files": null });
        let people = [stand_in[0].clone(), held("annotate", "annotate.human", &hub, &[("comparisons", "drawn")]), gold];
        assert!(told(&people).contains("Annotator: people's comparisons"));
    }

    #[test]
    fn what_is_asked_of_claude_is_held_against_the_papers_request() {
        let gold = held("gold", "reward.train", &Value::Null, &[("preferences", "annotate")]);
        let told = |params: Value| told(&[held("annotate", "annotate.claude", &params, &[]), gold.clone()]);
        let (model, examples, sentence) =
            ("place of the paper's Claude v2", "tables 24 and 25", "texts are by strangers");
        let plain =
            told(json!({ "model": "claude-haiku-4-5", "choice": "prefill", "template": null, "examples": null }));
        assert!(plain.contains("Annotator: claude-haiku-4-5, in"), "{plain}");
        for what in [model, examples, sentence, "in JSON that is begun for it", "in the paper in tags"] {
            assert!(plain.contains(what), "`{what}` is not in {plain}");
        }
        let own =
            told(json!({ "model": "claude-2.1", "choice": "schema", "template": "t.txt", "examples": "e.jsonl" }));
        for what in [model, examples, sentence] {
            assert!(!own.contains(what), "`{what}` is in {own}");
        }
        assert!(own.contains("in JSON held to a schema"), "{own}");
        assert!(told(json!({ "model": "m", "choice": "tool" })).contains("in JSON as the input of a tool"));
    }

    #[test]
    fn the_papers_own_models_are_no_deviation() {
        let hub = |id: &str| json!({ "hub": { "id": id } });
        let (small, medium) = (hub("openai-community/gpt2"), hub("openai-community/gpt2-medium"));
        let (adaptive, none) = (json!({ "objective": "adaptive" }), Value::Null);
        let mut run = vec![
            held("base[s]", "model.import", &small, &[]),
            held("base[m]", "model.import", &medium, &[]),
            held("sft[s]", "sft", &none, &[("base", "base[s]")]),
            held("sft[m]", "sft", &none, &[("base", "base[m]")]),
            held("rl[s]", "rl.ppo", &adaptive, &[("policy", "sft[s]")]),
            held("rl[m]", "rl.ppo", &adaptive, &[("policy", "sft[m]")]),
        ];
        assert!(!told(&run).contains("Policies"), "{}", told(&run));
        run.pop();
        run[2].metrics.insert("parameters".into(), 451_584.0);
        assert!(told(&run).contains("Policies: sft[s] 0.45 M; in the paper: GPT-2 137 M and GPT-2 380 M."));
        assert!(told(&run).contains("not here: standard, mean, pessimistic."));
    }
}
