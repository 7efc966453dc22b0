//! What several hosts share.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{
    bounds::NAME_BYTES_MAX,
    config::units::{Secret, Span},
};

/// A Redis or Valkey (5 or later) in which several gateways share limits, budgets, keys and blocks. It has `redis` or
/// `cluster`. No request waits for it: each host leases parts of the limits ahead (docs/cluster.md).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Store {
    /// One server: `redis://host:port[/database]`, or `rediss://` with TLS.
    #[serde(default)]
    pub redis: Option<String>,
    /// Some nodes of a cluster, as URLs; the others are learnt from them. At most 64.
    #[serde(default)]
    #[schemars(length(max = STORE_NODES_MAX))]
    pub cluster: Vec<String>,
    /// User of the server's access control list.
    #[serde(default)]
    pub username: Option<String>,
    /// Password of the user, or of the server.
    #[serde(default)]
    pub password: Option<Secret>,
    /// PEM file with the certificate authorities to trust instead of the system's.
    #[serde(default)]
    pub ca: Option<PathBuf>,
    /// What the names of all keys begin with; gateways that share have the same. At most 64 letters, digits, `-`, `_`, `.`.
    #[serde(default = "prefix")]
    #[schemars(length(min = 1, max = PREFIX_BYTES_MAX))]
    pub prefix: String,
    /// This host's name in the store and in `gateway status`. Absent: the system's.
    #[serde(default)]
    #[schemars(length(min = 1, max = NAME_BYTES_MAX))]
    pub host: Option<String>,
    /// What to do with shared limits when the store is gone and the leases have run out.
    #[serde(default)]
    pub on_store_loss: OnStoreLoss,
    /// How long the store keeps the lease of a host that is silent, 1s to 1m. A host refuses or goes on locally after
    /// four fifths of it.
    #[serde(default = "lease")]
    pub lease: Span,
    /// How often leases are renewed and use is reported, 10ms to 1s.
    #[serde(default = "round")]
    pub round: Span,
    /// What a host may use of a limit that it meets for the first time, before the store has answered: this part of the
    /// amount in percent, and one request at least. 0 refuses until there is a lease.
    #[serde(default = "first_share")]
    #[schemars(range(max = 100))]
    pub first_share: u8,
}

/// See [`Store::on_store_loss`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum OnStoreLoss {
    /// Each host goes on with its share: the amount, divided by the hosts that were there.
    #[default]
    Local,
    /// Requests that a shared limit counts are refused (503).
    Refuse,
}

/// Nodes that one may name; a cluster tells the others.
pub const STORE_NODES_MAX: usize = 64;

/// A part of every key in the store.
pub const PREFIX_BYTES_MAX: usize = 64;

fn prefix() -> String {
    "gateway".into()
}

/// A dead host's units come back within it; longer than a restart of the store or a failover of its replica.
fn lease() -> Span {
    Span::secs(5)
}

/// Twenty calls a second and host: a loss of accuracy that nobody sees, and no load for a Redis.
fn round() -> Span {
    Span(std::time::Duration::from_millis(50))
}

/// Small enough for three hosts to stay near the amount, and every first request gets through.
fn first_share() -> u8 {
    2
}
