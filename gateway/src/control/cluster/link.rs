//! The connection to the store: one server or a cluster, and what is asked of it.

use std::{sync::LazyLock, time::Duration};

use anyhow::Context;
use redis::{
    AsyncConnectionConfig, Client, Cmd, IntoConnectionInfo, Pipeline, RedisFuture, RedisResult,
    TlsCertificates, Value,
    aio::{ConnectionLike, MultiplexedConnection},
    cluster::ClusterClient,
    cluster_async::ClusterConnection,
};

use super::{
    level::{Report, Times},
    script::Lua,
    wire::{Heard, answer, is_ill, write_report},
};
use crate::config::schema::Store;

/// Parts that levels are spread over in a cluster: the levels of a part are in one slot, so that one call reports many.
pub const SHARDS: u64 = 16;

/// Levels in one call: it keeps the server busy for about a millisecond.
pub const LEVELS_PER_CALL: usize = 128;

/// Changes of a shared map that are read at once.
const CHANGES_PER_CALL: usize = 500;

static LEASE: LazyLock<Lua> = LazyLock::new(|| Lua::new(include_str!("lease.lua")));
static PUBLISH: LazyLock<Lua> = LazyLock::new(|| Lua::new(include_str!("publish.lua")));
static PRESENCE: LazyLock<Lua> = LazyLock::new(|| Lua::new(include_str!("presence.lua")));

/// A connection that many calls share.
#[derive(Clone)]
enum Connection {
    One(MultiplexedConnection),
    Cluster(Box<ClusterConnection>),
}

impl ConnectionLike for Connection {
    fn req_packed_command<'a>(&'a mut self, cmd: &'a Cmd) -> RedisFuture<'a, Value> {
        match self {
            Connection::One(one) => one.req_packed_command(cmd),
            Connection::Cluster(cluster) => cluster.req_packed_command(cmd),
        }
    }

    fn req_packed_commands<'a>(
        &'a mut self,
        pipeline: &'a Pipeline,
        offset: usize,
        count: usize,
    ) -> RedisFuture<'a, Vec<Value>> {
        match self {
            Connection::One(one) => one.req_packed_commands(pipeline, offset, count),
            Connection::Cluster(cluster) => cluster.req_packed_commands(pipeline, offset, count),
        }
    }

    fn get_db(&self) -> i64 {
        match self {
            Connection::One(one) => one.get_db(),
            Connection::Cluster(cluster) => cluster.get_db(),
        }
    }
}

/// Where the store is and how it is called.
#[derive(Clone)]
pub struct Address {
    store: Store,
    patience: Duration,
}

/// An open connection.
#[derive(Clone)]
pub struct Link {
    connection: Connection,
    prefix: String,
}

/// One entry of a shared map.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Item {
    pub name: String,
    /// Sixteen hex digits of time, then the host: of two states the greater stands.
    pub stamp: String,
    pub value: String,
    /// For how long it is in force; `None`: for ever.
    pub ttl: Option<Duration>,
}

impl Address {
    pub fn new(store: &Store) -> Address {
        Address {
            store: store.clone(),
            patience: patience(store),
        }
    }

    /// Connects.
    ///
    /// # Errors
    /// The store cannot be reached or refuses; the text has no secret.
    pub async fn connect(&self) -> anyhow::Result<Link> {
        let connection = tokio::time::timeout(self.patience * 4, self.open())
            .await
            .context("no answer in time")??;
        Ok(Link {
            connection,
            prefix: self.store.prefix.clone(),
        })
    }

    fn tls(&self) -> anyhow::Result<TlsCertificates> {
        let root_cert = match &self.store.ca {
            Some(path) => {
                Some(std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?)
            }
            None => None,
        };
        Ok(TlsCertificates {
            client_tls: None,
            root_cert,
        })
    }

    async fn open(&self) -> anyhow::Result<Connection> {
        let store = &self.store;
        let Some(url) = &store.redis else {
            let mut builder = ClusterClient::builder(store.cluster.iter().map(String::as_str))
                .retries(2)
                .connection_timeout(self.patience)
                .response_timeout(self.patience)
                .overall_response_timeout(Some(self.patience * 2));
            if let Some(password) = &store.password {
                builder = builder.password(password.expose());
            }
            if let Some(username) = &store.username {
                builder = builder.username(username);
            }
            if store.cluster.iter().any(|node| node.starts_with("rediss:")) && store.ca.is_some() {
                builder = builder.certs(self.tls()?);
            }
            let connection = builder.build()?.get_async_connection().await?;
            return Ok(Connection::Cluster(Box::new(connection)));
        };
        let info = url.as_str().into_connection_info()?;
        let mut settings = info.redis_settings().clone();
        if let Some(username) = &store.username {
            settings = settings.set_username(username);
        }
        if let Some(password) = &store.password {
            settings = settings.set_password(password.expose());
        }
        let info = info.set_redis_settings(settings);
        let client = match url.starts_with("rediss:") && store.ca.is_some() {
            true => Client::build_with_tls(info, self.tls()?)?,
            false => Client::open(info)?,
        };
        let config = AsyncConnectionConfig::new()
            .set_connection_timeout(Some(self.patience))
            .set_response_timeout(Some(self.patience));
        let connection = client
            .get_multiplexed_async_connection_with_config(&config)
            .await?;
        Ok(Connection::One(connection))
    }
}

/// How long an answer may take: leases must not run out because one call hangs.
fn patience(store: &Store) -> Duration {
    (store.lease.0 / 5).min(Duration::from_secs(1))
}

impl Link {
    /// Says that this host is here. Answers the store's clock, milliseconds since 1970, and how many hosts are.
    ///
    /// # Errors
    /// The store does not answer.
    pub async fn present(&mut self, host: &str, lease_ms: u64) -> anyhow::Result<(u64, u64)> {
        let key = format!("{{{}:hosts}}", self.prefix);
        let fill = |command: &mut Cmd| {
            command.arg(1).arg(&key).arg(host).arg(lease_ms);
        };
        Ok(PRESENCE.run(&mut self.connection, fill).await?)
    }

    /// The part of the store that a level is in: one call may name the levels of one part.
    pub fn part(&self, id: u64) -> u64 {
        match self.connection {
            Connection::One(_) => 0,
            Connection::Cluster(_) => id % SHARDS,
        }
    }

    /// Whether parts of the store can be gone while others answer.
    pub fn has_parts(&self) -> bool {
        matches!(self.connection, Connection::Cluster(_))
    }

    /// Reports levels of one part and asks for leases; at most [`LEVELS_PER_CALL`]. Without reports it only asks for the
    /// part's mark.
    ///
    /// # Errors
    /// The part does not answer, or can count none of the levels.
    pub async fn report(&self, part: u64, reports: &[Report], times: Times) -> anyhow::Result<Heard> {
        let mut connection = self.connection.clone();
        let fill = |command: &mut Cmd| {
            command
                .arg(1 + reports.len())
                .arg(format!("{{{}:{part}}}:mark", self.prefix));
            for report in reports {
                command.arg(self.level_key(report.id));
            }
            command.arg(times.lease_us).arg(times.keep_us);
            reports.iter().for_each(|report| write_report(report, command));
        };
        let lines: Vec<Value> = LEASE.run(&mut connection, fill).await?;
        let mut lines = lines.into_iter();
        let Some(Value::Int(mark)) = lines.next() else {
            anyhow::bail!("the store answers something else");
        };
        let (mut answers, mut trouble) = (Vec::with_capacity(reports.len()), None);
        for (report, line) in reports.iter().zip(lines) {
            let read = answer(&line);
            answers.push(read.as_ref().ok().copied());
            if let Err(error) = read {
                trouble = Some(format!("{}: {error}", self.level_key(report.id)));
            }
        }
        match trouble {
            Some(trouble) if answers.iter().all(Option::is_none) && is_ill(&trouble) => {
                anyhow::bail!(trouble)
            }
            trouble => Ok(Heard {
                mark: mark as u64,
                answers,
                trouble,
            }),
        }
    }

    fn level_key(&self, id: u64) -> String {
        format!("{{{}:{}}}:level:{id:016x}", self.prefix, id % SHARDS)
    }

    /// Puts a state of an item into a shared map. False: a newer or the same one was there.
    ///
    /// # Errors
    /// The store does not answer.
    pub async fn publish(&mut self, map: &str, item: &Item) -> anyhow::Result<bool> {
        let ttl_ms = item.ttl.map_or(0, |ttl| (ttl.as_millis() as u64).max(1));
        let keys = ["items", "expiries", "log"].map(|part| self.map_key(map, part));
        let fill = |command: &mut Cmd| {
            command.arg(keys.len()).arg(&keys[..]);
            command
                .arg(&item.name)
                .arg(&item.stamp)
                .arg(&item.value)
                .arg(ttl_ms);
        };
        let news: u64 = PUBLISH.run(&mut self.connection, fill).await?;
        Ok(news == 1)
    }

    /// What a map was born as: another text after the store lost its data. `fresh` names a new one.
    ///
    /// # Errors
    /// The store does not answer.
    pub async fn birth(&mut self, map: &str, fresh: &str) -> anyhow::Result<String> {
        let key = self.map_key(map, "birth");
        let unique = format!("{fresh}-{:x}", crate::net::clock::monotonic_ns());
        let mut command = redis::cmd("SET");
        command.arg(&key).arg(unique).arg("NX");
        let _: Option<String> = command.query_async(&mut self.connection).await?;
        Ok(redis::cmd("GET")
            .arg(&key)
            .query_async(&mut self.connection)
            .await?)
    }

    fn map_key(&self, map: &str, part: &str) -> String {
        format!("{{{}:{map}}}:{part}", self.prefix)
    }

    /// Where a map's log ends now.
    ///
    /// # Errors
    /// The store does not answer.
    pub async fn log_end(&mut self, map: &str) -> anyhow::Result<String> {
        let mut command = redis::cmd("XREVRANGE");
        command
            .arg(self.map_key(map, "log"))
            .arg("+")
            .arg("-")
            .arg("COUNT")
            .arg(1);
        let last: Vec<(String, Vec<String>)> = command.query_async(&mut self.connection).await?;
        Ok(last.into_iter().next().map_or_else(|| "0-0".into(), |(id, _)| id))
    }

    /// The names of items that changed behind a place of the log, and where the log ends now. `None`: the log does not go
    /// back to that place any more, or is another one; what changed is not known.
    ///
    /// # Errors
    /// The store does not answer.
    pub async fn changed_since(
        &mut self,
        map: &str,
        place: &str,
    ) -> anyhow::Result<Option<(Vec<String>, String)>> {
        let entries = self.log(map, &behind(place), CHANGES_PER_CALL).await?;
        if entries.is_empty() {
            return Ok(Some((Vec::new(), place.to_owned())));
        }
        // Looked for afterwards: what was cut off before then was read, or this shows it.
        let first = self.log(map, "-", 1).await?;
        if first.first().is_none_or(|(id, _)| log_id(id) > log_id(place)) {
            return Ok(None);
        }
        let end = entries
            .last()
            .map_or_else(|| place.to_owned(), |(id, _)| id.clone());
        let mut names: Vec<String> = entries
            .into_iter()
            .filter_map(|(_, fields)| fields.into_iter().nth(1))
            .collect();
        names.sort_unstable();
        names.dedup();
        Ok(Some((names, end)))
    }

    /// Entries of a map's log from a place on.
    async fn log(&mut self, map: &str, from: &str, most: usize) -> RedisResult<Vec<(String, Vec<String>)>> {
        let mut command = redis::cmd("XRANGE");
        let key = self.map_key(map, "log");
        command.arg(key).arg(from).arg("+").arg("COUNT").arg(most);
        command.query_async(&mut self.connection).await
    }

    /// Items by their names; those that have gone are left out.
    ///
    /// # Errors
    /// The store does not answer.
    pub async fn items(&mut self, map: &str, names: &[String], unix_ms: u64) -> anyhow::Result<Vec<Item>> {
        if names.is_empty() {
            return Ok(Vec::new());
        }
        let mut command = redis::cmd("HMGET");
        command.arg(self.map_key(map, "items")).arg(names);
        let values: Vec<Option<String>> = command.query_async(&mut self.connection).await?;
        let entries = names.iter().zip(values);
        Ok(entries
            .filter_map(|(name, value)| parse_item(name, &value?, unix_ms))
            .collect())
    }

    /// A part of all items, and where to go on; 0: at the end. An item may come twice.
    ///
    /// # Errors
    /// The store does not answer.
    pub async fn scan(&mut self, map: &str, cursor: u64, unix_ms: u64) -> anyhow::Result<(u64, Vec<Item>)> {
        let mut command = redis::cmd("HSCAN");
        command
            .arg(self.map_key(map, "items"))
            .arg(cursor)
            .arg("COUNT")
            .arg(CHANGES_PER_CALL);
        let (cursor, flat): (u64, Vec<String>) = command.query_async(&mut self.connection).await?;
        let items = flat
            .chunks_exact(2)
            .filter_map(|pair| parse_item(&pair[0], &pair[1], unix_ms))
            .collect();
        Ok((cursor, items))
    }
}

/// An entry's place in the log, to be compared.
fn log_id(place: &str) -> (u64, u64) {
    let (ms, number) = place.split_once('-').unwrap_or(("0", "0"));
    (ms.parse().unwrap_or(0), number.parse().unwrap_or(0))
}

/// The first place behind one of the log. (Servers before 6.2 do not know `(`.)
fn behind(place: &str) -> String {
    match log_id(place) {
        (ms, u64::MAX) => format!("{}-0", ms.saturating_add(1)),
        (ms, number) => format!("{ms}-{}", number + 1),
    }
}

/// `stamp expiry value`; `None` when it has expired or is of another form.
fn parse_item(name: &str, text: &str, unix_ms: u64) -> Option<Item> {
    let (stamp, rest) = text.split_once(' ')?;
    let (expiry, value) = rest.split_once(' ')?;
    let expiry_ms: u64 = expiry.parse().ok()?;
    if expiry_ms > 0 && expiry_ms <= unix_ms {
        return None;
    }
    Some(Item {
        name: name.into(),
        stamp: stamp.into(),
        value: value.into(),
        ttl: (expiry_ms > 0).then(|| Duration::from_millis(expiry_ms - unix_ms)),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn items_are_read_and_expire() {
        let item = parse_item("a", "00ff-h 1500 some value", 1_000).expect("an item");
        assert_eq!(
            (item.stamp.as_str(), item.value.as_str()),
            ("00ff-h", "some value")
        );
        assert_eq!(item.ttl, Some(Duration::from_millis(500)));
        assert_eq!(parse_item("a", "s 1500 v", 1_500), None);
        assert_eq!(parse_item("a", "s 0 ", 1_500).expect("for ever").ttl, None);
        for garbage in ["", "s", "s 1", "s x v"] {
            assert_eq!(parse_item("a", garbage, 0), None, "{garbage}");
        }
    }

    #[test]
    fn the_place_behind_one_of_the_log() {
        assert_eq!(behind("0-0"), "0-1");
        assert_eq!(behind("17-3"), "17-4");
        assert_eq!(behind(&format!("17-{}", u64::MAX)), "18-0");
        assert_eq!(behind("garbage"), "0-1");
        assert!(log_id("9-100") < log_id("10-0"), "by number, not as text");
    }
}
