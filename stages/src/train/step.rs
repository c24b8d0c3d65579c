//! One step of training: micro-batches, finite losses, the optimiser, progress. Knows no model and no loss.

use std::time::{Duration, Instant};

use candle_core::Tensor;
use candle_core::backprop::GradStore;
use engine::context::Context;
use engine::error::{Error, Result};
use lm::{AdamW, AdamWConfig, Schedule, Shape, Variable};

use super::fail::{Told, number, rounded};

/// How a stage trains: peak learning rate, schedule, AdamW.
#[derive(Clone, Debug)]
pub struct TrainPlan {
    pub steps: u64,
    pub lr: f64,
    /// Steps of linear warm-up.
    pub warmup: u64,
    pub shape: Shape,
    pub betas: (f64, f64),
    /// Decoupled, on matrices only.
    pub weight_decay: f64,
    /// The largest norm of a gradient.
    pub clip: Option<f64>,
}

/// A micro-batch's loss.
pub struct Part {
    /// A scalar with its graph.
    pub loss: Tensor,
    /// Its weight in the batch's loss; the weights of a batch sum to 1.
    pub share: f64,
}

/// Steps an optimiser along a schedule and watches the loss.
pub struct Trainer {
    optimiser: AdamW,
    variables: Vec<Variable>,
    plan: TrainPlan,
    schedule: Schedule,
    done: u64,
    last: Option<f64>,
    /// The losses of the last tenth, for the final figure.
    tail: Vec<f64>,
    spent: Spent,
    told: Instant,
}

/// Seconds since the journal was told.
#[derive(Default)]
struct Spent {
    steps: u64,
    forward: f64,
    backward: f64,
    update: f64,
}

/// Steps between two timings in the journal.
const TIMED: u64 = 100;

impl Trainer {
    /// For `variables`, none of which has moved yet.
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
        let schedule = Schedule { peak: plan.lr, warmup: plan.warmup, total: plan.steps, shape: plan.shape };
        let optimiser = AdamW::new(variables.clone(), config).told()?;
        let (spent, told) = (Spent::default(), Instant::now());
        Ok(Self { optimiser, variables, plan, schedule, done: 0, last: None, tail: Vec::new(), spent, told })
    }

    /// Steps taken so far.
    pub fn done(&self) -> u64 {
        self.done
    }

    pub fn finished(&self) -> bool {
        self.done >= self.plan.steps
    }

    /// The mean loss over the last tenth of the steps.
    pub fn final_loss(&self) -> f64 {
        self.tail.iter().sum::<f64>() / self.tail.len().max(1) as f64
    }

    /// One optimiser step over the parts of one batch, whose gradients are added up. Gives the batch's loss.
    ///
    /// # Errors
    /// A loss or gradient that is not finite: names the step and the last finite loss.
    pub fn step<P: Iterator<Item = Result<Part>>>(&mut self, ctx: &mut Context, parts: P) -> Result<f64> {
        let (mut sum, mut grads) = (0.0, None);
        let mut clock = Instant::now();
        for part in parts {
            let Part { loss, share } = part?;
            let value = f64::from(loss.to_scalar::<f32>().told()?);
            if !value.is_finite() {
                return Err(self.diverged(&format!("the loss is {value}")));
            }
            sum += share * value;
            self.spent.forward += lap(&mut clock);
            // A whole batch in one part needs no scaling.
            let scaled = if share == 1.0 { loss } else { (loss * share).told()? };
            grads = Some(add(grads, lm::backward(&scaled).told()?, &self.variables)?);
            drop(scaled);
            self.spent.backward += lap(&mut clock);
        }
        let grads = grads.ok_or_else(|| Error::ours("a batch without rows"))?;
        let lr = self.schedule.at(self.done);
        match self.optimiser.step(&grads, lr, self.plan.clip) {
            Err(lm::Error::NonFinite { what }) => return Err(self.diverged(&format!("{what} is not finite"))),
            other => other.told()?,
        };
        self.spent.update += lap(&mut clock);
        self.spent.steps += 1;
        self.done += 1;
        self.last = Some(sum);
        if self.done + (self.plan.steps / 10) >= self.plan.steps {
            self.tail.push(sum);
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
            let Spent { steps, forward, backward, update } = std::mem::take(&mut self.spent);
            let what = format!("steps {} to {}", self.done - steps + 1, self.done);
            ctx.timing(&what, &[("forward", forward), ("backward", backward), ("update", update)]);
        }
    }

    fn diverged(&self, what: &str) -> Error {
        let last = match self.last {
            Some(loss) => format!("the last finite loss was {}, at step {}", rounded(loss), self.done),
            None => "no step before it".to_owned(),
        };
        Error::yours(format!("{what} at step {} of {} ({last})", self.done + 1, self.plan.steps))
            .help(format!("lower `lr` (it is {}), lengthen `warmup`, or clip harder", number(self.plan.lr)))
    }
}

fn lap(clock: &mut Instant) -> f64 {
    let seconds = clock.elapsed().as_secs_f64();
    *clock = Instant::now();
    seconds
}

/// Adds gradients of two parts, in the order of the variables.
fn add(sum: Option<GradStore>, mut grads: GradStore, variables: &[Variable]) -> Result<GradStore> {
    let Some(mut sum) = sum else { return Ok(grads) };
    for variable in variables {
        let tensor = variable.var.as_tensor();
        let Some(new) = grads.remove(tensor) else { continue };
        let total = match sum.remove(tensor) {
            Some(old) => (old + new).told()?,
            None => new,
        };
        sum.insert(tensor, total);
    }
    Ok(sum)
}
