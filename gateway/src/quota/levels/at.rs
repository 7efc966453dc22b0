//! What units cost in a level's word, and how a level stands.

use super::{Moment, Query};
use crate::quota::{
    table::Place,
    window::{self, Slide, Standing, Window},
};

/// A level that was found, with what its window adds to it.
pub struct At {
    pub place: Place,
    /// The level of the window before.
    pub before: u64,
    pub slide: Option<Slide>,
    /// When a calendar's period ends, by the limits' clock, and how long it is.
    pub ends_ns: u64,
    pub length_ns: u64,
}

impl At {
    /// The word after `units` more, what they cost in it, and how the level stands then.
    pub fn take(
        &self,
        query: &Query<'_>,
        seen: u64,
        units: u64,
        now: Moment,
    ) -> Result<(u64, u64, Standing), Standing> {
        if let Window::Bucket { ns } = query.window {
            let cost = window::cost_ns(query.amount, *ns, units);
            let after = window::bucket_take(query.amount, *ns, seen, cost, now.steady_ns, query.hard)?;
            let standing = window::bucket_standing(query.amount, *ns, after, now.steady_ns);
            // A level below "now" is raised to it: that part is not what the units cost.
            return Ok((after, cost.min(after - seen.min(after)), standing));
        }
        let after = seen.saturating_add(units);
        let counted = after.saturating_add(self.weighed(query));
        if counted > query.amount && query.hard {
            return Err(self.standing(query, seen, units, 0, now));
        }
        Ok((after, after - seen, self.standing(query, after, 0, 0, now)))
    }

    /// What the window before adds.
    fn weighed(&self, query: &Query<'_>) -> u64 {
        match (&self.slide, query.window) {
            (Some(slide), Window::Sliding { ns }) => slide.of_before(self.before, query.amount, *ns),
            _ => 0,
        }
    }

    /// How a level stands with this value, `debt` of which is carried into later periods.
    pub fn standing(&self, query: &Query<'_>, value: u64, asked: u64, debt: u64, now: Moment) -> Standing {
        let amount = query.amount;
        match (query.window, &self.slide) {
            (Window::Bucket { ns }, _) => window::bucket_standing(amount, *ns, value, now.steady_ns),
            (Window::Sliding { ns }, Some(slide)) => {
                slide.standing(amount, *ns, self.before, value, (asked, debt))
            }
            (Window::Calendar(_), _) => {
                let reset_ns = self.ends_ns.saturating_sub(now.steady_ns);
                let debt_periods = debt / amount.max(1);
                let wait_ns = reset_ns.saturating_add(debt_periods.saturating_mul(self.length_ns));
                Standing {
                    remaining: amount.saturating_sub(value),
                    reset_ns,
                    retry_after_ns: if asked > amount.saturating_sub(value) {
                        wait_ns
                    } else {
                        0
                    },
                }
            }
            (Window::Never | Window::Parallel | Window::Sliding { .. }, _) => Standing {
                remaining: amount.saturating_sub(value),
                ..Standing::default()
            },
        }
    }
}
