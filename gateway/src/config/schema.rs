//! Every field of the configuration file, documented where it is declared.
//!
//! The comments are the descriptions in the JSON Schema that `gateway schema` prints, so they
//! speak to the person who writes the file. Defaults stand in [`super::defaults`].

mod relay;

use std::{collections::BTreeMap, net::SocketAddr, path::PathBuf};

use ipnet::IpNet;
use schemars::JsonSchema;
use serde::{Deserialize, Deserializer, Serialize, de};

use super::{
    defaults::{self, *},
    error::Problem,
    units::{Address, Bytes, Network, Secret, Span},
};
use crate::bounds::NAME_BYTES_MAX;

pub use relay::{Gather, Relay};

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
    /// The virtual keys of clients, as hashes.
    #[serde(default)]
    pub keys: Vec<Key>,
    /// How much may be used per window. A request must fit into every limit that matches it.
    #[serde(default)]
    pub limits: Vec<Limit>,
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

/// An address on which clients are served.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Listener {
    /// IP address and port, for example `0.0.0.0:8080` or `[::]:8443`; each at most once.
    #[schemars(with = "Address")]
    pub address: SocketAddr,
    /// Serve HTTPS with this certificate, or with several told apart by the server name (SNI), of
    /// which the first is the default. Absent: plain HTTP.
    #[serde(default)]
    pub tls: Option<Tls>,
}

/// One certificate or a list of them.
#[derive(Debug, Clone, Serialize, JsonSchema)]
#[serde(untagged)]
pub enum Tls {
    /// One certificate for every server name.
    One(Certificate),
    /// Several certificates; the first answers for unknown server names.
    Several(Vec<Certificate>),
}

impl Tls {
    /// The certificates in their order.
    pub fn certificates(&self) -> &[Certificate] {
        match self {
            Tls::One(certificate) => std::slice::from_ref(certificate),
            Tls::Several(certificates) => certificates,
        }
    }

    pub(super) fn certificates_mut(&mut self) -> &mut [Certificate] {
        match self {
            Tls::One(certificate) => std::slice::from_mut(certificate),
            Tls::Several(certificates) => certificates,
        }
    }
}

// Serde's own untagged enums lose the place and the reason of an error.
impl<'de> Deserialize<'de> for Tls {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Tls, D::Error> {
        struct Visitor;
        impl<'de> de::Visitor<'de> for Visitor {
            type Value = Tls;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a certificate or a list of certificates")
            }

            fn visit_map<A: de::MapAccess<'de>>(self, map: A) -> Result<Tls, A::Error> {
                Certificate::deserialize(de::value::MapAccessDeserializer::new(map)).map(Tls::One)
            }

            fn visit_seq<A: de::SeqAccess<'de>>(self, list: A) -> Result<Tls, A::Error> {
                Vec::deserialize(de::value::SeqAccessDeserializer::new(list)).map(Tls::Several)
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

/// A certificate and its private key, both PEM files. They are read at start and at reload.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Certificate {
    /// File with the certificate, followed by the intermediate ones.
    pub certificate: PathBuf,
    /// File with the private key (PKCS #8, PKCS #1 or SEC 1), not encrypted.
    pub key: PathBuf,
}

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

/// A group of keys.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Team {
    /// Unique name; at most 128 bytes.
    #[schemars(length(min = 1, max = NAME_BYTES_MAX))]
    pub name: String,
}

/// A virtual key. `gateway keys create` makes one and prints its line.
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
}

/// How much may be used in a window of time. It has `requests`, `tokens` or both.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Limit {
    /// Which requests it counts. Absent: all.
    #[serde(default, rename = "match")]
    pub matches: Match,
    /// Who has an own count.
    #[serde(default)]
    pub per: Per,
    /// Requests a window, 1 to 10^15.
    #[serde(default)]
    #[schemars(range(min = 1, max = LIMIT_MAX))]
    pub requests: Option<u64>,
    /// Tokens a window, prompt and output together, 1 to 10^15.
    #[serde(default)]
    #[schemars(range(min = 1, max = LIMIT_MAX))]
    pub tokens: Option<u64>,
    /// Length of the window, 1s to 1mo.
    pub every: Span,
}

/// Which requests a limit counts: those for which all that is given is so.
#[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Match {
    /// Name of an entry of `keys`.
    pub key: Option<String>,
    /// Name of an entry of `teams`.
    pub team: Option<String>,
    /// Name of an entry of `models`.
    pub model: Option<String>,
}

/// Who has an own count in a limit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Per {
    /// Every key.
    #[default]
    Key,
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
    /// cgroup2 directory whose connections are accounted, an absolute path. Absent: the process' own.
    pub cgroup: Option<PathBuf>,
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
    /// Networks that are never dropped, for example proxies and NATs with many users behind one address.
    #[schemars(with = "Vec<Network>")]
    pub exempt: Vec<IpNet>,
}

/// The books.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Ledger {
    /// State directory: journal, rollup, generated admin token.
    pub path: PathBuf,
    /// How often the journal is forced to disk, 1ms to 1m: what a power cut can take.
    pub sync: Span,
    /// Journal segments to keep for export after they are summed up; 0 keeps none.
    pub keep: Bytes,
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
