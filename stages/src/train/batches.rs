//! The order in which rows are grouped into batches.

use std::collections::VecDeque;
use std::ops::Range;

use rand_chacha::ChaCha12Rng;

use crate::random::shuffle;

/// Number of batches cut from one sorted pool by [`BatchOrder::bucketed`].
const POOL: usize = 32;

/// An endless, seeded sequence of batches. Every epoch contains every row once; its last batch may be short. Rows are
/// sorted by length within a batch, so that its micro-batches need little padding.
pub struct BatchOrder {
    lengths: Vec<u32>,
    batch: usize,
    /// Batches per pool.
    pool: usize,
    rng: ChaCha12Rng,
    lead: Option<Vec<u32>>,
    queue: VecDeque<Vec<u32>>,
}

impl BatchOrder {
    /// A plain shuffle: which rows share a batch does not depend on their lengths or on another seed's batches.
    /// `lengths`: tokens of each row; `batch`: rows per batch, at least 1.
    pub fn shuffled(lengths: Vec<u32>, batch: usize, rng: ChaCha12Rng) -> Self {
        Self { lengths, batch: batch.max(1), pool: 1, rng, lead: None, queue: VecDeque::new() }
    }

    /// Groups rows of similar length into a batch, which saves padding: shuffles the rows, sorts them by length within
    /// pools of 32 batches, cuts the pools into batches and shuffles the batches.
    pub fn bucketed(lengths: Vec<u32>, batch: usize, rng: ChaCha12Rng) -> Self {
        Self { pool: POOL, ..Self::shuffled(lengths, batch, rng) }
    }

    /// Puts `rows` first in the first epoch, shuffled among themselves.
    #[must_use]
    pub fn lead(mut self, rows: Vec<u32>) -> Self {
        self.lead = Some(rows);
        self
    }

    /// Steps per epoch (the first epoch may take one more if some rows lead).
    pub fn batches_per_epoch(&self) -> u64 {
        self.lengths.len().div_ceil(self.batch) as u64
    }

    /// The row numbers of the next batch. Empty only if there are no rows at all.
    pub fn next_batch(&mut self) -> Vec<usize> {
        if self.queue.is_empty() {
            let all = 0..self.lengths.len() as u32;
            if let Some(lead) = self.lead.take() {
                let mut leads = vec![false; self.lengths.len()];
                lead.iter().for_each(|&row| leads[row as usize] = true);
                self.enqueue(lead);
                self.enqueue(all.filter(|&row| !leads[row as usize]).collect());
            } else {
                self.enqueue(all.collect());
            }
        }
        self.queue.pop_front().unwrap_or_default().into_iter().map(|row| row as usize).collect()
    }

    /// Skips the next `batches` batches. The number of batches drawn is the whole state of an order.
    pub fn skip(&mut self, batches: u64) {
        (0..batches).for_each(|_| drop(self.next_batch()));
    }

    fn enqueue(&mut self, mut rows: Vec<u32>) {
        shuffle(&mut rows, &mut self.rng);
        let mut batches: Vec<Vec<u32>> = Vec::new();
        for pool in rows.chunks_mut(self.batch * self.pool) {
            // A stable sort: rows of equal length keep their shuffled order.
            pool.sort_by_key(|&row| self.lengths[row as usize]);
            batches.extend(pool.chunks(self.batch).map(<[u32]>::to_vec));
        }
        shuffle(&mut batches, &mut self.rng);
        self.queue.extend(batches);
    }
}

/// Every row once, sorted by (length, row number), in batches of at most `batch` rows. For scoring, where the order is
/// free.
pub fn by_length(lengths: &[usize], batch: usize) -> Vec<Vec<usize>> {
    let mut rows: Vec<usize> = (0..lengths.len()).collect();
    rows.sort_by_key(|&row| (lengths[row], row));
    rows.chunks(batch.max(1)).map(<[usize]>::to_vec).collect()
}

/// Splits a batch with these row lengths into ranges of at most `tokens` tokens including padding, or of a single row.
pub fn micro_batches(lengths: &[usize], tokens: usize) -> Vec<Range<usize>> {
    let mut parts = Vec::new();
    let (mut start, mut longest) = (0, 0);
    for (row, &length) in lengths.iter().enumerate() {
        let with = longest.max(length);
        if row > start && with * (row + 1 - start) > tokens {
            parts.push(start..row);
            (start, longest) = (row, length);
        } else {
            longest = with;
        }
    }
    if start < lengths.len() {
        parts.push(start..lengths.len());
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::fixed_generator;

    fn order(n: u32, batch: usize, seed: u64) -> BatchOrder {
        BatchOrder::bucketed((0..n).map(|i| i * 7 % 13).collect(), batch, fixed_generator(seed, "test"))
    }

    #[test]
    fn an_epoch_holds_every_row_once_and_the_next_is_in_another_order() {
        let mut order = order(103, 10, 1);
        let mut epoch = || (0..11).flat_map(|_| order.next_batch()).collect::<Vec<_>>();
        let (first, second) = (epoch(), epoch());
        assert_ne!(first, second);
        for mut rows in [first, second] {
            rows.sort_unstable();
            assert_eq!(rows, (0..103).collect::<Vec<_>>());
        }
    }

    #[test]
    fn seeds_of_a_plain_shuffle_share_few_batch_mates() {
        // 285 rows in batches of 16, with lengths that vary like those of the small study's pairs.
        let lengths: Vec<u32> = (0..285).map(|i| 115 + i * 7919 % 31).collect();
        let mates = |order: &mut BatchOrder| -> std::collections::BTreeSet<(usize, usize)> {
            let batches = (0..18).map(|_| order.next_batch()).collect::<Vec<_>>();
            let pairs = |batch: &Vec<usize>| {
                let batch = batch.clone();
                (0..batch.len())
                    .flat_map(move |i| {
                        let batch = batch.clone();
                        (0..i).map(move |j| (batch[i].min(batch[j]), batch[i].max(batch[j])))
                    })
                    .collect::<Vec<_>>()
            };
            batches.iter().flat_map(pairs).collect()
        };
        let recurring = |make: fn(Vec<u32>, usize, ChaCha12Rng) -> BatchOrder| {
            let of = |seed| mates(&mut make(lengths.clone(), 16, fixed_generator(seed, "test")));
            let (a, b) = (of(1), of(2));
            a.intersection(&b).count() as f64 / a.len() as f64
        };
        // A row shares its batch with 15 of the 284 others.
        let plain = recurring(BatchOrder::shuffled);
        assert!(plain < 0.1, "{plain}");
        let bucketed = recurring(BatchOrder::bucketed);
        assert!(bucketed > 0.3, "{bucketed}");
    }

    #[test]
    fn leading_rows_come_first_and_only_in_the_first_epoch() {
        let mut order = order(20, 4, 1).lead((0..8).collect());
        let first: Vec<usize> = (0..2).flat_map(|_| order.next_batch()).collect();
        assert!(first.iter().all(|&row| row < 8), "{first:?}");
        let rest: Vec<usize> = (0..3).flat_map(|_| order.next_batch()).collect();
        assert!(rest.iter().all(|&row| row >= 8), "{rest:?}");
        let second: Vec<usize> = (0..2).flat_map(|_| order.next_batch()).collect();
        assert!(second.iter().any(|&row| row >= 8), "{second:?}");
    }

    #[test]
    fn skipping_batches_is_taking_them() {
        for batches in [0, 1, 2, 11, 12, 40] {
            let of = || order(103, 10, 1).lead((0..8).collect());
            let (mut taken, mut skipped) = (of(), of());
            (0..batches).for_each(|_| drop(taken.next_batch()));
            skipped.skip(batches);
            assert_eq!(taken.next_batch(), skipped.next_batch());
        }
    }

    #[test]
    fn no_rows_give_no_batch() {
        assert!(order(0, 4, 1).next_batch().is_empty());
    }

    #[test]
    fn rows_of_a_batch_are_of_similar_length() {
        let mut order = BatchOrder::bucketed((0..320).map(|i| i % 100).collect(), 10, fixed_generator(1, "test"));
        for _ in 0..32 {
            let rows = order.next_batch();
            let lengths: Vec<usize> = rows.iter().map(|r| r % 100).collect();
            let spread = lengths.iter().max().unwrap_or(&0) - lengths.iter().min().unwrap_or(&0);
            assert!(spread <= 10, "{lengths:?}");
        }
    }

    #[test]
    fn micro_batches_cover_the_batch_within_the_budget() {
        assert_eq!(micro_batches(&[3, 3, 3, 5, 5, 20], 10), [0..3, 3..5, 5..6]);
        assert!(micro_batches(&[], 10).is_empty());
        assert_eq!(micro_batches(&[2; 8], 1000), vec![0..8; 1]);
    }

    #[test]
    fn scoring_batches_hold_every_row_once() {
        let lengths = [5, 1, 4, 1, 3];
        assert_eq!(by_length(&lengths, 2), [vec![1, 3], vec![4, 2], vec![0]]);
    }
}
