//! Many processes at work on one store, some of which are killed.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::space::{Digests, Options, PIPELINE, Space, digests, kill, told};

/// How many versions of the pipeline the processes run.
const VARIANTS: u64 = 4;

fn set(variant: u64) -> String {
    format!("stages.start.with.run=[sh, -ec, 'seq 1 300 > $TEMPER_OUTPUT/x; echo $0 >> $TEMPER_OUTPUT/x', '{variant}']")
}

/// Each of the processes runs versions of the pipeline, forces stages, collects garbage and verifies, again and again, and is
/// killed now and then. Every run that ends gives the digests of its version.
pub fn races(options: &Options) {
    let expected: BTreeMap<u64, Digests> =
        (0..VARIANTS).map(|variant| (variant, Space::new(PIPELINE).complete(&["--set", &set(variant)]))).collect();
    let space = Space::new(PIPELINE);
    let end = Instant::now() + Duration::from_secs(options.seconds);
    let counts = Mutex::new(BTreeMap::<&str, u64>::new());
    let count = |what| *counts.lock().expect("no process panicked").entry(what).or_default() += 1;
    let work = |process: u64| {
        let mut random = StdRng::seed_from_u64(options.seed.wrapping_mul(1000) + process);
        while Instant::now() < end {
            let variant = random.random_range(0..VARIANTS);
            let set = set(variant);
            let mut arguments = vec!["--set", set.as_str()];
            match random.random_range(0..12) {
                0 => {
                    let output = space.temper(&["gc", "p.yaml", "--keep-runs", "3", "--delete"]);
                    assert!(output.status.success(), "gc: {}", told(&output));
                    count("collections");
                    continue;
                }
                1 => {
                    let output = space.temper(&["verify"]);
                    assert!(output.status.success(), "verify: {}", told(&output));
                    count("verifications");
                    continue;
                }
                2 => arguments.extend(["--force", "cut"]),
                3 => arguments.extend(["--force", "part"]),
                4 => arguments.extend(["--until", "cut"]),
                _ => {}
            }
            let run = space.start(&arguments);
            let kills = random.random_range(0..3) == 0;
            if kills {
                std::thread::sleep(Duration::from_millis(random.random_range(0..400)));
                kill(run.id().cast_signed());
            }
            let output = run.wait_with_output().expect("the output can be read");
            match output.status.code() {
                None if kills => count("killed runs"),
                Some(0) => {
                    let found = digests(&output);
                    let differs = found.iter().find(|(stage, digest)| expected[&variant].get(*stage) != Some(digest));
                    assert_eq!(differs, None, "{arguments:?}: {}", told(&output));
                    count("runs");
                }
                _ => panic!("{arguments:?}: {}", told(&output)),
            }
        }
    };
    std::thread::scope(|scope| (0..options.processes).for_each(|process| drop(scope.spawn(move || work(process)))));
    space.wait_for_attempts();
    for (variant, expected) in &expected {
        assert_eq!(space.complete(&["--set", &set(*variant)]), *expected);
    }
    let output = space.temper(&["verify"]);
    assert!(output.status.success(), "{}", told(&output));
    println!("  {} processes, {} s: {:?}", options.processes, options.seconds, counts.into_inner().expect("no panic"));
}
