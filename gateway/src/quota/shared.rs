//! Levels that several hosts share, as reservations use them: what is taken here is taken from this host's lease too.
//!
//! The host's own level stays beside it: it goes over restarts, and is what the host knows without the store.

use std::sync::Arc;

use super::{
    lease::{Kind, LeaseStanding, Leased},
    leases::Directory,
    levels::{Moment, Query, Refused},
    window::{Standing, Window},
};
use crate::{
    bounds::{LEASED_GUESTS_MAX, LEASED_LEVELS_MAX, LEASED_OVERFLOWS_MAX},
    net::clock,
};

/// Units that were taken from a lease.
#[derive(Debug, Clone)]
pub struct Lease {
    level: Arc<Leased>,
    /// When time alone may have given a bucket's units back.
    until_ns: u64,
}

/// Takes `units` from this host's lease at once or not at all; a rule that only counts always takes. `now_ns` is the same
/// moment by the monotonic clock.
///
/// # Errors
/// The lease does not suffice, or has run out; or there is no place for another level.
pub fn reserve(
    directory: &Directory,
    query: &Query<'_>,
    units: u64,
    now: Moment,
    now_ns: u64,
) -> Result<(Lease, Standing), Refused> {
    let level = find_or_make(directory, query, now, now_ns)?;
    let standing = match query.hard {
        true => level.reserve(units, now_ns).map_err(|refused| {
            directory.hurry();
            refusal(&refused, units, directory.is_closed())
        })?,
        false => level.take_anyway(units, now_ns),
    };
    let until_ns = standing.until_ns;
    Ok((Lease { level, until_ns }, of(&standing)))
}

/// Trues up what was taken from a lease: `used` of the `reserved` units. `now_ns` by the monotonic clock.
pub fn settle(lease: &Lease, reserved: u64, used: u64, now_ns: u64) {
    lease.level.settle(reserved, used, lease.until_ns, now_ns);
}

/// What was taken from a lease is used for good.
pub fn keep(lease: &Lease, reserved: u64) {
    // Nothing comes back, so no time is looked at.
    lease
        .level
        .settle(reserved, reserved, lease.until_ns, lease.until_ns);
}

/// Takes what was used beyond a reservation, although there may be no room: it is debt.
pub fn charge(directory: &Directory, query: &Query<'_>, units: u64, now: Moment) {
    let now_ns = clock::monotonic_ns();
    // Without a place it cannot be counted; the host's own level has it.
    if let Ok(level) = find_or_make(directory, query, now, now_ns) {
        level.settle(0, units, now_ns, now_ns);
    }
}

/// How a shared level stands, if it is in use here, and what all hosts have used of it.
pub fn standing(directory: &Directory, query: &Query<'_>, now: Moment) -> Option<(Standing, u64)> {
    let level = directory.find(query.id, kind(query.window, now))?;
    Some((of(&level.standing(clock::monotonic_ns())), level.used()))
}

fn find_or_make(
    directory: &Directory,
    query: &Query<'_>,
    now: Moment,
    now_ns: u64,
) -> Result<Arc<Leased>, Refused> {
    let kind = kind(query.window, now);
    let most = match query.by_clients {
        true => LEASED_GUESTS_MAX,
        false => LEASED_LEVELS_MAX,
    };
    let level = |most, id| directory.level_within(most, id, kind, query.amount, now_ns);
    // Subjects that find no place share one, as they do on the host's own shelves. That one has a place of its own: there
    // are as many as policies.
    let level = level(most, query.id)
        .or_else(|_| level(LEASED_LEVELS_MAX + LEASED_OVERFLOWS_MAX, query.overflow_id))
        .map_err(|_| Refused::Full)?;
    // Mostly it is as it was, and then nothing is written.
    if level.is_hard() != query.hard {
        level.set_hard(query.hard);
    }
    Ok(level)
}

fn kind(window: &Window, now: Moment) -> Kind {
    match window {
        Window::Bucket { ns } => Kind::Bucket { window_ns: *ns },
        Window::Sliding { ns } => Kind::Sliding { window_ns: *ns },
        Window::Calendar(calendar) => {
            let period = calendar.period(now.unix_ms);
            Kind::Period {
                end_unix_ms: period.end_ms,
                length_ms: period.end_ms - period.start_ms,
            }
        }
        Window::Never => Kind::Credit,
        Window::Parallel => Kind::Parallel,
    }
}

fn of(standing: &LeaseStanding) -> Standing {
    Standing {
        remaining: standing.remaining,
        reset_ns: standing.reset_ns,
        retry_after_ns: standing.retry_after_ns,
    }
}

fn refusal(refused: &LeaseStanding, units: u64, closed: bool) -> Refused {
    if refused.stale || (closed && refused.remaining >= units) {
        return Refused::StoreGone;
    }
    // What other hosts may have cannot be had at once: a stream may begin with what is here.
    let remaining = match refused.remaining >= units {
        true => refused.spare,
        false => refused.remaining.min(refused.spare),
    };
    Refused::Exhausted(Standing {
        remaining,
        ..of(refused)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quota::levels::Shelf;

    #[test]
    fn the_store_hears_that_a_rule_only_counts() {
        let (directory, window) = (Directory::default(), Window::Never);
        let now = Moment {
            steady_ns: 0,
            unix_ms: 0,
        };
        for hard in [true, false, true] {
            let query = Query {
                window: &window,
                amount: 10,
                id: 1,
                overflow_id: 2,
                shelf: Shelf::Own,
                by_clients: false,
                hard,
                note_held: false,
            };
            charge(&directory, &query, 1, now);
            let level = directory.find(1, Kind::Credit).expect("the level");
            assert_eq!(level.is_hard(), hard);
        }
    }

    /// Made-up users fill their part of the directory; then they share a level, and keys still have their own.
    #[test]
    fn a_flood_of_guests_leaves_room_for_others() {
        let directory = Directory::default();
        directory.set_opening(100, u64::MAX / 2);
        let now = Moment {
            steady_ns: 0,
            unix_ms: 0,
        };
        let window = Window::Never;
        let ask = |id, by_clients| {
            let query = Query {
                window: &window,
                amount: 10,
                id,
                overflow_id: 1,
                shelf: Shelf::Parallel,
                by_clients,
                hard: true,
                note_held: false,
            };
            reserve(&directory, &query, 4, now, 0).map(drop)
        };
        let guests = LEASED_GUESTS_MAX as u64;
        for user in 0..guests {
            assert_eq!(ask(1_000 + user, true), Ok(()));
        }
        for user in guests..guests + 2 {
            assert_eq!(ask(1_000 + user, true), Ok(()));
        }
        let refused = ask(1_000 + guests + 2, true);
        assert!(
            matches!(refused, Err(Refused::Exhausted(_))),
            "ten units for all of them"
        );
        for key in 0..100 {
            assert_eq!(ask(1_000_000 + key, false), Ok(()));
        }
        assert_eq!(directory.len(), LEASED_GUESTS_MAX + 101);
        let own = LEASED_LEVELS_MAX as u64;
        for key in 100..own {
            let _ = ask(1_000_000 + key, false);
        }
        assert!(
            matches!(ask(5_000_000, false), Err(Refused::Exhausted(_))),
            "not: no place"
        );
    }
}
