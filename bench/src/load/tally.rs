//! Counts and histograms of a run, and the window in which its rates and costs are measured.

use hdrhistogram::Histogram;

use super::check::Flaw;
use super::client::{Arrivals, Outcome};
use super::report::{Latency, Report};
use crate::process::{Cost, Snapshot};

/// Longest latency that is told apart, in microseconds: an hour.
const LATENCY_US_MAX: u64 = 3_600_000_000;
/// Significant digits of a latency.
const DIGITS: u8 = 3;

/// One edge of the window.
#[derive(Clone, Debug, Default)]
struct Mark {
    at_ns: u64,
    requests: u64,
    events: u64,
    processes: Vec<Option<Snapshot>>,
}

pub(super) struct Tally {
    pub report: Report,
    pids: Vec<u32>,
    ttft: Histogram<u64>,
    inter_token: Histogram<u64>,
    total: Histogram<u64>,
    opened: Option<Mark>,
    closed: Option<Mark>,
    /// Before the first connection: memory is compared with this.
    first: Vec<Option<Snapshot>>,
}

impl Tally {
    pub fn new(pids: &[u32]) -> Result<Self, hdrhistogram::CreationError> {
        let histogram = || Histogram::new_with_bounds(1, LATENCY_US_MAX, DIGITS);
        Ok(Self {
            report: Report::default(),
            pids: pids.to_vec(),
            ttft: histogram()?,
            inter_token: histogram()?,
            total: histogram()?,
            opened: None,
            closed: None,
            first: snapshots(pids),
        })
    }

    fn mark(&self, now_ns: u64) -> Mark {
        Mark {
            at_ns: now_ns,
            requests: self.report.requests,
            events: self.report.events,
            processes: snapshots(&self.pids),
        }
    }

    /// The warm-up is over: latencies begin anew. Only the first call counts.
    pub fn open_window(&mut self, now_ns: u64) {
        if self.opened.is_none() {
            self.opened = Some(self.mark(now_ns));
            self.ttft.reset();
            self.inter_token.reset();
            self.total.reset();
        }
    }

    /// Ends the window. Only the first call counts.
    pub fn close_window(&mut self, now_ns: u64) {
        if self.closed.is_none() {
            self.closed = Some(self.mark(now_ns));
        }
    }

    /// Counts what one read brought; `last_token_ns` is the time of the token before.
    pub fn arrived(&mut self, arrivals: &Arrivals, now_ns: u64, started_ns: u64, last_token_ns: u64) {
        self.report.bytes += arrivals.bytes;
        self.report.events += arrivals.events;
        let tokens = arrivals.after.saturating_sub(arrivals.before);
        self.report.tokens += tokens;
        if tokens == 0 {
            return;
        }
        if arrivals.before == 0 {
            self.ttft.saturating_record(micros(now_ns, started_ns));
        } else {
            self.inter_token.saturating_record(micros(now_ns, last_token_ns));
        }
        // Tokens that came in one read have no time between them.
        self.inter_token.saturating_record_n(0, tokens - 1);
    }

    pub fn ended(&mut self, outcome: Outcome, now_ns: u64, started_ns: u64) {
        let report = &mut self.report;
        report.requests += 1;
        let failures = &mut report.failures;
        match outcome {
            Outcome::Whole(status) => {
                *report.status.entry(status).or_default() += 1;
                report.ok += u64::from(status == 200);
                self.total.saturating_record(micros(now_ns, started_ns));
            }
            Outcome::Flawed(flaw) => {
                *report.status.entry(200).or_default() += 1;
                match flaw {
                    Flaw::Mismatch => failures.mismatch += 1,
                    Flaw::NoFinish => failures.no_finish += 1,
                    Flaw::NoDone => failures.no_done += 1,
                    Flaw::ErrorEvent => failures.error_event += 1,
                }
            }
            Outcome::HungUp => report.hung_up += 1,
            Outcome::Connect => failures.connect += 1,
            Outcome::Cut => failures.cut += 1,
            Outcome::Malformed => failures.malformed += 1,
            Outcome::Timeout => failures.timeout += 1,
        }
    }

    /// The whole report.
    pub fn into_report(mut self, now_ns: u64) -> Report {
        self.open_window(now_ns);
        self.close_window(now_ns);
        let mut report = std::mem::take(&mut self.report);
        let (Some(opened), Some(closed)) = (&self.opened, &self.closed) else {
            return report;
        };
        let elapsed_s = closed.at_ns.saturating_sub(opened.at_ns) as f64 / 1e9;
        let rate = |count: u64| {
            if elapsed_s > 0.0 {
                count as f64 / elapsed_s
            } else {
                0.0
            }
        };
        report.elapsed_s = elapsed_s;
        report.requests_in_window = closed.requests.saturating_sub(opened.requests);
        report.events_in_window = closed.events.saturating_sub(opened.events);
        report.requests_per_s = rate(report.requests_in_window);
        report.events_per_s = rate(report.events_in_window);
        report.ttft = Latency::of(&self.ttft);
        report.inter_token = Latency::of(&self.inter_token);
        report.total = Latency::of(&self.total);
        for (index, pid) in self.pids.iter().enumerate() {
            // A process that is not there at both ends has no cost to tell.
            let (Some(before), Some(after)) = (opened.processes[index], closed.processes[index]) else {
                continue;
            };
            let mut cost = Cost::between(*pid, &before, &after, elapsed_s);
            cost.share(report.requests_in_window, report.events_in_window);
            if let (Some(first), streams @ 1..) = (self.first[index], report.open_streams) {
                cost.resident_before_bytes = first.resident_bytes;
                let grown = after.resident_bytes as f64 - first.resident_bytes as f64;
                cost.bytes_per_open_stream = Some(grown / streams as f64);
            }
            report.processes.push(cost);
        }
        report
    }
}

fn snapshots(pids: &[u32]) -> Vec<Option<Snapshot>> {
    pids.iter().map(|pid| Snapshot::read(*pid)).collect()
}

fn micros(now_ns: u64, then_ns: u64) -> u64 {
    now_ns.saturating_sub(then_ns) / 1000
}
