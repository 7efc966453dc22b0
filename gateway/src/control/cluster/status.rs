//! How the cluster goes, for `gateway status` and metrics.

use std::time::Instant;

use serde_json::{Value, json};

use crate::telemetry::prometheus::Exposition;

/// What the rounds note down.
#[derive(Debug, Clone, Default)]
pub struct Status {
    /// `None` before the first connection.
    since: Option<Instant>,
    connected: bool,
    error: Option<String>,
    losses: u64,
    reports: u64,
    granted: u64,
    unanswered: u64,
    levels: usize,
    local: usize,
    hosts: u64,
}

impl Status {
    pub(super) fn found(&mut self) {
        self.connected = true;
        self.since = Some(Instant::now());
        self.error = None;
    }

    /// True for the first of several failures in a row.
    pub(super) fn lost(&mut self, error: String) -> bool {
        let first = self.error.is_none();
        if first {
            self.losses += 1;
            self.since = Some(Instant::now());
        }
        self.connected = false;
        self.error = Some(error);
        first
    }

    pub(super) fn reported(&mut self, reports: u64, granted: u64, unanswered: u64) {
        self.reports += reports;
        self.granted = self.granted.saturating_add(granted);
        self.unanswered += unanswered;
    }

    pub(super) fn counted(&mut self, levels: usize, local: usize, hosts: u64) {
        (self.levels, self.local, self.hosts) = (levels, local, hosts);
    }

    /// The store answers.
    pub fn is_connected(&self) -> bool {
        self.connected
    }

    /// What does not work, in words.
    pub fn trouble(&self) -> Option<String> {
        if self.connected {
            return None;
        }
        let error = self.error.as_deref().unwrap_or("not connected yet");
        Some(format!("store: {error}; {} levels on local grants", self.local))
    }

    /// For `gateway status`.
    pub fn json(&self) -> Value {
        json!({
            "connected": self.connected,
            "since_seconds": self.since.map(|since| since.elapsed().as_secs()),
            "error": self.error,
            "losses": self.losses,
            "hosts": self.hosts,
            "levels": self.levels,
            "local_levels": self.local,
            "reports": self.reports,
            "granted_units": self.granted,
            "unanswered": self.unanswered,
        })
    }
}

/// The metrics of the status' `store`.
pub fn write_metrics(store: &Value, out: &mut Exposition) {
    let Some(connected) = store["connected"].as_bool() else {
        return;
    };
    out.gauge(
        "gateway_store_connected",
        "Whether the shared store answers: 1 or 0.",
    )
    .value(u8::from(connected));
    let number = |field: &str| store[field].as_u64().unwrap_or_default();
    out.gauge("gateway_store_hosts", "Hosts that share the store.")
        .value(number("hosts"));
    out.gauge("gateway_store_levels", "Shared levels in use on this host.")
        .value(number("levels"));
    out.gauge(
        "gateway_store_local_levels",
        "Shared levels on local grants, because the store is gone.",
    )
    .value(number("local_levels"));
    for (field, name, help) in [
        (
            "losses",
            "gateway_store_losses_total",
            "Times that the store was lost.",
        ),
        (
            "reports",
            "gateway_store_reports_total",
            "Levels reported to the store.",
        ),
        (
            "unanswered",
            "gateway_store_unanswered_total",
            "Reports that a part of the store did not answer.",
        ),
    ] {
        out.counter(name, help).value(number(field));
    }
}
