//! Runs that are killed at random moments and started again.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::space::{Options, PIPELINE, Space, kill};

/// Kills `count` runs, one after the other: the orchestrator, one process below it, or everything at once. After each kill
/// nothing may be damaged or lost, and every run that ends gives the digests of an undisturbed one.
pub fn kills(options: &Options) {
    let mut random = StdRng::seed_from_u64(options.seed);
    let undisturbed = Space::new(PIPELINE);
    let clock = Instant::now();
    let expected = undisturbed.complete(&[]);
    let longest = clock.elapsed();
    let (mut killed, mut completed, mut by_victim) = (0, 0, [0_u64; 3]);
    let mut space = Space::new(PIPELINE);
    let mut recorded = BTreeSet::new();
    while killed < options.count {
        let mut run = space.start(&[]);
        std::thread::sleep(Duration::from_secs_f64(longest.as_secs_f64() * random.random_range(0.0..1.0_f64).powi(2)));
        let victim = random.random_range(0..3);
        let was_running = run.try_wait().expect("a child can be waited for").is_none();
        let attempts = if victim > 0 { space.attempts() } else { Vec::new() };
        match victim {
            0 => kill(run.id().cast_signed()),
            1 if !attempts.is_empty() => kill(attempts[random.random_range(0..attempts.len())]),
            _ => attempts.into_iter().chain([run.id().cast_signed()]).for_each(kill),
        }
        let output = run.wait_with_output().expect("the output can be read");
        space.wait_for_attempts();
        killed += u64::from(was_running);
        by_victim[victim] += u64::from(was_running);

        let told = format!("kill {killed} of --seed {}: {}", options.seed, crate::space::told(&output));
        // 3: an attempt was killed; 2: a program of a `command` stage was.
        assert!(
            matches!(output.status.code(), None | Some(0 | 3)) || (victim == 1 && output.status.code() == Some(2)),
            "{told}"
        );
        if !space.store_folder().exists() {
            continue;
        }
        let now = space.check();
        assert!(now.is_superset(&recorded), "a record is lost after {told}");
        recorded = now;
        if output.status.success() {
            assert_eq!(crate::space::digests(&output), expected, "{told}");
            completed += 1;
            space = Space::new(PIPELINE);
            recorded = BTreeSet::new();
        }
    }
    assert_eq!(space.complete(&[]), expected, "after the last kill");
    space.check();
    let [orchestrator, process, everything] = by_victim;
    println!(
        "  {killed} kills (orchestrator {orchestrator}, a process below it {process}, everything {everything}), {completed} runs completed in between"
    );
}
