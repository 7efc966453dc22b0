//! Which request starts next, and when.

use super::Options;
use super::client::Order;
use super::engine::{Engine, nanoseconds};
use super::part::{Chooser, Plan};
use super::schedule::{Schedule, Stage};
use super::trace::Player;

/// Connections opened in one turn of the loop: a backlog must not overflow.
const OPENS_A_TURN: usize = 64;

/// One part's share of what is under way.
#[derive(Default)]
struct Lane {
    /// Requests started, and under way.
    started: u64,
    active: usize,
    /// So many are to be under way at all times, where the part has connections of its own.
    own: Option<usize>,
    hold: bool,
}

pub(super) struct Starter {
    lanes: Vec<Lane>,
    chooser: Chooser,
    /// The open loop's timetable.
    schedule: Option<Schedule>,
    trace: Option<Player>,
    /// Requests at once of all parts without connections of their own.
    pool: usize,
    pool_active: usize,
    ramp_ns: u64,
    requests_max: Option<u64>,
    /// Requests started that are not held.
    started: u64,
    /// Requests under way, held ones included.
    pub active: usize,
    /// Held streams under way, and those of them that have had a token.
    pub held: usize,
    pub held_streaming: usize,
    held_wanted: usize,
    /// The start that is due has been counted as late.
    late: bool,
    /// The open loop's time is up, and what it did not start is counted.
    closed: bool,
}

impl Starter {
    pub fn new(options: &Options, plans: &[Plan], seed: u64) -> Self {
        let lanes: Vec<Lane> = plans
            .iter()
            .map(|plan| Lane {
                own: plan
                    .part
                    .connections
                    .or(plan.part.hold.then_some(options.connections)),
                hold: plan.part.hold,
                ..Lane::default()
            })
            .collect();
        let parts: Vec<super::Part> = plans
            .iter()
            .map(|plan| super::Part {
                connections: plan
                    .part
                    .connections
                    .or(plan.part.hold.then_some(options.connections)),
                weight: plan.part.weight,
                ..super::Part::default()
            })
            .collect();
        let stages = match (options.stages.is_empty(), options.rate) {
            (false, _) => options.stages.clone(),
            (true, Some(rate)) => vec![Stage {
                from: rate,
                to: rate,
                time: std::time::Duration::ZERO,
            }],
            (true, None) => Vec::new(),
        };
        Self {
            held_wanted: lanes
                .iter()
                .filter(|lane| lane.hold)
                .filter_map(|lane| lane.own)
                .sum(),
            lanes,
            chooser: Chooser::new(&parts, seed),
            schedule: (!stages.is_empty()).then(|| Schedule::new(&stages, options.arrivals, seed)),
            trace: options.trace.clone().map(Player::new),
            pool: options.connections,
            pool_active: 0,
            ramp_ns: nanoseconds(options.ramp),
            requests_max: options.requests,
            started: 0,
            active: 0,
            held: 0,
            held_streaming: 0,
            late: false,
            closed: false,
        }
    }

    pub fn is_open_loop(&self) -> bool {
        self.schedule.is_some() || self.trace.is_some()
    }

    /// Whether all streams that are to be held have had a token.
    pub fn all_held(&self) -> bool {
        self.held_streaming >= self.held_wanted
    }

    /// Whether nothing but held streams is wanted.
    pub fn only_holds(&self) -> bool {
        self.lanes.iter().all(|lane| lane.hold)
    }

    /// Whether more requests are to be started, held ones aside.
    pub fn may_start(&self) -> bool {
        !self.only_holds()
            && self.requests_max.is_none_or(|most| self.started < most)
            && self.trace.as_ref().is_none_or(|trace| !trace.is_over())
    }

    /// When the open loop's next request is due, in nanoseconds since the start.
    fn due_ns(&mut self) -> Option<u64> {
        match (&self.trace, &mut self.schedule) {
            (Some(trace), _) => trace.due_ns(),
            (None, Some(schedule)) => schedule.due_ns(),
            (None, None) => None,
        }
    }

    /// Goes past the requests that were due before `end_ns` and counts them.
    fn skip_until(&mut self, end_ns: u64) -> u64 {
        let most = self.requests_max.map_or(u64::MAX, |most| most - self.started);
        let mut skipped = 0;
        while skipped < most && self.due_ns().is_some_and(|due_ns| due_ns < end_ns) {
            if let Some(trace) = &mut self.trace {
                trace.skip();
            } else if let Some(schedule) = &mut self.schedule {
                schedule.advance();
            }
            skipped += 1;
        }
        skipped
    }

    /// A request of `part` has ended.
    pub fn ended(&mut self, part: usize, had_tokens: bool) {
        let lane = &mut self.lanes[part];
        lane.active -= 1;
        self.active -= 1;
        if lane.own.is_none() {
            self.pool_active -= 1;
        }
        if lane.hold {
            self.held -= 1;
            self.held_streaming -= usize::from(had_tokens);
        }
    }

    /// Counts a request of `part` as started; returns its number within the part.
    fn begin(&mut self, part: usize) -> u64 {
        let lane = &mut self.lanes[part];
        let index = lane.started;
        lane.started += 1;
        lane.active += 1;
        self.active += 1;
        self.pool_active += usize::from(lane.own.is_none());
        self.held += usize::from(lane.hold);
        self.started += u64::from(!lane.hold);
        index
    }

    /// A held stream that is still to be opened.
    fn next_held(&self) -> Option<usize> {
        self.lanes
            .iter()
            .position(|lane| lane.hold && lane.own.is_some_and(|own| lane.started < own as u64))
    }

    /// The part whose connections are not all in use, `since_ns` after the start.
    fn next_closed(&mut self, since_ns: u64) -> Option<usize> {
        let allowed = |all: usize| {
            if since_ns >= self.ramp_ns {
                all
            } else {
                (1 + (all as u64).saturating_mul(since_ns) / self.ramp_ns) as usize
            }
        };
        let own = self
            .lanes
            .iter()
            .position(|lane| !lane.hold && lane.own.is_some_and(|own| lane.active < allowed(own).min(own)));
        if own.is_some() {
            return own;
        }
        if !self.is_open_loop() && self.pool_active < allowed(self.pool).min(self.pool) {
            return self.chooser.next();
        }
        None
    }
}

impl Engine<'_> {
    /// Starts what is due; returns how long until more may be, if that is known.
    pub(super) fn start_due(&mut self, now_ns: u64) -> Option<u64> {
        let held = self.start_held(now_ns);
        if held.is_some() {
            return held;
        }
        let base_ns = self.base_ns?;
        let closed = self.start_closed(now_ns, base_ns);
        let open = if self.starter.is_open_loop() {
            self.start_open(now_ns, base_ns)
        } else {
            None
        };
        [closed, open].into_iter().flatten().min()
    }

    fn start_held(&mut self, now_ns: u64) -> Option<u64> {
        for _ in 0..OPENS_A_TURN {
            if self.rest_until_ns > now_ns {
                return Some(self.rest_until_ns - now_ns);
            }
            let part = self.starter.next_held()?;
            self.start(part, now_ns);
        }
        Some(0)
    }

    fn start_closed(&mut self, now_ns: u64, base_ns: u64) -> Option<u64> {
        let since_ns = now_ns - base_ns;
        for _ in 0..OPENS_A_TURN {
            if self.rest_until_ns > now_ns {
                // Who connects as fast as it is refused measures nothing. In the open loop the rate sees to that.
                return Some(self.rest_until_ns - now_ns);
            }
            let part = if self.starter.may_start() {
                self.starter.next_closed(since_ns)
            } else {
                None
            };
            let Some(part) = part else {
                return (since_ns < self.starter.ramp_ns).then_some(super::engine::WAIT_STEP_NS);
            };
            self.start(part, now_ns);
        }
        Some(0)
    }

    fn start_open(&mut self, now_ns: u64, base_ns: u64) -> Option<u64> {
        for _ in 0..OPENS_A_TURN {
            if !self.starter.may_start() {
                return None;
            }
            let due_ns = base_ns + self.starter.due_ns()?;
            if due_ns > now_ns {
                return Some(due_ns - now_ns);
            }
            if self.starter.pool_active >= self.starter.pool {
                // It starts when a connection gets free, and its latency counts from when it was due.
                self.tally.report.late_starts += u64::from(!self.starter.late);
                self.starter.late = true;
                return None;
            }
            self.starter.late = false;
            let part = self.starter.chooser.next()?;
            self.tally.report.due += 1;
            self.start_next_of_loop(part, due_ns);
        }
        Some(0)
    }

    /// The open loop ends at `end_ns`: what was due before and can be started is, the rest is counted. Without that a server
    /// so slow that no connection gets free would hide all whom it kept waiting.
    pub(super) fn close_open_loop(&mut self, end_ns: u64) {
        let Some(base_ns) = self.base_ns.filter(|_| self.starter.is_open_loop()) else {
            return;
        };
        if !self.starter.closed {
            while self.start_open(end_ns - 1, base_ns) == Some(0) {}
            self.count_not_started(end_ns);
        }
    }

    /// Counts what was due before `end_ns` and has not been started; nothing is started afterwards.
    pub(super) fn count_not_started(&mut self, end_ns: u64) {
        let Some(base_ns) = self.base_ns.filter(|_| !self.starter.closed) else {
            return;
        };
        self.starter.closed = true;
        let skipped = self.starter.skip_until(end_ns - base_ns);
        self.tally.report.due += skipped;
        self.tally.report.not_started += skipped;
    }

    fn start_next_of_loop(&mut self, part: usize, due_ns: u64) {
        if let Some(schedule) = &mut self.starter.schedule {
            schedule.advance();
        }
        let plan = &self.plans[part];
        let Some(trace) = &mut self.starter.trace else {
            return self.start(part, due_ns);
        };
        let Some(row) = trace.next() else {
            return;
        };
        let index = self.starter.begin(part);
        let order = Order {
            request: plan.traced(index, &row.text, row.max_tokens),
            due_ns,
            leave_after: plan.leave_after(index),
            expected_tokens: None,
        };
        self.launch(part, order);
    }

    fn start(&mut self, part: usize, due_ns: u64) {
        let index = self.starter.begin(part);
        let plan = &self.plans[part];
        let order = Order {
            request: plan.request(index),
            due_ns,
            leave_after: plan.leave_after(index),
            expected_tokens: plan.part.expect_tokens,
        };
        self.launch(part, order);
    }
}
