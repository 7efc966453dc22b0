//! What can be done with teams.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{
    Actor, Db, Failure, Key, Kind, Row, Team,
    keys::{check_metadata, given},
    model::Doc,
};
use crate::{bounds::NAME_BYTES_MAX, config::check_name, net::clock};

/// Teams that can be made at run time; the data plane keeps their names in memory.
const TEAMS_MAX: u64 = 100_000;

/// A team to be made.
#[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct NewTeam {
    /// Unique name; at most 128 bytes.
    #[schemars(length(min = 1, max = NAME_BYTES_MAX))]
    pub name: String,
    /// Organization of the team and so of its keys.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub organization: Option<String>,
    /// Anything else that should be known of the team; not for secrets.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub metadata: BTreeMap<String, String>,
}

/// What is to be changed of a team: what is absent stays, null clears.
#[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct TeamPatch {
    /// Organization of the team and so of its keys.
    #[serde(deserialize_with = "given", skip_serializing_if = "Option::is_none")]
    pub organization: Option<Option<String>>,
    /// All of the team's metadata.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub metadata: Option<BTreeMap<String, String>>,
}

impl Db {
    /// Makes a team.
    ///
    /// # Errors
    /// The name is taken, or something is wrong with what was asked for.
    pub fn create_team(&mut self, new: &NewTeam, actor: &Actor) -> Result<Row<Team>, Failure> {
        check_name(&new.name).map_err(|what| Failure::invalid(format!("`name`: {what}")))?;
        if self.has_team(&new.name)? {
            return Err(Failure::conflict("there is a team of this name already"));
        }
        if self.count(Kind::Team)? >= TEAMS_MAX {
            return Err(Failure::conflict(format!("there are {TEAMS_MAX} teams already")));
        }
        let now_ms = clock::unix_ms();
        let team = Team {
            name: new.name.clone(),
            organization: new.organization.clone(),
            metadata: new.metadata.clone(),
            created_ms: now_ms,
            updated_ms: now_ms,
        };
        let detail = serde_json::to_value(new).unwrap_or_default();
        self.put_team(&team, "create", actor, &detail)
    }

    /// A team by its name.
    ///
    /// # Errors
    /// There is none that was made at run time.
    pub fn team(&self, name: &str) -> Result<Row<Team>, Failure> {
        self.get(name)?.ok_or_else(|| Failure::not_found("team"))
    }

    /// Changes what a patch names.
    ///
    /// # Errors
    /// There is no such team, it changed since `seen`, or the new state would be wrong.
    pub fn update_team(
        &mut self,
        name: &str,
        seen: Option<u64>,
        patch: &TeamPatch,
        actor: &Actor,
    ) -> Result<Row<Team>, Failure> {
        let row = self.team(name)?;
        row.check_seen(seen)?;
        let mut team = row.doc;
        if let Some(organization) = &patch.organization {
            team.organization.clone_from(organization);
        }
        if let Some(metadata) = &patch.metadata {
            team.metadata.clone_from(metadata);
        }
        team.updated_ms = clock::unix_ms();
        let detail = serde_json::to_value(patch).unwrap_or_default();
        self.put_team(&team, "update", actor, &detail)
    }

    /// Forgets a team without keys.
    ///
    /// # Errors
    /// There is no such team, it changed since `seen`, or it has keys.
    pub fn delete_team(&mut self, name: &str, seen: Option<u64>, actor: &Actor) -> Result<(), Failure> {
        let row = self.team(name)?;
        row.check_seen(seen)?;
        if self.count_group(Key::KIND, name, 1)? > 0 {
            return Err(Failure::conflict("the team has keys; delete or move them first"));
        }
        self.delete::<Team>(name)?;
        self.audit(actor, "delete", Kind::Team, (name, name), &Value::Null)
    }

    fn put_team(
        &mut self,
        team: &Team,
        action: &str,
        actor: &Actor,
        detail: &Value,
    ) -> Result<Row<Team>, Failure> {
        if let Some(organization) = &team.organization {
            check_name(organization).map_err(|what| Failure::invalid(format!("`organization`: {what}")))?;
        }
        check_metadata(&team.metadata)?;
        self.put(team)?;
        self.audit(actor, action, Kind::Team, (&team.name, &team.name), detail)?;
        self.team(&team.name)
    }
}
