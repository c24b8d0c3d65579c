//! One training step: micro-batches, checks for finite losses, the optimiser, progress, checkpoints.

use std::time::{Duration, Instant};

use candle_core::Tensor;
use candle_core::backprop::GradStore;
use engine::checkpoint::Checkpoints;
use engine::context::{Context, StepProgress};
use engine::error::{Error, Result};
use lm::{AdamW, AdamWConfig, Dropout, LrDecay, LrSchedule, Variable};
use serde::{Deserialize, Serialize};

use super::checkpoint::{self, FloatBits, GeneratorPosition};
use crate::error::{IntoStageResult, number, rounded};
use crate::types::LearningPoint;

/// Training settings of a stage: peak learning rate, schedule, AdamW.
#[derive(Clone, Debug)]
pub struct TrainPlan {
    pub steps: u64,
    pub lr: f64,
    /// Steps of linear warm-up.
    pub warmup: u64,
    pub shape: LrDecay,
    pub betas: (f64, f64),
    /// Decoupled weight decay, applied to matrices only.
    pub weight_decay: f64,
    /// The largest gradient norm.
    pub clip: Option<f64>,
}

/// Maximum number of points in a learning curve, not counting the last step.
const CURVE: u64 = 500;

impl TrainPlan {
    /// Whether step `n`, counted from 1, is a point of the learning curve.
    fn is_recorded(&self, n: u64) -> bool {
        n.is_multiple_of(self.steps.div_ceil(CURVE).max(1)) || n == self.steps
    }
}

/// The loss of one micro-batch.
pub struct MicroBatchLoss {
    /// A scalar with its autograd graph.
    pub loss: Tensor,
    /// Weight in the batch's loss; the weights of a batch sum to 1.
    pub share: f64,
}

/// Runs an optimiser along a learning rate schedule and checks that losses stay finite.
pub struct Trainer {
    optimiser: AdamW,
    variables: Vec<Variable>,
    plan: TrainPlan,
    schedule: LrSchedule,
    done: u64,
    last: Option<f64>,
    /// Losses of the last tenth of the steps, averaged into the final loss.
    tail: Vec<f64>,
    /// One point per step accepted by [`TrainPlan::is_recorded`].
    curve: Vec<LearningPoint>,
    spent: TimeSpent,
    told: Instant,
    checkpoints: Checkpoints,
}

/// The part of a checkpoint that is not variables or optimiser.
#[derive(Serialize, Deserialize)]
struct State {
    done: u64,
    last: Option<FloatBits>,
    tail: Vec<FloatBits>,
    /// (step, loss, lr, grad_norm)
    curve: Vec<(i64, FloatBits, FloatBits, FloatBits)>,
    dropout: Option<GeneratorPosition>,
}

/// Seconds since the last timing in the journal.
#[derive(Default)]
struct TimeSpent {
    steps: u64,
    forward: f64,
    backward: f64,
    update: f64,
}

/// Steps between two timings in the journal.
const TIMED: u64 = 100;

impl Trainer {
    /// `variables` must still have their initial values.
    pub fn new(ctx: &mut Context, variables: Vec<Variable>, plan: TrainPlan) -> Result<Self> {
        if plan.warmup >= plan.steps && plan.steps > 1 {
            ctx.warn(format!(
                "`warmup` is {}, there are but {} steps: the peak rate is never reached",
                plan.warmup, plan.steps
            ));
        }
        let config = AdamWConfig {
            beta1: plan.betas.0,
            beta2: plan.betas.1,
            weight_decay: plan.weight_decay,
            ..AdamWConfig::default()
        };
        let schedule = LrSchedule { peak: plan.lr, warmup: plan.warmup, total: plan.steps, shape: plan.shape };
        let optimiser = AdamW::new(variables.clone(), config).into_stage_result()?;
        let checkpoints = Checkpoints::new(ctx, checkpoint::FORMAT);
        let (spent, told) = (TimeSpent::default(), Instant::now());
        Ok(Self {
            optimiser,
            variables,
            plan,
            schedule,
            done: 0,
            last: None,
            tail: Vec::new(),
            curve: Vec::new(),
            spent,
            told,
            checkpoints,
        })
    }

    /// Continues from the last checkpoint of an earlier attempt, if there is one: restores variables, optimiser, losses
    /// and the dropout generator to their state after [`Trainer::done`] steps. The caller restores the order of
    /// batches.
    ///
    /// # Errors
    /// If a checkpoint that passed its checks cannot be read to its end.
    pub fn resume(&mut self, ctx: &mut Context, dropout: Option<&mut Dropout>) -> Result<()> {
        let optimiser = &self.optimiser;
        let found = self.checkpoints.latest(ctx, |folder| checkpoint::read::<State>(folder, optimiser))?;
        let Some((State { done, last, tail, curve, dropout: position }, folder)) = found else { return Ok(()) };
        checkpoint::restore(&folder, &mut self.optimiser)?;
        self.done = done;
        self.last = last.map(|loss| loss.0);
        self.tail = tail.into_iter().map(|loss| loss.0).collect();
        let point = |(step, loss, lr, grad_norm): (i64, FloatBits, FloatBits, FloatBits)| LearningPoint {
            step,
            loss: loss.0,
            lr: lr.0,
            grad_norm: grad_norm.0,
        };
        self.curve = curve.into_iter().map(point).collect();
        if let (Some(dropout), Some(position)) = (dropout, position) {
            position.restore(&mut dropout.rng);
        }
        ctx.resumed(self.reached());
        Ok(())
    }

    /// Writes a checkpoint if one is due. Call it after every step, with the dropout that was given to
    /// [`Trainer::resume`].
    pub fn checkpoint(&mut self, ctx: &mut Context, dropout: Option<&Dropout>) -> Result<()> {
        if !self.checkpoints.due() {
            return Ok(());
        }
        let state = State {
            done: self.done,
            last: self.last.map(FloatBits),
            tail: self.tail.iter().copied().map(FloatBits).collect(),
            curve: self
                .curve
                .iter()
                .map(|p| (p.step, FloatBits(p.loss), FloatBits(p.lr), FloatBits(p.grad_norm)))
                .collect(),
            dropout: dropout.map(|dropout| GeneratorPosition::of(&dropout.rng)).transpose()?,
        };
        let (reached, optimiser) = (self.reached(), &self.optimiser);
        self.checkpoints.publish(ctx, reached, |folder| checkpoint::write(folder, optimiser, &state));
        Ok(())
    }

    fn reached(&self) -> StepProgress<'static> {
        StepProgress { done: self.done, total: self.plan.steps, unit: "steps" }
    }

    /// Number of steps taken.
    pub fn done(&self) -> u64 {
        self.done
    }

    pub fn finished(&self) -> bool {
        self.done >= self.plan.steps
    }

    /// Mean loss over the last tenth of the steps.
    pub fn final_loss(&self) -> f64 {
        self.tail.iter().sum::<f64>() / self.tail.len().max(1) as f64
    }

    /// The learning curve so far: every k-th step and the last, at most about [`CURVE`] points.
    pub fn curve(self) -> Vec<LearningPoint> {
        self.curve
    }

    /// Takes one optimiser step over the parts of one batch, summing their gradients. Returns the batch's loss. `rows`
    /// names the batch's rows for a message.
    ///
    /// # Errors
    /// If a loss or gradient is not finite: names the step, the last finite loss, the tensor and the rows.
    pub fn step<P: Iterator<Item = Result<MicroBatchLoss>>>(
        &mut self,
        ctx: &mut Context,
        parts: P,
        rows: impl Fn() -> Result<String>,
    ) -> Result<f64> {
        let (mut sum, mut grads) = (0.0, None);
        let mut clock = Instant::now();
        for part in parts {
            let MicroBatchLoss { loss, share } = part?;
            let value = f64::from(loss.to_scalar::<f32>().into_stage_result()?);
            if !value.is_finite() {
                return Err(self.diverged(&format!("the loss is {value}"), &rows()?));
            }
            sum += share * value;
            self.spent.forward += lap(&mut clock);
            // A batch in one part needs no scaling.
            let scaled = if share == 1.0 { loss } else { (loss * share).into_stage_result()? };
            grads = Some(add(grads, lm::backward(&scaled).into_stage_result()?, &self.variables)?);
            drop(scaled);
            self.spent.backward += lap(&mut clock);
        }
        let grads = grads.ok_or_else(|| Error::internal("a batch without rows"))?;
        let lr = self.schedule.at(self.done);
        let norms = match self.optimiser.step(&grads, lr, self.plan.clip) {
            Err(lm::Error::NonFinite { quantity }) => {
                return Err(self.diverged(&format!("{quantity} is not finite"), &rows()?));
            }
            other => other.into_stage_result()?,
        };
        self.spent.update += lap(&mut clock);
        self.spent.steps += 1;
        self.done += 1;
        self.last = Some(sum);
        if self.done + (self.plan.steps / 10) >= self.plan.steps {
            self.tail.push(sum);
        }
        if self.plan.is_recorded(self.done) {
            let step = self.done as i64;
            self.curve.push(LearningPoint { step, loss: sum, lr, grad_norm: norms.grad_norm });
        }
        self.tell(ctx, sum);
        Ok(sum)
    }

    fn tell(&mut self, ctx: &mut Context, loss: f64) {
        if self.finished() || self.told.elapsed() > Duration::from_millis(200) {
            self.told = Instant::now();
            ctx.progress(self.done, self.plan.steps, "steps", Some(("loss", loss)));
        }
        if self.finished() || self.spent.steps == TIMED {
            let TimeSpent { steps, forward, backward, update } = std::mem::take(&mut self.spent);
            let what = format!("steps {} to {}", self.done - steps + 1, self.done);
            ctx.timing(&what, &[("forward", forward), ("backward", backward), ("update", update)]);
        }
    }

    fn diverged(&self, what: &str, rows: &str) -> Error {
        let last = match self.last {
            Some(loss) => format!("the last finite loss was {}, at step {}", rounded(loss), self.done),
            None => "no step before it".to_owned(),
        };
        let weights = suspect(&self.variables);
        let (step, steps) = (self.done + 1, self.plan.steps);
        Error::user(format!("{what} at step {step} of {steps}, on {rows} ({last}; {weights})"))
            .help(format!("lower `lr` (it is {}), lengthen `warmup`, or clip harder", number(self.plan.lr)))
    }
}

/// Names the weight that a non-finite number may come from: the first non-finite weight (then an earlier step broke it,
/// not this batch), otherwise the weight with the largest value.
pub fn suspect(variables: &[Variable]) -> String {
    let mut largest = ("", 0.0);
    for variable in variables {
        let values = variable.var.flatten_all().and_then(|values| values.to_vec1::<f32>()).unwrap_or_default();
        if values.iter().any(|value| !value.is_finite()) {
            return format!("the weight {} is not finite", variable.name);
        }
        let most = values.iter().fold(0f32, |most, value| most.max(value.abs()));
        if most > largest.1 {
            largest = (&variable.name, most);
        }
    }
    format!("all weights are finite, the largest is {} in {}", rounded(f64::from(largest.1)), largest.0)
}

fn lap(clock: &mut Instant) -> f64 {
    let seconds = clock.elapsed().as_secs_f64();
    *clock = Instant::now();
    seconds
}

/// Adds the gradients of two parts, in the order of the variables.
fn add(sum: Option<GradStore>, mut grads: GradStore, variables: &[Variable]) -> Result<GradStore> {
    let Some(mut sum) = sum else { return Ok(grads) };
    for variable in variables {
        let tensor = variable.var.as_tensor();
        let Some(new) = grads.remove(tensor) else { continue };
        let total = match sum.remove(tensor) {
            Some(old) => (old + new).into_stage_result()?,
            None => new,
        };
        sum.insert(tensor, total);
    }
    Ok(sum)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::path::PathBuf;

    use candle_core::{Device, Var};

    use super::*;

    /// The error of training on the mean of `loss(w, step)`, with w = (1, 4) before step 1.
    fn diverged(loss: impl Fn(&Tensor, u64) -> candle_core::Result<Tensor>) -> String {
        let var = Var::from_slice(&[1f32, 4.0], 2, &Device::Cpu).expect("a small variable");
        let mut ctx = Context::new("test", 0, BTreeMap::new(), PathBuf::new(), PathBuf::new());
        let plan = TrainPlan {
            steps: 9,
            lr: 1.0,
            warmup: 0,
            shape: LrDecay::Constant,
            betas: (0.9, 0.999),
            weight_decay: 0.0,
            clip: None,
        };
        let variables = vec![Variable { name: "h.0.w".into(), var: var.clone(), decays: false }];
        let mut trainer = Trainer::new(&mut ctx, variables, plan).expect("one variable");
        for step in 1.. {
            let loss = loss(&var, step).and_then(|loss| loss.mean_all()).expect("a scalar");
            let part = Ok(MicroBatchLoss { loss, share: 1.0 });
            if let Err(e) = trainer.step(&mut ctx, [part].into_iter(), || Ok("posts `a`, `b`".into())) {
                return e.message;
            }
        }
        unreachable!("the steps end in an error")
    }

    #[test]
    fn a_long_curve_is_thinned_and_keeps_the_last_step() {
        let recorded = |steps: u64| {
            let plan = TrainPlan {
                steps,
                lr: 1.0,
                warmup: 0,
                shape: LrDecay::Constant,
                betas: (0.9, 0.999),
                weight_decay: 0.0,
                clip: None,
            };
            (1..=steps).filter(|&n| plan.is_recorded(n)).collect::<Vec<_>>()
        };
        assert_eq!(recorded(3), [1, 2, 3]);
        assert_eq!(recorded(500).len(), 500);
        let long = recorded(12_345);
        assert_eq!((long.first(), long.last()), (Some(&25), Some(&12_345)));
        assert!(long.len() <= 501, "{}", long.len());
    }

    #[test]
    fn what_is_not_finite_is_named_with_step_rows_and_tensor() {
        let place = "at step 2 of 9, on posts `a`, `b` (the last finite loss was 8.5, at step 1; \
                     all weights are finite, the largest is 3 in h.0.w)";
        // The slope of the root at 0 is infinite, but its value is not.
        let gradient = diverged(|w, step| if step == 2 { (w - w)?.sqrt() } else { w.sqr() });
        assert_eq!(gradient, format!("the gradient of h.0.w is not finite {place}"));
        let loss = diverged(|w, step| if step == 2 { w / 0.0 } else { w.sqr() });
        assert!(loss.starts_with("the loss is ") && loss.ends_with(place), "{loss}");
        let first =
            "at step 1 of 9, on posts `a`, `b` (no step before it; all weights are finite, the largest is 4 in h.0.w)";
        assert!(diverged(|w, _| w / 0.0).ends_with(first));
    }

    #[test]
    fn a_weight_that_an_earlier_step_broke_is_named() {
        let error = diverged(|w, step| {
            if step == 2 {
                // `Var::from_tensor` of a variable returns another handle to the same storage.
                Var::from_tensor(w)?.set(&Tensor::new(&[f32::INFINITY, 0.0], &Device::Cpu)?)?;
            }
            w.sqr()
        });
        assert!(error.ends_with("; the weight h.0.w is not finite)"), "{error}");
    }
}
