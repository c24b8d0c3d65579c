//! The subset of a batch's rows whose output is computed: a block runs the steps after attention on these rows only.

use std::borrow::Cow;

use candle_core::{Result, bail};

/// A subset of the `rows` rows of a batch, or all of them.
pub struct RowSubset {
    rows: usize,
    /// Ascending.
    indices: Option<Vec<u32>>,
}

impl RowSubset {
    /// Errors: rows that do not ascend, or that do not exist.
    pub fn new(rows: usize, indices: Option<Vec<u32>>) -> Result<Self> {
        if let Some(&[a, b]) = indices.as_ref().and_then(|indices| indices.array_windows().find(|[a, b]| a >= b)) {
            bail!("output rows must be in ascending order, got row {b} after row {a}");
        }
        if let Some(&last) = indices.as_ref().and_then(|indices| indices.last())
            && last as usize >= rows
        {
            bail!("output row {last} does not exist: the batch has {rows} rows");
        }
        Ok(Self { rows, indices })
    }

    /// The number of selected rows.
    pub fn len(&self) -> usize {
        self.indices.as_ref().map_or(self.rows, Vec::len)
    }

    /// Whether it is a subset rather than all rows.
    pub fn is_partial(&self) -> bool {
        self.indices.is_some()
    }

    /// The selected rows of each chunk of `chunk_rows` rows.
    pub fn chunks(&self, chunk_rows: usize) -> Vec<ChunkRows<'_>> {
        let starts = (0..self.rows).step_by(chunk_rows);
        let chunk = |first_row: usize| {
            let end = (first_row + chunk_rows).min(self.rows);
            let Some(all) = &self.indices else {
                return ChunkRows { first_row, rows: end - first_row, selected_before: first_row, indices: None };
            };
            let [start, stop] = [first_row, end].map(|row| all.partition_point(|&selected| (selected as usize) < row));
            ChunkRows { first_row, rows: end - first_row, selected_before: start, indices: Some(&all[start..stop]) }
        };
        starts.map(chunk).collect()
    }
}

/// The selected rows of one chunk.
#[derive(Clone, Copy)]
pub struct ChunkRows<'a> {
    /// Index in the batch of the chunk's first row.
    pub first_row: usize,
    /// Rows of the chunk, selected or not.
    pub rows: usize,
    /// Selected rows before this chunk.
    pub selected_before: usize,
    /// Indices in the batch; None: all.
    indices: Option<&'a [u32]>,
}

impl ChunkRows<'_> {
    /// The number of selected rows.
    pub fn len(self) -> usize {
        self.indices.map_or(self.rows, <[u32]>::len)
    }

    /// The index within the sequence of its first selected row; `time` if there is none.
    pub fn first_in_sequence(self, sequence: usize, time: usize) -> usize {
        let Some(indices) = self.indices else { return 0 };
        let start = self.first_row + sequence * time;
        let selected = indices.get(indices.partition_point(|&row| (row as usize) < start));
        selected.map_or(time, |&row| (row as usize - start).min(time))
    }

    /// The selected rows of `x [rows, width]`.
    pub fn gather<'x>(self, x: &'x [f32], width: usize) -> Cow<'x, [f32]> {
        if self.indices.is_none() {
            return Cow::Borrowed(x);
        }
        let mut gathered = vec![0.0; self.len() * width];
        self.gather_into(&mut gathered, x, width);
        Cow::Owned(gathered)
    }

    /// [`ChunkRows::gather`] into `to [len, width]`.
    pub fn gather_into(self, to: &mut [f32], x: &[f32], width: usize) {
        let Some(indices) = self.indices else { return to.copy_from_slice(x) };
        for (to, &row) in to.chunks_exact_mut(width).zip(indices) {
            to.copy_from_slice(&x[(row as usize - self.first_row) * width..][..width]);
        }
    }

    /// Moves the first `len` rows of `x [rows, width]` to the indices of the selected rows; the others become zero.
    pub fn scatter(self, x: &mut [f32], width: usize) {
        let Some(indices) = self.indices else { return };
        // From the last row on: no row moves towards the front.
        let mut end = x.len();
        for (i, &row) in indices.iter().enumerate().rev() {
            let place = (row as usize - self.first_row) * width;
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
        fn scatter_restores_the_rows_that_gather_selected(selected in prop::collection::vec(any::<bool>(), 1..60), chunk_rows in 1..70usize, width in 1..4usize) {
            let rows = selected.len();
            let indices: Vec<u32> = (0..rows as u32).filter(|&i| selected[i as usize]).collect();
            let x: Vec<f32> = (1..=rows * width).map(|i| i as f32).collect();
            let all = RowSubset::new(rows, Some(indices.clone())).unwrap();
            prop_assert_eq!(all.len(), indices.len());
            let (mut count, mut end) = (0, 0);
            for chunk in all.chunks(chunk_rows) {
                prop_assert_eq!((chunk.first_row, chunk.selected_before), (end, count));
                let chunk_x = &x[chunk.first_row * width..][..chunk.rows * width];
                let gathered = chunk.gather(chunk_x, width);
                prop_assert_eq!(gathered.len(), chunk.len() * width);
                let mut scattered = vec![-1.0; chunk_x.len()];
                scattered[..gathered.len()].copy_from_slice(&gathered);
                chunk.scatter(&mut scattered, width);
                for (i, (&back, &x)) in scattered.iter().zip(chunk_x).enumerate() {
                    prop_assert_eq!(back, if selected[chunk.first_row + i / width] { x } else { 0.0 });
                }
                let first_row = (0..chunk.rows).find(|&i| selected[chunk.first_row + i]).unwrap_or(chunk.rows);
                prop_assert_eq!(chunk.first_in_sequence(0, chunk.rows), first_row);
                count += chunk.len();
                end += chunk.rows;
            }
            prop_assert_eq!((count, end), (indices.len(), rows));
        }
    }

    #[test]
    fn selecting_all_rows_copies_nothing() {
        let all = RowSubset::new(5, None).unwrap();
        let x = [1.0; 4];
        let chunk = all.chunks(2)[1];
        assert!(matches!(chunk.gather(&x, 2), Cow::Borrowed(_)));
        assert_eq!(
            (chunk.first_row, chunk.rows, chunk.selected_before, chunk.len(), chunk.first_in_sequence(1, 1)),
            (2, 2, 2, 2, 0)
        );
    }

    #[test]
    fn missing_and_unordered_rows_are_refused() {
        assert!(RowSubset::new(3, Some(vec![0, 3])).is_err());
        assert!(RowSubset::new(3, Some(vec![1, 1])).is_err());
        assert!(RowSubset::new(3, Some(vec![])).is_ok());
    }
}
