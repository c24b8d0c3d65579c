//! Quality of labels as measured by the annotator's own answers: self-agreement and position bias.

use std::collections::BTreeMap;

use engine::context::Context;

use super::answer_log::Kept;
use super::document::{Purpose, Shown};
use super::reply::Reply;
use crate::labels::agreement::Tally;
use crate::types::Side;

/// Records a share with its interval; nothing if there are no observations.
pub fn report(tally: Tally, name: &str, ctx: &mut Context) {
    if let Some(share) = tally.share() {
        ctx.metric(name, share.share);
        ctx.metric(format!("{name}_low"), share.low);
        ctx.metric(format!("{name}_high"), share.high);
    }
}

#[derive(Debug, Default)]
pub struct Quality {
    /// Labels for the summary shown first, by the slot of the document in its request.
    slots: BTreeMap<usize, Tally>,
    /// Pairs asked in both orders: whether both answers choose the same summary.
    swapped: Tally,
    /// Pairs asked twice in the same order.
    repeated: Tally,
}

impl Quality {
    /// Adds a label of the table.
    pub fn label(&mut self, place: u8, slot: usize) {
        self.slots.entry(slot).or_default().count(place == 1);
    }

    /// Adds another answer about a pair labelled `chosen`; an answer without a label is ignored.
    pub fn again(&mut self, chosen: Side, purpose: Purpose, shown: Shown, kept: Kept) {
        let Reply::Label(place) = kept.reply else { return };
        let same = shown.side(place) == chosen;
        match purpose {
            Purpose::Label => {}
            Purpose::Swap => self.swapped.count(same),
            Purpose::Repeat => self.repeated.count(same),
        }
    }

    /// Records each share with its 95% interval, if it has observations.
    pub fn report(&self, ctx: &mut Context) {
        let mut all = Tally::default();
        self.slots.values().for_each(|tally| all.add(tally.yes, tally.of));
        report(all, "first_shown_share", ctx);
        for (slot, tally) in &self.slots {
            report(*tally, &format!("first_shown_share_slot_{}", slot + 1), ctx);
        }
        report(self.swapped, "swap_consistency", ctx);
        report(self.repeated, "repeat_consistency", ctx);
    }
}
