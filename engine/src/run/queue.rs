//! Chooses the next stage to start and its number of threads.

use std::cmp::Reverse;
use std::collections::BTreeSet;

/// CPU threads as slots, or jobs of a batch system; and the instances that wait for them.
#[derive(Debug)]
pub(super) struct SlotQueue {
    free: usize,
    /// By descending rank, then in the order of the graph.
    waiting: BTreeSet<(Reverse<u64>, usize)>,
}

impl SlotQueue {
    pub fn new(jobs: usize) -> Self {
        Self { free: jobs.max(1), waiting: BTreeSet::new() }
    }

    pub fn push(&mut self, node: usize, rank: u64) {
        self.waiting.insert((Reverse(rank), node));
    }

    /// Removes and returns every waiting instance.
    pub fn drain(&mut self) -> Vec<usize> {
        std::mem::take(&mut self.waiting).into_iter().map(|(_, node)| node).collect()
    }

    /// Removes the next instance to start and takes its threads. An instance that cannot use several threads gets one;
    /// others get a fair share of the free threads among all waiting instances and the `others` that are about to wait,
    /// which is all threads for a lone instance.
    pub fn next(&mut self, others: usize, parallel: impl Fn(usize) -> bool) -> Option<(usize, usize)> {
        if self.free == 0 {
            return None;
        }
        let shares = self.waiting.len() + others;
        let (_, node) = self.waiting.pop_first()?;
        let threads = if parallel(node) { (self.free / shares).max(1) } else { 1 };
        self.free -= threads;
        Some((node, threads))
    }

    pub fn release(&mut self, threads: usize) {
        self.free += threads;
    }
}

/// The length in milliseconds of the longest path from each instance to the end of the graph. Higher ranks start first,
/// so that the longest chain never waits for a shorter one. `inputs_of` gives each instance's inputs, which have lower
/// indices.
pub(super) fn ranks(costs: &[u64], inputs_of: impl Fn(usize) -> Vec<usize>) -> Vec<u64> {
    let mut ranks = costs.to_vec();
    for node in (0..costs.len()).rev() {
        for input in inputs_of(node) {
            ranks[input] = ranks[input].max(costs[input].saturating_add(ranks[node]));
        }
    }
    ranks
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_chain_goes_first() {
        // 0 has no edges; 1 -> 2 -> 3.
        let ranks = ranks(&[5, 3, 3, 3], |node| if node > 1 { vec![node - 1] } else { vec![] });
        assert_eq!(ranks, [5, 9, 6, 3]);
        let mut queue = SlotQueue::new(1);
        queue.push(0, ranks[0]);
        queue.push(1, ranks[1]);
        assert_eq!(queue.next(0, |_| true), Some((1, 1)));
    }

    #[test]
    fn one_attempt_alone_takes_all_threads_and_several_share_them() {
        let mut queue = SlotQueue::new(8);
        queue.push(0, 1);
        assert_eq!(queue.next(0, |_| true), Some((0, 8)));
        assert_eq!(queue.next(0, |_| true), None);
        queue.release(8);
        (0..5).for_each(|node| queue.push(node, 1));
        let threads: Vec<usize> = std::iter::from_fn(|| queue.next(0, |_| true)).map(|(_, n)| n).collect();
        assert_eq!(threads, [1, 1, 2, 2, 2]);
    }

    #[test]
    fn a_serial_attempt_takes_one_thread_and_queued_attempts_count() {
        let mut queue = SlotQueue::new(4);
        queue.push(0, 1);
        assert_eq!(queue.next(0, |_| false), Some((0, 1)));
        queue.push(1, 1);
        assert_eq!(queue.next(2, |_| true), Some((1, 1)));
    }
}
