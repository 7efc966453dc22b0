//! A bounded table of levels, shared by all cores without locks.
//!
//! Subjects (users, clients) are unbounded, the table is not: a place whose level is worth nothing any more (fully
//! refilled, its period long over) is given to the next subject. A level is found by a 64-bit key that stands for a
//! policy, a subject and a period; each key has two buckets of [`WAYS`] places, and takes one in either.
//!
//! What a request does to a level it has found is a compare-and-swap on the level's word. Only a subject's first
//! request in a while makes a place, and for that takes the guard of its first bucket: a flag that is held for some
//! dozen stores and never over a wait. So there is never a second level for one key. Who took units from a place
//! looks afterwards whether it is still the one it looked up, and gives them back where it is not
//! ([`Table::is_still`]).

use std::{
    hint,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    thread,
};

use crate::net::words::Words;

/// Places of a bucket: their keys fill one cache line.
pub const WAYS: usize = 8;

/// Words of a bucket: keys, pairs of level and held, ends.
pub const BUCKET_WORDS: usize = 4 * WAYS;

/// `until` of a level that is worth something for ever: prepaid credit.
pub const FOREVER: u64 = u64::MAX;

/// `until` of a level whose word itself is the moment at which it is worth nothing (a bucket's arrival time).
pub const BY_WORD: u64 = 0;

/// `until` of a level that is worth nothing when its word is 0: parallel requests.
pub const WHILE_ANY: u64 = 1;

/// A place that is being given to another key.
const BUSY: u64 = 1;

/// Tries to take a guard before the request is refused. A guard is held for less than a microsecond, unless the
/// kernel takes the CPU from its holder: after the first [`SPINS`] each try lets others run.
const GUARD_TRIES: u32 = 20_000;

/// Looks at a flag or a busy place before the CPU is offered to whoever is to change it.
const SPINS: u32 = 1_000;

/// Where a level is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    index: u32,
    key: u64,
}

/// No place for another level: both buckets are full of levels that count.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Full;

/// One level as it lies in the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    pub key: u64,
    /// The level: what is used up and reserved, in the unit of its window.
    pub value: u64,
    /// The part of it that running requests hold.
    pub held: u64,
    /// When it is worth nothing, nanoseconds of the limits' clock, or one of the constants above.
    pub until: u64,
}

/// See the module.
#[derive(Debug)]
pub struct Table {
    words: Arc<Words>,
    /// Words in front of the first bucket.
    from: usize,
    mask: u64,
    guards: Box<[AtomicBool]>,
    used: AtomicUsize,
}

impl Place {
    /// The key that it was found by.
    pub fn key(self) -> u64 {
        self.key
    }
}

impl Table {
    /// Words that a table of at least `places` places needs.
    pub fn words_for(places: usize) -> usize {
        buckets_for(places) * BUCKET_WORDS
    }

    /// A table of at least `places` places over the words from `from` on, which are all zero.
    pub fn over(words: Arc<Words>, from: usize, places: usize) -> Table {
        let buckets = buckets_for(places);
        Table {
            words,
            from,
            mask: buckets as u64 - 1,
            guards: (0..buckets).map(|_| AtomicBool::new(false)).collect(),
            used: AtomicUsize::new(0),
        }
    }

    /// A table that lives as long as the process.
    pub fn in_memory(places: usize) -> Table {
        Table::over(Arc::new(Words::in_memory(Table::words_for(places))), 0, places)
    }

    /// Places in all.
    pub fn capacity(&self) -> usize {
        self.guards.len() * WAYS
    }

    /// Places that were given away at least once; those of levels that are worth nothing now are among them.
    pub fn used(&self) -> usize {
        self.used.load(Ordering::Relaxed)
    }

    /// The level's word.
    pub fn value(&self, place: Place) -> &AtomicU64 {
        &self.bucket(place.index as usize / WAYS)[WAYS + 2 * (place.index as usize % WAYS)]
    }

    /// What running requests hold of it.
    pub fn held(&self, place: Place) -> &AtomicU64 {
        &self.bucket(place.index as usize / WAYS)[WAYS + 2 * (place.index as usize % WAYS) + 1]
    }

    /// When it is worth nothing.
    pub fn until(&self, place: Place) -> &AtomicU64 {
        &self.bucket(place.index as usize / WAYS)[3 * WAYS + place.index as usize % WAYS]
    }

    /// Whether the place still belongs to the key it was found by.
    pub fn is_still(&self, place: Place) -> bool {
        let word = &self.bucket(place.index as usize / WAYS)[place.index as usize % WAYS];
        let mut looks = 0;
        loop {
            // A place is busy for a few stores, and then has an owner again, often the same. To take it for lost
            // before would leak what a request gives back: a parallel slot for ever.
            match word.load(Ordering::Acquire) {
                BUSY => relax(&mut looks),
                key => return key == place.key,
            }
        }
    }

    /// The level of a key, if it has one.
    #[inline]
    pub fn find(&self, key: u64) -> Option<Place> {
        let key = proper(key);
        let (first, second) = self.buckets(key);
        for bucket in [first, second] {
            let words = self.bucket(bucket);
            for (way, word) in words[..WAYS].iter().enumerate() {
                if word.load(Ordering::Acquire) == key {
                    let index = (bucket * WAYS + way) as u32;
                    return Some(Place { index, key });
                }
            }
        }
        None
    }

    /// The level of a key; a new one begins with the value and the end that `begin` gives.
    ///
    /// # Errors
    /// There is no place for it.
    #[inline]
    pub fn find_or_insert(
        &self,
        key: u64,
        now_ns: u64,
        begin: impl FnOnce() -> (u64, u64),
    ) -> Result<Place, Full> {
        match self.find(key) {
            Some(place) => Ok(place),
            None => self.insert(proper(key), now_ns, begin),
        }
    }

    #[cold]
    fn insert(&self, key: u64, now_ns: u64, begin: impl FnOnce() -> (u64, u64)) -> Result<Place, Full> {
        let (first, second) = self.buckets(key);
        // Before the guard: it may look through a year of periods.
        let (value, until) = begin();
        let _guard = self.guard(first).ok_or(Full)?;
        // Another thread may have made the place while the guard was waited for; under the guard nobody else does.
        if let Some(place) = self.find(key) {
            return Ok(place);
        }
        // The emptier bucket first: that keeps both from filling up long before the table does.
        let free = |bucket: usize| {
            let words = self.bucket(bucket);
            let taken = |word: &&AtomicU64| word.load(Ordering::Relaxed) == 0;
            words[..WAYS].iter().filter(taken).count()
        };
        let order = if free(second) > free(first) {
            [second, first]
        } else {
            [first, second]
        };
        for bucket in order {
            for way in 0..WAYS {
                if self.claim_empty(bucket, way) {
                    self.used.fetch_add(1, Ordering::Relaxed);
                    return Ok(self.fill(bucket, way, key, value, until));
                }
            }
        }
        for bucket in order {
            for way in 0..WAYS {
                if self.claim_worthless(bucket, way, first, now_ns, value) {
                    return Ok(self.fill(bucket, way, key, value, until));
                }
            }
        }
        Err(Full)
    }

    fn claim_empty(&self, bucket: usize, way: usize) -> bool {
        let word = &self.bucket(bucket)[way];
        word.load(Ordering::Relaxed) == 0
            && word
                .compare_exchange(0, BUSY, Ordering::Acquire, Ordering::Relaxed)
                .is_ok()
    }

    /// Takes a place whose level is worth nothing. Its own key's guard must be had too, so that nobody makes a second
    /// place for that key while this one can still be left to it. `own` is the guard that is held already.
    fn claim_worthless(&self, bucket: usize, way: usize, own: usize, now_ns: u64, value: u64) -> bool {
        let words = self.bucket(bucket);
        let key = words[way].load(Ordering::Acquire);
        let seen = words[WAYS + 2 * way].load(Ordering::Acquire);
        let until = words[3 * WAYS + way].load(Ordering::Acquire);
        if key <= BUSY || !is_worthless(seen, until, now_ns) {
            return false;
        }
        let theirs = self.buckets(key).0;
        let _guard = match theirs == own {
            true => None,
            false => match self.try_guard(theirs) {
                Some(guard) => Some(guard),
                None => return false,
            },
        };
        if words[way]
            .compare_exchange(key, BUSY, Ordering::AcqRel, Ordering::Relaxed)
            .is_err()
        {
            return false;
        }
        // Someone may have looked the old level up and takes units from it now: either the swap here comes first, and
        // theirs fails, or it is lost here and the level stays theirs.
        if words[WAYS + 2 * way]
            .compare_exchange(seen, value, Ordering::AcqRel, Ordering::Relaxed)
            .is_err()
        {
            words[way].store(key, Ordering::Release);
            return false;
        }
        true
    }

    fn fill(&self, bucket: usize, way: usize, key: u64, value: u64, until: u64) -> Place {
        let words = self.bucket(bucket);
        // A claimed place has the value already, on which others may have begun to count.
        let _ = words[WAYS + 2 * way].compare_exchange(0, value, Ordering::AcqRel, Ordering::Relaxed);
        words[WAYS + 2 * way + 1].store(0, Ordering::Release);
        words[3 * WAYS + way].store(until, Ordering::Release);
        words[way].store(key, Ordering::Release);
        let index = (bucket * WAYS + way) as u32;
        Place { index, key }
    }

    fn guard(&self, bucket: usize) -> Option<Guard<'_>> {
        let mut looks = 0;
        while looks < GUARD_TRIES {
            if let Some(guard) = self.try_guard(bucket) {
                return Some(guard);
            }
            relax(&mut looks);
        }
        None
    }

    fn try_guard(&self, bucket: usize) -> Option<Guard<'_>> {
        let flag = &self.guards[bucket];
        // Made only where it was taken: a guard that is dropped gives back what may be another thread's.
        flag.compare_exchange(false, true, Ordering::Acquire, Ordering::Relaxed)
            .ok()
            .map(|_| Guard(flag))
    }

    #[inline]
    fn bucket(&self, bucket: usize) -> &[AtomicU64] {
        let from = self.from + bucket * BUCKET_WORDS;
        &self.words.all()[from..from + BUCKET_WORDS]
    }

    /// The two buckets of a key; keys are hashes, so their bits serve as they are.
    #[inline]
    fn buckets(&self, key: u64) -> (usize, usize) {
        let first = key & self.mask;
        let second = (key.rotate_right(32) ^ key.rotate_right(17)) & self.mask;
        (first as usize, second as usize)
    }

    /// All levels, for a copy or a list. While others write, each word is from some moment.
    pub fn entries(&self) -> impl Iterator<Item = Entry> + '_ {
        (0..self.guards.len()).flat_map(move |bucket| {
            let words = self.bucket(bucket);
            entries_of(move |word| words[word].load(Ordering::Acquire))
        })
    }

    /// Puts an entry in as it is; for a table that nobody uses yet. Entries without a place are told.
    pub fn restore(&self, entry: Entry, now_ns: u64) -> Result<(), Full> {
        let place = self.find_or_insert(entry.key, now_ns, || (entry.value, entry.until))?;
        self.held(place).store(entry.held, Ordering::Relaxed);
        Ok(())
    }
}

/// The levels of one bucket whose words `load` reads.
pub fn entries_of(load: impl Fn(usize) -> u64) -> impl Iterator<Item = Entry> {
    (0..WAYS).filter_map(move |way| {
        let entry = Entry {
            key: load(way),
            value: load(WAYS + 2 * way),
            held: load(WAYS + 2 * way + 1),
            until: load(3 * WAYS + way),
        };
        (entry.key > BUSY).then_some(entry)
    })
}

/// Whether a level says no more than one that is not there.
pub fn is_worthless(value: u64, until: u64, now_ns: u64) -> bool {
    match until {
        FOREVER => false,
        BY_WORD => value <= now_ns,
        WHILE_ANY => value == 0,
        until => until <= now_ns,
    }
}

/// Waits a little: first on the CPU, then off it, for a holder whose CPU was taken away.
fn relax(looks: &mut u32) {
    *looks = looks.saturating_add(1);
    if *looks < SPINS {
        hint::spin_loop();
    } else {
        thread::yield_now();
    }
}

/// Held while a place is made.
struct Guard<'t>(&'t AtomicBool);

impl Drop for Guard<'_> {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Release);
    }
}

fn buckets_for(places: usize) -> usize {
    places.div_ceil(WAYS).next_power_of_two()
}

/// 0 and [`BUSY`] are no keys.
#[inline]
fn proper(key: u64) -> u64 {
    if key <= BUSY { key | 2 } else { key }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quota::identity::mix;

    const LATER: u64 = 1_000;

    #[test]
    fn fills_up_nearly_and_then_says_so() {
        let table = Table::in_memory(4096);
        let mut placed = 0;
        for n in 0..table.capacity() as u64 * 2 {
            placed += usize::from(table.find_or_insert(mix(7, n), 0, || (n, LATER)).is_ok());
        }
        assert!(
            placed > table.capacity() * 8 / 10,
            "{placed} of {}",
            table.capacity()
        );
        for n in 0..100 {
            let place = table.find(mix(7, n)).expect("placed early");
            assert_eq!(table.value(place).load(Ordering::Relaxed), n);
        }
        // All are worthless later: others take their places, and what they find is theirs.
        for n in 0..100 {
            let place = table
                .find_or_insert(mix(8, n), LATER, || (5, 2 * LATER))
                .expect("a place");
            assert_eq!(table.value(place).load(Ordering::Relaxed), 5);
            assert!(table.is_still(place));
        }
        assert_eq!(table.used(), placed);
    }

    #[test]
    fn who_lost_a_place_learns_it() {
        let table = Table::in_memory(WAYS);
        let old = table.find_or_insert(1 << 40, 0, || (9, 10)).expect("a place");
        for n in 2..100 {
            let _ = table.find_or_insert(n << 40, 20, || (1, FOREVER));
        }
        assert!(!table.is_still(old));
    }

    #[test]
    fn threads_never_make_two_places_for_one_key() {
        // Few places and many keys that are worth nothing at once, so that places change hands all the time.
        let table = Table::in_memory(64);
        std::thread::scope(|scope| {
            for thread in 0..8_u64 {
                let table = &table;
                scope.spawn(move || {
                    for round in 0..20_000_u64 {
                        let key = mix(3, (round * 7 + thread) % 200);
                        let _ = table.find_or_insert(key, 10, || (0, if round % 3 == 0 { 5 } else { 20 }));
                    }
                });
            }
        });
        let mut keys: Vec<u64> = table.entries().map(|entry| entry.key).collect();
        keys.sort_unstable();
        let all = keys.len();
        keys.dedup();
        assert_eq!(keys.len(), all);
    }

    #[test]
    fn threads_that_meet_a_new_key_at_once_make_one_place() {
        const THREADS: usize = 4;
        const KEYS: u64 = 2_000;
        let table = Table::in_memory(4096);
        let start = std::sync::Barrier::new(THREADS);
        thread::scope(|scope| {
            for _ in 0..THREADS {
                scope.spawn(|| {
                    for key in 0..KEYS {
                        start.wait();
                        let key = (key + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
                        let made = table.find_or_insert(key, LATER, || (LATER * 2, BY_WORD));
                        assert!(made.is_ok());
                    }
                });
            }
        });
        let mut keys: Vec<u64> = table.entries().map(|entry| entry.key).collect();
        let places = keys.len();
        keys.sort_unstable();
        keys.dedup();
        assert_eq!(places, keys.len(), "a key has two places");
    }
}
