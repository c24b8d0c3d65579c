//! `rl.ppo`, `rl.rloo`, `rl.grpo`: one loop, [`crate::rl`], with different parameters and credit assignment.

/// Declares an RL kind with its own parameter type.
macro_rules! kind {
    ($kind:ident, $params:ident, $name:literal, $version:literal, $about:literal) => {
        use engine::context::Context;
        use engine::error::{Error, Result};
        use engine::estimate::{Forecast, Scaling};
        use engine::kind::{ConnectedInput, Kind, Signature};
        use serde_json::Value;

        use crate::rl;
        use crate::rl::params::{Params, $params};

        pub struct $kind;

        impl Kind for $kind {
            type Params = $params;

            const NAME: &'static str = $name;
            const VERSION: u32 = $version;
            const ABOUT: &'static str = $about;

            fn signature(&self, params: &$params) -> Signature {
                rl::signature(params.objective)
            }

            fn check(&self, params: &$params) -> Vec<(String, String)> {
                Params::from(params.clone()).faults()
            }

            fn check_wiring(&self, params: &$params, inputs: &[ConnectedInput<'_>]) -> Vec<(&'static str, Error)> {
                rl::check_wiring(params.objective, inputs)
            }

            fn scaling(&self, params: &$params, size: &dyn Fn(&str) -> Option<f64>) -> Option<Scaling> {
                rl::scaling(&params.clone().into(), size)
            }

            fn forecast(&self, params: &$params, inputs: &dyn Fn(&str) -> Vec<Value>) -> Forecast {
                rl::forecast(&params.clone().into(), inputs)
            }

            fn run(&self, params: $params, ctx: &mut Context) -> Result<()> {
                rl::run(&params.into(), ctx)
            }
        }
    };
}

mod grpo;
mod ppo;
mod rloo;

pub use grpo::Grpo;
pub use ppo::Ppo;
pub use rloo::Rloo;
