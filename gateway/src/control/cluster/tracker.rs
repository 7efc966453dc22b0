//! How much of one level this host leases: the control thread's side of a [`Leased`].
//!
//! Each round looks at what was used, hands back what is too much, and says what is wanted: half a second of use at the
//! present rate, two of the largest recent requests, or a share of the amount, whatever is most. The store cuts
//! that down when the level nears its end. No I/O here.

use std::sync::Arc;

use super::level::{Answer, Level, Report, Times};
use crate::quota::lease::{Grant, Kind, Leased, Look};

/// Use for which a lease is taken ahead, seconds: some rounds and a slow network.
const AHEAD_S: f64 = 0.5;

/// An active level leases at least this part of the amount where the others leave it, so that a burst finds room and a
/// growing stream is not cut while there is much left.
const FLOOR_PART: u64 = 8;

/// A host that nothing was asked of for this time takes no more of a level, and where nothing is left but in the hands of
/// hosts it gives back what it does not use, nanoseconds.
const QUIET_NS: u64 = 500_000_000;

/// A level that nothing was asked of for this time keeps one request's units, nanoseconds.
pub const IDLE_NS: u64 = 2_000_000_000;

/// After this time it leaves the directory, unless it is nearly used up: then the next request must not find a
/// fresh one.
pub const RETIRE_NS: u64 = 60_000_000_000;

/// A lease ends here this much (of five parts) before the store lets others have it: clocks that run apart, pauses of
/// the process between looking at the clock and admitting.
const FENCE_PARTS: u64 = 4;

/// See the module.
#[derive(Debug)]
pub struct Tracker {
    pub level: Arc<Leased>,
    host: String,
    seq: u64,
    /// `spent` as the store has it.
    known: Option<u64>,
    /// The store's last answer.
    last: Answer,
    /// The last answer, the store's or a local one, as it was put in force.
    granted: Grant,
    look: Look,
    looked_ns: u64,
    used_ns: u64,
    reported_ns: u64,
    /// What the store knows: spent, leased, held.
    reported: Option<(u64, u64, u64)>,
    /// Units a second, smoothed over about [`AHEAD_S`].
    rate: f64,
    /// The largest request lately.
    largest: u64,
    /// What this host used that still counts, for a store that lost the level.
    meter: f64,
    /// Grants while the store is gone.
    local: Option<Level>,
    retired: bool,
}

/// What a tracker must know of the moment.
#[derive(Debug, Clone, Copy)]
pub struct Now {
    /// Monotonic, nanoseconds.
    pub ns: u64,
    /// The wall clock as the store has it, milliseconds.
    pub unix_ms: u64,
    /// How long the store keeps a silent host's lease.
    pub lease_ns: u64,
    /// How long what was used may wait to be told while the lease lasts: many levels are told in turns.
    pub defer_ns: u64,
}

impl Tracker {
    /// Begins to look after a level; `host` names this instance of it and no other, ever.
    pub fn new(level: Arc<Leased>, host: String, now: Now) -> Tracker {
        let look = Look {
            taken: 0,
            spent: 0,
            held: 0,
            allowance: 0,
            wanted: 0,
            largest: 0,
        };
        Tracker {
            level,
            host,
            seq: 0,
            known: None,
            last: Answer {
                hosts: 1,
                ..Answer::default()
            },
            granted: Grant::default(),
            look,
            looked_ns: now.ns,
            used_ns: now.ns,
            reported_ns: 0,
            reported: None,
            rate: 0.0,
            largest: 0,
            meter: 0.0,
            local: None,
            retired: false,
        }
    }

    /// Looks at the level, and makes a report where there is something to tell or to ask.
    pub fn report(&mut self, now: Now) -> Option<Report> {
        self.make_report(now, false)
    }

    fn make_report(&mut self, now: Now, locally: bool) -> Option<Report> {
        if now.ns >= self.level.valid_until_ns() && self.known.is_some() {
            // The lease may be another host's by now: what is not held is not ours any more.
            self.level.lower(0);
        }
        let look = self.observe(now);
        let target = self.target(now, &look);
        let mut allowance = look.allowance;
        if allowance.saturating_sub(look.taken) > target.saturating_add(target / 4) {
            allowance = self.level.lower(look.taken.saturating_add(target));
            // What was handed back is not to come again with the next grant.
            self.look.allowance = allowance;
        }
        let allowance = allowance.max(look.taken);
        let spare = allowance - look.taken;
        // What runs on local grants is not the store's lease: only what requests hold stays.
        let end = if self.local.is_some() && !locally {
            look.taken
        } else {
            allowance
        };
        let kept = end.saturating_sub(look.spent);
        let needed = look.wanted.max(self.largest).saturating_sub(spare);
        // Who was quiet for a while has enough, unless a request was refused.
        let wanted = match self.is_quiet(now) {
            true => look.wanted.saturating_sub(spare),
            false => target.max(look.wanted).saturating_sub(spare),
        };

        let renew = kept > 0 && now.ns.saturating_sub(self.reported_ns) >= now.lease_ns / 3;
        let changed =
            self.reported != Some((look.spent, kept, look.held)) || (self.local.is_some() && !locally);
        let waited = self.reported.is_none() || now.ns.saturating_sub(self.reported_ns) >= now.defer_ns;
        let changed = changed && waited;
        let hungry = look.wanted > 0 || (self.is_active(now) && wanted > 0 && spare < target / 2 + 1);
        if !(renew || changed || hungry) {
            self.doze(now, kept);
            return None;
        }
        self.seq += 1;
        self.reported_ns = now.ns;
        Some(Report {
            id: self.level.id(),
            host: self.host.clone(),
            kind: self.level.kind(),
            amount: self.level.amount(),
            seq: self.seq,
            spent: look.spent,
            from_start: look.spent.saturating_sub(self.meter.ceil() as u64),
            from_known: self.known.unwrap_or(0),
            birth: self.last.birth,
            kept,
            wanted,
            needed,
            held: look.held,
            hard: self.level.is_hard(),
        })
    }

    /// A level that holds nothing needs no lease: that there is nothing left stays known without asking again. The next
    /// request asks.
    fn doze(&self, now: Now, kept: u64) {
        if kept == 0 && (self.known.is_some() || self.local.is_some()) {
            self.level.grant(&Grant {
                allowance: self.look.allowance,
                until_ns: valid_until_ns(now.ns, now),
                ..self.granted
            });
        }
    }

    fn observe(&mut self, now: Now) -> Look {
        let look = self.level.look();
        let passed_s = now.ns.saturating_sub(self.looked_ns) as f64 / 1e9;
        let taken = look.taken.saturating_sub(self.look.taken) as f64;
        if passed_s > 0.0 {
            let weight = (passed_s / AHEAD_S).min(1.0);
            self.rate += (taken / passed_s - self.rate) * weight;
        }
        let spent = look.spent as f64 - self.look.spent as f64;
        let earned = match self.level.kind() {
            Kind::Bucket { window_ns } | Kind::Sliding { window_ns } => {
                passed_s * 1e9 * self.level.amount() as f64 / window_ns.max(1) as f64
            }
            Kind::Period { .. } | Kind::Credit | Kind::Parallel => 0.0,
        };
        self.meter = (self.meter - earned).max(0.0) + spent;
        self.meter = self.meter.max(0.0);
        if look.taken != self.look.taken || look.spent != self.look.spent || look.wanted > 0 {
            self.used_ns = now.ns;
        }
        // Halves within some rounds: one giant does not hold a lease of its size for ever.
        self.largest = (self.largest - self.largest.div_ceil(8)).max(look.largest.max(look.wanted));
        self.look = look;
        self.looked_ns = now.ns;
        look
    }

    fn is_active(&self, now: Now) -> bool {
        now.ns.saturating_sub(self.used_ns) < IDLE_NS
    }

    fn is_quiet(&self, now: Now) -> bool {
        now.ns.saturating_sub(self.used_ns) >= QUIET_NS
    }

    /// Spare units that this host should have.
    fn target(&self, now: Now, look: &Look) -> u64 {
        let idle_ns = now.ns.saturating_sub(self.used_ns);
        if idle_ns >= RETIRE_NS || self.retired || self.has_ended(now) {
            return 0;
        }
        let one = self.largest.max(look.wanted).max(u64::from(self.is_active(now)));
        if self.is_quiet(now) && self.granted.free == 0 {
            // All there is left is in hosts' hands: not in those that do not use it.
            return 0;
        }
        if idle_ns >= IDLE_NS {
            return one;
        }
        let ahead = (self.rate.max(0.0) * AHEAD_S) as u64;
        let good = ahead
            .max(one.saturating_mul(2))
            .max(self.level.amount() / FLOOR_PART);
        if self.known.is_none() {
            return good;
        }
        // Near the end of the level nobody has more spare than what leaves as much to the others.
        let spare = look.allowance.saturating_sub(look.taken);
        let fair = self.last.free.saturating_add(spare) / (2 * self.last.hosts.max(1));
        good.min(fair.max(one))
    }

    /// Takes the store's answer to a report that was sent at `sent_ns`.
    pub fn answered(&mut self, report: &Report, answer: &Answer, sent_ns: u64, now: Now) {
        if !answer.accepted {
            return;
        }
        if self.local.take().is_some() {
            self.level.lower(0);
        }
        self.take(report, answer, sent_ns, now);
    }

    fn take(&mut self, report: &Report, answer: &Answer, sent_ns: u64, now: Now) {
        if self.local.is_none() {
            self.known = Some(report.spent);
            self.last = *answer;
        }
        self.reported = Some((report.spent, answer.out, report.held));
        let allowance = report.spent.saturating_add(answer.out);
        let reset_ns = match self.level.kind() {
            Kind::Period { end_unix_ms, .. } => {
                end_unix_ms.saturating_sub(now.unix_ms).saturating_mul(1_000_000)
            }
            _ => answer.reset_us.saturating_mul(1_000),
        };
        self.granted = Grant {
            allowance,
            until_ns: valid_until_ns(sent_ns, now),
            free: answer.free,
            used: answer.used,
            reset_at_ns: now.ns.saturating_add(reset_ns),
            settled_at_ns: sent_ns.saturating_add(answer.settled_us.saturating_mul(1_000)),
        };
        self.level.grant(&self.granted);
        self.look.allowance = self.look.allowance.max(allowance);
    }

    /// Grants while the store is gone and hosts go on by themselves: this host's share of the amount and of what was used.
    /// Until the lease runs out others may rest on it, and this host on theirs.
    pub fn grant_locally(&mut self, hosts: u64, now: Now) {
        if self.local.is_none() {
            // A little before the lease runs out, so that no request falls between the two.
            let is_valid = now.ns + now.lease_ns / 10 < self.level.valid_until_ns();
            if is_valid && (self.known.is_some() || !self.level.is_hungry()) {
                return;
            }
            self.level.lower(0);
            let used = self.last.used / hosts.max(1);
            self.local = Some(Level::going_on(
                &self.last,
                used,
                self.level.kind(),
                now.ns / 1_000,
            ));
            self.reported = None;
        }
        let Some(mut report) = self.make_report(now, true) else {
            return;
        };
        let Some(mut local) = self.local.take() else {
            return;
        };
        report.amount = (report.amount / hosts.max(1)).max(1);
        let times = Times {
            lease_us: now.lease_ns / 1_000,
            keep_us: u64::MAX / 4,
        };
        let answer = local.report(&report, times, now.ns / 1_000);
        self.local = Some(local);
        self.take(&report, &answer, now.ns, now);
    }

    /// Tells the store again what it was told before: it may have lost its data.
    pub fn tell_again(&mut self) {
        self.reported = None;
    }

    /// What this instance of the level is called in the store.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// Who should report first when not all can: the hungry, then who has waited longest.
    pub fn urgency(&self) -> (bool, u64) {
        (!self.level.is_hungry(), self.reported_ns)
    }

    /// Whether it runs on local grants.
    pub fn is_local(&self) -> bool {
        self.local.is_some()
    }

    /// What the hosts have used of it, as the store last said, less what time has given back since.
    fn used_by(&self, now: Now) -> u64 {
        let passed_ns = now.ns.saturating_sub(self.reported_ns);
        match self.level.kind() {
            Kind::Bucket { window_ns } => {
                let earned =
                    u128::from(passed_ns) * u128::from(self.level.amount()) / u128::from(window_ns.max(1));
                self.last
                    .used
                    .saturating_sub(earned.min(u128::from(u64::MAX)) as u64)
            }
            Kind::Sliding { window_ns } if passed_ns > window_ns => 0,
            _ => self.last.used,
        }
    }

    fn has_ended(&self, now: Now) -> bool {
        matches!(self.level.kind(), Kind::Period { end_unix_ms, .. } if end_unix_ms <= now.unix_ms)
    }

    /// Takes the level out of use when nothing was asked of it for long. True: remove it from the directory, and go on
    /// reporting until [`Tracker::is_done`].
    pub fn retire(&mut self, now: Now) -> bool {
        let idle = now.ns.saturating_sub(self.used_ns) >= RETIRE_NS;
        let nearly_used_up = self.used_by(now) > self.level.amount() / 4 * 3;
        // One whose use the store has not heard stays: its successor would only be one more of which that is so.
        let spent = self.level.look().spent;
        let is_told = spent == 0 || self.known == Some(spent);
        let may = self.has_ended(now) || (idle && is_told && !nearly_used_up);
        if !may || self.retired {
            return false;
        }
        self.retired = self.level.retire();
        self.retired
    }

    /// Retired, all reported, and no request will settle any more.
    pub fn is_done(&self) -> bool {
        let settled = Arc::strong_count(&self.level) == 1;
        self.retired && settled && self.known == Some(self.level.look().spent)
    }
}

/// Until when a lease is used that the store was asked for at `sent_ns`.
fn valid_until_ns(sent_ns: u64, now: Now) -> u64 {
    sent_ns + now.lease_ns / 5 * FENCE_PARTS
}
