//! The number of compute threads of this process. No result depends on it.

/// Sets the number of threads of rayon (hence of gemm). Call it first in `main`: the pool is made at its first use and
/// then keeps its size.
///
/// candle's elementwise operations run on the calling thread alone: those left to candle are too small to be worth
/// waking a second pool, whose threads would take the cores from rayon's. candle reads its number of threads from the
/// environment only, which may be changed only while no other thread runs. If one does, candle keeps its default
/// (`CANDLE_NUM_THREADS`, else `RAYON_NUM_THREADS`, else the number of cores); results are the same.
pub fn set_threads(n: usize) {
    if is_single_threaded() {
        for (name, threads) in [("RAYON_NUM_THREADS", n.max(1)), ("CANDLE_NUM_THREADS", 1)] {
            // SAFETY: `is_single_threaded` has found no other thread, so none reads or writes the environment
            // meanwhile.
            unsafe { std::env::set_var(name, threads.to_string()) };
        }
    }
    // An error means that the pool exists already; its size then stays.
    let _ = rayon::ThreadPoolBuilder::new().num_threads(n.max(1)).build_global();
}

/// Runs `f` on a thread of the pool. Outside the pool, each parallel loop in `f` would be handed to the pool and its
/// result handed back, and threads would fall asleep in between: four times as many context switches while sampling.
///
/// A pool thread that waits may start other work of the pool, so `f` is never more than a pass over a batch.
pub(crate) fn in_pool<R: Send>(f: impl FnOnce() -> R + Send) -> R {
    rayon::scope(|_| f())
}

/// Whether the calling thread is the only one of the process, as far as the operating system tells.
fn is_single_threaded() -> bool {
    std::fs::read_dir("/proc/self/task").is_ok_and(|tasks| tasks.count() == 1)
}
