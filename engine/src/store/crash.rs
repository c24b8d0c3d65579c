//! Points at which tests can kill the process; no-ops outside tests.

#[cfg(not(test))]
pub(crate) fn point() {}

/// Ends the process like `kill -9`, at the point with the number in `TEMPER_TEST_CRASH_AT`.
#[cfg(test)]
pub(crate) fn point() {
    use std::sync::atomic::{AtomicU32, Ordering};
    static POINTS_PASSED: AtomicU32 = AtomicU32::new(0);
    let at = std::env::var("TEMPER_TEST_CRASH_AT").ok().and_then(|at| at.parse::<u32>().ok());
    if let Some(at) = at
        && POINTS_PASSED.fetch_add(1, Ordering::SeqCst) == at
    {
        std::process::abort();
    }
}
