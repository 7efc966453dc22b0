//! The books, and what becomes of an answer that nobody waits for.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::config::units::{Bytes, Secret, Span};

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
    /// How long the sums by day are kept, at least 1d; 0 keeps them for ever.
    pub retention: Span,
    /// What becomes of new requests while records cannot be written: the disk is full, or fails.
    pub on_error: OnError,
    /// Where records are delivered to, besides.
    pub export: Option<Export>,
}

/// What becomes of new requests while records cannot be written.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum OnError {
    /// They are refused: no request is served that is not in the books.
    #[default]
    Refuse,
    /// They are served, and those without a record are counted.
    Serve,
}

/// Continuous delivery of records.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Export {
    /// To a table of a ClickHouse server.
    pub clickhouse: ClickHouse,
}

/// A table of a ClickHouse server, over HTTP. Each record comes at least once; its id tells it from others.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ClickHouse {
    /// `http[s]://host[:port]`, for example `http://clickhouse:8123`.
    pub url: String,
    /// Name of the table, with its database: letters, digits, `_` and one `.`.
    #[serde(default = "default_table")]
    pub table: String,
    /// Whether the table is made where it is missing.
    #[serde(default = "default_create")]
    pub create: bool,
    /// Name of the user.
    #[serde(default)]
    pub user: Option<String>,
    /// The user's password.
    #[serde(default)]
    pub password: Option<Secret>,
    /// How often new records are sent, 100ms to 1h.
    #[serde(default = "default_every")]
    pub every: Span,
    /// Records of one insert, 1 to 100000.
    #[serde(default = "default_batch")]
    #[schemars(range(min = 1, max = BATCH_MAX))]
    pub batch: u32,
    /// Journal segments that are kept for the server while it does not answer, over and above `ledger.keep`. What
    /// falls behind by more is lost for it, and counted.
    #[serde(default = "default_backlog")]
    pub backlog: Bytes,
}

/// Records of one insert at most: about 60 MB of JSON.
pub const BATCH_MAX: u32 = 100_000;

fn default_table() -> String {
    "gateway_requests".into()
}

fn default_create() -> bool {
    true
}

/// ClickHouse wants few large inserts; a second is what a dashboard can wait.
fn default_every() -> Span {
    Span::secs(1)
}

fn default_batch() -> u32 {
    10_000
}

fn default_backlog() -> Bytes {
    Bytes(1 << 30)
}

/// What becomes of a running answer when its client hangs up.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum OnDisconnect {
    /// The upstream's connection is closed at once, which ends the work there; what was used is estimated.
    #[default]
    Cancel,
    /// The rest of the answer is read, for at most 60 seconds and 16 MiB, so that the books have the provider's own
    /// figures: for providers that bill the whole answer all the same.
    Drain,
}
