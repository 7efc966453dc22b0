//! Virtual keys as the hot path sees them, and the table of those that were made at run time.
//!
//! Keys of the configuration file stand in the snapshot and change with it. Keys of the admin API stand here: a table
//! of [`SHARDS`] maps by hash, each swapped as a whole. A change copies one shard, with a million keys about a
//! thousand entries, and is seen by every core at its next look-up; nobody waits for anybody.

use std::{
    collections::HashMap,
    hash::{BuildHasherDefault, Hasher},
    net::IpAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use arc_swap::ArcSwap;
use ipnet::IpNet;
use subtle::ConstantTimeEq;

use crate::{
    error::{Error, Kind},
    quota::{Ids, rule::Rule},
};

/// Maps of the table. With a million keys a change copies some 50 KiB; empty, the table takes 8 KiB.
const SHARDS: usize = 1024;

/// How old the time of the last use may be, milliseconds: a key that is used all the time on all cores is written
/// to once a second, not at every request.
const USED_PRECISION_MS: u64 = 1000;

/// When a key ends that has no end.
pub const NEVER_MS: u64 = u64::MAX;

/// A virtual key, under one of its secrets.
pub struct Key {
    pub name: Arc<str>,
    /// Empty for none.
    pub team: Arc<str>,
    /// Empty for none.
    pub organization: Arc<str>,
    /// Models that it may use; absent: all.
    pub models: Option<Arc<[String]>>,
    /// Where its clients may be; empty: anywhere.
    pub networks: Arc<[IpNet]>,
    /// When this secret ends by itself, milliseconds since 1970; [`NEVER_MS`] for never.
    pub expires_unix_ms: u64,
    /// Known, but not to be used for now.
    pub disabled: bool,
    /// What limits and budgets know it by.
    pub ids: Ids,
    /// Its own limits; few keys have any.
    pub own: Option<Arc<[Arc<Rule>]>>,
    pub life: Arc<Life>,
}

/// What all versions of a key share, whatever is changed of it: a running stream holds the version with which it began.
#[derive(Default)]
pub struct Life {
    used_unix_ms: AtomicU64,
    ended: AtomicBool,
}

impl Life {
    /// A life that was last used at this time, 0 for never.
    pub fn used_at(unix_ms: u64) -> Life {
        Life {
            used_unix_ms: AtomicU64::new(unix_ms),
            ended: AtomicBool::new(false),
        }
    }

    /// When it was last used, milliseconds since 1970, 0 for never; late by at most a second.
    pub fn used_unix_ms(&self) -> u64 {
        self.used_unix_ms.load(Ordering::Relaxed)
    }

    /// Whether running requests are to be ended.
    pub fn is_ended(&self) -> bool {
        self.ended.load(Ordering::Acquire)
    }

    fn touch(&self, now_unix_ms: u64) {
        let seen = self.used_unix_ms.load(Ordering::Relaxed);
        // Two cores may both write; both write the truth. A clock that stepped back is followed by nobody.
        if now_unix_ms >= seen.saturating_add(USED_PRECISION_MS) {
            self.used_unix_ms.store(now_unix_ms, Ordering::Relaxed);
        }
    }
}

impl Key {
    /// Whether the key may use a model.
    pub fn may_use(&self, model: &str) -> bool {
        self.models
            .as_ref()
            .is_none_or(|models| models.iter().any(|allowed| allowed == model))
    }

    /// Lets a request of this client pass, and notes the use.
    ///
    /// # Errors
    /// The key has expired or is disabled, or the client is outside the key's networks. Only who has the secret gets
    /// to know which.
    pub fn pass(&self, client: IpAddr, now_unix_ms: u64) -> Result<(), Error> {
        let refuse = |kind, code, message| {
            Err(Error {
                code: Some(code),
                ..Error::new(kind, message)
            })
        };
        if now_unix_ms >= self.expires_unix_ms {
            return refuse(Kind::Unauthenticated, "key_expired", "this API key has expired");
        }
        if self.disabled {
            return refuse(Kind::Unauthenticated, "key_disabled", "this API key is disabled");
        }
        let client = client.to_canonical();
        if !self.networks.is_empty() && !self.networks.iter().any(|network| network.contains(&client)) {
            let message = "this API key may not be used from this address";
            return refuse(Kind::Forbidden, "network_not_allowed", message);
        }
        self.life.touch(now_unix_ms);
        Ok(())
    }
}

/// SHA-256 is spread evenly as it is. Nobody chooses what stands in the table but the gateway and its operator.
#[derive(Default)]
pub struct Prefix(u64);

impl Hasher for Prefix {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        if let Some(prefix) = bytes.first_chunk() {
            self.0 = u64::from_le_bytes(*prefix);
        }
    }

    // The length that comes before an array's bytes says nothing.
    fn write_usize(&mut self, _: usize) {}
}

/// Keys by the SHA-256 of a secret.
pub type ByHash = HashMap<[u8; 32], Arc<Key>, BuildHasherDefault<Prefix>>;

/// Finds a key. An attacker who times it learns about hashes, of which he cannot choose a prefix, and the comparison at
/// its end takes constant time.
pub fn find<'m>(map: &'m ByHash, hash: &[u8; 32]) -> Option<&'m Arc<Key>> {
    let (known, key) = map.get_key_value(hash)?;
    bool::from(known.ct_eq(hash)).then_some(key)
}

/// The keys that were made at run time.
pub struct Keys {
    shards: Box<[ArcSwap<ByHash>]>,
    revocations: AtomicU64,
}

impl Default for Keys {
    fn default() -> Keys {
        let empty = Arc::new(ByHash::default());
        Keys {
            shards: (0..SHARDS).map(|_| ArcSwap::new(empty.clone())).collect(),
            revocations: AtomicU64::new(0),
        }
    }
}

impl Keys {
    /// The shard is chosen by other bytes than the place within it.
    fn shard(&self, hash: &[u8; 32]) -> &ArcSwap<ByHash> {
        let place = usize::from(u16::from_le_bytes([hash[30], hash[31]]));
        &self.shards[place % SHARDS]
    }

    /// Who has the secret with this hash.
    pub fn get(&self, hash: &[u8; 32]) -> Option<Arc<Key>> {
        find(&self.shard(hash).load(), hash).cloned()
    }

    /// Puts a key in force on all cores.
    pub fn set(&self, hash: [u8; 32], key: &Arc<Key>) {
        self.change(&hash, |shard| {
            shard.insert(hash, key.clone());
        });
    }

    /// Takes a secret out of force on all cores.
    pub fn remove(&self, hash: &[u8; 32]) {
        if self.shard(hash).load().contains_key(hash) {
            self.change(hash, |shard| {
                shard.remove(hash);
            });
        }
    }

    fn change(&self, hash: &[u8; 32], change: impl Fn(&mut ByHash)) {
        self.shard(hash).rcu(|shard| {
            let mut shard = ByHash::clone(shard);
            change(&mut shard);
            shard
        });
    }

    /// Puts many keys in force, each shard once; for the start.
    pub fn fill(&self, keys: impl Iterator<Item = ([u8; 32], Arc<Key>)>) {
        let mut shards: Vec<ByHash> = self
            .shards
            .iter()
            .map(|shard| ByHash::clone(&shard.load()))
            .collect();
        for (hash, key) in keys {
            let place = usize::from(u16::from_le_bytes([hash[30], hash[31]]));
            shards[place % SHARDS].insert(hash, key);
        }
        for (place, mut shard) in shards.into_iter().enumerate() {
            shard.shrink_to_fit();
            self.shards[place].store(Arc::new(shard));
        }
    }

    /// Makes all keys anew for which `renew` gives something, shard by shard. For the one thread that changes the table.
    pub fn renew(&self, renew: impl Fn(&Key) -> Option<Key>) {
        for shard in &self.shards {
            let old = shard.load_full();
            let mut fresh = ByHash::clone(&old);
            let mut changed = false;
            for key in fresh.values_mut() {
                if let Some(renewed) = renew(key) {
                    *key = Arc::new(renewed);
                    changed = true;
                }
            }
            if changed {
                shard.store(Arc::new(fresh));
            }
        }
    }

    /// Shows all secrets' hashes and keys, shard by shard.
    pub fn each(&self, mut show: impl FnMut(&[u8; 32], &Arc<Key>)) {
        for shard in &self.shards {
            for (hash, key) in shard.load_full().iter() {
                show(hash, key);
            }
        }
    }

    /// Secrets in the table.
    pub fn len(&self) -> usize {
        self.shards.iter().map(|shard| shard.load().len()).sum()
    }

    /// Whether no key was made at run time.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Ends what runs with this key: cores look at it within a tick.
    pub fn end(&self, life: &Life) {
        life.ended.store(true, Ordering::Release);
        self.revocations.fetch_add(1, Ordering::Release);
    }

    /// Counts [`Keys::end`].
    pub fn revocations(&self) -> u64 {
        self.revocations.load(Ordering::Acquire)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(name: &str) -> Key {
        Key {
            name: name.into(),
            team: "".into(),
            organization: "".into(),
            models: None,
            networks: Arc::new([]),
            expires_unix_ms: NEVER_MS,
            disabled: false,
            ids: Ids::default(),
            own: None,
            life: Arc::default(),
        }
    }

    fn hash(n: u64) -> [u8; 32] {
        crate::config::key_hash(&n.to_string())
    }

    #[test]
    fn keys_come_change_and_go() {
        let keys = Keys::default();
        keys.fill((0..5000).map(|n| (hash(n), Arc::new(key(&n.to_string())))));
        assert_eq!(keys.len(), 5000);
        for n in 0..5000 {
            assert_eq!(*keys.get(&hash(n)).expect("a key").name, *n.to_string());
        }
        assert!(keys.get(&hash(5000)).is_none());
        keys.set(hash(5000), &Arc::new(key("new")));
        keys.remove(&hash(1));
        keys.remove(&hash(9999));
        assert_eq!(*keys.get(&hash(5000)).expect("a key").name, *"new");
        assert!(keys.get(&hash(1)).is_none());
        keys.renew(|old| (&*old.name == "7").then(|| key("seven")));
        assert_eq!(*keys.get(&hash(7)).expect("a key").name, *"seven");
        let mut count = 0;
        keys.each(|_, _| count += 1);
        assert_eq!((count, keys.len()), (5000, 5000));
    }

    #[test]
    fn changes_by_several_threads_are_all_there() {
        let keys = Keys::default();
        std::thread::scope(|scope| {
            for thread in 0..4 {
                let keys = &keys;
                scope.spawn(move || {
                    for n in 0..500 {
                        let n = n * 4 + thread;
                        keys.set(hash(n), &Arc::new(key("k")));
                        assert!(keys.get(&hash(n)).is_some());
                        if n % 3 == 0 {
                            keys.remove(&hash(n));
                        }
                    }
                });
            }
        });
        let left = (0..2000).filter(|n| keys.get(&hash(*n)).is_some()).count();
        assert_eq!(left, (0..2000).filter(|n| n % 3 != 0).count());
    }

    #[test]
    fn who_may_pass() {
        let here: IpAddr = "192.0.2.7".parse().expect("address");
        let code = |key: &Key, client: IpAddr, now| key.pass(client, now).err().and_then(|error| error.code);
        let mut key = key("a");
        assert_eq!(code(&key, here, 5000), None);
        assert_eq!(key.life.used_unix_ms(), 5000);
        assert_eq!(code(&key, here, 5999), None);
        assert_eq!(key.life.used_unix_ms(), 5000, "not written at every use");
        assert_eq!(code(&key, here, 6000), None);
        assert_eq!(key.life.used_unix_ms(), 6000);
        key.expires_unix_ms = 7000;
        assert_eq!(code(&key, here, 6999), None);
        assert_eq!(code(&key, here, 7000), Some("key_expired"));
        key.expires_unix_ms = NEVER_MS;
        key.networks = Arc::new(["192.0.2.0/24".parse().expect("network")]);
        assert_eq!(code(&key, here, 0), None);
        assert_eq!(code(&key, "::ffff:192.0.2.9".parse().expect("address"), 0), None);
        assert_eq!(
            code(&key, "198.51.100.1".parse().expect("address"), 0),
            Some("network_not_allowed")
        );
        key.disabled = true;
        assert_eq!(code(&key, here, 0), Some("key_disabled"));
    }

    #[test]
    fn an_end_is_seen_by_every_version() {
        let keys = Keys::default();
        let first = Arc::new(key("a"));
        keys.set(hash(1), &first);
        let second = Key {
            disabled: true,
            life: first.life.clone(),
            ..key("a")
        };
        keys.set(hash(1), &Arc::new(second));
        keys.end(&keys.get(&hash(1)).expect("a key").life);
        assert!(first.life.is_ended());
        assert_eq!(keys.revocations(), 1);
    }
}
