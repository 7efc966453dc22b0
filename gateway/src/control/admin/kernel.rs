//! The kernel plane in the admin API and in the metrics.

use std::{net::IpAddr, str::FromStr, time::Duration};

use axum::{Json, body::Bytes, extract::State, http::StatusCode};
use ipnet::IpNet;
use schemars::JsonSchema;
use serde::{Deserialize, Deserializer, de};
use serde_json::{Value, json};

use super::{
    Anything, Failure,
    access::{By, Params},
    parse,
    routes::{App, Operation, Routes},
    state::write_counters,
    token::Who,
};
use crate::{
    config::units::parse_span,
    control::store::Db,
    kernel::{ClientStats, Kernel, PortStats},
    telemetry::prometheus::Exposition,
};

/// How long a client is blocked by hand when the request does not say.
const BLOCK_DEFAULT: Duration = Duration::from_secs(600);

/// Longest block by hand. What shall last longer belongs into a firewall.
const BLOCK_MAX: Duration = Duration::from_secs(30 * 86_400);

/// Blocked clients that are listed at most.
const BLOCKED_LISTED_MAX: usize = 1000;

/// Clients that are listed unless the request says, and at most.
const CLIENTS_LISTED: usize = 100;
const CLIENTS_LISTED_MAX: usize = 1000;

/// Counters: field of [`figures`], metric, help.
const COUNTERS: [(&str, &str, &str); 15] = [
    (
        "dropped",
        "gateway_kernel_dropped_total",
        "Connection attempts of blocked clients dropped in the kernel.",
    ),
    (
        "would_drop",
        "gateway_kernel_would_drop_total",
        "Connection attempts that would have been dropped; only observed.",
    ),
    (
        "over_rate",
        "gateway_kernel_over_rate_total",
        "Connection attempts refused because the client opens too many a second.",
    ),
    (
        "over_open",
        "gateway_kernel_over_open_total",
        "Connection attempts refused because the client has too many open.",
    ),
    (
        "over_half_open",
        "gateway_kernel_over_half_open_total",
        "Connection attempts of new clients refused because too many of them are unfinished.",
    ),
    (
        "xdp_dropped",
        "gateway_kernel_xdp_dropped_total",
        "SYNs of blocked clients dropped by XDP.",
    ),
    (
        "xdp_would_drop",
        "gateway_kernel_xdp_would_drop_total",
        "SYNs that XDP would have dropped; only observed.",
    ),
    (
        "steered",
        "gateway_kernel_steered_total",
        "Connections given to a core by the gateway's own program.",
    ),
    (
        "steered_away",
        "gateway_kernel_steered_away_total",
        "Connections given to another core, their own being loaded.",
    ),
    (
        "fallback",
        "gateway_kernel_fallback_total",
        "Connections that the kernel spread by hash.",
    ),
    (
        "opened",
        "gateway_kernel_connections_opened_total",
        "Connections opened, as the kernel counts them.",
    ),
    (
        "closed",
        "gateway_kernel_connections_closed_total",
        "Connections closed, as the kernel counts them.",
    ),
    (
        "bytes_in",
        "gateway_kernel_received_bytes_total",
        "Payload bytes received from clients.",
    ),
    (
        "bytes_out",
        "gateway_kernel_sent_bytes_total",
        "Payload bytes sent to clients and acknowledged.",
    ),
    (
        "retransmits",
        "gateway_kernel_retransmits_total",
        "TCP segments sent again to clients.",
    ),
];

/// Counters by port, of which there are as many as the configuration has listeners: field, metric, help.
const PORT_COUNTERS: [(&str, &str, &str); 6] = [
    (
        "opened",
        "gateway_kernel_listener_connections_opened_total",
        "Connections opened, by the listener's port.",
    ),
    (
        "closed",
        "gateway_kernel_listener_connections_closed_total",
        "Connections closed, by the listener's port.",
    ),
    (
        "refused",
        "gateway_kernel_listener_refused_total",
        "Connection attempts refused in the kernel, by the listener's port.",
    ),
    (
        "bytes_in",
        "gateway_kernel_listener_received_bytes_total",
        "Payload bytes received, by the listener's port.",
    ),
    (
        "bytes_out",
        "gateway_kernel_listener_sent_bytes_total",
        "Payload bytes sent and acknowledged, by the listener's port.",
    ),
    (
        "retransmits",
        "gateway_kernel_listener_retransmits_total",
        "TCP segments sent again, by the listener's port.",
    ),
];

/// Whom to block or to let in again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target {
    /// A client's address: all of the prefix that counts as one client.
    Client(IpAddr),
    /// Exactly this network.
    Net(IpNet),
}

impl Target {
    /// The network, given what counts as one client.
    pub fn net(self, of_client: impl FnOnce(IpAddr) -> IpNet) -> IpNet {
        match self {
            Target::Client(client) => of_client(client.to_canonical()),
            Target::Net(net) => net.trunc(),
        }
    }
}

impl FromStr for Target {
    type Err = String;

    fn from_str(text: &str) -> Result<Target, String> {
        if let Ok(client) = text.parse() {
            return Ok(Target::Client(client));
        }
        let net = text.parse().map(Target::Net);
        net.map_err(|_| format!("`{text}` is neither an address nor a network such as 203.0.113.0/24"))
    }
}

impl<'de> Deserialize<'de> for Target {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Target, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(de::Error::custom)
    }
}

/// The routes below `/kernel`.
pub(super) fn routes(routes: Routes) -> Routes {
    let operation = |id, summary| Operation::new(id, "kernel", summary);
    const DONE: &str = "What was done.";
    routes
        .get(
            "/kernel",
            status,
            operation("getKernel", "The kernel plane in detail")
                .answer::<Anything>(StatusCode::OK, "The kernel plane."),
        )
        .get(
            "/kernel/clients",
            list,
            operation("listKernelClients", "The clients with the most open connections")
                .query::<List>()
                .answer::<Anything>(StatusCode::OK, "The clients."),
        )
        .post(
            "/kernel/block",
            block,
            operation("blockClient", "Drop new connections of a client or a network")
                .body::<Block>()
                .answer::<Anything>(StatusCode::OK, DONE),
        )
        .post(
            "/kernel/unblock",
            unblock,
            operation("unblockClient", "Let a client or a network connect again")
                .body::<Unblock>()
                .answer::<Anything>(StatusCode::OK, DONE),
        )
}

async fn status(State(plane): State<App>) -> Json<Value> {
    Json(plane.kernel_status())
}

/// How many to list.
#[derive(Deserialize, JsonSchema)]
struct List {
    /// At most this many, up to 1000; absent: 100.
    max: Option<usize>,
}

async fn list(State(plane): State<App>, Params(query): Params<List>) -> Result<Json<Value>, Failure> {
    let max = query.max.unwrap_or(CLIENTS_LISTED).min(CLIENTS_LISTED_MAX);
    let clients = plane.kernel_clients(max).map_err(Failure::conflict)?;
    Ok(Json(json!({ "clients": clients })))
}

/// Whom to block.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Block {
    /// An address or a network.
    #[schemars(with = "String")]
    client: Target,
    /// How long, from 1s to 30d; absent: 10m.
    #[serde(rename = "for")]
    hold: Option<String>,
}

/// Whom to let in again.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Unblock {
    /// An address or a network, as it was blocked.
    #[schemars(with = "String")]
    client: Target,
}

async fn block(State(plane): State<App>, By(who): By, body: Bytes) -> Result<Json<Value>, Failure> {
    let block: Block = parse(&body)?;
    let hold = block.hold.as_deref().map_or(Ok(BLOCK_DEFAULT), hold_of)?;
    let net = plane
        .kernel_block(block.client, hold)
        .map_err(Failure::conflict)?;
    tracing::info!(by = %who.name, %net, seconds = hold.as_secs(), "blocked by hand");
    let detail = json!({ "seconds": hold.as_secs() });
    note(&plane, &who, "block", net, detail).await;
    Ok(Json(json!({ "net": net, "seconds": hold.as_secs() })))
}

async fn unblock(State(plane): State<App>, By(who): By, body: Bytes) -> Result<Json<Value>, Failure> {
    let unblock: Unblock = parse(&body)?;
    let (net, was_blocked) = plane.kernel_unblock(unblock.client).map_err(Failure::conflict)?;
    tracing::info!(by = %who.name, %net, was_blocked, "unblocked by hand");
    let detail = json!({ "was_blocked": was_blocked });
    note(&plane, &who, "unblock", net, detail).await;
    Ok(Json(json!({ "net": net, "was_blocked": was_blocked })))
}

/// Writes into the audit log what was done. The block is in force by then, whether or not it can be noted: in an attack an
/// operator needs it more than its entry, so that only the log says what is missing.
async fn note(plane: &App, who: &Who, action: &'static str, net: IpNet, detail: Value) {
    let (by, net) = (who.name.clone(), net.to_string());
    let entry = move |db: &mut Db| db.audit_deed(&by, action, "client", (&net, &net), &detail);
    if let Err(failure) = plane.directory().store.change(entry).await {
        tracing::error!(action, "a block by hand is not in the audit log: {failure}");
    }
}

/// Reads how long a block shall last.
fn hold_of(text: &str) -> Result<Duration, Failure> {
    let hold = parse_span(text).map_err(Failure::bad_request)?.0;
    match (Duration::from_secs(1)..=BLOCK_MAX).contains(&hold) {
        true => Ok(hold),
        false => Err(Failure::bad_request("`for` must be from 1s to 30d")),
    }
}

/// What the kernel plane counted.
pub fn figures(kernel: &Kernel) -> Value {
    let stats = kernel.stats();
    json!({
        "loaded": true,
        "degraded": kernel.degraded(),
        "pinned": kernel.pinned(),
        "xdp": kernel.xdp().map(|(interface, mode)| format!("{interface} ({mode})")),
        "dropped": stats.dropped,
        "would_drop": stats.would_drop,
        "over_rate": stats.over_rate,
        "over_open": stats.over_open,
        "over_half_open": stats.over_half_open,
        "xdp_dropped": stats.xdp_dropped,
        "xdp_would_drop": stats.xdp_would_drop,
        "steered": stats.steered,
        "steered_away": stats.steered_away,
        "fallback": stats.fallback,
        "opened": stats.opened,
        "closed": stats.closed,
        "open": stats.opened.saturating_sub(stats.closed),
        "bytes_in": stats.bytes_in,
        "bytes_out": stats.bytes_out,
        "retransmits": stats.retransmits,
        "untracked": stats.untracked,
        "life": { "log2_ms": stats.life, "sum_ms": stats.life_ms },
        "listeners": kernel.ports().iter().map(port).collect::<Vec<_>>(),
    })
}

/// The same with who is blocked.
pub fn detail(kernel: &Kernel) -> Value {
    let mut figures = figures(kernel);
    let blocked = kernel.blocked();
    figures["blocked_clients"] = blocked.len().into();
    let blocked: Vec<Value> = blocked
        .iter()
        .take(BLOCKED_LISTED_MAX)
        .map(|blocked| {
            json!({
                "net": blocked.net,
                "remaining_seconds": blocked.remaining.as_secs_f64(),
                "dropped": blocked.dropped,
                "would_drop": blocked.would_drop,
            })
        })
        .collect();
    figures["blocked"] = blocked.into();
    figures
}

/// The clients with the most open connections, at most so many.
pub fn clients(kernel: &Kernel, max: usize) -> Value {
    kernel.clients(max).iter().map(client).collect()
}

fn port(port: &PortStats) -> Value {
    json!({
        "port": port.port,
        "open": port.open(),
        "opened": port.opened,
        "closed": port.closed,
        "refused": port.refused,
        "bytes_in": port.bytes_in,
        "bytes_out": port.bytes_out,
        "retransmits": port.retransmits,
    })
}

fn client(client: &ClientStats) -> Value {
    json!({
        "client": client.client,
        "open": client.open(),
        "opened": client.opened,
        "closed": client.closed,
        "refused": client.refused,
        "bytes_in": client.bytes_in,
        "bytes_out": client.bytes_out,
        "retransmits": client.retransmits,
        "rtt_us": client.srtt.as_micros() as u64,
        "idle_seconds": client.idle.as_secs_f64(),
        "life_log2_ms": client.life,
    })
}

/// Writes the figures as metrics. A field that is not there has none: a kernel plane that is off has no counters, which is
/// not the same as zero. Clients are not among the labels, of which there would be no bound.
pub(super) fn write(figures: &Value, out: &mut Exposition) {
    let loaded = figures["loaded"].as_bool().unwrap_or_default();
    out.gauge(
        "gateway_kernel_loaded",
        "Whether the kernel plane is loaded: 1 or 0.",
    )
    .value(u8::from(loaded));
    write_counters(&COUNTERS, figures, out);
    if let Some(blocked) = figures["blocked_clients"].as_u64() {
        out.gauge(
            "gateway_kernel_blocked_clients",
            "Clients and networks that the kernel drops now.",
        )
        .value(blocked);
    }
    if let Some(open) = figures["open"].as_u64() {
        out.gauge(
            "gateway_kernel_connections_open",
            "Connections open, as the kernel counts them.",
        )
        .value(open);
    }
    if let Some(life) = figures["life"]["log2_ms"].as_array() {
        let counts: Vec<u64> = life.iter().filter_map(Value::as_u64).collect();
        out.histogram_log2(
            "gateway_kernel_connection_life_seconds",
            "How long ended connections lasted.",
            &counts,
            figures["life"]["sum_ms"].as_u64().unwrap_or_default(),
        );
    }
    let Some(listeners) = figures["listeners"].as_array() else {
        return;
    };
    for (field, name, help) in PORT_COUNTERS {
        let mut family = out.counter(name, help);
        for listener in listeners {
            if let Some(count) = listener[field].as_u64() {
                family.sample(&[("port", &listener["port"].to_string())], count);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_is_an_address_or_a_network() {
        let net = |text: &str| text.parse::<Target>().map(|target| target.net(IpNet::from));
        let wanted = |text: &str| Ok(text.parse::<IpNet>().expect("a network"));
        assert_eq!(net("203.0.113.7"), wanted("203.0.113.7/32"));
        assert_eq!(net("::ffff:203.0.113.7"), wanted("203.0.113.7/32"));
        assert_eq!(net("203.0.113.7/24"), wanted("203.0.113.0/24"));
        assert_eq!(net("2001:db8::/32"), wanted("2001:db8::/32"));
        assert!(net("example.org").is_err() && net("10.0.0.0/40").is_err());
    }

    #[test]
    fn ports_are_labels_and_lives_a_histogram() {
        let mut out = Exposition::default();
        let figures = json!({
            "loaded": true,
            "life": { "log2_ms": [1, 0, 2], "sum_ms": 2500 },
            "listeners": [{ "port": 8080, "opened": 3, "refused": 1 }],
        });
        write(&figures, &mut out);
        let text = out.finish();
        for line in [
            "gateway_kernel_listener_connections_opened_total{port=\"8080\"} 3",
            "gateway_kernel_listener_refused_total{port=\"8080\"} 1",
            "gateway_kernel_connection_life_seconds_bucket{le=\"0.001\"} 1",
            "gateway_kernel_connection_life_seconds_bucket{le=\"0.002\"} 1",
            "gateway_kernel_connection_life_seconds_bucket{le=\"+Inf\"} 3",
            "gateway_kernel_connection_life_seconds_sum 2.5",
        ] {
            assert!(text.contains(&format!("\n{line}\n")), "{line} in {text}");
        }
    }
}
