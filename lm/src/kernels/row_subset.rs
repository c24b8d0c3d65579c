//! The subset of a batch's rows whose output is computed: a block runs the steps after attention on these rows only.

use std::borrow::Cow;

use candle_core::{Result, bail};

/// A subset of the `rows` rows of a batch, or all of them.
pub struct Wanted {
    rows: usize,
    /// Ascending.
    some: Option<Vec<u32>>,
}

impl Wanted {
    /// Errors: rows that do not ascend, or that do not exist.
    pub fn new(rows: usize, some: Option<&[u32]>) -> Result<Self> {
        if let Some(&[a, b]) = some.and_then(|some| some.array_windows().find(|[a, b]| a >= b)) {
            bail!("a block is asked for rows that ascend; got row {b} after row {a}");
        }
        if let Some(&last) = some.and_then(<[u32]>::last)
            && last as usize >= rows
        {
            bail!("a block is asked for row {last} of {rows}");
        }
        Ok(Self { rows, some: some.map(<[u32]>::to_vec) })
    }

    /// The number of wanted rows.
    pub fn len(&self) -> usize {
        self.some.as_ref().map_or(self.rows, Vec::len)
    }

    /// Whether it is a subset rather than all rows.
    pub fn is_partial(&self) -> bool {
        self.some.is_some()
    }

    /// The wanted rows of each chunk of `chunk` rows.
    pub fn parts(&self, chunk: usize) -> Vec<Part<'_>> {
        let starts = (0..self.rows).step_by(chunk);
        let part = |first: usize| {
            let end = (first + chunk).min(self.rows);
            let Some(all) = &self.some else { return Part { first, rows: end - first, before: first, some: None } };
            let [from, to] = [first, end].map(|row| all.partition_point(|&wanted| (wanted as usize) < row));
            Part { first, rows: end - first, before: from, some: Some(&all[from..to]) }
        };
        starts.map(part).collect()
    }
}

/// The wanted rows of one chunk.
#[derive(Clone, Copy)]
pub struct Part<'a> {
    /// Index in the batch of the chunk's first row.
    pub first: usize,
    /// Rows of the chunk, wanted or not.
    pub rows: usize,
    /// Wanted rows before this chunk.
    pub before: usize,
    /// Indices in the batch; None: all.
    some: Option<&'a [u32]>,
}

impl Part<'_> {
    /// The number of wanted rows.
    pub fn len(self) -> usize {
        self.some.map_or(self.rows, <[u32]>::len)
    }

    /// The index within the sequence of its first wanted row; `time` if there is none.
    pub fn first_of(self, sequence: usize, time: usize) -> usize {
        let Some(some) = self.some else { return 0 };
        let start = self.first + sequence * time;
        let wanted = some.get(some.partition_point(|&row| (row as usize) < start));
        wanted.map_or(time, |&row| (row as usize - start).min(time))
    }

    /// The wanted rows of `x [rows, width]`.
    pub fn pick<'x>(self, x: &'x [f32], width: usize) -> Cow<'x, [f32]> {
        if self.some.is_none() {
            return Cow::Borrowed(x);
        }
        let mut picked = vec![0.0; self.len() * width];
        self.pick_into(&mut picked, x, width);
        Cow::Owned(picked)
    }

    /// [`Part::pick`] into `to [len, width]`.
    pub fn pick_into(self, to: &mut [f32], x: &[f32], width: usize) {
        let Some(some) = self.some else { return to.copy_from_slice(x) };
        for (to, &row) in to.chunks_exact_mut(width).zip(some) {
            to.copy_from_slice(&x[(row as usize - self.first) * width..][..width]);
        }
    }

    /// Moves the first `len` rows of `x [rows, width]` to the indices of the wanted rows; the others become zero.
    pub fn spread(self, x: &mut [f32], width: usize) {
        let Some(some) = self.some else { return };
        // From the last row on: no row moves towards the front.
        let mut end = x.len();
        for (i, &row) in some.iter().enumerate().rev() {
            let place = (row as usize - self.first) * width;
            x.copy_within(i * width..(i + 1) * width, place);
            x[place + width..end].fill(0.0);
            end = place;
        }
        x[..end].fill(0.0);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn rows_are_picked_and_put_back(wanted in prop::collection::vec(any::<bool>(), 1..60), chunk in 1..70usize, width in 1..4usize) {
            let rows = wanted.len();
            let some: Vec<u32> = (0..rows as u32).filter(|&i| wanted[i as usize]).collect();
            let x: Vec<f32> = (1..=rows * width).map(|i| i as f32).collect();
            let all = Wanted::new(rows, Some(&some)).unwrap();
            prop_assert_eq!(all.len(), some.len());
            let (mut count, mut end) = (0, 0);
            for part in all.parts(chunk) {
                prop_assert_eq!((part.first, part.before), (end, count));
                let of_part = &x[part.first * width..][..part.rows * width];
                let picked = part.pick(of_part, width);
                prop_assert_eq!(picked.len(), part.len() * width);
                let mut spread = vec![-1.0; of_part.len()];
                spread[..picked.len()].copy_from_slice(&picked);
                part.spread(&mut spread, width);
                for (i, (&back, &x)) in spread.iter().zip(of_part).enumerate() {
                    prop_assert_eq!(back, if wanted[part.first + i / width] { x } else { 0.0 });
                }
                let first = (0..part.rows).find(|&i| wanted[part.first + i]).unwrap_or(part.rows);
                prop_assert_eq!(part.first_of(0, part.rows), first);
                count += part.len();
                end += part.rows;
            }
            prop_assert_eq!((count, end), (some.len(), rows));
        }
    }

    #[test]
    fn of_all_rows_nothing_is_copied() {
        let all = Wanted::new(5, None).unwrap();
        let x = [1.0; 4];
        let part = all.parts(2)[1];
        assert!(matches!(part.pick(&x, 2), Cow::Borrowed(_)));
        assert_eq!((part.first, part.rows, part.before, part.len(), part.first_of(1, 1)), (2, 2, 2, 2, 0));
    }

    #[test]
    fn rows_that_are_not_there_or_not_in_order_are_refused() {
        assert!(Wanted::new(3, Some(&[0, 3])).is_err());
        assert!(Wanted::new(3, Some(&[1, 1])).is_err());
        assert!(Wanted::new(3, Some(&[])).is_ok());
    }
}
