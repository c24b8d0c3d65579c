//! Points at which a test may kill the process. Nothing outside tests.

#[cfg(not(test))]
pub(crate) fn point() {}

/// Ends the process as `kill -9` would, at the point whose number `TEMPER_TEST_CRASH_AT` gives.
#[cfg(test)]
pub(crate) fn point() {
    use std::sync::atomic::{AtomicU32, Ordering};
    static PASSED: AtomicU32 = AtomicU32::new(0);
    let at = std::env::var("TEMPER_TEST_CRASH_AT").ok().and_then(|at| at.parse::<u32>().ok());
    if let Some(at) = at
        && PASSED.fetch_add(1, Ordering::SeqCst) == at
    {
        std::process::abort();
    }
}
