//! One limit's state: a single atomic word, the theoretical arrival time of the generic cell rate algorithm
//! (ITU-T I.371, annex A), here counted in nanoseconds of "time that is used up".
//!
//! A limit of `amount` units every `window` gives each unit the cost `window / amount`. The word holds the
//! moment at which everything reserved so far has been earned back. It may run ahead of now by one window:
//! that is the burst. Settling moves it back or forth by the difference, so overuse is debt that
//! time pays off. Nothing is checked before it is taken: a reservation is one compare-and-swap.

use std::sync::atomic::{AtomicU64, Ordering};

/// The state of one limit for one consumer. 8 bytes; shared by all cores.
#[derive(Debug, Default)]
pub struct Level(AtomicU64);

/// How much may be used, and in what time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rate {
    /// Units in a window; at least 1.
    pub amount: u64,
    /// Length of the window, nanoseconds; from one second to 30 days.
    pub window_ns: u64,
}

/// What a level says after a reservation or a refusal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Standing {
    /// Units that may be used at once now.
    pub remaining: u64,
    /// Until nothing is used up any more, nanoseconds.
    pub reset_ns: u64,
    /// Until the refused amount fits, nanoseconds; 0 when it was granted.
    pub retry_after_ns: u64,
}

impl Rate {
    /// Time that `units` use up, nanoseconds, rounded up.
    fn cost_ns(&self, units: u64) -> u64 {
        let cost = (u128::from(units) * u128::from(self.window_ns)).div_ceil(u128::from(self.amount));
        // A century: more than any reservation may cost and far from overflow.
        cost.min(1 << 61) as u64
    }

    fn standing(&self, arrival_ns: u64, now_ns: u64) -> Standing {
        let used_ns = arrival_ns.saturating_sub(now_ns);
        let free_ns = self.window_ns.saturating_sub(used_ns);
        let remaining = u128::from(free_ns) * u128::from(self.amount) / u128::from(self.window_ns);
        Standing {
            remaining: remaining as u64,
            reset_ns: used_ns,
            retry_after_ns: 0,
        }
    }
}

impl Level {
    /// Takes `units` at once or not at all.
    pub fn reserve(&self, rate: &Rate, units: u64, now_ns: u64) -> Result<Standing, Standing> {
        let cost_ns = rate.cost_ns(units);
        let limit_ns = now_ns + rate.window_ns;
        let mut arrival_ns = self.0.load(Ordering::Relaxed);
        loop {
            let after_ns = arrival_ns.max(now_ns).saturating_add(cost_ns);
            if after_ns > limit_ns {
                let mut standing = rate.standing(arrival_ns, now_ns);
                standing.retry_after_ns = after_ns - limit_ns;
                return Err(standing);
            }
            // Relaxed is enough: the word guards no other memory, and the swap itself is the check.
            match self
                .0
                .compare_exchange_weak(arrival_ns, after_ns, Ordering::Relaxed, Ordering::Relaxed)
            {
                Ok(_) => return Ok(rate.standing(after_ns, now_ns)),
                Err(seen) => arrival_ns = seen,
            }
        }
    }

    /// Trues up a reservation of `reserved` units that turned out as `used`. What was used beyond it is taken
    /// although there may be no room: it is debt.
    ///
    /// `until_ns` is when the reservation will have been earned back: what its [`Standing::reset_ns`] said, from the
    /// moment it was made. Time that is over by then has been given back already; to give it back again would let
    /// whoever reserves much and uses little save up many windows.
    pub fn settle(&self, rate: &Rate, reserved: u64, used: u64, until_ns: u64, now_ns: u64) {
        if used > reserved {
            let more_ns = rate.cost_ns(used).saturating_sub(rate.cost_ns(reserved));
            let mut arrival_ns = self.0.load(Ordering::Relaxed);
            loop {
                let after_ns = arrival_ns.max(now_ns).saturating_add(more_ns);
                match self
                    .0
                    .compare_exchange_weak(arrival_ns, after_ns, Ordering::Relaxed, Ordering::Relaxed)
                {
                    Ok(_) => return,
                    Err(seen) => arrival_ns = seen,
                }
            }
        }
        // Below "now" the level is simply empty, and the same amount was added before: it cannot wrap.
        let unused_ns = rate.cost_ns(reserved) - rate.cost_ns(used);
        let less_ns = unused_ns.min(until_ns.saturating_sub(now_ns));
        self.0.fetch_sub(less_ns, Ordering::Relaxed);
    }

    /// How the level stands without taking anything.
    pub fn standing(&self, rate: &Rate, now_ns: u64) -> Standing {
        rate.standing(self.0.load(Ordering::Relaxed), now_ns)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicU64 as Count;

    const MINUTE: u64 = 60_000_000_000;
    const NOW: u64 = 1_000 * MINUTE;

    #[test]
    fn grants_the_burst_then_refuses_then_earns_back() {
        let (level, rate) = (
            Level::default(),
            Rate {
                amount: 10,
                window_ns: MINUTE,
            },
        );
        for left in (0..10).rev() {
            assert_eq!(level.reserve(&rate, 1, NOW).expect("room").remaining, left);
        }
        let refused = level.reserve(&rate, 1, NOW).expect_err("empty");
        assert_eq!(
            (refused.remaining, refused.retry_after_ns, refused.reset_ns),
            (0, MINUTE / 10, MINUTE)
        );
        assert!(level.reserve(&rate, 1, NOW + MINUTE / 10).is_ok());
        assert!(level.reserve(&rate, 1, NOW + MINUTE / 10).is_err());
        assert!(level.reserve(&rate, 10, NOW + 3 * MINUTE).is_ok());
    }

    #[test]
    fn settles_both_ways() {
        let (level, rate) = (
            Level::default(),
            Rate {
                amount: 100,
                window_ns: MINUTE,
            },
        );
        level.reserve(&rate, 80, NOW).expect("room");
        level.settle(&rate, 80, 30, NOW + MINUTE, NOW);
        assert_eq!(level.standing(&rate, NOW).remaining, 70);
        level.reserve(&rate, 10, NOW).expect("room");
        level.settle(&rate, 10, 260, NOW + MINUTE, NOW);
        // 30 + 260 used of 100: 190 in debt, so a whole window later 90 still are.
        assert!(level.reserve(&rate, 1, NOW + MINUTE).is_err());
        let refused = level.reserve(&rate, 1, NOW).expect_err("debt");
        assert_eq!(refused.retry_after_ns, MINUTE / 100 * 191);
        assert!(level.reserve(&rate, 1, NOW + refused.retry_after_ns).is_ok());
    }

    #[test]
    fn what_time_gave_back_is_not_given_back_again() {
        let (level, rate) = (
            Level::default(),
            Rate {
                amount: 1_000,
                window_ns: MINUTE,
            },
        );
        // Ten long streams that reserve a whole window each and use nearly nothing.
        let until: Vec<u64> = (0..10)
            .map(|n| {
                let now_ns = NOW + n * MINUTE;
                now_ns + level.reserve(&rate, 1_000, now_ns).expect("room").reset_ns
            })
            .collect();
        let now_ns = NOW + 10 * MINUTE;
        level.reserve(&rate, 1_000, now_ns).expect("room");
        for until_ns in until {
            level.settle(&rate, 1_000, 10, until_ns, now_ns);
        }
        assert_eq!(level.standing(&rate, now_ns).remaining, 0);
        assert!(level.reserve(&rate, 100, now_ns).is_err());
    }

    #[test]
    fn many_threads_never_take_more_than_there_is() {
        let (level, rate) = (
            Level::default(),
            Rate {
                amount: 10_000,
                window_ns: MINUTE,
            },
        );
        let granted = Count::new(0);
        std::thread::scope(|scope| {
            for thread in 0..64_u64 {
                let (level, granted) = (&level, &granted);
                scope.spawn(move || {
                    for round in 0..2_000_u64 {
                        let units = 1 + (thread + round) % 7;
                        if level.reserve(&rate, units, NOW).is_err() {
                            continue;
                        }
                        // Half give a part back; it may be taken again.
                        let used = if round % 2 == 0 { units } else { units - 1 };
                        level.settle(&rate, units, used, NOW + MINUTE, NOW);
                        granted.fetch_add(used, Ordering::Relaxed);
                    }
                });
            }
        });
        let granted = granted.into_inner();
        assert!(granted <= 10_000, "{granted}");
        // All threads kept asking until nothing was left.
        assert!(granted > 9_990, "{granted}");
        assert_eq!(level.standing(&rate, NOW).remaining, 10_000 - granted);
    }
}
