//! When the blocks of clients end: so the program can be told that nobody is blocked, without a walk over the map.

use std::collections::BTreeMap;

use gateway_common::BLOCKS_MAX;

/// Moments at which blocks end, CLOCK_MONOTONIC in nanoseconds, each with how many end then. At most [`BLOCKS_MAX`] moments, some
/// 2 MiB. The kernel may have evicted a block whose end still stands here: the program then asks in vain until that time, also
/// when all others have been lifted.
#[derive(Default)]
pub struct Ends {
    moments: BTreeMap<u64, u32>,
    /// The latest of the moments that had no place.
    beyond_ns: u64,
}

impl Ends {
    /// Takes over the ends of blocks that there are.
    pub fn new(ends: impl Iterator<Item = u64>) -> Ends {
        let mut all = Ends::default();
        for end_ns in ends {
            all.add(end_ns);
        }
        all
    }

    /// One more block ends then.
    pub fn add(&mut self, end_ns: u64) {
        let count = self.moments.entry(end_ns).or_default();
        *count = count.saturating_add(1);
        // The earliest goes: most of the time it makes no difference to the latest, which alone is asked for.
        if self.moments.len() > BLOCKS_MAX as usize
            && let Some((earliest_ns, _)) = self.moments.pop_first()
        {
            self.beyond_ns = self.beyond_ns.max(earliest_ns);
        }
    }

    /// A block that was to end then is lifted, or ends at another time.
    pub fn remove(&mut self, end_ns: u64) {
        if let Some(count) = self.moments.get_mut(&end_ns) {
            *count -= 1;
            if *count == 0 {
                self.moments.remove(&end_ns);
            }
        }
    }

    /// Forgets what is over. Each moment is looked at once, and the first that is not.
    pub fn sweep(&mut self, now_ns: u64) {
        while self
            .moments
            .first_key_value()
            .is_some_and(|(end_ns, _)| *end_ns <= now_ns)
        {
            self.moments.pop_first();
        }
    }

    /// Whether a block may hold now.
    pub fn any_after(&self, now_ns: u64) -> bool {
        let last_ns = self.moments.last_key_value().map_or(0, |(end_ns, _)| *end_ns);
        last_ns.max(self.beyond_ns) > now_ns
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_latest_that_is_left_decides() {
        let mut ends = Ends::new([10, 30, 30, 20].into_iter());
        assert!(ends.any_after(29) && !ends.any_after(30));
        ends.remove(30);
        assert!(ends.any_after(29), "two end then");
        ends.remove(30);
        assert!(ends.any_after(19) && !ends.any_after(20));
        ends.remove(77);
        ends.sweep(19);
        assert_eq!(ends.moments.len(), 1);
        ends.sweep(20);
        assert!(!ends.any_after(0));
    }

    #[test]
    fn what_has_no_place_still_counts() {
        let many = u64::from(BLOCKS_MAX);
        let mut ends = Ends::new(1..=many + 3);
        assert_eq!(ends.moments.len() as u64, many);
        for end_ns in 1..=many + 3 {
            ends.remove(end_ns);
        }
        assert!(ends.any_after(2) && !ends.any_after(3));
    }
}
