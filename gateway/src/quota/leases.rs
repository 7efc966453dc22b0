//! The shared levels that are in use on this host, found without locks.
//!
//! A level is found by the 64-bit identity of its policy, subject and period, which is the same on every host. The
//! directory is many small maps, each swapped whole when a level is added or leaves: readers never wait, and a writer
//! copies one small map. Only a subject's first request in a while writes.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
};

use arc_swap::ArcSwap;

use super::lease::Leased;
use crate::bounds::{LEASED_LEVELS_MAX, LEASED_SHARDS};

type Shard = HashMap<u64, Arc<Leased>>;

/// See the module.
#[derive(Debug)]
pub struct Directory {
    shards: Box<[ArcSwap<Shard>]>,
    count: AtomicUsize,
}

/// There are [`LEASED_LEVELS_MAX`] levels already, and all are in use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Full;

impl Default for Directory {
    fn default() -> Directory {
        Directory {
            shards: (0..LEASED_SHARDS).map(|_| ArcSwap::default()).collect(),
            count: AtomicUsize::new(0),
        }
    }
}

impl Directory {
    fn shard(&self, id: u64) -> &ArcSwap<Shard> {
        // Identities are hashes: their low bits are as good as any.
        &self.shards[id as usize % LEASED_SHARDS]
    }

    /// The level of an identity; `make` makes it where there is none.
    ///
    /// # Errors
    /// There is no room for another: the request must be refused, for the level cannot be counted.
    pub fn level(&self, id: u64, make: impl Fn() -> Leased) -> Result<Arc<Leased>, Full> {
        let shard = self.shard(id);
        if let Some(found) = shard.load().get(&id) {
            return Ok(found.clone());
        }
        // Cores that add at the same moment may pass the bound by their number.
        if self.count.load(Relaxed) >= LEASED_LEVELS_MAX {
            return Err(Full);
        }
        let made = Arc::new(make());
        // The closure runs again when another core or the control thread was faster.
        let before = shard.rcu(|shard| {
            let mut next = Shard::clone(shard);
            next.entry(id).or_insert_with(|| made.clone());
            next
        });
        if let Some(found) = before.get(&id) {
            return Ok(found.clone());
        }
        self.count.fetch_add(1, Relaxed);
        Ok(made)
    }

    /// Takes a level out, if it is still this one. For the control thread.
    pub fn remove(&self, id: u64, level: &Arc<Leased>) {
        let is_it = |shard: &Shard| shard.get(&id).is_some_and(|found| Arc::ptr_eq(found, level));
        let before = self.shard(id).rcu(|shard| {
            let mut next = Shard::clone(shard);
            if is_it(shard) {
                next.remove(&id);
            }
            next
        });
        if is_it(&before) {
            self.count.fetch_sub(1, Relaxed);
        }
    }

    /// Calls `see` with every level. For the control thread.
    pub fn each(&self, mut see: impl FnMut(u64, &Arc<Leased>)) {
        for shard in &self.shards {
            for (id, level) in shard.load().iter() {
                see(*id, level);
            }
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quota::lease::{Kind, Opening};

    fn make() -> Leased {
        let opening = Opening {
            units: 1,
            until_ns: u64::MAX,
        };
        Leased::new(Kind::Credit, 10, opening)
    }

    #[test]
    fn one_level_for_one_identity_whoever_asks_first() {
        let directory = Directory::default();
        std::thread::scope(|scope| {
            for _ in 0..16 {
                scope.spawn(|| {
                    for id in 0..1_000 {
                        let level = directory.level(id, make).expect("room");
                        level.settle(0, 1, 0, 0);
                    }
                });
            }
        });
        assert_eq!(directory.len(), 1_000);
        let mut seen = 0;
        directory.each(|_, level| {
            assert_eq!(level.look().spent, 16);
            seen += 1;
        });
        assert_eq!(seen, 1_000);
    }

    #[test]
    fn leaves_and_comes_again() {
        let directory = Directory::default();
        let first = directory.level(7, make).expect("room");
        directory.remove(8, &first);
        directory.remove(7, &first);
        directory.remove(7, &first);
        assert!(directory.is_empty());
        let second = directory.level(7, make).expect("room");
        assert!(!Arc::ptr_eq(&first, &second));
        directory.remove(7, &first);
        assert_eq!(directory.len(), 1, "only the one that was meant");
    }
}
