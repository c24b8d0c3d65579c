//! `annotate.claude`: a language model behind the Messages API labels pairs ([`crate::judge`]).

use engine::context::Context;
use engine::error::Result;
use engine::estimate::Estimate;
use engine::kind::{Kind, Signature};

use crate::judge::{self, Params};

pub struct Claude;

impl Kind for Claude {
    type Params = Params;

    const NAME: &'static str = "annotate.claude";
    const VERSION: u32 = 3;
    const ABOUT: &'static str = "judges pairs by a language model behind the Messages API";

    fn signature(&self, _: &Params) -> Signature {
        judge::signature()
    }

    fn check(&self, params: &Params) -> Vec<(String, String)> {
        params.faults()
    }

    fn check_files(&self, params: &Params) -> Vec<(String, String)> {
        params.file_faults()
    }

    fn check_environment(&self, _: &Params) -> Result<()> {
        judge::check_environment()
    }

    fn estimate(&self, params: &Params, ctx: &Context) -> Result<Option<Estimate>> {
        judge::estimate(params, ctx).map(Some)
    }

    fn run(&self, params: Params, ctx: &mut Context) -> Result<()> {
        judge::run(&params, ctx)
    }
}
