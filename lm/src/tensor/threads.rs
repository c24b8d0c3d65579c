//! The number of compute threads of this process, which may change while it works. No result depends on it.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

/// The number of threads to use from the next pass on, where it may change.
static LIMIT: OnceLock<Arc<AtomicUsize>> = OnceLock::new();
/// The pool in use since the number last changed.
static RESIZED: Mutex<Option<Arc<rayon::ThreadPool>>> = Mutex::new(None);

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

/// As [`set_threads`] with the number in `limit`, which may change at any time: the next pass over a batch then uses as
/// many threads. Later calls of this function are ignored.
pub fn follow_threads(limit: Arc<AtomicUsize>) {
    set_threads(limit.load(Ordering::Relaxed));
    let _ = LIMIT.set(limit);
}

/// Runs `f` on a thread of the pool. Outside the pool, each parallel loop in `f` would be handed to the pool and its
/// result handed back, and threads would fall asleep in between: four times as many context switches while sampling.
///
/// A pool thread that waits may start other work of the pool, so `f` is never more than a pass over a batch.
pub(crate) fn in_pool<R: Send>(f: impl FnOnce() -> R + Send) -> R {
    match resized_pool() {
        Some(pool) => pool.install(f),
        None => rayon::scope(|_| f()),
    }
}

/// The pool of the size that is asked for now. `None` if that is the pool of the calling thread, rayon's own for a
/// thread of no pool, or if the system refuses more threads.
fn resized_pool() -> Option<Arc<rayon::ThreadPool>> {
    let threads = LIMIT.get()?.load(Ordering::Relaxed).max(1);
    if rayon::current_thread_index().is_some() || threads == rayon::current_num_threads() {
        return None;
    }
    let mut resized = RESIZED.lock().unwrap_or_else(PoisonError::into_inner);
    if resized.as_ref().is_none_or(|pool| pool.current_num_threads() != threads) {
        *resized = rayon::ThreadPoolBuilder::new().num_threads(threads).build().ok().map(Arc::new);
    }
    resized.clone()
}

/// Whether the calling thread is the only one of the process, as far as the operating system tells.
fn is_single_threaded() -> bool {
    std::fs::read_dir("/proc/self/task").is_ok_and(|tasks| tasks.count() == 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_pass_uses_the_number_of_threads_of_its_beginning() {
        let limit = Arc::new(AtomicUsize::new(2));
        follow_threads(limit.clone());
        for threads in [1, 3, 2, 4] {
            limit.store(threads, Ordering::Relaxed);
            let nested = || in_pool(rayon::current_num_threads);
            assert_eq!(in_pool(|| (rayon::current_num_threads(), nested())), (threads, threads));
        }
        // Other tests of this process go on with the number that they began with.
        limit.store(rayon::current_num_threads(), Ordering::Relaxed);
    }
}
