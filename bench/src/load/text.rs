//! A report as people read it.

use std::fmt;

use super::report::Report;
use crate::process::Cost;

impl fmt::Display for Report {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let status: Vec<String> = self
            .status
            .iter()
            .map(|(status, count)| format!("{status}: {count}"))
            .collect();
        if self.interrupted {
            writeln!(out, "INTERRUPTED with {} requests under way", self.left)?;
        }
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
        if self.hung_up > 0 {
            writeln!(out, "on purpose  {} hung up", self.hung_up)?;
        }
        if self.late_starts + self.not_started > 0 {
            writeln!(
                out,
                "open loop   {} were due, {} started late, {} NEVER STARTED: no connection was free",
                self.due, self.late_starts, self.not_started
            )?;
        }
        self.write_failures(out)?;
        self.write_latencies(out)?;
        self.processes.iter().try_for_each(|cost| write_cost(out, cost))?;
        for pid in &self.processes_gone {
            writeln!(out, "process {pid} ENDED before the window did: it has no cost")?;
        }
        if let Some(calls) = self.system_calls_per_event {
            writeln!(out, "system calls {calls:.3} per event")?;
        } else if let Some(calls) = self.system_calls_per_request {
            writeln!(out, "system calls {calls:.2} per request")?;
        }
        if let Some(reason) = &self.system_calls_missing {
            writeln!(out, "system calls skipped: {reason}")?;
        }
        if self.parts.len() > 1 {
            self.write_parts(out)?;
        }
        Ok(())
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
            ("event border", failures.border),
            ("no finish reason", failures.no_finish),
            ("no [DONE]", failures.no_done),
            ("error event", failures.error_event),
            ("unexpected status", failures.status),
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
        )?;
        if self.ok == 0 && self.requests > self.hung_up {
            writeln!(out, "            nothing was answered with 200")?;
        }
        if let Some(refusal) = &self.first_refusal {
            writeln!(out, "            first answer not wanted: {refusal}")?;
        }
        if let Some(error) = &self.first_error {
            writeln!(out, "            first error: {error}")?;
        }
        if self.not_timed > 0 {
            writeln!(
                out,
                "            {} requests are in no total latency: they ended early or were refused",
                self.not_timed
            )?;
        }
        Ok(())
    }

    fn write_parts(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            out,
            "{:<16}{:>10}{:>10}{:>8}{:>12}{:>12}{:>12}  (ms)",
            "part", "requests", "ok", "failed", "ttft p99", "delay p99", "total p99"
        )?;
        for part in &self.parts {
            writeln!(
                out,
                "{:<16}{:>10}{:>10}{:>8}{:>12.3}{:>12.3}{:>12.3}",
                part.name,
                part.requests,
                part.ok,
                part.failures,
                part.ttft.p99_us as f64 / 1e3,
                part.delay.p99_us as f64 / 1e3,
                part.total.p99_us as f64 / 1e3
            )?;
        }
        Ok(())
    }

    fn write_latencies(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.ttft.count + self.total.count == 0 {
            return Ok(());
        }
        writeln!(
            out,
            "{:<12}{:>10}{:>10}{:>10}{:>10}{:>10}{:>10}  (ms)",
            "latency", "mean", "p50", "p90", "p99", "p99.9", "max"
        )?;
        for (name, latency) in [
            ("ttft", &self.ttft),
            ("inter-token", &self.inter_token),
            ("total", &self.total),
            ("delay", &self.delay),
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
        "\n    memory {:.1} -> {:.1} MiB",
        cost.resident_before_bytes as f64 / 1_048_576.0,
        cost.resident_after_bytes as f64 / 1_048_576.0,
    )?;
    write!(
        out,
        "    context switches {} voluntary, {} involuntary",
        cost.voluntary_switches, cost.involuntary_switches
    )?;
    if let Some(switches) = cost.switches_per_request {
        write!(out, ", {switches:.3} per request")?;
    }
    if let Some(switches) = cost.switches_per_event {
        write!(out, ", {switches:.4} per event")?;
    }
    writeln!(out)?;
    if let Some(bytes) = cost.bytes_per_open_stream {
        writeln!(out, "    {bytes:.0} bytes per open stream")?;
    }
    Ok(())
}
