//! `rl.ppo`: PPO with a value head and GAE.

kind!(
    Ppo,
    PpoParams,
    "rl.ppo",
    3,
    "PPO from the SFT policy against a reward model or an ensemble, with the adaptive objective or a baseline"
);
