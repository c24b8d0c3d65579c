//! Products with packed operands, in f32 and in bf16, against sums in f64.

use half::bf16;
use proptest::prelude::*;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha12Rng;

use super::tile::bf16::Bf16Pair;
use super::tile::{COLS, PanelBlock, ROWS, bf16_tile, f32_tile, select_kernel};
use super::{DEPTH, Destination, LhsPanels, LhsRows, LowRankUpdate, RhsPanels, gemm_packed};
use crate::Precision;
use crate::dense::{Mat, Threads, WriteMode};
use crate::simd::{Isa, isa};

const PRECISIONS: [Precision; 2] = [Precision::F32, Precision::Bf16];

/// bf16's unit roundoff.
const U: f64 = 1.0 / 256.0;

fn random(len: usize, seed: u64) -> Vec<f32> {
    let mut rng = ChaCha12Rng::seed_from_u64(seed);
    (0..len).map(|_| rng.random_range(-2.0..2.0)).collect()
}

/// `destination = or += scale a b`, in the given precision.
fn matmul(
    precision: Precision,
    destination: Destination,
    mode: WriteMode,
    scale: f32,
    a: Mat,
    b: Mat,
    threads: Threads,
) {
    match precision {
        Precision::F32 => {
            gemm_packed(destination, mode, None, scale, &LhsRows::new(a), &RhsPanels::new(b, None), threads)
        }
        Precision::Bf16 => {
            let b = RhsPanels::new(b, None);
            LhsPanels::with_packed(a, threads, |a| gemm_packed(destination, mode, None, scale, a, &b, threads));
        }
    }
}

/// Sizes and memory layout of the operands and the destination.
#[derive(Clone, Copy, Debug)]
struct Case {
    m: usize,
    k: usize,
    n: usize,
    /// Whether the memory holds the transposes.
    transposed: (bool, bool),
    /// Unused elements between the rows of each.
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

    fn run(self, precision: Precision, out: &mut [f32], mode: WriteMode, scale: f32, threads: Threads) {
        let (a, b) = (self.a(), self.b());
        let a = self.view(&a, self.m, self.k, self.transposed.0);
        let b = self.view(&b, self.k, self.n, self.transposed.1);
        let destination = Destination::new(out, self.m, self.n, self.n + self.gap);
        matmul(precision, destination, mode, scale, a, b, threads);
    }

    /// For each element its index, and the sums of a b, of |a b| and of (a b)^2, with `f` applied to the operands.
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

/// The value of an operand's element in a product of this precision.
fn operand_value(precision: Precision) -> fn(f32) -> f64 {
    match precision {
        Precision::F32 => f64::from,
        Precision::Bf16 => |x| bf16::from_f32(x).to_f64(),
    }
}

/// Upper bound on the error of sums of k products in f32.
fn rounding_bound(k: usize, magnitude: f64) -> f64 {
    k as f64 * magnitude / f64::from(1 << 23)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn products_agree_with_f64_sums_of_the_rounded_operands(
        m in 0..2 * ROWS + 3, k in 0..40usize, n in 0..2 * COLS + 3, transposed: (bool, bool), gap in 0..3usize, add: bool,
        rounds: bool,
    ) {
        let precision = PRECISIONS[usize::from(rounds)];
        // In f32 a left operand is read in place, by rows.
        let case = Case { m, k, n, transposed: (transposed.0 && rounds, transposed.1), gap };
        let mut out = vec![0.25; m * (n + gap)];
        let (mode, old) = if add { (WriteMode::Add, 0.25) } else { (WriteMode::Overwrite, 0.0) };
        case.run(precision, &mut out, mode, -0.5, Threads::One);
        for (at, [sum, magnitude, _]) in case.sums(operand_value(precision)) {
            let error = (f64::from(out[at]) - (old - 0.5 * sum)).abs();
            prop_assert!(error <= rounding_bound(k + 2, magnitude + old), "{error} at {at}");
        }
        let beyond = out.chunks((n + gap).max(1)).flat_map(|row| &row[n..]);
        prop_assert!(beyond.into_iter().all(|&x| x == 0.25), "elements between the rows of the product were written");
    }
}

#[test]
fn adding_a_bias_equals_starting_from_it() {
    let bias = random(2 * COLS + 5, 7);
    let n = bias.len();
    for (k, mode, is_transposed) in [0, 3, DEPTH + 9]
        .into_iter()
        .flat_map(|k| [WriteMode::Overwrite, WriteMode::Add].map(|mode| (k, mode)))
        .flat_map(|(k, mode)| [false, true].map(|is_transposed| (k, mode, is_transposed)))
    {
        let m = ROWS + 3;
        let (a, b) = (random(m * k, 1), random(k * n, 2));
        let (a, b) = (Mat::new(&a, m, k), RhsPanels::new(Mat::new(&b, k, n), None));
        let run = |out: &mut [f32], mode: WriteMode, bias: Option<&[f32]>| {
            let destination =
                if is_transposed { Destination::new(out, n, m, m).t() } else { Destination::new(out, m, n, n) };
            gemm_packed(destination, mode, bias, 0.5, &LhsRows::new(a), &b, Threads::Pool);
        };
        let mut joined = random(m * n, 3);
        let mut placed: Vec<f32> = (0..m * n)
            .map(|at| {
                let bias = bias[if is_transposed { at / m } else { at % n }];
                if mode == WriteMode::Add { joined[at] + bias } else { bias }
            })
            .collect();
        run(&mut joined, mode, Some(&bias));
        run(&mut placed, WriteMode::Add, None);
        assert!(joined == placed, "inner dimension {k}, {mode:?}, transposed: {is_transposed}");
    }
}

#[test]
fn the_error_stays_within_the_stated_bound() {
    for case in [Case::plain(17, 40, 50), Case::plain(9, 1000, 49), Case::plain(3, 2 * DEPTH * 2 + 7, 5)] {
        let mut out = vec![0.0; case.m * case.n];
        case.run(Precision::Bf16, &mut out, WriteMode::Overwrite, 1.0, Threads::One);
        let (mut squares, mut usual) = (0.0, 0.0);
        for (at, [sum, magnitude, energy]) in case.sums(f64::from) {
            let error = (f64::from(out[at]) - sum).abs();
            assert!(
                error <= (2.0 * U + U * U) * magnitude + rounding_bound(case.k, magnitude),
                "{error} at {at} of {case:?}"
            );
            squares += error * error;
            usual += U * U * energy;
        }
        let ratio = (squares / usual).sqrt();
        assert!(ratio < 1.0, "errors are {ratio} times what the documentation calls usual, in {case:?}");
    }
}

#[test]
fn a_low_rank_update_is_added_while_packing() {
    for (k, n, rank) in [(37, 101, 3), (5, 1, 2), (1, 5, 2)] {
        assert_sum(k, n, rank);
    }
}

fn assert_sum(k: usize, n: usize, rank: usize) {
    let (w, a, b) = (random(k * n, 1), random(rank * k, 2), random(rank * n, 3));
    let sum = |i: usize, j: usize| {
        let low: f64 = (0..rank).map(|r| f64::from(a[r * k + i]) * f64::from(b[r * n + j])).sum();
        f64::from(w[i * n + j]) + low
    };
    let (update, transposed) = (Some(LowRankUpdate { a: &a, b: &b, rank }), Some(LowRankUpdate { a: &b, b: &a, rank }));
    let unit = |at: usize, len: usize| (0..len).map(|i| f32::from(u8::from(i == at))).collect::<Vec<f32>>();
    let row = |x: &[f32], rhs: &RhsPanels<f32>| {
        let mut out = vec![0.0; rhs.cols()];
        let destination = Destination::new(&mut out, 1, rhs.cols(), rhs.cols());
        gemm_packed(
            destination,
            WriteMode::Overwrite,
            None,
            1.0,
            &LhsRows::new(Mat::new(x, 1, x.len())),
            rhs,
            Threads::One,
        );
        out
    };
    let (forward, back) =
        (RhsPanels::new(Mat::new(&w, k, n), update), RhsPanels::new(Mat::new(&w, k, n).t(), transposed));
    for i in 0..k {
        for (j, x) in row(&unit(i, k), &forward).into_iter().enumerate() {
            assert!((f64::from(x) - sum(i, j)).abs() < 4e-6, "row {i}, column {j}");
        }
    }
    for j in 0..n {
        for (i, x) in row(&unit(j, n), &back).into_iter().enumerate() {
            assert!((f64::from(x) - sum(i, j)).abs() < 4e-6, "row {i}, column {j} of the transpose");
        }
    }
}

#[test]
fn the_result_does_not_depend_on_the_number_of_threads() {
    let case = Case { transposed: (false, true), gap: 1, ..Case::plain(331, 700, 515) };
    for precision in PRECISIONS {
        let at = |threads: usize, policy: Threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a pool");
            let mut out = vec![0.5; case.m * (case.n + case.gap)];
            pool.install(|| case.run(precision, &mut out, WriteMode::Add, 0.75, policy));
            out.into_iter().map(f32::to_bits).collect::<Vec<_>>()
        };
        let alone = at(1, Threads::One);
        for threads in 1..=4 {
            assert!(at(threads, Threads::Pool) == alone, "{threads} threads in {precision:?}");
        }
    }
}

#[test]
fn a_row_does_not_depend_on_the_other_rows() {
    let (k, n) = (300, 70);
    let (x, w) = (random(13 * k, 1), random(k * n, 2));
    for precision in PRECISIONS {
        let rows = |first: usize, count: usize| {
            let mut out = vec![0.0; count * n];
            let destination = Destination::new(&mut out, count, n, n);
            let x = Mat::new(&x[first * k..], count, k);
            matmul(precision, destination, WriteMode::Overwrite, 1.0, x, Mat::new(&w, k, n), Threads::One);
            out
        };
        let all = rows(0, 13);
        for i in 0..13 {
            assert_eq!(rows(i, 1), all[i * n..(i + 1) * n]);
        }
    }
}

#[test]
fn the_result_does_not_depend_on_the_memory_layout() {
    let plain = Case::plain(29, 523, 101);
    let transpose = |x: &[f32], rows: usize, cols: usize| -> Vec<f32> {
        (0..rows * cols).map(|i| x[i % rows * cols + i / rows]).collect()
    };
    let (a, b) = (plain.a(), plain.b());
    let (a_t, b_t) = (transpose(&a, 29, 523), transpose(&b, 523, 101));
    let run = |precision: Precision, a: Mat, b: Mat| {
        let mut out = vec![0.0; 29 * 101];
        matmul(precision, Destination::new(&mut out, 29, 101, 101), WriteMode::Overwrite, 1.0, a, b, Threads::One);
        out
    };
    let (a, b) = (Mat::new(&a, 29, 523), Mat::new(&b, 523, 101));
    let (a_t, b_t) = (Mat::new(&a_t, 523, 29).t(), Mat::new(&b_t, 101, 523).t());
    assert_eq!(run(Precision::F32, a, b), run(Precision::F32, a, b_t));
    assert_eq!(run(Precision::Bf16, a, b), run(Precision::Bf16, a_t, b_t));
}

/// Asserts that two kernels' tiles differ by at most `bound` per element.
fn assert_alike(tiles: &[[[f32; COLS]; ROWS]; 2], bound: f64) {
    for (x, y) in tiles[0].as_flattened().iter().zip(tiles[1].as_flattened()) {
        assert!((f64::from(*x) - f64::from(*y)).abs() <= bound, "{x} and {y}");
    }
}

#[test]
fn portable_tiles_agree_with_the_fastest_ones() {
    let (a, b) = (random(2 * ROWS * DEPTH, 3), random(2 * COLS * DEPTH, 4));
    let (a, b) = (Mat::new(&a, ROWS, 2 * DEPTH), Mat::new(&b, 2 * DEPTH, COLS));
    // |a b| <= 4, 2 DEPTH of them.
    let bound = rounding_bound(2 * DEPTH, 8.0 * DEPTH as f64);
    let mut tiles = [[[0.0; COLS]; ROWS]; 2];
    let rounded_b = RhsPanels::<Bf16Pair>::new(b, None);
    LhsPanels::with_packed(a, Threads::One, |a| {
        let panel = PanelBlock { words: rounded_b.panel(0), next: &[] };
        select_kernel(&bf16_tile::kernels(), ROWS, COLS)(&mut tiles[0], a.panel(0), panel);
        bf16_tile::portable(&mut tiles[1], a.panel(0), panel);
    });
    assert_alike(&tiles, bound);
    let rows: [&[f32]; ROWS] = std::array::from_fn(|i| &a.data[i * 2 * DEPTH..(i + 1) * 2 * DEPTH]);
    let b = RhsPanels::<f32>::new(b, None);
    let panel = PanelBlock { words: b.panel(0), next: &[] };
    for height in 1..=ROWS {
        for cols in [1, 16, 17, 32, 33, COLS] {
            let of = |isa| {
                let mut tile = [[0.0; COLS]; ROWS];
                select_kernel(&f32_tile::kernels_for(isa), height, cols)(&mut tile, &rows, panel);
                tile[height..].fill([0.0; COLS]);
                tile.iter_mut().for_each(|row| row[cols..].fill(0.0));
                tile
            };
            assert_alike(&[of(isa()), of(Isa::Portable)], bound);
            assert!(isa() < Isa::V4 || of(Isa::V4) == of(Isa::V3), "{height} rows, {cols} columns");
        }
    }
}

#[test]
fn non_finite_inputs_give_non_finite_outputs() {
    let bad = [f32::NAN, f32::INFINITY, f32::MAX];
    for (bad, precision) in bad.into_iter().flat_map(|bad| PRECISIONS.map(|precision| (bad, precision))) {
        let (mut a, b) = (random(4 * 6, 5), random(6 * 5, 6));
        a[6] = bad;
        let mut out = vec![0.0; 4 * 5];
        let destination = Destination::new(&mut out, 4, 5, 5);
        // Twice f32's greatest number is an infinity.
        matmul(precision, destination, WriteMode::Overwrite, 8.0, Mat::new(&a, 4, 6), Mat::new(&b, 6, 5), Threads::One);
        let rows: Vec<bool> = out.chunks(5).map(|row| row.iter().all(|x| x.is_finite())).collect();
        assert_eq!(rows, [true, false, true, true], "{bad} in {precision:?}");
    }
}

#[test]
#[should_panic(expected = "fits its destination")]
fn a_destination_that_is_too_small_is_refused() {
    Destination::new(&mut [0.0; 11], 3, 4, 4);
}
