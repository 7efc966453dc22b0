//! For how many events a gathering wait is worth going on.

/// Fewer do not end a wait: with so many the wake-up's share in an event's cost is small.
const EVENTS_MIN: u32 = 8;

/// So many end every wait: more would not be cheaper, and the buffers must suffice for them.
const EVENTS_MAX: u32 = 128;

/// A busy core waits for about what comes in this time, nanoseconds: longer would save little.
const SHARE_NS: u64 = 800_000;

/// How long events are counted for one estimate of their rate, nanoseconds.
const COUNT_NS: u64 = 10_000_000;

/// How many events end a gathering wait. Few where many come: then the wait is over soon, and each event is delayed less.
/// Where few come, its time ends it.
#[derive(Debug)]
pub struct Enough {
    began_ns: u64,
    events: u64,
    enough: u32,
}

impl Default for Enough {
    fn default() -> Enough {
        Enough {
            began_ns: 0,
            events: 0,
            enough: EVENTS_MIN,
        }
    }
}

impl Enough {
    /// An event has come.
    pub fn count(&mut self) {
        self.events += 1;
    }

    /// How many are enough for the wait that begins at `now_ns`.
    pub fn at(&mut self, now_ns: u64) -> u32 {
        let counted_ns = now_ns.saturating_sub(self.began_ns);
        if counted_ns >= COUNT_NS {
            let share = self.events.saturating_mul(SHARE_NS) / counted_ns;
            self.enough = u32::try_from(share)
                .unwrap_or(EVENTS_MAX)
                .clamp(EVENTS_MIN, EVENTS_MAX);
            (self.began_ns, self.events) = (now_ns, 0);
        }
        self.enough
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is enough after events have come at `rate` a second for a while.
    fn enough_at(rate: u64) -> u32 {
        let (mut enough, mut now_ns, mut wanted) = (Enough::default(), 1_000_000_000, 0);
        for _ in 0..rate {
            enough.count();
            now_ns += 1_000_000_000 / rate;
            wanted = enough.at(now_ns);
        }
        wanted
    }

    #[test]
    fn what_comes_in_a_short_time_is_enough() {
        assert_eq!(enough_at(100), EVENTS_MIN);
        assert_eq!(enough_at(9_000), EVENTS_MIN);
        assert_eq!(enough_at(50_000), 40);
        assert_eq!(enough_at(1_000_000), EVENTS_MAX);
    }

    #[test]
    fn a_quiet_time_ends_a_busy_one() {
        let mut enough = Enough::default();
        (0..10_000).for_each(|_| enough.count());
        assert_eq!(enough.at(COUNT_NS), EVENTS_MAX);
        assert_eq!(
            enough.at(COUNT_NS + 1),
            EVENTS_MAX,
            "too soon for another estimate"
        );
        assert_eq!(enough.at(3 * COUNT_NS), EVENTS_MIN);
        // A clock that stands still or goes back is no harm.
        assert_eq!(enough.at(0), EVENTS_MIN);
    }
}
