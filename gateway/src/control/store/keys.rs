//! What can be done with keys.

use std::collections::BTreeMap;

use ipnet::IpNet;
use schemars::JsonSchema;
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::{Value, json};

use super::{
    Actor, Budget, Cause, Db, Failure, Key, KeyLimit, Kind, Revoked, Row, Running, Scope, Secret, Team,
    limits::{self, LIMITS_MAX},
};
use crate::{
    bounds::NAME_BYTES_MAX,
    config::{
        KEY_PREFIX, check_name, generate_key, key_hash, parse_sha256, sha256_hex,
        units::{Network, Span},
    },
    net::clock,
};

/// Keys that can be made at run time. The table of the data plane takes about a quarter of a KiB for each.
pub const KEYS_MAX: u64 = 4_000_000;

/// Secrets of one key that are good at the same time.
const SECRETS_MAX: usize = 4;

/// Models, networks and tags that one key can name.
const MODELS_MAX: usize = 256;
const NETWORKS_MAX: usize = 64;
const TAGS_MAX: usize = 32;

/// Entries of `metadata`, and bytes of a name and of a value in it.
const METADATA_MAX: usize = 32;
const METADATA_NAME_BYTES_MAX: usize = 64;
const METADATA_VALUE_BYTES_MAX: usize = 512;

/// Longest overlap of two secrets, and longest life that `expires_in` gives.
const SPAN_MAX: Span = Span::secs(3650 * 86_400);

/// A key to be made.
#[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct NewKey {
    /// Unique name, seen in logs and in the ledger; at most 128 bytes.
    #[schemars(length(min = 1, max = NAME_BYTES_MAX))]
    pub name: String,
    /// Name of a team, of the configuration or made at run time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub team: Option<String>,
    /// Organization of a key without a team.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub organization: Option<String>,
    /// Models that the key may use. Absent: all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = MODELS_MAX))]
    pub models: Option<Vec<String>>,
    /// Networks from which the key may be used, for example `10.0.0.0/8`. Absent: any.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(with = "Vec<Network>", length(max = NETWORKS_MAX))]
    pub networks: Vec<IpNet>,
    /// Words for people and scripts.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = TAGS_MAX))]
    pub tags: Vec<String>,
    /// Anything else that should be known of the key; not for secrets.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub metadata: BTreeMap<String, String>,
    /// Limits of its own, at most 8, besides those of the configuration.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = LIMITS_MAX))]
    pub limits: Vec<KeyLimit>,
    /// When the key ends, RFC 3339. Absent: never.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("format" = "date-time"))]
    pub expires_at: Option<String>,
    /// How long the key lives, instead of `expires_at`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires_in: Option<Span>,
    /// Make it disabled.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub disabled: bool,
    /// SHA-256 of a secret that exists already. Absent: a secret is made and shown once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(regex(pattern = r"^[0-9a-fA-F]{64}$"))]
    pub sha256: Option<String>,
}

/// What is to be changed of a key: what is absent stays, null clears.
#[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct KeyPatch {
    /// A new name. The ledger's records keep the old one.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = NAME_BYTES_MAX))]
    pub name: Option<String>,
    /// Name of a team; null takes the key out of its team.
    #[serde(deserialize_with = "given", skip_serializing_if = "Option::is_none")]
    pub team: Option<Option<String>>,
    /// Organization of a key without a team.
    #[serde(deserialize_with = "given", skip_serializing_if = "Option::is_none")]
    pub organization: Option<Option<String>>,
    /// Models that the key may use; null: all.
    #[serde(deserialize_with = "given", skip_serializing_if = "Option::is_none")]
    pub models: Option<Option<Vec<String>>>,
    /// Networks from which the key may be used; an empty list: any.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<Vec<Network>>")]
    pub networks: Option<Vec<IpNet>>,
    /// All words of the key.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tags: Option<Vec<String>>,
    /// All of the key's metadata.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub metadata: Option<BTreeMap<String, String>>,
    /// All limits of its own; an empty list: none.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = LIMITS_MAX))]
    pub limits: Option<Vec<KeyLimit>>,
    /// When the key ends, RFC 3339; null: never.
    #[serde(deserialize_with = "given", skip_serializing_if = "Option::is_none")]
    #[schemars(extend("format" = "date-time"))]
    pub expires_at: Option<Option<String>>,
    /// How long the key lives from now on, instead of `expires_at`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub expires_in: Option<Span>,
    /// Whether requests with the key are refused; running ones go on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub disabled: Option<bool>,
}

/// How a key gets a new secret.
#[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Rotation {
    /// How long the old secret stays good. Absent or 0: it ends now.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub overlap: Option<Span>,
    /// SHA-256 of a secret that exists already. Absent: a secret is made and shown once.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(regex(pattern = r"^[0-9a-fA-F]{64}$"))]
    pub sha256: Option<String>,
}

/// How a key is revoked.
#[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Revocation {
    /// What becomes of running requests.
    pub running: Running,
}

/// Tells null from absent: `None` is absent, `Some(None)` null.
pub(super) fn given<'de, D, T>(deserializer: D) -> Result<Option<Option<T>>, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de>,
{
    Option::deserialize(deserializer).map(Some)
}

impl Db {
    /// Makes a key; gives it and its secret, which is nowhere else.
    ///
    /// # Errors
    /// The name or the secret is taken, or something is wrong with what was asked for.
    pub fn create_key(&mut self, new: &NewKey, actor: &Actor) -> Result<(Row<Key>, Option<String>), Failure> {
        let now_ms = clock::unix_ms();
        self.check_key_name(&new.name)?;
        if self.count(Kind::Key)? >= KEYS_MAX {
            return Err(Failure::conflict(format!("there are {KEYS_MAX} keys already")));
        }
        let (secret, shown) = self.new_secret(new.sha256.as_deref(), now_ms)?;
        let key = Key {
            id: new_id()?,
            name: new.name.clone(),
            team: new.team.clone(),
            organization: new.organization.clone(),
            models: new.models.clone(),
            networks: new.networks.iter().map(IpNet::trunc).collect(),
            tags: new.tags.clone(),
            metadata: new.metadata.clone(),
            limits: new.limits.clone(),
            created_ms: now_ms,
            updated_ms: now_ms,
            expires_ms: ends(new.expires_at.as_deref(), new.expires_in, now_ms)?,
            disabled: new.disabled,
            revoked: None,
            secrets: vec![secret],
        };
        check(&key)?;
        self.put(&key)?;
        let mut detail = serde_json::to_value(new).unwrap_or_default();
        // A secret that somebody thought of can be guessed by its hash, and everybody with a token reads this.
        if let Some(detail) = detail.as_object_mut() {
            detail.remove("sha256");
        }
        detail["hint"] = key.secrets[0].hint.clone().into();
        self.audit(actor, "create", Kind::Key, (&key.id, &key.name), &detail)?;
        Ok((self.key(&key.id)?, shown))
    }

    /// A key by its id.
    ///
    /// # Errors
    /// There is none.
    pub fn key(&self, id: &str) -> Result<Row<Key>, Failure> {
        self.get(id)?.ok_or_else(|| Failure::not_found("key"))
    }

    /// A key that is not revoked, for a change of the version that the caller has seen.
    fn key_to_change(&self, id: &str, seen: Option<u64>) -> Result<Key, Failure> {
        let row = self.key(id)?;
        row.check_seen(seen)?;
        match row.doc.revoked {
            Some(_) => Err(Failure::conflict("the key is revoked, which is for ever")),
            None => Ok(row.doc),
        }
    }

    /// Changes what a patch names.
    ///
    /// # Errors
    /// There is no such key, it changed since `seen`, or the new state would be wrong.
    pub fn update_key(
        &mut self,
        id: &str,
        seen: Option<u64>,
        patch: &KeyPatch,
        actor: &Actor,
    ) -> Result<Row<Key>, Failure> {
        let now_ms = clock::unix_ms();
        let mut key = self.key_to_change(id, seen)?;
        if let Some(name) = patch.name.as_ref().filter(|name| **name != key.name) {
            self.check_key_name(name)?;
            // What was used counts for the name: another one would begin anew.
            if self
                .get::<Budget>(&Budget::id_of(Scope::Key, &key.name))?
                .is_some()
            {
                let message =
                    "the key has a budget, which counts by name: delete it before the key is renamed";
                return Err(Failure::conflict(message));
            }
            key.name.clone_from(name);
        }
        if let Some(team) = &patch.team {
            key.team.clone_from(team);
        }
        if let Some(organization) = &patch.organization {
            key.organization.clone_from(organization);
        }
        if let Some(models) = &patch.models {
            key.models.clone_from(models);
        }
        if let Some(networks) = &patch.networks {
            key.networks = networks.iter().map(IpNet::trunc).collect();
        }
        if let Some(tags) = &patch.tags {
            key.tags.clone_from(tags);
        }
        if let Some(metadata) = &patch.metadata {
            key.metadata.clone_from(metadata);
        }
        if let Some(limits) = &patch.limits {
            key.limits.clone_from(limits);
        }
        if patch.expires_at.is_some() || patch.expires_in.is_some() {
            let at = patch.expires_at.as_ref().and_then(Option::as_deref);
            key.expires_ms = ends(at, patch.expires_in, now_ms)?;
        }
        key.disabled = patch.disabled.unwrap_or(key.disabled);
        check(&key)?;
        let detail = serde_json::to_value(patch).unwrap_or_default();
        self.change_key(key, "update", actor, &detail)
    }

    /// Gives a key a new secret; the old ones end after the overlap at the latest.
    ///
    /// # Errors
    /// As [`Db::update_key`]; or too many secrets overlap.
    pub fn rotate_key(
        &mut self,
        id: &str,
        seen: Option<u64>,
        rotation: &Rotation,
        actor: &Actor,
    ) -> Result<(Row<Key>, Option<String>), Failure> {
        let now_ms = clock::unix_ms();
        let mut key = self.key_to_change(id, seen)?;
        let overlap = rotation.overlap.unwrap_or(Span::secs(0));
        if overlap > SPAN_MAX {
            return Err(Failure::invalid(format!("`overlap` is longer than {SPAN_MAX}")));
        }
        let until_ms = now_ms + overlap.0.as_millis() as u64;
        for old in &mut key.secrets {
            old.until_ms = Some(old.until_ms.unwrap_or(u64::MAX).min(until_ms));
        }
        key.secrets
            .retain(|old| old.until_ms.is_some_and(|until| until > now_ms));
        if key.secrets.len() >= SECRETS_MAX {
            let message =
                format!("{SECRETS_MAX} secrets of the key are still good; rotate without an overlap");
            return Err(Failure::conflict(message));
        }
        let (secret, shown) = self.new_secret(rotation.sha256.as_deref(), now_ms)?;
        let detail = json!({ "overlap": overlap.to_string(), "hint": secret.hint });
        key.secrets.insert(0, secret);
        let row = self.change_key(key, "rotate", actor, &detail)?;
        Ok((row, shown))
    }

    /// Ends a key for ever. Its name stays taken until it is deleted.
    ///
    /// # Errors
    /// There is no such key, or it changed since `seen`. Revoking it again is no error.
    pub fn revoke_key(
        &mut self,
        id: &str,
        seen: Option<u64>,
        revocation: &Revocation,
        actor: &Actor,
    ) -> Result<Row<Key>, Failure> {
        let row = self.key(id)?;
        row.check_seen(seen)?;
        if row.doc.revoked.is_some() {
            return Ok(row);
        }
        let mut key = row.doc;
        key.revoked = Some(Revoked {
            at_ms: clock::unix_ms(),
            running: revocation.running,
        });
        let detail = serde_json::to_value(revocation).unwrap_or_default();
        self.change_key(key, "revoke", actor, &detail)
    }

    /// Forgets a key; one that was not revoked is.
    ///
    /// # Errors
    /// There is no such key, or it changed since `seen`.
    pub fn delete_key(&mut self, id: &str, seen: Option<u64>, actor: &Actor) -> Result<(), Failure> {
        let row = self.key(id)?;
        row.check_seen(seen)?;
        self.delete::<Key>(id)?;
        self.forget_used(&row.doc.name)?;
        self.audit(actor, "delete", Kind::Key, (id, &row.doc.name), &Value::Null)
    }

    fn change_key(
        &mut self,
        mut key: Key,
        action: &str,
        actor: &Actor,
        detail: &Value,
    ) -> Result<Row<Key>, Failure> {
        key.updated_ms = clock::unix_ms();
        self.put(&key)?;
        self.audit(actor, action, Kind::Key, (&key.id, &key.name), detail)?;
        self.key(&key.id)
    }

    fn check_key_name(&self, name: &str) -> Result<(), Failure> {
        check_name(name).map_err(|what| Failure::invalid(format!("`name`: {what}")))?;
        match self.named::<Key>(name)?.first() {
            Some(_) => Err(Failure::conflict("there is a key of this name already")),
            None => Ok(()),
        }
    }

    /// A secret that nobody has: made here, or one of which the caller has the hash.
    fn new_secret(&self, sha256: Option<&str>, now_ms: u64) -> Result<(Secret, Option<String>), Failure> {
        let (hash, hint, shown) = match sha256 {
            Some(text) => {
                let hash = parse_sha256(text)
                    .ok_or_else(|| Failure::invalid("`sha256` is not a SHA-256 of 64 hex digits"))?;
                if hash == key_hash("") {
                    return Err(Failure::invalid("`sha256` is the SHA-256 of nothing"));
                }
                (hash, "own secret".to_owned(), None)
            }
            None => {
                let text = generate_key()
                    .map_err(|error| Failure::broken(format!("no random bytes for a key: {error}")))?;
                (key_hash(&text), hint_of(&text), Some(text))
            }
        };
        if self.owner(&hash)?.is_some() {
            return Err(Failure::conflict("another key has this secret"));
        }
        let secret = Secret {
            sha256: sha256_hex(&hash),
            hint,
            created_ms: now_ms,
            until_ms: None,
        };
        Ok((secret, shown))
    }
}

impl<D> Row<D> {
    /// Refuses where the caller has seen another version than this.
    pub(super) fn check_seen(&self, seen: Option<u64>) -> Result<(), Failure> {
        match seen {
            Some(seen) if seen != self.version => {
                let message = "it was changed meanwhile: read it again";
                Err(Failure::new(Cause::Stale, message))
            }
            _ => Ok(()),
        }
    }
}

/// Ten of a secret's 43 random characters are 60 bits; four show which of a few it is, and leave 234.
fn hint_of(secret: &str) -> String {
    let tail = secret.len().saturating_sub(4);
    format!("{KEY_PREFIX}…{}", &secret[tail..])
}

fn new_id() -> Result<String, Failure> {
    let mut random = [0; 32];
    getrandom::fill(&mut random).map_err(|error| Failure::broken(format!("no random bytes: {error}")))?;
    Ok(format!("key_{}", &sha256_hex(&random)[..32]))
}

/// When something ends that was given a moment or a span.
fn ends(at: Option<&str>, after: Option<Span>, now_ms: u64) -> Result<Option<u64>, Failure> {
    match (at, after) {
        (Some(_), Some(_)) => Err(Failure::invalid("give `expires_at` or `expires_in`, not both")),
        (None, None) => Ok(None),
        (None, Some(span)) if span > SPAN_MAX || span.0.is_zero() => Err(Failure::invalid(format!(
            "`expires_in` is more than 0 and at most {SPAN_MAX}"
        ))),
        (None, Some(span)) => Ok(Some(now_ms + span.0.as_millis() as u64)),
        (Some(text), None) => {
            let wrong = || {
                Failure::invalid(
                    "`expires_at` is not a moment as RFC 3339 has it; write for example 2027-01-31T00:00:00Z",
                )
            };
            let at: jiff::Timestamp = text.parse().map_err(|_| wrong())?;
            Ok(Some(u64::try_from(at.as_millisecond()).map_err(|_| wrong())?))
        }
    }
}

/// Reports what a key must not be.
fn check(key: &Key) -> Result<(), Failure> {
    let named = |field: &str, name: &str| {
        check_name(name).map_err(|what| Failure::invalid(format!("`{field}`: {what}")))
    };
    let at_most = |field: &str, count: usize, most: usize| match count > most {
        true => Err(Failure::invalid(format!(
            "`{field}` has {count} entries; the most is {most}"
        ))),
        false => Ok(()),
    };
    if let Some(team) = &key.team {
        named("team", team)?;
        if key.organization.is_some() {
            let message = "a key in a team is in the team's organization: give `team` or `organization`";
            return Err(Failure::invalid(message));
        }
    }
    if let Some(organization) = &key.organization {
        named("organization", organization)?;
    }
    let models = key.models.as_deref().unwrap_or_default();
    at_most("models", models.len(), MODELS_MAX)?;
    models.iter().try_for_each(|model| named("models", model))?;
    at_most("networks", key.networks.len(), NETWORKS_MAX)?;
    at_most("tags", key.tags.len(), TAGS_MAX)?;
    key.tags.iter().try_for_each(|tag| named("tags", tag))?;
    limits::check(&key.limits)?;
    check_metadata(&key.metadata)
}

/// Reports what metadata must not be.
pub(super) fn check_metadata(metadata: &BTreeMap<String, String>) -> Result<(), Failure> {
    if metadata.len() > METADATA_MAX {
        let count = metadata.len();
        return Err(Failure::invalid(format!(
            "`metadata` has {count} entries; the most is {METADATA_MAX}"
        )));
    }
    for (name, value) in metadata {
        if name.is_empty() || name.len() > METADATA_NAME_BYTES_MAX || name.chars().any(char::is_control) {
            return Err(Failure::invalid(format!(
                "a name in `metadata` has 1 to {METADATA_NAME_BYTES_MAX} bytes and no control characters"
            )));
        }
        if value.len() > METADATA_VALUE_BYTES_MAX {
            return Err(Failure::invalid(format!(
                "a value in `metadata` has at most {METADATA_VALUE_BYTES_MAX} bytes"
            )));
        }
    }
    Ok(())
}

impl Db {
    /// Whether a team was made at run time.
    pub fn has_team(&self, name: &str) -> Result<bool, Failure> {
        Ok(self.get::<Team>(name)?.is_some())
    }
}
