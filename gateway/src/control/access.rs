//! From documents of the store to what the data plane looks up.

use std::{
    cell::RefCell,
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
    serve::{
        keys::{Key, Life, NEVER_MS},
        snapshot::Registry,
    },
};

/// What the configuration file knows by name, for those who change something at run time.
#[derive(Debug, Default)]
pub struct Names {
    pub models: HashSet<String>,
    pub teams: Vec<String>,
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
        let mut teams: Vec<String> = config.teams.iter().map(|team| team.name.clone()).collect();
        teams.sort();
        Names {
            models: config.models.iter().map(|model| model.name.clone()).collect(),
            teams,
            keys,
        }
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
        };
        db.each(|team: store::Team| access.note_team(None, Some(&team)))?;
        let mut used = HashMap::new();
        db.each_used(|name, unix_ms| {
            used.insert(name, unix_ms);
        })?;
        let mut inner = inner.lock().unwrap_or_else(PoisonError::into_inner);
        let Inner { config, registry, .. } = &mut *inner;
        let mut keys = Vec::new();
        db.each(|doc: store::Key| {
            let used_ms = used.get(&doc.name).copied().unwrap_or_default();
            access.compile(
                &doc,
                &Arc::new(Life::used_at(used_ms)),
                (config, registry),
                &mut keys,
            );
        })?;
        access.shared.keys.fill(keys.into_iter());
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

    fn organization(&self, doc: &store::Key) -> String {
        let of_team = doc.team.as_ref().and_then(|team| self.organizations.get(team));
        of_team.or(doc.organization.as_ref()).cloned().unwrap_or_default()
    }

    /// Adds a key's secrets that may still be used, each with what the data plane wants to know.
    fn compile(
        &mut self,
        doc: &store::Key,
        life: &Arc<Life>,
        (config, registry): (&Config, &mut Registry),
        into: &mut Vec<([u8; 32], Arc<Key>)>,
    ) {
        if doc.revoked.is_some() {
            return;
        }
        let now_ms = clock::unix_ms();
        let organization = self.organization(doc);
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
                limits: registry
                    .limits
                    .bounds(config, &as_in_file(&doc.name, doc.team.as_deref())),
                life: life.clone(),
            };
            into.push((hash, Arc::new(key)));
        }
    }

    fn follow_key(&mut self, old: Option<&store::Key>, new: Option<&store::Key>) {
        let inner = self.inner.clone();
        let mut inner = inner.lock().unwrap_or_else(PoisonError::into_inner);
        let Inner { config, registry, .. } = &mut *inner;
        let before = hashes(old);
        let mut lives = before.iter().filter_map(|hash| self.shared.keys.get(hash));
        let life = lives.next().map(|key| key.life.clone()).unwrap_or_default();
        let mut fresh = Vec::new();
        if let Some(new) = new {
            self.compile(new, &life, (config, registry), &mut fresh);
        }
        for (hash, key) in &fresh {
            self.shared.keys.set(*hash, key);
        }
        for hash in before {
            if !fresh.iter().any(|(kept, _)| *kept == hash) {
                self.shared.keys.remove(&hash);
            }
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
        self.shared.keys.renew(|key| {
            (*key.team == *name).then(|| Key {
                organization: fresh.clone(),
                ..renewed(key)
            })
        });
    }
}

impl Follow for Access {
    fn follow(&mut self, changed: &[Changed]) {
        for change in changed {
            match change {
                Changed::Key { old, new } => self.follow_key(old.as_ref(), new.as_ref()),
                Changed::Team { old, new } => self.follow_team(old.as_ref(), new.as_ref()),
                Changed::Budget { .. } => {}
            }
            self.changes += 1;
        }
        if self.changes >= CHANGES_PER_SWEEP {
            self.changes = 0;
            self.common.sweep();
        }
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

/// The same key once more, to change a part of it.
pub fn renewed(key: &Key) -> Key {
    Key {
        name: key.name.clone(),
        team: key.team.clone(),
        organization: key.organization.clone(),
        models: key.models.clone(),
        networks: key.networks.clone(),
        expires_unix_ms: key.expires_unix_ms,
        disabled: key.disabled,
        limits: key.limits.clone(),
        life: key.life.clone(),
    }
}

/// Gives run-time keys the limits of another configuration.
pub fn renew_limits(shared: &Shared, config: &Config, registry: &mut Registry) {
    let registry = RefCell::new(registry);
    shared.keys.renew(|key| {
        let key_in_file = as_in_file(&key.name, Some(&*key.team));
        Some(Key {
            limits: registry.borrow_mut().limits.bounds(config, &key_in_file),
            ..renewed(key)
        })
    });
}

/// A run-time key as the configuration's limits see it.
pub fn as_in_file(name: &str, team: Option<&str>) -> schema::Key {
    schema::Key {
        name: name.to_owned(),
        sha256: String::new(),
        team: team.filter(|team| !team.is_empty()).map(str::to_owned),
        models: None,
    }
}

fn hashes(key: Option<&store::Key>) -> Vec<[u8; 32]> {
    let secrets = key.map(|key| key.secrets.as_slice()).unwrap_or_default();
    let parsed = secrets.iter().filter_map(|secret| parse_sha256(&secret.sha256));
    parsed.collect()
}
