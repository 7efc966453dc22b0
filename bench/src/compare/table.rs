//! The results as text, and what in them a reader would otherwise have to reckon.

use super::results::{BASELINE, Cell, DIRECT, Figures, Results, Spread, median};
use crate::load::Report;

/// Share by which what clients received may differ from what they receive directly: heads do.
const BYTES_TOLERANCE: f64 = 0.1;
/// Connections beyond those that the load generator opens directly, by which a target is said not to keep them.
const CONNECTIONS_OVER: u64 = 200;

impl Results {
    /// The results as a table with what is needed to read it.
    pub fn table(&self) -> String {
        let mut lines = self.head();
        lines.push(format!(
            "{:<12}{:<9}{:>11}{:>12}{:>16}{:>8}{:>16}{:>9}{:>9}{:>9}{:>8}{:>8}{:>9}{:>9}{:>7}",
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
            "+p50 ms",
            "+p99 ms",
            "calls",
            "switches",
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
        lines.extend(self.remarks());
        lines.push(format!(
            "cost: CPU of the target (direct: of the upstream) in us per event, or per request where the scenario is of \
             requests; in `memory` resident bytes per open stream. ratio: cost over {BASELINE}'s in the same round. p50, p99: \
             sent by the upstream to read by the client where tokens are stamped, else whole requests; +p50, +p99: less \
             direct's. calls, switches: system calls and context switches per event or request. Medians of {} rounds.",
            self.rounds
        ));
        lines.join("\n")
    }

    fn head(&self) -> Vec<String> {
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
        lines
    }

    fn row(&self, cell: &Cell) -> String {
        let figures = cell.figures();
        let costs: Vec<f64> = figures.iter().filter_map(|figures| figures.cost).collect();
        let cost = Spread::of(&costs);
        let digits = if cost.is_some_and(|cost| cost.median >= 1000.0) {
            0
        } else {
            3
        };
        // Directly, the measured process is the upstream itself: no ratio.
        let ratio = self
            .cell(&cell.scenario, BASELINE)
            .filter(|_| cell.target != DIRECT)
            .and_then(|base| cell.ratio(base));
        let direct = self.cell(&cell.scenario, DIRECT).map(Cell::figures);
        let direct = direct.filter(|_| cell.target != DIRECT).unwrap_or_default();
        let added = |of: fn(&Figures) -> Option<f64>| Some(middle(&figures, of)? - middle(&direct, of)?);
        format!(
            "{:<12}{:<9}{:>11}{:>12}{:>16}{:>8}{:>16}{:>9}{:>9}{:>9}{:>8}{:>8}{:>9}{:>9}{:>7}",
            cell.scenario,
            cell.target,
            number(middle(&figures, |figures| Some(figures.rate)), 0),
            number(cost.map(|cost| cost.median), digits),
            range(cost, digits.min(2)),
            number(ratio.map(|ratio| ratio.median), 2),
            range(ratio, 2),
            number(middle(&figures, |figures| Some(figures.cores * 100.0)), 0),
            number(middle(&figures, p50_ms), 2),
            number(middle(&figures, p99_ms), 2),
            number(added(p50_ms), 2),
            number(added(p99_ms), 2),
            number(middle(&figures, |figures| figures.system_calls), 2),
            number(middle(&figures, |figures| figures.switches), 3),
            figures.iter().map(|figures| figures.failures).sum::<u64>(),
        )
    }

    /// What idle streams added, and what was not the same work, a line each.
    pub fn remarks(&self) -> Vec<String> {
        let run = self.cells.iter().filter(|cell| !cell.reports.is_empty());
        run.flat_map(|cell| {
            [
                self.beside(cell),
                self.unlike(cell),
                self.reopened(cell),
                not_started(cell),
                refused(cell),
            ]
        })
        .flatten()
        .collect()
    }

    /// Its delay against that of the scenario that it is to be compared with, for the same target, round by round.
    fn beside(&self, cell: &Cell) -> Option<String> {
        let beside = cell.beside.as_ref()?;
        let other = self.cell(beside, &cell.target)?.figures();
        let figures = cell.figures();
        let over = |of: fn(&Figures) -> Option<f64>| {
            let rounds = figures.iter().zip(&other);
            let over: Vec<f64> = rounds
                .filter_map(|(own, other)| Some(of(own)? - of(other)?))
                .collect();
            Spread::of(&over)
        };
        let (p50, p99) = (over(p50_ms)?, over(p99_ms)?);
        Some(format!(
            "{} over {beside}, {}: delay p50 {:+.2} ms, p99 {:+.2} ms ({:+.2} to {:+.2})",
            cell.scenario, cell.target, p50.median, p99.median, p99.low, p99.high
        ))
    }

    /// Whether its clients got about as many bytes as directly: else the work was not the same.
    fn unlike(&self, cell: &Cell) -> Option<String> {
        let of = |figures: &Figures| figures.bytes;
        let own = middle(&cell.figures(), of)?;
        let direct = middle(&self.cell(&cell.scenario, DIRECT)?.figures(), of)?;
        ((own / direct - 1.0).abs() > BYTES_TOLERANCE).then(|| {
            format!(
                "not the same bytes: {}, {}: {own:.0} for each, {direct:.0} directly",
                cell.scenario, cell.target
            )
        })
    }

    /// Whether it closed connections that it was to keep: then it paid for opening them.
    fn reopened(&self, cell: &Cell) -> Option<String> {
        let opened = |cell: &Cell| {
            let reports = cell.reports.iter();
            reports.map(|report| report.connections_opened).max()
        };
        let own = opened(cell)?;
        let direct_cell = self.cell(&cell.scenario, DIRECT)?;
        let direct = opened(direct_cell)?;
        // Where each request has its own, a faster target has more of them.
        let each = direct_cell
            .reports
            .iter()
            .any(|report| report.connections_opened >= report.requests);
        (!each && own > direct + CONNECTIONS_OVER).then(|| {
            format!(
                "connections not kept: {}, {}: {own} were opened, {direct} directly",
                cell.scenario, cell.target
            )
        })
    }
}

/// Requests that its rate would have had, and that found no free connection.
fn not_started(cell: &Cell) -> Option<String> {
    let sum = |of: fn(&Report) -> u64| cell.reports.iter().map(of).sum::<u64>();
    let (not_started, due) = (sum(|report| report.not_started), sum(|report| report.due));
    (not_started > 0).then(|| {
        format!(
            "not the whole load: {}, {}: {not_started} of {due} requests were never started",
            cell.scenario, cell.target
        )
    })
}

/// What an answer said that was not wanted.
fn refused(cell: &Cell) -> Option<String> {
    let mut reports = cell.reports.iter();
    let refusal = reports.find_map(|report| report.first_refusal.as_ref())?;
    Some(format!(
        "not wanted: {}, {}: {refusal}",
        cell.scenario, cell.target
    ))
}

fn p50_ms(figures: &Figures) -> Option<f64> {
    Some(figures.p50_us as f64 / 1e3)
}

fn p99_ms(figures: &Figures) -> Option<f64> {
    Some(figures.p99_us as f64 / 1e3)
}

fn middle(figures: &[Figures], of: impl Fn(&Figures) -> Option<f64>) -> Option<f64> {
    median(&figures.iter().filter_map(of).collect::<Vec<f64>>())
}

fn number(value: Option<f64>, digits: usize) -> String {
    value.map_or("-".to_owned(), |value| format!("{value:.digits$}"))
}

fn range(spread: Option<Spread>, digits: usize) -> String {
    spread.map_or("-".to_owned(), |spread| {
        format!("({:.digits$}-{:.digits$})", spread.low, spread.high)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::load::Latency;
    use crate::scenario::Figure;

    fn cell(scenario: &str, target: &str, p99_us: &[u64], bytes: u64) -> Cell {
        let report = |p99_us: &u64| Report {
            events: 10,
            bytes,
            requests: 10,
            connections_opened: if target == "leaky" { 900 } else { 8 },
            delay: Latency {
                count: 10,
                p50_us: 100,
                p99_us: *p99_us,
                ..Latency::default()
            },
            ..Report::default()
        };
        Cell {
            scenario: scenario.to_owned(),
            about: String::new(),
            figure: Figure::Event,
            beside: (scenario == "idle").then(|| "active".to_owned()),
            target: target.to_owned(),
            skipped: None,
            reports: p99_us.iter().map(report).collect(),
        }
    }

    fn table(cells: Vec<Cell>) -> String {
        let results = Results {
            cells,
            ..Results::default()
        };
        results.table()
    }

    #[test]
    fn delay_beside_idle_streams_is_told_round_by_round() {
        let told = table(vec![
            cell("active", "gateway", &[1_000, 3_000], 2000),
            cell("idle", "gateway", &[2_000, 3_500], 2000),
        ]);
        assert!(
            told.contains("idle over active, gateway: delay p50 +0.00 ms, p99 +0.75 ms (+0.50 to +1.00)"),
            "{told}"
        );
    }

    #[test]
    fn what_is_added_is_less_directs() {
        let told = table(vec![
            cell("busy", DIRECT, &[400, 300], 2000),
            cell("busy", "gateway", &[1_350, 1_350], 2100),
        ]);
        let row = told.lines().find(|line| line.starts_with("busy        gateway"));
        assert!(
            row.is_some_and(|row| row.contains("1.35    0.00    1.00")),
            "{told}"
        );
        assert!(!told.contains("not the same bytes"), "{told}");
    }

    #[test]
    fn unequal_work_is_named() {
        let mut leaky = cell("busy", "leaky", &[1], 3000);
        leaky.reports[0].requests = 1_000;
        (leaky.reports[0].due, leaky.reports[0].not_started) = (50, 7);
        leaky.reports[0].first_refusal = Some("503 no".to_owned());
        let told = table(vec![cell("busy", DIRECT, &[1], 2000), leaky]);
        assert!(
            told.contains("not the same bytes: busy, leaky: 300 for each, 200 directly"),
            "{told}"
        );
        assert!(
            told.contains("connections not kept: busy, leaky: 900 were opened, 8 directly"),
            "{told}"
        );
        assert!(
            told.contains("busy, leaky: 7 of 50 requests were never"),
            "{told}"
        );
        assert!(told.contains("not wanted: busy, leaky: 503 no"), "{told}");
    }
}
