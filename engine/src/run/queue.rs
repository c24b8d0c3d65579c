//! Chooses the next stage to start, and divides what the stages share: threads, memory, GPUs, named pools.

use std::cmp::Reverse;
use std::collections::BTreeMap;

/// What an attempt takes of a shared resource other than threads.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Resource {
    /// MiB.
    Memory,
    Gpus,
    /// The one device of this machine that has no number.
    Device,
    Pool(String),
}

/// The amount of each resource; of one that is absent, there is no limit or no need.
pub(super) type Amounts = BTreeMap<Resource, u64>;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Threads {
    Fixed(usize),
    /// Any number, which may change while the attempt runs.
    Elastic,
}

/// What an instance needs while it runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Demand {
    pub threads: Threads,
    pub amounts: Amounts,
}

/// An instance to start, with its number of threads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Start {
    pub node: usize,
    pub threads: usize,
}

/// The shares of this machine, or the jobs of a batch system; the instances that wait for them and those that hold them.
#[derive(Debug)]
pub(super) struct SlotQueue {
    threads: usize,
    free_threads: usize,
    /// The limited resources.
    free: Amounts,
    /// By descending rank, then in the order of the graph.
    waiting: BTreeMap<(Reverse<u64>, usize), Demand>,
    running: BTreeMap<usize, Slots>,
    /// The smallest number of GPUs that could not be had because other processes hold some that are free here.
    refused_gpus: Option<u64>,
}

/// What a running attempt holds.
#[derive(Debug)]
struct Slots {
    threads: usize,
    amounts: Amounts,
    rank: u64,
    /// Whether the attempt can use another number of threads while it runs.
    elastic: bool,
}

impl SlotQueue {
    /// `limits`: the amounts of the resources that are limited.
    pub fn new(threads: usize, limits: Amounts) -> Self {
        let threads = threads.max(1);
        let (waiting, running) = (BTreeMap::new(), BTreeMap::new());
        Self { threads, free_threads: threads, free: limits, waiting, running, refused_gpus: None }
    }

    pub fn push(&mut self, node: usize, rank: u64, demand: Demand) {
        self.waiting.insert((Reverse(rank), node), demand);
    }

    /// Removes and returns every waiting instance.
    pub fn drain(&mut self) -> Vec<usize> {
        std::mem::take(&mut self.waiting).into_keys().map(|(_, node)| node).collect()
    }

    /// Removes the next instance to start and takes its shares. Instances go by rank; one that lacks something other than
    /// threads is passed over. An elastic one gets a fair share of the free threads among all instances that can start and
    /// the `others` that are about to wait, which is all threads for a lone instance.
    ///
    /// `claim_gpus` reserves this many GPUs of the host for an instance; if other processes hold too many of them, instances
    /// that need as many wait until [`Self::retry_gpus`].
    pub fn next(&mut self, others: usize, claim_gpus: &mut dyn FnMut(u64) -> bool) -> Option<Start> {
        loop {
            let shares = self.startable().len() + others;
            let (&(Reverse(rank), node), demand) =
                self.waiting.iter().find(|(_, demand)| self.has(&self.free, demand))?;
            let (threads, elastic) = match demand.threads {
                Threads::Fixed(n) => (n.min(self.threads), false),
                Threads::Elastic => ((self.free_threads / shares.max(1)).max(1), true),
            };
            if threads > self.free_threads {
                return None;
            }
            let gpus = demand.amounts.get(&Resource::Gpus).copied().unwrap_or(0);
            if gpus > 0 && !claim_gpus(gpus) {
                self.refused_gpus = Some(self.refused_gpus.map_or(gpus, |refused| refused.min(gpus)));
                continue;
            }
            let amounts = self.waiting.remove(&(Reverse(rank), node))?.amounts;
            self.free_threads -= threads;
            subtract(&mut self.free, &amounts);
            self.running.insert(node, Slots { threads, amounts, rank, elastic });
            return Some(Start { node, threads });
        }
    }

    /// The instances that wait only because other processes hold GPUs.
    pub fn waiting_for_gpus(&self) -> Vec<usize> {
        let is_refused = |demand: &Demand| demand.amounts.get(&Resource::Gpus).is_some_and(|n| self.refuses(*n));
        self.waiting.iter().filter(|(_, demand)| is_refused(demand)).map(|((_, node), _)| *node).collect()
    }

    /// Lets instances that need GPUs try to claim them again.
    pub fn retry_gpus(&mut self) {
        self.refused_gpus = None;
    }

    fn refuses(&self, gpus: u64) -> bool {
        self.refused_gpus.is_some_and(|refused| gpus >= refused)
    }

    /// Whether `free` has what an instance needs besides threads.
    fn has(&self, free: &Amounts, demand: &Demand) -> bool {
        demand.amounts.iter().filter(|(_, needed)| **needed > 0).all(|(resource, needed)| {
            let refused = *resource == Resource::Gpus && self.refuses(*needed);
            !refused && free.get(resource).is_none_or(|free| free >= needed)
        })
    }

    /// The threads of the waiting instances that could start now if there were enough threads, by rank.
    fn startable(&self) -> Vec<Threads> {
        let mut free = self.free.clone();
        let mut startable = Vec::new();
        for demand in self.waiting.values() {
            if self.has(&free, demand) {
                subtract(&mut free, &demand.amounts);
                startable.push(demand.threads);
            }
        }
        startable
    }

    /// Moves threads between running attempts that can use several; returns the attempts whose number changed, with the
    /// new one. While instances wait for threads, an attempt gives up what exceeds its fair share. When none does and none
    /// of the `others` is about to, the free threads go to those that have the fewest, the highest rank first.
    pub fn rebalance(&mut self, others: usize) -> BTreeMap<usize, usize> {
        let mut changed = BTreeMap::new();
        let startable = self.startable();
        let fixed: usize = self.running.values().filter(|slots| !slots.elastic).map(|slots| slots.threads).sum();
        let sharing = self.running.values().filter(|slots| slots.elastic).count() + startable.len();
        let fair = ((self.threads - fixed) / sharing.max(1)).max(1);
        let need = |threads: &Threads, share: usize| match threads {
            Threads::Fixed(n) => (*n).min(self.threads),
            Threads::Elastic => share,
        };
        let spare: usize = self.running.values().filter(|s| s.elastic).map(|s| s.threads.saturating_sub(fair)).sum();
        // If the first can start only after another attempt ends, threads that are kept for it would be idle until then.
        let waiting: usize = match startable.first() {
            Some(first) if need(first, 1) <= self.free_threads + spare => startable.iter().map(|t| need(t, fair)).sum(),
            _ => 0,
        };
        while self.free_threads < waiting
            && let Some((node, slots)) = self.elastic().max_by_key(|(_, slots)| (slots.threads, Reverse(slots.rank)))
            && slots.threads > fair
        {
            slots.threads -= 1;
            changed.insert(node, slots.threads);
            self.free_threads += 1;
        }
        while self.free_threads > 0
            && waiting + others == 0
            && let Some((node, slots)) = self.elastic().min_by_key(|(_, slots)| (slots.threads, Reverse(slots.rank)))
        {
            slots.threads += 1;
            changed.insert(node, slots.threads);
            self.free_threads -= 1;
        }
        changed
    }

    fn elastic(&mut self) -> impl Iterator<Item = (usize, &mut Slots)> {
        self.running.iter_mut().filter(|(_, slots)| slots.elastic).map(|(node, slots)| (*node, slots))
    }

    /// Frees the shares of an attempt that has ended.
    pub fn release(&mut self, node: usize) {
        let Some(slots) = self.running.remove(&node) else { return };
        self.free_threads += slots.threads;
        for (resource, amount) in slots.amounts {
            if let Some(free) = self.free.get_mut(&resource) {
                *free += amount;
            }
        }
    }
}

fn subtract(free: &mut Amounts, amounts: &Amounts) {
    for (resource, amount) in amounts {
        if let Some(free) = free.get_mut(resource) {
            *free = free.saturating_sub(*amount);
        }
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

    fn demand(threads: Threads, amounts: &[(Resource, u64)]) -> Demand {
        Demand { threads, amounts: amounts.iter().cloned().collect() }
    }

    fn queue_of(threads: usize) -> SlotQueue {
        SlotQueue::new(threads, Amounts::new())
    }

    fn elastic(queue: &mut SlotQueue, node: usize, rank: u64) {
        queue.push(node, rank, demand(Threads::Elastic, &[]));
    }

    fn serial(queue: &mut SlotQueue, node: usize, rank: u64) {
        queue.push(node, rank, demand(Threads::Fixed(1), &[]));
    }

    /// The next instance and its number of threads, where no other process holds GPUs.
    fn next(queue: &mut SlotQueue, others: usize) -> Option<(usize, usize)> {
        queue.next(others, &mut |_| true).map(|start| (start.node, start.threads))
    }

    #[test]
    fn the_longest_chain_goes_first() {
        // 0 has no edges; 1 -> 2 -> 3.
        let ranks = ranks(&[5, 3, 3, 3], |node| if node > 1 { vec![node - 1] } else { vec![] });
        assert_eq!(ranks, [5, 9, 6, 3]);
        let mut queue = queue_of(1);
        elastic(&mut queue, 0, ranks[0]);
        elastic(&mut queue, 1, ranks[1]);
        assert_eq!(next(&mut queue, 0), Some((1, 1)));
    }

    #[test]
    fn one_attempt_alone_takes_all_threads_and_several_share_them() {
        let mut queue = queue_of(8);
        elastic(&mut queue, 0, 1);
        assert_eq!(next(&mut queue, 0), Some((0, 8)));
        assert_eq!(next(&mut queue, 0), None);
        queue.release(0);
        (0..5).for_each(|node| elastic(&mut queue, node, 1));
        let threads: Vec<usize> = std::iter::from_fn(|| next(&mut queue, 0)).map(|(_, n)| n).collect();
        assert_eq!(threads, [1, 1, 2, 2, 2]);
    }

    #[test]
    fn a_serial_attempt_takes_one_thread_and_queued_attempts_count() {
        let mut queue = queue_of(4);
        serial(&mut queue, 0, 1);
        assert_eq!(next(&mut queue, 0), Some((0, 1)));
        elastic(&mut queue, 1, 1);
        assert_eq!(next(&mut queue, 2), Some((1, 1)));
    }

    /// Starts `n` elastic instances, instance 0 with the highest rank.
    fn started(threads: usize, n: usize) -> SlotQueue {
        let mut queue = queue_of(threads);
        (0..n).for_each(|node| elastic(&mut queue, node, (n - node) as u64));
        while next(&mut queue, 0).is_some() {}
        queue
    }

    #[test]
    fn threads_that_become_free_go_to_running_attempts_and_back_to_waiting_ones() {
        let mut queue = started(8, 3);
        assert_eq!(queue.rebalance(0), BTreeMap::new(), "2, 3 and 3 threads: none is free");
        queue.release(2);
        assert_eq!(queue.rebalance(1), BTreeMap::new(), "an instance is about to wait");
        assert_eq!(queue.rebalance(0), BTreeMap::from([(0, 4), (1, 4)]));
        elastic(&mut queue, 3, 9);
        elastic(&mut queue, 4, 9);
        assert_eq!(queue.rebalance(0), BTreeMap::from([(0, 2), (1, 2)]));
        assert_eq!([next(&mut queue, 0), next(&mut queue, 0)], [Some((3, 2)), Some((4, 2))]);
    }

    #[test]
    fn an_attempt_with_a_fixed_number_of_threads_waits_for_them_and_gets_no_more() {
        let mut queue = started(8, 2);
        queue.push(2, 9, demand(Threads::Fixed(6), &[]));
        serial(&mut queue, 3, 1);
        assert_eq!(queue.rebalance(0), BTreeMap::new(), "6 threads are not free before another attempt ends");
        assert_eq!(next(&mut queue, 0), None, "nothing overtakes it on threads");
        queue.release(1);
        assert_eq!(queue.rebalance(0), BTreeMap::from([(0, 2)]));
        assert_eq!([next(&mut queue, 0), next(&mut queue, 0)], [Some((2, 6)), None]);
        queue.release(0);
        assert_eq!(queue.rebalance(0), BTreeMap::new());
        let mut queue = queue_of(2);
        queue.push(0, 1, demand(Threads::Fixed(64), &[]));
        assert_eq!(next(&mut queue, 0), Some((0, 2)), "more than there are: all of them");
    }

    #[test]
    fn threads_of_attempts_with_a_fixed_number_are_not_shared_out() {
        let mut queue = queue_of(16);
        queue.push(0, 9, demand(Threads::Fixed(12), &[]));
        elastic(&mut queue, 1, 1);
        assert_eq!([next(&mut queue, 0), next(&mut queue, 0)], [Some((0, 12)), Some((1, 4))]);
        elastic(&mut queue, 2, 9);
        assert_eq!(queue.rebalance(0), BTreeMap::from([(1, 2)]));
        assert_eq!(next(&mut queue, 0), Some((2, 2)));
        serial(&mut queue, 3, 1);
        assert_eq!(queue.rebalance(0), BTreeMap::from([(1, 1)]), "the one of lower rank");
        assert_eq!(next(&mut queue, 0), Some((3, 1)));
    }

    #[test]
    fn a_refusal_of_many_gpus_does_not_hold_back_those_that_need_fewer() {
        let mut queue = SlotQueue::new(4, Amounts::from([(Resource::Gpus, 4)]));
        queue.push(0, 9, demand(Threads::Fixed(1), &[(Resource::Gpus, 4)]));
        queue.push(1, 1, demand(Threads::Fixed(1), &[(Resource::Gpus, 1)]));
        let three_free = &mut |n| n <= 3;
        assert_eq!(queue.next(0, three_free), Some(Start { node: 1, threads: 1 }));
        assert_eq!(queue.waiting_for_gpus(), [0]);
    }

    #[test]
    fn attempts_that_lack_memory_a_gpu_or_a_pool_are_overtaken_and_leave_their_threads_to_others() {
        for resource in [Resource::Memory, Resource::Gpus, Resource::Device, Resource::Pool("scratch".to_owned())] {
            let mut queue = SlotQueue::new(4, Amounts::from([(resource.clone(), 10)]));
            queue.push(0, 9, demand(Threads::Elastic, &[(resource.clone(), 7)]));
            queue.push(1, 8, demand(Threads::Elastic, &[(resource.clone(), 7)]));
            assert_eq!(next(&mut queue, 0), Some((0, 4)), "{resource:?}: the other cannot start and needs no threads");
            queue.push(2, 1, demand(Threads::Elastic, &[(resource.clone(), 3)]));
            assert_eq!(queue.rebalance(0), BTreeMap::from([(0, 2)]));
            assert_eq!(next(&mut queue, 0), Some((2, 2)), "{resource:?}");
            queue.release(2);
            assert_eq!(next(&mut queue, 0), None, "{resource:?}: 3 of 10 are free");
            assert_eq!(queue.rebalance(0), BTreeMap::from([(0, 4)]));
            queue.release(0);
            assert_eq!(next(&mut queue, 0), Some((1, 4)));
        }
    }

    #[test]
    fn gpus_that_other_processes_hold_are_tried_again_later() {
        let mut queue = SlotQueue::new(4, Amounts::from([(Resource::Gpus, 2)]));
        queue.push(0, 9, demand(Threads::Elastic, &[(Resource::Gpus, 1)]));
        elastic(&mut queue, 1, 1);
        let start = queue.next(0, &mut |_| false);
        assert_eq!(start, Some(Start { node: 1, threads: 4 }), "one that needs no GPU starts, with all threads");
        assert_eq!(queue.waiting_for_gpus(), [0]);
        assert_eq!(queue.next(0, &mut |_| panic!("tried too early")), None);
        queue.release(1);
        queue.retry_gpus();
        assert_eq!(next(&mut queue, 0), Some((0, 4)));
        assert_eq!(queue.waiting_for_gpus(), [0usize; 0]);
    }

    proptest::proptest! {
        /// Whatever starts and ends: nothing is lost or given twice, every attempt has what it needs, and no thread is idle
        /// while an attempt that could use it runs or could start.
        #[test]
        fn shares_are_conserved(
            threads in 1usize..9,
            memory in 1u64..20,
            steps in proptest::collection::vec((0usize..6, 0usize..4, 0u64..20), 1..60),
        ) {
            let limits = Amounts::from([(Resource::Memory, memory)]);
            let mut queue = SlotQueue::new(threads, limits);
            for (node, fixed, amount) in steps {
                if queue.running.contains_key(&node) {
                    queue.release(node);
                } else if !queue.waiting.keys().any(|(_, waiting)| *waiting == node) {
                    let threads = if fixed == 0 { Threads::Elastic } else { Threads::Fixed(fixed) };
                    let needs = demand(threads, &[(Resource::Memory, amount.min(memory))]);
                    queue.push(node, node as u64 % 3, needs);
                }
                queue.rebalance(0);
                while next(&mut queue, 0).is_some() {
                    queue.rebalance(0);
                }
                let held: usize = queue.running.values().map(|slots| slots.threads).sum();
                proptest::prop_assert_eq!(held + queue.free_threads, threads);
                let taken: u64 = queue.running.values().map(|slots| slots.amounts[&Resource::Memory]).sum();
                proptest::prop_assert_eq!(taken + queue.free[&Resource::Memory], memory);
                proptest::prop_assert!(queue.running.values().all(|slots| slots.threads >= 1));
                let first = queue.waiting.values().find(|demand| queue.has(&queue.free, demand));
                let could_start = first.is_some_and(|demand| match demand.threads {
                    Threads::Elastic => queue.free_threads > 0,
                    Threads::Fixed(n) => n.min(threads) <= queue.free_threads,
                });
                let could_grow = queue.free_threads > 0 && queue.running.values().any(|slots| slots.elastic);
                proptest::prop_assert!(!could_start && !could_grow, "{queue:?}");
                proptest::prop_assert!(!queue.running.is_empty() || queue.waiting.is_empty(), "{queue:?}");
            }
        }
    }
}
