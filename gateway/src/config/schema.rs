//! Every field of the configuration file, documented where it is declared.
//!
//! The comments are the descriptions in the JSON Schema that `gateway schema` prints, so they
//! speak to the person who writes the file. Defaults stand in [`super::defaults`].

mod escalation;
mod kernel;
mod ledger;
mod listener;
pub mod prices;
mod relay;

pub use ledger::*;

use std::{collections::BTreeMap, path::PathBuf};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{
    defaults::{self, *},
    error::Problem,
    units::{Bytes, Secret, Span},
};
use crate::bounds::NAME_BYTES_MAX;

pub use escalation::{ESCALATION_FACTOR_MAX, Escalation};
pub use kernel::{Connections, Drop, Kernel, KernelMode, Xdp, XdpMode};
mod admin;
mod limits;
mod store;
mod tokens;

pub use admin::{ADMIN_TOKENS_MAX, Admin, AdminToken, Role};
pub use limits::*;
pub use listener::{Certificate, ClientHeader, Listener, ProxyProtocol, Tls};
pub use relay::{Gather, Relay};
pub use store::*;
pub use tokens::Tokenizer;

/// The configuration file, `gateway.yaml`. Relative paths in it begin at its own directory.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Where clients connect; at least one, at most 64.
    #[schemars(length(min = 1, max = LISTENERS_MAX))]
    pub listeners: Vec<Listener>,
    /// The operator's door: metrics, status, usage, reload.
    #[serde(default)]
    pub admin: Admin,
    /// The upstream services by name.
    #[serde(default)]
    pub providers: BTreeMap<String, Provider>,
    /// The models that clients see, each with the targets that answer for it.
    #[serde(default)]
    pub models: Vec<Model>,
    /// Groups of keys that limits can name.
    #[serde(default)]
    pub teams: Vec<Team>,
    /// Groups of teams.
    #[serde(default)]
    pub organizations: Vec<Organization>,
    /// The virtual keys of clients, as hashes.
    #[serde(default)]
    pub keys: Vec<Key>,
    /// How much may be used per window. A request must fit into every limit that matches it.
    #[serde(default)]
    pub limits: Vec<Limit>,
    /// What the whole gateway may spend.
    #[serde(default)]
    pub budget: Option<Budget>,
    /// Who is told when a budget's alert is due.
    #[serde(default)]
    pub alerts: Alerts,
    /// Where levels of limits are kept.
    #[serde(default)]
    pub limit_state: LimitState,
    /// The data-plane threads.
    #[serde(default)]
    pub workers: Workers,
    /// How streams are passed on.
    #[serde(default)]
    pub relay: Relay,
    /// Bounds of client connections and request bodies.
    #[serde(default)]
    pub http: Http,
    /// What runs in the kernel: steering of connections and early drop.
    #[serde(default)]
    pub kernel: Kernel,
    /// The books: one record for every accepted request.
    #[serde(default)]
    pub ledger: Ledger,
    /// What several hosts share. Absent: each counts for itself.
    #[serde(default)]
    pub store: Option<Store>,
    /// The operator's own prices; the first entry that fits a request counts, and goes before the built-in list.
    #[serde(default)]
    #[schemars(length(max = prices::ENTRIES_MAX))]
    pub prices: Vec<prices::Entry>,
    /// Whether models that no entry of `prices` fits have the list prices that are built in (`gateway prices`).
    #[serde(default = "defaults::yes")]
    pub builtin_prices: bool,
    /// The program's own log and the access log.
    #[serde(default)]
    pub log: Log,
    /// How long running streams may go on after SIGTERM, at most 1d; 0 ends them at once.
    #[serde(default = "defaults::drain")]
    pub drain: Span,
    /// What is doubtful in the file but allowed; filled by the loader.
    #[serde(skip)]
    pub warnings: Vec<Problem>,
    /// Whether a secret stands in the file itself; filled by the loader.
    #[serde(skip)]
    pub(super) literal_secrets: bool,
}

/// Which API a provider speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ProviderKind {
    /// OpenAI's API: OpenAI itself, vLLM, SGLang, TGI, Ollama, llama.cpp and others.
    Openai,
}

/// An upstream service: one API, one credential, one or several endpoints.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Provider {
    /// Which API it speaks.
    pub kind: ProviderKind,
    /// Sent as `Authorization: Bearer`. Absent: no credential is sent.
    #[serde(default)]
    pub key: Option<Secret>,
    /// Base URLs, `http[s]://host[:port][/prefix]`, without the `/v1` of the API; at most 1024.
    /// Absent: `https://api.openai.com`.
    #[serde(default)]
    #[schemars(length(max = ENDPOINTS_MAX))]
    pub endpoints: Vec<String>,
    /// PEM file with the certificate authorities to trust instead of the system's.
    #[serde(default)]
    pub ca: Option<PathBuf>,
    /// Whose list prices its models have: `openai`, `anthropic`, `azure`, … (`gateway prices --vendors`). Absent: told by the
    /// host of its first endpoint, else by its name.
    #[serde(default)]
    pub prices: Option<String>,
    /// What becomes of a running answer when its client hangs up.
    #[serde(default)]
    pub on_disconnect: OnDisconnect,
}

/// A model as clients name it.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Model {
    /// The name that clients send in `model`; at most 128 bytes.
    #[schemars(length(min = 1, max = NAME_BYTES_MAX))]
    pub name: String,
    /// Who answers; at least one, at most 64.
    #[schemars(length(min = 1, max = TARGETS_MAX))]
    pub targets: Vec<Target>,
    /// How an endpoint is chosen among those of the same priority.
    #[serde(default)]
    pub balance: Balance,
    /// How long the parts of a request may take.
    #[serde(default)]
    pub timeouts: Timeouts,
    /// Output tokens to reserve for a request that names no bound itself, 1 to 10000000.
    /// Absent: 4096.
    #[serde(default)]
    #[schemars(range(min = 1, max = OUTPUT_TOKENS_MAX))]
    pub max_output_tokens: Option<u32>,
}

/// How an endpoint is chosen.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Balance {
    /// The better of two picked at random: the one with fewer open requests for its weight.
    #[default]
    LeastRequests,
    /// One after the other, by weight.
    RoundRobin,
}

/// A provider that answers for a model.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Target {
    /// Name of an entry of `providers`.
    pub provider: String,
    /// The upstream's own name of the model. Absent: the name that clients use.
    #[serde(default)]
    pub model: Option<String>,
    /// Share of the requests among targets of the same priority, 0 to 1000000; 0 takes none.
    #[serde(default = "defaults::weight")]
    #[schemars(range(max = WEIGHT_MAX))]
    pub weight: u32,
    /// Lower goes first; a higher one is used when all lower ones fail.
    #[serde(default)]
    pub priority: u32,
    /// What tokens are counted with where the provider does not tell them. Absent: by the model's name, for OpenAI's.
    #[serde(default)]
    pub tokenizer: Option<Tokenizer>,
}

/// How long the parts of a request may take; each more than 0 and at most 1d.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Timeouts {
    /// To connect to the upstream, TLS included. Then the next endpoint is tried.
    pub connect: Span,
    /// From the request sent to the first byte of the answer's body. Long prompts take long here.
    pub first_token: Span,
    /// Longest silence within the answer.
    pub idle: Span,
    /// For the whole request; the other times fit into it.
    pub total: Span,
}

/// A virtual key. `gateway keys create --offline` makes one and prints its line.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Key {
    /// Unique name, seen in logs and in the ledger; at most 128 bytes.
    #[schemars(length(min = 1, max = NAME_BYTES_MAX))]
    pub name: String,
    /// SHA-256 of the key, 64 hex digits.
    #[schemars(regex(pattern = r"^[0-9a-fA-F]{64}$"))]
    pub sha256: String,
    /// Name of an entry of `teams`.
    #[serde(default)]
    pub team: Option<String>,
    /// Names of the models that the key may use. Absent: all.
    #[serde(default)]
    pub models: Option<Vec<String>>,
    /// What the key may spend.
    #[serde(default)]
    pub budget: Option<Budget>,
}

/// The data-plane threads.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Workers {
    /// How many, 1 to 256. Absent: one for each CPU that the process may run on.
    #[schemars(range(min = 1, max = THREADS_MAX))]
    pub threads: Option<usize>,
    /// How they wait for the network.
    pub driver: Driver,
    /// Bind each thread to its CPU.
    pub pin: bool,
}

/// How data-plane threads wait for the network.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Driver {
    /// io_uring where the kernel allows it, otherwise epoll.
    #[default]
    Auto,
    /// io_uring, or do not start.
    IoUring,
    /// epoll.
    Epoll,
}

/// Bounds of client connections and request bodies.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Http {
    /// Largest request body, 1KiB to 1GiB. A prompt of a million tokens has about 4MiB, images more.
    pub body_max: Bytes,
    /// Request bodies that one core holds at the same time, at least `body_max`.
    pub bodies_max: Bytes,
    /// Client connections of one core, 1 to 1000000.
    #[schemars(range(min = 1, max = CONNECTIONS_LIMIT))]
    pub connections_max: usize,
    /// Time for a whole request head, from its first byte on; more than 0, at most 1d.
    pub head_timeout: Span,
    /// Longest silence within a request body; more than 0, at most 1d.
    pub body_timeout: Span,
    /// How long an idle keep-alive connection is kept; more than 0, at most 1d.
    pub idle_timeout: Span,
    /// How long a client may take nothing of its answer; more than 0, at most 1d.
    pub write_timeout: Span,
}

/// The program's own log and the access log.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Log {
    /// off, error, warn, info, debug or trace, also by module: `info,gateway::kernel=debug`.
    pub level: String,
    /// How the program's own log is written.
    pub format: LogFormat,
    /// Where the access log goes, one JSON object a line: off, stdout, stderr or the path of a file.
    pub access: String,
}

/// How the program's own log is written.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}
