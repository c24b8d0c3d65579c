//! Claims about products in bf16, against sums in f64.

use half::bf16;
use proptest::prelude::*;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha12Rng;

use super::tile::{multiply, portable};
use super::{COLS, DEPTH, Left, ROWS, Right, Target, product};
use crate::kernels::gemm::{Into, Mat, Threads};

/// bf16's unit roundoff.
const U: f64 = 1.0 / 256.0;

fn random(len: usize, seed: u64) -> Vec<f32> {
    let mut rng = ChaCha12Rng::seed_from_u64(seed);
    (0..len).map(|_| rng.random_range(-2.0..2.0)).collect()
}

/// How the operands and the destination lie in memory.
#[derive(Clone, Copy, Debug)]
struct Case {
    m: usize,
    k: usize,
    n: usize,
    /// Whether the memory holds the transposes.
    transposed: (bool, bool),
    /// Elements between the rows of each.
    gap: usize,
}

impl Case {
    const fn plain(m: usize, k: usize, n: usize) -> Self {
        Self { m, k, n, transposed: (false, false), gap: 0 }
    }

    fn memory(self, (rows, cols): (usize, usize), transposed: bool, seed: u64) -> Vec<f32> {
        let (rows, cols) = if transposed { (cols, rows) } else { (rows, cols) };
        random(rows * (cols + self.gap), seed)
    }

    fn a(self) -> Vec<f32> {
        self.memory((self.m, self.k), self.transposed.0, 1)
    }

    fn b(self) -> Vec<f32> {
        self.memory((self.k, self.n), self.transposed.1, 2)
    }

    fn view(self, data: &[f32], rows: usize, cols: usize, transposed: bool) -> Mat<'_> {
        match transposed {
            false => Mat::strided(data, rows, cols, cols + self.gap),
            true => Mat::strided(data, cols, rows, rows + self.gap).t(),
        }
    }

    fn product(self, out: &mut [f32], into: Into, scale: f32, threads: Threads) {
        let (a, b) = (self.a(), self.b());
        let a = self.view(&a, self.m, self.k, self.transposed.0);
        let b = Right::new(self.view(&b, self.k, self.n, self.transposed.1), threads);
        let target = Target::new(out, self.m, self.n, self.n + self.gap);
        Left::with(a, threads, |a| product(target, into, scale, a, &b, threads));
    }

    /// Each element's place, and the sums of a b, of |a b| and of (a b)^2, of operands to which `f` was applied.
    fn sums(self, f: impl Fn(f32) -> f64) -> impl Iterator<Item = (usize, [f64; 3])> {
        let (a, b) = (self.a(), self.b());
        let a =
            move |i, k| if self.transposed.0 { a[k * (self.m + self.gap) + i] } else { a[i * (self.k + self.gap) + k] };
        let b =
            move |k, j| if self.transposed.1 { b[j * (self.k + self.gap) + k] } else { b[k * (self.n + self.gap) + j] };
        (0..self.m * self.n).map(move |at| {
            let (i, j) = (at / self.n, at % self.n);
            let mut sums = [0.0; 3];
            for k in 0..self.k {
                let term = f(a(i, k)) * f(b(k, j));
                sums[0] += term;
                sums[1] += term.abs();
                sums[2] += term * term;
            }
            (i * (self.n + self.gap) + j, sums)
        })
    }
}

fn exact(x: f32) -> f64 {
    f64::from(x)
}

fn rounded(x: f32) -> f64 {
    bf16::from_f32(x).to_f64()
}

/// The largest error of sums of k products in f32.
fn slack(k: usize, magnitude: f64) -> f64 {
    k as f64 * magnitude / f64::from(1 << 23)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn a_product_is_that_of_the_rounded_operands(
        m in 0..2 * ROWS + 3, k in 0..40usize, n in 0..2 * COLS + 3, transposed: (bool, bool), gap in 0..3usize, add: bool,
    ) {
        let case = Case { m, k, n, transposed, gap };
        let mut out = vec![0.25; m * (n + gap)];
        let (into, old) = if add { (Into::Add, 0.25) } else { (Into::Overwrite, 0.0) };
        case.product(&mut out, into, -0.5, Threads::One);
        for (at, [sum, magnitude, _]) in case.sums(rounded) {
            let error = (f64::from(out[at]) - (old - 0.5 * sum)).abs();
            prop_assert!(error <= slack(k + 2, magnitude + old), "{error} at {at}");
        }
        let beyond = out.chunks((n + gap).max(1)).flat_map(|row| &row[n..]);
        prop_assert!(beyond.into_iter().all(|&x| x == 0.25), "elements between the rows of the product were written");
    }
}

#[test]
fn the_error_stays_within_the_stated_bound() {
    for case in [Case::plain(17, 40, 50), Case::plain(9, 1000, 49), Case::plain(3, 2 * DEPTH * 2 + 7, 5)] {
        let mut out = vec![0.0; case.m * case.n];
        case.product(&mut out, Into::Overwrite, 1.0, Threads::One);
        let (mut squares, mut usual) = (0.0, 0.0);
        for (at, [sum, magnitude, energy]) in case.sums(exact) {
            let error = (f64::from(out[at]) - sum).abs();
            assert!(error <= (2.0 * U + U * U) * magnitude + slack(case.k, magnitude), "{error} at {at} of {case:?}");
            squares += error * error;
            usual += U * U * energy;
        }
        let ratio = (squares / usual).sqrt();
        assert!(ratio < 1.0, "errors are {ratio} times what the documentation calls usual, in {case:?}");
    }
}

#[test]
fn the_result_does_not_depend_on_the_number_of_threads() {
    let case = Case { transposed: (true, false), gap: 1, ..Case::plain(331, 700, 515) };
    let at = |threads: usize, who: Threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a pool");
        let mut out = vec![0.5; case.m * (case.n + case.gap)];
        pool.install(|| case.product(&mut out, Into::Add, 0.75, who));
        out.into_iter().map(f32::to_bits).collect::<Vec<_>>()
    };
    let alone = at(1, Threads::One);
    for threads in 1..=4 {
        assert!(at(threads, Threads::Pool) == alone, "{threads} threads");
    }
}

#[test]
fn a_row_does_not_depend_on_the_rows_beside_it() {
    let (k, n) = (300, 70);
    let (x, w) = (random(13 * k, 1), random(k * n, 2));
    let w = Right::new(Mat::new(&w, k, n), Threads::One);
    let rows = |first: usize, count: usize| {
        let mut out = vec![0.0; count * n];
        let target = Target::new(&mut out, count, n, n);
        let x = Mat::new(&x[first * k..], count, k);
        Left::with(x, Threads::One, |x| product(target, Into::Overwrite, 1.0, x, &w, Threads::One));
        out
    };
    let all = rows(0, 13);
    for i in 0..13 {
        assert_eq!(rows(i, 1), all[i * n..(i + 1) * n]);
    }
}

#[test]
fn the_memory_layout_of_an_operand_leaves_no_trace() {
    let plain = Case::plain(29, 523, 101);
    let transpose = |x: &[f32], rows: usize, cols: usize| -> Vec<f32> {
        (0..rows * cols).map(|i| x[i % rows * cols + i / rows]).collect()
    };
    let (a, b) = (plain.a(), plain.b());
    let (a_t, b_t) = (transpose(&a, 29, 523), transpose(&b, 523, 101));
    let run = |a: Mat, b: Mat| {
        let mut out = vec![0.0; 29 * 101];
        let target = Target::new(&mut out, 29, 101, 101);
        let b = Right::new(b, Threads::One);
        Left::with(a, Threads::One, |a| product(target, Into::Overwrite, 1.0, a, &b, Threads::One));
        out
    };
    let (a, b) = (Mat::new(&a, 29, 523), Mat::new(&b, 523, 101));
    assert_eq!(run(a, b), run(Mat::new(&a_t, 523, 29).t(), Mat::new(&b_t, 101, 523).t()));
}

#[test]
fn the_portable_tile_agrees_with_the_chosen_one() {
    let (a, b) = (random(2 * ROWS * DEPTH, 3), random(2 * COLS * DEPTH, 4));
    let b = Right::new(Mat::new(&b, 2 * DEPTH, COLS), Threads::One);
    Left::with(Mat::new(&a, ROWS, 2 * DEPTH), Threads::One, |a| {
        let mut tiles = [[[0.0; COLS]; ROWS]; 2];
        multiply()[ROWS - 1](&mut tiles[0], a.panel(0), b.panel(0));
        portable(&mut tiles[1], a.panel(0), b.panel(0));
        // |a b| <= 4, 2 DEPTH of them.
        let bound = slack(2 * DEPTH, 8.0 * DEPTH as f64);
        for (x, y) in tiles[0].as_flattened().iter().zip(tiles[1].as_flattened()) {
            assert!((f64::from(*x) - f64::from(*y)).abs() <= bound, "{x} and {y}");
        }
    });
}

#[test]
fn what_is_not_finite_stays_so() {
    for bad in [f32::NAN, f32::INFINITY, f32::MAX] {
        let (mut a, b) = (random(4 * 6, 5), random(6 * 5, 6));
        a[6] = bad;
        let mut out = vec![0.0; 4 * 5];
        let target = Target::new(&mut out, 4, 5, 5);
        let b = Right::new(Mat::new(&b, 6, 5), Threads::One);
        Left::with(Mat::new(&a, 4, 6), Threads::One, |a| {
            product(target, Into::Overwrite, 1.0, a, &b, Threads::One);
        });
        let rows: Vec<bool> = out.chunks(5).map(|row| row.iter().all(|x| x.is_finite())).collect();
        assert_eq!(rows, [true, false, true, true], "{bad}");
    }
}

#[test]
#[should_panic(expected = "fits its destination")]
fn a_destination_that_is_too_small_is_refused() {
    Target::new(&mut [0.0; 11], 3, 4, 4);
}
