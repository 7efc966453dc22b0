//! What was used beyond an amount, and is carried into later periods.
//!
//! Debt is what was charged when nothing was left, not what stands above the amount: an amount that is lowered within a
//! period leaves what was used before as it was counted. So overuse is noted when it happens, on a level of its own beside
//! the period's. Buckets need none of this: their one level goes on.

use std::sync::atomic::Ordering;

use super::{At, Levels, Moment, Query, Refused, Shelf, Taken, key_of};
use crate::quota::{
    calendar::Period,
    identity::mix,
    table::{BY_WORD, FOREVER, Place, WHILE_ANY},
    window::{Slide, Standing, Window},
};

/// Periods that a debt is looked for in, back from the present one.
const DEBT_PERIODS_MAX: u64 = 32;

/// How long a level stays after the last moment at which it counts, nanoseconds: requests that have just looked it up
/// are done with it by then.
const GRACE_NS: u64 = 10_000_000_000;

/// Mixed with a period's key it makes that of its overuse.
const OVERUSE: u64 = 7;

/// When the present period ends, by the limits' clock, and how long one is; nanoseconds.
#[derive(Debug, Clone, Copy)]
struct Span {
    ends_ns: u64,
    length_ns: u64,
}

impl Span {
    /// Until when levels of the period are to be known: one period more, so that a debt and a clock that was set back find
    /// them, and as many as it takes to pay a debt.
    fn until_ns(self, amount: u64, debt: u64) -> u64 {
        let periods = (debt / amount.max(1) + 1).min(DEBT_PERIODS_MAX);
        self.ends_ns
            .saturating_add(periods.saturating_mul(self.length_ns))
            .saturating_add(GRACE_NS)
            .min(FOREVER - 1)
    }
}

impl Levels {
    /// What a new level begins with: its value, which is the debt of the periods before, and its end.
    pub(super) fn begin(
        &self,
        query: &Query<'_>,
        shelf: Shelf,
        id: u64,
        period: Option<Period>,
        now: Moment,
    ) -> (u64, u64) {
        let (span, debt) = match query.window {
            Window::Bucket { .. } => return (0, BY_WORD),
            Window::Never => return (0, FOREVER),
            Window::Parallel => return (0, WHILE_ANY),
            Window::Sliding { ns } => {
                let slide = Slide::at(*ns, now.steady_ns);
                let before = (1..=slide.number).map(|back| mix(id, slide.number - back));
                (span_of_slide(*ns, now), self.carried(query, shelf, before))
            }
            Window::Calendar(calendar) => {
                let Some(period) = period else { return (0, FOREVER) };
                let mut last = period;
                let before = std::iter::repeat_with(|| {
                    last = calendar.before(last);
                    mix(id, last.start_ms)
                });
                (span_of_period(period, now), self.carried(query, shelf, before))
            }
        };
        let until_ns = span.until_ns(query.amount, debt);
        if debt > query.amount {
            // The part that this period cannot pay is overuse of this one too. Whoever begins it at the same time notes the
            // same.
            let (key, _) = key_of(query, id, now);
            if let Some((shelf, place)) = self.overuse_place(shelf, key, until_ns, now) {
                let noted = self.shelf(shelf).value(place);
                noted.fetch_max(debt - query.amount, Ordering::AcqRel);
            }
        }
        (debt, until_ns)
    }

    /// What the periods before, the latest first, leave to a new one.
    fn carried(&self, query: &Query<'_>, shelf: Shelf, before: impl Iterator<Item = u64>) -> u64 {
        let mut before = before.take(DEBT_PERIODS_MAX as usize).zip(0u64..);
        let found = before.find_map(|(key, unused_between)| {
            let value = self.value_of(shelf, key);
            (value > 0).then(|| (self.debt(query, shelf, key, value), unused_between))
        });
        let (debt, unused_between) = found.unwrap_or_default();
        debt.saturating_sub(query.amount.saturating_mul(unused_between))
    }

    /// The part of a period's value that is debt. What is above the amount and was not charged beyond it was used under a
    /// greater amount; what was charged and is not above it any more, reservations that came back have made room for.
    fn debt(&self, query: &Query<'_>, shelf: Shelf, key: u64, value: u64) -> u64 {
        let above = value.saturating_sub(query.amount);
        if above == 0 {
            return 0;
        }
        let key = mix(key, OVERUSE);
        let mut noted = self.value_of(shelf, key);
        if shelf != Shelf::Overflow {
            noted = noted.saturating_add(self.value_of(Shelf::Overflow, key));
        }
        above.min(noted)
    }

    /// Notes what of a charge was above the amount.
    pub(super) fn note_overuse(&self, query: &Query<'_>, taken: &Taken, units: u64, now: Moment) {
        let span = match query.window {
            Window::Sliding { ns } => span_of_slide(*ns, now),
            Window::Calendar(calendar) => span_of_period(calendar.period(now.unix_ms), now),
            Window::Bucket { .. } | Window::Never | Window::Parallel => return,
        };
        let table = self.shelf(taken.shelf);
        // Others may have taken from it since: then some more is noted, and of no consequence while the amount stays.
        let value = table.value(taken.place).load(Ordering::Relaxed);
        let above = value.saturating_sub(query.amount);
        if above == 0 {
            return;
        }
        let until_ns = span.until_ns(query.amount, above);
        table.until(taken.place).fetch_max(until_ns, Ordering::AcqRel);
        let place = self.overuse_place(taken.shelf, taken.place.key(), until_ns, now);
        if let Some((shelf, place)) = place {
            self.shelf(shelf)
                .value(place)
                .fetch_add(above.min(units), Ordering::AcqRel);
        }
    }

    /// Where the overuse of a period is noted: beside it, or with the overflow where there is no place.
    fn overuse_place(&self, shelf: Shelf, key: u64, until_ns: u64, now: Moment) -> Option<(Shelf, Place)> {
        let key = mix(key, OVERUSE);
        let found = [shelf, Shelf::Overflow].into_iter().find_map(|shelf| {
            let place = self
                .shelf(shelf)
                .find_or_insert(key, now.steady_ns, || (0, until_ns));
            Some((shelf, place.ok()?))
        });
        match found {
            Some((shelf, place)) => {
                self.shelf(shelf)
                    .until(place)
                    .fetch_max(until_ns, Ordering::AcqRel);
            }
            None => drop(self.overflowed.fetch_add(1, Ordering::Relaxed)),
        }
        found
    }

    /// A refusal for want of units: how the level stands, and for how long debt keeps it from granting.
    #[cold]
    pub(super) fn refusal(
        &self,
        at: &At,
        query: &Query<'_>,
        shelf: Shelf,
        (value, asked): (u64, u64),
        standing: Standing,
        now: Moment,
    ) -> Refused {
        let is_of_periods = matches!(query.window, Window::Sliding { .. } | Window::Calendar(_));
        Refused::Exhausted(match is_of_periods {
            true => {
                let debt = self.debt(query, shelf, at.place.key(), value);
                at.standing(query, value, asked, debt, now)
            }
            false => standing,
        })
    }
}

fn span_of_slide(ns: u64, now: Moment) -> Span {
    let slide = Slide::at(ns, now.steady_ns);
    Span {
        ends_ns: now.steady_ns.saturating_add(ns - slide.over_ns),
        length_ns: ns,
    }
}

fn span_of_period(period: Period, now: Moment) -> Span {
    let left_ms = period.end_ms.saturating_sub(now.unix_ms);
    Span {
        ends_ns: now.steady_ns.saturating_add(left_ms * 1_000_000),
        length_ns: (period.end_ms - period.start_ms) * 1_000_000,
    }
}
