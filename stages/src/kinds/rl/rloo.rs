//! `rl.rloo`: REINFORCE with a leave-one-out baseline.

kind!(Rloo, RlooParams, "rl.rloo", 1, "REINFORCE with a leave-one-out baseline: as rl.ppo, without a value head");
