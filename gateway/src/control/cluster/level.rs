//! One shared level as the store keeps it: who used what, who holds a lease.
//!
//! The store runs `lease.lua`. The same in Rust grants leases while the store is gone, and is what the property tests
//! judge by.
//!
//! What may be granted is `amount - used - leases of all hosts that are alive`. Use is counted when it is reported, and until
//! then the lease covers it. So units are in one of the two as long as their host lives, and the sum is never above the
//! amount. A host that falls silent loses its lease with its expiry: what it used and had not reported by then is the
//! overshoot.
//!
//! Debt of a period is what was used beyond leases when nothing was left, as `quota/levels/debt.rs` has it for one host: not
//! what stands above an amount that was lowered.

use std::collections::HashMap;

use crate::quota::lease::Kind;

/// Parts of a sliding window.
const SLOTS: u64 = 16;

/// The longest lease that can be configured, microseconds: what ends later was granted by a clock that has been set back
/// since.
const LEASE_LONGEST_US: u64 = 61_000_000;

/// A clock that was set back by less is no reason to end a period early, milliseconds.
const SET_BACK_MS: u64 = 60_000;

/// What a host tells of one level. Counts are cumulative, see [`crate::quota::lease`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// The level's identity.
    pub id: u64,
    /// Host, process and instance of the level in it: what `spent` belongs to.
    pub host: String,
    pub kind: Kind,
    pub amount: u64,
    /// Grows with each report: a late one is told by it.
    pub seq: u64,
    pub spent: u64,
    /// Where `spent` stood when that began which still counts: all since then is new to a store that lost the level.
    pub from_start: u64,
    /// Where `spent` stood when the store last answered: what is new to a store that only forgot this host.
    pub from_known: u64,
    /// The level's [`Answer::birth`], which tells the one from the other; 0: none is known.
    pub birth: u64,
    /// Units of the lease that stay here beside `spent`.
    pub kept: u64,
    /// Units wanted on top.
    pub wanted: u64,
    /// Units of them without which the next request cannot run.
    pub needed: u64,
    /// Units of a bucket that count in `spent` and may come back: what running requests reserved. Rather too many.
    pub held: u64,
    /// It refuses what does not fit. What only counts has no debt.
    pub hard: bool,
}

/// What the store says.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Answer {
    /// False: it had heard a later report already.
    pub accepted: bool,
    /// The lease: units beside the `spent` of the report.
    pub out: u64,
    /// Units that no host has.
    pub free: u64,
    /// Units used by all hosts.
    pub used: u64,
    /// Hosts that hold a lease of it, this one among them.
    pub hosts: u64,
    /// Until the level is unused, microseconds; 0 where it does not come with time.
    pub reset_us: u64,
    /// Of a bucket: until time has given back what was used for good, microseconds; what is held may come back before.
    pub settled_us: u64,
    /// When the store began the level, microseconds: another after it lost its data.
    pub birth: u64,
}

/// How long leases and records last, microseconds.
#[derive(Debug, Clone, Copy)]
pub struct Times {
    pub lease_us: u64,
    pub keep_us: u64,
}

#[derive(Debug, Clone)]
struct Record {
    seq: u64,
    spent: u64,
    out: u64,
    expiry_us: u64,
    held: u64,
}

/// See the module.
#[derive(Debug, Clone, Default)]
pub struct Level {
    used: f64,
    seen_us: u64,
    slots: HashMap<u64, u64>,
    hosts: HashMap<String, Record>,
    ends_unix_ms: u64,
    /// Units of the period that were overuse.
    over: f64,
    birth: u64,
}

impl Level {
    /// Takes a report in and grants.
    pub fn report(&mut self, report: &Report, times: Times, now_us: u64) -> Answer {
        if self.birth == 0 {
            self.birth = now_us;
        }
        if let Some(me) = self.hosts.get(&report.host)
            && report.seq < me.seq
        {
            let is_another =
                |(name, host): &(&String, &Record)| **name != report.host && host.expiry_us > now_us;
            return Answer {
                hosts: 1 + self.hosts.iter().filter(is_another).count() as u64,
                birth: self.birth,
                ..Answer::default()
            };
        }
        let me = self.hosts.remove(&report.host);
        self.hosts
            .retain(|_, host| host.expiry_us + times.keep_us >= now_us);
        for host in self.hosts.values_mut() {
            if host.expiry_us > now_us + LEASE_LONGEST_US {
                host.expiry_us = now_us + times.lease_us;
            }
        }
        let alive = || self.hosts.values().filter(|host| host.expiry_us > now_us);
        let hosts = 1 + alive().count() as u64;
        let others: u64 = alive().map(|host| host.out).sum();
        self.age(report, now_us);
        let more = self.count(report, me.as_ref(), now_us);
        self.note_overuse(report, me.as_ref(), more, others, now_us);

        let free = (report.amount as f64 - self.used - others as f64 - report.kept as f64).floor();
        let free = free.max(0.0) as u64;
        let extra = match report.wanted {
            0 => 0,
            wanted => wanted.min((free / (2 * hosts)).max(report.needed.min(free))),
        };
        let record = Record {
            seq: report.seq,
            spent: report.spent,
            out: report.kept + extra,
            expiry_us: now_us + times.lease_us,
            held: report.held,
        };
        let out = record.out;
        let settled_us = self.settled_us(report, now_us);
        self.hosts.insert(report.host.clone(), record);
        Answer {
            accepted: true,
            out,
            free: free - extra,
            used: self.used as u64,
            hosts,
            reset_us: self.reset_us(report),
            settled_us,
            birth: self.birth,
        }
    }

    /// Gives back what time has.
    fn age(&mut self, report: &Report, now_us: u64) {
        match report.kind {
            Kind::Bucket { window_ns } => {
                let passed_us = now_us.saturating_sub(self.seen_us) as f64;
                let earned = passed_us * report.amount as f64 / (window_ns / 1_000).max(1) as f64;
                self.used = (self.used - earned).max(0.0);
            }
            Kind::Sliding { window_ns } => {
                let slot = slot(window_ns, now_us);
                // Of a clock that has been set back since: it counts from now.
                let ahead: u64 = self
                    .slots
                    .extract_if(|n, _| *n > slot)
                    .map(|(_, units)| units)
                    .sum();
                if ahead > 0 {
                    *self.slots.entry(slot).or_default() += ahead;
                }
                self.slots.retain(|n, _| *n + SLOTS >= slot);
                self.used = self.slots.values().sum::<u64>() as f64;
            }
            // A new period begins when the old one has ended by the store's clock. Debt goes along: what is
            // above the amount and was no overuse was used under a greater one.
            Kind::Period { end_unix_ms, .. } => {
                let now_ms = now_us / 1_000;
                if end_unix_ms > self.ends_unix_ms && self.ends_unix_ms <= now_ms + 1_000 {
                    if self.ends_unix_ms > 0 {
                        let amount = report.amount as f64;
                        self.used = (self.used - amount).max(0.0).min(self.over);
                        // The part that this period cannot pay is overuse of this one too.
                        self.over = (self.used - amount).max(0.0);
                    }
                    self.ends_unix_ms = end_unix_ms;
                } else if self.ends_unix_ms > end_unix_ms && end_unix_ms > now_ms + SET_BACK_MS {
                    // Begun by a clock that was ahead: otherwise none would begin until then. What was used counts on.
                    self.ends_unix_ms = end_unix_ms;
                }
            }
            Kind::Credit | Kind::Parallel => {}
        }
        self.seen_us = now_us;
    }

    /// Counts what the report says was used since the last one, and says it.
    fn count(&mut self, report: &Report, me: Option<&Record>, now_us: u64) -> f64 {
        let before = match me {
            Some(me) => me.spent,
            None if self.birth == report.birth => report.from_start.max(report.from_known),
            None => report.from_start,
        };
        let more = report.spent as f64 - before as f64;
        self.used = (self.used + more).max(0.0);
        if let Kind::Sliding { window_ns } = report.kind {
            let units = self.slots.entry(slot(window_ns, now_us)).or_default();
            *units = (*units as f64 + more).max(0.0) as u64;
        }
        more
    }

    /// Notes what the host's lease does not cover, where all that is used and leased is above the amount. What was leased
    /// before the amount was lowered is no overuse.
    fn note_overuse(&mut self, report: &Report, me: Option<&Record>, more: f64, others: u64, now_us: u64) {
        if !report.hard || !matches!(report.kind, Kind::Period { .. }) {
            return;
        }
        let lease = me
            .filter(|me| me.expiry_us > now_us)
            .map_or(0.0, |me| me.out as f64);
        let kept = report.kept as f64;
        let uncovered = more + kept - lease;
        let above = self.used + others as f64 + kept - report.amount as f64;
        self.over += uncovered.min(above).max(0.0);
    }

    /// Until time has given back what was used for good of a bucket: all that is held may come back before it does. What
    /// a host held when it fell silent may come back until time has given it back.
    fn settled_us(&self, report: &Report, now_us: u64) -> u64 {
        let Kind::Bucket { window_ns } = report.kind else {
            return 0;
        };
        let window_us = window_ns / 1_000;
        let may = |host: &&Record| host.expiry_us + window_us > now_us;
        let others: u64 = self.hosts.values().filter(may).map(|host| host.held).sum();
        let settled = (self.used - report.held as f64 - others as f64).max(0.0);
        (settled * window_us as f64 / report.amount.max(1) as f64) as u64
    }

    fn reset_us(&self, report: &Report) -> u64 {
        match report.kind {
            Kind::Bucket { window_ns } => {
                (self.used * (window_ns / 1_000) as f64 / report.amount.max(1) as f64) as u64
            }
            Kind::Sliding { window_ns } if self.used > 0.0 => window_ns / 1_000,
            _ => 0,
        }
    }

    /// Goes on from a store's answer with a part of what was used: for the time without the store.
    pub fn going_on(answer: &Answer, used: u64, kind: Kind, now_us: u64) -> Level {
        let slots = match kind {
            Kind::Sliding { window_ns } => HashMap::from([(slot(window_ns, now_us), used)]),
            _ => HashMap::new(),
        };
        Level {
            used: used as f64,
            seen_us: now_us,
            slots,
            hosts: HashMap::new(),
            ends_unix_ms: 0,
            over: 0.0,
            birth: answer.birth,
        }
    }
}

#[cfg(test)]
impl Level {
    /// What a host has told to have used.
    pub fn reported_by(&self, host: &str) -> Option<u64> {
        self.hosts.get(host).map(|record| record.spent)
    }

    /// A host's lease and when it ends, microseconds.
    pub fn lease_of(&self, host: &str) -> Option<(u64, u64)> {
        self.hosts.get(host).map(|record| (record.out, record.expiry_us))
    }

    pub fn used(&self) -> u64 {
        self.used as u64
    }

    pub fn forget_hosts(&mut self) {
        self.hosts.clear();
    }
}

fn slot(window_ns: u64, now_us: u64) -> u64 {
    (u128::from(now_us) * u128::from(SLOTS) / u128::from((window_ns / 1_000).max(1))) as u64
}
