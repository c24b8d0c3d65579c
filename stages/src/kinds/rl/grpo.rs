//! `rl.grpo`: group-relative policy optimisation.

kind!(Grpo, GrpoParams, "rl.grpo", 1, "group-relative policy optimisation: as rl.ppo, without a value head");
