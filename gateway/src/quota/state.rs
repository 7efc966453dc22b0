//! Levels over restarts: the layout of the state file, and what becomes of an old one at a start.
//!
//! The file is mapped, so what a core counts is in the page cache at once and survives `kill -9`; a power cut takes what
//! the kernel had not written yet (some 30 s). At a start the old file is read whole, its levels are put into a new
//! one, and what requests held that were running when the process died is given back: their end was never
//! recorded. So an old file of another size, or with places of levels that are worth nothing, is put in order by the way.
//!
//! The limits' clock goes on: by the machine's own clock since boot where it has not been booted in between, so that a
//! wall clock that was set meanwhile changes nothing; otherwise by the wall clock, and never back.

use std::sync::{Arc, atomic::Ordering};

use super::{
    levels::{Levels, Shelf},
    table::{BUCKET_WORDS, BY_WORD, Entry, FOREVER, Table, WHILE_ANY, entries_of, is_worthless},
};
use crate::net::{clock, words::Words};

/// "LEVELS" and the layout's version.
const MAGIC: u64 = u64::from_be_bytes(*b"LEVELS\0\x01");

/// Words in front of the first table.
const HEAD_WORDS: usize = 64;

/// Where the head's words are.
const AT_MAGIC: usize = 0;
const AT_PLACES: usize = 1;
const AT_BOOT_ID: usize = 2;
const AT_BOOT_NS: usize = 3;
const AT_STEADY_NS: usize = 4;
/// 1: debt is noted on levels of its own. Files of gateways of before 2026-11-21 have 0.
const AT_HAS_DEBTS: usize = 5;

/// Places for levels shared by the subjects of a policy that found none of their own: one a policy and period.
const OVERFLOW_PLACES: usize = 4096;

/// Places of the table of parallel requests, which is not kept.
const PARALLEL_PLACES: usize = 64 * 1024;

/// The longest that a level of the file may be ahead of the clock, or its clock ahead of the wall's, before it is taken
/// for damaged, nanoseconds: 200 years.
const AHEAD_NS_MAX: u64 = 200 * 365 * 86_400 * 1_000_000_000;

/// What an old file brought.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Restored {
    /// Levels that go on.
    pub kept: usize,
    /// Levels of which running requests held something, which was given back.
    pub given_back: usize,
    /// Levels for which the new file has no place, or that made no sense.
    pub lost: usize,
    /// It is of a gateway that noted no debts, and has levels of periods: what of them is debt is not known, and they leave
    /// none to the next period.
    pub debts_forgiven: bool,
    /// There was an old file, and it was not one of ours.
    pub foreign: bool,
}

/// Words of a file for so many levels of either kind.
pub fn words_for(places: usize) -> usize {
    HEAD_WORDS + 2 * Table::words_for(places) + Table::words_for(OVERFLOW_PLACES)
}

/// Puts levels into new words of [`words_for`] size, all zero, with what an old file's words say.
pub fn restore(words: Words, places: usize, old: Option<&[u64]>) -> (Levels, Restored) {
    let steady_ns = old
        .and_then(steady_now)
        .unwrap_or_else(|| clock::unix_ms() * 1_000_000);
    let words = Arc::new(words);
    let size = Table::words_for(places);
    let tables = [
        Table::over(words.clone(), HEAD_WORDS, places),
        Table::over(words.clone(), HEAD_WORDS + size, places),
        Table::over(words.clone(), HEAD_WORDS + 2 * size, OVERFLOW_PLACES),
        Table::in_memory(PARALLEL_PLACES),
    ];
    let mut restored = Restored::default();
    match old.map(|old| (old, places_of(old))) {
        Some((old, Some(old_places))) => {
            take_over(old, old_places, &tables, steady_ns, &mut restored);
            restored.debts_forgiven &= old[AT_HAS_DEBTS] == 0;
        }
        Some((_, None)) => restored.foreign = true,
        None => {}
    }
    words.all()[AT_PLACES].store(places as u64, Ordering::Relaxed);
    words.all()[AT_HAS_DEBTS].store(1, Ordering::Relaxed);
    let levels = Levels::new(tables, steady_ns).with_head(words);
    levels.beat();
    (levels, restored)
}

/// The size of the tables of an old file; `None` where it is none, or cut off.
fn places_of(old: &[u64]) -> Option<usize> {
    let places = usize::try_from(*old.get(AT_PLACES)?).ok()?;
    let is_ours = old[AT_MAGIC] == MAGIC && places <= crate::config::schema::LEVELS_MAX;
    (is_ours && old.len() >= words_for(places)).then_some(places)
}

/// What the limits' clock says now, after an old file.
fn steady_now(old: &[u64]) -> Option<u64> {
    places_of(old)?;
    let (boot_id, boot_ns, steady_ns) = (old[AT_BOOT_ID], old[AT_BOOT_NS], old[AT_STEADY_NS]);
    let (now_boot_ns, unix_ns) = (clock::since_boot_ns(), clock::unix_ms() * 1_000_000);
    let same_boot = boot_id != 0 && boot_id == clock::boot_id() && now_boot_ns >= boot_ns;
    let now_ns = match same_boot {
        true => steady_ns.saturating_add(now_boot_ns - boot_ns),
        false => steady_ns.max(unix_ns),
    };
    // A clock that is ahead of everything is damage, and would soon overflow.
    (now_ns <= unix_ns.saturating_add(AHEAD_NS_MAX)).then_some(now_ns)
}

fn take_over(old: &[u64], old_places: usize, tables: &[Table; 4], steady_ns: u64, restored: &mut Restored) {
    let size = Table::words_for(old_places);
    let parts = [
        (Shelf::Own, HEAD_WORDS, size),
        (Shelf::Guests, HEAD_WORDS + size, size),
        (
            Shelf::Overflow,
            HEAD_WORDS + 2 * size,
            Table::words_for(OVERFLOW_PLACES),
        ),
    ];
    for (shelf, from, size) in parts {
        for bucket in old[from..from + size].chunks_exact(BUCKET_WORDS) {
            for entry in entries_of(|word| bucket[word]) {
                take_over_one(entry, &tables[shelf as usize], steady_ns, restored);
            }
        }
    }
}

fn take_over_one(mut entry: Entry, table: &Table, steady_ns: u64, restored: &mut Restored) {
    if entry.until == WHILE_ANY {
        return;
    }
    if entry.held > 0 {
        restored.given_back += 1;
        entry.value = entry.value.saturating_sub(entry.held);
        entry.held = 0;
    }
    let is_bucket = entry.until == BY_WORD;
    if is_bucket && entry.value > steady_ns.saturating_add(AHEAD_NS_MAX) {
        restored.lost += 1;
        return;
    }
    if is_worthless(entry.value, entry.until, steady_ns) || (!is_bucket && entry.value == 0) {
        return;
    }
    match table.restore(entry, steady_ns) {
        Ok(()) => {
            restored.kept += 1;
            restored.debts_forgiven |= !is_bucket && entry.until != FOREVER;
        }
        Err(_) => restored.lost += 1,
    }
}

/// Writes the clock into the head, for the next start. To be called often: what lies between the last call and the end of
/// the process is lost to the clock only where the machine is booted in between.
pub fn beat(head: &Words, steady_ns: u64) {
    let words = head.all();
    words[AT_BOOT_ID].store(clock::boot_id(), Ordering::Relaxed);
    words[AT_BOOT_NS].store(clock::since_boot_ns(), Ordering::Relaxed);
    words[AT_STEADY_NS].store(steady_ns, Ordering::Relaxed);
    words[AT_MAGIC].store(MAGIC, Ordering::Release);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quota::{
        levels::{Query, Refused},
        window::Window,
    };

    fn image(words: &Words) -> Vec<u64> {
        words
            .all()
            .iter()
            .map(|word| word.load(Ordering::Relaxed))
            .collect()
    }

    fn query(window: &Window, id: u64) -> Query<'_> {
        Query {
            window,
            amount: 100,
            id,
            overflow_id: 1 << 50,
            shelf: Shelf::Own,
            by_clients: false,
            hard: true,
            note_held: true,
        }
    }

    fn restart(levels: &Levels, places: usize, change: impl FnOnce(&mut Vec<u64>)) -> (Levels, Restored) {
        levels.beat();
        let mut old = image(levels.head().expect("a file"));
        change(&mut old);
        restore(Words::in_memory(words_for(places)), places, Some(&old))
    }

    fn fresh() -> Levels {
        restore(Words::in_memory(words_for(1024)), 1024, None).0
    }

    #[test]
    fn a_restart_keeps_what_was_used_and_gives_back_what_was_held() {
        let windows = [
            Window::Bucket { ns: 1 << 50 },
            Window::Never,
            Window::Sliding { ns: 1 << 50 },
        ];
        let levels = fresh();
        let now = levels.now();
        for (id, window) in windows.iter().enumerate() {
            let query = query(window, (id as u64 + 1) << 40);
            let (taken, _) = levels.reserve(&query, 40, now).expect("room");
            levels.give_back(&query, &taken, 40, 25, now);
            levels.reserve(&query, 60, now).expect("room");
            assert!(matches!(
                levels.reserve(&query, 60, now),
                Err(Refused::Exhausted(_))
            ));
        }
        let (levels, restored) = restart(&levels, 4096, |_| {});
        assert_eq!((restored.kept, restored.given_back, restored.lost), (3, 3, 0));
        let now = levels.now();
        for (id, window) in windows.iter().enumerate() {
            let remaining = levels
                .standing(&query(window, (id as u64 + 1) << 40), now)
                .remaining;
            assert!((74..=75).contains(&remaining), "{window:?}: {remaining}");
        }
    }

    #[test]
    fn debt_outlives_a_restart() {
        let window = Window::Sliding { ns: 1 << 50 };
        let levels = fresh();
        let (query, now) = (query(&window, 5 << 40), levels.now());
        levels.reserve(&query, 30, now).expect("room");
        levels.charge(&query, 150, now);
        let (levels, _) = restart(&levels, 4096, |_| {});
        let now = levels.now();
        let next = crate::quota::levels::Moment {
            steady_ns: now.steady_ns + (1 << 50),
            ..now
        };
        let _ = levels.reserve(&query, 1, next);
        // What ran when it died came back: 150 were used, 50 beyond the amount.
        assert_eq!(levels.settled(&query, next), 50);
    }

    /// What of a level is debt cannot be told without the levels beside it: it is said, and the levels go on.
    #[test]
    fn a_file_without_noted_debts_is_told_apart() {
        let (sliding, bucket) = (Window::Sliding { ns: 1 << 50 }, Window::Bucket { ns: 1 << 50 });
        let without = |old: &mut Vec<u64>| old[AT_HAS_DEBTS] = 0;
        let levels = fresh();
        let use_some = |levels: &Levels, window, id: u64| {
            let query = Query {
                note_held: false,
                ..query(window, id << 40)
            };
            levels
                .reserve(&query, 30, levels.now())
                .map(|_| ())
                .expect("room");
        };
        use_some(&levels, &bucket, 6);
        let (levels, restored) = restart(&levels, 1024, without);
        assert!(
            !restored.debts_forgiven && restored.kept == 1,
            "a bucket's level is its debt too"
        );
        use_some(&levels, &sliding, 7);
        let (_, restored) = restart(&levels, 1024, |_| {});
        assert!(!restored.debts_forgiven);
        let (levels, restored) = restart(&levels, 1024, without);
        assert!(restored.debts_forgiven && restored.kept > 0);
        let (_, restored) = restart(&levels, 1024, |_| {});
        assert!(!restored.debts_forgiven, "the new file is not of that kind");
    }

    #[test]
    fn a_wall_clock_that_was_set_while_nothing_ran_changes_nothing() {
        let window = Window::Bucket {
            ns: 3_600_000_000_000,
        };
        let levels = fresh();
        let query = query(&window, 7 << 40);
        let _ = levels
            .reserve(
                &Query {
                    note_held: false,
                    ..query
                },
                100,
                levels.now(),
            )
            .expect("room");
        let before_ns = levels.now().steady_ns;
        // The same boot: only the time since boot counts, whatever the wall clock was when the file was written.
        let (same_boot, _) = restart(&levels, 1024, |_| {});
        assert!((before_ns..before_ns + 60_000_000_000).contains(&same_boot.now().steady_ns));
        assert!(same_boot.reserve(&query, 10, same_boot.now()).is_err());
        // Another boot, after which the wall clock is an hour behind: the limits' clock stands, and goes on.
        let (behind, _) = restart(&levels, 1024, |old| {
            old[AT_BOOT_ID] ^= 1;
            old[AT_STEADY_NS] += 3_600_000_000_000;
        });
        assert!(behind.now().steady_ns >= before_ns + 3_600_000_000_000);
        // Another boot a while later: the time in between has passed for the levels too.
        let (later, _) = restart(&levels, 1024, |old| {
            old[AT_BOOT_ID] ^= 1;
            old[AT_STEADY_NS] -= 1_800_000_000_000;
        });
        assert!(later.now().steady_ns >= before_ns);
    }

    #[test]
    fn what_is_no_state_file_is_not_believed() {
        let levels = fresh();
        for change in [
            |old: &mut Vec<u64>| old[AT_MAGIC] = 1,
            |old: &mut Vec<u64>| old.truncate(500),
            |old: &mut Vec<u64>| old.clear(),
        ] {
            let (_, restored) = restart(&levels, 1024, change);
            assert!(restored.foreign);
        }
        // Garbage in the places is a level like any other, or dropped, but never a panic.
        let (levels, _) = restart(&levels, 1024, |old| {
            for (n, word) in old[HEAD_WORDS..].iter_mut().enumerate() {
                *word = crate::quota::identity::mix(n as u64, 3);
            }
        });
        let window = Window::Bucket { ns: 1 << 40 };
        let _ = levels.reserve(&query(&window, 9 << 40), 1, levels.now());
        // Nor is a clock at the end of time.
        for boot in [0, 1] {
            let (levels, _) = restart(&levels, 1024, |old| {
                old[AT_BOOT_ID] ^= boot;
                old[AT_STEADY_NS] = u64::MAX;
            });
            assert!(levels.reserve(&query(&window, 8 << 40), 1, levels.now()).is_ok());
        }
    }
}
