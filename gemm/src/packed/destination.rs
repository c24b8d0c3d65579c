//! The destination of a product: a matrix that can be split in two, so that each thread writes its own part.

use std::marker::PhantomData;

use super::tile::{COLS, ROWS};
use crate::dense::WriteMode;

/// Exclusive access to the elements of a matrix whose rows or whose columns are contiguous.
pub struct Destination<'a> {
    first: *mut f32,
    rows: usize,
    cols: usize,
    /// One of the two strides is 1.
    row_stride: usize,
    col_stride: usize,
    matrix: PhantomData<&'a mut [f32]>,
}

// SAFETY: a destination has exclusive access to its elements (`new`, `split_rows`, `split_cols`); f32 is Send.
unsafe impl Send for Destination<'_> {}

impl<'a> Destination<'a> {
    /// The first `rows` x `cols` elements of a matrix with rows `stride` apart.
    pub fn new(matrix: &'a mut [f32], rows: usize, cols: usize, stride: usize) -> Self {
        let len = if rows * cols == 0 { 0 } else { (rows - 1) * stride + cols };
        assert!(cols <= stride && len <= matrix.len(), "a product of {rows} x {cols} fits its destination");
        Self { first: matrix.as_mut_ptr(), rows, cols, row_stride: stride, col_stride: 1, matrix: PhantomData }
    }

    /// The transpose.
    pub fn t(self) -> Self {
        Self { rows: self.cols, cols: self.rows, row_stride: self.col_stride, col_stride: self.row_stride, ..self }
    }

    pub fn rows(&self) -> usize {
        self.rows
    }

    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Splits into the rows below `at` and the rows from `at` on.
    pub fn split_rows(self, at: usize) -> (Self, Self) {
        assert!(at < self.rows && self.cols > 0, "a split inside the matrix");
        // SAFETY: the first element of row `at` lies within the matrix.
        let second = unsafe { self.first.add(at * self.row_stride) };
        (Self { rows: at, ..self }, Self { first: second, rows: self.rows - at, ..self })
    }

    /// Splits into the columns below `at` and the columns from `at` on.
    pub fn split_cols(self, at: usize) -> (Self, Self) {
        assert!(at < self.cols && self.rows > 0, "a split inside the matrix");
        // SAFETY: element `at` of the first row lies within the matrix.
        let second = unsafe { self.first.add(at * self.col_stride) };
        (Self { cols: at, ..self }, Self { first: second, cols: self.cols - at, ..self })
    }

    /// Prefetches the `rows` x `cols` elements from (`row`, `col`) on into the L1 cache, for writing.
    #[cfg(target_arch = "x86_64")]
    pub fn prefetch(&self, row: usize, col: usize, rows: usize, cols: usize) {
        use std::arch::x86_64::{_MM_HINT_ET0, _mm_prefetch};

        use crate::simd::CACHE_LINE;

        let (row_step, col_step) = if self.col_stride == 1 { (1, CACHE_LINE) } else { (CACHE_LINE, 1) };
        for i in (row..(row + rows).min(self.rows)).step_by(row_step) {
            for j in (col..(col + cols).min(self.cols)).step_by(col_step) {
                // SAFETY: a prefetch accesses nothing, and its address lies within the matrix.
                unsafe { _mm_prefetch::<_MM_HINT_ET0>(self.at(i, j).cast()) };
            }
        }
    }

    /// No such instruction: the first access loads them.
    #[cfg(not(target_arch = "x86_64"))]
    pub fn prefetch(&self, _row: usize, _col: usize, _rows: usize, _cols: usize) {}

    /// # Safety
    /// The element must lie within the matrix.
    unsafe fn at(&self, row: usize, col: usize) -> *mut f32 {
        // SAFETY: guaranteed by the caller.
        unsafe { self.first.add(row * self.row_stride + col * self.col_stride) }
    }

    /// The `len` elements from (`row`, `col`) on, along the contiguous direction.
    ///
    /// # Safety
    /// The elements must lie within the matrix.
    unsafe fn line(&mut self, row: usize, col: usize, len: usize) -> &mut [f32] {
        // SAFETY: bounds are guaranteed by the caller; `&mut self` keeps the exclusive access to the matrix.
        unsafe { std::slice::from_raw_parts_mut(self.at(row, col), len) }
    }
}

simd! {
    /// Writes or adds `scale` times a tile, plus a bias per column, from (`row`, `col`) on; elements beyond the matrix
    /// are skipped.
    ///
    /// # Panics
    /// If the tile has more than [`ROWS`] rows.
    pub fn write_tile(
        destination: &mut Destination,
        tile: &[[f32; COLS]],
        row: usize,
        col: usize,
        mode: WriteMode,
        bias: Option<&[f32]>,
        scale: f32,
    ) {
        assert!(row <= destination.rows && col <= destination.cols && tile.len() <= ROWS, "a tile inside the matrix");
        let (height, width) = (tile.len().min(destination.rows - row), COLS.min(destination.cols - col));
        if destination.col_stride == 1 {
            for (i, sums) in tile[..height].iter().enumerate() {
                // SAFETY: the row's elements are contiguous and lie within the matrix: row + i < rows, col + width <=
                // cols.
                let out = unsafe { destination.line(row + i, col, width) };
                match out.first_chunk_mut::<COLS>() {
                    // A length known at compile time.
                    Some(out) => write_line(out, sums, mode, bias, scale),
                    None => write_line(out, sums, mode, bias, scale),
                }
            }
            return;
        }
        for j in 0..width {
            let mut sums = [0.0; ROWS];
            for (i, row) in tile[..height].iter().enumerate() {
                sums[i] = row[j];
            }
            let bias = bias.map(|bias| [bias[j]; ROWS]);
            // SAFETY: the column's elements are contiguous and lie within the matrix: row + height <= rows, col + j <
            // cols.
            let out = unsafe { destination.line(row, col + j, height) };
            write_line(out, &sums, mode, bias.as_ref().map(<[f32; ROWS]>::as_slice), scale);
        }
    }
}

/// `out = or += scale * sums + bias`, for the length of `out`.
#[inline(always)]
fn write_line(out: &mut [f32], sums: &[f32], mode: WriteMode, bias: Option<&[f32]>, scale: f32) {
    let n = out.len();
    let sums = &sums[..n];
    if let Some(bias) = bias {
        let bias = &bias[..n];
        for i in 0..n {
            let before = if mode == WriteMode::Add { out[i] + bias[i] } else { bias[i] };
            out[i] = before + scale * sums[i];
        }
    } else if mode == WriteMode::Add {
        for i in 0..n {
            out[i] += scale * sums[i];
        }
    } else {
        for i in 0..n {
            out[i] = scale * sums[i];
        }
    }
}
