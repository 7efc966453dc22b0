//! The shared levels that are in use on this host, found without locks.
//!
//! A level is found by the 64-bit identity of its policy, subject and period, which is the same on every host. The
//! directory is many small maps, each swapped whole when a level is added or leaves: readers never wait, and a writer
//! copies one small map. Only a subject's first request in a while writes.

use std::{
    collections::HashMap,
    hash::{BuildHasherDefault, Hasher},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicI64, AtomicU64, AtomicUsize, Ordering::Relaxed},
    },
};

use arc_swap::ArcSwap;

use super::lease::{Kind, Leased, Opening};
use crate::bounds::{LEASED_LEVELS_MAX, LEASED_SHARDS};

type Shard = HashMap<u64, Arc<Leased>, BuildHasherDefault<Identity>>;

/// Identities are hashes already.
#[derive(Debug, Default)]
struct Identity(u64);

impl Hasher for Identity {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write_u64(&mut self, identity: u64) {
        // The low bits chose the shard.
        self.0 = identity.rotate_left(32);
    }
    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = self.0.rotate_left(8) ^ u64::from(*byte);
        }
    }
}

/// See the module.
#[derive(Debug)]
pub struct Directory {
    shards: Box<[ArcSwap<Shard>]>,
    count: AtomicUsize,
    /// A request was refused for want of a lease: the next round should come at once.
    hungry: AtomicBool,
    /// The store is gone, and what is not leased is refused.
    closed: AtomicBool,
    /// Percent of the amount that may be used of a new level before the store has answered.
    first_share: AtomicU64,
    /// How long such an opening lasts, nanoseconds; 0: nothing may be used.
    opening_ns: AtomicU64,
    /// What to add to this host's wall clock to have the store's, milliseconds.
    offset_ms: AtomicI64,
}

/// There are as many levels as there may be, and all are in use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Full;

impl Default for Directory {
    fn default() -> Directory {
        Directory {
            shards: (0..LEASED_SHARDS).map(|_| ArcSwap::default()).collect(),
            count: AtomicUsize::new(0),
            hungry: AtomicBool::new(false),
            closed: AtomicBool::new(false),
            first_share: AtomicU64::new(0),
            opening_ns: AtomicU64::new(0),
            offset_ms: AtomicI64::new(0),
        }
    }
}

impl Directory {
    fn shard(&self, id: u64) -> &ArcSwap<Shard> {
        // Identities are hashes: their low bits are as good as any.
        &self.shards[id as usize % LEASED_SHARDS]
    }

    /// The level of a policy and subject, made where there is none yet.
    ///
    /// # Errors
    /// There is no room for another: the request must be refused, for the level cannot be counted.
    pub fn level(&self, id: u64, kind: Kind, amount: u64, now_ns: u64) -> Result<Arc<Leased>, Full> {
        self.level_within(LEASED_LEVELS_MAX, id, kind, amount, now_ns)
    }

    /// As [`Directory::level`], made only while there are fewer than `most` levels: subjects that clients choose leave
    /// room for the others.
    ///
    /// # Errors
    /// There is no room for another.
    pub fn level_within(
        &self,
        most: usize,
        id: u64,
        kind: Kind,
        amount: u64,
        now_ns: u64,
    ) -> Result<Arc<Leased>, Full> {
        let place = place(id, kind);
        let shard = self.shard(place);
        if let Some(found) = shard.load().get(&place)
            && !found.is_retired()
        {
            if found.amount() != amount {
                found.set_amount(amount);
            }
            return Ok(found.clone());
        }
        // Cores that add at the same moment may pass the bound by their number.
        if self.count.load(Relaxed) >= most {
            return Err(Full);
        }
        let made = Arc::new(Leased::new(id, kind, amount, self.opening(amount, now_ns)));
        let usable = |shard: &Shard| shard.get(&place).filter(|found| !found.is_retired()).cloned();
        // The closure runs again when another core or the control thread was faster.
        let before = shard.rcu(|shard| {
            let mut next = Shard::clone(shard);
            if usable(shard).is_none() {
                next.insert(place, made.clone());
            }
            next
        });
        if let Some(found) = usable(&before) {
            return Ok(found);
        }
        if !before.contains_key(&place) {
            self.count.fetch_add(1, Relaxed);
        }
        Ok(made)
    }

    fn opening(&self, amount: u64, now_ns: u64) -> Opening {
        let percent = u128::from(self.first_share.load(Relaxed));
        let units = (u128::from(amount) * percent).div_ceil(100) as u64;
        let lasts_ns = self.opening_ns.load(Relaxed);
        Opening {
            units: if lasts_ns == 0 { 0 } else { units },
            until_ns: now_ns.saturating_add(lasts_ns),
        }
    }

    /// Says what may be used of a level that is met for the first time. For the control thread.
    pub fn set_opening(&self, first_share_percent: u8, lasts_ns: u64) {
        self.first_share.store(u64::from(first_share_percent), Relaxed);
        self.opening_ns.store(lasts_ns, Relaxed);
    }

    /// What to add to this host's wall clock to have the store's, milliseconds: periods begin on all hosts at once.
    pub fn offset_ms(&self) -> i64 {
        self.offset_ms.load(Relaxed)
    }

    /// Sets it. For the control thread.
    pub fn set_offset_ms(&self, offset_ms: i64) {
        self.offset_ms.store(offset_ms, Relaxed);
    }

    /// Whether requests that find no lease are refused because the store is gone.
    pub fn is_closed(&self) -> bool {
        self.closed.load(Relaxed)
    }

    /// Says that the store is gone and what is not leased is refused, or that it is back. For the control thread.
    pub fn set_closed(&self, closed: bool) {
        self.closed.store(closed, Relaxed);
    }

    /// Asks for a round at once.
    pub fn hurry(&self) {
        self.hungry.store(true, Relaxed);
    }

    /// Whether a round is asked for.
    pub fn is_hurried(&self) -> bool {
        self.hungry.load(Relaxed)
    }

    /// Whether a round was asked for since the last look. For the control thread.
    pub fn take_hurry(&self) -> bool {
        self.is_hurried() && self.hungry.swap(false, Relaxed)
    }

    /// The level of a policy and subject, if it is in use.
    pub fn find(&self, id: u64, kind: Kind) -> Option<Arc<Leased>> {
        let place = place(id, kind);
        self.shard(place).load().get(&place).cloned()
    }

    /// Takes a level out, if it is still this one. For the control thread.
    pub fn remove(&self, level: &Arc<Leased>) {
        let place = place(level.id(), level.kind());
        let is_it = |shard: &Shard| shard.get(&place).is_some_and(|found| Arc::ptr_eq(found, level));
        let before = self.shard(place).rcu(|shard| {
            let mut next = Shard::clone(shard);
            if is_it(shard) {
                next.remove(&place);
            }
            next
        });
        if is_it(&before) {
            self.count.fetch_sub(1, Relaxed);
        }
    }

    /// Calls `see` with every level. For the control thread.
    pub fn each(&self, mut see: impl FnMut(&Arc<Leased>)) {
        for shard in &self.shards {
            shard.load().values().for_each(&mut see);
        }
    }

    /// Levels in it.
    pub fn len(&self) -> usize {
        self.count.load(Relaxed)
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Where a level is: each period has its own.
fn place(id: u64, kind: Kind) -> u64 {
    match kind {
        Kind::Period { end_unix_ms, .. } => id ^ end_unix_ms.wrapping_mul(0x9E37_79B9_7F4A_7C15),
        _ => id,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn level(directory: &Directory, id: u64) -> Arc<Leased> {
        directory.level(id, Kind::Credit, 10, 0).expect("room")
    }

    #[test]
    fn one_level_for_one_identity_whoever_asks_first() {
        let directory = Directory::default();
        std::thread::scope(|scope| {
            for _ in 0..16 {
                scope.spawn(|| {
                    for id in 0..1_000 {
                        level(&directory, id).settle(0, 1, 0, 0);
                    }
                });
            }
        });
        assert_eq!(directory.len(), 1_000);
        let mut seen = 0;
        directory.each(|level| {
            assert_eq!(level.look().spent, 16);
            seen += 1;
        });
        assert_eq!(seen, 1_000);
    }

    #[test]
    fn leaves_and_comes_again() {
        let directory = Directory::default();
        let first = level(&directory, 7);
        assert!(first.retire());
        let second = level(&directory, 7);
        assert!(!Arc::ptr_eq(&first, &second), "a retired one is replaced");
        assert_eq!(directory.len(), 1);
        directory.remove(&first);
        assert_eq!(directory.len(), 1, "only the one that was meant");
        directory.remove(&second);
        directory.remove(&second);
        assert!(directory.is_empty());
    }

    #[test]
    fn periods_and_openings() {
        let directory = Directory::default();
        let of = |end_unix_ms| {
            directory
                .level(
                    7,
                    Kind::Period {
                        end_unix_ms,
                        length_ms: 1,
                    },
                    1_000,
                    0,
                )
                .expect("room")
        };
        assert!(of(1).reserve(1, 0).is_err(), "no opening is set");
        directory.set_opening(2, 100);
        assert!(Arc::ptr_eq(&of(1), &of(1)));
        let next = of(2);
        assert!(next.reserve(11, 0).is_ok());
        assert!(next.reserve(9, 99).is_ok());
        assert!(next.reserve(1, 99).is_err());
        assert!(next.reserve(1, 100).is_err_and(|refused| refused.stale));
    }
}
