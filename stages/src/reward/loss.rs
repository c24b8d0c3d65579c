//! The loss of a reward model: the paper's Eq. 1.

use candle_core::{DType, Result, Tensor};

/// Eq. 1: the mean over pairs of `-log sigmoid(a - b) + eta (a + b)^2`, with `a` the chosen and `b` the rejected
/// summary's score.
///
/// `scores`: `[2 * pairs]`, first all chosen, then all rejected. Returns a scalar.
pub fn preference_loss(scores: &Tensor, eta: f64) -> Result<Tensor> {
    let pairs = scores.dim(0)? / 2;
    let (chosen, rejected) = (scores.narrow(0, 0, pairs)?, scores.narrow(0, pairs, pairs)?);
    let loss = softplus(&(&rejected - &chosen)?)?.mean_all()?;
    let size = (chosen + rejected)?.sqr()?.mean_all()?;
    loss + (size * eta)?
}

/// Eq. 1 with labels that are right with a probability `p` each: the first term becomes
/// `-p log sigmoid(a - b) - (1 - p) log sigmoid(b - a)`, which is `-log sigmoid(a - b) + (1 - p) (a - b)`.
///
/// `certainties`: `[pairs]`.
pub fn soft_preference_loss(scores: &Tensor, certainties: &[f32], eta: f64) -> Result<Tensor> {
    let pairs = certainties.len();
    let margins = (scores.narrow(0, 0, pairs)? - scores.narrow(0, pairs, pairs)?)?;
    let doubts = Tensor::new(certainties, scores.device())?.affine(-1.0, 1.0)?;
    preference_loss(scores, eta)? + (doubts * margins)?.mean_all()?
}

/// log(1 + e^x) = max(x, 0) + log(1 + e^-|x|), which stays exact where e^x overflows. -log sigmoid(x) is softplus(-x).
fn softplus(x: &Tensor) -> Result<Tensor> {
    debug_assert_eq!(x.dtype(), DType::F32);
    x.relu()? + (x.abs()?.neg()?.exp()? + 1.0)?.log()?
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};

    use super::*;

    fn loss(scores: &[f32], eta: f64) -> Result<f32> {
        preference_loss(&Tensor::new(scores, &Device::Cpu)?, eta)?.to_scalar()
    }

    #[test]
    fn soft_labels_weigh_both_orders_and_sure_ones_change_nothing() -> Result<()> {
        let scores = Tensor::new(&[1.0_f32, 0.2, -0.5, 0.4], &Device::Cpu)?;
        let soft = |certainties: [f32; 2]| soft_preference_loss(&scores, &certainties, 0.01)?.to_scalar::<f32>();
        assert_eq!(soft([1.0, 1.0])?, loss(&[1.0, 0.2, -0.5, 0.4], 0.01)?);
        // A label that is right with probability 0 is the other label.
        assert!((soft([0.0, 0.0])? - loss(&[-0.5, 0.4, 1.0, 0.2], 0.01)?).abs() < 1e-6);
        let mixed = 0.75 * soft([1.0, 1.0])? + 0.25 * soft([0.0, 0.0])?;
        assert!((soft([0.75, 0.75])? - mixed).abs() < 1e-6);
        Ok(())
    }

    #[test]
    fn it_is_equation_1() -> Result<()> {
        // Two pairs: (1.0, -0.5) and (0.2, 0.4).
        let expected: f64 = [(1.0, -0.5), (0.2, 0.4)]
            .iter()
            .map(|&(a, b): &(f64, f64)| -(1.0 / (1.0 + (b - a).exp())).ln() + 0.01 * (a + b).powi(2))
            .sum::<f64>()
            / 2.0;
        let got = f64::from(loss(&[1.0, 0.2, -0.5, 0.4], 0.01)?);
        assert!((got - expected).abs() < 1e-6, "{got} {expected}");
        Ok(())
    }

    #[test]
    fn it_stays_finite_far_out() -> Result<()> {
        assert!((loss(&[-500.0, 500.0], 0.0)? - 1000.0).abs() < 1e-3);
        assert!(loss(&[500.0, -500.0], 0.0)?.abs() < 1e-6);
        Ok(())
    }

    #[test]
    fn its_gradient_agrees_with_finite_differences() -> Result<()> {
        let at = [0.7_f32, -0.2, 0.1, 0.3];
        let var = Var::new(&at, &Device::Cpu)?;
        let grads = preference_loss(var.as_tensor(), 0.05)?.backward()?;
        let gradient = grads.get(var.as_tensor()).map(Tensor::to_vec1::<f32>).transpose()?.unwrap_or_default();
        assert_eq!(gradient.len(), 4);
        for i in 0..4 {
            let moved = |by: f32| {
                let mut x = at;
                x[i] += by;
                loss(&x, 0.05)
            };
            let expected = (moved(1e-2)? - moved(-1e-2)?) / 2e-2;
            assert!((gradient[i] - expected).abs() < 1e-3, "{i}: {} {expected}", gradient[i]);
        }
        Ok(())
    }
}
