//! Puts the reports of several runs side by side: the median of the rounds for each scenario and target.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::Value;

/// What others are compared with, where it was measured.
const BASELINE: &str = "nginx";

/// Figures of one scenario and target, one value a round.
#[derive(Default)]
struct Figures {
    requests_per_s: Vec<f64>,
    events_per_s: Vec<f64>,
    us_per_request: Vec<f64>,
    us_per_event: Vec<f64>,
    bytes_per_stream: Vec<f64>,
    inter_token_p99_ms: Vec<f64>,
    total_p99_ms: Vec<f64>,
    failures: u64,
}

impl Figures {
    fn add(&mut self, scenario: &str, report: &Value) {
        let plain = report["events"] == 0;
        let cost = &report["processes"][0];
        if scenario == "idle" {
            self.bytes_per_stream
                .extend(cost["bytes_per_open_stream"].as_f64());
        } else if plain {
            self.requests_per_s.extend(report["requests_per_s"].as_f64());
            self.us_per_request.extend(cost["cpu_us_per_request"].as_f64());
            self.total_p99_ms
                .extend(report["total"]["p99_us"].as_f64().map(|us| us / 1e3));
        } else {
            self.events_per_s.extend(report["events_per_s"].as_f64());
            self.us_per_event.extend(cost["cpu_us_per_event"].as_f64());
            self.inter_token_p99_ms
                .extend(report["inter_token"]["p99_us"].as_f64().map(|us| us / 1e3));
        }
        let failures = report["failures"].as_object().into_iter().flatten();
        self.failures += failures.filter_map(|(_, count)| count.as_u64()).sum::<u64>();
        // A refused request is no failure of a run, but here it makes the figures worthless.
        let statuses = report["status"].as_object().into_iter().flatten();
        self.failures += statuses
            .filter(|(status, _)| *status != "200")
            .filter_map(|(_, n)| n.as_u64())
            .sum::<u64>();
    }

    /// The figure that tells the cost: CPU per event, per request, or memory per stream.
    fn cost(&self) -> Option<f64> {
        median(&self.us_per_event)
            .or(median(&self.us_per_request))
            .or(median(&self.bytes_per_stream))
    }

    fn row(&self, baseline: Option<f64>) -> String {
        let cell = |values: &[f64], digits: usize| match median(values) {
            Some(value) => format!("{value:.digits$}"),
            None => "-".to_owned(),
        };
        let ratio = match (self.cost(), baseline) {
            (Some(cost), Some(baseline)) if baseline > 0.0 => format!("{:.2}", cost / baseline),
            _ => "-".to_owned(),
        };
        format!(
            "{:>10}{:>10}{:>10}{:>10}{:>11}{:>10}{:>11}{:>9}{:>9}",
            cell(&self.requests_per_s, 0),
            cell(&self.events_per_s, 0),
            cell(&self.us_per_request, 2),
            cell(&self.us_per_event, 3),
            cell(&self.bytes_per_stream, 0),
            cell(&self.inter_token_p99_ms, 2),
            cell(&self.total_p99_ms, 2),
            ratio,
            self.failures
        )
    }
}

fn median(values: &[f64]) -> Option<f64> {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => None,
        count if count % 2 == 1 => Some(values[middle]),
        _ => Some((values[middle - 1] + values[middle]) / 2.0),
    }
}

/// Reads all `SCENARIO.TARGET.ROUND.json` in `directory` and returns them as a table.
pub fn table(directory: &Path) -> Result<String> {
    let mut scenarios: BTreeMap<String, BTreeMap<String, Figures>> = BTreeMap::new();
    let entries =
        std::fs::read_dir(directory).with_context(|| format!("cannot read {}", directory.display()))?;
    for entry in entries {
        let path = entry?.path();
        let name = path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        let parts: Vec<&str> = name.split('.').collect();
        let [scenario, target, _, "json"] = parts[..] else {
            continue;
        };
        let text = std::fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let report =
            serde_json::from_slice(&text).with_context(|| format!("{} is not a report", path.display()))?;
        let targets = scenarios.entry(scenario.to_owned()).or_default();
        targets
            .entry(target.to_owned())
            .or_default()
            .add(scenario, &report);
    }
    let mut lines = vec![format!(
        "{:<10}{:<9}{:>10}{:>10}{:>10}{:>10}{:>11}{:>10}{:>11}{:>9}{:>9}",
        "scenario",
        "target",
        "req/s",
        "events/s",
        "us/req",
        "us/event",
        "B/stream",
        "itl p99",
        "total p99",
        "ratio",
        "failed"
    )];
    for (scenario, targets) in &scenarios {
        let baseline = targets.get(BASELINE).and_then(Figures::cost);
        for (target, figures) in targets {
            // Directly, the measured process is the upstream itself: no ratio.
            let baseline = baseline.filter(|_| target != "direct");
            lines.push(format!("{scenario:<10}{target:<9}{}", figures.row(baseline)));
        }
    }
    lines.push(format!(
        "CPU and memory are of the target (direct: of the upstream); ratio is to {BASELINE}; times in ms."
    ));
    Ok(lines.join("\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_need_no_order() {
        assert_eq!(median(&[]), None);
        assert_eq!(median(&[3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(&[4.0, 1.0]), Some(2.5));
    }

    #[test]
    fn refused_requests_count_as_failed() {
        let report = serde_json::json!({
            "events": 10, "events_per_s": 5.0, "inter_token": { "p99_us": 21500 }, "failures": { "cut": 2, "timeout": 1 },
            "status": { "200": 7, "429": 4 }, "processes": [{ "cpu_us_per_event": 6.0 }],
        });
        let mut figures = Figures::default();
        figures.add("busy", &report);
        assert_eq!(figures.failures, 7);
        assert_eq!(figures.cost(), Some(6.0));
        assert!(figures.row(Some(4.0)).contains("1.50"));
    }
}
