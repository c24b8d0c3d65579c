//! The two matrices whose product is a weight's gradient, for each linear layer of a block, collected from chunks that
//! run in parallel: the rows of the layer's input and of its output's gradient.

use std::mem::MaybeUninit;
use std::sync::atomic::{AtomicUsize, Ordering};

/// For each of a block's four linear groups, one value for its input and one for the gradient of its output.
pub type PerLinear<T> = [[T; 2]; 4];

/// The rows of all chunks, in chunk order.
pub struct WeightGradInputs(PerLinear<PartwiseVec>);

/// Destinations of one chunk's rows.
pub struct ChunkWriter<'a>(PerLinear<Option<VecPart<'a>>>);

impl WeightGradInputs {
    /// `chunks` holds the number of elements of each chunk's matrices.
    pub fn new(chunks: &[PerLinear<usize>]) -> Self {
        let buffer =
            |linear: usize, side: usize| PartwiseVec::new(chunks.iter().map(|chunk| chunk[linear][side]).collect());
        Self(std::array::from_fn(|linear| std::array::from_fn(|side| buffer(linear, side))))
    }

    /// One writer per chunk.
    pub fn writers(&mut self) -> Vec<ChunkWriter<'_>> {
        let mut parts = self.0.each_mut().map(|sides| sides.each_mut().map(|buffer| buffer.parts().into_iter()));
        let mut next = || {
            let next_parts = parts.each_mut().map(|sides| sides.each_mut().map(Iterator::next));
            next_parts.iter().flatten().all(Option::is_some).then_some(ChunkWriter(next_parts))
        };
        std::iter::from_fn(&mut next).collect()
    }

    /// # Panics
    /// If a chunk did not write one of its matrices.
    pub fn finish(self) -> PerLinear<Vec<f32>> {
        self.0.map(|sides| sides.map(PartwiseVec::finish))
    }
}

impl ChunkWriter<'_> {
    /// # Panics
    /// If a layer's rows are written twice, or their number differs from the one given to [`WeightGradInputs::new`].
    pub fn write(&mut self, linear: usize, input: &[f32], output_gradient: &[f32]) {
        for (part, rows) in self.0[linear].iter_mut().zip([input, output_gradient]) {
            part.take().expect("each chunk writes its rows once").write(rows);
        }
    }
}

/// A new buffer that is written in parts, in any order and on any thread.
struct PartwiseVec {
    /// Empty, with capacity for all parts.
    buffer: Vec<f32>,
    lengths: Vec<usize>,
    written: AtomicUsize,
}

/// An unwritten part of a [`PartwiseVec`].
struct VecPart<'a> {
    uninit: &'a mut [MaybeUninit<f32>],
    written: &'a AtomicUsize,
}

impl PartwiseVec {
    /// `lengths` holds the lengths of the parts.
    fn new(lengths: Vec<usize>) -> Self {
        Self { buffer: Vec::with_capacity(lengths.iter().sum()), lengths, written: AtomicUsize::new(0) }
    }

    /// All parts, marked as unwritten.
    fn parts(&mut self) -> Vec<VecPart<'_>> {
        let Self { buffer, lengths, written } = self;
        *written.get_mut() = 0;
        let written = &*written;
        let mut uninit = buffer.spare_capacity_mut();
        let part = |&n: &usize| VecPart { uninit: uninit.split_off_mut(..n).expect("capacity for all parts"), written };
        lengths.iter().map(part).collect()
    }

    /// # Panics
    /// If a part is unwritten.
    fn finish(mut self) -> Vec<f32> {
        let len = self.lengths.iter().sum();
        assert_eq!(*self.written.get_mut(), len, "every part is written");
        // SAFETY: `parts` cuts the first `len` elements of the buffer into disjoint parts and resets the count.
        // `VecPart::write` consumes its part and counts it once it is wholly written. So all `len` elements were
        // written.
        unsafe { self.buffer.set_len(len) };
        self.buffer
    }
}

impl VecPart<'_> {
    /// Writes the whole part.
    fn write(self, x: &[f32]) {
        self.uninit.write_copy_of_slice(x);
        self.written.fetch_add(x.len(), Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_of_chunks_are_concatenated_in_order() {
        let sizes = [2, 0, 1].map(|rows| [[rows, 3 * rows]; 4]);
        let mut inputs = WeightGradInputs::new(&sizes);
        let mut writers = inputs.writers();
        assert_eq!(writers.len(), 3);
        for (i, (writer, sizes)) in writers.iter_mut().zip(sizes).enumerate().rev() {
            for (linear, sides) in sizes.iter().enumerate() {
                let of = |side: usize| vec![(100 * i + 10 * linear + side) as f32; sides[side]];
                writer.write(linear, &of(0), &of(1));
            }
        }
        let all = inputs.finish();
        assert_eq!(all[3][0], [30.0, 30.0, 230.0]);
        assert_eq!(all[1][1], [vec![11.0; 6], vec![211.0; 3]].concat());
    }

    #[test]
    #[should_panic(expected = "every part")]
    fn a_chunk_that_did_not_write_its_rows_panics() {
        let mut inputs = WeightGradInputs::new(&[[[1, 1]; 4]; 2]);
        let mut writers = inputs.writers();
        (0..4).for_each(|linear| writers[0].write(linear, &[1.0], &[1.0]));
        (0..3).for_each(|linear| writers[1].write(linear, &[1.0], &[1.0]));
        inputs.finish();
    }

    #[test]
    #[should_panic(expected = "every part")]
    fn parts_written_before_a_second_split_do_not_count() {
        let mut buffer = PartwiseVec::new(vec![2, 2]);
        buffer.parts().swap_remove(0).write(&[0.0; 2]);
        buffer.parts().swap_remove(0).write(&[0.0; 2]);
        buffer.finish();
    }
}
