//! The levels of all limits and budgets: found by key, taken from and given back to by all cores at once.
//!
//! A level is one atomic word, so what is taken is checked in the same step: used and reserved together never pass
//! the amount at an admission, whatever threads do. Calendar periods and sliding windows have a level for each period, so a
//! period's beginning resets nothing and a clock that is set back finds what was used before.
//!
//! Beside each level stands what running requests hold of it. A gateway that was killed gives that back at its next
//! start ([`super::state`]).

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use super::{
    calendar::Period,
    identity::mix,
    leases::Directory,
    shared::{self, Lease},
    state,
    table::{Full, Place, Table},
    window::{self, Slide, Standing, Window},
};
use crate::net::{clock, words::Words};

mod at;

use at::At;

/// The two clocks of limits at one moment.
#[derive(Debug, Clone, Copy)]
pub struct Moment {
    /// The limits' own clock, nanoseconds: goes on evenly, also over restarts, and never back.
    pub steady_ns: u64,
    /// The wall clock, which calendar periods follow, milliseconds.
    pub unix_ms: u64,
}

/// Which table a level is in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Shelf {
    /// Of operators' subjects: keys, teams, models, budgets.
    Own = 0,
    /// Of subjects that clients choose: users, addresses. A flood of them leaves the others alone.
    Guests = 1,
    /// Shared by the subjects of a policy that found no place of their own.
    Overflow = 2,
    /// Parallel requests; gone with the process, as the requests are.
    Parallel = 3,
}

/// What a level is asked: how much there is, in what time, for whom.
#[derive(Debug, Clone, Copy)]
pub struct Query<'a> {
    pub window: &'a Window,
    /// Units of a window; at least 1.
    pub amount: u64,
    /// The policy and the subject.
    pub id: u64,
    /// The policy alone, for subjects that find no place of their own.
    pub overflow_id: u64,
    pub shelf: Shelf,
    /// The subject is chosen by clients, who may make up any number of them.
    pub by_clients: bool,
    /// Refuse what does not fit; otherwise it is only counted.
    pub hard: bool,
    /// The level is kept at a restart with what running requests hold taken off.
    pub note_held: bool,
}

/// Units that were taken.
#[derive(Debug, Clone)]
pub struct Taken {
    /// The same units of the lease, where several hosts share the level.
    lease: Option<Lease>,
    shelf: Shelf,
    place: Place,
    /// In the level's own unit: nanoseconds of a bucket, otherwise units.
    cost: u64,
    /// The earliest moment by which time alone may have given a bucket's cost back: what is used for good below it is
    /// given back first, and what other requests hold below it may never have been used.
    until_ns: u64,
    noted: bool,
}

/// Why nothing was taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refused {
    /// It does not fit.
    Exhausted(Standing),
    /// There is no place for a new level.
    Full,
    /// Hosts share the level, and the store in which they do is gone.
    StoreGone,
}

/// All levels. See the module.
#[derive(Debug)]
pub struct Levels {
    shelves: [Table; 4],
    /// Added to the monotonic clock it makes the limits' own.
    clock_base_ns: u64,
    /// Requests that met a full table and counted on a shared level, since the start.
    overflowed: AtomicU64,
    /// The words of the state file, whose head has the clock; `None` where levels are not kept.
    head: Option<Arc<Words>>,
    /// What several hosts share; `None` where each counts for itself.
    shared: Option<Arc<Directory>>,
}

impl Default for Levels {
    /// Levels that live as long as the process.
    fn default() -> Self {
        const PLACES: usize = 4096;
        let tables = [(); 4].map(|()| Table::in_memory(PLACES));
        Levels::new(tables, clock::unix_ms() * 1_000_000)
    }
}

impl Levels {
    /// Levels on these shelves, in the order of [`Shelf`], whose clock says `steady_ns` now.
    pub fn new(shelves: [Table; 4], steady_ns: u64) -> Levels {
        Levels {
            shelves,
            clock_base_ns: steady_ns.saturating_sub(clock::monotonic_ns()),
            overflowed: AtomicU64::new(0),
            head: None,
            shared: None,
        }
    }

    /// The same levels, kept in these words.
    pub fn with_head(mut self, head: Arc<Words>) -> Levels {
        self.head = Some(head);
        self
    }

    /// The same levels, shared with other hosts.
    pub fn share(&mut self, directory: Arc<Directory>) {
        self.shared = Some(directory);
    }

    /// The words in which levels are kept over a restart.
    pub fn head(&self) -> Option<&Words> {
        self.head.as_deref()
    }

    /// Writes the limits' clock to where the next start finds it.
    pub fn beat(&self) {
        if let Some(head) = &self.head {
            state::beat(head, self.now().steady_ns);
        }
    }

    /// Now.
    pub fn now(&self) -> Moment {
        Moment {
            steady_ns: self.clock_base_ns + clock::monotonic_ns(),
            unix_ms: self.unix_ms(),
        }
    }

    /// A moment by the monotonic clock, which leases follow.
    fn monotonic_ns(&self, now: Moment) -> u64 {
        now.steady_ns.saturating_sub(self.clock_base_ns)
    }

    /// The wall clock; of hosts that share levels, the store's, so that periods begin everywhere at once.
    fn unix_ms(&self) -> u64 {
        let offset_ms = self.shared.as_ref().map_or(0, |shared| shared.offset_ms());
        clock::unix_ms().saturating_add_signed(offset_ms)
    }

    /// One of the tables.
    pub fn shelf(&self, shelf: Shelf) -> &Table {
        &self.shelves[shelf as usize]
    }

    /// Admissions that were counted on a level shared by all subjects without a place.
    pub fn overflowed(&self) -> u64 {
        self.overflowed.load(Ordering::Relaxed)
    }

    /// Takes `units` at once or not at all.
    ///
    /// # Errors
    /// They do not fit (never where the limit is not hard), or there is no place to count them at.
    pub fn reserve(&self, query: &Query<'_>, units: u64, now: Moment) -> Result<(Taken, Standing), Refused> {
        let (mut taken, standing) = self.reserve_here(query, units, now)?;
        let Some(directory) = &self.shared else {
            return Ok((taken, standing));
        };
        match shared::reserve(directory, query, units, now, self.monotonic_ns(now)) {
            Ok((lease, standing)) => {
                taken.lease = Some(lease);
                Ok((taken, standing))
            }
            Err(refused) => {
                self.give_back(query, &taken, units, 0, now);
                Err(refused)
            }
        }
    }

    fn reserve_here(&self, query: &Query<'_>, units: u64, now: Moment) -> Result<(Taken, Standing), Refused> {
        match self.try_reserve(query, query.shelf, query.id, units, now) {
            Err(Refused::Full) if query.shelf != Shelf::Parallel => {
                self.overflowed.fetch_add(1, Ordering::Relaxed);
                self.try_reserve(query, Shelf::Overflow, query.overflow_id, units, now)
            }
            result => result,
        }
    }

    fn try_reserve(
        &self,
        query: &Query<'_>,
        shelf: Shelf,
        id: u64,
        units: u64,
        now: Moment,
    ) -> Result<(Taken, Standing), Refused> {
        let table = self.shelf(shelf);
        loop {
            let at = self.locate(query, shelf, id, now)?;
            let word = table.value(at.place);
            let mut seen = word.load(Ordering::Relaxed);
            let (cost, standing) = loop {
                let (after, cost, standing) = match at.take(query, seen, units, now) {
                    Ok(taken) => taken,
                    Err(standing) => {
                        return Err(self.refusal(&at, query, shelf, (seen, units), standing, now));
                    }
                };
                // The word guards no other memory, and the swap itself is the check; the order is for `is_still`.
                match word.compare_exchange_weak(seen, after, Ordering::AcqRel, Ordering::Relaxed) {
                    Ok(_) => break (cost, standing),
                    Err(other) => seen = other,
                }
            };
            if !table.is_still(at.place) {
                // The place was given to another key in between; what was taken from that one goes back.
                word.fetch_sub(cost, Ordering::AcqRel);
                continue;
            }
            // What is used for good below this reservation; what others hold may all come back before it does.
            let mut settled_ns = 0;
            if query.note_held {
                let held_ns = table.held(at.place).fetch_add(cost, Ordering::AcqRel);
                settled_ns = seen.saturating_sub(now.steady_ns).saturating_sub(held_ns);
            }
            let taken = Taken {
                lease: None,
                shelf,
                place: at.place,
                cost,
                until_ns: now.steady_ns.saturating_add(settled_ns).saturating_add(cost),
                noted: query.note_held,
            };
            return Ok((taken, standing));
        }
    }

    /// Gives back what of a reservation was not used: all but `used` of its `reserved` units.
    pub fn give_back(&self, query: &Query<'_>, taken: &Taken, reserved: u64, used: u64, now: Moment) {
        if let Some(lease) = &taken.lease {
            shared::settle(lease, reserved, used.min(reserved), self.monotonic_ns(now));
        }
        let table = self.shelf(taken.shelf);
        if !table.is_still(taken.place) {
            // Its time is long over: nobody counts it any more.
            return;
        }
        if taken.noted {
            subtract(table.held(taken.place), taken.cost);
        }
        let word = table.value(taken.place);
        match query.window {
            Window::Bucket { ns } => {
                let kept = window::cost_ns(query.amount, *ns, used.min(reserved));
                // Time that is over has been given back already; to give it back again would let whoever reserves
                // much and uses little save up many windows.
                let left_ns = taken.until_ns.saturating_sub(now.steady_ns);
                let back = taken.cost.saturating_sub(kept).min(left_ns);
                // Below "now" the level is simply empty.
                subtract(word, back);
            }
            _ => subtract(word, taken.cost.saturating_sub(used)),
        }
    }

    /// What was taken is used for good: an accepted request. What the host's own level has taken it has.
    pub fn keep(&self, taken: &Taken, reserved: u64) {
        if let Some(lease) = &taken.lease {
            shared::keep(lease, reserved);
        }
    }

    /// Takes what was used beyond a reservation, although there may be no room: it is debt.
    pub fn charge(&self, query: &Query<'_>, units: u64, now: Moment) {
        let soft = Query {
            hard: false,
            note_held: false,
            ..*query
        };
        // Where there is no place even on the overflow shelf, nothing can be counted; that was counted.
        if let Ok((taken, _)) = self.reserve_here(&soft, units, now)
            && query.hard
        {
            self.note_overuse(query, &taken, units, now);
        }
        if let Some(directory) = &self.shared {
            shared::charge(directory, query, units, now);
        }
    }

    /// Raises a counter to `least` where it is lower; returns what it was.
    pub fn raise(&self, query: &Query<'_>, least: u64, now: Moment) -> u64 {
        match self.locate(query, query.shelf, query.id, now) {
            Ok(at) => self
                .shelf(query.shelf)
                .value(at.place)
                .fetch_max(least, Ordering::AcqRel),
            // It could not be remembered next time either.
            Err(_) => least,
        }
    }

    /// How a level stands without taking anything; what running requests hold counts as used.
    pub fn standing(&self, query: &Query<'_>, now: Moment) -> Standing {
        if let Some((standing, _)) = self.shared_standing(query, now) {
            return standing;
        }
        match self.peek(query, now) {
            Some((at, value)) => at.standing(query, value, 0, 0, now),
            None => Standing {
                remaining: query.amount,
                ..Standing::default()
            },
        }
    }

    /// Units that are used for good in the present period, without what running requests hold. For counters; 0 for a
    /// bucket.
    pub fn settled(&self, query: &Query<'_>, now: Moment) -> u64 {
        let of_all_hosts = self.shared_standing(query, now).map_or(0, |(_, used)| used);
        self.settled_here(query, now).max(of_all_hosts)
    }

    fn shared_standing(&self, query: &Query<'_>, now: Moment) -> Option<(Standing, u64)> {
        shared::standing(self.shared.as_ref()?, query, now)
    }

    fn settled_here(&self, query: &Query<'_>, now: Moment) -> u64 {
        match self.peek(query, now) {
            Some((at, value)) if !matches!(query.window, Window::Bucket { .. }) => {
                let held = self.shelf(query.shelf).held(at.place).load(Ordering::Relaxed);
                value.saturating_sub(held)
            }
            _ => 0,
        }
    }

    /// Units that running requests of this host hold.
    pub fn held(&self, query: &Query<'_>, now: Moment) -> u64 {
        self.peek(query, now).map_or(0, |(at, _)| {
            self.shelf(query.shelf).held(at.place).load(Ordering::Relaxed)
        })
    }

    /// The present period's number for a query: changes when a new one begins.
    pub fn period_key(&self, query: &Query<'_>, now: Moment) -> u64 {
        key_of(query, query.id, now).0
    }

    fn peek(&self, query: &Query<'_>, now: Moment) -> Option<(At, u64)> {
        let table = self.shelf(query.shelf);
        let (key, period) = key_of(query, query.id, now);
        let place = table.find(key)?;
        let at = self.at(query, place, query.shelf, query.id, period, now);
        Some((at, table.value(place).load(Ordering::Relaxed)))
    }

    /// Finds or makes the level of the present period.
    fn locate(&self, query: &Query<'_>, shelf: Shelf, id: u64, now: Moment) -> Result<At, Refused> {
        let (key, period) = key_of(query, id, now);
        let place = self
            .shelf(shelf)
            .find_or_insert(key, now.steady_ns, || self.begin(query, shelf, id, period, now))
            .map_err(|Full| Refused::Full)?;
        Ok(self.at(query, place, shelf, id, period, now))
    }

    fn at(
        &self,
        query: &Query<'_>,
        place: Place,
        shelf: Shelf,
        id: u64,
        period: Option<Period>,
        now: Moment,
    ) -> At {
        let mut at = At {
            place,
            before: 0,
            slide: None,
            ends_ns: 0,
            length_ns: 0,
        };
        match query.window {
            Window::Sliding { ns } => {
                let slide = Slide::at(*ns, now.steady_ns);
                at.before = self.value_of(shelf, mix(id, slide.number.wrapping_sub(1)));
                at.slide = Some(slide);
            }
            Window::Calendar(_) => {
                if let Some(period) = period {
                    at.ends_ns = now.steady_ns + (period.end_ms.saturating_sub(now.unix_ms)) * 1_000_000;
                    at.length_ns = (period.end_ms - period.start_ms) * 1_000_000;
                }
            }
            Window::Bucket { .. } | Window::Never | Window::Parallel => {}
        }
        at
    }

    fn value_of(&self, shelf: Shelf, key: u64) -> u64 {
        let table = self.shelf(shelf);
        let place = table.find(key);
        place.map_or(0, |place| table.value(place).load(Ordering::Relaxed))
    }
}

/// The key of a query's level at a moment, and the calendar's period.
fn key_of(query: &Query<'_>, id: u64, now: Moment) -> (u64, Option<Period>) {
    match query.window {
        Window::Bucket { .. } | Window::Never | Window::Parallel => (id, None),
        Window::Sliding { ns } => (mix(id, Slide::at(*ns, now.steady_ns).number), None),
        Window::Calendar(calendar) => {
            let period = calendar.period(now.unix_ms);
            (mix(id, period.start_ms), Some(period))
        }
    }
}

/// Subtracts, and stops at 0.
fn subtract(word: &AtomicU64, less: u64) {
    let _ = word.fetch_update(Ordering::AcqRel, Ordering::Relaxed, |value| {
        Some(value.saturating_sub(less))
    });
}

mod debt;
#[cfg(test)]
mod tests;
