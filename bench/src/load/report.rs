//! What a run found out, as numbers, JSON and a table.

use std::collections::BTreeMap;
use std::fmt;

use hdrhistogram::Histogram;
use serde::Serialize;

use crate::process::Cost;

/// Latencies in microseconds.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
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

/// Why requests failed. Statuses other than 200 are not failures; [`Report::status`] counts them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
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
    /// The body ended in order without a finish reason.
    pub no_finish: u64,
    /// The same without `[DONE]`.
    pub no_done: u64,
    /// An `error` object came inside a 200 answer.
    pub error_event: u64,
}

impl Failures {
    pub fn total(&self) -> u64 {
        let Self {
            connect,
            cut,
            malformed,
            timeout,
            mismatch,
            no_finish,
            no_done,
            error_event,
        } = self;
        connect + cut + malformed + timeout + mismatch + no_finish + no_done + error_event
    }
}

/// What a run found out. Rates and costs are of the measured window: after the warm-up, until the last request started
/// was due to end or the time was up. Everything else also counts requests that ended after that.
#[derive(Clone, Debug, Default, Serialize)]
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
    /// Content tokens seen.
    pub tokens: u64,
    pub events: u64,
    /// Bytes received, heads included.
    pub bytes: u64,
    pub connections_opened: u64,
    /// Streams that were open when the memory was read (`--idle`).
    pub open_streams: u64,
    /// Open loop: requests that started late because no connection was free.
    pub late_starts: u64,
    /// Start (in the open loop: the start that was due) to first token.
    pub ttft: Latency,
    /// Token to token.
    pub inter_token: Latency,
    /// Start to end.
    pub total: Latency,
    pub processes: Vec<Cost>,
}

impl Report {
    /// Whether every request ended as the simulator and the options meant it to. Statuses do not matter here.
    pub fn is_sound(&self) -> bool {
        self.failures.total() == 0
    }
}

impl fmt::Display for Report {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let status: Vec<String> = self
            .status
            .iter()
            .map(|(status, count)| format!("{status}: {count}"))
            .collect();
        writeln!(out, "window      {:.2} s", self.elapsed_s)?;
        writeln!(
            out,
            "requests    {} ({:.1}/s), ok {}",
            self.requests, self.requests_per_s, self.ok
        )?;
        writeln!(
            out,
            "events      {} ({:.1}/s), tokens {}",
            self.events, self.events_per_s, self.tokens
        )?;
        writeln!(
            out,
            "status      {}",
            if status.is_empty() {
                "none".to_owned()
            } else {
                status.join(", ")
            }
        )?;
        writeln!(
            out,
            "connections {} opened, {:.1} MB received",
            self.connections_opened,
            self.bytes as f64 / 1e6
        )?;
        if self.hung_up + self.late_starts > 0 {
            writeln!(
                out,
                "on purpose  {} hung up; {} started late",
                self.hung_up, self.late_starts
            )?;
        }
        self.write_failures(out)?;
        self.write_latencies(out)?;
        self.processes.iter().try_for_each(|cost| write_cost(out, cost))
    }
}

impl Report {
    fn write_failures(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let failures = &self.failures;
        let named = [
            ("connect", failures.connect),
            ("cut", failures.cut),
            ("malformed", failures.malformed),
            ("timeout", failures.timeout),
            ("token mismatch", failures.mismatch),
            ("no finish reason", failures.no_finish),
            ("no [DONE]", failures.no_done),
            ("error event", failures.error_event),
        ];
        let seen: Vec<String> = named
            .iter()
            .filter(|(_, count)| *count > 0)
            .map(|(name, count)| format!("{name}: {count}"))
            .collect();
        writeln!(
            out,
            "failures    {}",
            if seen.is_empty() {
                "none".to_owned()
            } else {
                seen.join(", ")
            }
        )
    }

    fn write_latencies(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            out,
            "{:<12}{:>10}{:>10}{:>10}{:>10}{:>10}{:>10}  (ms)",
            "latency", "mean", "p50", "p90", "p99", "p99.9", "max"
        )?;
        for (name, latency) in [
            ("ttft", &self.ttft),
            ("inter-token", &self.inter_token),
            ("total", &self.total),
        ] {
            if latency.count == 0 {
                continue;
            }
            write!(out, "{name:<12}{:>10.3}", latency.mean_us / 1e3)?;
            for micros in [
                latency.p50_us,
                latency.p90_us,
                latency.p99_us,
                latency.p999_us,
                latency.max_us,
            ] {
                write!(out, "{:>10.3}", micros as f64 / 1e3)?;
            }
            writeln!(out)?;
        }
        Ok(())
    }
}

fn write_cost(out: &mut fmt::Formatter<'_>, cost: &Cost) -> fmt::Result {
    write!(
        out,
        "process {}  cpu {:.3} s (user {:.2}, system {:.2}), {:.1} % of a core",
        cost.pid,
        cost.cpu_s,
        cost.user_s,
        cost.system_s,
        cost.cores * 100.0
    )?;
    if let Some(micros) = cost.cpu_us_per_request {
        write!(out, ", {micros:.2} us/request")?;
    }
    if let Some(micros) = cost.cpu_us_per_event {
        write!(out, ", {micros:.3} us/event")?;
    }
    writeln!(
        out,
        "\n    memory {:.1} -> {:.1} MiB, switches {} voluntary, {} involuntary",
        cost.resident_before_bytes as f64 / 1_048_576.0,
        cost.resident_after_bytes as f64 / 1_048_576.0,
        cost.voluntary_switches,
        cost.involuntary_switches
    )?;
    if let Some(bytes) = cost.bytes_per_open_stream {
        writeln!(out, "    {bytes:.0} bytes per open stream")?;
    }
    Ok(())
}
