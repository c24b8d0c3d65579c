//! The precision of a model's large matrix products. Knows no kernel.

/// What the products of activations with weights are computed in.
///
/// Weights, gradients and optimiser state are f32 either way, and so are attention's scores, norms, softmax and losses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Precision {
    /// f32 throughout.
    #[default]
    F32,
    /// Both operands of a product are rounded to bf16, to nearest with ties to even; what is subnormal in f32 counts as
    /// zero. Their products are exact in f32, in which they are summed.
    ///
    /// With bf16's unit roundoff u = 2^-8, an element of a product over k differs from the true one by at most
    /// `(2u + u^2 + k 2^-23) sum |a| |b|`. Rounding errors are independent, so that for operands of mixed signs about
    /// `u sqrt(sum (a b)^2)` is usual: 0.4 % of the element's own scale, whatever k.
    ///
    /// It pays on CPUs with AVX512-BF16. Others compute the same from the same rounded operands, more slowly than f32,
    /// and may round the sums differently.
    Bf16,
}
