//! The precision of a model's large matrix products.

/// The precision of products of activations with weights.
///
/// Weights, gradients and optimiser state are always f32, and so are attention scores, norms, softmax and losses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Precision {
    /// f32 throughout.
    #[default]
    F32,
    /// Both operands of a product are rounded to bf16, to nearest with ties to even; f32 subnormals count as zero.
    /// Products are exact in f32 and summed in f32.
    ///
    /// With bf16's unit roundoff u = 2^-8, an element of a product over k differs from the true one by at most `(2u +
    /// u^2 + k 2^-23) sum |a| |b|`. Rounding errors are independent, so for operands of mixed signs about `u sqrt(sum
    /// (a b)^2)` is usual: 0.4 % of the element's own scale, whatever k.
    ///
    /// It pays on CPUs with AVX512-BF16. Others compute from the same rounded operands, more slowly than f32, and may
    /// round the sums differently.
    Bf16,
}
