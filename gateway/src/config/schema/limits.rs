//! Limits, budgets, teams and organizations.

use ipnet::IpNet;
use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde::{Deserialize, Deserializer, Serialize, de};

use crate::{
    bounds::NAME_BYTES_MAX,
    config::{
        defaults::LIMIT_MAX,
        units::{Dollars, Network, Span},
    },
};

/// A group of keys.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Team {
    /// Unique name; at most 128 bytes.
    #[schemars(length(min = 1, max = NAME_BYTES_MAX))]
    pub name: String,
    /// Name of an entry of `organizations`.
    #[serde(default)]
    pub organization: Option<String>,
    /// What the team's keys may use together.
    #[serde(default)]
    pub budget: Option<Budget>,
}

/// A group of teams.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Organization {
    /// Unique name; at most 128 bytes.
    #[schemars(length(min = 1, max = NAME_BYTES_MAX))]
    pub name: String,
    /// What its teams may use together.
    #[serde(default)]
    pub budget: Option<Budget>,
}

/// A limit policy: how much may be used in what time. It has at least one of the amounts; all policies that match a
/// request apply together.
#[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Limit {
    /// How answers, logs and metrics call it; at most 128 bytes. Absent: its place, `limits[0]`.
    #[serde(default)]
    #[schemars(length(min = 1, max = NAME_BYTES_MAX))]
    pub name: Option<String>,
    /// Which requests it counts. Absent: all.
    #[serde(default, rename = "match")]
    pub matches: Match,
    /// Who has an own count: one word or a list; `shared` is one count for all.
    #[serde(default)]
    pub per: PerList,
    /// Requests a window, 1 to 10^15.
    #[serde(default)]
    #[schemars(range(min = 1, max = LIMIT_MAX))]
    pub requests: Option<u64>,
    /// Input tokens a window, 1 to 10^15.
    #[serde(default)]
    #[schemars(range(min = 1, max = LIMIT_MAX))]
    pub input_tokens: Option<u64>,
    /// Output tokens a window, 1 to 10^15.
    #[serde(default)]
    #[schemars(range(min = 1, max = LIMIT_MAX))]
    pub output_tokens: Option<u64>,
    /// Tokens a window, prompt and output together, 1 to 10^15.
    #[serde(default)]
    #[schemars(range(min = 1, max = LIMIT_MAX))]
    pub tokens: Option<u64>,
    /// Cost a window, US dollars.
    #[serde(default)]
    pub usd: Option<Dollars>,
    /// Requests that run at the same time, 1 to 10^15; needs no `every`.
    #[serde(default)]
    #[schemars(range(min = 1, max = LIMIT_MAX))]
    pub parallel: Option<u64>,
    /// Length of the window, 1s to 1mo; for `window: calendar` 1h, 1d, 1w or 1mo.
    #[serde(default)]
    pub every: Option<Span>,
    /// How the window moves.
    #[serde(default)]
    pub window: WindowKind,
    /// Time zone of calendar periods, as in `Europe/Berlin`. Absent: UTC.
    #[serde(default)]
    pub time_zone: Option<String>,
    /// What becomes of a running stream when nothing is left.
    #[serde(default)]
    pub on_exhausted: OnExhausted,
    /// What becomes of requests for a model without a price where `usd` is counted.
    #[serde(default)]
    pub unpriced: Unpriced,
}

/// Which requests a limit counts: those for which all that is given is so. In `user`, `model`, `provider`, `path` and
/// a header's value `*` stands for any text.
#[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Match {
    /// Name of an entry of `keys`, or of a key made at run time.
    pub key: Option<String>,
    /// Name of an entry of `teams`.
    pub team: Option<String>,
    /// Name of an entry of `organizations`.
    pub organization: Option<String>,
    /// The request's user: its `user` field, or the header that `user_header` names.
    pub user: Option<String>,
    /// Name of an entry of `models`.
    pub model: Option<String>,
    /// Name of an entry of `providers`. Such a limit is asked when a target is chosen; where it has nothing left the
    /// model's next target is tried.
    pub provider: Option<String>,
    /// A header of the request.
    pub header: Option<HeaderMatch>,
    /// The request's path, for example `/v1/embeddings`.
    pub path: Option<String>,
    /// Networks of which the client's address must be in one.
    #[schemars(with = "Option<Vec<Network>>")]
    pub client: Option<Vec<IpNet>>,
}

/// A header that a request must have.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct HeaderMatch {
    /// Its name; upper and lower case are the same.
    pub name: String,
    /// Its value, in which `*` stands for any text. Absent: any value.
    #[serde(default)]
    pub value: Option<String>,
}

/// Who has an own count in a limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Per {
    /// Every key.
    Key,
    /// Every team; keys without one share a count.
    Team,
    /// Every organization; keys without one share a count.
    Organization,
    /// Every user; requests that name none share a count.
    User,
    /// Every virtual model.
    Model,
    /// Every provider; asked when a target is chosen.
    Provider,
    /// Every client: an IPv4 address, or an IPv6 network of 64 bits.
    Client,
    /// Nobody: one count for all.
    Shared,
}

/// One word or a list of them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct PerList(pub Vec<Per>);

impl Default for PerList {
    fn default() -> Self {
        PerList(vec![Per::Key])
    }
}

// Serde's own untagged enums lose the place and the reason of an error.
impl<'de> Deserialize<'de> for PerList {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<PerList, D::Error> {
        struct Visitor;
        impl<'de> de::Visitor<'de> for Visitor {
            type Value = PerList;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a word or a list of words")
            }

            fn visit_str<E: de::Error>(self, word: &str) -> Result<PerList, E> {
                let per = Per::deserialize(de::value::StrDeserializer::new(word))?;
                Ok(PerList(vec![per]))
            }

            fn visit_seq<A: de::SeqAccess<'de>>(self, list: A) -> Result<PerList, A::Error> {
                Vec::deserialize(de::value::SeqAccessDeserializer::new(list)).map(PerList)
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

impl JsonSchema for PerList {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "PerList".into()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        let one = generator.subschema_for::<Per>();
        schemars::json_schema!({
            "description": "One word or a list of them.",
            "anyOf": [one, { "type": "array", "items": one }]
        })
    }
}

/// How a limit's window moves.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum WindowKind {
    /// What is used is earned back continuously; the whole amount may be used at once.
    #[default]
    Bucket,
    /// Within any stretch of that length.
    Sliding,
    /// Within each hour, day, week or month of the time zone.
    Calendar,
}

/// What becomes of a running stream when a limit has nothing left.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum OnExhausted {
    /// It ends as though the model had come to its output limit: `finish_reason: length`, with the reason beside it.
    #[default]
    Finish,
    /// It ends with an error event.
    Error,
}

/// What becomes of a request whose model has no price, where its cost is limited.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Unpriced {
    /// It is refused: a hard limit cannot hold for what costs nobody knows what.
    #[default]
    Refuse,
    /// It counts nothing.
    Allow,
}

/// What may be spent: by a key, a team, an organization or the whole gateway. Budgets hold one within the other.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Budget {
    /// US dollars a period.
    #[serde(default)]
    pub usd: Option<Dollars>,
    /// Prepaid US dollars, instead of `usd`: never given back by time, topped up at run time.
    #[serde(default)]
    pub credit: Option<Dollars>,
    /// The period of `usd`: 1h, 1d, 1w and 1mo are the calendar's, other spans from 1s to 1mo slide.
    #[serde(default)]
    pub every: Option<Span>,
    /// Time zone of calendar periods, as in `Europe/Berlin`. Absent: UTC.
    #[serde(default)]
    pub time_zone: Option<String>,
    /// Shares at which the log, a metric and the webhook tell of it, as in `[50%, 80%, 100%]`; at most 10.
    #[serde(default)]
    #[schemars(length(max = ALERTS_MAX))]
    pub alerts: Vec<Percent>,
    /// Refuse what does not fit; false only counts and alerts.
    #[serde(default = "yes")]
    pub hard: bool,
    /// What becomes of a running stream when nothing is left.
    #[serde(default)]
    pub on_exhausted: OnExhausted,
    /// What becomes of requests for a model without a price.
    #[serde(default)]
    pub unpriced: Unpriced,
}

/// Alerts of one budget.
pub const ALERTS_MAX: usize = 10;

fn yes() -> bool {
    true
}

/// A share, as `80%`; from 1% to 1000%.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(into = "String")]
pub struct Percent(pub u16);

impl From<Percent> for String {
    fn from(percent: Percent) -> String {
        format!("{}%", percent.0)
    }
}

impl Percent {
    /// Reads `80%`.
    ///
    /// # Errors
    /// Says what a share looks like.
    pub fn parse(text: &str) -> Result<Percent, String> {
        text.strip_suffix('%')
            .and_then(|number| number.parse().ok())
            .filter(|percent| (1..=1000).contains(percent))
            .map(Percent)
            .ok_or_else(|| format!("`{text}` is no share; write for example 80%, from 1% to 1000%"))
    }
}

impl<'de> Deserialize<'de> for Percent {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Percent, D::Error> {
        let text = String::deserialize(deserializer)?;
        Percent::parse(&text).map_err(de::Error::custom)
    }
}

impl JsonSchema for Percent {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Percent".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        schemars::json_schema!({
            "type": "string",
            "pattern": "^[0-9]+%$",
            "description": "A share, as 80%; from 1% to 1000%."
        })
    }
}

/// Who is told when a budget's alert is due, besides the log and the metrics.
#[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Alerts {
    /// URL to which each alert is sent as a JSON object by POST, `http://` or `https://`. A failed one is tried again
    /// four times within half a minute.
    pub webhook: Option<String>,
    /// Sent with it as `Authorization: Bearer`.
    pub token: Option<crate::config::units::Secret>,
}

/// Where levels of limits are kept.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct LimitState {
    /// Levels that can be told apart at the same time, 1024 to 67108864, each for operators' subjects (keys, teams,
    /// models, budgets) and for clients' (users, addresses): 32 bytes for one, on disk and in memory. Subjects beyond that
    /// share a count. Takes effect with a restart.
    #[schemars(range(min = 1024, max = LEVELS_MAX))]
    pub levels: usize,
    /// Name of the header that tells a request's user; it counts before the body's `user` field. Absent: only the
    /// field.
    pub user_header: Option<String>,
}

/// Places of a table: 2 GiB of 32 bytes each.
pub const LEVELS_MAX: usize = 64 << 20;

/// 2 MiB for each of the two tables.
const LEVELS: usize = 64 << 10;

impl Default for LimitState {
    fn default() -> Self {
        LimitState {
            levels: LEVELS,
            user_header: None,
        }
    }
}
