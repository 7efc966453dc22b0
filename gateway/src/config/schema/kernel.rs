//! `kernel:`, what runs in the kernel as eBPF programs, with its defaults.

use std::path::PathBuf;

use ipnet::IpNet;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Escalation;
use crate::config::units::{Network, Span};

/// What runs in the kernel, as eBPF programs.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Kernel {
    /// Whether the programs are loaded, and what happens when they cannot be.
    pub mode: KernelMode,
    /// Hand a new connection to the core whose CPU received it, unless that one is overloaded.
    pub steering: bool,
    /// Who is dropped before TLS and HTTP cost anything.
    pub drop: Drop,
    /// What one client, and all new clients together, may open.
    pub connections: Connections,
    /// Drop blocked clients in an interface's driver, for floods; absent: off.
    pub xdp: Option<Xdp>,
    /// cgroup2 directory whose connections are accounted, an absolute path. Absent: the process' own.
    pub cgroup: Option<PathBuf>,
    /// Name under which blocks and counts are kept in the kernel over a restart, 1 to 32 letters, digits, `-` or `_`.
    /// Absent: made of `ledger.path`, so that two gateways do not meet.
    #[schemars(regex(pattern = r"^[A-Za-z0-9_-]{1,32}$"))]
    pub instance: Option<String>,
    /// Where the BPF file system is, an absolute path; it is mounted when it is not and the gateway may. There blocks and
    /// counts outlive a restart.
    pub bpffs: PathBuf,
}

/// Whether the kernel programs are loaded.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum KernelMode {
    /// Never.
    Off,
    /// Where it is possible; otherwise the log and `gateway status` say why not.
    #[default]
    Auto,
    /// Like `auto`, but who would be dropped is only counted.
    Observe,
    /// Yes, or do not start.
    Required,
}

/// When a client address is dropped in the kernel.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Drop {
    /// This many refusals, with nothing accepted since, at least 1 …
    #[schemars(range(min = 1))]
    pub after_refusals: u32,
    /// … within this time, 1s to 1h, …
    pub within: Span,
    /// … drop new connections of the address for this long, 1s to 1d.
    #[serde(rename = "for")]
    pub hold: Span,
    /// How the time grows when the client comes back and is refused again.
    pub escalation: Escalation,
    /// Networks that are never dropped, for example proxies and NATs with many users behind one address.
    #[schemars(with = "Vec<Network>")]
    pub exempt: Vec<IpNet>,
    /// Bits of an IPv4 address that make one client, 8 to 32. Changing it needs a restart.
    #[schemars(range(min = 8, max = 32))]
    pub prefix_v4: u8,
    /// Bits of an IPv6 address that make one client, 32 to 128. Changing it needs a restart.
    #[schemars(range(min = 32, max = 128))]
    pub prefix_v6: u8,
}

/// What may be opened. More is refused by a reset before the connection is accepted. Exempt networks are let through, and
/// in the mode `observe` it is only counted.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Connections {
    /// New connections a second and client, 1 to 1000000. Absent: no bound.
    #[schemars(range(min = 1, max = 1_000_000))]
    pub per_client_rate: Option<u32>,
    /// Connections that a client may open at once before `per_client_rate` binds, 1 to 1000000. Absent: twice the rate.
    #[schemars(range(min = 1, max = 1_000_000))]
    pub burst: Option<u32>,
    /// Open connections of one client, 1 to 1000000. Absent: no bound.
    #[schemars(range(min = 1, max = 1_000_000))]
    pub per_client_open: Option<u32>,
    /// Attempts of clients not seen before that may be unfinished at the same time, 0 to 1000000; 0 sets no bound. Clients
    /// that have had a connection are not bound by it: a flood from many new addresses does not keep them out.
    #[schemars(range(max = 1_000_000))]
    pub half_open: u32,
}

/// The optional stage in an interface's driver.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Xdp {
    /// Name of the interface, for example eth0.
    pub interface: String,
    /// Where the program runs.
    #[serde(default)]
    pub mode: XdpMode,
}

/// Where the XDP program runs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum XdpMode {
    /// In the driver where it can, otherwise as `generic`.
    #[default]
    Auto,
    /// In the driver, before the kernel allocates anything; not every driver can.
    Native,
    /// In the network stack: works with every driver and costs more.
    Generic,
}

/// A client that heeds `Retry-After` never comes to this.
const AFTER_REFUSALS: u32 = 20;
const WITHIN: Span = Span::secs(10);
const HOLD: Span = Span::secs(30);

/// A host has one IPv4 address, and all of an IPv6 /64 (RFC 7421).
pub const PREFIX_V4: u8 = 32;
pub const PREFIX_V6: u8 = 64;

/// As many as the queue of one core's listener holds: above it the kernel would answer with SYN cookies, for known
/// clients as well.
pub const HALF_OPEN: u32 = 4096;

/// Where systemd mounts it.
pub const BPFFS: &str = "/sys/fs/bpf";

impl Default for Kernel {
    fn default() -> Self {
        Kernel {
            mode: KernelMode::Auto,
            steering: true,
            drop: Drop::default(),
            connections: Connections::default(),
            xdp: None,
            cgroup: None,
            instance: None,
            bpffs: PathBuf::from(BPFFS),
        }
    }
}

impl Default for Drop {
    fn default() -> Self {
        Drop {
            after_refusals: AFTER_REFUSALS,
            within: WITHIN,
            hold: HOLD,
            escalation: Escalation::default(),
            exempt: Vec::new(),
            prefix_v4: PREFIX_V4,
            prefix_v6: PREFIX_V6,
        }
    }
}

impl Default for Connections {
    fn default() -> Self {
        Connections {
            per_client_rate: None,
            burst: None,
            per_client_open: None,
            half_open: HALF_OPEN,
        }
    }
}
