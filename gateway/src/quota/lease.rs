//! What this host may use of a level that several hosts share.
//!
//! The shared store holds the level's true state. The control thread (`control/cluster/`) leases slices of it ahead of
//! need, so that a request is admitted against memory of this host and never waits for the network.
//!
//! All counts are cumulative since the process began: `spent` is what was used, `taken` is that and what running
//! requests hold, `allowance` is how far `taken` may go. A request is admitted when `taken + n ≤ allowance` and the lease
//! has not run out. Reports name cumulative counts too, so that a report which arrives twice counts once.
//!
//! The allowance is raised by grants and lowered when unused units are handed back. A core that admits and the control
//! thread that lowers look at each other's word after they wrote their own (both sequentially consistent), so at least
//! one of them sees the other: what was handed back is never used as well.

use std::sync::atomic::{
    AtomicBool, AtomicU64,
    Ordering::{Relaxed, SeqCst},
};

/// When a refusal is only for want of a lease, the next one may be there after this time, nanoseconds: some rounds of
/// the control thread.
const NEXT_LEASE_NS: u64 = 100_000_000;

/// How a level forgets what was used.
///
/// A bucket counts reserved units as used at once, and time earns them back while the request still runs. All others
/// hold them until the request is settled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Steadily, the whole amount within the window.
    Bucket { window_ns: u64 },
    /// Each unit a window after it was used, rounded up to a sixteenth of the window.
    Sliding { window_ns: u64 },
    /// All at the period's end, but for what was used beyond the amount. Each period has a `Leased` of its own, and the
    /// store one level for all of them, which it keeps for some more lengths of a period.
    Period { end_unix_ms: u64, length_ms: u64 },
    /// Never: prepaid credit.
    Credit,
    /// Nothing is used, only held: parallel requests.
    Parallel,
}

/// What may be used before the store has answered for the first time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Opening {
    /// Units. 0 refuses until there is a lease. With more than 0, the first request is admitted whatever its size, up to
    /// the whole amount.
    pub units: u64,
    /// Until when, by [`crate::net::clock::monotonic_ns`].
    pub until_ns: u64,
}

/// This host's part of one shared level: atomics alone, shared by all cores and the control thread.
#[derive(Debug)]
pub struct Leased {
    id: u64,
    kind: Kind,
    amount: AtomicU64,
    /// It refuses what does not fit; otherwise it only counts, and has no debt.
    hard: AtomicBool,
    taken: AtomicU64,
    spent: AtomicU64,
    /// Of a bucket: what all requests reserved, and what those of them that have ended had reserved. Between the two is
    /// what counts in `spent` and may come back.
    reserved: AtomicU64,
    released: AtomicU64,
    allowance: AtomicU64,
    valid_until_ns: AtomicU64,
    /// A grant has replaced the opening.
    answered: AtomicBool,
    opens: bool,
    /// Taken out of the directory: nothing more is admitted by it, running requests still settle.
    retired: AtomicBool,
    /// The largest request refused for want of units since the control thread last looked.
    wanted: AtomicU64,
    /// The largest request admitted since the control thread last looked.
    largest: AtomicU64,
    /// Units that no host has, as the store last said.
    free: AtomicU64,
    /// Units that all hosts have used, as the store last said.
    used: AtomicU64,
    /// When the level will be unused (bucket) or begins anew, as the store last said; monotonic nanoseconds.
    reset_at_ns: AtomicU64,
    /// When time will have given back what was used of a bucket for good, as the store last said; monotonic nanoseconds.
    settled_at_ns: AtomicU64,
}

/// How the level stands, as far as this host knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LeaseStanding {
    /// Units left: of this host's lease and those that no host has.
    pub remaining: u64,
    /// Units left of this host's lease: what can be had at once.
    pub spare: u64,
    /// Until nothing of it is used any more, nanoseconds.
    pub reset_ns: u64,
    /// The earliest moment by which time alone may have given back what was taken, monotonic nanoseconds: for
    /// [`Leased::settle`].
    pub until_ns: u64,
    /// Until asking again makes sense, nanoseconds; 0 when it was granted.
    pub retry_after_ns: u64,
    /// Refused because the lease has run out: the store is out of reach, whatever is left.
    pub stale: bool,
}

/// What the control thread sees when it looks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Look {
    /// Used, and held by running requests; cumulative.
    pub taken: u64,
    /// Used; cumulative, less what buckets were given back.
    pub spent: u64,
    /// Of a bucket: what of `spent` may come back, or a little more.
    pub held: u64,
    /// How far `taken` may go.
    pub allowance: u64,
    /// The largest request refused since the last look; 0: none. It is the signal of hunger.
    pub wanted: u64,
    /// The largest request admitted since the last look.
    pub largest: u64,
}

/// A lease as the control thread has it from the store.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Grant {
    /// How far `taken` may go; cumulative.
    pub allowance: u64,
    /// Until when, monotonic nanoseconds. Earlier than the store lets others have it.
    pub until_ns: u64,
    /// Units that no host has.
    pub free: u64,
    /// Units that all hosts have used.
    pub used: u64,
    /// When the level will be unused or begins anew, monotonic nanoseconds.
    pub reset_at_ns: u64,
    /// When time will have given back what all hosts used for good of a bucket, monotonic nanoseconds; rather early.
    pub settled_at_ns: u64,
}

impl Leased {
    /// A level of `amount` units that this host meets for the first time. `id` is the policy and the subject.
    pub fn new(id: u64, kind: Kind, amount: u64, opening: Opening) -> Leased {
        Leased {
            id,
            kind,
            amount: AtomicU64::new(amount),
            hard: AtomicBool::new(true),
            taken: AtomicU64::new(0),
            spent: AtomicU64::new(0),
            reserved: AtomicU64::new(0),
            released: AtomicU64::new(0),
            allowance: AtomicU64::new(opening.units.min(amount)),
            valid_until_ns: AtomicU64::new(opening.until_ns),
            answered: AtomicBool::new(false),
            opens: opening.units > 0,
            retired: AtomicBool::new(false),
            wanted: AtomicU64::new(0),
            largest: AtomicU64::new(0),
            free: AtomicU64::new(amount),
            used: AtomicU64::new(0),
            reset_at_ns: AtomicU64::new(0),
            settled_at_ns: AtomicU64::new(0),
        }
    }

    /// The policy and the subject, the same on every host.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// How it forgets what was used.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// The whole amount that the hosts share.
    pub fn amount(&self) -> u64 {
        self.amount.load(Relaxed)
    }

    /// Changes the shared amount: a reload, a budget changed or topped up. The store hears it with the next report.
    pub fn set_amount(&self, amount: u64) {
        self.amount.store(amount, Relaxed);
    }

    /// Whether what was used when nothing was left is debt.
    pub fn is_hard(&self) -> bool {
        self.hard.load(Relaxed)
    }

    /// Says whether it refuses or only counts. The store hears it with the next report.
    pub fn set_hard(&self, hard: bool) {
        self.hard.store(hard, Relaxed);
    }

    /// Takes `units` at once or not at all.
    ///
    /// # Errors
    /// How the level stands when there is no room or no valid lease. The control thread is told what was wanted.
    pub fn reserve(&self, units: u64, now_ns: u64) -> Result<LeaseStanding, LeaseStanding> {
        let stale = now_ns >= self.valid_until_ns.load(Relaxed);
        if stale || !self.take(units) {
            self.wanted.fetch_max(units, Relaxed);
            return Err(self.refusal(units, now_ns, stale));
        }
        Ok(self.counted(units, now_ns))
    }

    /// What follows when units were taken.
    fn counted(&self, units: u64, now_ns: u64) -> LeaseStanding {
        if let Kind::Bucket { .. } = self.kind {
            // Held before it counts: see `look`.
            self.reserved.fetch_add(units, SeqCst);
            self.spent.fetch_add(units, SeqCst);
        }
        // Mostly it is no larger than the last, and then nothing is written.
        if units > self.largest.load(Relaxed) {
            self.largest.fetch_max(units, Relaxed);
        }
        let mut standing = self.standing(now_ns);
        if let Kind::Bucket { window_ns } = self.kind {
            let cost_ns = self.cost_ns(units, window_ns);
            standing.reset_ns = (standing.reset_ns + cost_ns).min(window_ns);
            // Time gives back what was used for good before it; what other requests hold may all come back first.
            let settled_at_ns = self.settled_at_ns.load(Relaxed).max(now_ns);
            standing.until_ns = settled_at_ns.saturating_add(cost_ns);
        }
        standing
    }

    /// Takes `units` although there may be no room: by rules that only count. It is settled as a reservation is.
    pub fn take_anyway(&self, units: u64, now_ns: u64) -> LeaseStanding {
        self.taken.fetch_add(units, SeqCst);
        self.counted(units, now_ns)
    }

    /// Units that all hosts have used: as the store last said, and at least what this host has.
    pub fn used(&self) -> u64 {
        self.used.load(Relaxed).max(self.spent.load(Relaxed))
    }

    fn take(&self, units: u64) -> bool {
        let mut taken = self.taken.load(SeqCst);
        loop {
            let after = taken.saturating_add(units);
            if !self.covers(taken, after) {
                return false;
            }
            if let Err(seen) = self.taken.compare_exchange_weak(taken, after, SeqCst, SeqCst) {
                taken = seen;
                continue;
            }
            if self.covers(taken, after) {
                return true;
            }
            // Units were handed back in between, and may be another host's by now.
            taken = self.taken.fetch_sub(units, SeqCst) - units;
        }
    }

    fn covers(&self, taken: u64, after: u64) -> bool {
        if self.retired.load(SeqCst) {
            return false;
        }
        let opening = || self.opens && taken == 0 && after <= self.amount() && !self.answered.load(SeqCst);
        after <= self.allowance.load(SeqCst) || opening()
    }

    /// Trues up a reservation that turned out as `used`. What was used beyond it is taken although there may be no room:
    /// it is debt, and the store is told of it whether there is a lease or not.
    ///
    /// `until_ns` is [`LeaseStanding::until_ns`] of the moment when it was made: what time may have given back is not given
    /// back again. Only buckets look at it.
    pub fn settle(&self, reserved: u64, used: u64, until_ns: u64, now_ns: u64) {
        // `spent` never stands above `taken`: a sum grows in `taken` first and shrinks in `spent` first.
        let over = used.saturating_sub(reserved);
        if over > 0 {
            self.taken.fetch_add(over, SeqCst);
        }
        let unused = reserved.saturating_sub(used);
        let back = match self.kind {
            Kind::Parallel => reserved.max(used),
            Kind::Sliding { .. } | Kind::Period { .. } | Kind::Credit => {
                self.spent.fetch_add(used, SeqCst);
                unused
            }
            Kind::Bucket { window_ns } => {
                let back = unused.min(self.earned_in(until_ns.saturating_sub(now_ns), window_ns));
                self.spent.fetch_add(over, SeqCst);
                self.spent.fetch_sub(back, SeqCst);
                self.released.fetch_add(reserved, SeqCst);
                back
            }
        };
        if back > 0 {
            self.taken.fetch_sub(back, SeqCst);
        }
    }

    /// How the level stands without taking anything.
    pub fn standing(&self, now_ns: u64) -> LeaseStanding {
        let spare = self
            .allowance
            .load(Relaxed)
            .saturating_sub(self.taken.load(Relaxed));
        LeaseStanding {
            remaining: spare.saturating_add(self.free.load(Relaxed)).min(self.amount()),
            spare,
            reset_ns: self.reset_ns(now_ns),
            until_ns: now_ns,
            retry_after_ns: 0,
            stale: false,
        }
    }

    fn refusal(&self, units: u64, now_ns: u64, stale: bool) -> LeaseStanding {
        let mut standing = self.standing(now_ns);
        let missing = units.saturating_sub(standing.remaining);
        standing.stale = stale;
        standing.retry_after_ns = match self.kind {
            _ if stale || missing == 0 => NEXT_LEASE_NS,
            Kind::Bucket { window_ns } => self.cost_ns(missing, window_ns).max(NEXT_LEASE_NS),
            _ => standing.reset_ns.max(NEXT_LEASE_NS),
        };
        standing
    }

    fn reset_ns(&self, now_ns: u64) -> u64 {
        let reset_ns = self.reset_at_ns.load(Relaxed).saturating_sub(now_ns);
        match self.kind {
            // What was used since the store last spoke is not in it.
            Kind::Bucket { window_ns } => reset_ns.min(window_ns),
            _ => reset_ns,
        }
    }

    /// Units that a bucket earns back in a time.
    fn earned_in(&self, time_ns: u64, window_ns: u64) -> u64 {
        let earned = u128::from(time_ns) * u128::from(self.amount()) / u128::from(window_ns.max(1));
        earned.min(u128::from(u64::MAX)) as u64
    }

    /// Time in which a bucket earns units back, rounded up.
    fn cost_ns(&self, units: u64, window_ns: u64) -> u64 {
        let cost = (u128::from(units) * u128::from(window_ns)).div_ceil(u128::from(self.amount().max(1)));
        cost.min(u128::from(u64::MAX)) as u64
    }

    /// What happened since the last look. For the control thread alone: it takes the signals of hunger away.
    pub fn look(&self) -> Look {
        // What was released before and what was reserved after: whatever happens in between counts as held.
        let released = self.released.load(SeqCst);
        // `spent` before `taken`: what is used in between is then still counted as held.
        let spent = self.spent.load(SeqCst);
        let held = self.reserved.load(SeqCst).saturating_sub(released);
        let allowance = self.allowance.load(SeqCst);
        Look {
            taken: self.taken.load(SeqCst),
            spent,
            held,
            allowance,
            wanted: self.wanted.swap(0, Relaxed),
            largest: self.largest.swap(0, Relaxed),
        }
    }

    /// Whether a request was refused for want of units since the last look: the control thread should hurry.
    pub fn is_hungry(&self) -> bool {
        self.wanted.load(Relaxed) > 0
    }

    /// Hands units back: lowers the allowance to `to`, or as far as `taken` permits. Returns how far the allowance
    /// counts now; only what lies above it may be given to others. For the control thread alone.
    pub fn lower(&self, to: u64) -> u64 {
        let to = to.min(self.allowance.load(SeqCst));
        self.allowance.store(to, SeqCst);
        self.answered.store(true, SeqCst);
        // A core that took units before it could see the store above is seen here.
        let kept = to.max(self.taken.load(SeqCst));
        self.allowance.fetch_max(kept, SeqCst);
        kept
    }

    /// Puts a lease in force. It never takes units away: [`Leased::lower`] does. For the control thread alone.
    pub fn grant(&self, grant: &Grant) {
        self.free.store(grant.free, Relaxed);
        self.used.store(grant.used, Relaxed);
        self.reset_at_ns.store(grant.reset_at_ns, Relaxed);
        self.settled_at_ns.store(grant.settled_at_ns, Relaxed);
        self.allowance.fetch_max(grant.allowance, SeqCst);
        self.answered.store(true, SeqCst);
        self.valid_until_ns.store(grant.until_ns, Relaxed);
    }

    /// Takes it out of use for good; a request that found it before it left the directory is refused and may ask again
    /// at once. Returns false, and nothing has changed, when a request holds units. For the control thread alone.
    pub fn retire(&self) -> bool {
        self.lower(0);
        self.retired.store(true, SeqCst);
        // Whoever takes from now on sees the flag and gives back.
        let held = self.taken.load(SeqCst) > self.spent.load(SeqCst);
        if held {
            self.retired.store(false, SeqCst);
        }
        !held
    }

    /// Whether it was taken out of use: the directory has or makes another.
    pub fn is_retired(&self) -> bool {
        self.retired.load(SeqCst)
    }

    /// Until when the lease is valid, monotonic nanoseconds.
    pub fn valid_until_ns(&self) -> u64 {
        self.valid_until_ns.load(Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU64 as Count;

    use super::*;

    const SECOND: u64 = 1_000_000_000;
    const MINUTE: u64 = 60 * SECOND;
    const NOW: u64 = 1_000 * MINUTE;
    const NONE: Opening = Opening {
        units: 0,
        until_ns: NOW + SECOND,
    };

    fn grant(allowance: u64) -> Grant {
        Grant {
            allowance,
            until_ns: NOW + SECOND,
            free: 0,
            used: 0,
            reset_at_ns: NOW + MINUTE,
            settled_at_ns: 0,
        }
    }

    #[test]
    fn admits_within_the_lease_and_while_it_is_valid() {
        let level = Leased::new(1, Kind::Credit, 100, NONE);
        assert!(level.reserve(1, NOW).is_err());
        level.grant(&grant(10));
        assert!(level.reserve(8, NOW).is_ok());
        let refused = level.reserve(3, NOW).expect_err("two are left");
        assert_eq!((refused.remaining, refused.stale), (2, false));
        assert_eq!(refused.retry_after_ns, MINUTE);
        assert!(level.reserve(2, NOW + SECOND).is_err_and(|refused| refused.stale));
        assert!(level.reserve(2, NOW + SECOND - 1).is_ok());
    }

    #[test]
    fn tells_what_was_wanted_once() {
        let level = Leased::new(1, Kind::Credit, 100, NONE);
        assert!(!level.is_hungry());
        let _ = level.reserve(5, NOW);
        let _ = level.reserve(7, NOW);
        assert!(level.is_hungry());
        assert_eq!(level.look().wanted, 7);
        assert_eq!(level.look().wanted, 0);
        level.grant(&grant(10));
        level.reserve(4, NOW).expect("room");
        assert_eq!(level.look().largest, 4);
    }

    #[test]
    fn an_opening_admits_one_large_request_or_several_small_ones() {
        let opening = Opening { units: 5, ..NONE };
        let level = Leased::new(1, Kind::Credit, 100, opening);
        assert!(level.reserve(101, NOW).is_err());
        assert!(level.reserve(60, NOW).is_ok());
        assert!(level.reserve(1, NOW).is_err());
        let level = Leased::new(1, Kind::Credit, 100, opening);
        for _ in 0..5 {
            assert!(level.reserve(1, NOW).is_ok());
        }
        assert!(level.reserve(1, NOW).is_err());
        let level = Leased::new(1, Kind::Credit, 100, opening);
        level.grant(&grant(6));
        assert!(
            level.reserve(7, NOW).is_err(),
            "the opening is over with the first answer"
        );
    }

    #[test]
    fn settles_both_ways_and_carries_debt() {
        let level = Leased::new(1, Kind::Credit, 100, NONE);
        level.grant(&grant(50));
        level.reserve(40, NOW).expect("room");
        assert_eq!((level.look().taken, level.look().spent), (40, 0));
        level.settle(40, 10, 0, NOW);
        assert_eq!((level.look().taken, level.look().spent), (10, 10));
        level.reserve(10, NOW).expect("room");
        level.settle(10, 90, 0, NOW + 100 * SECOND);
        let look = level.look();
        assert_eq!((look.taken, look.spent), (100, 100));
        // The store is told of 50 beyond what it granted.
        assert_eq!(level.lower(0), 100);
    }

    #[test]
    fn a_bucket_counts_at_once_and_gives_back_what_time_has_not() {
        let bucket = Kind::Bucket { window_ns: MINUTE };
        let level = Leased::new(1, bucket, 60, NONE);
        level.grant(&Grant {
            reset_at_ns: 0,
            ..grant(60)
        });
        let standing = level.reserve(30, NOW).expect("room");
        assert_eq!(standing.reset_ns, 30 * SECOND);
        assert_eq!(level.look().spent, 30);
        let until_ns = standing.until_ns;
        assert_eq!(until_ns, NOW + 30 * SECOND);
        // After ten seconds, ten units have been earned back already.
        level.settle(30, 0, until_ns, NOW + 10 * SECOND);
        assert_eq!((level.look().taken, level.look().spent), (10, 10));
        level.reserve(30, NOW).expect("room");
        level.settle(30, 20, NOW, NOW + 2 * MINUTE);
        assert_eq!((level.look().taken, level.look().spent), (40, 40));
        level.settle(0, 5, NOW, NOW);
        assert_eq!((level.look().taken, level.look().spent), (45, 45));
    }

    #[test]
    fn parallel_slots_are_held_and_come_back() {
        let level = Leased::new(1, Kind::Parallel, 4, NONE);
        level.grant(&grant(2));
        level.reserve(1, NOW).expect("room");
        level.reserve(1, NOW).expect("room");
        assert!(level.reserve(1, NOW).is_err());
        level.settle(1, 0, 0, NOW);
        assert_eq!((level.look().taken, level.look().spent), (1, 0));
        assert!(level.reserve(1, NOW).is_ok());
    }

    #[test]
    fn handing_back_keeps_what_is_taken() {
        let level = Leased::new(1, Kind::Credit, 100, NONE);
        level.grant(&grant(50));
        level.reserve(20, NOW).expect("room");
        assert_eq!(level.lower(30), 30);
        assert!(level.reserve(11, NOW).is_err());
        assert_eq!(level.lower(10), 20);
        assert_eq!(level.lower(90), 20, "never raises");
        assert!(level.reserve(1, NOW).is_err());
    }

    /// Two hosts of 32 threads; one thread moves units between them as fast as it can.
    #[test]
    fn many_threads_never_use_more_than_was_granted() {
        const AMOUNT: u64 = 20_000;
        let hosts = [(); 2].map(|()| Leased::new(1, Kind::Credit, AMOUNT, NONE));
        let (used, running) = (Count::new(0), Count::new(64));
        std::thread::scope(|scope| {
            for thread in 0..64_u64 {
                let (host, used, running) = (&hosts[thread as usize % 2], &used, &running);
                scope.spawn(move || {
                    let mut refused = 0;
                    for round in 0_u64.. {
                        let units = 1 + (thread + round) % 7;
                        if host.reserve(units, NOW).is_err() {
                            refused += 1;
                            std::thread::yield_now();
                            if refused > 2_000 || used.load(Relaxed) > AMOUNT {
                                break;
                            }
                            continue;
                        }
                        let used_units = units - round % 2;
                        used.fetch_add(used_units, Relaxed);
                        host.settle(units, used_units, 0, NOW);
                    }
                    running.fetch_sub(1, Relaxed);
                });
            }
            let mut free = AMOUNT;
            let mut granted = [0; 2];
            while running.load(Relaxed) > 0 {
                for (host, granted) in hosts.iter().zip(&mut granted) {
                    let look = host.look();
                    let kept = host.lower(look.taken + 3);
                    free += *granted - kept.min(*granted);
                    let more = free.min(20);
                    free -= more;
                    *granted = kept + more;
                    host.grant(&grant(*granted));
                }
                std::thread::yield_now();
            }
        });
        let used = used.into_inner();
        assert!(used <= AMOUNT, "{used}");
        assert!(used > AMOUNT / 2, "units were moved to who asked: {used}");
    }
}
