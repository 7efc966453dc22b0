//! The highest rate at which a percentile holds: the open loop, so that a server that falls behind cannot hide it.

use std::fmt;
use std::time::Duration;

use anyhow::{Result, bail};
use serde::Serialize;

use crate::load::{self, Latency, Report};

/// What must hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Measure {
    Ttft,
    InterToken,
    Total,
    Delay,
}

/// A bound on a 99th percentile.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Goal {
    pub measure: Measure,
    pub p99: Duration,
}

impl Goal {
    /// Reads `ttft=200ms`, `inter-token=…`, `total=…` or `delay=…`.
    pub fn parse(text: &str) -> Option<Self> {
        let (measure, time) = text.split_once('=')?;
        let measure = match measure {
            "ttft" => Measure::Ttft,
            "inter-token" => Measure::InterToken,
            "total" => Measure::Total,
            "delay" => Measure::Delay,
            _ => return None,
        };
        Some(Self {
            measure,
            p99: crate::upstream::behaviour::duration(time)?,
        })
    }

    fn latency(self, report: &Report) -> &Latency {
        match self.measure {
            Measure::Ttft => &report.ttft,
            Measure::InterToken => &report.inter_token,
            Measure::Total => &report.total,
            Measure::Delay => &report.delay,
        }
    }
}

/// One rate that was tried.
#[derive(Clone, Debug, Serialize)]
pub struct Step {
    /// Requests per second that were due, and that ended.
    pub rate: f64,
    pub reached: f64,
    pub p99_ms: f64,
    pub failures: u64,
    pub late_starts: u64,
    pub held: bool,
    /// CPU of the measured processes, in cores.
    pub cores: f64,
}

/// What was found.
#[derive(Clone, Debug, Serialize)]
pub struct Capacity {
    pub goal: Goal,
    /// The highest rate that held, if any did.
    pub rate: Option<f64>,
    /// Whether even the highest rate that was tried held: then there may be more.
    pub open_above: bool,
    pub steps: Vec<Step>,
}

/// How to search.
#[derive(Clone, Copy, Debug)]
pub struct Search {
    pub goal: Goal,
    /// Requests per second to begin with, and not to go beyond.
    pub from: f64,
    pub most: f64,
    /// The answer is as exact as this share of it.
    pub within: f64,
    /// Measured time of each rate: below one request in it nothing can be told.
    pub window: Duration,
}

/// Of the requests that are due so many must have ended, or the server falls behind.
const REACHED_MIN: f64 = 0.95;
/// Rates tried at most.
const STEPS_MAX: usize = 24;

/// Doubles the rate until it does not hold, then halves what is between. `run` runs one rate and reports.
///
/// # Errors
/// Those of `run`, a search that has no room, and a server of which nothing is answered as it is meant to be: that is no
/// matter of the rate.
pub fn find(search: &Search, mut run: impl FnMut(f64) -> Result<Report>) -> Result<Capacity> {
    if !(search.from > 0.0 && search.most >= search.from && search.within > 0.0) {
        bail!("the search needs a first rate above 0, a highest one above that, and a precision above 0");
    }
    let lowest = 1.0 / search.window.as_secs_f64();
    if search.from < lowest {
        bail!(
            "at {} requests/s none is due in {:?}: a longer window",
            search.from,
            search.window
        );
    }
    let mut steps: Vec<Step> = Vec::new();
    let (mut good, mut bad) = (0.0_f64, f64::INFINITY);
    let mut rate = search.from;
    while steps.len() < STEPS_MAX {
        let report = run(rate)?;
        if let Some(reason) = nothing_worked(&report) {
            bail!("nothing was answered with 200 at {rate:.1} requests/s: {reason}");
        }
        let step = judge(search.goal, rate, &report);
        if step.held {
            good = good.max(rate);
        } else {
            bad = bad.min(rate);
        }
        steps.push(step);
        if good >= search.most
            || (bad.is_finite() && bad - good <= search.within * bad)
            || (good == 0.0 && bad / 2.0 < lowest)
        {
            break;
        }
        rate = match (good, bad) {
            (_, bad) if bad.is_infinite() => (good * 2.0).min(search.most),
            (0.0, bad) => bad / 2.0,
            (good, bad) => (good + bad) / 2.0,
        };
    }
    Ok(Capacity {
        goal: search.goal,
        rate: (good > 0.0).then_some(good),
        open_above: bad.is_infinite(),
        steps,
    })
}

/// Why no answer was what it should be, where none was and overload is not the reason. A server that is only too slow runs
/// into timeouts or cuts connections, and so has no status here.
fn nothing_worked(report: &Report) -> Option<String> {
    if report.ok > 0 || report.status.contains_key(&200) {
        return None;
    }
    let statuses: Vec<String> = report
        .status
        .iter()
        .map(|(status, count)| format!("{count} × {status}"))
        .collect();
    if !statuses.is_empty() {
        return Some(format!("{}; a wrong key, model or path?", statuses.join(", ")));
    }
    (report.failures.connect > 0).then(|| {
        let error = report.first_error.as_deref().unwrap_or("no reason was told");
        format!("no connection came about: {error}")
    })
}

fn judge(goal: Goal, rate: f64, report: &Report) -> Step {
    let latency = goal.latency(report);
    let failures = report.failures.total();
    let refused: u64 = report
        .status
        .iter()
        .filter(|(status, _)| **status != 200)
        .map(|(_, count)| count)
        .sum();
    let bound_us = goal.p99.as_micros() as u64;
    let on_time = latency.count > 0 && latency.p99_us <= bound_us;
    Step {
        rate,
        reached: report.requests_per_s,
        p99_ms: latency.p99_us as f64 / 1e3,
        failures: failures + refused,
        late_starts: report.late_starts,
        held: on_time && failures + refused == 0 && report.requests_per_s >= rate * REACHED_MIN,
        cores: report.processes.iter().map(|cost| cost.cores).sum::<f64>() + 0.0,
    }
}

/// The load of one step: `base` in the open loop at `rate`, with connections enough for what may be under way.
pub fn at_rate(base: &load::Options, rate: f64) -> load::Options {
    load::Options {
        rate: Some(rate),
        stages: Vec::new(),
        trace: None,
        ..base.clone()
    }
}

impl fmt::Display for Capacity {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            out,
            "{:>12}{:>12}{:>12}{:>10}{:>8}{:>9}  held",
            "rate/s", "reached/s", "p99 ms", "failed", "late", "core %"
        )?;
        for step in &self.steps {
            writeln!(
                out,
                "{:>12.1}{:>12.1}{:>12.2}{:>10}{:>8}{:>9.0}  {}",
                step.rate,
                step.reached,
                step.p99_ms,
                step.failures,
                step.late_starts,
                step.cores * 100.0,
                if step.held { "yes" } else { "no" }
            )?;
        }
        match self.rate {
            Some(rate) if self.open_above => {
                writeln!(out, "capacity: {rate:.1} requests/s held; more was not tried")
            }
            Some(rate) => writeln!(out, "capacity: {rate:.1} requests/s"),
            None => writeln!(out, "capacity: no rate held"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn server(limit: f64) -> impl FnMut(f64) -> Result<Report> {
        move |rate| {
            let mut report = Report {
                requests_per_s: rate.min(limit),
                ..Report::default()
            };
            report.ttft.count = 100;
            report.ttft.p99_us = if rate <= limit { 50_000 } else { 900_000 };
            Ok(report)
        }
    }

    fn search(from: f64, most: f64) -> Search {
        Search {
            goal: Goal::parse("ttft=200ms").unwrap(),
            from,
            most,
            within: 0.02,
            window: Duration::from_secs(5),
        }
    }

    #[test]
    fn the_edge_is_found_from_below_and_from_above() {
        for from in [10.0, 100_000.0] {
            let found = find(&search(from, 1e6), server(1234.0)).unwrap();
            let rate = found.rate.unwrap();
            assert!((1234.0 * 0.98..=1234.0).contains(&rate), "{found}");
        }
    }

    #[test]
    fn a_bound_and_a_failure_end_the_search() {
        let found = find(&search(10.0, 100.0), server(1e9)).unwrap();
        assert_eq!((found.rate, found.open_above), (Some(100.0), true));
        let failing = |rate: f64| {
            let mut report = server(1e9)(rate)?;
            report.failures.cut = 1;
            Ok(report)
        };
        let found = find(&search(10.0, 100.0), failing).unwrap();
        assert_eq!(found.rate, None);
        assert!(found.steps.len() < STEPS_MAX);
        let lowest = found.steps.last().unwrap().rate;
        assert!(lowest >= 0.2, "{lowest}/s: not one request in 5 s");
        assert!(find(&search(0.0, 1.0), server(1.0)).is_err());
        assert!(find(&search(0.1, 1.0), server(1.0)).is_err());
    }

    #[test]
    fn a_server_that_refuses_all_is_told_at_once() {
        let mut runs = 0;
        let refuses = |rate: f64| {
            runs += 1;
            let mut report = server(1e9)(rate)?;
            report.status.insert(401, 50);
            Ok(report)
        };
        let error = find(&search(10.0, 100.0), refuses).unwrap_err().to_string();
        assert!(runs == 1 && error.contains("50 × 401"), "{error}");
        let gone = |rate: f64| {
            let mut report = server(1e9)(rate)?;
            (report.failures.connect, report.first_error) = (50, Some("connection refused".to_owned()));
            Ok(report)
        };
        let error = find(&search(10.0, 100.0), gone).unwrap_err().to_string();
        assert!(error.contains("connection refused"), "{error}");
        // Too much at first is no reason to give up.
        let slow = |rate: f64| {
            let mut report = server(20.0)(rate)?;
            report.failures.timeout = u64::from(rate > 20.0);
            Ok(report)
        };
        assert!(find(&search(100.0, 200.0), slow).unwrap().rate.is_some());
    }

    #[test]
    fn goals_are_read() {
        assert_eq!(Goal::parse("total=1s").unwrap().measure, Measure::Total);
        for text in ["ttft", "ttft=x", "mean=1s", ""] {
            assert_eq!(Goal::parse(text), None, "{text}");
        }
    }
}
