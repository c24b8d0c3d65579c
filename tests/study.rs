//! A complete study in miniature through the real binary: every stage, real gradients, about a minute.

mod space;

use space::{TestSpace, names, text};

const PIPELINE: &str = r"
version: 1
seed: 3
stages:
  posts: { uses: dataset.tinytldr, with: { posts: 500 } }
  tokenizer: { uses: tokenizer.train, needs: { posts: posts }, with: { vocab_size: 400 } }
  filter:
    uses: dataset.filter
    needs: { posts: posts, tokenizer: tokenizer }
    with: { summary_tokens: [4, 80], validation: 12, calibration: 12, gold: 60, proxy: 60, rl: 60 }
  base:
    uses: model.pretrain
    matrix: { size: { s: { with: { n_embd: 16 } }, m: { with: { n_embd: 24 } } } }
    needs: { posts: posts, tokenizer: tokenizer }
    with: { n_layer: 1, n_head: 2, n_positions: 320, steps: 3, batch: 4, warmup: 1, lr: 1.0e-3 }
  sft: { uses: sft, matrix: { size: [s, m] }, needs: { base: 'base[${size}]', posts: filter }, with: { steps: 2, batch: 4, warmup: 1, lr: 1.0e-3 } }
  pairs: { uses: generate.pairs, needs: { models: 'sft[*]', posts: filter }, with: { split: gold, pairs: 12, max_new_tokens: 12 } }
  contrast: { uses: generate.contrast, needs: { posts: filter, tokenizer: tokenizer }, with: { split: gold, pairs: 24 } }
  annotate: { uses: annotate.reference, needs: { pairs: [contrast, pairs] }, with: { by: facts } }
  gold: { uses: reward.train, needs: { model: 'sft[m]', preferences: annotate, posts: filter }, with: { batch: 8, warmup: 1 } }
  pairs2: { uses: generate.pairs, needs: { models: 'sft[*]', posts: filter }, with: { split: proxy, pairs: 24, max_new_tokens: 12 } }
  labels: { uses: annotate.gold, needs: { pairs: pairs2, reward: gold } }
  proxy: { uses: reward.train, matrix: { member: [1, 2] }, seed: '${member}', needs: { model: 'sft[s]', preferences: labels, posts: filter }, with: { batch: 8, warmup: 1 } }
  ensemble: { uses: reward.ensemble, needs: { members: 'proxy[*]' } }
  rl:
    uses: rl.ppo
    matrix:
      arm:
        standard: { needs: { rewards: 'proxy[1]' }, with: { objective: standard } }
        adaptive: { with: { objective: adaptive } }
        matched: { needs: { adaptive: 'rl[adaptive,${seed}]' }, with: { objective: matched } }
      seed: [5]
    seed: '${seed}'
    needs: { policy: 'sft[s]', rewards: ensemble, posts: filter }
    with: { steps: { n: 2, unit: phase }, rollouts: 6, minibatch: 4, epochs: 2, lr: 1.0e-3, max_new_tokens: 10, eval_every: 1, eval_prompts: 8 }
  evaluate:
    uses: evaluate
    matrix: { arm: [standard, adaptive, matched], seed: [5] }
    needs: { policy: 'rl[${arm},${seed}]', gold: gold, posts: filter }
  best: { uses: generate.best_of_n, needs: { policy: 'sft[s]', rewards: ensemble, posts: filter }, with: { n: 4, prompts: 8, max_new_tokens: 10 } }
  judged: { uses: evaluate, needs: { policy: best, gold: gold, posts: filter } }
profiles:
  stiennon:
    stages:
      comparisons: { uses: dataset.comparisons, needs: { posts: filter }, with: { split: gold, comparisons: 40 } }
      annotate: { uses: annotate.human, needs: { comparisons: comparisons, exclude: filter } }
  agreement:
    targets: [agreement]
    stages:
      comparisons: { uses: dataset.comparisons, needs: { posts: filter }, with: { split: gold, comparisons: 400, error_rate: 0.1 } }
      people: { uses: annotate.human, needs: { comparisons: comparisons, exclude: filter }, with: { labels: majority } }
      asked: { uses: dataset.pairs, needs: { preferences: people, tokenizer: tokenizer, posts: filter } }
      facts: { uses: annotate.reference, needs: { pairs: asked }, with: { by: facts, error_rate: 0 } }
      gold-too: { uses: annotate.gold, needs: { pairs: asked, reward: gold } }
      agreement: { uses: annotate.agreement, needs: { preferences: [people, facts, gold-too] } }
";

#[test]
fn a_study_runs_from_nothing_and_is_then_reused() {
    let space = TestSpace::new();
    space.write("study.yaml", PIPELINE);

    let sft = space.json(&["run", "study.yaml", "--until", "sft", "--json"]);
    assert_eq!(names(&sft["failed"]), [""; 0]);
    assert!(names(&sft["ran"]).contains(&"sft[s]") && !names(&sft["ran"]).contains(&"pairs"));

    let all = space.json(&["run", "study.yaml", "--json"]);
    assert_eq!(names(&all["failed"]), [""; 0]);
    assert!(names(&all["reused"]).contains(&"sft[s]"));
    assert!(names(&all["ran"]).contains(&"evaluate[matched,5]"));

    let again = space.json(&["run", "study.yaml", "--json"]);
    assert_eq!(names(&again["ran"]), [""; 0]);

    let shown = space.json(&["show", "study.yaml", "evaluate[adaptive,5]", "--json"]);
    assert_eq!(shown["type"], "Evaluation");
    assert!(shown["metrics"]["final_kl"].is_number(), "{shown}");
    assert!(shown["metrics"]["final_variance"].is_number(), "{shown}");
    let alone = space.json(&["show", "study.yaml", "evaluate[standard,5]", "--json"]);
    assert!(alone["metrics"].get("final_variance").is_none(), "one reward model has no variance: {alone}");

    let best = space.json(&["show", "study.yaml", "judged", "--json"]);
    assert!(best["metrics"]["mean_gold_sd"].is_number(), "{best}");

    let report = space.json(&["report", "study.yaml", "--json"]);
    let html = std::fs::read_to_string(report["report"].as_str().expect("a path")).expect("the report is there");
    assert!(
        html.contains("Figure 4")
            && html.contains("The mechanism")
            && html.contains("Best of n: judged")
            && !html.contains("NaN")
    );
    assert!(html.contains("the pipeline's own, 3, draws the rest."));
    let sections = ["Arms", "Figures", "Learning curves", "Samples by step", "Parameters by arm", "Stages", "Terms"];
    for section in sections {
        assert!(html.contains(&format!("<h2>{section}</h2>")), "no section {section}");
    }
    for figure in ["loss-of-proxy-by-step", "loss-of-base-by-step", "proxy-reward-of-the-rollouts-by-phase"] {
        assert!(html.contains(&format!("download=\"{figure}.csv\"")), "no data of {figure}");
    }
    // Everything was reused.
    assert!(html.contains("0 ran, 24 reused") && html.contains("* In the earlier run that made what was reused"));
    assert!(!html.contains("<h2>Timeline</h2>"));

    // With another annotator, only the stages downstream of it run again, and the first pairs are not needed.
    let swap = ["--profile", "stiennon", "--json"];
    let plan = space.json(&[&["plan", "study.yaml"], &swap[..]].concat());
    assert_eq!(names(&plan["not_needed"]), ["pairs", "contrast"]);
    let swapped = space.json(&[&["run", "study.yaml"], &swap[..]].concat());
    assert_eq!(names(&swapped["failed"]), [""; 0]);
    let (ran, reused) = (names(&swapped["ran"]), names(&swapped["reused"]));
    let upstream = ["base[m]", "base[s]", "filter", "pairs2", "posts", "sft[m]", "sft[s]", "tokenizer"];
    assert!(upstream.iter().all(|stage| reused.contains(stage)), "{swapped}");
    // Two gold models may give the same labels to so few pairs; the proxies are then the same, and the stages trained
    // against them are reused.
    assert!(["annotate", "gold", "labels", "evaluate[matched,5]"].iter().all(|stage| ran.contains(stage)), "{swapped}");

    // Compare judges of the same pairs: simulated people who err in one case of ten, the facts, and a model.
    let compared = space.json(&["run", "study.yaml", "--profile", "agreement", "--json"]);
    assert_eq!(names(&compared["failed"]), [""; 0]);
    assert!(names(&compared["reused"]).contains(&"gold"));
    let shown = space.json(&["show", "study.yaml", "agreement", "--profile", "agreement", "--json"]);
    let metric = |name: &str| shown["metrics"][name].as_f64().unwrap_or_else(|| panic!("no {name} in {shown}"));
    let rate = metric("agreement[people,facts]");
    assert!((0.84..0.96).contains(&rate) && metric("kappa[people,facts]") > 0.6, "{shown}");
    assert!(metric("agreement_low[people,facts]") < rate && rate < metric("agreement_high[people,facts]"));
    assert!(metric("matched[people,gold-too]") > 300.0 && (0.3..0.7).contains(&metric("first_chosen[people]")));
    let report = space.json(&["report", "study.yaml", "--profile", "agreement", "--json"]);
    let html = std::fs::read_to_string(report["report"].as_str().expect("a path")).expect("the report is there");
    assert!(html.contains("Agreement of annotators") && html.contains("people and facts agree on"));
    assert!(html.contains("Some on which they disagree") && !html.contains("NaN"));
    assert!(!html.contains("No dropout in RL"), "a reading of what this run does not hold");

    // The same key gives the same bytes at any thread count: repeat the run in another store with one thread.
    let one = space.json(&["run", "study.yaml", "--store", "other", "--until", "rl[adaptive,5]", "-j", "1", "--json"]);
    assert_eq!(names(&one["failed"]), [""; 0]);
    let best = space.json(&["run", "study.yaml", "--store", "other", "--until", "best", "-j", "1", "--json"]);
    assert_eq!(names(&best["failed"]), [""; 0]);
    for stage in ["base[m]", "sft[s]", "annotate", "gold", "ensemble", "best", "rl[adaptive,5]"] {
        let digest =
            |store: &str| space.json(&["show", "study.yaml", stage, "--store", store, "--json"])["digest"].clone();
        assert_eq!(digest("cache"), digest("other"), "{stage}");
    }

    // A flipped bit in a result is found, and the damaged artifact is made again.
    let folder = space.json(&["path", "study.yaml", "labels", "--json"]);
    let table = std::path::Path::new(folder["folder"].as_str().expect("a path")).join("preferences.parquet");
    let mut bytes = std::fs::read(&table).expect("the table is there");
    bytes[100] ^= 1;
    let writable = std::fs::remove_file(&table).and_then(|()| std::fs::write(&table, &bytes));
    writable.expect("the test may damage its own store");
    let repaired = space.temper(&["run", "study.yaml", "--force", "proxy[1]", "--json"]);
    assert!(repaired.status.success(), "{}", text(&repaired.stderr));
    let whole = space.temper(&["verify", "--store", "cache"]);
    assert!(whole.status.success(), "{}", text(&whole.stdout));
}

#[test]
fn training_that_diverges_commits_nothing_and_names_the_step() {
    let space = TestSpace::new();
    space.write("study.yaml", PIPELINE);
    let out = space.temper(&["run", "study.yaml", "--until", "base[s]", "--set", "stages.base.with.lr=1.0e38"]);
    let stderr = text(&out.stderr);
    assert_eq!(out.status.code(), Some(2), "{stderr}");
    assert!(stderr.contains("step") && stderr.contains("base[s]"), "{stderr}");
    let shown = space.temper(&["show", "study.yaml", "base[s]", "--set", "stages.base.with.lr=1.0e38"]);
    assert_eq!(shown.status.code(), Some(2));
}

/// The operations that GPUs run, on the CPU: every kind that computes with a model ends, and what does not depend on
/// sampled tokens, which a rounding error may change, is the same within rounding.
#[test]
fn a_study_in_stock_operations_agrees_with_the_fused_kernels() {
    let run = |device: &str| {
        let space = TestSpace::new();
        space.write("study.yaml", PIPELINE);
        let all = ["run", "study.yaml", "--until", "evaluate[adaptive,5]", "--device", device, "--json"];
        assert_eq!(names(&space.json(&all)["failed"]), [""; 0]);
        space
    };
    let (fused, stock) = (run("cpu"), run("portable"));
    let metric = |space: &TestSpace, stage: &str, name: &str| {
        let shown = space.json(&["show", "study.yaml", stage, "--json"]);
        shown["metrics"][name].as_f64().unwrap_or_else(|| panic!("no {name} in {shown}"))
    };
    for (stage, name) in [
        ("base[s]", "train_loss"),
        ("sft[s]", "held_out_response_nll"),
        ("sft[m]", "train_loss"),
        ("gold", "train_loss"),
        ("gold", "calibration_score_std"),
    ] {
        let (fused, stock) = (metric(&fused, stage, name), metric(&stock, stage, name));
        assert!((fused - stock).abs() <= 1e-4 * fused.abs().max(1.0), "{name} of {stage}: {fused} and {stock}");
    }
}
