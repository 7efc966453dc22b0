use std::{
    net::IpAddr,
    path::Path,
    sync::atomic::{AtomicU64, Ordering},
};

use proptest::prelude::*;

use super::*;
use crate::{
    config::{self, Config, schema},
    quota::{Ids, Subject},
};

fn config(text: &str) -> Config {
    let head = "listeners: [{ address: 127.0.0.1:0 }]\nproviders: { p: { kind: openai }, q: { kind: openai } }\n\
                models: [{ name: m, targets: [{ provider: p }] }]\n";
    config::parse(&format!("{head}{text}"), "test", Path::new("/"), &|_| None)
        .unwrap_or_else(|errors| panic!("{errors}"))
}

struct World {
    quota: Arc<Quota>,
    policies: Arc<Policies>,
}

impl World {
    fn new(text: &str) -> World {
        let config = config(text);
        let quota = Arc::new(Quota::default());
        quota.budgets.set_file(&config);
        World {
            quota,
            policies: Arc::new(Policies::new(&config)),
        }
    }

    fn admit_as(&self, ids: Ids, ask: Ask) -> Result<Admission, Box<Denied>> {
        let facts = Facts {
            ids,
            user: "",
            model: "m",
            path: "/v1/chat/completions",
            client: IpAddr::from([192, 0, 2, 1]),
            header: &|_| None,
            own: &[],
        };
        admit(&self.quota, &self.policies, &facts, ask)
    }

    fn admit(&self, ask: Ask) -> Result<Admission, Box<Denied>> {
        self.admit_as(Ids::new("a", "t", "o"), ask)
    }

    fn budget(&self, subject: Subject) -> crate::quota::budget::Status {
        let budget = self.quota.budgets.get(&subject).expect("a budget");
        self.quota.budgets.status(&budget, &self.quota.levels)
    }
}

/// A dollar for a million tokens either way: 1000 nano-dollars each.
const RATES: Rates = Rates {
    input: 1_000_000_000,
    output: 1_000_000_000,
};

fn ask(input: u64, output: u64) -> Ask {
    Ask {
        input,
        output,
        output_is_explicit: true,
        stream: false,
        rates: Some(RATES),
    }
}

fn used(input: u64, output: u64) -> Amounts {
    Amounts {
        input,
        output,
        nano_usd: RATES.cost(input, output),
    }
}

#[track_caller]
fn granted(result: Result<Admission, Box<Denied>>) -> Admission {
    result.unwrap_or_else(|denied| panic!("{denied:?}"))
}

#[track_caller]
fn refused(result: Result<Admission, Box<Denied>>) -> Box<Denied> {
    result.err().expect("a refusal")
}

#[test]
fn all_or_nothing() {
    let world = World::new("limits: [{ requests: 2, every: 1mo }, { tokens: 30, every: 1mo }]");
    let first = granted(world.admit(ask(10, 10)));
    let denied = refused(world.admit(ask(10, 10)));
    assert_eq!(
        (&*denied.name, denied.unit, denied.why),
        ("limits[1]", Unit::Tokens, Why::Exhausted)
    );
    assert_eq!(denied.standing.remaining, 10);
    // The second try gave its request back: one is still there.
    assert_eq!(first.report.requests.expect("a limit").1.remaining, 1);
    first.reservation.settle(used(5, 0));
    let second = granted(world.admit(ask(10, 10)));
    assert_eq!(second.report.requests.expect("a limit").1.remaining, 0);
    assert_eq!(second.report.tokens.expect("a limit").1.remaining, 5);
}

#[test]
fn what_is_dropped_unsettled_goes_back() {
    let world = World::new(
        "limits: [{ requests: 2, every: 1mo }, { tokens: 30, every: 1mo, window: sliding }, { parallel: 1 }]\n\
         budget: { credit: 1 }",
    );
    for _ in 0..10 {
        drop(granted(world.admit(ask(10, 10))));
    }
    let held = granted(world.admit(ask(10, 10)));
    assert_eq!(refused(world.admit(ask(1, 1))).unit, Unit::Parallel);
    held.reservation.settle(used(10, 10));
    let again = granted(world.admit(ask(5, 5)));
    again.reservation.settle(used(5, 5));
    assert_eq!(world.budget(Subject::Gateway).used, 30_000);
}

#[test]
fn overuse_is_debt_whatever_the_window() {
    for window in ["bucket", "sliding", "calendar"] {
        let world = World::new(&format!(
            "limits: [{{ tokens: 100, every: 1mo, window: {window} }}]"
        ));
        let first = granted(world.admit(ask(10, 10)));
        first.reservation.settle(used(10, 340));
        let denied = refused(world.admit(ask(1, 1)));
        assert_eq!(denied.standing.remaining, 0, "{window}");
        // 250 too many: two and a half windows, or the rest of this period and two more.
        let days = denied.standing.retry_after_ns / 86_400_000_000_000;
        assert!((55..=100).contains(&days), "{window}: {days}");
    }
}

#[test]
fn budgets_hold_one_within_the_other() {
    let world = World::new(
        "organizations: [{ name: o, budget: { usd: 3, every: 1mo } }]\n\
         teams: [{ name: t, organization: o, budget: { usd: 2, every: 1mo, alerts: [50%, 100%] } }]\n\
         budget: { usd: 100, every: 1d }",
    );
    let of_other_team = Ids::new("b", "u", "o");
    let million = |ids: Ids| {
        world
            .admit_as(ids, ask(0, 1_000_000))
            .map(|it| it.reservation.settle(used(0, 1_000_000)))
    };
    million(Ids::new("a", "t", "o")).expect("room");
    million(Ids::new("b", "t", "o")).expect("room");
    let denied = million(Ids::new("a", "t", "o")).expect_err("the team has 2");
    assert_eq!((&*denied.name, denied.why), ("budget of team t", Why::Spent));
    million(of_other_team).expect("the organization has 3");
    assert_eq!(
        &*million(of_other_team).expect_err("no more").name,
        "budget of organization o"
    );
    million(Ids::new("c", "", "")).expect("nobody's");
    assert_eq!(world.budget(Subject::Gateway).used, 4_000_000_000);
    let alerts: Vec<u16> = std::iter::from_fn(|| world.quota.budgets.next_alert())
        .map(|alert| alert.percent)
        .collect();
    assert_eq!(alerts, [50, 100]);
}

#[test]
fn credit_is_topped_up_at_run_time() {
    let world = World::new("");
    let subject = Subject::Key("a".into());
    assert_eq!(world.quota.budgets.top_up(&subject, 5), None);
    let schema: schema::Budget =
        serde_json::from_str(r#"{"credit": "0.001", "alerts": ["80%"]}"#).expect("a budget");
    world.quota.budgets.set(subject.clone(), &schema);
    granted(world.admit(ask(0, 900))).reservation.settle(used(0, 900));
    let denied = refused(world.admit(ask(0, 101)));
    assert_eq!((denied.why, denied.standing.retry_after_ns), (Why::Spent, 0));
    assert_eq!(world.quota.budgets.top_up(&subject, 1_000), Some(1_001_000));
    granted(world.admit(ask(0, 101))).reservation.settle(used(0, 101));
    assert!(world.admit(ask(0, 1)).is_err());
    // Taken out of force and set again: what was spent stays spent.
    assert!(world.quota.budgets.remove(&subject));
    assert!(world.admit(ask(0, 1_000_000)).is_ok());
    world.quota.budgets.set(subject.clone(), &schema);
    assert!(world.admit(ask(0, 1)).is_err());
    assert_eq!(world.budget(subject).used, 1_001_000);
}

#[test]
fn a_running_stream_has_the_credit_of_now() {
    let world = World::new("");
    let subject = Subject::Key("a".into());
    let set = |credit: &str| {
        let text = format!(r#"{{"credit": "{credit}", "alerts": ["80%"]}}"#);
        let schema: schema::Budget = serde_json::from_str(&text).expect("a budget");
        world.quota.budgets.set(subject.clone(), &schema);
    };
    let alerts = || std::iter::from_fn(|| world.quota.budgets.next_alert()).count();
    set("0.001");
    let stream = Ask {
        output_is_explicit: false,
        stream: true,
        ..ask(0, 1000)
    };
    let mut running = granted(world.admit(stream)).reservation;
    assert!(running.extend(1001).is_err());
    set("0.002");
    running.extend(1001).expect("more credit");
    set("0.0015");
    while running.output_allowed() < 1500 {
        running
            .extend(running.output_allowed() + 1)
            .expect("some is left");
    }
    assert!(running.extend(1501).is_err(), "less credit");
    running.settle(used(0, 1500));
    assert_eq!((world.budget(subject.clone()).used, alerts()), (1_500_000, 1));
    // Each amount of credit has its own alerts.
    set("0.01");
    granted(world.admit(ask(0, 6000)))
        .reservation
        .settle(used(0, 6000));
    assert_eq!(alerts(), 0);
    for _ in 0..2 {
        granted(world.admit(ask(0, 1000)))
            .reservation
            .settle(used(0, 1000));
    }
    assert_eq!(alerts(), 1);
}

#[test]
fn a_soft_budget_counts_and_never_refuses() {
    let world = World::new("budget: { usd: 0.001, every: 1d, hard: false, alerts: [100%] }");
    for _ in 0..3 {
        let admission = granted(world.admit(ask(0, 1_000)));
        assert_eq!(admission.reservation.output_allowed(), u64::MAX);
        admission.reservation.settle(used(0, 1_000));
    }
    assert_eq!(world.budget(Subject::Gateway).used, 3_000_000);
    assert_eq!(std::iter::from_fn(|| world.quota.budgets.next_alert()).count(), 1);
}

#[test]
fn what_nobody_knows_the_price_of_is_refused_where_cost_is_limited() {
    let unpriced = Ask {
        rates: None,
        ..ask(1, 1)
    };
    let world = World::new("limits: [{ usd: 1, every: 1d }]");
    assert_eq!(refused(world.admit(unpriced)).why, Why::Unpriced);
    let world = World::new("limits: [{ usd: 1, every: 1d, unpriced: allow }]");
    assert!(world.admit(unpriced).is_ok());
}

#[test]
fn an_implicit_output_shrinks_and_an_explicit_one_does_not() {
    let world = World::new("limits: [{ tokens: 1000, every: 1mo }]");
    let implicit = Ask {
        output_is_explicit: false,
        ..ask(10, 4_096)
    };
    assert_eq!(refused(world.admit(ask(10, 4_096))).why, Why::Never);
    let admission = granted(world.admit(implicit));
    assert_eq!(admission.reservation.output_allowed(), 990);
    // While it holds all there is another waits, unless little came back; a stream begins with that.
    assert!(world.admit(implicit).is_err());
    admission.reservation.settle(used(10, 890));
    assert!(
        world.admit(implicit).is_err(),
        "an answer that is no stream cannot be ended"
    );
    let stream = Ask {
        stream: true,
        ..implicit
    };
    let admission = granted(world.admit(stream));
    assert!((85..=90).contains(&admission.reservation.output_allowed()));
}

#[test]
fn a_stream_takes_more_until_nothing_is_left() {
    let world = World::new(
        "limits: [{ tokens: 1000, every: 1mo }, { name: tight, output_tokens: 400, every: 1mo, window: sliding, \
         on_exhausted: error }]\nbudget: { usd: 1, every: 1d }",
    );
    let mut reservation = granted(world.admit(ask(100, 100))).reservation;
    assert_eq!(reservation.output_allowed(), 100);
    let mut delivered = 101;
    let exhausted = loop {
        match reservation.extend(delivered) {
            Ok(()) => {
                assert!(reservation.output_allowed() >= delivered && reservation.output_allowed() <= 400);
                delivered = reservation.output_allowed() + 1;
            }
            Err(exhausted) => break exhausted,
        }
    };
    // To the last token, and no more.
    assert_eq!((delivered, &*exhausted.name), (401, "tight"));
    assert_eq!(exhausted.on_exhausted, OnExhausted::Error);
    reservation.settle(used(100, 401));
    let denied = refused(world.admit(ask(1, 1)));
    assert_eq!(&*denied.name, "tight");
    assert_eq!(world.budget(Subject::Gateway).used, 501_000);
    // What the others were asked for in vain came back.
    let left = world.budget(Subject::Gateway).standing.remaining;
    assert_eq!(left, 1_000_000_000 - 501_000);
}

#[test]
fn limits_of_a_provider_are_asked_when_it_is_chosen() {
    let world = World::new(
        "limits: [{ name: of-p, match: { provider: p }, tokens: 100, every: 1mo }, { name: each, per: provider, requests: 2, every: 1mo }]",
    );
    let mut first = granted(world.admit(ask(30, 30))).reservation;
    assert_eq!(first.output_allowed(), u64::MAX);
    first.choose_provider("p").expect("room");
    assert_eq!(first.output_allowed(), 30);
    let mut second = granted(world.admit(ask(30, 30))).reservation;
    assert_eq!(
        &*second.choose_provider("p").expect_err("60 of 100 are held").name,
        "of-p"
    );
    second.choose_provider("q").expect("another provider");
    assert_eq!(second.output_allowed(), u64::MAX);
    // The first turns to another provider after all: what it held of p is there again.
    first.choose_provider("q").expect("room");
    let mut third = granted(world.admit(ask(30, 30))).reservation;
    third.choose_provider("p").expect("room");
    assert_eq!(
        &*third.choose_provider("q").expect_err("two have it").name,
        "each"
    );
}

#[test]
fn a_request_that_was_sent_to_a_provider_counts_there_whatever_came_of_it() {
    let world = World::new(
        "limits: [{ name: calls, per: provider, requests: 2, every: 1mo }, { name: output, per: provider, output_tokens: 100, every: 1mo }]",
    );
    let mut first = granted(world.admit(ask(1, 60))).reservation;
    first.choose_provider("p").expect("room");
    first.sent();
    first.choose_provider("q").expect("room");
    // It was not sent to this one.
    first.choose_provider("p").expect("room");
    first.sent();
    first.settle(used(1, 10));
    let mut second = granted(world.admit(ask(1, 60))).reservation;
    let denied = second.choose_provider("p").expect_err("two were sent");
    assert_eq!(&*denied.name, "calls");
    second.choose_provider("q").expect("none was sent there");
    second.settle(used(1, 60));
    // Tokens count where they were used: 10 of p, 60 of q.
    let mut third = granted(world.admit(ask(1, 41))).reservation;
    assert_eq!(&*third.choose_provider("q").expect_err("60 used").name, "output");
}

#[test]
fn a_budget_that_is_lowered_leaves_no_debt() {
    let world = World::new("");
    let set = |usd: &str| {
        let text = format!(r#"{{"usd": "{usd}", "every": "1mo"}}"#);
        let schema: schema::Budget = serde_json::from_str(&text).expect("a budget");
        world.quota.budgets.set(Subject::Gateway, &schema)
    };
    set("0.001");
    granted(world.admit(ask(0, 900))).reservation.settle(used(0, 900));
    let lowered = set("0.0001");
    let denied = refused(world.admit(ask(0, 1)));
    assert_eq!(world.budget(Subject::Gateway).used, 900_000);
    let (levels, now) = (&world.quota.levels, world.quota.levels.now());
    let month_ns = 31 * 86_400 * 1_000_000_000;
    assert!(
        (1..=month_ns).contains(&denied.standing.retry_after_ns),
        "{denied:?}"
    );
    let wait_ms = denied.standing.retry_after_ns / 1_000_000 + 1;
    let next = Moment {
        steady_ns: now.steady_ns + wait_ms * 1_000_000,
        unix_ms: now.unix_ms + wait_ms,
    };
    let query = lowered.query();
    let (_, standing) = levels.reserve(&query, 100_000, next).expect("a clean month");
    assert_eq!(standing.remaining, 0);
}

#[test]
fn subjects_without_a_place_share_one() {
    let world = World::new("limits: [{ per: user, requests: 1, every: 1mo }]");
    let ask_as = |user: &str| {
        let facts = Facts {
            ids: Ids::new("a", "", ""),
            user,
            model: "m",
            path: "",
            client: IpAddr::from([192, 0, 2, 1]),
            header: &|_| None,
            own: &[],
        };
        admit(&world.quota, &world.policies, &facts, ask(1, 1))
            .map(|admission| admission.reservation.settle(used(1, 1)))
    };
    let granted = (0..6_000).filter(|n| ask_as(&format!("user{n}")).is_ok()).count();
    // The default table has 4096 places: nearly all are taken, then all others share one request.
    assert!((3_500..=4_097).contains(&granted), "{granted}");
    assert!(world.quota.levels.overflowed() > 1_900);
    assert!(ask_as("user0").is_err());
}

#[test]
fn many_threads_never_take_more_than_there_is() {
    for window in ["bucket", "sliding", "calendar"] {
        let world = World::new(&format!(
            "limits: [{{ per: shared, tokens: 10000, every: 1mo, window: {window} }}, {{ per: shared, parallel: 20 }}]\n\
             budget: {{ credit: 0.009 }}"
        ));
        let (settled, running) = (AtomicU64::new(0), AtomicU64::new(0));
        std::thread::scope(|scope| {
            for thread in 0..64_u64 {
                let (world, settled, running) = (&world, &settled, &running);
                scope.spawn(move || {
                    for round in 0..400 {
                        let input = 1 + (thread + round) % 7;
                        let Ok(admission) = world.admit(ask(input, 3)) else {
                            continue;
                        };
                        assert!(running.fetch_add(1, Ordering::SeqCst) < 20);
                        let output = round % 4;
                        if round % 5 > 0 {
                            settled.fetch_add(input + output, Ordering::SeqCst);
                        }
                        running.fetch_sub(1, Ordering::SeqCst);
                        match round % 5 {
                            0 => drop(admission),
                            _ => admission.reservation.settle(used(input, output)),
                        }
                    }
                });
            }
        });
        let settled = settled.into_inner();
        assert!(settled <= 9_000, "{window}: {settled}");
        // All threads kept asking until next to nothing was left.
        assert!(settled > 8_900, "{window}: {settled}");
        assert_eq!(world.budget(Subject::Gateway).used, settled * 1_000, "{window}");
        assert_eq!(
            world.budget(Subject::Gateway).standing.remaining,
            9_000_000 - settled * 1_000
        );
    }
}

/// What a test does next.
#[derive(Debug, Clone)]
enum Step {
    Admit { input: u64, output: u64 },
    Extend { which: usize, output: u64 },
    Settle { which: usize, output: u64 },
    Drop { which: usize },
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (0u64..40, 1u64..60).prop_map(|(input, output)| Step::Admit { input, output }),
        2 => (0usize..8, 1u64..50).prop_map(|(which, output)| Step::Extend { which, output }),
        3 => (0usize..8, 0u64..120).prop_map(|(which, output)| Step::Settle { which, output }),
        1 => (0usize..8).prop_map(|which| Step::Drop { which }),
    ]
}

/// What the model knows of a request that runs.
struct Running {
    reservation: Reservation,
    input: u64,
    reserved_output: u64,
}

proptest! {
    /// Against a plain model: three counters that hold what is used and what is reserved. Nothing earns anything back in a
    /// test's time, so all windows must behave alike.
    #[test]
    fn random_steps_agree_with_a_simple_model(steps in prop::collection::vec(step(), 1..120)) {
        let world = World::new(
            "limits: [{ tokens: 300, every: 1mo, window: sliding }, { parallel: 4 }, \
             { output_tokens: 250, every: 1mo, window: calendar }]\nbudget: { credit: 0.00035 }",
        );
        let amounts = [300_u64, 250, 350];
        // Tokens, output tokens, and thousands of nano-dollars, which are tokens again.
        let units = |input: u64, output: u64| [input + output, output, input + output];
        let mut taken = [0_u64; 3];
        let mut running: Vec<Running> = Vec::new();
        for step in steps {
            match step {
                Step::Admit { input, output } => {
                    let wanted = units(input, output);
                    let fits = running.len() < 4 && (0..3).all(|n| taken[n] + wanted[n] <= amounts[n]);
                    let result = world.admit(ask(input, output));
                    prop_assert_eq!(result.is_ok(), fits, "{:?} of {:?}", wanted, taken);
                    if let Ok(admission) = result {
                        (0..3).for_each(|n| taken[n] += wanted[n]);
                        running.push(Running { reservation: admission.reservation, input, reserved_output: output });
                    }
                }
                Step::Extend { which, output } if which < running.len() => {
                    let one = &mut running[which];
                    let before = one.reservation.output_allowed();
                    let fits = (0..3).all(|n| taken[n] + output <= amounts[n]);
                    let result = one.reservation.extend(before + output);
                    prop_assert_eq!(result.is_ok(), fits, "{} of {:?}", output, taken);
                    let more = one.reservation.output_allowed() - before;
                    let enough = if fits { more >= output } else { more == 0 };
                    prop_assert!(enough, "{}", more);
                    one.reserved_output += more;
                    (0..3).for_each(|n| taken[n] += more);
                    prop_assert!((0..3).all(|n| !fits || taken[n] <= amounts[n]));
                }
                Step::Settle { which, output } if which < running.len() => {
                    let one = running.swap_remove(which);
                    let (held, kept) = (units(one.input, one.reserved_output), units(one.input, output));
                    (0..3).for_each(|n| taken[n] = taken[n] - held[n] + kept[n]);
                    one.reservation.settle(used(one.input, output));
                }
                Step::Drop { which } if which < running.len() => {
                    let one = running.swap_remove(which);
                    let held = units(one.input, one.reserved_output);
                    (0..3).for_each(|n| taken[n] -= held[n]);
                    drop(one.reservation);
                }
                _ => {}
            }
            let status = world.budget(Subject::Gateway);
            prop_assert_eq!(status.standing.remaining, (350_u64.saturating_sub(taken[2])) * 1_000);
        }
    }
}
