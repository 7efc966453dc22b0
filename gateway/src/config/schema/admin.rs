//! The operator's door.

use std::net::SocketAddr;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{
    bounds::NAME_BYTES_MAX,
    config::units::{Address, Secret},
};

/// The operator's door.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Admin {
    /// IP address and port. It speaks plain HTTP: keep it on the loopback or a trusted network.
    #[schemars(with = "Address")]
    pub address: SocketAddr,
    /// What administrators must present as `Authorization: Bearer`. Absent: one is generated into
    /// `admin.token` under `ledger.path`, mode 0600.
    pub token: Option<Secret>,
    /// Further tokens, each with a name that the audit log shows; at most 256.
    #[schemars(length(max = ADMIN_TOKENS_MAX))]
    pub tokens: Vec<AdminToken>,
}

/// Further admin tokens. Each request's token is compared with all of them.
pub const ADMIN_TOKENS_MAX: usize = 256;

/// An admin token of a person or a program.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct AdminToken {
    /// Unique name, seen in the audit log; `admin` is the name of `admin.token`.
    #[schemars(length(min = 1, max = NAME_BYTES_MAX))]
    pub name: String,
    /// The token; at least 16 characters.
    pub token: Secret,
    /// What it allows.
    #[serde(default)]
    pub role: Role,
}

/// What an admin token allows.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// To look at everything, and to change nothing.
    #[default]
    Viewer,
    /// Everything.
    Admin,
}
