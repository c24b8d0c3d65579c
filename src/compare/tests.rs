use super::*;

fn instance(name: &str, settings: &[(&str, &str)], metrics: &[(&str, f64)]) -> ComparedInstance {
    let labels = name.split_once('[').map_or("", |(_, rest)| rest.trim_end_matches(']'));
    let labels: Vec<&str> = labels.split(',').filter(|label| !label.is_empty()).collect();
    let matrix = ["arm", SEED].iter().zip(labels).map(|(d, l)| ((*d).to_owned(), l.to_owned())).collect();
    ComparedInstance {
        name: name.to_owned(),
        matrix,
        settings: settings.iter().map(|(n, v)| ((*n).to_owned(), (*v).to_owned())).collect(),
        recorded: Vec::new(),
        digest: None,
        metrics: metrics.iter().map(|(n, v)| ((*n).to_owned(), *v)).collect(),
        folder: None,
    }
}

fn side(name: &str, instances: Vec<ComparedInstance>, target: &str) -> Side {
    let targets = instances.iter().filter(|i| i.stage() == target).map(|i| i.name.clone()).collect();
    Side { name: name.to_owned(), instances, targets }
}

fn run(name: &str, lr: &str, quality: f64) -> Side {
    let rl = |arm: &str, seed: &str| {
        instance(&format!("rl[{arm},{seed}]"), &[("uses", "rl.ppo"), ("with.lr", lr), ("seed", seed)], &[("kl", 2.0)])
    };
    let evaluate = |seed: &str, quality: f64| {
        instance(&format!("evaluate[mean,{seed}]"), &[("uses", "evaluate")], &[("quality", quality), ("n", 5.0)])
    };
    let instances = vec![
        instance("sft", &[("uses", "sft")], &[("loss", 1.0)]),
        rl("mean", "1"),
        rl("mean", "2"),
        evaluate("1", quality),
        evaluate("2", quality + 0.2),
    ];
    side(name, instances, "evaluate")
}

#[test]
fn one_changed_value_is_one_row_and_seeds_are_averaged() {
    let found = differences(&[run("a", "1e-4", 0.5), run("b", "3e-4", 0.6)], true).unwrap();
    let values = ["1e-4", "3e-4"].map(|lr| Some(lr.to_owned())).to_vec();
    assert_eq!(found.settings, [SettingRow { stage: "rl".into(), name: "with.lr".into(), values }]);
    let [row] = &found.metrics[..] else { panic!("{found:?}") };
    assert_eq!((row.stage.as_str(), row.name.as_str()), ("evaluate[mean]", "quality"));
    assert!((row.values[0].unwrap() - 0.6).abs() < 1e-12 && (row.values[1].unwrap() - 0.7).abs() < 1e-12);
    let each = differences(&[run("a", "1e-4", 0.5), run("b", "3e-4", 0.6)], false).unwrap();
    let stages: Vec<&str> = each.metrics.iter().map(|row| row.stage.as_str()).collect();
    assert_eq!(stages, ["evaluate[mean,2]", "evaluate[mean,1]"]);
}

#[test]
fn a_change_to_some_instances_and_instances_of_one_side_are_told() {
    let (a, mut b) = (run("a", "1", 0.5), run("b", "1", 0.5));
    b.instances[1].settings[1].1 = "2".into();
    b.instances.pop();
    b.instances.push(instance("extra", &[("uses", "x")], &[]));
    let found = differences(&[a, b], true).unwrap();
    let rows: Vec<String> =
        found.settings.iter().map(|row| format!("{}.{} {:?}", row.stage, row.name, row.values)).collect();
    assert_eq!(
        rows,
        [
            "rl[mean,1].with.lr [Some(\"1\"), Some(\"2\")]",
            "evaluate.instances [Some(\"2\"), Some(\"1\")]",
            "extra.instances [None, Some(\"1\")]",
        ]
    );
}

#[test]
fn two_instances_are_compared_whatever_their_names() {
    let one = |objective: &str, reward: f64| {
        let name = format!("rl[{objective},1]");
        side(&name, vec![instance(&name, &[("with.objective", objective)], &[("reward", reward)])], "rl")
    };
    let found = differences(&[one("mean", 1.0), one("adaptive", 2.0)], true).unwrap();
    assert_eq!((found.settings[0].stage.as_str(), found.settings[0].name.as_str()), ("rl", "with.objective"));
    assert_eq!(found.metrics[0].values, [Some(1.0), Some(2.0)]);
}

#[test]
fn curves_are_compared_at_the_steps_that_all_have() {
    use stages::types::LearningPoint;
    let folder = |losses: &[(i64, f64)]| {
        let dir = tempfile::tempdir().unwrap();
        let points =
            losses.iter().map(|(step, loss)| LearningPoint { step: *step, loss: *loss, lr: 0.1, grad_norm: 1.0 });
        LearningPoint::write(dir.path(), points.collect()).unwrap();
        dir
    };
    let (a, b) = (folder(&[(1, 3.0), (2, 2.0), (3, 1.0)]), folder(&[(1, 3.0), (3, 0.5), (4, 0.1)]));
    let at = |name: &str, folder: &tempfile::TempDir| {
        let found = ComparedInstance { folder: Some(folder.path().to_owned()), ..instance("sft", &[], &[]) };
        side(name, vec![found], "sft")
    };
    let found = differences(&[at("a", &a), at("b", &b)], true).unwrap();
    let [row] = &found.curves[..] else { panic!("{found:?}") };
    assert_eq!(
        (row.name.as_str(), &row.curves[..]),
        ("learning.loss", &[vec![(1, 3.0), (3, 1.0)], vec![(1, 3.0), (3, 0.5)]][..])
    );
    let sides = [at("a", &a), at("b", &b)];
    let text = print(&sides, &found, Format::Table, false);
    assert!(text.starts_with("A = a\nB = b\n\nno parameter differs\n\nno common metric differs\n"), "{text}");
    assert!(text.contains("learning.loss  A  █▂"), "{text}");
    let csv = print(&sides, &found, Format::Csv, false);
    assert!(csv.contains("curve,sft,learning.loss,3,b,0.5\n"), "{csv}");
    let json: Value = serde_json::from_str(&print(&sides, &found, Format::Json, false)).unwrap();
    assert_eq!(json["curves"][0]["curves"][1][1][1], 0.5);
}
