//! The state of the gateway as Prometheus text (exposition format 0.0.4).
//!
//! Names begin with `gateway_`, end in their unit and, for counters, in `_total`. What OpenTelemetry
//! has agreed on for generative AI keeps its terms and bucket bounds: time to first token, time per
//! output token, request duration, and the token types `input` and `output`
//! (<https://opentelemetry.io/docs/specs/semconv/gen-ai/gen-ai-metrics/>).

use std::{
    fmt::{Display, Write},
    sync::Arc,
};

use super::{
    CoreShared, Latencies, Latency,
    counters::{Refusal, STATUS_LABELS, Totals},
};

pub use super::totals;

/// `Content-Type` of the text.
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Bounds of the time to the first token, microseconds (`gen_ai.server.time_to_first_token`).
const TTFT_BOUNDS_US: [u64; 16] = [
    1_000, 5_000, 10_000, 20_000, 40_000, 60_000, 80_000, 100_000, 250_000, 500_000, 750_000, 1_000_000,
    2_500_000, 5_000_000, 7_500_000, 10_000_000,
];

/// Bounds of the time per output token, microseconds (`gen_ai.server.time_per_output_token`), with
/// three below them: fleets of small models are faster than 10 ms a token.
const INTER_TOKEN_BOUNDS_US: [u64; 16] = [
    1_000, 2_500, 5_000, 10_000, 25_000, 50_000, 75_000, 100_000, 150_000, 200_000, 300_000, 400_000,
    500_000, 750_000, 1_000_000, 2_500_000,
];

/// Bounds of a request's whole time, microseconds (`gen_ai.server.request.duration`), with two above
/// them: reasoning models take minutes.
const TOTAL_BOUNDS_US: [u64; 16] = [
    10_000,
    20_000,
    40_000,
    80_000,
    160_000,
    320_000,
    640_000,
    1_280_000,
    2_560_000,
    5_120_000,
    10_240_000,
    20_480_000,
    40_960_000,
    81_920_000,
    163_840_000,
    327_680_000,
];

/// Bounds of the gateway's own time, microseconds.
const OVERHEAD_BOUNDS_US: [u64; 13] = [
    10, 25, 50, 100, 250, 500, 1_000, 2_500, 5_000, 10_000, 50_000, 100_000, 1_000_000,
];

/// What is told of the program as a whole.
#[derive(Debug)]
pub struct Sources<'a> {
    /// Version of the gateway.
    pub version: &'a str,
    /// When the process started, seconds since the Unix epoch.
    pub start_unix_s: u64,
    /// Now, milliseconds of the clock of [`super::CoreTelemetry::beat`].
    pub now_ms: u64,
    pub cores: &'a [Arc<CoreShared>],
    /// Of all cores: [`super::latencies`].
    pub latencies: &'a Latencies,
}

/// The whole text. To add what other modules know, use [`write`] and go on with the exposition.
pub fn render(sources: &Sources<'_>) -> String {
    let mut out = Exposition::default();
    write(sources, &mut out);
    out.finish()
}

/// Writes what the cores counted and timed.
pub fn write(sources: &Sources<'_>, out: &mut Exposition) {
    let totals = totals(sources.cores);
    write_process(sources, out);
    write_clients(&totals, out);
    write_upstreams(&totals, out);
    write_tokens(&totals, out);
    write_latencies(sources.latencies, out);
    write_cores(sources, out);
}

fn write_process(sources: &Sources<'_>, out: &mut Exposition) {
    out.gauge("gateway_build_info", "The running version; always 1.")
        .sample(&[("version", sources.version)], 1);
    out.gauge(
        "gateway_start_time_seconds",
        "When the process started, seconds since the Unix epoch.",
    )
    .value(sources.start_unix_s);
    if let Some(bytes) = resident_bytes() {
        out.gauge("gateway_resident_memory_bytes", "Memory of the process in RAM.")
            .value(bytes);
    }
}

fn write_clients(totals: &Totals, out: &mut Exposition) {
    out.counter("gateway_connections_total", "Connections of clients accepted.")
        .value(totals.connections_opened);
    out.gauge("gateway_connections_open", "Connections of clients open now.")
        .value(totals.connections_open());
    out.counter(
        "gateway_connections_refused_total",
        "Connections closed at once because a core was at its limit.",
    )
    .value(totals.connections_refused);
    out.counter(
        "gateway_turned_away_total",
        "What came from clients that are blocked: connections reset, requests answered early or ended, and what would have \
         been, had the mode not been observe.",
    )
    .sample(&[("what", "connection")], totals.connections_turned_away)
    .sample(&[("what", "request")], totals.clients_turned_away)
    .sample(&[("what", "observed")], totals.clients_would_turn_away);
    out.counter(
        "gateway_proxy_headers_refused_total",
        "Connections closed because their PROXY header was missing, malformed or from no trusted proxy.",
    )
    .value(totals.proxy_headers_refused);
    out.counter(
        "gateway_tls_handshakes_total",
        "TLS handshakes with clients, by result.",
    )
    .sample(&[("result", "ok")], totals.tls_handshakes)
    .sample(&[("result", "failed")], totals.tls_failures);
    out.counter(
        "gateway_requests_total",
        "Requests accepted; each has one ledger record.",
    )
    .value(totals.requests);
    let mut family = out.counter(
        "gateway_refusals_total",
        "Requests refused before dispatch, by reason.",
    );
    for reason in Refusal::ALL {
        family.sample(&[("reason", reason.name())], totals.refused[reason as usize]);
    }
    let mut family = out.counter(
        "gateway_responses_total",
        "Answers sent, by status code or class.",
    );
    for (label, count) in STATUS_LABELS.iter().zip(totals.responses) {
        family.sample(&[("code", label)], count);
    }
    out.counter("gateway_streams_total", "Streamed answers begun.")
        .value(totals.streams_opened);
    out.gauge("gateway_streams_open", "Streamed answers running now.")
        .value(totals.streams_open());
    out.counter(
        "gateway_stream_errors_total",
        "Streams that ended with an error after they began.",
    )
    .value(totals.stream_errors);
    out.counter(
        "gateway_events_relayed_total",
        "Server-sent events passed to clients.",
    )
    .value(totals.events_relayed);
    out.counter(
        "gateway_client_disconnects_total",
        "Clients that went away before the end of their answer.",
    )
    .value(totals.client_disconnects);
    out.counter(
        "gateway_received_bytes_total",
        "Bytes received from clients, without TLS framing.",
    )
    .value(totals.bytes_from_clients);
    out.counter(
        "gateway_sent_bytes_total",
        "Bytes sent to clients, without TLS framing.",
    )
    .value(totals.bytes_to_clients);
}

fn write_upstreams(totals: &Totals, out: &mut Exposition) {
    out.counter(
        "gateway_upstream_connections_total",
        "Connections to upstreams opened.",
    )
    .value(totals.upstream_connects);
    out.counter(
        "gateway_upstream_reuses_total",
        "Requests sent over a pooled connection.",
    )
    .value(totals.upstream_reuses);
    out.counter(
        "gateway_upstream_connect_failures_total",
        "Connections to upstreams that could not be opened.",
    )
    .value(totals.upstream_connect_failures);
    out.counter(
        "gateway_upstream_retries_total",
        "Requests sent again, to the same or another endpoint.",
    )
    .value(totals.upstream_retries);
    out.counter(
        "gateway_upstream_errors_total",
        "Answers of upstreams that were errors, cut off or not understood.",
    )
    .value(totals.upstream_errors);
}

fn write_tokens(totals: &Totals, out: &mut Exposition) {
    out.counter(
        "gateway_tokens_total",
        "Tokens of settled requests; input includes what providers had cached.",
    )
    .sample(&[("type", "input")], totals.tokens_prompt)
    .sample(&[("type", "output")], totals.tokens_completion);
    out.counter(
        "gateway_cached_input_tokens_total",
        "Input tokens that providers read from their cache.",
    )
    .value(totals.tokens_cached);
    out.counter(
        "gateway_usage_estimated_total",
        "Requests whose tokens are the gateway's estimate.",
    )
    .value(totals.usage_estimated);
    out.counter(
        "gateway_limit_cuts_total",
        "Streams that were ended because a limit had nothing left.",
    )
    .value(totals.limit_cuts);
    out.counter(
        "gateway_usage_clamped_total",
        "Requests whose provider told figures that contradict themselves: more cached than there was input, say.",
    )
    .value(totals.usage_clamped);
    out.counter(
        "gateway_unpriced_total",
        "Requests whose cost is not known, for want of a price.",
    )
    .value(totals.unpriced);
    out.counter(
        "gateway_cost_usd_total",
        "What settled requests cost, US dollars, as far as prices are known.",
    )
    .value(dollars(totals.cost_nano_usd));
    out.counter(
        "gateway_answers_drained_total",
        "Answers read on after their client had hung up, for their usage.",
    )
    .value(totals.answers_drained);
    out.counter(
        "gateway_ledger_unrecorded_total",
        "Requests served that are not in the books.",
    )
    .value(totals.ledger_unrecorded);
    out.counter(
        "gateway_ledger_full_total",
        "Requests turned away because the ledger's queue was full.",
    )
    .value(totals.ledger_full);
    out.counter(
        "gateway_access_log_dropped_total",
        "Entries of the access log dropped, its queue being full.",
    )
    .value(totals.access_log_dropped);
}

fn write_latencies(latencies: &Latencies, out: &mut Exposition) {
    out.histogram(
        "gateway_time_to_first_token_seconds",
        "From a request's complete head to the first byte of its answer's body.",
        &latencies.ttft,
        &TTFT_BOUNDS_US,
    );
    out.histogram(
        "gateway_time_per_output_token_seconds",
        "Between two events of a stream, as they are passed on.",
        &latencies.inter_token,
        &INTER_TOKEN_BOUNDS_US,
    );
    out.histogram(
        "gateway_request_duration_seconds",
        "From a request's complete head to the end of its answer.",
        &latencies.total,
        &TOTAL_BOUNDS_US,
    );
    out.histogram(
        "gateway_overhead_seconds",
        "The part of a request's time that the gateway itself took until the upstream had it.",
        &latencies.overhead,
        &OVERHEAD_BOUNDS_US,
    );
}

/// What shows whether the load is even and every core alive; few series, as there are few cores.
fn write_cores(sources: &Sources<'_>, out: &mut Exposition) {
    let numbers: Vec<String> = sources.cores.iter().map(|core| core.core().to_string()).collect();
    let cores = || numbers.iter().zip(sources.cores);
    let mut family = out.counter("gateway_core_requests_total", "Requests accepted by each core.");
    for (number, core) in cores() {
        family.sample(&[("core", number)], core.counters().requests.get());
    }
    let mut family = out.gauge(
        "gateway_core_connections_open",
        "Connections of clients open now on each core.",
    );
    for (number, core) in cores() {
        family.sample(&[("core", number)], core.counters().connections_open());
    }
    let mut family = out.gauge(
        "gateway_core_heartbeat_age_seconds",
        "Time since each core last showed to be alive.",
    );
    for (number, core) in cores() {
        family.sample(
            &[("core", number)],
            core.heartbeat_age_ms(sources.now_ms) as f64 / 1e3,
        );
    }
}

/// Memory of this process in RAM, bytes: `VmRSS` of proc(5), which the kernel gives in KiB.
fn resident_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim_end().parse().ok()?;
    Some(kib * 1024)
}

/// Text in the making. A family's samples stand together, as the format demands, because a
/// [`Family`] borrows the text while it lives.
#[derive(Debug, Default)]
pub struct Exposition {
    text: String,
}

/// One metric's samples.
#[derive(Debug)]
pub struct Family<'a> {
    text: &'a mut String,
    name: &'a str,
}

// Writing to a String cannot fail, hence the results of write! that are let go below.
impl Exposition {
    /// Begins a counter; its name ends in `_total`.
    pub fn counter<'a>(&'a mut self, name: &'a str, help: &str) -> Family<'a> {
        debug_assert!(name.ends_with("_total"), "{name}");
        self.family(name, "counter", help)
    }

    /// Begins a gauge.
    pub fn gauge<'a>(&'a mut self, name: &'a str, help: &str) -> Family<'a> {
        self.family(name, "gauge", help)
    }

    /// Writes a histogram in seconds; its name ends in `_seconds`. The bounds ascend, microseconds.
    pub fn histogram(&mut self, name: &str, help: &str, latency: &Latency, bounds_us: &[u64]) {
        debug_assert!(name.ends_with("_seconds"), "{name}");
        self.family(name, "histogram", help);
        for (bound_us, count) in bounds_us.iter().zip(latency.cumulative(bounds_us)) {
            let _ = writeln!(
                self.text,
                "{name}_bucket{{le=\"{}\"}} {count}",
                seconds(*bound_us)
            );
        }
        let count = latency.count();
        let _ = writeln!(self.text, "{name}_bucket{{le=\"+Inf\"}} {count}");
        let _ = writeln!(self.text, "{name}_sum {}", seconds(latency.sum_us()));
        let _ = writeln!(self.text, "{name}_count {count}");
    }

    /// Writes a histogram in seconds whose buckets double: `counts[n]` are those below 2^n ms that are in no bucket before,
    /// the last one is unbounded. Its name ends in `_seconds`.
    pub fn histogram_log2(&mut self, name: &str, help: &str, counts: &[u64], sum_ms: u64) {
        debug_assert!(name.ends_with("_seconds"), "{name}");
        self.family(name, "histogram", help);
        let (mut below, last) = (0, counts.len().saturating_sub(1));
        for (bucket, count) in counts[..last].iter().enumerate() {
            below += count;
            let bound = seconds(1_000 << bucket);
            let _ = writeln!(self.text, "{name}_bucket{{le=\"{bound}\"}} {below}");
        }
        let count: u64 = counts.iter().sum();
        let _ = writeln!(self.text, "{name}_bucket{{le=\"+Inf\"}} {count}");
        let _ = writeln!(self.text, "{name}_sum {}", seconds(sum_ms.saturating_mul(1_000)));
        let _ = writeln!(self.text, "{name}_count {count}");
    }

    /// The text.
    pub fn finish(self) -> String {
        self.text
    }

    fn family<'a>(&'a mut self, name: &'a str, kind: &str, help: &str) -> Family<'a> {
        let help = help.replace('\\', "\\\\").replace('\n', "\\n");
        let _ = writeln!(self.text, "# HELP {name} {help}\n# TYPE {name} {kind}");
        Family {
            text: &mut self.text,
            name,
        }
    }
}

impl Family<'_> {
    /// Writes the only sample of a family without labels.
    pub fn value(&mut self, value: impl Display) {
        self.sample(&[], value);
    }

    /// Writes a sample. Label values may hold anything; they are escaped.
    pub fn sample(&mut self, labels: &[(&str, &str)], value: impl Display) -> &mut Self {
        self.text.push_str(self.name);
        for (place, (label, text)) in labels.iter().enumerate() {
            self.text.push(if place == 0 { '{' } else { ',' });
            let _ = write!(self.text, "{label}=\"");
            escape(text, self.text);
            self.text.push('"');
        }
        if !labels.is_empty() {
            self.text.push('}');
        }
        let _ = writeln!(self.text, " {value}");
        self
    }
}

fn escape(text: &str, out: &mut String) {
    for c in text.chars() {
        match c {
            '\\' => out.push_str("\\\\"),
            '"' => out.push_str("\\\""),
            '\n' => out.push_str("\\n"),
            c => out.push(c),
        }
    }
}

/// Nano-dollars as dollars, exactly.
pub fn dollars(nano: u64) -> impl Display {
    crate::config::units::Dollars(nano)
}

fn seconds(us: u64) -> f64 {
    us as f64 / 1e6
}

#[cfg(test)]
mod tests;
