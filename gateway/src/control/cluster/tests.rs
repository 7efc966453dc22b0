//! Hosts and a store in one thread, with time that goes on as the test says: what is granted never adds up to more
//! than there is, whatever order things happen in and whatever gets lost.

use std::sync::Arc;

use proptest::prelude::*;

use super::{
    level::{Level, Report, Times},
    tracker::{Now, Tracker},
};
use crate::quota::lease::{Kind, Leased, Opening};

const MS: u64 = 1_000_000;
const LEASE_NS: u64 = 5_000 * MS;
const START_NS: u64 = 1_000_000 * MS;
const TIMES: Times = Times {
    lease_us: LEASE_NS / 1_000,
    keep_us: 3_600_000_000,
};

/// A request that runs.
struct Running {
    since_ns: u64,
    reserved: u64,
    until_ns: u64,
}

struct Host {
    level: Arc<Leased>,
    tracker: Tracker,
    running: Vec<Running>,
    /// Reports whose way to the store takes long.
    late: Vec<Report>,
    /// The expiry of a lease that ran out in silence and was counted as lost.
    lapsed_us: u64,
}

struct World {
    kind: Kind,
    amount: u64,
    opening: u64,
    now_ns: u64,
    store: Level,
    hosts: Vec<Host>,
    instances: u64,
    /// Used for good, by all hosts that ever were.
    used: u64,
    /// When each request began and what it used.
    requests: Vec<(u64, u64)>,
    /// What hosts used beyond reservations.
    overuse: u64,
    /// What dead hosts had used and not reported, and what hosts held whose lease ran out in silence.
    lost: u64,
    /// The most that openings admitted.
    opened: u64,
}

impl World {
    fn new(kind: Kind, amount: u64, opening: u64, hosts: usize) -> World {
        let mut world = World {
            kind,
            amount,
            opening,
            now_ns: START_NS,
            store: Level::default(),
            hosts: Vec::new(),
            instances: 0,
            used: 0,
            requests: Vec::new(),
            overuse: 0,
            lost: 0,
            opened: 0,
        };
        for _ in 0..hosts {
            let host = world.host();
            world.hosts.push(host);
        }
        world
    }

    fn now(&self) -> Now {
        Now {
            ns: self.now_ns,
            unix_ms: self.now_ns / MS,
            lease_ns: LEASE_NS,
            defer_ns: 0,
        }
    }

    fn host(&mut self) -> Host {
        self.instances += 1;
        let opening = Opening {
            units: self.opening,
            until_ns: self.now_ns + LEASE_NS,
        };
        // One request of any size, or the opening's units.
        self.opened += if self.opening > 0 {
            self.opening.max(LARGEST)
        } else {
            0
        };
        let level = Arc::new(Leased::new(1, self.kind, self.amount, opening));
        Host {
            tracker: Tracker::new(level.clone(), format!("h.{}", self.instances), self.now()),
            level,
            running: Vec::new(),
            late: Vec::new(),
            lapsed_us: 0,
        }
    }

    fn reserve(&mut self, host: usize, units: u64) -> bool {
        let host = &mut self.hosts[host];
        let Ok(standing) = host.level.reserve(units, self.now_ns) else {
            return false;
        };
        host.running.push(Running {
            since_ns: self.now_ns,
            reserved: units,
            until_ns: standing.until_ns,
        });
        true
    }

    fn settle(&mut self, host: usize, unused: u64, over: u64) {
        let host = &mut self.hosts[host];
        if host.running.is_empty() {
            return;
        }
        let running = host.running.remove(0);
        let used = running.reserved - unused.min(running.reserved) + over;
        host.level
            .settle(running.reserved, used, running.until_ns, self.now_ns);
        if self.kind != Kind::Parallel {
            self.used += used;
            self.requests.push((running.since_ns, used));
            self.overuse += used.saturating_sub(running.reserved);
        }
    }

    fn round(&mut self, host: usize, fate: Fate) {
        let (now, now_us) = (self.now(), self.now_ns / 1_000);
        let host = &mut self.hosts[host];
        let Some(report) = host.tracker.report(now) else {
            return;
        };
        match fate {
            Fate::Fine => {
                let answer = self.store.report(&report, TIMES, now_us);
                host.tracker.answered(&report, &answer, self.now_ns, now);
            }
            Fate::NeverThere => {}
            Fate::AnswerLost => drop(self.store.report(&report, TIMES, now_us)),
            Fate::Twice => {
                let answer = self.store.report(&report, TIMES, now_us);
                host.tracker.answered(&report, &answer, self.now_ns, now);
                self.store.report(&report, TIMES, now_us);
            }
            Fate::Late => host.late.push(report),
        }
    }

    fn deliver_late(&mut self, host: usize) {
        if let Some(report) = self.hosts[host].late.pop() {
            self.store.report(&report, TIMES, self.now_ns / 1_000);
        }
    }

    fn die(&mut self, host: usize) {
        let fresh = self.host();
        let mut dead = std::mem::replace(&mut self.hosts[host], fresh);
        let reported = self.store.reported_by(dead.tracker.host()).unwrap_or(0);
        self.lost += dead.level.look().spent.saturating_sub(reported);
        // Its late reports may still come.
        for report in dead.late.drain(..) {
            self.store.report(&report, TIMES, self.now_ns / 1_000);
        }
    }

    fn held(&self) -> u64 {
        let running = self.hosts.iter().flat_map(|host| &host.running);
        running.map(|running| running.reserved).sum()
    }

    /// A silent host's requests run on when the store gives its lease to others.
    fn note_lapsed(&mut self) {
        for host in &mut self.hosts {
            let Some((out, expiry_us)) = self.store.lease_of(host.tracker.host()) else {
                continue;
            };
            if expiry_us <= self.now_ns / 1_000 && expiry_us != host.lapsed_us {
                host.lapsed_us = expiry_us;
                self.lost += out;
            }
        }
    }

    fn check(&self) -> Result<(), TestCaseError> {
        let (sum, most) = (
            self.used + self.held(),
            self.amount + self.overuse + self.lost + self.opened,
        );
        prop_assert!(
            sum <= most,
            "{} used, {} held, {most} allowed",
            self.used,
            self.held()
        );
        Ok(())
    }
}

#[derive(Debug, Clone, Copy)]
enum Fate {
    Fine,
    NeverThere,
    AnswerLost,
    Twice,
    Late,
}

#[derive(Debug, Clone)]
enum Step {
    Pass(u64),
    Reserve(usize, u64),
    Settle(usize, u64, u64),
    Round(usize, Fate),
    Deliver(usize),
    Die(usize),
}

const HOSTS: usize = 3;
const LARGEST: u64 = 40;

fn step(deaths: bool) -> impl Strategy<Value = Step> {
    let host = 0..HOSTS;
    let fate = prop_oneof![
        6 => Just(Fate::Fine),
        1 => Just(Fate::NeverThere),
        1 => Just(Fate::AnswerLost),
        1 => Just(Fate::Twice),
        1 => Just(Fate::Late),
    ];
    let over = prop_oneof![9 => Just(0_u64), 1 => 0..30_u64];
    prop_oneof![
        4 => (1..200_u64).prop_map(Step::Pass),
        1 => (1_000..7_000_u64).prop_map(Step::Pass),
        10 => (host.clone(), 1..=LARGEST).prop_map(|(host, units)| Step::Reserve(host, units)),
        8 => (host.clone(), 0..20_u64, over).prop_map(|(host, unused, over)| Step::Settle(host, unused, over)),
        10 => (host.clone(), fate).prop_map(|(host, fate)| Step::Round(host, fate)),
        1 => host.clone().prop_map(Step::Deliver),
        u32::from(deaths) => host.prop_map(Step::Die),
    ]
}

fn play(world: &mut World, steps: Vec<Step>) -> Result<(), TestCaseError> {
    for step in steps {
        match step {
            Step::Pass(ms) => {
                world.now_ns += ms * MS;
                world.note_lapsed();
            }
            Step::Reserve(host, units) => drop(world.reserve(host, units)),
            Step::Settle(host, unused, over) => world.settle(host, unused, over),
            Step::Round(host, fate) => world.round(host, fate),
            Step::Deliver(host) => world.deliver_late(host),
            Step::Die(host) => world.die(host),
        }
        world.check()?;
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn credit_is_never_overspent(steps in prop::collection::vec(step(false), 1..300), amount in 50..2_000_u64) {
        play(&mut World::new(Kind::Credit, amount, 0, HOSTS), steps)?;
    }

    #[test]
    fn the_dead_take_with_them_what_they_had_not_reported(
        steps in prop::collection::vec(step(true), 1..300),
        amount in 50..2_000_u64,
        opening in prop_oneof![Just(0_u64), 1..30_u64],
    ) {
        play(&mut World::new(Kind::Credit, amount, opening, HOSTS), steps)?;
    }

    #[test]
    fn parallel_slots_are_never_too_many(steps in prop::collection::vec(step(false), 1..300), amount in 50..200_u64) {
        play(&mut World::new(Kind::Parallel, amount, 0, HOSTS), steps)?;
    }

    /// A bucket earns back, so what may be used grows with time; what is held counts as used.
    #[test]
    fn a_bucket_grants_its_amount_and_what_time_earned(
        steps in prop::collection::vec(step(false), 1..300),
        amount in 50..2_000_u64,
    ) {
        let window_ns = 60_000 * MS;
        let mut world = World::new(Kind::Bucket { window_ns }, amount, 0, HOSTS);
        for step in steps {
            play_bucket(&mut world, step);
            let spent: u64 = world.hosts.iter().map(|host| host.level.look().spent).sum();
            let earned = (world.now_ns - START_NS) * amount / window_ns;
            prop_assert!(spent <= amount + earned + world.overuse + world.lost + 1, "{spent} {earned}");
        }
    }

    /// Whoever reserves much and uses little saves nothing up.
    #[test]
    fn a_bucket_with_reservations_grants_no_more_than_one_that_knew(
        steps in prop::collection::vec(step(false), 1..300),
        amount in 50..400_u64,
    ) {
        let window_ns = 2_000 * MS;
        let mut world = World::new(Kind::Bucket { window_ns }, amount, 0, HOSTS);
        for step in steps {
            play_bucket(&mut world, step);
            let used = of_a_bucket_that_knew(&world, window_ns);
            let most = amount + world.overuse + world.lost + HOSTS as u64;
            prop_assert!(used <= most, "{used} of {most}");
        }
    }
}

/// Units that are used up of a bucket that knew from the beginning what each request would use.
fn of_a_bucket_that_knew(world: &World, window_ns: u64) -> u64 {
    let mut requests = world.requests.clone();
    requests.sort_unstable();
    let cost_ns = |units: u64| units * window_ns / world.amount;
    let arrival_ns = requests.iter().fold(0, |arrival_ns: u64, (since_ns, used)| {
        arrival_ns.max(*since_ns) + cost_ns(*used)
    });
    arrival_ns.saturating_sub(world.now_ns) * world.amount / window_ns
}

/// Reserves on the first host, and tells the store.
fn reserve_after_rounds(world: &mut World, units: u64) {
    let granted = (0..10).any(|_| {
        let granted = world.reserve(0, units);
        world.round(0, Fate::Fine);
        granted
    });
    assert!(granted);
}

/// Two requests reserve half of a bucket each and use nothing: the second gives back after time has emptied the level
/// below it, and what another used since then stays used.
#[test]
fn what_a_bucket_was_given_back_by_time_is_not_given_back_again() {
    let window_ns = 60_000 * MS;
    let mut world = World::new(Kind::Bucket { window_ns }, 100, 0, 1);
    for _ in 0..2 {
        reserve_after_rounds(&mut world, 50);
    }
    world.now_ns += 1_000 * MS;
    world.settle(0, 50, 0);
    world.round(0, Fate::Fine);
    world.now_ns += 30_000 * MS;
    reserve_after_rounds(&mut world, 50);
    let used = world.store.used();
    // The second of the two, which began 31 seconds ago, when half a minute had to pass for it to be earned back.
    world.settle(0, 50, 0);
    world.round(0, Fate::Fine);
    assert_eq!(world.store.used(), used);
}

#[test]
fn a_bucket_gives_back_what_was_not_used_above_what_was() {
    let window_ns = 60_000 * MS;
    let mut world = World::new(Kind::Bucket { window_ns }, 100, 0, 1);
    for used in [50, 0] {
        reserve_after_rounds(&mut world, 50);
        if used > 0 {
            world.settle(0, 0, 0);
        }
        world.round(0, Fate::Fine);
    }
    // Of 50 that were used for good time has given back 20; the 50 above them have not been touched.
    world.now_ns += 12_000 * MS;
    world.settle(0, 50, 0);
    world.round(0, Fate::Fine);
    assert!((29..=31).contains(&world.store.used()), "{}", world.store.used());
}

/// A clock that was ahead by years and is right again: periods begin, windows pass, leases end.
#[test]
fn a_clock_that_was_ahead_leaves_nothing_behind() {
    let years_us = 5 * 365 * 86_400 * 1_000_000_u64;
    let (now_us, hour_ms) = (START_NS / 1_000, 3_600_000);
    let report = |kind, host: &str, spent| Report {
        id: 1,
        host: host.into(),
        kind,
        amount: 100,
        seq: 1,
        spent,
        from_start: 0,
        from_known: 0,
        birth: 0,
        kept: 0,
        wanted: 40,
        needed: 40,
        held: 0,
        hard: true,
    };
    let period = |us: u64| Kind::Period {
        end_unix_ms: us / 1_000 / hour_ms * hour_ms + hour_ms,
        length_ms: hour_ms,
    };
    let mut level = Level::default();
    level.report(
        &report(period(now_us + years_us), "a", 30),
        TIMES,
        now_us + years_us,
    );
    let answer = level.report(&report(period(now_us), "b", 0), TIMES, now_us);
    assert_eq!(answer.used, 30, "what was used counts on");
    let later_us = now_us + 2 * hour_ms * 1_000;
    let answer = level.report(&report(period(later_us), "c", 0), TIMES, later_us);
    assert_eq!(answer.used, 0, "and ends with its period");

    let sliding = Kind::Sliding {
        window_ns: 60_000 * MS,
    };
    let mut level = Level::default();
    level.report(&report(sliding, "a", 30), TIMES, now_us + years_us);
    let answer = level.report(&report(sliding, "b", 0), TIMES, now_us);
    assert_eq!((answer.used, answer.hosts), (30, 2));
    let later_us = now_us + 70_000_000;
    let answer = level.report(&report(sliding, "c", 0), TIMES, later_us);
    assert_eq!(
        (answer.used, answer.hosts),
        (0, 1),
        "the lease of the first is over too"
    );
}

fn play_bucket(world: &mut World, step: Step) {
    match step {
        Step::Pass(ms) => {
            world.now_ns += ms * MS;
            world.note_lapsed();
        }
        Step::Reserve(host, units) => drop(world.reserve(host, units)),
        Step::Settle(host, unused, over) => world.settle(host, unused, over),
        Step::Round(host, fate) => world.round(host, fate),
        Step::Deliver(host) => world.deliver_late(host),
        Step::Die(_) => {}
    }
}

/// All hosts ask as much as they can: the whole amount is used, to the last request's size, and nobody starves.
#[test]
fn hungry_hosts_use_all_there_is() {
    let mut world = World::new(Kind::Credit, 10_000, 0, HOSTS);
    let mut served = [0; HOSTS];
    for _ in 0..2_000 {
        world.now_ns += 10 * MS;
        for (host, served) in served.iter_mut().enumerate() {
            if world.reserve(host, 7) {
                *served += 1;
                world.settle(host, 0, 0);
            }
            world.round(host, Fate::Fine);
        }
    }
    assert!(world.used > 10_000 - 7 * HOSTS as u64, "{}", world.used);
    assert!(served.iter().all(|served| *served > 300), "{served:?}");
}

#[test]
fn one_request_may_take_all() {
    let mut world = World::new(Kind::Credit, 1_000, 0, HOSTS);
    assert!(!world.reserve(0, 1_000));
    world.round(0, Fate::Fine);
    assert!(world.reserve(0, 1_000));
    world.settle(0, 0, 0);
    world.round(0, Fate::Fine);
    assert!(!world.reserve(1, 1));
    world.round(1, Fate::Fine);
    assert!(!world.reserve(1, 1));
}

#[test]
fn a_dead_hosts_lease_comes_back() {
    let mut world = World::new(Kind::Credit, 100, 0, 2);
    world.reserve(0, 90);
    world.round(0, Fate::Fine);
    assert!(world.reserve(0, 90));
    world.round(0, Fate::Fine);
    world.die(0);
    let ask = |world: &mut World| {
        world.now_ns += 50 * MS;
        let admitted = world.reserve(1, 90);
        world.round(1, Fate::Fine);
        admitted
    };
    assert!(!ask(&mut world));
    assert!(!ask(&mut world));
    world.now_ns += LEASE_NS;
    ask(&mut world);
    assert!(ask(&mut world));
}

#[test]
fn idle_units_go_back_and_idle_levels_leave() {
    let mut world = World::new(Kind::Credit, 6_400, 100, 2);
    assert!(world.reserve(0, 10));
    world.settle(0, 0, 0);
    world.round(0, Fate::Fine);
    let leased = |world: &World| world.hosts[0].level.look().allowance - 10;
    assert!(leased(&world) >= 100);
    for _ in 0..40 {
        world.now_ns += 100 * MS;
        world.round(0, Fate::Fine);
    }
    assert!(leased(&world) <= 20, "{}", leased(&world));
    let now = world.now();
    assert!(!world.hosts[0].tracker.retire(now));
    world.now_ns += super::tracker::RETIRE_NS;
    let now = world.now();
    world.round(0, Fate::Fine);
    assert!(world.hosts[0].tracker.retire(now));
    world.round(0, Fate::Fine);
    assert!(world.hosts[0].level.is_retired());
}

#[test]
fn a_level_that_is_used_up_stays() {
    let mut world = World::new(Kind::Credit, 100, 100, 1);
    assert!(world.reserve(0, 100));
    world.settle(0, 0, 0);
    world.round(0, Fate::Fine);
    for _ in 0..100 {
        world.now_ns += 1_000 * MS;
        world.round(0, Fate::Fine);
        let now = world.now();
        assert!(!world.hosts[0].tracker.retire(now));
        let refused = world.hosts[0]
            .level
            .reserve(1, world.now_ns)
            .expect_err("nothing is left");
        assert!(!refused.stale, "that nothing is left stays known");
    }
}

#[test]
fn without_the_store_a_host_has_its_share_and_reports_it_once() {
    let mut world = World::new(Kind::Credit, 900, 0, 2);
    world.reserve(0, 100);
    world.round(0, Fate::Fine);
    assert!(world.reserve(0, 100));
    world.settle(0, 0, 0);
    world.round(0, Fate::Fine);
    // The store is gone. When the lease is over, a third of 900 is this host's, of which a third of 100 is used.
    let mut used = 100;
    for _ in 0..200 {
        world.now_ns += 100 * MS;
        let now = world.now();
        world.hosts[0].tracker.grant_locally(3, now);
        if world.reserve(0, 10) {
            world.settle(0, 0, 0);
            used += 10;
        }
    }
    assert!(world.hosts[0].tracker.is_local());
    let share = 900 / 3 - 100 / 3;
    assert!(used >= 100 + share - 10 && used <= 100 + share + 30, "{used}");
    // It is back: what was used is told once, although the first answer is lost.
    world.round(0, Fate::AnswerLost);
    world.now_ns += 100 * MS;
    world.round(0, Fate::Fine);
    assert!(!world.hosts[0].tracker.is_local());
    assert_eq!(world.store.used(), used);
    world.now_ns += LEASE_NS;
    world.reserve(1, 1);
    world.round(1, Fate::Fine);
    assert!(world.reserve(1, 1));
    assert!(!world.reserve(1, 900 - used));
}

#[test]
fn a_store_that_lost_its_data_hears_what_still_counts() {
    let mut world = World::new(Kind::Credit, 1_000, 0, 2);
    for host in 0..2 {
        // What one host has spare is another's within some rounds.
        let rounds = (0..20).find(|_| {
            world.now_ns += 50 * MS;
            let admitted = world.reserve(host, 300);
            world.round(0, Fate::Fine);
            world.round(1, Fate::Fine);
            admitted
        });
        assert!(rounds.is_some());
        world.settle(host, 0, 0);
        world.round(host, Fate::Fine);
    }
    world.store = Level::default();
    for host in 0..2 {
        world.now_ns += LEASE_NS;
        world.round(host, Fate::Fine);
    }
    assert_eq!(world.store.used(), 600);
    // A store that only forgot the host counts nothing twice.
    world.store.forget_hosts();
    world.reserve(0, 1);
    world.now_ns += 10 * MS;
    world.round(0, Fate::Fine);
    assert_eq!(world.store.used(), 600);
}

#[test]
fn debt_goes_along_into_the_next_period() {
    let day = |end_unix_ms| Kind::Period {
        end_unix_ms,
        length_ms: 86_400_000,
    };
    let first_end = START_NS / MS + 1_000;
    let mut world = World::new(day(first_end), 100, 100, 1);
    assert!(world.reserve(0, 100));
    world.settle(0, 0, 30);
    world.round(0, Fate::Fine);
    assert_eq!(world.store.used(), 130);
    world.now_ns += 1_500 * MS;
    world.kind = day(first_end + 86_400_000);
    world.opening = 0;
    let next = world.host();
    world.hosts.push(next);
    world.reserve(1, 71);
    world.round(1, Fate::Fine);
    assert_eq!(world.store.used(), 30);
    assert!(!world.reserve(1, 71));
    assert!(world.reserve(1, 70));
}

/// A host whose clock runs ahead cannot begin the next period for all.
#[test]
fn a_period_begins_by_the_stores_clock() {
    let end_unix_ms = START_NS / MS + 60_000;
    let day = |end_unix_ms| Kind::Period {
        end_unix_ms,
        length_ms: 86_400_000,
    };
    let mut world = World::new(day(end_unix_ms), 100, 100, 1);
    assert!(world.reserve(0, 80));
    world.settle(0, 0, 0);
    world.round(0, Fate::Fine);
    world.kind = day(end_unix_ms + 86_400_000);
    world.opening = 0;
    let ahead = world.host();
    world.hosts.push(ahead);
    world.reserve(1, 30);
    world.round(1, Fate::Fine);
    assert_eq!(world.store.used(), 80);
    assert!(!world.reserve(1, 30));
    world.now_ns += 61_000 * MS;
    world.round(1, Fate::Fine);
    assert_eq!(world.store.used(), 0);
    assert!(world.reserve(1, 30));
}
