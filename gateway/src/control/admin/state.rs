//! The gateway's state as the admin API shows it.

use std::time::Duration;

use ipnet::IpNet;
use serde_json::Value;

use super::{
    BoxFuture, Plane,
    kernel::{self, Target},
};
use crate::{
    control::{access::Directory, cluster, plane::State},
    ledger::Counters,
    net::clock,
    telemetry::{
        self,
        prometheus::{self, Exposition, Sources},
        summary::summary,
    },
};

/// Tables of limits' levels, by their name in [`State::status`].
const LEVEL_TABLES: [&str; 3] = ["own", "guests", "parallel"];

/// Counters of the ledger: field of its status, metric, help.
const LEDGER_COUNTERS: [(&str, &str, &str); 10] = [
    (
        "records",
        "gateway_ledger_records_total",
        "Records appended to the journal.",
    ),
    (
        "folded",
        "gateway_ledger_folded_total",
        "Records that are in the sums.",
    ),
    (
        "refused",
        "gateway_ledger_refused_total",
        "Records for which the journal was full.",
    ),
    (
        "torn",
        "gateway_ledger_torn_total",
        "Places in segments where no whole record stands.",
    ),
    (
        "missing_segments",
        "gateway_ledger_missing_segments_total",
        "Journal segments with records that the start did not find.",
    ),
    (
        "io_errors",
        "gateway_ledger_io_errors_total",
        "Failed operations on the ledger's files.",
    ),
    (
        "rewritten",
        "gateway_ledger_rewritten_segments_total",
        "Journal segments that could not be synced and were written anew.",
    ),
    (
        "exported",
        "gateway_export_records_total",
        "Records delivered to the export's server, repetitions included.",
    ),
    (
        "export_failures",
        "gateway_export_failures_total",
        "Deliveries to the export's server that failed and are tried again.",
    ),
    (
        "export_lost_segments",
        "gateway_export_lost_segments_total",
        "Journal segments removed before they were delivered.",
    ),
];

impl Plane for State {
    fn status(&self) -> BoxFuture<'_, Value> {
        Box::pin(async move {
            let latencies = telemetry::latencies(&self.shared.cores).await;
            let mut status = State::status(self);
            let figures = summary(&telemetry::totals(&self.shared.cores), &latencies);
            if let (Some(status), Value::Object(figures)) = (status.as_object_mut(), figures) {
                status.extend(figures);
            }
            status
        })
    }

    fn top(&self, query: &super::top::Query) -> Value {
        State::top(self, query)
    }

    fn metrics(&self) -> BoxFuture<'_, String> {
        Box::pin(async move {
            let latencies = telemetry::latencies(&self.shared.cores).await;
            let status = State::status(self);
            let mut out = Exposition::default();
            let uptime_s = status["uptime_seconds"].as_u64().unwrap_or_default();
            prometheus::write(
                &Sources {
                    version: env!("CARGO_PKG_VERSION"),
                    start_unix_s: (clock::unix_ms() / 1000).saturating_sub(uptime_s),
                    now_ms: clock::monotonic_ns() / 1_000_000,
                    cores: &self.shared.cores,
                    latencies: &latencies,
                },
                &mut out,
            );
            write_state(&status, &self.kernel_figures(), &mut out);
            write_models(&self.model_totals(), &mut out);
            out.finish()
        })
    }

    fn reload(&self) -> Result<String, String> {
        State::reload(self)
    }

    fn kernel_status(&self) -> Value {
        State::kernel_status(self)
    }

    fn kernel_clients(&self, max: usize) -> Result<Value, String> {
        State::kernel_clients(self, max)
    }

    fn kernel_block(&self, target: Target, hold: Duration) -> Result<IpNet, String> {
        State::kernel_block(self, target, hold)
    }

    fn kernel_unblock(&self, target: Target) -> Result<(IpNet, bool), String> {
        State::kernel_unblock(self, target)
    }

    fn directory(&self) -> &Directory {
        State::directory(self)
    }
}

/// How full the tables of limits are, and what became of budgets' alerts.
fn write_limits(status: &Value, out: &mut Exposition) {
    let limits = &status["limits"];
    let mut used = out.gauge(
        "gateway_limit_levels_used",
        "Levels of limits with a place of their own, by table.",
    );
    for table in LEVEL_TABLES {
        used.sample(
            &[("table", table)],
            limits[table]["used"].as_u64().unwrap_or_default(),
        );
    }
    out.counter(
        "gateway_limit_overflows_total",
        "Admissions counted on a level shared by subjects without a place: limit_state.levels is too small.",
    )
    .value(limits["overflowed"].as_u64().unwrap_or_default());
    let mut alerts = out.counter("gateway_budget_alerts_total", "Alerts of budgets.");
    for state in ["raised", "delivered", "failed"] {
        let count = status["alerts"][state].as_u64().unwrap_or_default();
        alerts.sample(&[("state", state)], count);
    }
}

/// What is known beside the cores' own counters. A field that is not there has no metric: a kernel
/// plane that is off has no counters, which is not the same as zero.
fn write_state(status: &Value, figures: &Value, out: &mut Exposition) {
    let degraded = status["degraded"].as_array().map_or(0, Vec::len);
    out.gauge(
        "gateway_degraded",
        "Parts that do not work as they could; `gateway status` names them.",
    )
    .value(degraded);
    if let Some(generation) = status["config"]["generation"].as_u64() {
        out.gauge(
            "gateway_config_generation",
            "Configurations put in force since the start.",
        )
        .value(generation);
    }
    kernel::write(figures, out);
    cluster::write_metrics(&status["store"], out);
    write_limits(status, out);
    let ledger = &status["ledger"];
    write_counters(&LEDGER_COUNTERS, ledger, out);
    if let Some(bytes) = ledger["export_behind_bytes"].as_u64() {
        out.gauge(
            "gateway_export_behind_bytes",
            "Journal bytes that are not delivered to the export's server yet.",
        )
        .value(bytes);
    }
    if let Some(bytes) = ledger["unsynced_bytes"].as_u64() {
        out.gauge(
            "gateway_ledger_unsynced_bytes",
            "Journal bytes that a power cut would take now.",
        )
        .value(bytes);
    }
}

/// What was recorded, by key and model; their number is bounded by the ledger.
fn write_models(totals: &[(String, String, Counters)], out: &mut Exposition) {
    let mut requests = out.counter(
        "gateway_model_requests_total",
        "Requests recorded, by key and model.",
    );
    for (key, model, counters) in totals {
        requests.sample(&[("key", key), ("model", model)], counters.requests);
    }
    let mut tokens = out.counter(
        "gateway_model_tokens_total",
        "Tokens recorded, by key, model and direction.",
    );
    for (key, model, counters) in totals {
        tokens.sample(
            &[("key", key), ("model", model), ("type", "input")],
            counters.prompt_tokens,
        );
        tokens.sample(
            &[("key", key), ("model", model), ("type", "output")],
            counters.completion_tokens,
        );
    }
    let mut cost = out.counter(
        "gateway_model_cost_usd_total",
        "Cost recorded, US dollars, by key and model, as far as prices are known.",
    );
    for (key, model, counters) in totals {
        let dollars = prometheus::dollars(counters.cost_nano_usd);
        cost.sample(&[("key", key), ("model", model)], dollars);
    }
    let mut unpriced = out.counter(
        "gateway_model_unpriced_total",
        "Requests recorded whose price is not known, by key and model.",
    );
    for (key, model, counters) in totals.iter().filter(|(.., counters)| counters.unpriced > 0) {
        unpriced.sample(&[("key", key), ("model", model)], counters.unpriced);
    }
}

pub(super) fn write_counters(counters: &[(&str, &str, &str)], values: &Value, out: &mut Exposition) {
    for (field, name, help) in counters {
        if let Some(count) = values[*field].as_u64() {
            out.counter(name, help).value(count);
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn text(status: Value, kernel: Value) -> String {
        let mut out = Exposition::default();
        write_state(&status, &kernel, &mut out);
        out.finish()
    }

    #[test]
    fn a_kernel_plane_that_is_off_has_no_counters() {
        let text = text(
            json!({ "degraded": ["no BPF"] }),
            json!({ "loaded": false, "reason": "no BPF" }),
        );
        assert!(text.contains("\ngateway_kernel_loaded 0\n"), "{text}");
        assert!(text.contains("\ngateway_degraded 1\n"), "{text}");
        assert!(!text.contains("gateway_kernel_dropped_total"), "{text}");
    }

    #[test]
    fn all_fields_of_the_ledgers_status_are_there() {
        let ledger = serde_json::to_value(crate::ledger::LedgerStatus::default()).expect("json");
        let text = text(
            json!({ "ledger": ledger }),
            json!({ "loaded": true, "dropped": 3 }),
        );
        for (_, name, _) in LEDGER_COUNTERS {
            assert!(text.contains(&format!("\n{name} 0\n")), "{name}: {text}");
        }
        assert!(text.contains("\ngateway_kernel_dropped_total 3\n"), "{text}");
    }
}
