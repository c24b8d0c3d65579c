//! Where a product goes: a matrix that can be cut in two, so that each thread writes its own part. Knows no products.

use std::marker::PhantomData;

use crate::kernels::gemm::Into;
use crate::kernels::simd::simd;

/// Exclusive access to the elements of a row-major matrix.
pub struct Target<'a> {
    first: *mut f32,
    rows: usize,
    cols: usize,
    stride: usize,
    matrix: PhantomData<&'a mut [f32]>,
}

// SAFETY: a target has exclusive access to its elements (`new`, `split_rows`, `split_cols`); f32 is Send.
unsafe impl Send for Target<'_> {}

impl<'a> Target<'a> {
    /// The first `rows` x `cols` elements of rows `stride` apart.
    pub fn new(matrix: &'a mut [f32], rows: usize, cols: usize, stride: usize) -> Self {
        let len = if rows * cols == 0 { 0 } else { (rows - 1) * stride + cols };
        assert!(cols <= stride && len <= matrix.len(), "a product of {rows} x {cols} fits its destination");
        Self { first: matrix.as_mut_ptr(), rows, cols, stride, matrix: PhantomData }
    }

    pub fn rows(&self) -> usize {
        self.rows
    }

    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The rows below `at` and those from there on.
    pub fn split_rows(self, at: usize) -> (Self, Self) {
        assert!(at < self.rows && self.cols > 0, "a split inside the matrix");
        // SAFETY: the first element of row `at` lies within the matrix.
        let second = unsafe { self.first.add(at * self.stride) };
        (Self { rows: at, ..self }, Self { first: second, rows: self.rows - at, ..self })
    }

    /// The columns below `at` and those from there on.
    pub fn split_cols(self, at: usize) -> (Self, Self) {
        assert!(at < self.cols && self.rows > 0, "a split inside the matrix");
        // SAFETY: element `at` of the first row lies within the matrix.
        let second = unsafe { self.first.add(at) };
        (Self { cols: at, ..self }, Self { first: second, cols: self.cols - at, ..self })
    }

    /// Asks for the `rows` x `cols` elements from (`row`, `col`) on to be brought to the first cache, for writing.
    #[cfg(target_arch = "x86_64")]
    pub fn prefetch(&self, row: usize, col: usize, rows: usize, cols: usize) {
        use std::arch::x86_64::{_MM_HINT_ET0, _mm_prefetch};

        use crate::kernels::simd::LINE;

        for i in row..(row + rows).min(self.rows) {
            for j in (col..(col + cols).min(self.cols)).step_by(LINE) {
                // SAFETY: a prefetch accesses nothing; what it names lies within the matrix.
                unsafe { _mm_prefetch::<_MM_HINT_ET0>(self.first.add(i * self.stride + j).cast()) };
            }
        }
    }

    /// Without such an instruction, the first access brings them.
    #[cfg(not(target_arch = "x86_64"))]
    pub fn prefetch(&self, _row: usize, _col: usize, _rows: usize, _cols: usize) {}

    /// Writes or adds `scale` times a tile whose first element belongs to (`row`, `col`); what lies beyond the matrix is
    /// left out.
    pub fn write<const COLS: usize>(&mut self, tile: &[[f32; COLS]], row: usize, col: usize, into: Into, scale: f32) {
        assert!(row <= self.rows && col <= self.cols, "a tile inside the matrix");
        let count = COLS.min(self.cols - col);
        for (i, sums) in tile.iter().enumerate().take(self.rows - row) {
            // SAFETY: row + i < rows and col + count <= cols, so that the elements lie within the matrix, to which this has
            // exclusive access, kept by `&mut self`.
            let out = unsafe { std::slice::from_raw_parts_mut(self.first.add((row + i) * self.stride + col), count) };
            match into {
                Into::Overwrite => write_scaled(out, &sums[..count], scale),
                Into::Add => add_scaled(out, &sums[..count], scale),
            }
        }
    }
}

simd! {
    fn write_scaled(out: &mut [f32], sums: &[f32], scale: f32) {
        for (o, &s) in out.iter_mut().zip(sums) {
            *o = scale * s;
        }
    }
}

simd! {
    fn add_scaled(out: &mut [f32], sums: &[f32], scale: f32) {
        for (o, &s) in out.iter_mut().zip(sums) {
            *o += scale * s;
        }
    }
}
