//! A hashed timer wheel: arming and firing cost a few nanoseconds and allocate nothing once warm.
//!
//! Entries are never cancelled: each carries a sequence number, and the owner ignores one that is no longer the number
//! it waits for.

/// Length of a tick in nanoseconds: about what the kernel lets timers be late (`PR_SET_TIMERSLACK`, 50 µs). Ticks of a
/// millisecond would send the tokens of independent streams at the same moments, and a server would wake once for many.
pub const TICK_NS: u64 = 1 << 16;
/// Slots of the wheel (a power of two): timers further away than this many ticks, 4.3 s, go round more than once.
const SLOTS: usize = 1 << 16;

/// A timer that has fired.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fired {
    /// Index of the owner, as given to [`Wheel::arm`].
    pub owner: usize,
    /// The number that [`Wheel::arm`] returned.
    pub sequence: u64,
}

struct Entry {
    tick: u64,
    fired: Fired,
}

/// Timers of one event loop. Times are nanoseconds since that loop's own epoch.
pub struct Wheel {
    slots: Vec<Vec<Entry>>,
    /// One bit a slot: set where the slot has entries, so that the next one is found without looking at each.
    occupied: Box<[u64]>,
    /// All ticks up to and including this one have fired.
    done_tick: u64,
    next_sequence: u64,
    armed: usize,
}

impl Wheel {
    pub fn new() -> Self {
        Self {
            slots: (0..SLOTS).map(|_| Vec::new()).collect(),
            occupied: vec![0; SLOTS / 64].into(),
            done_tick: 0,
            next_sequence: 0,
            armed: 0,
        }
    }

    /// Arms a timer for `at_ns` (rounded up to a tick; a time that has passed fires at the next tick). The number
    /// returned is never 0 and never used twice.
    pub fn arm(&mut self, at_ns: u64, owner: usize) -> u64 {
        let tick = at_ns.div_ceil(TICK_NS).max(self.done_tick + 1);
        let slot = tick as usize % SLOTS;
        self.next_sequence += 1;
        let fired = Fired {
            owner,
            sequence: self.next_sequence,
        };
        self.slots[slot].push(Entry { tick, fired });
        self.occupied[slot / 64] |= 1 << (slot % 64);
        self.armed += 1;
        self.next_sequence
    }

    /// Moves all timers due at `now_ns` into `fired`, which is not cleared first.
    pub fn expire(&mut self, now_ns: u64, fired: &mut Vec<Fired>) {
        let now_tick = now_ns / TICK_NS;
        if now_tick <= self.done_tick {
            return;
        }
        // After a long sleep one round over the wheel sees every slot.
        let first = self.done_tick + 1;
        let span = (now_tick - self.done_tick).min(SLOTS as u64);
        self.done_tick = now_tick;
        if self.armed == 0 {
            return;
        }
        for tick in first..first + span {
            self.expire_slot(tick as usize % SLOTS, now_tick, fired);
        }
    }

    fn expire_slot(&mut self, slot: usize, now_tick: u64, fired: &mut Vec<Fired>) {
        let bit = 1_u64 << (slot % 64);
        if self.occupied[slot / 64] & bit == 0 {
            return;
        }
        let entries = &mut self.slots[slot];
        let before = entries.len();
        entries.retain(|entry| {
            let due = entry.tick <= now_tick;
            if due {
                fired.push(entry.fired);
            }
            !due
        });
        self.armed -= before - entries.len();
        if entries.is_empty() {
            self.occupied[slot / 64] &= !bit;
        }
    }

    /// Nanoseconds from `now_ns` to the next slot with timers (which may hold only timers of a later round), or `None`.
    pub fn next_in_ns(&self, now_ns: u64) -> Option<u64> {
        if self.armed == 0 {
            return None;
        }
        let first = (self.done_tick + 1) as usize % SLOTS;
        let ahead = self.slots_to_next_occupied(first)?;
        let at_ns = (self.done_tick + 1 + ahead as u64) * TICK_NS;
        Some(at_ns.saturating_sub(now_ns))
    }

    fn slots_to_next_occupied(&self, first: usize) -> Option<usize> {
        let words = self.occupied.len();
        let head = self.occupied[first / 64] & (u64::MAX << (first % 64));
        if head != 0 {
            return Some(head.trailing_zeros() as usize - first % 64);
        }
        // The first word is looked at again at the end, for its bits below `first`.
        for step in 1..=words {
            let word = self.occupied[(first / 64 + step) % words];
            if word != 0 {
                return Some(step * 64 + word.trailing_zeros() as usize - first % 64);
            }
        }
        None
    }
}

impl Default for Wheel {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn owners(wheel: &mut Wheel, now_ns: u64) -> Vec<usize> {
        let mut fired = Vec::new();
        wheel.expire(now_ns, &mut fired);
        fired.iter().map(|timer| timer.owner).collect()
    }

    #[test]
    fn fires_at_its_tick_and_not_before() {
        let mut wheel = Wheel::new();
        wheel.arm(5 * TICK_NS, 7);
        assert_eq!(wheel.next_in_ns(0), Some(5 * TICK_NS));
        assert!(owners(&mut wheel, 5 * TICK_NS - 1).is_empty());
        assert_eq!(owners(&mut wheel, 5 * TICK_NS), [7]);
        assert_eq!(wheel.next_in_ns(5 * TICK_NS), None);
    }

    #[test]
    fn timers_beyond_one_round_wait_their_turn() {
        let mut wheel = Wheel::new();
        let far = (SLOTS as u64 * 2 + 3) * TICK_NS;
        wheel.arm(far, 1);
        let mut now_ns = 0;
        loop {
            let wait_ns = wheel.next_in_ns(now_ns).expect("the timer is armed");
            now_ns += wait_ns;
            let fired = owners(&mut wheel, now_ns);
            if !fired.is_empty() {
                break;
            }
        }
        assert_eq!(now_ns, far);
    }

    #[test]
    fn a_long_sleep_fires_everything_once() {
        let mut wheel = Wheel::new();
        for owner in 0..100_000 {
            wheel.arm(owner as u64 * TICK_NS, owner);
        }
        let mut fired = owners(&mut wheel, 200_000 * TICK_NS);
        fired.sort_unstable();
        assert_eq!(fired, (0..100_000).collect::<Vec<_>>());
        assert_eq!(wheel.next_in_ns(200_000 * TICK_NS), None);
    }

    #[test]
    fn a_past_time_fires_at_the_next_tick() {
        let mut wheel = Wheel::new();
        assert!(owners(&mut wheel, 100 * TICK_NS).is_empty());
        wheel.arm(3, 9);
        assert_eq!(wheel.next_in_ns(100 * TICK_NS), Some(TICK_NS));
        assert_eq!(owners(&mut wheel, 101 * TICK_NS), [9]);
    }
}
