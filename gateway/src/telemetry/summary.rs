//! The figures of `gateway status`, as JSON.

use serde_json::{Map, Value, json};

use super::{
    Latencies, Latency,
    counters::{Refusal, STATUS_LABELS, Totals},
};

/// What was counted and timed since the start. Reasons and statuses that never came are left out.
pub fn summary(totals: &Totals, latencies: &Latencies) -> Value {
    let refused = Refusal::ALL.map(Refusal::name);
    json!({
        "connections": {
            "open": totals.connections_open(),
            "accepted": totals.connections_opened,
            "refused": totals.connections_refused,
            "tls_handshakes": totals.tls_handshakes,
            "tls_failures": totals.tls_failures,
        },
        "requests": {
            "accepted": totals.requests,
            "refused": totals.refused_total(),
            "client_disconnects": totals.client_disconnects,
        },
        "refused_by_reason": counted(&refused, &totals.refused),
        "answers_by_status": counted(&STATUS_LABELS, &totals.responses),
        "streams": {
            "open": totals.streams_open(),
            "started": totals.streams_opened,
            "errors": totals.stream_errors,
            "events_relayed": totals.events_relayed,
        },
        "upstreams": {
            "connects": totals.upstream_connects,
            "reuses": totals.upstream_reuses,
            "connect_failures": totals.upstream_connect_failures,
            "retries": totals.upstream_retries,
            "errors": totals.upstream_errors,
        },
        "tokens": {
            "prompt": totals.tokens_prompt,
            "cached": totals.tokens_cached,
            "completion": totals.tokens_completion,
            "requests_estimated": totals.usage_estimated,
        },
        "traffic": {
            "received_bytes": totals.bytes_from_clients,
            "sent_bytes": totals.bytes_to_clients,
        },
        "lost": {
            "access_log_dropped": totals.access_log_dropped,
            "ledger_full": totals.ledger_full,
        },
        "latency": [
            latency("time to first token", &latencies.ttft),
            latency("inter-token", &latencies.inter_token),
            latency("total", &latencies.total),
            latency("overhead", &latencies.overhead),
        ],
    })
}

fn counted(labels: &[&str], counts: &[u64]) -> Value {
    let seen = labels.iter().zip(counts).filter(|(_, count)| **count > 0);
    let map: Map<String, Value> = seen
        .map(|(label, count)| ((*label).to_owned(), json!(count)))
        .collect();
    Value::Object(map)
}

fn latency(name: &str, latency: &Latency) -> Value {
    json!({
        "of": name,
        "count": latency.count(),
        "p50_us": latency.quantile_us(0.5),
        "p90_us": latency.quantile_us(0.9),
        "p99_us": latency.quantile_us(0.99),
        "p99.9_us": latency.quantile_us(0.999),
        "max_us": latency.max_us(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telemetry::Counters;

    #[test]
    fn only_what_came_is_listed() {
        let counters = Counters::default();
        counters.response(429);
        counters.refuse(Refusal::RateLimited);
        let (mut totals, mut latencies) = (Totals::default(), Latencies::default());
        totals.add(&counters);
        latencies.ttft.record(1_000, 10);
        let summary = summary(&totals, &latencies);
        assert_eq!(summary["answers_by_status"], json!({"429": 1}));
        assert_eq!(summary["refused_by_reason"], json!({"rate_limited": 1}));
        assert_eq!(summary["latency"][0]["count"], 10);
    }
}
