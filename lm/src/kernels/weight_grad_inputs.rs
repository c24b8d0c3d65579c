//! The two factors of each weight's gradient in a block, collected from chunks that run in parallel: the rows of each
//! map's input and of its output's gradient.

use std::mem::MaybeUninit;
use std::sync::atomic::{AtomicUsize, Ordering};

/// For each of a block's four maps, one value for its input and one for the gradient of its output.
pub type OfMaps<T> = [[T; 2]; 4];

/// The rows of all chunks, in chunk order.
pub struct Factors(OfMaps<Assembly>);

/// Destinations of one chunk's rows.
pub struct Places<'a>(OfMaps<Option<Slot<'a>>>);

impl Factors {
    /// `chunks` holds the number of elements of each chunk's factors.
    pub fn new(chunks: &[OfMaps<usize>]) -> Self {
        let assembly = |map: usize, side: usize| Assembly::new(chunks.iter().map(|chunk| chunk[map][side]).collect());
        Self(std::array::from_fn(|map| std::array::from_fn(|side| assembly(map, side))))
    }

    /// One destination per chunk.
    pub fn places(&mut self) -> Vec<Places<'_>> {
        let mut slots = self.0.each_mut().map(|sides| sides.each_mut().map(|all| all.slots().into_iter()));
        let mut next = || {
            let place = slots.each_mut().map(|sides| sides.each_mut().map(Iterator::next));
            place.iter().flatten().all(Option::is_some).then_some(Places(place))
        };
        std::iter::from_fn(&mut next).collect()
    }

    /// # Panics
    /// If a chunk did not store one of its factors.
    pub fn finish(self) -> OfMaps<Vec<f32>> {
        self.0.map(|sides| sides.map(Assembly::finish))
    }
}

impl Places<'_> {
    /// # Panics
    /// If a map's rows are stored twice, or their number differs from the one given to [`Factors::new`].
    pub fn keep(&mut self, map: usize, input: &[f32], output_gradient: &[f32]) {
        for (slot, rows) in self.0[map].iter_mut().zip([input, output_gradient]) {
            slot.take().expect("rows are kept once").write(rows);
        }
    }
}

/// A new buffer that is written in parts, in any order and on any thread.
struct Assembly {
    /// Empty, with capacity for all parts.
    buffer: Vec<f32>,
    parts: Vec<usize>,
    written: AtomicUsize,
}

/// An unwritten part of an [`Assembly`].
struct Slot<'a> {
    room: &'a mut [MaybeUninit<f32>],
    written: &'a AtomicUsize,
}

impl Assembly {
    /// `parts` holds the lengths of the parts.
    fn new(parts: Vec<usize>) -> Self {
        Self { buffer: Vec::with_capacity(parts.iter().sum()), parts, written: AtomicUsize::new(0) }
    }

    /// All parts, marked as unwritten.
    fn slots(&mut self) -> Vec<Slot<'_>> {
        let Self { buffer, parts, written } = self;
        *written.get_mut() = 0;
        let written = &*written;
        let mut room = buffer.spare_capacity_mut();
        let slot = |&n: &usize| Slot { room: room.split_off_mut(..n).expect("room for all parts"), written };
        parts.iter().map(slot).collect()
    }

    /// # Panics
    /// If a part is unwritten.
    fn finish(mut self) -> Vec<f32> {
        let len = self.parts.iter().sum();
        assert_eq!(*self.written.get_mut(), len, "every part is written");
        // SAFETY: `slots` cuts the first `len` elements of the buffer into disjoint parts and resets the count.
        // `Slot::write` consumes its part and counts it once it is wholly written. So all `len` elements were written.
        unsafe { self.buffer.set_len(len) };
        self.buffer
    }
}

impl Slot<'_> {
    /// Writes the whole part.
    fn write(self, x: &[f32]) {
        self.room.write_copy_of_slice(x);
        self.written.fetch_add(x.len(), Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_of_chunks_stand_one_after_the_other() {
        let sizes = [2, 0, 1].map(|rows| [[rows, 3 * rows]; 4]);
        let mut factors = Factors::new(&sizes);
        let mut places = factors.places();
        assert_eq!(places.len(), 3);
        for (i, (place, sizes)) in places.iter_mut().zip(sizes).enumerate().rev() {
            for (map, sides) in sizes.iter().enumerate() {
                let of = |side: usize| vec![(100 * i + 10 * map + side) as f32; sides[side]];
                place.keep(map, &of(0), &of(1));
            }
        }
        let all = factors.finish();
        assert_eq!(all[3][0], [30.0, 30.0, 230.0]);
        assert_eq!(all[1][1], [vec![11.0; 6], vec![211.0; 3]].concat());
    }

    #[test]
    #[should_panic(expected = "every part")]
    fn rows_that_a_chunk_did_not_keep_are_missed() {
        let mut factors = Factors::new(&[[[1, 1]; 4]; 2]);
        let mut places = factors.places();
        (0..4).for_each(|map| places[0].keep(map, &[1.0], &[1.0]));
        (0..3).for_each(|map| places[1].keep(map, &[1.0], &[1.0]));
        factors.finish();
    }

    #[test]
    #[should_panic(expected = "every part")]
    fn what_was_written_before_the_parts_were_cut_again_does_not_count() {
        let mut assembly = Assembly::new(vec![2, 2]);
        assembly.slots().swap_remove(0).write(&[0.0; 2]);
        assembly.slots().swap_remove(0).write(&[0.0; 2]);
        assembly.finish();
    }
}
