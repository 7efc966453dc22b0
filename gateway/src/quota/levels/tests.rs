use jiff::tz::TimeZone;
use proptest::prelude::*;

use super::*;
use crate::quota::calendar::{Calendar, Part};

const DAY_MS: u64 = 86_400_000;

fn calendar(part: Part, zone: &str) -> Window {
    let zone = TimeZone::get(zone).expect("a time zone");
    Window::Calendar(std::sync::Arc::new(Calendar::new(part, zone)))
}

fn query(window: &Window) -> Query<'_> {
    Query {
        window,
        amount: 100,
        id: 77 << 32,
        overflow_id: 78 << 32,
        shelf: Shelf::Own,
        by_clients: false,
        hard: true,
        note_held: true,
    }
}

fn at(text: &str) -> Moment {
    let time: jiff::Timestamp = text.parse().expect("a time");
    let unix_ms = time.as_millisecond() as u64;
    Moment {
        steady_ns: unix_ms * 1_000_000,
        unix_ms,
    }
}

/// The same moment of the limits' clock under another wall clock.
fn with_wall(steady: Moment, text: &str) -> Moment {
    Moment {
        unix_ms: at(text).unix_ms,
        ..steady
    }
}

fn use_up(levels: &Levels, query: &Query<'_>, units: u64, now: Moment) {
    let (taken, _) = levels
        .reserve(query, units, now)
        .unwrap_or_else(|refused| panic!("{refused:?}"));
    levels.give_back(query, &taken, units, units, now);
}

fn left(levels: &Levels, query: &Query<'_>, now: Moment) -> u64 {
    levels.standing(query, now).remaining
}

#[test]
fn a_calendar_period_ends_with_the_zones_day() {
    let (levels, window) = (Levels::default(), calendar(Part::Day, "America/New_York"));
    let query = query(&window);
    // 1 November 2026 has 25 hours there, from 4:00 UTC on.
    use_up(&levels, &query, 100, at("2026-11-01T04:00:00Z"));
    let late = at("2026-11-02T04:59:59Z");
    let Err(Refused::Exhausted(standing)) = levels.reserve(&query, 1, late) else {
        panic!("the day is not over");
    };
    assert_eq!(
        (standing.retry_after_ns, standing.reset_ns),
        (1_000_000_000, 1_000_000_000)
    );
    use_up(&levels, &query, 100, at("2026-11-02T05:00:00Z"));
}

#[test]
fn a_wall_clock_that_is_set_neither_resets_nor_locks_a_calendar() {
    let (levels, window) = (Levels::default(), calendar(Part::Day, "UTC"));
    let query = query(&window);
    let noon = at("2026-06-10T12:00:00Z");
    use_up(&levels, &query, 100, noon);
    // Within the day either way: nothing new.
    assert!(
        levels
            .reserve(&query, 1, with_wall(noon, "2026-06-10T23:00:00Z"))
            .is_err()
    );
    assert!(
        levels
            .reserve(&query, 1, with_wall(noon, "2026-06-10T01:00:00Z"))
            .is_err()
    );
    // A day ahead: that day's own allowance, once.
    let ahead = with_wall(noon, "2026-06-11T12:00:00Z");
    use_up(&levels, &query, 60, ahead);
    // Back again: the day before is still used up, and after it the day that was begun too early goes on.
    assert!(
        levels
            .reserve(&query, 1, with_wall(noon, "2026-06-10T13:00:00Z"))
            .is_err()
    );
    assert_eq!(left(&levels, &query, at("2026-06-11T00:00:00Z")), 40);
    // A year ahead and back: not locked, not reset.
    use_up(&levels, &query, 10, with_wall(noon, "2027-06-10T12:00:00Z"));
    assert!(
        levels
            .reserve(&query, 1, with_wall(noon, "2026-06-10T14:00:00Z"))
            .is_err()
    );
    assert_eq!(left(&levels, &query, at("2026-06-11T01:00:00Z")), 40);
    assert_eq!(left(&levels, &query, at("2026-06-12T01:00:00Z")), 100);
}

#[test]
fn debt_is_carried_over_periods_also_those_without_requests() {
    for (window, period_ms) in [
        (calendar(Part::Day, "UTC"), DAY_MS),
        (
            Window::Sliding {
                ns: DAY_MS * 1_000_000,
            },
            DAY_MS,
        ),
    ] {
        let levels = Levels::default();
        let query = query(&window);
        let begin = at("2026-06-10T00:00:00Z");
        let later = |periods: u64| Moment {
            steady_ns: begin.steady_ns + periods * period_ms * 1_000_000,
            unix_ms: begin.unix_ms + periods * period_ms,
        };
        use_up(&levels, &query, 100, begin);
        levels.charge(&query, 350, begin);
        // 450 used: this day and three more are used up whole, and half of the one after.
        let Err(Refused::Exhausted(standing)) = levels.reserve(&query, 50, later(0)) else {
            panic!("in debt");
        };
        assert!(
            standing.retry_after_ns >= 3 * period_ms * 1_000_000,
            "{standing:?}"
        );
        assert!(levels.reserve(&query, 1, later(3)).is_err(), "{window:?}");
        let fourth = left(&levels, &query, later(4));
        // Asked without having been used in between.
        assert!(levels.reserve(&query, 51, later(4)).is_err(), "{window:?}");
        let settled = left(&levels, &query, later(4));
        assert!(
            settled <= 50 && (fourth == settled || fourth == 100),
            "{window:?}: {fourth}, {settled}"
        );
        assert_eq!(left(&levels, &query, later(7)), 100, "{window:?}");
    }
}

/// A window of a day, and the moment so many of them after the beginning of one.
fn days(window: &Window) -> impl Fn(u64) -> Moment + use<> {
    assert!(!matches!(window, Window::Bucket { .. }));
    let begin = at("2026-06-10T00:00:00Z");
    move |days| Moment {
        steady_ns: begin.steady_ns + days * DAY_MS * 1_000_000,
        unix_ms: begin.unix_ms + days * DAY_MS,
    }
}

fn day_windows() -> [Window; 2] {
    let ns = DAY_MS * 1_000_000;
    [calendar(Part::Day, "UTC"), Window::Sliding { ns }]
}

#[test]
fn a_lowered_amount_leaves_use_as_it_was_counted() {
    for window in day_windows() {
        let (levels, later) = (Levels::default(), days(&window));
        let before = query(&window);
        let after = Query { amount: 10, ..before };
        use_up(&levels, &before, 90, later(0));
        let Err(Refused::Exhausted(standing)) = levels.reserve(&after, 1, later(0)) else {
            panic!("{window:?}: 90 of 10 are used");
        };
        assert_eq!(standing.remaining, 0);
        // When this day is over, or has faded; not nine days later.
        let wait = standing.retry_after_ns;
        assert!(wait <= 2 * DAY_MS * 1_000_000, "{window:?}: {standing:?}");
        let then = Moment {
            steady_ns: later(0).steady_ns + wait,
            unix_ms: later(0).unix_ms + wait / 1_000_000,
        };
        use_up(&levels, &after, 1, then);
        use_up(&levels, &after, 10, later(4));
    }
}

#[test]
fn overuse_of_a_lowered_amount_is_debt() {
    let window = calendar(Part::Day, "UTC");
    let (levels, later) = (Levels::default(), days(&window));
    let before = query(&window);
    let after = Query { amount: 10, ..before };
    use_up(&levels, &before, 90, later(0));
    // A request that ran when the amount was lowered used more than it had reserved.
    levels.charge(&after, 25, later(0));
    let Err(Refused::Exhausted(standing)) = levels.reserve(&after, 1, later(0)) else {
        panic!("in debt");
    };
    assert_eq!(standing.retry_after_ns, 3 * DAY_MS * 1_000_000);
    assert!(levels.reserve(&after, 1, later(1)).is_err());
    // The second day is not asked at all.
    assert!(levels.reserve(&after, 6, later(3)).is_err());
    use_up(&levels, &after, 5, later(3));
    use_up(&levels, &after, 10, later(4));
}

#[test]
fn what_came_back_or_a_raised_amount_covers_is_no_debt() {
    for window in day_windows() {
        let (levels, later) = (Levels::default(), days(&window));
        let query = query(&window);
        let (held, _) = levels.reserve(&query, 10, later(0)).expect("room");
        use_up(&levels, &query, 90, later(0));
        levels.charge(&query, 5, later(0));
        levels.give_back(&query, &held, 10, 0, later(0));
        let _ = levels.reserve(&query, 1, later(1));
        assert_eq!(left(&levels, &query, later(2)), 100, "{window:?}");

        let (levels, raised) = (Levels::default(), Query { amount: 200, ..query });
        use_up(&levels, &query, 100, later(0));
        levels.charge(&query, 20, later(0));
        let _ = levels.reserve(&raised, 1, later(1));
        assert_eq!(levels.settled(&raised, later(1)), 0, "{window:?}");
    }
}

#[test]
fn what_only_counts_has_no_debt() {
    for window in day_windows() {
        let (levels, later) = (Levels::default(), days(&window));
        let soft = Query {
            hard: false,
            ..query(&window)
        };
        use_up(&levels, &soft, 350, later(0));
        levels.charge(&soft, 50, later(0));
        assert_eq!(levels.settled(&soft, later(0)), 400);
        use_up(&levels, &soft, 1, later(1));
        assert_eq!(levels.settled(&soft, later(1)), 1, "{window:?}");
    }
}

#[test]
fn debt_finds_a_place_where_a_table_is_full() {
    let window = calendar(Part::Day, "UTC");
    let levels = Levels::new(
        [8, 8, 4096, 8].map(Table::in_memory),
        at("2026-06-10T00:00:00Z").steady_ns,
    );
    let later = days(&window);
    let query = |subject: u64| Query {
        id: subject << 32,
        ..query(&window)
    };
    for subject in 1..=8 {
        use_up(&levels, &query(subject), 100, later(0));
    }
    levels.charge(&query(3), 150, later(0));
    assert_eq!(levels.overflowed(), 0);
    // The next day it counts with the others that find no place. Then the others' places are free again.
    let then = Moment {
        steady_ns: later(2).steady_ns + 3_600_000_000_000,
        unix_ms: later(2).unix_ms + 3_600_000,
    };
    assert!(levels.reserve(&query(3), 51, then).is_err());
    use_up(&levels, &query(3), 50, then);
}

#[test]
fn a_late_return_goes_to_the_period_from_which_it_was_taken() {
    let (levels, window) = (Levels::default(), calendar(Part::Day, "UTC"));
    let query = query(&window);
    let evening = at("2026-06-10T23:59:00Z");
    let (taken, _) = levels.reserve(&query, 80, evening).expect("room");
    let morning = at("2026-06-11T00:01:00Z");
    use_up(&levels, &query, 100, morning);
    levels.give_back(&query, &taken, 80, 10, morning);
    assert!(
        levels.reserve(&query, 1, morning).is_err(),
        "the new day got nothing of it"
    );
    assert_eq!(left(&levels, &query, evening), 90);
}

#[test]
fn what_time_gave_back_is_not_given_back_again() {
    let (levels, window) = (Levels::default(), Window::Bucket { ns: 60_000_000_000 });
    let query = query(&window);
    let begin = at("2026-06-10T00:00:00Z");
    let minute = |n: u64| Moment {
        steady_ns: begin.steady_ns + n * 60_000_000_000,
        ..begin
    };
    // Ten long streams that reserve a whole window each and use nearly nothing.
    let held: Vec<Taken> = (0..10)
        .map(|n| levels.reserve(&query, 100, minute(n)).expect("room").0)
        .collect();
    levels.reserve(&query, 100, minute(10)).expect("room");
    for taken in &held {
        levels.give_back(&query, taken, 100, 1, minute(10));
    }
    assert_eq!(left(&levels, &query, minute(10)), 0);
    assert!(levels.reserve(&query, 10, minute(10)).is_err());
}

#[test]
fn a_sliding_window_grants_no_burst_at_its_border() {
    let second_ns = 1_000_000_000;
    let (levels, window) = (Levels::default(), Window::Sliding { ns: 10 * second_ns });
    let query = query(&window);
    let begin = at("2026-06-10T00:00:00Z");
    let at_s = |s: u64| Moment {
        steady_ns: begin.steady_ns + s * second_ns,
        ..begin
    };
    use_up(&levels, &query, 100, at_s(9));
    // A moment later a fixed window would begin anew.
    assert!(levels.reserve(&query, 1, at_s(10)).is_err());
    assert_eq!(left(&levels, &query, at_s(15)), 50);
    assert_eq!(left(&levels, &query, at_s(20)), 100);
}

#[test]
fn what_is_given_back_below_a_reservation_was_no_time_that_passed_for_it() {
    let (levels, window) = (Levels::default(), Window::Bucket { ns: 60_000_000_000 });
    let query = query(&window);
    let begin = at("2026-06-10T00:00:00Z");
    let later = Moment {
        steady_ns: begin.steady_ns + 30_000_000_000,
        ..begin
    };
    let (below, _) = levels.reserve(&query, 50, begin).expect("room");
    let (above, _) = levels.reserve(&query, 50, begin).expect("room");
    levels.give_back(&query, &below, 50, 0, begin);
    // Nobody has used anything; half a minute later the whole amount is there, once.
    use_up(&levels, &query, 100, later);
    levels.give_back(&query, &above, 50, 0, later);
    assert_eq!(left(&levels, &query, later), 0);
}

proptest! {
    /// Whatever is reserved, given back and charged, in whatever order: a bucket never says that more is left than one
    /// that knew from the beginning what each request would use.
    #[test]
    fn a_bucket_with_reservations_grants_no_more_than_one_that_knew(
        steps in proptest::collection::vec((0u64..20_000_000_000, 1u64..60, 0u64..60, 0usize..4), 1..60)
    ) {
        let ns = 60_000_000_000;
        let (levels, window) = (Levels::default(), Window::Bucket { ns });
        let query = query(&window);
        let mut now = at("2026-06-10T00:00:00Z");
        // Of each request: when, what it holds or has used, and its reservation while it runs.
        let mut requests: Vec<(u64, u64, Option<Taken>, u64)> = Vec::new();
        for (pause_ns, units, used, which) in steps {
            now.steady_ns += if which == 0 { pause_ns } else { 0 };
            if which < 2 {
                if let Ok((taken, _)) = levels.reserve(&query, units, now) {
                    requests.push((now.steady_ns, units, Some(taken), units));
                }
            } else if let Some(at) = requests.iter().position(|request| request.2.is_some()) {
                // The oldest, or the youngest.
                let at = if which == 2 { at } else { requests.len() - 1 };
                let request = &mut requests[at];
                if let Some(taken) = request.2.take() {
                    request.1 = used.min(request.3);
                    levels.give_back(&query, &taken, request.3, request.1, now);
                }
            }
            let knew_ns = requests.iter().fold(0, |arrival_ns: u64, (at_ns, units, ..)| {
                arrival_ns.max(*at_ns) + window::cost_ns(query.amount, ns, *units)
            });
            let knew = window::bucket_standing(query.amount, ns, knew_ns, now.steady_ns).remaining;
            let left = left(&levels, &query, now);
            prop_assert!(left <= knew, "{left} of {knew}");
        }
    }
}
