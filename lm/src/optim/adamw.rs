//! AdamW (Loshchilov & Hutter 2019) over named variables, updated in place: by a fused kernel on the CPU, or by stock candle
//! operations on the variables' device.

use candle_core::backprop::GradStore;
use candle_core::{CpuStorage, InplaceOp1, Layout, Tensor, Var, bail};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use temper_gemm::simd;
use temper_gemm::simd::fma;

use crate::tensor::candle_interop::CpuSlice;
use crate::tensor::device::is_portable;
use crate::tensor::threads::in_pool;
use crate::{Error, Result, Variable};

/// Elements per parallel task. Norms are summed per chunk, in index order, so that they do not depend on threads.
const CHUNK: usize = 16 * 1024;

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AdamWConfig {
    pub beta1: f64,
    pub beta2: f64,
    pub eps: f64,
    /// Decoupled: each step subtracts `lr * weight_decay * weight`, in variables that decay.
    pub weight_decay: f64,
}

impl Default for AdamWConfig {
    /// PyTorch's defaults.
    fn default() -> Self {
        Self { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.01 }
    }
}

/// Euclidean norms over all variables of one step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepNorms {
    /// Norm of the gradient, before clipping.
    pub grad_norm: f64,
    /// Norm of the change of the variables, decay included.
    pub update_norm: f64,
}

/// A variable and its optimiser state.
pub(super) struct ParamState {
    pub(super) variable: Variable,
    pub(super) moments: Moments,
    /// The target of weight decay; None is zero.
    decay_target: Option<Tensor>,
}

/// First and second moments of a variable's gradient.
pub(super) enum Moments {
    /// For the fused kernel.
    Fused([Vec<f32>; 2]),
    /// For stock operations, where the variable is.
    Stock([Tensor; 2]),
}

impl Moments {
    fn zeros(var: &Var, portable: bool) -> Result<Self> {
        Ok(match portable {
            true => Self::Stock([var.zeros_like()?, var.zeros_like()?]),
            false => Self::Fused([vec![0.0; var.elem_count()], vec![0.0; var.elem_count()]]),
        })
    }
}

/// The optimiser: the variables with their moments, and the number of steps taken.
pub struct AdamW {
    config: AdamWConfig,
    /// Whether to use stock operations.
    portable: bool,
    pub(super) params: Vec<ParamState>,
    pub(super) steps: u64,
}

impl AdamW {
    /// An optimiser at step 0. Names must be unique; variables must be contiguous f32.
    pub fn new(variables: Vec<Variable>, config: AdamWConfig) -> Result<Self> {
        Self::with_operations(variables, config, is_portable())
    }

    /// [`AdamW::new`], by stock operations if `portable`.
    pub(super) fn with_operations(variables: Vec<Variable>, config: AdamWConfig, portable: bool) -> Result<Self> {
        let mut seen = std::collections::HashSet::new();
        let params = variables.into_iter().map(|variable| {
            if !seen.insert(variable.name.clone()) {
                return Err(Error::input(format!("two variables have the name {}", variable.name)));
            }
            if !portable {
                CpuSlice::new(&variable.var)?;
            }
            Ok(ParamState { moments: Moments::zeros(&variable.var, portable)?, variable, decay_target: None })
        });
        Ok(Self { config, portable, params: params.collect::<Result<_>>()?, steps: 0 })
    }

    /// Makes weight decay pull towards `reference(name)` instead of zero, for example towards the reference policy in
    /// full training; None keeps zero. Errors: a reference of another shape.
    pub fn decay_towards(&mut self, mut reference: impl FnMut(&str) -> Option<Tensor>) -> Result<()> {
        for param in &mut self.params {
            let name = &param.variable.name;
            param.decay_target = match reference(name) {
                Some(target) if target.shape() == param.variable.var.shape() => Some(target.detach().contiguous()?),
                Some(target) => {
                    let (found, expected) = (target.dims(), param.variable.var.dims());
                    return Err(Error::input(format!(
                        "the decay target of {name} has shape {found:?}, expected {expected:?}"
                    )));
                }
                None => None,
            };
        }
        Ok(())
    }

    /// Steps taken so far.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    pub fn config(&self) -> &AdamWConfig {
        &self.config
    }

    /// Takes one step with the learning rate `lr`. With `clip`, a gradient of greater norm is first scaled down to that
    /// norm (as PyTorch's `clip_grad_norm_`).
    ///
    /// No other thread may use the variables meanwhile.
    ///
    /// Errors, before anything changes: a variable without a gradient; a gradient that is not finite.
    pub fn step(&mut self, grads: &GradStore, lr: f64, clip: Option<f64>) -> Result<StepNorms> {
        in_pool(|| self.update(grads, lr, clip))
    }

    fn update(&mut self, grads: &GradStore, lr: f64, clip: Option<f64>) -> Result<StepNorms> {
        let mut gradients = Vec::with_capacity(self.params.len());
        for ParamState { variable: Variable { name, var, .. }, .. } in &self.params {
            let Some(grad) = grads.get(var.as_tensor()) else {
                return Err(Error::input(format!("variable {name} has no gradient: the loss does not depend on it")));
            };
            gradients.push(grad.contiguous()?);
        }
        let groups = if self.portable { self.groups(&gradients)? } else { vec![] };
        let squares = match self.portable {
            true => sums_on_device(groups.iter().map(|group| group.grad.sqr()?.sum_all()))?,
            false => gradients
                .iter()
                .map(|grad| Ok(parallel_sum_of_squares(&CpuSlice::new(grad)?)))
                .collect::<Result<_>>()?,
        };
        if let Some(at) = squares.iter().position(|square| !square.is_finite()) {
            let of_group = groups.get(at).map_or(vec![at], |group| group.params.clone());
            return Err(self.non_finite(&gradients, &of_group)?);
        }
        let grad_norm = squares.iter().sum::<f64>().sqrt();
        let step = self.steps + 1;
        let AdamWConfig { beta1, beta2, eps, weight_decay } = self.config;
        let power = i32::try_from(step).unwrap_or(i32::MAX);
        let bias1 = 1.0 - beta1.powi(power);
        let bias2 = 1.0 - beta2.powi(power);
        let constants = |variable: &Variable| StepConstants {
            clip: clip.map_or(1.0, |max| (max / (grad_norm + 1e-6)).min(1.0)) as f32,
            beta1: beta1 as f32,
            beta2: beta2 as f32,
            one_minus_beta1: (1.0 - beta1) as f32,
            one_minus_beta2: (1.0 - beta2) as f32,
            step_size: (lr / bias1) as f32,
            inverse_root_bias2: (1.0 / bias2.sqrt()) as f32,
            eps: eps as f32,
            decay: if variable.decays { (lr * weight_decay) as f32 } else { 0.0 },
        };
        let mut squared_update = 0.0;
        for (ParamState { variable, moments, decay_target }, grad) in self.params.iter_mut().zip(&gradients) {
            let Moments::Fused([m, v]) = moments else { continue };
            let grad = CpuSlice::new(grad)?;
            let decay_target = decay_target.as_ref().map(CpuSlice::new).transpose()?;
            let op = AdamWUpdate {
                constants: constants(variable),
                grad: &grad,
                decay_target: decay_target.as_deref(),
                state: std::cell::RefCell::new((m, v)),
                square: std::cell::Cell::new(0.0),
            };
            variable.var.inplace_op1(&op)?;
            squared_update += op.square.get();
        }
        let changes = groups.iter().map(|group| {
            let constants = constants(&self.params[group.params[0]].variable);
            update_by_stock_operations(&mut self.params, group, constants)
        });
        squared_update += sums_on_device(changes)?.into_iter().sum::<f64>();
        self.steps = step;
        Ok(StepNorms { grad_norm, update_norm: squared_update.sqrt() })
    }

    /// The error of a gradient among those of `params` that is not finite.
    fn non_finite(&self, gradients: &[Tensor], params: &[usize]) -> Result<Error> {
        let squares = sums_on_device(params.iter().map(|&i| gradients[i].sqr()?.sum_all()))?;
        let at = squares.iter().position(|square| !square.is_finite()).unwrap_or(0);
        Ok(Error::NonFinite { quantity: format!("the gradient of {}", self.params[params[at]].variable.name) })
    }

    /// The variables in groups whose members are decayed alike.
    fn groups(&self, gradients: &[Tensor]) -> Result<Vec<Group>> {
        /// Elements of a group of more than one variable.
        const ELEMENTS: usize = 4 << 20;
        let mut groups: Vec<(usize, Vec<usize>)> = vec![];
        let kind = |i: usize| (self.params[i].variable.decays, self.params[i].decay_target.is_some());
        for (i, grad) in gradients.iter().enumerate() {
            let n = grad.elem_count();
            match groups.iter_mut().rfind(|(_, params)| kind(params[0]) == kind(i)) {
                Some((elements, params)) if *elements + n <= ELEMENTS => {
                    *elements += n;
                    params.push(i);
                }
                _ => groups.push((n, vec![i])),
            }
        }
        let group = |(_, params): (usize, Vec<usize>)| {
            Ok(Group { grad: side_by_side(params.iter().map(|&i| &gradients[i]))?, params })
        };
        groups.into_iter().map(group).collect()
    }
}

/// Variables that stock operations update as one, in a fifth of the launches.
struct Group {
    /// Indices, ascending.
    params: Vec<usize>,
    /// Their gradients side by side, `[elements]`.
    grad: Tensor,
}

fn side_by_side<'a>(tensors: impl Iterator<Item = &'a Tensor>) -> candle_core::Result<Tensor> {
    Tensor::cat(&tensors.map(|tensor| tensor.detach().flatten_all()).collect::<candle_core::Result<Vec<_>>>()?, 0)
}

/// Scalars in one copy from their device.
fn sums_on_device(sums: impl Iterator<Item = candle_core::Result<Tensor>>) -> candle_core::Result<Vec<f64>> {
    let sums = sums.collect::<candle_core::Result<Vec<_>>>()?;
    if sums.is_empty() {
        return Ok(vec![]);
    }
    Ok(Tensor::stack(&sums, 0)?.to_vec1::<f32>()?.into_iter().map(f64::from).collect())
}

/// Updates the variables of a group as [`update`] does; returns the squared norm of the change.
fn update_by_stock_operations(
    params: &mut [ParamState],
    group: &Group,
    constants: StepConstants,
) -> candle_core::Result<Tensor> {
    let members = || group.params.iter().map(|&i| &params[i]);
    let moments = |which: usize| {
        side_by_side(members().filter_map(move |param| match &param.moments {
            Moments::Stock(moments) => Some(&moments[which]),
            Moments::Fused(_) => None,
        }))
    };
    let scaled = |t: &Tensor, by: f32| t.affine(f64::from(by), 0.0);
    let (p, g) =
        (side_by_side(members().map(|param| param.variable.var.as_tensor()))?, scaled(&group.grad, constants.clip)?);
    let m = (scaled(&moments(0)?, constants.beta1)? + scaled(&g, constants.one_minus_beta1)?)?;
    let v = (scaled(&moments(1)?, constants.beta2)? + scaled(&g.sqr()?, constants.one_minus_beta2)?)?;
    let root = v.sqrt()?.affine(f64::from(constants.inverse_root_bias2), f64::from(constants.eps))?;
    let mut change = (scaled(&m, -constants.step_size)? / root)?;
    if constants.decay != 0.0 {
        let distance = match members().all(|param| param.decay_target.is_some()) {
            true => (&p - side_by_side(members().flat_map(|param| &param.decay_target))?)?,
            false => p.clone(),
        };
        change = (change - scaled(&distance, constants.decay)?)?;
    }
    let p = (p + &change)?;
    let mut start = 0;
    for &i in &group.params {
        let ParamState { variable: Variable { var, .. }, moments, .. } = &mut params[i];
        let own = |all: &Tensor| all.narrow(0, start, var.elem_count())?.reshape(var.shape());
        var.set(&own(&p)?)?;
        *moments = Moments::Stock([own(&m)?, own(&v)?]);
        start += var.elem_count();
    }
    change.sqr()?.sum_all()
}

fn parallel_sum_of_squares(x: &[f32]) -> f64 {
    let parts: Vec<f64> = x.par_chunks(CHUNK).map(sum_of_squares).collect();
    parts.iter().sum()
}

simd! {
    fn sum_of_squares(x: &[f32]) -> f64 {
        let mut acc = [0f64; 16];
        let (chunks, rest) = x.as_chunks::<16>();
        for c in chunks {
            for i in 0..16 {
                acc[i] += f64::from(c[i]) * f64::from(c[i]);
            }
        }
        for (a, &v) in acc.iter_mut().zip(rest) {
            *a += f64::from(v) * f64::from(v);
        }
        acc.iter().sum()
    }
}

/// The constants of one step.
#[derive(Clone, Copy)]
struct StepConstants {
    clip: f32,
    beta1: f32,
    beta2: f32,
    /// 1 - beta1, 1 - beta2, rounded once.
    one_minus_beta1: f32,
    one_minus_beta2: f32,
    /// lr / (1 - beta1^t)
    step_size: f32,
    /// 1 / sqrt(1 - beta2^t)
    inverse_root_bias2: f32,
    eps: f32,
    /// lr * weight_decay, or 0
    decay: f32,
}

/// Updates one variable in place.
struct AdamWUpdate<'a> {
    constants: StepConstants,
    grad: &'a [f32],
    decay_target: Option<&'a [f32]>,
    state: std::cell::RefCell<(&'a mut Vec<f32>, &'a mut Vec<f32>)>,
    /// Receives the squared norm of the change.
    square: std::cell::Cell<f64>,
}

impl InplaceOp1 for AdamWUpdate<'_> {
    fn name(&self) -> &'static str {
        "temper-adamw"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> candle_core::Result<()> {
        let (CpuStorage::F32(p), Some((start, end))) = (storage, layout.contiguous_offsets()) else {
            bail!("a variable must be a contiguous f32 tensor");
        };
        let p = &mut p[start..end];
        let (m, v) = &mut *self.state.borrow_mut();
        if p.len() != self.grad.len() {
            bail!("the gradient has {} elements, expected {}", self.grad.len(), p.len());
        }
        let Self { constants, grad, decay_target, .. } = *self;
        let parts: Vec<f64> = p
            .par_chunks_mut(CHUNK)
            .zip(m.par_chunks_mut(CHUNK))
            .zip(v.par_chunks_mut(CHUNK))
            .enumerate()
            .map(|(i, ((p, m), v))| {
                let part = i * CHUNK..i * CHUNK + p.len();
                let decay_target = decay_target.map(|target| &target[part.clone()]);
                update(p, m, v, &grad[part], decay_target, constants)
            })
            .collect();
        self.square.set(parts.iter().sum());
        Ok(())
    }
}

fn update(
    p: &mut [f32],
    m: &mut [f32],
    v: &mut [f32],
    g: &[f32],
    decay_target: Option<&[f32]>,
    constants: StepConstants,
) -> f64 {
    let mut change = [0f32; 1024];
    let mut square = 0.0;
    for start in (0..p.len()).step_by(change.len()) {
        let part = start..(start + change.len()).min(p.len());
        let change = &mut change[..part.len()];
        moments(change, &mut m[part.clone()], &mut v[part.clone()], &g[part.clone()], constants);
        let p = &mut p[part.clone()];
        if constants.decay != 0.0 {
            match decay_target {
                None => decay_towards_zero(change, p, constants.decay),
                Some(decay_target) => decay_towards_target(change, p, &decay_target[part], constants.decay),
            }
        }
        temper_gemm::simd::add_assign(p, change);
        square += sum_of_squares(change);
    }
    square
}

simd! {
    /// Updates the moments and computes the change from them, without decay.
    fn moments(change: &mut [f32], m: &mut [f32], v: &mut [f32], g: &[f32], constants: StepConstants) {
        for (((c, m), v), &g) in change.iter_mut().zip(m.iter_mut()).zip(v.iter_mut()).zip(g) {
            let g = g * constants.clip;
            *m = fma::<FMA>(constants.beta1, *m, constants.one_minus_beta1 * g);
            *v = fma::<FMA>(constants.beta2, *v, constants.one_minus_beta2 * g * g);
            *c = -constants.step_size * *m / fma::<FMA>(v.sqrt(), constants.inverse_root_bias2, constants.eps);
        }
    }
}

simd! {
    fn decay_towards_zero(change: &mut [f32], p: &[f32], decay: f32) {
        for (c, &p) in change.iter_mut().zip(p) {
            *c -= decay * p;
        }
    }
}

simd! {
    fn decay_towards_target(change: &mut [f32], p: &[f32], target: &[f32], decay: f32) {
        for ((c, &p), &t) in change.iter_mut().zip(p).zip(target) {
            *c -= decay * (p - t);
        }
    }
}

#[cfg(test)]
#[path = "adamw_tests.rs"]
mod tests;
