//! Chooses the next stage to start and its number of threads.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};

/// CPU threads as slots, or jobs of a batch system; the instances that wait for them and those that hold them.
#[derive(Debug)]
pub(super) struct SlotQueue {
    total: usize,
    free: usize,
    /// Maximum number of instances that run at once.
    at_once: usize,
    /// By descending rank, then in the order of the graph.
    waiting: BTreeSet<(Reverse<u64>, usize)>,
    running: BTreeMap<usize, Slots>,
}

/// The threads of a running attempt.
#[derive(Debug)]
struct Slots {
    threads: usize,
    rank: u64,
    /// Whether the attempt can use another number of threads while it runs.
    elastic: bool,
}

impl SlotQueue {
    pub fn new(jobs: usize) -> Self {
        let total = jobs.max(1);
        Self { total, free: total, at_once: total, waiting: BTreeSet::new(), running: BTreeMap::new() }
    }

    /// With at most `n` instances at once.
    pub fn at_most(self, n: usize) -> Self {
        Self { at_once: n.clamp(1, self.total), ..self }
    }

    /// Number of waiting instances that may start before another one ends, and of `others`.
    fn next_to_start(&self, others: usize) -> usize {
        (self.waiting.len() + others).min(self.at_once - self.running.len().min(self.at_once))
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
        let shares = self.next_to_start(others);
        if self.free == 0 || shares == 0 {
            return None;
        }
        let (Reverse(rank), node) = self.waiting.pop_first()?;
        let elastic = parallel(node);
        let threads = if elastic { (self.free / shares).max(1) } else { 1 };
        self.free -= threads;
        self.running.insert(node, Slots { threads, rank, elastic });
        Some((node, threads))
    }

    /// Moves threads between running attempts that can use several; returns the attempts whose number changed, with the
    /// new one. While instances wait, an attempt gives up what exceeds its fair share. When none waits and none of the
    /// `others` is about to, the free threads go to those that have the fewest, the highest rank first.
    pub fn rebalance(&mut self, others: usize) -> BTreeMap<usize, usize> {
        let mut changed = BTreeMap::new();
        let starting = self.next_to_start(0);
        let fair = (self.total / (self.running.len() + starting).max(1)).max(1);
        while self.free < starting * fair
            && let Some((node, slots)) = self.elastic().max_by_key(|(_, slots)| (slots.threads, Reverse(slots.rank)))
            && slots.threads > fair
        {
            slots.threads -= 1;
            changed.insert(node, slots.threads);
            self.free += 1;
        }
        while self.free > 0
            && self.next_to_start(others) == 0
            && let Some((node, slots)) = self.elastic().min_by_key(|(_, slots)| (slots.threads, Reverse(slots.rank)))
        {
            slots.threads += 1;
            changed.insert(node, slots.threads);
            self.free -= 1;
        }
        changed
    }

    fn elastic(&mut self) -> impl Iterator<Item = (usize, &mut Slots)> {
        self.running.iter_mut().filter(|(_, slots)| slots.elastic).map(|(node, slots)| (*node, slots))
    }

    /// Frees the threads of an attempt that has ended.
    pub fn release(&mut self, node: usize) {
        self.free += self.running.remove(&node).map_or(0, |slots| slots.threads);
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
        queue.release(0);
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

    /// Starts `n` instances that can use several threads, instance 0 with the highest rank.
    fn started(jobs: usize, n: usize) -> SlotQueue {
        let mut queue = SlotQueue::new(jobs);
        (0..n).for_each(|node| queue.push(node, (n - node) as u64));
        while queue.next(0, |_| true).is_some() {}
        queue
    }

    #[test]
    fn threads_that_become_free_go_to_running_attempts_and_back_to_waiting_ones() {
        let mut queue = started(8, 3);
        assert_eq!(queue.rebalance(0), BTreeMap::new(), "2, 3 and 3 threads: none is free");
        queue.release(2);
        assert_eq!(queue.rebalance(1), BTreeMap::new(), "an instance is about to wait");
        assert_eq!(queue.rebalance(0), BTreeMap::from([(0, 4), (1, 4)]));
        queue.push(3, 9);
        queue.push(4, 9);
        assert_eq!(queue.rebalance(0), BTreeMap::from([(0, 2), (1, 2)]));
        assert_eq!([queue.next(0, |_| true), queue.next(0, |_| true)], [Some((3, 2)), Some((4, 2))]);
    }

    #[test]
    fn of_those_that_share_a_device_one_runs_with_all_threads() {
        let mut queue = SlotQueue::new(4).at_most(1);
        (0..2).for_each(|node| queue.push(node, 1));
        assert_eq!((queue.next(3, |_| true), queue.next(0, |_| true)), (Some((0, 4)), None));
        assert_eq!(queue.rebalance(0), BTreeMap::new(), "the other cannot start");
        queue.release(0);
        assert_eq!(queue.next(0, |_| true), Some((1, 4)));
    }

    #[test]
    fn an_attempt_that_cannot_use_more_threads_keeps_its_one() {
        let mut queue = SlotQueue::new(4);
        queue.push(0, 1);
        assert_eq!(queue.next(0, |_| false), Some((0, 1)));
        assert_eq!(queue.rebalance(0), BTreeMap::new());
        queue.push(1, 1);
        assert_eq!(queue.next(0, |_| true), Some((1, 3)));
    }

    proptest::proptest! {
        /// Whatever starts and ends: no thread is lost or given twice, every attempt has one, and none is idle while an
        /// attempt that could use it runs alone.
        #[test]
        fn slots_are_conserved(
            jobs in 1usize..9,
            steps in proptest::collection::vec((0usize..6, proptest::bool::ANY), 1..60),
        ) {
            let mut queue = SlotQueue::new(jobs);
            for (node, parallel) in steps {
                if queue.running.contains_key(&node) {
                    queue.release(node);
                } else {
                    queue.push(node, node as u64 % 3);
                }
                queue.rebalance(0);
                while queue.next(0, |_| parallel).is_some() {}
                queue.rebalance(0);
                let held: usize = queue.running.values().map(|slots| slots.threads).sum();
                proptest::prop_assert_eq!(held + queue.free, jobs);
                proptest::prop_assert!(queue.running.values().all(|slots| slots.threads >= 1));
                let idle = queue.free > 0 && (!queue.waiting.is_empty() || queue.running.values().any(|s| s.elastic));
                proptest::prop_assert!(!idle, "{queue:?}");
            }
        }
    }
}
