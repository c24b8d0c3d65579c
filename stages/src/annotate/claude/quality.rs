//! How good the labels are, as far as the annotator's own answers tell: does it agree with itself, does it prefer a place?

use std::collections::BTreeMap;

use engine::context::Context;

use super::cache::Kept;
use super::document::{Purpose, Shown};
use super::reply::Reply;
use crate::stats;
use crate::types::Side;

#[derive(Clone, Copy, Debug, Default)]
struct Tally {
    yes: u64,
    of: u64,
}

impl Tally {
    fn count(&mut self, yes: bool) {
        self.yes += u64::from(yes);
        self.of += 1;
    }

    fn tell(self, name: &str, ctx: &mut Context) {
        if let Some(share) = stats::share(self.yes, self.of) {
            ctx.metric(name, share.mean);
            ctx.metric(format!("{name}_low"), share.low);
            ctx.metric(format!("{name}_high"), share.high);
        }
    }
}

#[derive(Debug, Default)]
pub struct Quality {
    /// Labels for the summary that was shown first: by the slot of the document in its request.
    slots: BTreeMap<usize, Tally>,
    /// Pairs asked in both orders: the same summary twice?
    swapped: Tally,
    /// Pairs asked twice in the same order.
    repeated: Tally,
}

impl Quality {
    /// A label of the table.
    pub fn label(&mut self, place: u8, slot: usize) {
        self.slots.entry(slot).or_default().count(place == 1);
    }

    /// Another answer about a pair whose label is `chosen`; one without a label says nothing.
    pub fn again(&mut self, chosen: Side, purpose: Purpose, shown: Shown, kept: Kept) {
        let Reply::Label(place) = kept.reply else { return };
        let same = shown.side(place) == chosen;
        match purpose {
            Purpose::Label => {}
            Purpose::Swap => self.swapped.count(same),
            Purpose::Repeat => self.repeated.count(same),
        }
    }

    /// Each share with its 95% interval; none where nothing was counted.
    pub fn tell(&self, ctx: &mut Context) {
        let add = |sum: Tally, tally: &Tally| Tally { yes: sum.yes + tally.yes, of: sum.of + tally.of };
        self.slots.values().fold(Tally::default(), add).tell("first_shown_share", ctx);
        for (slot, tally) in &self.slots {
            tally.tell(&format!("first_shown_share_slot_{}", slot + 1), ctx);
        }
        self.swapped.tell("swap_consistency", ctx);
        self.repeated.tell("repeat_consistency", ctx);
    }
}
