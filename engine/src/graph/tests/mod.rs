use std::fmt::Write;

use serde_json::json;

use super::*;

mod bad_input;
pub(crate) mod kinds;

/// A small version of the study: two sizes, pairs, an annotator, an ensemble, two arms of which one needs the other.
const STUDY: &str = "
version: 1
seed: 17
targets: [rl]
stages:
  posts:    { uses: dataset, with: { posts: 24 } }
  base:     { uses: base, matrix: { size: { s: { with: { size: 1 } }, m: { with: { size: 2 } } } } }
  sft:      { uses: train, matrix: { size: [s, m] }, needs: { base: 'base[${size}]', posts: posts } }
  pairs:    { uses: pairs, needs: { models: 'sft[*]', posts: posts } }
  annotate: { uses: annotate, needs: { pairs: pairs } }
  proxy:    { uses: train, matrix: { member: [1, 2, 3] }, seed: '${member}', needs: { base: 'sft[s]', posts: annotate } }
  ensemble: { uses: ensemble, needs: { members: 'proxy[*]' } }
  rl:
    uses: command
    with: { run: [rl, '${arm}', '${seed}'] }
    matrix:
      arm:
        adaptive: { needs: { rewards: ensemble } }
        matched: { needs: { rewards: ensemble, like: 'rl[adaptive,${seed}]' } }
      seed: [11, 12]
    needs: { policy: 'sft[s]' }
profiles:
  human: { stages: { annotate: { uses: annotate, needs: { exclude: posts } } } }
  large: { seed: 5, stages: { sft: { with: { lr: 0.5, lora: { rank: 4 } }, matrix: { size: [s] } } } }
  bare: { targets: [ensemble], stages: { sft: { with: null } } }
report: { deviations: [a small study] }
";

fn options(profiles: &[&str], set: &[&str], until: &[&str]) -> LoadOptions {
    let owned = |list: &[&str]| list.iter().map(|s| (*s).to_owned()).collect();
    LoadOptions { profiles: owned(profiles), set: owned(set), until: owned(until), stage: None }
}

/// Loads `text` as `p.yaml` in an empty folder, whose name is removed from messages.
fn load_text(text: &str, options: &LoadOptions) -> Result<Graph, String> {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let file = folder.path().join("p.yaml");
    std::fs::write(&file, text).expect("a writable folder");
    let strip = |s: String| s.replace(&format!("{}/", folder.path().display()), "");
    load(&file, options, &kinds::registry()).map_err(|faults| strip(faults.to_string()))
}

fn graph(text: &str, options: &LoadOptions) -> Graph {
    load_text(text, options).unwrap_or_else(|faults| panic!("{faults}"))
}

/// One line per instance: `name: port=inputs …`.
fn wiring(graph: &Graph) -> String {
    let mut out = String::new();
    for instance in &graph.instances {
        write!(out, "{}:", instance.name).expect("a string takes it");
        for port in &instance.inputs {
            let from: Vec<String> = port.from.iter().map(|s| graph.instances[s.instance].name.to_string()).collect();
            write!(out, " {}={}", port.port, from.join("+")).expect("a string takes it");
        }
        out.push('\n');
    }
    out
}

fn named<'g>(graph: &'g Graph, name: &str) -> &'g Instance {
    graph.instances.iter().find(|i| i.name.to_string() == name).unwrap_or_else(|| panic!("no {name}"))
}

#[test]
fn a_study_is_loaded_as_a_graph() {
    let graph = graph(STUDY, &LoadOptions::default());
    let expected = "posts:
base[s]:
base[m]:
sft[s]: base=base[s] posts=posts
sft[m]: base=base[m] posts=posts
pairs: models=sft[s]+sft[m] posts=posts
annotate: pairs=pairs
proxy[1]: base=sft[s] posts=annotate
proxy[2]: base=sft[s] posts=annotate
proxy[3]: base=sft[s] posts=annotate
ensemble: members=proxy[1]+proxy[2]+proxy[3]
rl[adaptive,11]: policy=sft[s] rewards=ensemble
rl[adaptive,12]: policy=sft[s] rewards=ensemble
rl[matched,11]: like=rl[adaptive,11] policy=sft[s] rewards=ensemble
rl[matched,12]: like=rl[adaptive,12] policy=sft[s] rewards=ensemble
";
    assert_eq!(wiring(&graph), expected);
    assert_eq!(graph.name, "p");
    assert_eq!(graph.report.deviations, ["a small study"]);
    assert_eq!(graph.targets, [11, 12, 13, 14]);
    assert!(graph.not_needed.is_empty());
    assert_eq!(named(&graph, "proxy[2]").seed, 2);
    assert_eq!(named(&graph, "sft[s]").seed, 17);
    assert_eq!(graph.seed, 17);
    assert_eq!(named(&graph, "proxy[2]").matrix, [("member".to_owned(), "2".to_owned())]);
    assert_eq!(named(&graph, "ensemble").inputs[0].from[1], InputSource { instance: 8, label: "2".into() });
    assert_eq!(named(&graph, "ensemble").inputs[0].arity, Arity::Many);
    assert_eq!(named(&graph, "pairs").inputs[1].from[0].label, "posts");
    let rl = named(&graph, "rl[matched,12]");
    assert_eq!(rl.params["run"], json!(["rl", "matched", "12"]));
    assert_eq!(rl.params["output"], "Files");
    assert_eq!(rl.inputs[0].arity, Arity::One);
}

#[test]
fn swapping_the_annotator_drops_the_stage_before_it() {
    let graph = graph(STUDY, &options(&["human"], &[], &["ensemble"]));
    let not_needed: Vec<String> = graph.not_needed.iter().map(ToString::to_string).collect();
    assert_eq!(
        not_needed,
        ["base[m]", "sft[m]", "pairs", "rl[adaptive,11]", "rl[adaptive,12]", "rl[matched,11]", "rl[matched,12]"]
    );
    assert_eq!(wiring(&graph).lines().find(|l| l.starts_with("annotate")), Some("annotate: exclude=posts"));
}

#[test]
fn profiles_apply_in_order_and_set_wins() {
    let plain = graph(STUDY, &options(&["large"], &[], &["sft"]));
    assert_eq!(
        named(&plain, "sft[s]").params,
        json!({ "lr": 0.5, "epochs": 1, "lora": { "rank": 4, "alpha": 0.0 }, "schedule": [] })
    );
    assert_eq!(named(&plain, "sft[s]").seed, 5);
    assert_eq!(plain.instances.len(), 3);

    let both = graph(STUDY, &options(&["large", "bare"], &[], &[]));
    assert_eq!(named(&both, "sft[s]").params["lr"], 1e-3);
    assert_eq!(both.targets.len(), 1);

    let set =
        ["stages.sft.with.lr=2", "stages.sft.with.lr=3", "stages.sft.with.lora.alpha=8", "seed=1", "targets=[sft]"];
    let overridden = graph(STUDY, &options(&["large"], &set, &[]));
    let params = &named(&overridden, "sft[s]").params;
    assert_eq!((params["lr"].as_f64(), params["lora"]["alpha"].as_f64()), (Some(3.0), Some(8.0)));
    assert_eq!(params["lora"]["rank"], 4);
    assert_eq!(named(&overridden, "sft[s]").seed, 1);
}

#[test]
fn set_reaches_every_part_of_a_stage() {
    type Of = fn(&Instance) -> Value;
    let cases: &[(&[&str], &str, Of, Value)] = &[
        (&["stages.rl.matrix.seed=[7]"], "rl[matched,7]", |i| i.params["run"][2].clone(), json!("7")),
        (&["stages.proxy.matrix.member=[1, 9]"], "proxy[9]", |i| i.seed.into(), json!(9)),
        (&["stages.base.matrix.size.m.with.size=9"], "base[m]", |i| i.params["size"].clone(), json!(9)),
        (&["stages.posts={ with: { posts: 3 } }"], "posts", |i| i.params["posts"].clone(), json!(3)),
        (&["stages.posts={ uses: dataset }"], "posts", |i| i.params["posts"].clone(), json!(100)),
        (&["stages.posts.with=null"], "posts", |i| i.params["posts"].clone(), json!(100)),
        (&["stages.posts.seed=4", "stages.posts.seed=null"], "posts", |i| i.seed.into(), json!(17)),
        (&["stages.annotate.needs.exclude=posts"], "annotate", |i| i.inputs.len().into(), json!(2)),
    ];
    for (set, name, of, expected) in cases {
        let graph = graph(STUDY, &options(&[], set, &[]));
        assert_eq!(of(named(&graph, name)), *expected, "{set:?}");
    }
}

#[test]
fn default_targets_are_the_sinks_of_the_file_before_profiles() {
    let text = "
version: 1
stages:
  a: { uses: dataset }
  b: { uses: dataset, with: { posts: 1 } }
  c: { uses: annotate, needs: { exclude: a } }
profiles:
  more: { stages: { d: { uses: dataset } } }
  less: { stages: { b: null } }
  cut: { stages: { c: { needs: { exclude: b } } } }
";
    let targets = |profiles: &[&str]| {
        let graph = graph(text, &options(profiles, &[], &[]));
        graph.targets.iter().map(|at| graph.instances[*at].name.to_string()).collect::<Vec<_>>().join(" ")
    };
    assert_eq!(targets(&[]), "b c");
    assert_eq!(targets(&["more"]), "b c");
    assert_eq!(targets(&["less"]), "c");
    assert_eq!(targets(&["cut"]), "b c");
}

#[test]
fn labels_keep_their_text_and_variables_their_type() {
    let text = "
version: 1
stages:
  a:
    uses: train
    needs: { base: b, posts: p }
    matrix: { rate: [0.50, 1e-3], rank: [2] }
    with: { lr: '${rate}', lora: { rank: '${rank}' } }
  b: { uses: base, with: { size: 1 } }
  p: { uses: dataset }
  k: { uses: train, matrix: { lr: { 0.25: {}, 1: {} } }, with: { lr: '${lr}' }, needs: { base: b, posts: p } }
  c: { uses: command, matrix: { n: [0.10, x] }, with: { run: [a, '${n}', 'n=${n}'] } }
";
    let all = graph(text, &options(&[], &[], &["a"]));
    assert_eq!(named(&all, "a[0.50,2]").params["lr"], json!(0.5));
    assert_eq!(named(&all, "a[1e-3,2]").params["lora"]["rank"], 2);
    let one = graph(text, &options(&[], &[], &["a[1e-3,*]"]));
    assert_eq!(one.targets.len(), 1);
    let set = "stages.k.matrix.lr.0.25.with.epochs=2";
    let keyed = graph(text, &options(&[], &[set], &["k", "c"]));
    assert_eq!(named(&keyed, "k[0.25]").params["epochs"], 2);
    assert_eq!(named(&keyed, "k[1]").params["lr"], json!(1.0));
    assert_eq!(named(&keyed, "c[0.10]").params["run"], json!(["a", "0.10", "n=0.10"]));

    let quoted = text.replace(" 1: {} ", " '1': {} ");
    let faults = load_text(&quoted, &LoadOptions::default()).expect_err("'1' is text");
    assert!(faults.contains("`lr`: expected a number, found text \"1\"") && faults.contains("= in: k[1]"), "{faults}");
}

#[test]
fn paths_start_from_the_file_s_folder() {
    let text = "version: 1\nstages:\n  a: { uses: dataset, with: { from: ./data/x.txt } }\n";
    let folder = tempfile::tempdir().expect("a temporary folder");
    std::fs::create_dir(folder.path().join("data")).expect("a writable folder");
    std::fs::write(folder.path().join("data/x.txt"), "x").expect("a writable folder");
    let file = folder.path().join("p.yaml");
    std::fs::write(&file, text).expect("a writable folder");
    let graph = load(&file, &LoadOptions::default(), &kinds::registry()).expect("nothing is wrong");
    assert_eq!(graph.instances[0].params["from"]["$path"], folder.path().join("data/x.txt").to_str().expect("UTF-8"));
}

#[test]
fn a_chain_of_ten_thousand_loads() {
    const LENGTH: usize = 10_000;
    let mut text = "version: 1\nstages:\n".to_owned();
    // The first stage in the file is the end of the chain.
    for n in (0..LENGTH).rev() {
        let needs = if n == 0 { String::new() } else { format!(", needs: {{ input: s{} }}", n - 1) };
        writeln!(text, "  s{n}: {{ uses: command, with: {{ run: ['true', '{n}'] }}{needs} }}")
            .expect("a string takes it");
    }
    let whole = graph(&text, &LoadOptions::default());
    assert_eq!(whole.instances.len(), LENGTH);
    assert_eq!(whole.targets, [LENGTH - 1]);
    assert_eq!(whole.instances[0].name.to_string(), "s0");

    let round = text.replace("['true', '0'] }", "['true', '0'] }, needs: { input: s9999 }");
    let faults = load_text(&round, &LoadOptions::default()).expect_err("it goes round");
    assert!(
        faults.contains("cycle: s9999 -> s9998 -> s9997 -> s9996 -> s9995 -> s9994 -> (9989 more) -> "),
        "{faults}"
    );
}
