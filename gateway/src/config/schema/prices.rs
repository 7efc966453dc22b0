//! The operator's own prices.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::config::units::{Date, Dollars};

/// Entries of `prices`: each is compared with each target when the configuration is loaded.
pub const ENTRIES_MAX: usize = 10_000;

/// Prices of models, US dollars per million tokens.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Entry {
    /// Name of an entry of `providers`, or of the built-in list's vendor; `*` stands for any text. Absent: all.
    #[serde(default = "any")]
    pub provider: String,
    /// The upstream's name of the model; `*` stands for any text.
    pub model: String,
    /// Input that is neither read from the provider's cache nor written to it.
    pub input: Dollars,
    /// Output, reasoning included.
    #[serde(default = "nothing")]
    pub output: Dollars,
    /// Input read from the cache. Absent: as `input`.
    #[serde(default)]
    pub cached_input: Option<Dollars>,
    /// Input written to the cache for five minutes. Absent: as `input`.
    #[serde(default)]
    pub cache_write_5m: Option<Dollars>,
    /// Input written to the cache for an hour. Absent: as `cache_write_5m`.
    #[serde(default)]
    pub cache_write_1h: Option<Dollars>,
    /// For requests whose input has more than 200,000 tokens.
    #[serde(default)]
    pub over_200k: Option<Part>,
    /// For requests that the provider served in its tier `priority`.
    #[serde(default)]
    pub priority: Option<Part>,
    /// For requests of the tier `flex`.
    #[serde(default)]
    pub flex: Option<Part>,
    /// For requests of the tier `batch`.
    #[serde(default)]
    pub batch: Option<Part>,
    /// First day on which it holds, UTC. Absent: ever since.
    #[serde(default)]
    pub from: Option<Date>,
    /// First day on which it holds no more, UTC. Absent: for ever.
    #[serde(default)]
    pub until: Option<Date>,
}

/// Prices of a tier or size, US dollars per million tokens. What is absent stands to the entry's own price as `input` does.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Part {
    /// As `input` of the entry. Absent: the same.
    #[serde(default)]
    pub input: Option<Dollars>,
    /// As `output` of the entry. Absent: the same.
    #[serde(default)]
    pub output: Option<Dollars>,
    /// As `cached_input` of the entry.
    #[serde(default)]
    pub cached_input: Option<Dollars>,
    /// As `cache_write_5m` of the entry.
    #[serde(default)]
    pub cache_write_5m: Option<Dollars>,
    /// As `cache_write_1h` of the entry.
    #[serde(default)]
    pub cache_write_1h: Option<Dollars>,
}

fn any() -> String {
    "*".into()
}

fn nothing() -> Dollars {
    Dollars(0)
}
