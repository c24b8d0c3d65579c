//! An RL run: its phases, the evaluations between them, tables and checkpoints.

use engine::checkpoint::Checkpoints;
use engine::context::{Context, StepProgress};
use engine::error::Result;
use serde::{Deserialize, Serialize};

use super::SCORING_BATCH;
use super::held_out::HeldOut;
use super::params::{Greedy, Params};
use super::phase::{self, Phases};
use super::tables::Tables;
use super::update::{self, Learner};
use crate::train::checkpoint;

/// State and settings of a run.
pub(super) struct Run<'a> {
    params: &'a Params,
    pub learner: Learner,
    pub phases: Phases<'a>,
    held_out: HeldOut<'a>,
    tables: Tables,
    checkpoints: Checkpoints,
    /// Number of phases completed.
    done: u64,
    /// Whether the policy after `done` phases has been evaluated.
    evaluated: bool,
}

/// The part of a checkpoint that is not variables, optimiser or tables.
#[derive(Serialize, Deserialize)]
struct State {
    done: u64,
    evaluated: bool,
    evaluations: u64,
    learner: update::State,
    phases: phase::State,
}

impl<'a> Run<'a> {
    /// A run before its first phase.
    pub fn new(
        params: &'a Params,
        learner: Learner,
        phases: Phases<'a>,
        held_out: HeldOut<'a>,
        ctx: &Context,
    ) -> Result<Self> {
        let checkpoints = Checkpoints::new(ctx, checkpoint::FORMAT);
        let tables = Tables::create(ctx)?;
        Ok(Self { params, learner, phases, held_out, tables, checkpoints, done: 0, evaluated: false })
    }

    /// Runs every phase and the evaluations before, between and after them, starting from the last checkpoint if there
    /// is one.
    ///
    /// # Errors
    /// If a number is not finite: names the phase or evaluation, the step, the posts and the tensor.
    pub fn go(&mut self, ctx: &mut Context) -> Result<()> {
        self.resume(ctx)?;
        loop {
            if self.params.evaluates_after(self.done) && !self.evaluated {
                self.evaluate(ctx)?;
                self.checkpoint(ctx)?;
            }
            if self.done == self.params.phases() {
                return Ok(());
            }
            self.phase(ctx)?;
            self.checkpoint(ctx)?;
        }
    }

    /// Closes the tables; returns the parts that remain to be saved.
    pub fn finish(self, ctx: &Context) -> Result<(Learner, Phases<'a>)> {
        self.tables.finish(ctx.out())?;
        Ok((self.learner, self.phases))
    }

    fn evaluate(&mut self, ctx: &mut Context) -> Result<()> {
        ctx.activity("sampling on held-out prompts");
        let started = std::time::Instant::now();
        let (done, total) = (self.done, self.params.phases());
        let greedy = match self.params.greedy {
            Greedy::All => true,
            Greedy::Ends => done == 0 || done == total,
            Greedy::None => false,
        };
        for greedy in [Some(false), greedy.then_some(true)].into_iter().flatten() {
            let rows = self.held_out.samples(&self.learner, done as i64, greedy, SCORING_BATCH);
            let rows = rows.map_err(|e| e.context(format!("evaluation after phase {done} of {total}")))?;
            self.tables.evaluated(rows)?;
        }
        ctx.timing(&format!("evaluation {done}"), &[("held_out", started.elapsed().as_secs_f64())]);
        self.evaluated = true;
        Ok(())
    }

    fn phase(&mut self, ctx: &mut Context) -> Result<()> {
        let total = self.params.phases();
        let row = self.phases.run(&mut self.learner, self.done, ctx);
        let row = row.map_err(|e| e.context(format!("phase {} of {total}", self.done + 1)))?;
        self.done += 1;
        self.evaluated = false;
        ctx.progress(self.done, total, "phases", row.proxy.map(|proxy| ("proxy", proxy)));
        self.phases.note_metrics(&row, ctx);
        self.tables.phases.push(row);
        Ok(())
    }

    fn resume(&mut self, ctx: &mut Context) -> Result<()> {
        let optimiser = self.learner.optimiser();
        let found = self.checkpoints.latest(ctx, |folder| checkpoint::read::<State>(folder, optimiser))?;
        let Some((State { done, evaluated, evaluations, learner, phases }, folder)) = found else { return Ok(()) };
        checkpoint::restore(&folder, self.learner.optimiser_mut())?;
        self.tables.restore(&folder, evaluations)?;
        self.learner.restore(learner);
        self.phases.restore(phases);
        (self.done, self.evaluated) = (done, evaluated);
        if let Some(row) = self.tables.phases.last() {
            self.phases.note_metrics(row, ctx);
        }
        ctx.resumed(self.reached());
        Ok(())
    }

    /// Writes a checkpoint if one is due. Progress within a phase or an evaluation is not kept.
    fn checkpoint(&mut self, ctx: &mut Context) -> Result<()> {
        if !self.checkpoints.due() {
            return Ok(());
        }
        let state = State {
            done: self.done,
            evaluated: self.evaluated,
            evaluations: self.tables.evaluations(),
            learner: self.learner.state(),
            phases: self.phases.state()?,
        };
        let (reached, tables, optimiser) = (self.reached(), &self.tables, self.learner.optimiser());
        self.checkpoints.publish(ctx, reached, |folder| {
            tables.keep(folder)?;
            checkpoint::write(folder, optimiser, &state)
        });
        Ok(())
    }

    fn reached(&self) -> StepProgress<'static> {
        StepProgress { done: self.done, total: self.params.phases(), unit: "phases" }
    }
}
