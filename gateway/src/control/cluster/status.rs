//! How the cluster goes, for `gateway status` and metrics.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::telemetry::prometheus::Exposition;

/// For how long a level that the store could not count is shown: some tries to report it.
const SPOILT_FOR: Duration = Duration::from_secs(60);

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
    /// Parts of the store (a cluster) that do not answer.
    ill: usize,
    /// The last level that the store could not count, and why.
    spoilt: Option<(Instant, String)>,
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

    pub(super) fn counted(&mut self, levels: usize, local: usize, hosts: u64, ill: usize) {
        (self.levels, self.local, self.hosts, self.ill) = (levels, local, hosts, ill);
    }

    /// Notes that a level could not be counted; true when it was not known.
    pub(super) fn is_spoilt(&mut self, trouble: &str) -> bool {
        let is_new = self.spoilt().is_none();
        self.spoilt = Some((Instant::now(), trouble.to_owned()));
        is_new
    }

    fn spoilt(&self) -> Option<&str> {
        let (at, trouble) = self.spoilt.as_ref()?;
        (at.elapsed() < SPOILT_FOR).then_some(trouble)
    }

    /// The store answers.
    pub fn is_connected(&self) -> bool {
        self.connected
    }

    /// What does not work, in words.
    pub fn trouble(&self) -> Option<String> {
        if self.connected && self.ill > 0 {
            return Some(format!(
                "store: {} parts do not answer; {} levels on local grants",
                self.ill, self.local
            ));
        }
        if self.connected {
            return self.spoilt().map(|spoilt| format!("store: {spoilt}"));
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
            "silent_parts": self.ill,
            "spoilt_level": self.spoilt(),
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
