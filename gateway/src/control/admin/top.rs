//! `GET /top`: what clients and keys do, from the kernel's accounting, the cores' tables and the ledger's sums.

use std::{cmp::Reverse, collections::HashMap, net::IpAddr, sync::Arc};

use axum::{
    Json,
    extract::{Query as QueryOf, State},
};
use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::{Value, json};

use super::{Failure, Plane};
use crate::{kernel::ClientStats, ledger::Counters, telemetry::clients::Figures};

/// Rows of each kind at most, and without a wish.
const ROWS_MAX: usize = 1000;
const ROWS_DEFAULT: usize = 50;

/// By what the rows are ordered, the most first.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, JsonSchema, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum Sort {
    /// Open connections
    #[default]
    Connections,
    /// Bytes in both directions
    Bytes,
    /// Input and output tokens
    Tokens,
    /// Requests accepted
    Requests,
    /// Requests and connections refused
    Refusals,
    /// Round trip time
    Rtt,
}

impl Sort {
    /// Its name in a query.
    pub fn name(self) -> &'static str {
        match self {
            Sort::Connections => "connections",
            Sort::Bytes => "bytes",
            Sort::Tokens => "tokens",
            Sort::Requests => "requests",
            Sort::Refusals => "refusals",
            Sort::Rtt => "rtt",
        }
    }
}

/// What is asked for.
#[derive(Debug, Clone, Copy, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Query {
    /// By what the rows are ordered, the most first.
    pub sort: Sort,
    /// Rows of each kind.
    pub limit: Option<usize>,
}

impl Query {
    fn rows(&self) -> usize {
        self.limit.unwrap_or(ROWS_DEFAULT).min(ROWS_MAX)
    }
}

/// Answers `GET /top`.
pub(super) async fn show(
    State(plane): State<Arc<dyn Plane>>,
    query: Result<QueryOf<Query>, axum::extract::rejection::QueryRejection>,
) -> Result<Json<Value>, Failure> {
    let QueryOf(query) = query.map_err(|error| Failure::bad_request(error.body_text()))?;
    Ok(Json(plane.top(&query)))
}

/// One client's row.
#[derive(Default)]
struct Row {
    figures: Figures,
    kernel: Option<ClientStats>,
    /// Seconds that it is still blocked, and connections that the kernel dropped of it.
    blocked: Option<(f64, u64)>,
}

impl Row {
    fn open(&self) -> u64 {
        match &self.kernel {
            Some(kernel) => kernel.opened.saturating_sub(kernel.closed),
            None => self.figures.opened.saturating_sub(self.figures.closed),
        }
    }

    /// The kernel counts connections that have ended, the ledger requests that have: of a connection that is open the
    /// second is more.
    fn bytes(&self) -> (u64, u64) {
        let (figures, kernel) = (&self.figures, self.kernel.as_ref());
        let of = |get: fn(&ClientStats) -> u64| kernel.map_or(0, get);
        (
            figures.bytes_in.max(of(|kernel| kernel.bytes_in)),
            figures.bytes_out.max(of(|kernel| kernel.bytes_out)),
        )
    }

    fn refusals(&self) -> u64 {
        self.figures.refused + self.blocked.map_or(0, |(_, dropped)| dropped)
    }

    fn rtt_us(&self) -> Option<u64> {
        let kernel = self.kernel.as_ref()?;
        // Zero: no connection has been measured yet.
        Some(kernel.srtt.as_micros() as u64).filter(|rtt| *rtt > 0)
    }

    fn rank(&self, sort: Sort) -> u64 {
        match sort {
            Sort::Connections => self.open(),
            Sort::Bytes => self.bytes().0 + self.bytes().1,
            Sort::Tokens => self.figures.tokens,
            Sort::Requests => self.figures.requests,
            Sort::Refusals => self.refusals(),
            Sort::Rtt => self.rtt_us().unwrap_or(0),
        }
    }

    fn json(&self, client: IpAddr) -> Value {
        let (bytes_in, bytes_out) = self.bytes();
        json!({
            "client": client,
            "connections": self.open(),
            "requests": self.figures.requests,
            "tokens": self.figures.tokens,
            "refusals": self.refusals(),
            "bytes_in": bytes_in,
            "bytes_out": bytes_out,
            "rtt_us": self.rtt_us(),
            "retransmits": self.kernel.as_ref().map(|kernel| kernel.retransmits),
            "blocked_seconds": self.blocked.map(|(seconds, _)| seconds),
        })
    }
}

/// What is known of clients, to be put together.
#[derive(Default)]
pub struct Clients {
    rows: HashMap<IpAddr, Row>,
}

impl Clients {
    /// Adds what the cores counted.
    pub fn figures(&mut self, sums: HashMap<IpAddr, Figures>) {
        for (client, figures) in sums {
            self.rows.entry(client).or_default().figures = figures;
        }
    }

    /// Adds what the kernel counted.
    pub fn kernel(&mut self, clients: Vec<ClientStats>) {
        for stats in clients {
            self.rows.entry(stats.client).or_default().kernel = Some(stats);
        }
    }

    /// Adds who is blocked.
    pub fn blocked(&mut self, client: IpAddr, seconds: f64, dropped: u64) {
        self.rows.entry(client).or_default().blocked = Some((seconds, dropped));
    }

    /// The rows with the most of what is asked for.
    pub fn json(self, query: &Query) -> Vec<Value> {
        let mut rows: Vec<(IpAddr, Row)> = self.rows.into_iter().collect();
        // Among equals the one heard of last, then by address, so that rows stay where they are.
        rows.sort_by_key(|(client, row)| {
            (
                Reverse(row.rank(query.sort)),
                Reverse(row.figures.seen_ms),
                *client,
            )
        });
        rows.iter()
            .take(query.rows())
            .map(|(client, row)| row.json(*client))
            .collect()
    }
}

/// Keys by the ledger's sums.
pub fn keys(totals: Vec<(String, String, Counters)>, query: &Query) -> Vec<Value> {
    let mut keys: HashMap<String, Counters> = HashMap::new();
    for (key, _, counters) in totals {
        keys.entry(key).or_default().add(&counters);
    }
    let mut keys: Vec<(String, Counters)> = keys.into_iter().collect();
    let tokens = |sum: &Counters| sum.prompt_tokens.saturating_add(sum.completion_tokens);
    keys.sort_by_key(|(name, sum)| {
        let rank = match query.sort {
            Sort::Bytes => sum.bytes_in.saturating_add(sum.bytes_out),
            Sort::Requests | Sort::Connections => sum.requests,
            Sort::Tokens | Sort::Refusals | Sort::Rtt => tokens(sum),
        };
        (Reverse(rank), name.clone())
    });
    let row = |(name, sum): &(String, Counters)| {
        json!({
            "key": name,
            "requests": sum.requests,
            "failed": sum.failed,
            "tokens": tokens(sum),
            "bytes_in": sum.bytes_in,
            "bytes_out": sum.bytes_out,
        })
    };
    keys.iter().take(query.rows()).map(row).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn client(n: u8) -> IpAddr {
        IpAddr::from([10, 0, 0, n])
    }

    #[test]
    fn rows_are_put_together_and_ordered() {
        let mut clients = Clients::default();
        let figures = |tokens, refused| Figures {
            tokens,
            refused,
            opened: 3,
            closed: 1,
            ..Figures::default()
        };
        clients.figures([(client(1), figures(5, 0)), (client(2), figures(9, 1))].into());
        clients.blocked(client(3), 7.5, 100);
        let order = |clients: Clients, sort, limit| -> Vec<Value> {
            let rows = clients.json(&Query {
                sort,
                limit: Some(limit),
            });
            rows.into_iter().map(|row| row["client"].clone()).collect()
        };
        assert_eq!(order(clients, Sort::Tokens, 2), ["10.0.0.2", "10.0.0.1"]);
        let mut clients = Clients::default();
        clients.figures([(client(1), figures(5, 2))].into());
        clients.blocked(client(3), 7.5, 100);
        let rows = clients.json(&Query {
            sort: Sort::Refusals,
            limit: None,
        });
        assert_eq!(
            (&rows[0]["refusals"], &rows[0]["blocked_seconds"]),
            (&json!(100), &json!(7.5))
        );
        assert_eq!(
            (&rows[1]["connections"], &rows[1]["rtt_us"]),
            (&json!(2), &Value::Null)
        );
    }
}
