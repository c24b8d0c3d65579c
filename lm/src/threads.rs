//! How many threads this process computes with; knows no model. No result depends on the number.

/// Sets the number of threads of rayon (hence of gemm) and of candle's elementwise pool. To be called first thing in
/// `main`: both pools are made at their first use and then keep their size.
///
/// candle takes its number from the environment alone, which may only be changed while no other thread runs. If one
/// does, candle keeps what it would have had (`RAYON_NUM_THREADS`, else the number of cores); results are the same.
pub fn set_threads(n: usize) {
    let n = n.max(1);
    let wanted = n.to_string();
    let names = ["RAYON_NUM_THREADS", "CANDLE_NUM_THREADS"];
    let set = names.iter().all(|name| std::env::var_os(name).is_some_and(|value| value == wanted.as_str()));
    if !set && alone() {
        for name in names {
            // SAFETY: `alone` has found no other thread, so none reads or writes the environment meanwhile.
            unsafe { std::env::set_var(name, &wanted) };
        }
    }
    // An error means that the pool exists already; its size then stays.
    let _ = rayon::ThreadPoolBuilder::new().num_threads(n).build_global();
}

/// Whether the calling thread is the only one of the process, as far as the operating system tells.
fn alone() -> bool {
    std::fs::read_dir("/proc/self/task").is_ok_and(|tasks| tasks.count() == 1)
}
