//! What a run found out, as numbers and JSON.

use std::collections::BTreeMap;

use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};

use crate::process::Cost;

/// Latencies in microseconds.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Latency {
    pub count: u64,
    pub mean_us: f64,
    pub p50_us: u64,
    pub p90_us: u64,
    pub p99_us: u64,
    pub p999_us: u64,
    pub max_us: u64,
}

impl Latency {
    pub(super) fn of(histogram: &Histogram<u64>) -> Self {
        if histogram.is_empty() {
            return Self::default();
        }
        Self {
            count: histogram.len(),
            mean_us: histogram.mean(),
            p50_us: histogram.value_at_quantile(0.5),
            p90_us: histogram.value_at_quantile(0.9),
            p99_us: histogram.value_at_quantile(0.99),
            p999_us: histogram.value_at_quantile(0.999),
            max_us: histogram.max(),
        }
    }
}

/// Why requests failed. A status is a failure only where its part says which it must have, as the command line and scenarios
/// do unless they are told that any will do; [`Report::status`] counts all.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failures {
    /// No connection came about.
    pub connect: u64,
    /// The connection ended or was reset before the answer did.
    pub cut: u64,
    /// What came is not HTTP.
    pub malformed: u64,
    /// No end within the time for one request.
    pub timeout: u64,
    /// A token is missing, repeated or out of order, or the usage disagrees.
    pub mismatch: u64,
    /// Events are not parted by an empty line, the last one lacks it, or an event's name is not its type.
    pub border: u64,
    /// The body ended in order without a finish reason.
    pub no_finish: u64,
    /// The same without `[DONE]`.
    pub no_done: u64,
    /// An `error` object came inside a 200 answer.
    pub error_event: u64,
    /// The status is not the one that this part of the mix must have.
    pub status: u64,
}

impl Failures {
    pub fn total(&self) -> u64 {
        let Self {
            connect,
            cut,
            malformed,
            timeout,
            mismatch,
            border,
            no_finish,
            no_done,
            error_event,
            status,
        } = self;
        connect + cut + malformed + timeout + mismatch + border + no_finish + no_done + error_event + status
    }
}

/// What a run found out. Rates and costs are of the measured window: after the warm-up, until the last request started
/// was due to end or the time was up. Everything else also counts requests that ended after that. Rates and costs share out
/// all requests that ended, latencies only those that ended as wanted, and timeouts.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Report {
    /// Length of the window in seconds.
    pub elapsed_s: f64,
    /// Requests that ended in the window, failed or not.
    pub requests_in_window: u64,
    /// Events (`data` lines) that came in the window.
    pub events_in_window: u64,
    pub requests_per_s: f64,
    pub events_per_s: f64,
    /// Requests that ended.
    pub requests: u64,
    /// Answers with status 200 that were whole.
    pub ok: u64,
    /// Streams left on purpose.
    pub hung_up: u64,
    /// Answers by status.
    pub status: BTreeMap<u16, u64>,
    pub failures: Failures,
    /// What the first connection that failed said, if it said anything.
    pub first_error: Option<String>,
    /// Status and beginning of the first answer whose status was not wanted.
    pub first_refusal: Option<String>,
    /// Requests that ended too early, or with a status that was not wanted, so that `total` does not have them.
    pub not_timed: u64,
    /// Content tokens seen.
    pub tokens: u64,
    pub events: u64,
    /// Bytes received, heads included.
    pub bytes: u64,
    pub connections_opened: u64,
    /// Streams that were open when the memory was read (`--idle`).
    pub open_streams: u64,
    /// Open loop: requests that were due.
    pub due: u64,
    /// Of them, those that started late because no connection was free.
    pub late_starts: u64,
    /// Of them, those that had no connection until the end and were never sent. No latency has them.
    pub not_started: u64,
    /// A signal ended the run early; so many requests were under way then and are in no other count.
    pub interrupted: bool,
    pub left: u64,
    /// Start (in the open loop: the start that was due) to first token.
    pub ttft: Latency,
    /// Token to token.
    pub inter_token: Latency,
    /// Start to end, of answers with 200 or the status that was wanted. A timeout counts with the time that it took.
    pub total: Latency,
    /// Sent by the simulator (`stamp`) to read here, by one clock: less what it is without the target between, it is what
    /// the target adds to each token.
    pub delay: Latency,
    pub processes: Vec<Cost>,
    /// Processes that were to be measured and ended before the window did.
    pub processes_gone: Vec<u32>,
    /// System calls of the processes in the time after the window.
    pub system_calls: u64,
    pub system_calls_per_request: Option<f64>,
    pub system_calls_per_event: Option<f64>,
    /// Why they could not be counted.
    pub system_calls_missing: Option<String>,
    pub parts: Vec<PartReport>,
    pub curves: Curves,
    pub series: Vec<Point>,
}

/// What one part of a mix found out. Fields as in [`Report`].
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct PartReport {
    pub name: String,
    pub requests: u64,
    pub ok: u64,
    pub events: u64,
    /// Failures of all sorts.
    pub failures: u64,
    pub ttft: Latency,
    pub inter_token: Latency,
    pub total: Latency,
    pub delay: Latency,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub curves: Option<Curves>,
}

impl PartReport {
    /// Adds another thread's counts.
    pub(super) fn add(&mut self, other: &Self) {
        self.requests += other.requests;
        self.ok += other.ok;
        self.events += other.events;
        self.failures += other.failures;
    }
}

/// Latencies by quantile, dense towards 1: pairs of a quantile and microseconds.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Curves {
    pub ttft: Vec<(f64, u64)>,
    pub inter_token: Vec<(f64, u64)>,
    pub total: Vec<(f64, u64)>,
    pub delay: Vec<(f64, u64)>,
}

impl Curves {
    pub(super) fn of(histogram: &Histogram<u64>) -> Vec<(f64, u64)> {
        /// Steps to each tenfold of 1 / (1 − quantile).
        const STEPS: u32 = 16;
        let mut curve = Vec::new();
        for step in 0.. {
            let share_left = 10_f64.powf(-f64::from(step) / f64::from(STEPS));
            // Beyond this a single sample decides.
            if share_left * (histogram.len() as f64) < 1.0 {
                break;
            }
            let quantile = 1.0 - share_left;
            curve.push((quantile, histogram.value_at_quantile(quantile)));
        }
        curve
    }
}

/// A run at one time.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Point {
    /// End of the interval in seconds since the start.
    pub at_s: f64,
    pub requests_per_s: f64,
    pub events_per_s: f64,
    /// Requests under way.
    pub active: u64,
    pub failures: u64,
    /// Time to first token, or total where nothing is streamed, of this interval; `None` where nothing was timed in it.
    pub first_p50_us: Option<u64>,
    pub first_p99_us: Option<u64>,
    pub delay_p50_us: Option<u64>,
    pub delay_p99_us: Option<u64>,
    /// CPU of the measured processes, in cores.
    pub cores: f64,
    pub resident_bytes: u64,
}

impl Point {
    /// Adds another thread's. Of percentiles the worse is kept: the histograms are gone.
    pub(super) fn add(&mut self, other: &Self) {
        self.requests_per_s += other.requests_per_s;
        self.events_per_s += other.events_per_s;
        self.active += other.active;
        self.failures += other.failures;
        self.first_p50_us = self.first_p50_us.max(other.first_p50_us);
        self.first_p99_us = self.first_p99_us.max(other.first_p99_us);
        self.delay_p50_us = self.delay_p50_us.max(other.delay_p50_us);
        self.delay_p99_us = self.delay_p99_us.max(other.delay_p99_us);
    }
}

impl Report {
    /// Adds another thread's counts.
    pub(super) fn add(&mut self, other: &Self) {
        self.requests_in_window += other.requests_in_window;
        self.events_in_window += other.events_in_window;
        self.requests += other.requests;
        self.ok += other.ok;
        self.hung_up += other.hung_up;
        for (status, count) in &other.status {
            *self.status.entry(*status).or_default() += count;
        }
        self.failures.add(&other.failures);
        if self.first_error.is_none() {
            self.first_error.clone_from(&other.first_error);
        }
        if self.first_refusal.is_none() {
            self.first_refusal.clone_from(&other.first_refusal);
        }
        self.not_timed += other.not_timed;
        self.tokens += other.tokens;
        self.events += other.events;
        self.bytes += other.bytes;
        self.connections_opened += other.connections_opened;
        self.open_streams += other.open_streams;
        self.due += other.due;
        self.late_starts += other.late_starts;
        self.not_started += other.not_started;
        self.interrupted |= other.interrupted;
        self.left += other.left;
    }

    /// Whether every request that was due was sent and ended as the simulator and the options meant it to.
    pub fn is_sound(&self) -> bool {
        self.failures.total() == 0 && self.not_started == 0
    }
}
