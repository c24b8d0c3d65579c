//! How good the labels are, as far as the annotator's own answers tell: does it agree with itself, does it prefer a place?

use std::collections::BTreeMap;

use engine::context::Context;

use super::cache::Kept;
use super::document::{Purpose, Shown};
use super::reply::Reply;
use crate::annotate::agreement::measure::Tally;
use crate::types::Side;

/// Notes a share with its interval; nothing where nothing was counted.
fn tell(tally: Tally, name: &str, ctx: &mut Context) {
    if let Some(share) = tally.share() {
        ctx.metric(name, share.share);
        ctx.metric(format!("{name}_low"), share.low);
        ctx.metric(format!("{name}_high"), share.high);
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
        let mut all = Tally::default();
        self.slots.values().for_each(|tally| all.add(tally.yes, tally.of));
        tell(all, "first_shown_share", ctx);
        for (slot, tally) in &self.slots {
            tell(*tally, &format!("first_shown_share_slot_{}", slot + 1), ctx);
        }
        tell(self.swapped, "swap_consistency", ctx);
        tell(self.repeated, "repeat_consistency", ctx);
    }
}
