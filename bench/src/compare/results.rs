//! What a comparison found out: medians of the rounds, and ratios of runs that stood side by side.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::Machine;
use crate::load::Report;
use crate::scenario::{Figure, Scenario};

/// What others are compared with, where it was measured.
pub const BASELINE: &str = "nginx";

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
            target: target.to_owned(),
            skipped: None,
            reports: Vec::new(),
        }
    }

    fn figures(&self) -> Vec<Figures> {
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
    /// The cell that others of `scenario` are compared with.
    fn baseline(&self, scenario: &str) -> Option<&Cell> {
        self.cells
            .iter()
            .find(|cell| cell.scenario == scenario && cell.target == BASELINE)
    }

    fn direct(&self, scenario: &str) -> Option<&Cell> {
        self.cells
            .iter()
            .find(|cell| cell.scenario == scenario && cell.target == "direct")
    }

    /// Whether no run lost or broke anything.
    pub fn is_sound(&self) -> bool {
        self.cells
            .iter()
            .flat_map(|cell| &cell.reports)
            .all(Report::is_sound)
    }

    /// The results as a table with what is needed to read it.
    pub fn table(&self) -> String {
        let machine = &self.machine;
        let mut lines = vec![
            format!(
                "{}; Linux {}; {} ({} cores)",
                machine.date, machine.kernel, machine.processor, machine.cores
            ),
            format!(
                "commit {}; {}",
                machine.commit.as_deref().unwrap_or("unknown"),
                self.command
            ),
            String::new(),
        ];
        for target in &self.targets {
            let state = target
                .missing
                .clone()
                .unwrap_or_else(|| target.version.clone().unwrap_or_default());
            lines.push(format!("{:<9}{state}", target.name));
            lines.push(format!("         on: {}", target.on.join(", ")));
            lines.push(format!("         off: {}", target.off.join(", ")));
        }
        lines.push(String::new());
        lines.push(format!(
            "{:<12}{:<9}{:>11}{:>12}{:>16}{:>8}{:>16}{:>9}{:>9}{:>9}{:>8}{:>9}{:>7}",
            "scenario",
            "target",
            "rate/s",
            "cost",
            "(low-high)",
            "ratio",
            "(low-high)",
            "core %",
            "p50 ms",
            "p99 ms",
            "+p99 ms",
            "calls",
            "failed"
        ));
        let mut skipped = Vec::new();
        for cell in &self.cells {
            match (&cell.skipped, cell.reports.is_empty()) {
                (Some(reason), _) => {
                    skipped.push(format!("skipped: {}, {}: {reason}", cell.scenario, cell.target))
                }
                (None, true) => {}
                (None, false) => lines.push(self.row(cell)),
            }
        }
        lines.push(String::new());
        lines.extend(skipped);
        lines.push(format!(
            "cost: CPU of the target (direct: of the upstream) in us per event, or per request where the scenario is of \
             requests; in `memory` resident bytes per open stream. ratio: cost over {BASELINE}'s in the same round. p50, p99: \
             sent by the upstream to read by the client where tokens are stamped, else whole requests; +p99: less direct's. \
             calls: system calls per event or request. Medians of {} rounds.",
            self.rounds
        ));
        lines.join("\n")
    }

    fn row(&self, cell: &Cell) -> String {
        let figures = cell.figures();
        let middle =
            |of: fn(&Figures) -> Option<f64>| median(&figures.iter().filter_map(of).collect::<Vec<f64>>());
        let number = |value: Option<f64>, digits: usize| {
            value.map_or("-".to_owned(), |value| format!("{value:.digits$}"))
        };
        let costs: Vec<f64> = figures.iter().filter_map(|figures| figures.cost).collect();
        let cost = Spread::of(&costs);
        let digits = if cost.is_some_and(|cost| cost.median >= 1000.0) {
            0
        } else {
            3
        };
        let range = |spread: Option<Spread>, digits: usize| {
            spread.map_or("-".to_owned(), |spread| {
                format!("({:.digits$}-{:.digits$})", spread.low, spread.high)
            })
        };
        // Directly, the measured process is the upstream itself: no ratio.
        let ratio = self
            .baseline(&cell.scenario)
            .filter(|_| cell.target != "direct")
            .and_then(|base| cell.ratio(base));
        let p99 = middle(|figures| Some(figures.p99_us as f64 / 1e3));
        let direct = self.direct(&cell.scenario).map(Cell::figures).unwrap_or_default();
        let direct: Vec<f64> = direct.iter().map(|figures| figures.p99_us as f64 / 1e3).collect();
        let added = match (p99, median(&direct)) {
            (Some(p99), Some(direct)) if cell.target != "direct" => Some(p99 - direct),
            _ => None,
        };
        format!(
            "{:<12}{:<9}{:>11}{:>12}{:>16}{:>8}{:>16}{:>9}{:>9}{:>9}{:>8}{:>9}{:>7}",
            cell.scenario,
            cell.target,
            number(middle(|figures| Some(figures.rate)), 0),
            number(cost.map(|cost| cost.median), digits),
            range(cost, digits.min(2)),
            number(ratio.map(|ratio| ratio.median), 2),
            range(ratio, 2),
            number(middle(|figures| Some(figures.cores * 100.0)), 0),
            number(middle(|figures| Some(figures.p50_us as f64 / 1e3)), 2),
            number(p99, 2),
            number(added, 2),
            number(middle(|figures| figures.system_calls), 2),
            figures.iter().map(|figures| figures.failures).sum::<u64>(),
        )
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
