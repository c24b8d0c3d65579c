//! Output buffers filled in parallel by chunks, and disjoint submatrices of a matrix.

use std::cell::RefCell;
use std::marker::PhantomData;
use std::mem::MaybeUninit;

use rayon::prelude::*;

/// Elements per task in elementwise kernels: 64 KiB, so that a chunk stays in the first cache levels.
pub const CHUNK: usize = 16 * 1024;

/// A new buffer of `len` elements. Each chunk is zeroed, then passed to `f(index of its first element, chunk)` while it
/// is in cache. `f` runs in parallel, and each call may use only its own chunk.
pub fn build_chunked<T: Copy + Default + Send>(len: usize, chunk: usize, f: impl Fn(usize, &mut [T]) + Sync) -> Vec<T> {
    let mut buffer: Vec<T> = Vec::with_capacity(len);
    let chunk = chunk.max(1);
    let fill = |i: usize, part: &mut [MaybeUninit<T>]| f(i * chunk, zeroed(part));
    let uninit = &mut buffer.spare_capacity_mut()[..len];
    match len {
        0 => {}
        _ if len <= chunk => fill(0, uninit),
        _ => uninit.par_chunks_mut(chunk).enumerate().for_each(|(i, part)| fill(i, part)),
    }
    // SAFETY: the chunks cover `uninit`, which is the first `len` elements, and `zeroed` has initialised each of them.
    unsafe { buffer.set_len(len) };
    buffer
}

fn zeroed<T: Copy + Default>(part: &mut [MaybeUninit<T>]) -> &mut [T] {
    part.fill(MaybeUninit::new(T::default()));
    // SAFETY: every element was just written, and MaybeUninit<T> has the layout of T.
    unsafe { &mut *(std::ptr::from_mut::<[MaybeUninit<T>]>(part) as *mut [T]) }
}

/// Cuts a slice into consecutive parts of the given lengths.
pub fn split_at_lengths_mut(mut slice: &mut [f32], lengths: impl Iterator<Item = usize>) -> Vec<&mut [f32]> {
    let split = |length| slice.split_off_mut(..length).expect("the lengths add up to at most the slice's");
    lengths.map(split).collect()
}

/// Calls `f(index of its first element, chunk)` for each chunk of `out`, in parallel.
pub fn for_each_chunk(out: &mut [f32], chunk: usize, f: impl Fn(usize, &mut [f32]) + Sync) {
    let chunk = chunk.max(1);
    if out.len() <= chunk {
        f(0, out);
    } else {
        out.par_chunks_mut(chunk).enumerate().for_each(|(i, part)| f(i * chunk, part));
    }
}

/// Sums the columns of a row-major matrix of `d` columns from partial sums: `f(i, acc)` adds chunk `i` of `chunks` to
/// `acc [d]`. Chunks run in parallel and are combined in index order.
pub fn sum_chunks(d: usize, chunks: usize, f: impl Fn(usize, &mut [f32]) + Sync) -> Vec<f32> {
    let partial = build_chunked(chunks * d, d, |start, acc| f(start / d.max(1), acc));
    let mut parts = partial.chunks_exact(d.max(1));
    let mut sum = parts.next().map_or_else(|| vec![0.0; d], <[f32]>::to_vec);
    for part in parts {
        crate::simd::add_assign(&mut sum, part);
    }
    sum
}

thread_local! {
    static SCRATCH: RefCell<Vec<Vec<f32>>> = const { RefCell::new(Vec::new()) };
}

/// Calls `f` with a scratch slice of `len` elements with arbitrary contents; this thread keeps the slice for its next
/// call.
pub fn with_scratch<R>(len: usize, f: impl FnOnce(&mut [f32]) -> R) -> R {
    let mut buffer = SCRATCH.with_borrow_mut(Vec::pop).unwrap_or_default();
    if buffer.len() < len {
        buffer.resize(len, 0.0);
    }
    let result = f(&mut buffer[..len]);
    SCRATCH.with_borrow_mut(|pool| pool.push(buffer));
    result
}

/// Exclusive access to a range of columns of a range of rows of a row-major matrix.
pub struct SubmatrixMut<'a> {
    first: *mut f32,
    rows: usize,
    cols: usize,
    stride: usize,
    matrix: PhantomData<&'a mut [f32]>,
}

// SAFETY: a submatrix is an exclusive borrow of its elements, which no other one holds (see `split_submatrices`); f32
// is Send.
unsafe impl Send for SubmatrixMut<'_> {}

impl SubmatrixMut<'_> {
    #[inline]
    pub fn rows(&self) -> usize {
        self.rows
    }

    #[inline]
    pub fn cols(&self) -> usize {
        self.cols
    }

    #[inline]
    pub fn stride(&self) -> usize {
        self.stride
    }

    #[inline]
    pub fn row_mut(&mut self, row: usize) -> &mut [f32] {
        assert!(row < self.rows);
        // SAFETY: the row lies within the matrix (checked by `split_submatrices`), belongs to this submatrix alone, and
        // `&mut self` keeps it borrowed.
        unsafe { std::slice::from_raw_parts_mut(self.first.add(row * self.stride), self.cols) }
    }

    /// The rows `0..rows` of this submatrix.
    #[inline]
    pub fn first_rows(&mut self, rows: usize) -> SubmatrixMut<'_> {
        self.row_range(0, rows)
    }

    /// `rows` rows of this submatrix from row `start` on.
    #[inline]
    pub fn row_range(&mut self, start: usize, rows: usize) -> SubmatrixMut<'_> {
        assert!(rows > 0 && start + rows <= self.rows);
        // SAFETY: row `start` lies within the matrix.
        let first = unsafe { self.first.add(start * self.stride) };
        SubmatrixMut { first, rows, cols: self.cols, stride: self.stride, matrix: PhantomData }
    }

    #[inline]
    pub fn as_mut_ptr(&mut self) -> *mut f32 {
        self.first
    }
}

/// Cuts a row-major matrix `[n * rows, across * cols]` into its disjoint submatrices `[rows, cols]`: those of the first
/// `rows` rows from left to right, then those of the next, and so on.
pub fn split_submatrices(matrix: &mut [f32], rows: usize, cols: usize, across: usize) -> Vec<SubmatrixMut<'_>> {
    let stride = across * cols;
    assert!(
        rows * stride > 0 && matrix.len().is_multiple_of(rows * stride),
        "the matrix is a whole number of submatrices"
    );
    let blocks = matrix.len() / (rows * stride);
    let base = matrix.as_mut_ptr();
    (0..blocks * across)
        .map(|i| {
            // SAFETY: block of rows i / across starts within the matrix, and submatrix i % across within its rows; by
            // the assertion all `rows` rows of the block do. Each (row, column) belongs to exactly one submatrix, so
            // they are disjoint.
            let first = unsafe { base.add(i / across * rows * stride + i % across * cols) };
            SubmatrixMut { first, rows, cols, stride, matrix: PhantomData }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_chunk_is_filled_at_its_own_offset() {
        let v = build_chunked(1000, 64, |start, part| {
            for (i, x) in part.iter_mut().enumerate() {
                *x = (start + i) as f32;
            }
        });
        assert!(v.iter().enumerate().all(|(i, &x)| x == i as f32) && v.len() == 1000);
        assert!(build_chunked(0, 8, |_, _: &mut [f32]| unreachable!("there is no chunk")).is_empty());
    }

    #[test]
    fn submatrices_are_disjoint_and_cover_the_matrix() {
        let mut m = vec![0.0; 2 * 3 * 4 * 5];
        for (i, mut submatrix) in split_submatrices(&mut m, 3, 5, 4).into_iter().enumerate() {
            for r in 0..submatrix.rows() {
                submatrix.row_mut(r).iter_mut().for_each(|x| *x += (i + 1) as f32);
            }
        }
        for (at, &x) in m.iter().enumerate() {
            let (row, column) = (at / 20, at % 20);
            assert_eq!(x as usize, row / 3 * 4 + column / 5 + 1);
        }
    }

    #[test]
    fn the_sum_of_chunks_covers_all_rows() {
        let sum = sum_chunks(3, 5, |i, acc| acc.iter_mut().for_each(|a| *a += i as f32));
        assert_eq!(sum, [10.0; 3]);
        assert_eq!(sum_chunks(2, 0, |_, acc| acc[1] += 1.0), [0.0; 2]);
    }
}
