//! Bounds-checked matrix products of slices through the `gemm` crate.

use gemm::Parallelism;

use crate::buffer::SubmatrixMut;

/// A matrix stored in a slice.
#[derive(Clone, Copy)]
pub struct Mat<'a> {
    pub(crate) data: &'a [f32],
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    pub(crate) row_stride: usize,
    pub(crate) col_stride: usize,
}

impl<'a> Mat<'a> {
    /// Row-major and dense.
    #[inline]
    pub fn new(data: &'a [f32], rows: usize, cols: usize) -> Self {
        Self::strided(data, rows, cols, cols)
    }

    /// `cols` columns from `offset` on of row-major rows of `stride` elements.
    #[inline]
    pub fn columns(data: &'a [f32], rows: usize, cols: usize, stride: usize, offset: usize) -> Self {
        Self::strided(data.get(offset..).unwrap_or_default(), rows, cols, stride)
    }

    /// Row-major, with `row_stride` elements between the starts of rows.
    #[inline]
    pub fn strided(data: &'a [f32], rows: usize, cols: usize, row_stride: usize) -> Self {
        let last = if rows * cols == 0 { 0 } else { (rows - 1) * row_stride + cols };
        assert!(last <= data.len(), "a {rows} x {cols} matrix of row stride {row_stride} in {} elements", data.len());
        Self { data, rows, cols, row_stride, col_stride: 1 }
    }

    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    pub(crate) fn cols(&self) -> usize {
        self.cols
    }

    /// The transpose.
    #[inline]
    pub fn t(self) -> Self {
        Self {
            rows: self.cols,
            cols: self.rows,
            row_stride: self.col_stride,
            col_stride: self.row_stride,
            data: self.data,
        }
    }
}

/// The threads that compute a product.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Threads {
    /// The calling thread only, for use inside parallel tasks.
    One,
    /// The current rayon pool. The result is bit-for-bit the same.
    Pool,
}

/// How a product is stored in its destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WriteMode {
    /// Replaces the contents, which are not read.
    Overwrite,
    /// Adds the product to the contents.
    Add,
}

/// `out [a.rows, b.cols] = or += scale * a b`.
pub fn gemm(out: &mut [f32], mode: WriteMode, scale: f32, a: Mat, b: Mat, threads: Threads) {
    assert!(out.len() >= a.rows * b.cols, "the product fits its destination");
    // SAFETY: `out` holds a.rows rows of b.cols elements.
    unsafe { gemm_unchecked(out.as_mut_ptr(), b.cols, mode, scale, a, b, threads) }
}

/// [`gemm`] into the columns from `offset` on of rows of `stride` elements.
#[expect(clippy::too_many_arguments, reason = "a product and its destination")]
pub fn gemm_columns(
    out: &mut [f32],
    stride: usize,
    offset: usize,
    mode: WriteMode,
    scale: f32,
    a: Mat,
    b: Mat,
    threads: Threads,
) {
    if a.rows == 0 {
        return;
    }
    assert!(offset + b.cols <= stride && a.rows * stride <= out.len(), "the product fits its columns");
    // SAFETY: `out` holds a.rows rows of `stride` elements, of which the b.cols from `offset` on are written.
    unsafe { gemm_unchecked(out.as_mut_ptr().add(offset), stride, mode, scale, a, b, threads) }
}

/// [`gemm`] into a submatrix, on the calling thread.
pub fn gemm_submatrix(out: &mut SubmatrixMut, mode: WriteMode, scale: f32, a: Mat, b: Mat) {
    assert!(out.rows() == a.rows && out.cols() == b.cols, "the destination has the product's shape");
    // SAFETY: a submatrix gives exclusive access to `rows` rows of `cols` elements, `stride` apart.
    unsafe { gemm_unchecked(out.as_mut_ptr(), out.stride(), mode, scale, a, b, Threads::One) }
}

/// A new `scale * a b`.
pub fn gemm_to_vec(scale: f32, a: Mat, b: Mat) -> Vec<f32> {
    let len = a.rows * b.cols;
    let mut out = Vec::with_capacity(len);
    // SAFETY: the capacity holds the product; `gemm_unchecked` writes all of it without reading when it overwrites.
    unsafe {
        gemm_unchecked(out.as_mut_ptr(), b.cols, WriteMode::Overwrite, scale, a, b, Threads::Pool);
        out.set_len(len);
    }
    out
}

/// # Safety
/// `out` points to a.rows rows of b.cols elements, `stride` apart, writable and not aliased; initialised if `mode`
/// adds.
unsafe fn gemm_unchecked(out: *mut f32, stride: usize, mode: WriteMode, scale: f32, a: Mat, b: Mat, threads: Threads) {
    assert_eq!(a.cols, b.rows, "inner dimensions of a product are equal");
    let parallelism = match threads {
        Threads::Pool if rayon::current_num_threads() > 1 => Parallelism::Rayon(0),
        _ => Parallelism::None,
    };
    let add = mode == WriteMode::Add;
    // SAFETY: `Mat` checked that its elements lie within its slice, the caller vouches for `out`; with `read_dst` false
    // the destination is only written.
    unsafe {
        gemm::gemm(
            a.rows,
            b.cols,
            a.cols,
            out,
            1,
            stride as isize,
            add,
            a.data.as_ptr(),
            a.col_stride as isize,
            a.row_stride as isize,
            b.data.as_ptr(),
            b.col_stride as isize,
            b.row_stride as isize,
            if add { 1.0 } else { 0.0 },
            scale,
            false,
            false,
            false,
            parallelism,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_of_transposes_and_accumulation_are_right() {
        let a: Vec<f32> = (0..6).map(|i| i as f32).collect(); // 2 x 3
        let b: Vec<f32> = (0..12).map(|i| i as f32 - 4.0).collect(); // 3 x 4
        let expected = [8.0, 11.0, 14.0, 17.0, 8.0, 20.0, 32.0, 44.0];
        assert_eq!(gemm_to_vec(1.0, Mat::new(&a, 2, 3), Mat::new(&b, 3, 4)), expected);
        let transposed = gemm_to_vec(1.0, Mat::new(&b, 3, 4).t(), Mat::new(&a, 2, 3).t());
        assert_eq!(transposed, [8.0, 8.0, 11.0, 20.0, 14.0, 32.0, 17.0, 44.0]);
        let mut out = expected.to_vec();
        gemm(&mut out, WriteMode::Add, -1.0, Mat::new(&a, 2, 3), Mat::new(&b, 3, 4), Threads::One);
        assert_eq!(out, [0.0; 8]);
    }

    #[test]
    #[should_panic(expected = "a 2 x 3 matrix")]
    fn a_matrix_larger_than_its_slice_is_refused() {
        Mat::new(&[0.0; 5], 2, 3);
    }
}
