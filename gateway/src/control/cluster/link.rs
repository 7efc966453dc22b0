//! The connection to the store: one server or a cluster, and what is asked of it.

use std::{collections::BTreeMap, sync::LazyLock, time::Duration};

use anyhow::Context;
use redis::{
    AsyncConnectionConfig, Client, Cmd, IntoConnectionInfo, Pipeline, RedisFuture, Script, ScriptInvocation,
    TlsCertificates, Value,
    aio::{ConnectionLike, MultiplexedConnection},
    cluster::ClusterClient,
    cluster_async::ClusterConnection,
};

use super::level::{Answer, Report, Times};
use crate::{config::schema::Store, quota::lease::Kind};

/// Parts that levels are spread over in a cluster: the levels of a part are in one slot, so that one call reports many.
pub const SHARDS: u64 = 16;

/// Levels in one call: it keeps the server busy for about a millisecond.
const LEVELS_PER_CALL: usize = 128;

/// An hour and 40 days, milliseconds: how long levels are kept that nothing is reported of.
const HOUR_MS: u64 = 3_600_000;
const MONTHS_MS: u64 = 40 * 24 * HOUR_MS;

/// Changes of a shared map that are read at once.
const CHANGES_PER_CALL: usize = 500;

static LEASE: LazyLock<Script> = LazyLock::new(|| Script::new(include_str!("lease.lua")));
static PUBLISH: LazyLock<Script> = LazyLock::new(|| Script::new(include_str!("publish.lua")));
static PRESENCE: LazyLock<Script> = LazyLock::new(|| Script::new(include_str!("presence.lua")));

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
        let mut call = PRESENCE.prepare_invoke();
        call.key(key).arg(host).arg(lease_ms);
        Ok(call.invoke_async(&mut self.connection).await?)
    }

    /// Reports and asks for leases; an answer for each report, in their order. `None`: its part of the store did not
    /// answer.
    ///
    /// # Errors
    /// No part of the store answered: the first error.
    pub async fn exchange(&self, reports: &[Report], times: Times) -> anyhow::Result<Vec<Option<Answer>>> {
        let mut answers = vec![None; reports.len()];
        let mut calls = tokio::task::JoinSet::new();
        for (shard, places) in by_shard(reports) {
            for places in places.chunks(LEVELS_PER_CALL) {
                let places = places.to_vec();
                let of_call: Vec<&Report> = places.iter().map(|place| &reports[*place]).collect();
                let call = self.invocation(shard, &of_call, times);
                let mut connection = self.connection.clone();
                calls.spawn(async move {
                    let lines = call.invoke_async::<Vec<Vec<u64>>>(&mut connection).await;
                    (places, lines)
                });
            }
        }
        let (mut first_error, mut any) = (None, reports.is_empty());
        while let Some(done) = calls.join_next().await {
            let (places, result) = done?;
            match result {
                Ok(lines) => {
                    any = true;
                    for (place, line) in places.into_iter().zip(&lines) {
                        answers[place] = answer(line);
                    }
                }
                Err(error) => first_error = first_error.or(Some(error)),
            }
        }
        match first_error {
            Some(error) if !any => Err(error.into()),
            _ => Ok(answers),
        }
    }

    fn invocation(&self, shard: u64, reports: &[&Report], times: Times) -> ScriptInvocation<'static> {
        let mut call = LEASE.prepare_invoke();
        call.arg(times.lease_us).arg(times.keep_us);
        for report in reports {
            call.key(format!("{{{}:{shard}}}:level:{:016x}", self.prefix, report.id));
            let window_us = |window_ns: u64| (window_ns / 1_000).max(1);
            let (kind, window, ttl_ms) = match report.kind {
                Kind::Bucket { window_ns } => ("b", window_us(window_ns), kept_ms(window_ns)),
                Kind::Sliding { window_ns } => ("s", window_us(window_ns), kept_ms(window_ns)),
                Kind::Period { end_unix_ms } => ("p", end_unix_ms, MONTHS_MS),
                Kind::Credit => ("c", 0, 0),
                Kind::Parallel => ("c", 0, HOUR_MS),
            };
            call.arg(&report.host)
                .arg(kind)
                .arg(report.amount)
                .arg(window)
                .arg(ttl_ms);
            call.arg(report.seq)
                .arg(report.spent)
                .arg(report.from_start)
                .arg(report.from_known);
            call.arg(report.birth)
                .arg(report.kept)
                .arg(report.wanted)
                .arg(report.needed);
        }
        call
    }

    /// Puts a state of an item into a shared map. False: a newer or the same one was there.
    ///
    /// # Errors
    /// The store does not answer.
    pub async fn publish(&mut self, map: &str, item: &Item) -> anyhow::Result<bool> {
        let ttl_ms = item.ttl.map_or(0, |ttl| (ttl.as_millis() as u64).max(1));
        let mut call = PUBLISH.prepare_invoke();
        for part in ["items", "expiries", "log"] {
            call.key(self.map_key(map, part));
        }
        call.arg(&item.name).arg(&item.stamp).arg(&item.value).arg(ttl_ms);
        let news: u64 = call.invoke_async(&mut self.connection).await?;
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

    /// The names of items that changed behind a place of the log, and where the log ends now.
    ///
    /// # Errors
    /// The store does not answer.
    pub async fn changed_since(&mut self, map: &str, place: &str) -> anyhow::Result<(Vec<String>, String)> {
        let mut command = redis::cmd("XRANGE");
        command
            .arg(self.map_key(map, "log"))
            .arg(format!("({place}"))
            .arg("+")
            .arg("COUNT")
            .arg(CHANGES_PER_CALL);
        let entries: Vec<(String, Vec<String>)> = command.query_async(&mut self.connection).await?;
        let end = entries
            .last()
            .map_or_else(|| place.to_owned(), |(id, _)| id.clone());
        let mut names: Vec<String> = entries
            .into_iter()
            .filter_map(|(_, fields)| fields.into_iter().nth(1))
            .collect();
        names.sort_unstable();
        names.dedup();
        Ok((names, end))
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

/// Places of reports by the part of the store that their levels are in.
fn by_shard(reports: &[Report]) -> BTreeMap<u64, Vec<usize>> {
    let mut shards: BTreeMap<u64, Vec<usize>> = BTreeMap::new();
    for (place, report) in reports.iter().enumerate() {
        shards.entry(report.id % SHARDS).or_default().push(place);
    }
    shards
}

/// How long a window's level is kept, milliseconds: until it is unused in any case.
fn kept_ms(window_ns: u64) -> u64 {
    (window_ns / 1_000_000 * 3).max(HOUR_MS)
}

fn answer(line: &[u64]) -> Option<Answer> {
    let &[accepted, out, free, used, hosts, reset_us, birth] = line else {
        return None;
    };
    Some(Answer {
        accepted: accepted == 1,
        out,
        free,
        used,
        hosts,
        reset_us,
        birth,
    })
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
    fn an_answer_of_another_form_is_none() {
        assert!(answer(&[1, 2, 3, 4, 5, 6, 7]).is_some_and(|answer| answer.accepted && answer.out == 2));
        assert_eq!(answer(&[1, 2]), None);
    }
}
