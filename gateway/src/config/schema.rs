//! Every field of the configuration file, documented where it is declared.

use std::{collections::BTreeMap, net::SocketAddr, path::PathBuf};

use ipnet::IpNet;
use schemars::JsonSchema;
use serde::Deserialize;

use super::{
    error::Problem,
    units::{Bytes, Secret, Span},
};

/// The configuration file, `gateway.yaml`.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Config {
    pub listeners: Vec<Listener>,
    #[serde(default)]
    pub admin: Admin,
    #[serde(default)]
    pub providers: BTreeMap<String, Provider>,
    #[serde(default)]
    pub models: Vec<Model>,
    #[serde(default)]
    pub teams: Vec<Team>,
    #[serde(default)]
    pub keys: Vec<Key>,
    #[serde(default)]
    pub limits: Vec<Limit>,
    #[serde(default)]
    pub workers: Workers,
    #[serde(default)]
    pub http: Http,
    #[serde(default)]
    pub kernel: Kernel,
    #[serde(default)]
    pub ledger: Ledger,
    #[serde(default)]
    pub log: Log,
    /// How long running streams may go on after SIGTERM.
    #[serde(default = "drain_default")]
    pub drain: Span,
    /// What is doubtful in the file but allowed; filled by the loader.
    #[serde(skip)]
    pub warnings: Vec<Problem>,
    /// Whether a secret stands in the file itself; filled by the loader.
    #[serde(skip)]
    pub(super) literal_secrets: bool,
}

#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Listener {
    pub address: SocketAddr,
    /// One certificate, or several told apart by the server name (SNI); the first is the default.
    #[serde(default)]
    pub tls: Option<Tls>,
}

#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum Tls {
    One(Certificate),
    Several(Vec<Certificate>),
}

#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Certificate {
    pub certificate: PathBuf,
    pub key: PathBuf,
}

#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Admin {
    pub address: SocketAddr,
    /// default: generated into <ledger.path>/admin.token, mode 0600
    pub token: Option<Secret>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ProviderKind {
    Openai,
}

#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Provider {
    pub kind: ProviderKind,
    /// Sent as `Authorization: Bearer`. None: no credential is sent.
    #[serde(default)]
    pub key: Option<Secret>,
    /// Base URLs, `http[s]://host[:port][/prefix]`; default for kind openai: https://api.openai.com
    #[serde(default)]
    pub endpoints: Vec<String>,
    /// PEM file with the certificate authorities to trust instead of the system's.
    #[serde(default)]
    pub ca: Option<PathBuf>,
}

#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Model {
    pub name: String,
    pub targets: Vec<Target>,
    #[serde(default)]
    pub balance: Balance,
    #[serde(default)]
    pub timeouts: Timeouts,
    /// Reserved for one request whose body permits no smaller output. Default 4096.
    #[serde(default)]
    pub max_output_tokens: Option<u32>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Balance {
    #[default]
    LeastRequests,
    RoundRobin,
}

#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Target {
    pub provider: String,
    /// The upstream's own name of the model; default: the virtual model's name.
    #[serde(default)]
    pub model: Option<String>,
    /// Share of requests among targets of the same priority. Default 1; 0 takes no traffic.
    #[serde(default = "weight_default")]
    pub weight: u32,
    /// Lower goes first; higher ones are used when all lower ones fail. Default 0.
    #[serde(default)]
    pub priority: u32,
}

#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Timeouts {
    pub connect: Span,
    pub first_token: Span,
    pub idle: Span,
    pub total: Span,
}

#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Team {
    pub name: String,
}

#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Key {
    pub name: String,
    /// SHA-256 of the key, 64 hex digits; `gateway keys create` prints it.
    pub sha256: String,
    #[serde(default)]
    pub team: Option<String>,
    /// Models the key may use; absent: all.
    #[serde(default)]
    pub models: Option<Vec<String>>,
}

#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Limit {
    #[serde(default, rename = "match")]
    pub matches: Match,
    #[serde(default)]
    pub per: Per,
    #[serde(default)]
    pub requests: Option<u64>,
    #[serde(default)]
    pub tokens: Option<u64>,
    pub every: Span,
}

#[derive(Debug, Clone, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Match {
    pub key: Option<String>,
    pub team: Option<String>,
    pub model: Option<String>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Per {
    #[default]
    Key,
}

#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Workers {
    /// Data-plane threads; default: one per CPU the process may run on.
    pub threads: Option<usize>,
    pub driver: Driver,
    pub pin: bool,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Driver {
    #[default]
    Auto,
    IoUring,
    Epoll,
}

#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Http {
    /// Largest request body. 32MiB.
    pub body_max: Bytes,
    /// Request bodies held at the same time by one core. 1GiB.
    pub bodies_max: Bytes,
    /// Connections of one core. 16384
    pub connections_max: usize,
    /// Time for a whole head from its first byte. 10s
    pub head_timeout: Span,
    /// Longest silence within a request body. 30s
    pub body_timeout: Span,
    /// Time an idle keep-alive connection is kept. 75s
    pub idle_timeout: Span,
    /// Longest time that a client may take nothing of an answer. 60s
    pub write_timeout: Span,
}

#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Kernel {
    pub mode: KernelMode,
    pub steering: bool,
    pub drop: Drop,
    /// cgroup2 directory of the service; default: the process's own
    pub cgroup: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum KernelMode {
    Off,
    #[default]
    Auto,
    Observe,
    Required,
}

#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Drop {
    pub after_refusals: u32,
    pub within: Span,
    #[serde(rename = "for")]
    pub hold: Span,
    #[schemars(with = "Vec<String>")]
    pub exempt: Vec<IpNet>,
}

#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Ledger {
    pub path: PathBuf,
    pub sync: Span,
    /// Folded segments kept for export. 1GiB
    pub keep: Bytes,
}

#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Log {
    pub level: String,
    pub format: LogFormat,
    /// Access log: off, stdout, stderr or a file's path.
    pub access: String,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum LogFormat {
    #[default]
    Text,
    Json,
}

fn drain_default() -> Span {
    Span::secs(30)
}
fn weight_default() -> u32 {
    1
}

impl Default for Admin {
    fn default() -> Self {
        Admin {
            address: SocketAddr::from(([127, 0, 0, 1], 9900)),
            token: None,
        }
    }
}
impl Default for Timeouts {
    fn default() -> Self {
        Timeouts {
            connect: Span::secs(2),
            first_token: Span::secs(60),
            idle: Span::secs(30),
            total: Span::secs(600),
        }
    }
}
impl Default for Workers {
    fn default() -> Self {
        Workers {
            threads: None,
            driver: Driver::Auto,
            pin: true,
        }
    }
}
impl Default for Http {
    fn default() -> Self {
        Http {
            body_max: Bytes(32 << 20),
            bodies_max: Bytes(1 << 30),
            connections_max: 16384,
            head_timeout: Span::secs(10),
            body_timeout: Span::secs(30),
            idle_timeout: Span::secs(75),
            write_timeout: Span::secs(60),
        }
    }
}
impl Default for Kernel {
    fn default() -> Self {
        Kernel {
            mode: KernelMode::Auto,
            steering: true,
            drop: Drop::default(),
            cgroup: None,
        }
    }
}
impl Default for Drop {
    fn default() -> Self {
        Drop {
            after_refusals: 20,
            within: Span::secs(10),
            hold: Span::secs(30),
            exempt: Vec::new(),
        }
    }
}
impl Default for Ledger {
    fn default() -> Self {
        Ledger {
            path: PathBuf::from("/var/lib/gateway"),
            sync: Span(std::time::Duration::from_millis(50)),
            keep: Bytes(1 << 30),
        }
    }
}
impl Default for Log {
    fn default() -> Self {
        Log {
            level: "info".into(),
            format: LogFormat::Text,
            access: "stdout".into(),
        }
    }
}
