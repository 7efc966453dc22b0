//! The gateway's state as the admin API shows it.

use std::{net::IpAddr, time::Duration};

use serde_json::Value;

use super::{BoxFuture, Plane};
use crate::{
    control::plane::State,
    telemetry::{self, prometheus::Exposition, summary::summary},
};

impl Plane for State {
    fn status(&self) -> BoxFuture<'_, Value> {
        Box::pin(async move {
            let latencies = telemetry::latencies(&self.shared.cores).await;
            let figures = summary(&telemetry::totals(&self.shared.cores), &latencies);
            let mut status = State::status(self);
            add_fields(&mut status, figures);
            status
        })
    }

    fn metrics(&self) -> BoxFuture<'_, String> {
        Box::pin(async move {
            let mut text = State::metrics(self).await;
            text.push_str(&about_status(&State::status(self)));
            text
        })
    }

    fn reload(&self) -> Result<String, String> {
        State::reload(self)
    }

    fn kernel_status(&self) -> Value {
        State::kernel_status(self)
    }

    fn kernel_block(&self, client: IpAddr, hold: Duration) -> Result<(), String> {
        State::kernel_block(self, client, hold)
    }

    fn kernel_unblock(&self, client: IpAddr) -> Result<bool, String> {
        State::kernel_unblock(self, client)
    }
}

/// Adds the fields of one object to another; a field that is there already is kept.
fn add_fields(status: &mut Value, figures: Value) {
    if let (Value::Object(status), Value::Object(figures)) = (status, figures) {
        for (name, value) in figures {
            status.entry(name).or_insert(value);
        }
    }
}

/// Metrics of what only the state knows.
fn about_status(status: &Value) -> String {
    let mut out = Exposition::default();
    let degraded = status["degraded"].as_array().map_or(0, Vec::len);
    out.gauge(
        "gateway_degraded",
        "Parts that do not work as they could; `gateway status` names them.",
    )
    .value(degraded);
    if let Some(generation) = status["config"]["generation"].as_u64() {
        out.gauge(
            "gateway_config_generation",
            "Number of the configuration in force; a reload adds one.",
        )
        .value(generation);
    }
    out.finish()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_is_degraded_can_be_alerted_on() {
        let text = about_status(&json!({ "degraded": ["no BPF"], "config": { "generation": 3 } }));
        assert!(text.contains("\ngateway_degraded 1\n"), "{text}");
        assert!(text.contains("\ngateway_config_generation 3\n"), "{text}");
    }

    #[test]
    fn figures_do_not_overwrite_the_state() {
        let mut status = json!({ "requests": 7, "state": "running" });
        add_fields(&mut status, json!({ "requests": {}, "tokens": {} }));
        assert_eq!(status, json!({ "requests": 7, "state": "running", "tokens": {} }));
    }
}
