//! What a comparison found out: medians of the rounds, and ratios of runs that stood side by side.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::Machine;
use crate::load::Report;
use crate::scenario::{Figure, Scenario};

/// What others are compared with, where it was measured.
pub const BASELINE: &str = "nginx";
/// The target that is none: load generator and upstream without anything between.
pub const DIRECT: &str = "direct";

/// A target as it was set up.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct TargetInfo {
    pub name: String,
    pub about: String,
    pub on: Vec<String>,
    pub off: Vec<String>,
    pub version: Option<String>,
    /// Why it could not be run.
    pub missing: Option<String>,
}

/// All rounds of one scenario and target.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Cell {
    pub scenario: String,
    pub about: String,
    pub figure: Figure,
    /// The scenario that its delay is compared with.
    #[serde(default)]
    pub beside: Option<String>,
    pub target: String,
    pub skipped: Option<String>,
    pub reports: Vec<Report>,
}

/// A whole comparison.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Results {
    pub machine: Machine,
    pub command: String,
    pub rounds: u32,
    pub targets: Vec<TargetInfo>,
    pub cells: Vec<Cell>,
}

/// The figures of one run that a table shows.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Figures {
    pub per_request: bool,
    /// Events or requests per second.
    pub rate: f64,
    /// CPU in microseconds per event or request, or bytes per stream.
    pub cost: Option<f64>,
    /// How busy the target's core was.
    pub cores: f64,
    pub p50_us: u64,
    pub p99_us: u64,
    pub system_calls: Option<f64>,
    /// Context switches per event or request.
    pub switches: Option<f64>,
    /// Bytes that came to the clients per event or request, heads included.
    pub bytes: Option<f64>,
    pub failures: u64,
}

impl Figures {
    pub fn of(figure: Figure, report: &Report) -> Self {
        let per_request = figure == Figure::Request;
        let sum = |of: fn(&crate::process::Cost) -> Option<f64>| {
            let known: Vec<f64> = report.processes.iter().filter_map(of).collect();
            (!known.is_empty()).then(|| known.iter().sum::<f64>())
        };
        let (rate, units) = if per_request {
            (report.requests_per_s, report.requests_in_window)
        } else {
            (report.events_per_s, report.events_in_window)
        };
        let switches: u64 = report
            .processes
            .iter()
            .map(|cost| cost.voluntary_switches + cost.involuntary_switches)
            .sum();
        let ended = if per_request {
            report.requests
        } else {
            report.events
        };
        // Where tokens tell when they were sent, how long they took is the figure; else the whole request.
        let latency = if report.delay.count > 0 {
            &report.delay
        } else {
            &report.total
        };
        Self {
            per_request,
            rate,
            cost: match figure {
                Figure::Event => sum(|cost| cost.cpu_us_per_event),
                Figure::Request => sum(|cost| cost.cpu_us_per_request),
                Figure::Stream => sum(|cost| cost.bytes_per_open_stream),
            },
            cores: report.processes.iter().map(|cost| cost.cores).sum(),
            p50_us: latency.p50_us,
            p99_us: latency.p99_us,
            system_calls: if per_request {
                report.system_calls_per_request
            } else {
                report.system_calls_per_event
            },
            switches: (units > 0).then(|| switches as f64 / units as f64),
            bytes: (ended > 0).then(|| report.bytes as f64 / ended as f64),
            failures: report.failures.total(),
        }
    }
}

impl fmt::Display for Figures {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let unit = if self.per_request { "requests" } else { "events" };
        write!(out, "{:.0} {unit}/s, ", self.rate)?;
        match self.cost {
            Some(cost) => write!(out, "{cost:.3} each")?,
            None => write!(out, "no cost")?,
        }
        write!(
            out,
            ", {:.0} % of a core, p99 {:.2} ms, {} failed",
            self.cores * 100.0,
            self.p99_us as f64 / 1e3,
            self.failures
        )
    }
}

/// The middle of some values and how far they lie apart.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Spread {
    pub median: f64,
    pub low: f64,
    pub high: f64,
}

impl Spread {
    pub fn of(values: &[f64]) -> Option<Self> {
        Some(Self {
            median: median(values)?,
            low: values.iter().copied().fold(f64::INFINITY, f64::min),
            high: values.iter().copied().fold(f64::NEG_INFINITY, f64::max),
        })
    }
}

/// The middle value; of an even number of values the mean of the two in the middle.
pub fn median(values: &[f64]) -> Option<f64> {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => None,
        count if count % 2 == 1 => Some(values[middle]),
        _ => Some((values[middle - 1] + values[middle]) / 2.0),
    }
}

impl Cell {
    pub fn new(scenario: &Scenario, target: &str) -> Self {
        Self {
            scenario: scenario.name.clone(),
            about: scenario.about.clone(),
            figure: scenario.figure,
            beside: scenario.beside.clone(),
            target: target.to_owned(),
            skipped: None,
            reports: Vec::new(),
        }
    }

    pub(super) fn figures(&self) -> Vec<Figures> {
        self.reports
            .iter()
            .map(|report| Figures::of(self.figure, report))
            .collect()
    }

    /// Its cost over that of `base`, round by round.
    pub fn ratio(&self, base: &Self) -> Option<Spread> {
        let pairs = self.figures().into_iter().zip(base.figures());
        let ratios: Vec<f64> = pairs
            .filter_map(|(own, base)| Some(own.cost? / base.cost.filter(|cost| *cost > 0.0)?))
            .collect();
        Spread::of(&ratios)
    }
}

impl Results {
    /// All rounds of one scenario and target.
    pub(super) fn cell(&self, scenario: &str, target: &str) -> Option<&Cell> {
        self.cells
            .iter()
            .find(|cell| cell.scenario == scenario && cell.target == target)
    }

    /// Whether no run lost or broke anything.
    pub fn is_sound(&self) -> bool {
        self.cells
            .iter()
            .flat_map(|cell| &cell.reports)
            .all(Report::is_sound)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process::Cost;

    fn cell(target: &str, costs: &[f64], cut: u64) -> Cell {
        let report = |cost: &f64| {
            let mut report = Report {
                events_in_window: 10,
                processes: vec![Cost {
                    cpu_us_per_event: Some(*cost),
                    ..Cost::default()
                }],
                ..Report::default()
            };
            report.failures.cut = cut;
            report
        };
        Cell {
            scenario: "busy".to_owned(),
            about: String::new(),
            figure: Figure::Event,
            beside: None,
            target: target.to_owned(),
            skipped: None,
            reports: costs.iter().map(report).collect(),
        }
    }

    #[test]
    fn medians_need_no_order() {
        assert_eq!(median(&[]), None);
        assert_eq!(median(&[3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(&[4.0, 1.0]), Some(2.5));
    }

    #[test]
    fn ratios_are_of_the_same_round() {
        let (gateway, nginx) = (
            cell("gateway", &[5.0, 20.0, 6.0], 0),
            cell("nginx", &[10.0, 40.0, 10.0], 1),
        );
        let ratio = gateway.ratio(&nginx).unwrap();
        assert_eq!((ratio.median, ratio.low, ratio.high), (0.5, 0.5, 0.6));
        let results = Results {
            cells: vec![gateway, nginx],
            ..Results::default()
        };
        assert!(!results.is_sound());
        let table = results.table();
        let row = table
            .lines()
            .find(|line| line.starts_with("busy        gateway"))
            .unwrap();
        assert!(
            row.contains("6.000") && row.contains("(5.00-20.00)") && row.contains("0.50"),
            "{row}"
        );
    }
}
