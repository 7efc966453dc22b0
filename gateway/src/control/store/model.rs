//! What the store holds: documents, and changes of them as they go from host to host.

use std::collections::BTreeMap;

use super::limits::KeyLimit;
use crate::config::schema::{OnExhausted, Unpriced};
use ipnet::IpNet;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize, de::DeserializeOwned};

/// What a document is about. The numbers are in the database and on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    Key = 1,
    Team = 2,
    Budget = 3,
    TopUp = 4,
}

impl Kind {
    pub const ALL: [Kind; 4] = [Kind::Key, Kind::Team, Kind::Budget, Kind::TopUp];

    /// The kind of this number.
    pub fn of(number: i64) -> Option<Kind> {
        Kind::ALL.into_iter().find(|kind| *kind as i64 == number)
    }

    /// The word in the audit log.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Key => "key",
            Kind::Team => "team",
            Kind::Budget => "budget",
            Kind::TopUp => "topup",
        }
    }
}

/// A document of one kind.
pub trait Doc: Serialize + DeserializeOwned + Clone + Send + 'static {
    const KIND: Kind;
    /// Unique within the kind, on all hosts.
    fn id(&self) -> String;
    /// What lists are ordered by.
    fn name(&self) -> &str;
    /// The group it is looked up by: a key's team, a top-up's budget.
    fn group(&self) -> &str;
}

/// A virtual key. Its secrets are known by their hashes alone.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Key {
    /// `key_` and 32 hex digits.
    pub id: String,
    pub name: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub team: Option<String>,
    /// For a key without a team; a team has its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub organization: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub models: Option<Vec<String>>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub networks: Vec<IpNet>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tags: Vec<String>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub metadata: BTreeMap<String, String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub limits: Vec<KeyLimit>,
    pub created_ms: u64,
    pub updated_ms: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires_ms: Option<u64>,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub disabled: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revoked: Option<Revoked>,
    /// The newest first.
    pub secrets: Vec<Secret>,
}

/// One secret of a key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Secret {
    /// 64 hex digits.
    pub sha256: String,
    /// Enough to recognize it, far from enough to guess it.
    pub hint: String,
    pub created_ms: u64,
    /// The end of its overlap with a newer one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub until_ms: Option<u64>,
}

/// That a key was revoked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Revoked {
    pub at_ms: u64,
    pub running: Running,
}

/// What becomes of requests that run when their key is revoked.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Running {
    /// They are ended with an error within about 100 ms.
    #[default]
    End,
    /// They go on to their end.
    Finish,
}

/// A team of run-time keys.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Team {
    pub name: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub organization: Option<String>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub metadata: BTreeMap<String, String>,
    pub created_ms: u64,
    pub updated_ms: u64,
}

/// Who has a budget.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Scope {
    /// One virtual key.
    Key,
    /// All keys of a team.
    Team,
    /// All keys of an organization.
    Organization,
    /// Everything; its name is `all`.
    Gateway,
}

impl Scope {
    /// The word in ids and paths.
    pub fn name(self) -> &'static str {
        match self {
            Scope::Key => "key",
            Scope::Team => "team",
            Scope::Organization => "organization",
            Scope::Gateway => "gateway",
        }
    }
}

/// What may be spent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Budget {
    pub scope: Scope,
    /// The key's, team's or organization's name; `all` for the gateway.
    pub name: String,
    /// Nano-dollars a period; absent: only prepaid credit counts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nano_usd: Option<u64>,
    /// The period as the configuration writes it, for example `1mo`; absent: once and for all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub every: Option<String>,
    /// Of calendar periods; absent: UTC.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub time_zone: Option<String>,
    /// Percents at which somebody is told.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub alerts: Vec<u16>,
    /// Refuse what does not fit, instead of only telling.
    pub hard: bool,
    #[serde(default)]
    pub on_exhausted: OnExhausted,
    #[serde(default)]
    pub unpriced: Unpriced,
    pub created_ms: u64,
    pub updated_ms: u64,
}

impl Budget {
    /// `team/search`.
    pub fn id_of(scope: Scope, name: &str) -> String {
        format!("{}/{name}", scope.name())
    }
}

/// Prepaid credit that was added once. Top-ups are never changed: the credit is their sum, on every host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TopUp {
    /// Of the budget, [`Budget::id_of`].
    pub budget: String,
    /// The caller's word for this top-up: the same word again adds nothing.
    pub reference: String,
    /// Nano-dollars; negative takes credit back.
    pub nano_usd: i64,
    pub at_ms: u64,
    /// The name of the token that did it.
    pub by: String,
}

impl Doc for Key {
    const KIND: Kind = Kind::Key;
    fn id(&self) -> String {
        self.id.clone()
    }
    fn name(&self) -> &str {
        &self.name
    }
    fn group(&self) -> &str {
        self.team.as_deref().unwrap_or_default()
    }
}

impl Doc for Team {
    const KIND: Kind = Kind::Team;
    fn id(&self) -> String {
        self.name.clone()
    }
    fn name(&self) -> &str {
        &self.name
    }
    fn group(&self) -> &str {
        self.organization.as_deref().unwrap_or_default()
    }
}

impl Doc for Budget {
    const KIND: Kind = Kind::Budget;
    fn id(&self) -> String {
        Budget::id_of(self.scope, &self.name)
    }
    fn name(&self) -> &str {
        &self.name
    }
    fn group(&self) -> &str {
        self.scope.name()
    }
}

impl Doc for TopUp {
    const KIND: Kind = Kind::TopUp;
    fn id(&self) -> String {
        // Neither part has a control character.
        format!("{}\n{}", self.budget, self.reference)
    }
    fn name(&self) -> &str {
        &self.reference
    }
    fn group(&self) -> &str {
        &self.budget
    }
}

/// When a document was changed last and by which host: of two changes the greater stands.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Stamp {
    /// Milliseconds since 1970, but always above the stamp that the change found.
    pub unix_ms: u64,
    /// The host's id, 16 hex digits, made with its database.
    pub host: String,
}

/// The state of one document after a change, as it goes to other hosts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Change {
    pub kind: Kind,
    pub id: String,
    /// The document as JSON; `None`: deleted.
    pub doc: Option<String>,
    pub stamp: Stamp,
    /// Counts the changes of the host that gives this out, from 1 and without an end: where
    /// [`super::Store::changes_since`] goes on. It means nothing on another host.
    pub version: u64,
}

/// What the data plane must follow after a commit.
#[allow(clippy::large_enum_variant)] // a handful at a time, and never kept
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Changed {
    Key {
        old: Option<Key>,
        new: Option<Key>,
    },
    Team {
        old: Option<Team>,
        new: Option<Team>,
    },
    /// A budget or its credit, nano-dollars.
    Budget {
        id: String,
        new: Option<Budget>,
        credit: i64,
    },
}
