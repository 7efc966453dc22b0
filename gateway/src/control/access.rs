//! From documents of the store to what the data plane looks up.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex, PoisonError},
};

use arc_swap::ArcSwap;
use ipnet::IpNet;

use super::{
    plane::Inner,
    store::{self, Changed, Db, Follow, Running, Store},
};
use crate::{
    config::{Config, key_hash, parse_sha256, schema},
    core::Shared,
    net::clock,
    quota::{Ids, Subject},
    serve::keys::{Key, Life, NEVER_MS},
};

/// What the configuration file knows by name, for those who change something at run time.
#[derive(Debug, Default)]
pub struct Names {
    pub models: HashSet<String>,
    /// Each with its organization, by name.
    pub teams: Vec<(String, Option<String>)>,
    /// By name.
    pub keys: Vec<FileKey>,
}

/// A key of the configuration file.
#[derive(Debug, Clone)]
pub struct FileKey {
    /// `file_` and 32 hex digits that stand for the name.
    pub id: String,
    pub name: String,
    pub team: Option<String>,
    pub models: Option<Vec<String>>,
    pub hash: [u8; 32],
}

impl Names {
    /// Those of a valid configuration.
    pub fn new(config: &Config) -> Names {
        let file_key = |key: &schema::Key| {
            let digest = crate::config::sha256_hex(&key_hash(&key.name));
            Some(FileKey {
                id: format!("file_{}", &digest[..32]),
                name: key.name.clone(),
                team: key.team.clone(),
                models: key.models.clone(),
                hash: parse_sha256(&key.sha256)?,
            })
        };
        let mut keys: Vec<FileKey> = config.keys.iter().filter_map(file_key).collect();
        keys.sort_by(|a, b| a.name.cmp(&b.name));
        let teams = config.teams.iter();
        let mut teams: Vec<_> = teams
            .map(|team| (team.name.clone(), team.organization.clone()))
            .collect();
        teams.sort();
        Names {
            models: config.models.iter().map(|model| model.name.clone()).collect(),
            teams,
            keys,
        }
    }

    /// Whether the file has a team of this name.
    pub fn has_team(&self, name: &str) -> bool {
        self.team(name).is_some()
    }

    /// The organization of the file's team of this name.
    pub fn organization(&self, team: &str) -> Option<&str> {
        self.team(team)?.1.as_deref()
    }

    /// The file's team of this name, with its organization.
    pub fn team(&self, name: &str) -> Option<&(String, Option<String>)> {
        let place = self.teams.binary_search_by(|team| team.0.as_str().cmp(name));
        place.ok().map(|place| &self.teams[place])
    }

    /// The file's key of this name.
    pub fn key(&self, name: &str) -> Option<&FileKey> {
        let place = self.keys.binary_search_by(|key| key.name.as_str().cmp(name));
        place.ok().map(|place| &self.keys[place])
    }
}

/// Everything that the admin API needs for keys, teams and budgets.
pub struct Directory {
    pub store: Store,
    pub names: Arc<ArcSwap<Names>>,
    pub shared: Arc<Shared>,
}

impl Directory {
    /// When a secret's key was last used, milliseconds since 1970, as its cores know it.
    pub fn used_ms(&self, hash: &[u8; 32]) -> Option<u64> {
        let snapshot = self.shared.snapshot.load();
        let key = snapshot
            .key(hash)
            .cloned()
            .or_else(|| self.shared.keys.get(hash))?;
        Some(key.life.used_unix_ms()).filter(|used| *used > 0)
    }
}

/// Texts and lists that many keys have in common, once in memory.
#[derive(Default)]
struct Common {
    texts: HashSet<Arc<str>>,
    models: HashSet<Arc<[String]>>,
    networks: HashSet<Arc<[IpNet]>>,
}

impl Common {
    fn text(&mut self, text: &str) -> Arc<str> {
        if let Some(known) = self.texts.get(text) {
            return known.clone();
        }
        let fresh: Arc<str> = text.into();
        self.texts.insert(fresh.clone());
        fresh
    }

    fn models(&mut self, models: &[String]) -> Arc<[String]> {
        if let Some(known) = self.models.get(models) {
            return known.clone();
        }
        let fresh: Arc<[String]> = models.into();
        self.models.insert(fresh.clone());
        fresh
    }

    fn networks(&mut self, networks: &[IpNet]) -> Arc<[IpNet]> {
        if let Some(known) = self.networks.get(networks) {
            return known.clone();
        }
        let fresh: Arc<[IpNet]> = networks.into();
        self.networks.insert(fresh.clone());
        fresh
    }

    /// Forgets what no key has any more.
    fn sweep(&mut self) {
        self.texts.retain(|text| Arc::strong_count(text) > 1);
        self.models.retain(|models| Arc::strong_count(models) > 1);
        self.networks.retain(|networks| Arc::strong_count(networks) > 1);
    }
}

/// Changes between two sweeps of [`Common`].
const CHANGES_PER_SWEEP: u32 = 4096;

/// Puts what the store commits in force.
pub struct Access {
    shared: Arc<Shared>,
    /// The configuration in force, and what outlives it. Held over a change, so that a reload does not come between.
    inner: Arc<Mutex<Inner>>,
    /// Organizations of run-time teams.
    organizations: HashMap<String, String>,
    common: Common,
    changes: u32,
    /// Last uses of keys that are out of force and still known.
    ended: Vec<(String, u64)>,
}

impl Access {
    /// Puts all that the database holds in force, before the data plane starts.
    ///
    /// # Errors
    /// The database cannot be read.
    pub fn load(db: &Db, shared: Arc<Shared>, inner: Arc<Mutex<Inner>>) -> anyhow::Result<Access> {
        let mut access = Access {
            shared,
            inner: inner.clone(),
            organizations: HashMap::new(),
            common: Common::default(),
            changes: 0,
            ended: Vec::new(),
        };
        db.each(|team: store::Team| access.note_team(None, Some(&team)))?;
        let mut used = HashMap::new();
        db.each_used(|name, unix_ms| {
            used.insert(name, unix_ms);
        })?;
        let inner = inner.lock().unwrap_or_else(PoisonError::into_inner);
        let config = &inner.config;
        let mut keys = Vec::new();
        db.each(|doc: store::Key| {
            let used_ms = used.get(&doc.name).copied().unwrap_or_default();
            access.compile(&doc, &Arc::new(Life::used_at(used_ms)), config, &mut keys);
        })?;
        access.shared.keys.fill(keys.into_iter());
        let mut budgets = Vec::new();
        db.each(|budget: store::Budget| budgets.push(budget))?;
        for budget in budgets {
            let id = store::Budget::id_of(budget.scope, &budget.name);
            access.follow_budget(&id, Some(&budget), db.credit(&id)?);
        }
        Ok(access)
    }

    fn note_team(&mut self, old: Option<&store::Team>, new: Option<&store::Team>) {
        if let Some(old) = old {
            self.organizations.remove(&old.name);
        }
        if let Some((new, organization)) = new.and_then(|new| Some((new, new.organization.as_ref()?))) {
            self.organizations.insert(new.name.clone(), organization.clone());
        }
    }

    fn organization(&self, doc: &store::Key, config: &Config) -> String {
        let Some(team) = &doc.team else {
            return doc.organization.clone().unwrap_or_default();
        };
        let in_file = || {
            let found = config.teams.iter().find(|other| other.name == *team);
            found?.organization.clone()
        };
        let at_run_time = self.organizations.get(team).cloned();
        at_run_time.or_else(in_file).unwrap_or_default()
    }

    /// Adds a key's secrets that may still be used, each with what the data plane wants to know.
    fn compile(
        &mut self,
        doc: &store::Key,
        life: &Arc<Life>,
        config: &Config,
        into: &mut Vec<([u8; 32], Arc<Key>)>,
    ) {
        if doc.revoked.is_some() {
            return;
        }
        let now_ms = clock::unix_ms();
        let organization = self.organization(doc, config);
        let own = doc.rules();
        for secret in &doc.secrets {
            let over = secret.until_ms.is_some_and(|until| until <= now_ms);
            let Some(hash) = parse_sha256(&secret.sha256).filter(|_| !over) else {
                continue;
            };
            let ends = [doc.expires_ms, secret.until_ms];
            let key = Key {
                name: doc.name.as_str().into(),
                team: self.common.text(doc.team.as_deref().unwrap_or_default()),
                organization: self.common.text(&organization),
                models: doc.models.as_deref().map(|models| self.common.models(models)),
                networks: self.common.networks(&doc.networks),
                expires_unix_ms: ends.into_iter().flatten().min().unwrap_or(NEVER_MS),
                disabled: doc.disabled,
                ids: Ids::new(&doc.name, doc.team.as_deref().unwrap_or_default(), &organization),
                own: own.clone(),
                life: life.clone(),
            };
            into.push((hash, Arc::new(key)));
        }
    }

    fn follow_budget(&mut self, id: &str, new: Option<&store::Budget>, credit: i64) {
        let Some(subject) = subject_of(id) else { return };
        let quota = self.shared.snapshot.load().quota.clone();
        match new {
            Some(budget) => drop(quota.budgets.set(subject, &budget.as_in_file(credit))),
            None => {
                quota.budgets.remove(&subject);
            }
        }
    }

    fn follow_key(&mut self, old: Option<&store::Key>, new: Option<&store::Key>) {
        let inner = self.inner.clone();
        let inner = inner.lock().unwrap_or_else(PoisonError::into_inner);
        let config = &inner.config;
        let before = hashes(old);
        let mut lives = before.iter().filter_map(|hash| self.shared.keys.get(hash));
        let life = lives.next().map(|key| key.life.clone()).unwrap_or_default();
        let mut fresh = Vec::new();
        if let Some(new) = new {
            self.compile(new, &life, config, &mut fresh);
        }
        for (hash, key) in &fresh {
            self.shared.keys.set(*hash, key);
        }
        for hash in before {
            if !fresh.iter().any(|(kept, _)| *kept == hash) {
                self.shared.keys.remove(&hash);
            }
        }
        if let Some(new) = new.filter(|_| fresh.is_empty() && life.used_unix_ms() > 0) {
            self.ended.push((new.name.clone(), life.used_unix_ms()));
        }
        let revoked = new.and_then(|new| new.revoked.as_ref());
        let was_revoked = old.is_some_and(|old| old.revoked.is_some());
        let running = match (new, revoked) {
            // One that was revoked so that its requests finish is not made to end them by being forgotten.
            (None, _) if was_revoked => Running::Finish,
            (None, _) => Running::End,
            (Some(_), Some(revoked)) => revoked.running,
            (Some(_), None) => Running::Finish,
        };
        if running == Running::End && old.is_some() && !was_revoked {
            self.shared.keys.end(&life);
        }
    }

    /// Another organization of a team is another of its keys.
    fn follow_team(&mut self, old: Option<&store::Team>, new: Option<&store::Team>) {
        self.note_team(old, new);
        let organization = |team: Option<&store::Team>| team.and_then(|team| team.organization.clone());
        let Some(name) = new.or(old).map(|team| team.name.clone()) else {
            return;
        };
        if organization(old) == organization(new) {
            return;
        }
        let fresh = self.common.text(&organization(new).unwrap_or_default());
        let _inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        self.shared
            .keys
            .renew(|key| (*key.team == *name).then(|| moved(key, fresh.clone())));
    }
}

impl Follow for Access {
    fn follow(&mut self, changed: &[Changed]) {
        for change in changed {
            match change {
                Changed::Key { old, new } => self.follow_key(old.as_ref(), new.as_ref()),
                Changed::Team { old, new } => self.follow_team(old.as_ref(), new.as_ref()),
                Changed::Budget { id, new, credit } => self.follow_budget(id, new.as_ref(), *credit),
            }
            self.changes += 1;
        }
        if self.changes >= CHANGES_PER_SWEEP {
            self.changes = 0;
            self.common.sweep();
        }
    }

    fn used_of_ended(&mut self) -> Vec<(String, u64)> {
        std::mem::take(&mut self.ended)
    }

    fn used_since(&self, unix_ms: u64) -> Vec<(String, u64)> {
        let mut used = Vec::new();
        self.shared.keys.each(|_, key| {
            let at = key.life.used_unix_ms();
            if at >= unix_ms && at > 0 {
                used.push((key.name.to_string(), at));
            }
        });
        used
    }
}

/// Lets run-time keys in teams of the file follow their teams into other organizations.
pub fn renew_organizations(shared: &Shared, config: &Config) {
    if shared.keys.is_empty() {
        return;
    }
    let organizations: HashMap<&str, &str> = config
        .teams
        .iter()
        .map(|team| {
            (
                team.name.as_str(),
                team.organization.as_deref().unwrap_or_default(),
            )
        })
        .collect();
    shared.keys.renew(|key| {
        let organization = *organizations.get(&*key.team)?;
        (*key.organization != *organization).then(|| moved(key, organization.into()))
    });
}

/// The same key in another organization.
fn moved(key: &Key, organization: Arc<str>) -> Key {
    Key {
        name: key.name.clone(),
        team: key.team.clone(),
        ids: Ids::new(&key.name, &key.team, &organization),
        organization,
        models: key.models.clone(),
        networks: key.networks.clone(),
        expires_unix_ms: key.expires_unix_ms,
        disabled: key.disabled,
        own: key.own.clone(),
        life: key.life.clone(),
    }
}

/// Whose budget has this id of the store.
fn subject_of(id: &str) -> Option<Subject> {
    let (scope, name) = id.split_once('/')?;
    Some(match scope {
        "key" => Subject::Key(name.to_owned()),
        "team" => Subject::Team(name.to_owned()),
        "organization" => Subject::Organization(name.to_owned()),
        _ => Subject::Gateway,
    })
}

fn hashes(key: Option<&store::Key>) -> Vec<[u8; 32]> {
    let secrets = key.map(|key| key.secrets.as_slice()).unwrap_or_default();
    let parsed = secrets.iter().filter_map(|secret| parse_sha256(&secret.sha256));
    parsed.collect()
}
