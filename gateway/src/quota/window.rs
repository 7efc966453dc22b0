//! How a limit forgets: what its window is, and the arithmetic of each kind. Pure functions over numbers; what is
//! stored where is in [`super::levels`].

use std::sync::Arc;

use super::calendar::Calendar;

/// In what time the amount may be used.
#[derive(Debug, Clone)]
pub enum Window {
    /// Continuously earned back: the generic cell rate algorithm (ITU-T I.371, annex A), counted in nanoseconds of
    /// "time that is used up". The whole amount is the burst.
    Bucket { ns: u64 },
    /// Any stretch of this length, by two counters: the window before counts by the share of it that the stretch still
    /// covers, as though its use had been even.
    Sliding { ns: u64 },
    /// Whole hours, days, weeks or months of a time zone.
    Calendar(Arc<Calendar>),
    /// Never given back: prepaid credit.
    Never,
    /// Given back when the request ends.
    Parallel,
}

/// What a level says after a reservation or a refusal.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Standing {
    /// Units that may be used at once now.
    pub remaining: u64,
    /// Until nothing is used up any more, nanoseconds; 0 where that is not a matter of time.
    pub reset_ns: u64,
    /// Until the refused amount fits, nanoseconds; 0 when it was granted, or when time does not help.
    pub retry_after_ns: u64,
}

/// Longest that a level may be in debt, nanoseconds: some 146 years, far from overflow.
const DEBT_NS_MAX: u64 = 1 << 62;

/// Time that `units` of `amount` a window use up, nanoseconds, rounded up.
pub fn cost_ns(amount: u64, window_ns: u64, units: u64) -> u64 {
    let cost = (u128::from(units) * u128::from(window_ns)).div_ceil(u128::from(amount.max(1)));
    // A century: more than any reservation may cost and far from overflow.
    cost.min(1 << 61) as u64
}

/// How a bucket stands whose arrival time is `arrival_ns`.
pub fn bucket_standing(amount: u64, window_ns: u64, arrival_ns: u64, now_ns: u64) -> Standing {
    let used_ns = arrival_ns.saturating_sub(now_ns);
    let free_ns = window_ns.saturating_sub(used_ns);
    let remaining = u128::from(free_ns) * u128::from(amount) / u128::from(window_ns.max(1));
    Standing {
        remaining: remaining as u64,
        reset_ns: used_ns,
        retry_after_ns: 0,
    }
}

/// The arrival time after `cost` more; `Err` where it does not fit, with how the bucket stands.
pub fn bucket_take(
    amount: u64,
    window_ns: u64,
    arrival_ns: u64,
    cost: u64,
    now_ns: u64,
    hard: bool,
) -> Result<u64, Standing> {
    let after_ns = arrival_ns.max(now_ns).saturating_add(cost);
    let limit_ns = now_ns + window_ns;
    if after_ns > limit_ns && hard {
        let mut standing = bucket_standing(amount, window_ns, arrival_ns, now_ns);
        standing.retry_after_ns = after_ns - limit_ns;
        return Err(standing);
    }
    Ok(after_ns.min(now_ns.saturating_add(DEBT_NS_MAX)))
}

/// Where a sliding window is: within which fixed window, and how far.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Slide {
    /// The fixed window's number.
    pub number: u64,
    /// How much of it is over, nanoseconds.
    pub over_ns: u64,
}

impl Slide {
    /// Where a window of this length is now.
    pub fn at(window_ns: u64, now_ns: u64) -> Slide {
        let window_ns = window_ns.max(1);
        Slide {
            number: now_ns / window_ns,
            over_ns: now_ns % window_ns,
        }
    }

    /// What counts of the window before: the share that the stretch still covers, rounded up. More than the amount is
    /// debt and has been carried over already.
    pub fn of_before(&self, before: u64, amount: u64, window_ns: u64) -> u64 {
        let covered = u128::from(window_ns - self.over_ns.min(window_ns));
        (u128::from(before.min(amount)) * covered).div_ceil(u128::from(window_ns.max(1))) as u64
    }

    /// How the window stands, and, for `asked` units that do not fit, when they will. `debt` of what is used now is carried
    /// into later windows.
    pub fn standing(
        &self,
        amount: u64,
        window_ns: u64,
        before: u64,
        now: u64,
        (asked, debt): (u64, u64),
    ) -> Standing {
        let weighed = self.of_before(before, amount, window_ns);
        let left_ns = window_ns - self.over_ns.min(window_ns);
        let remaining = amount.saturating_sub(weighed.saturating_add(now));
        let retry_after_ns = match () {
            () if asked <= remaining => 0,
            // The window before fades: wait until its rest leaves room.
            () if now.saturating_add(asked) <= amount => {
                let room = amount - now - asked;
                let before = u128::from(before.min(amount).max(1));
                let covered = u128::from(room) * u128::from(window_ns) / before;
                left_ns.saturating_sub(covered as u64)
            }
            // This window must become the one before, and fade.
            () => {
                let room = u128::from(amount.saturating_sub(asked));
                let full = u128::from(now.min(amount).max(1));
                let covered = (room * u128::from(window_ns) / full).min(u128::from(window_ns)) as u64;
                let debt_windows = debt / amount.max(1);
                left_ns
                    .saturating_add(window_ns - covered)
                    .saturating_add(window_ns.saturating_mul(debt_windows))
            }
        };
        Standing {
            remaining,
            reset_ns: if now > 0 { left_ns + window_ns } else { left_ns },
            retry_after_ns,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MINUTE: u64 = 60_000_000_000;

    #[test]
    fn a_sliding_window_fades() {
        let at = |over_ns| Slide { number: 9, over_ns };
        assert_eq!(at(0).of_before(100, 100, MINUTE), 100);
        assert_eq!(at(MINUTE / 4).of_before(100, 100, MINUTE), 75);
        assert_eq!(at(MINUTE - 1).of_before(100, 100, MINUTE), 1);
        // Debt of the window before has been carried into this one.
        assert_eq!(at(MINUTE / 2).of_before(900, 100, MINUTE), 50);
        let standing = at(MINUTE / 4).standing(100, MINUTE, 100, 5, (30, 0));
        assert_eq!((standing.remaining, standing.retry_after_ns), (20, MINUTE / 10));
    }

    proptest! {
        #[test]
        fn who_waits_as_told_fits(amount in 1u64..1_000, before in 0u64..1_500, now in 0u64..1_000,
                asked in 1u64..1_000, over in 0u64..MINUTE) {
            prop_assume!(asked <= amount && now <= amount);
            let slide = Slide { number: 5, over_ns: over };
            let standing = slide.standing(amount, MINUTE, before, now, (asked, 0));
            prop_assume!(standing.retry_after_ns > 0);
            let then = 5 * MINUTE + over + standing.retry_after_ns;
            let later = Slide::at(MINUTE, then);
            let (before, now) = match later.number {
                5 => (before, now),
                6 => (now, 0),
                _ => (0, 0),
            };
            prop_assert!(later.of_before(before, amount, MINUTE) + now + asked <= amount,
                "{standing:?} {later:?}");
        }

        #[test]
        fn a_bucket_grants_when_it_said(amount in 1u64..1_000_000, used in 0u64..2_000_000, asked in 1u64..1_000_000) {
            prop_assume!(asked <= amount);
            let now_ns = 1_000 * MINUTE;
            let arrival_ns = now_ns + cost_ns(amount, MINUTE, used);
            let cost = cost_ns(amount, MINUTE, asked);
            if let Err(standing) = bucket_take(amount, MINUTE, arrival_ns, cost, now_ns, true) {
                let later_ns = now_ns + standing.retry_after_ns;
                prop_assert!(bucket_take(amount, MINUTE, arrival_ns, cost, later_ns, true).is_ok());
            }
        }
    }
}
