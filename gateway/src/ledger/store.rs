//! `usage.db`: sums by day and group, and how far each segment is in them.
//!
//! Both change in one transaction, so that a record is counted once wherever the process dies. The
//! database can be made anew from the segments that are kept: remove it while the gateway is stopped.

use std::{
    collections::HashMap,
    fs::OpenOptions,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, bail};
use rusqlite::{Connection, OpenFlags, Transaction, TransactionBehavior, params};

use super::{
    segment::Name,
    totals::{Counters, Group, OTHER, Sums},
};
use crate::{bounds::ROLLUP_ROWS_PER_DAY_MAX, dialect::Api};

/// Name of the database in the state directory.
pub const FILE: &str = "usage.db";

/// Version of the tables, `PRAGMA user_version`.
const TABLES_VERSION: i64 = 2;

/// How long a lock that another process holds (a backup, an operator's shell) is waited for.
const BUSY_TIMEOUT: Duration = Duration::from_secs(1);

const TABLES: &str = "
CREATE TABLE segment (
    core     INTEGER NOT NULL,
    seq      INTEGER NOT NULL,
    id       INTEGER NOT NULL, -- of the segment's header
    position INTEGER NOT NULL, -- bytes from the start that are in the rollup
    done     INTEGER NOT NULL, -- 1: nothing more will come
    PRIMARY KEY (core, seq)
) STRICT, WITHOUT ROWID;
-- Segments of a core up to this one are in the rollup and may be gone.
CREATE TABLE removed (
    core INTEGER PRIMARY KEY,
    seq  INTEGER NOT NULL
) STRICT;
";

const ROLLUP: &str = "
CREATE TABLE rollup (
    day                   INTEGER NOT NULL, -- days since 1970-01-01, UTC
    key                   TEXT NOT NULL,
    team                  TEXT NOT NULL,
    organization          TEXT NOT NULL,
    user                  TEXT NOT NULL,
    model                 TEXT NOT NULL,
    provider              TEXT NOT NULL,
    upstream_model        TEXT NOT NULL,
    api                   INTEGER NOT NULL,
    requests              INTEGER NOT NULL,
    completed             INTEGER NOT NULL,
    client_gone           INTEGER NOT NULL,
    failed                INTEGER NOT NULL,
    estimated             INTEGER NOT NULL,
    prompt_tokens         INTEGER NOT NULL,
    cached_tokens         INTEGER NOT NULL,
    completion_tokens     INTEGER NOT NULL,
    reasoning_tokens      INTEGER NOT NULL,
    cache_write_5m_tokens INTEGER NOT NULL,
    cache_write_1h_tokens INTEGER NOT NULL,
    cost_nano_usd         INTEGER NOT NULL, -- of the records whose price is known
    unpriced              INTEGER NOT NULL, -- records whose price is not
    bytes_in              INTEGER NOT NULL,
    bytes_out             INTEGER NOT NULL,
    PRIMARY KEY (day, key, team, organization, user, model, provider, upstream_model, api)
) STRICT, WITHOUT ROWID;
";

/// From version 1, which knew neither users nor money.
const FROM_1: &str = "
INSERT INTO rollup (day, key, team, organization, user, model, provider, upstream_model, api, requests, completed,
    client_gone, failed, estimated, prompt_tokens, cached_tokens, completion_tokens, reasoning_tokens,
    cache_write_5m_tokens, cache_write_1h_tokens, cost_nano_usd, unpriced, bytes_in, bytes_out)
SELECT day, key, team, '', '', model, provider, upstream_model, api, requests, completed,
    client_gone, failed, estimated, prompt_tokens, cached_tokens, completion_tokens, reasoning_tokens,
    0, 0, 0, requests, bytes_in, bytes_out FROM rollup_1;
DROP TABLE rollup_1;
";

/// Columns that tell one row of the rollup from others.
const LABELS: [&str; 9] = [
    "day",
    "key",
    "team",
    "organization",
    "user",
    "model",
    "provider",
    "upstream_model",
    "api",
];

/// How far a segment is in the rollup.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Position {
    pub name: Name,
    /// Of the segment's header: a position counts for no other file of the same name.
    pub id: u64,
    /// Bytes from the segment's start.
    pub bytes: usize,
    /// Whether nothing more will come.
    pub done: bool,
}

/// What the database knows of all segments.
#[derive(Debug, Default, Clone)]
pub struct Positions {
    by_name: HashMap<Name, Position>,
    removed: HashMap<u32, u64>,
}

impl Positions {
    /// How far the segment is. One that was done and removed is done, wherever its file may still be.
    pub fn of(&self, name: Name, id: u64) -> Position {
        if self.removed.get(&name.core).is_some_and(|seq| name.seq <= *seq) {
            let bytes = usize::MAX;
            return Position {
                name,
                id,
                bytes,
                done: true,
            };
        }
        match self.by_name.get(&name) {
            Some(position) if position.id == id => *position,
            _ => Position {
                name,
                id,
                bytes: 0,
                done: false,
            },
        }
    }

    /// All segments that were not removed.
    pub fn known(&self) -> impl Iterator<Item = &Position> {
        self.by_name.values()
    }

    /// Whether the segment was done and could be removed.
    pub fn removed(&self, name: Name) -> bool {
        self.removed.get(&name.core).is_some_and(|seq| name.seq <= *seq)
    }

    /// Whether nothing more will come from a segment of this name.
    pub fn done(&self, name: Name) -> bool {
        self.by_name.get(&name).is_some_and(|position| position.done)
    }

    /// The greatest sequence number known of a core.
    pub fn seq_max(&self, core: u32) -> u64 {
        let known = self
            .by_name
            .keys()
            .filter(|name| name.core == core)
            .map(|name| name.seq);
        known.chain(self.removed.get(&core).copied()).max().unwrap_or(0)
    }
}

/// The database, open for writing.
#[derive(Debug)]
pub struct Store {
    connection: Connection,
    /// Rows in the rollup of the days that were added to lately.
    rows_of_day: HashMap<u32, u64>,
    /// Ends [`Store::fold`] just before its commit, as a crash would.
    #[cfg(test)]
    pub fail_before_commit: bool,
}

impl Store {
    /// Opens the database in `state`, or makes it (mode 0600).
    ///
    /// # Errors
    /// Where it cannot be opened, is damaged, or is of a newer gateway.
    pub fn open(state: &Path) -> anyhow::Result<Store> {
        let path = state.join(FILE);
        // SQLite gives its side files the mode of the main file, which must thus be right from the start.
        OpenOptions::new()
            .append(true)
            .create(true)
            .mode(0o600)
            .open(&path)
            .with_context(|| format!("cannot open {}", path.display()))?;
        let connection = prepare(&path).with_context(|| {
            let path = path.display();
            format!("cannot use {path} (moved away, it is made again from the segments that are kept)")
        })?;
        Ok(Store {
            connection,
            rows_of_day: HashMap::new(),
            #[cfg(test)]
            fail_before_commit: false,
        })
    }

    /// Adds `sums` to the rollup and sets `positions`, all or nothing.
    pub fn fold(&mut self, sums: &Sums, positions: &[Position]) -> rusqlite::Result<()> {
        let transaction = self
            .connection
            .transaction_with_behavior(TransactionBehavior::Immediate)?;
        // What a transaction that fails has counted is counted anew by the next.
        let mut rows_of_day = std::mem::take(&mut self.rows_of_day);
        add_sums(&transaction, sums, &mut rows_of_day)?;
        for position in positions {
            transaction
                .prepare_cached(
                    "INSERT OR REPLACE INTO segment (core, seq, id, position, done) VALUES (?, ?, ?, ?, ?)",
                )?
                .execute(params![
                    position.name.core,
                    to_sql(position.name.seq),
                    position.id as i64,
                    position.bytes as i64,
                    position.done
                ])?;
        }
        #[cfg(test)]
        if self.fail_before_commit {
            return Err(rusqlite::Error::QueryReturnedNoRows);
        }
        transaction.commit()?;
        // Days do not come back but when a clock was set: two are counted at most times.
        if rows_of_day.len() <= 8 {
            self.rows_of_day = rows_of_day;
        }
        Ok(())
    }

    /// Removes the sums of the oldest day that is older than `day_min`, one at a time: a clock that is far ahead for a
    /// moment must not take the books with it. True where there was one.
    pub fn forget_a_day(&mut self, day_min: u32) -> rusqlite::Result<bool> {
        let removed = self.connection.execute(
            "DELETE FROM rollup WHERE day < ?1 AND day = (SELECT min(day) FROM rollup)",
            [day_min],
        )?;
        Ok(removed > 0)
    }

    /// Notes, durably, that a segment and all before it of its core are in the rollup for good. Its
    /// file may be removed when this has returned.
    pub fn remove(&mut self, name: Name) -> rusqlite::Result<()> {
        // The file must not be gone from the disk before the sums are on it: this commit, and with it
        // the write-ahead log's earlier ones, is synced.
        self.connection.pragma_update(None, "synchronous", "FULL")?;
        let result = (|| {
            let transaction = self
                .connection
                .transaction_with_behavior(TransactionBehavior::Immediate)?;
            transaction.execute(
                "INSERT INTO removed (core, seq) VALUES (?1, ?2) ON CONFLICT (core) DO UPDATE SET seq = max(seq, ?2)",
                params![name.core, to_sql(name.seq)],
            )?;
            transaction.execute(
                "DELETE FROM segment WHERE core = ? AND seq <= ?",
                params![name.core, to_sql(name.seq)],
            )?;
            transaction.commit()
        })();
        self.connection.pragma_update(None, "synchronous", "NORMAL")?;
        result
    }

    /// How far the segments are.
    pub fn positions(&self) -> rusqlite::Result<Positions> {
        positions(&self.connection)
    }

    /// The sums of all groups.
    #[cfg(test)]
    pub fn rollup(&self) -> rusqlite::Result<Vec<(Group, Counters)>> {
        rollup(&self.connection, 0)
    }
}

/// Positions and sums of one moment.
pub type Snapshot = (Positions, Vec<(Group, Counters)>);

/// Positions and sums of one moment, of days from `day_min` on. Works while a gateway writes, and
/// when none runs; `None` where there is no database yet.
pub fn snapshot(state: &Path, day_min: u32) -> anyhow::Result<Option<Snapshot>> {
    let path: PathBuf = state.join(FILE);
    if !path
        .try_exists()
        .with_context(|| format!("cannot look for {}", path.display()))?
    {
        return Ok(None);
    }
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let read = || -> rusqlite::Result<_> {
        let mut connection = Connection::open_with_flags(&path, flags)?;
        connection.busy_timeout(BUSY_TIMEOUT)?;
        let transaction = connection.transaction()?;
        // A gateway that has just begun may not have made the tables yet.
        let tables: i64 = transaction.pragma_query_value(None, "user_version", |row| row.get(0))?;
        if tables == 0 {
            return Ok(None);
        }
        if tables != TABLES_VERSION {
            return Ok(Some((tables, Positions::default(), Vec::new())));
        }
        Ok(Some((
            tables,
            positions(&transaction)?,
            rollup(&transaction, day_min)?,
        )))
    };
    match read().with_context(|| format!("cannot read {}", path.display()))? {
        Some((tables, ..)) if tables > TABLES_VERSION => bail!(newer(tables)),
        Some((tables, ..)) if tables < TABLES_VERSION => bail!(
            "the database is of an older gateway (tables {tables}); the next start of the gateway brings it to {TABLES_VERSION}"
        ),
        Some((_, positions, rollup)) => Ok(Some((positions, rollup))),
        None => Ok(None),
    }
}

fn newer(version: i64) -> String {
    format!("the database is of a newer gateway (tables {version}, known here: {TABLES_VERSION})")
}

fn prepare(path: &Path) -> anyhow::Result<Connection> {
    let mut connection = Connection::open(path)?;
    connection.busy_timeout(BUSY_TIMEOUT)?;
    connection.pragma_update(None, "journal_mode", "WAL")?;
    // A power cut may then undo the last transactions, sums and positions together; what they had
    // folded is folded again.
    connection.pragma_update(None, "synchronous", "NORMAL")?;
    let version: i64 = connection.pragma_query_value(None, "user_version", |row| row.get(0))?;
    match version {
        TABLES_VERSION => {}
        0 | 1 => {
            let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
            if version == 0 {
                transaction.execute_batch(TABLES)?;
                transaction.execute_batch(ROLLUP)?;
            } else {
                transaction.execute_batch("ALTER TABLE rollup RENAME TO rollup_1")?;
                transaction.execute_batch(ROLLUP)?;
                transaction.execute_batch(FROM_1)?;
            }
            transaction.pragma_update(None, "user_version", TABLES_VERSION)?;
            transaction.commit()?;
        }
        _ => bail!(newer(version)),
    }
    Ok(connection)
}

/// Adds sums to their rows. A day's rows are bounded: what would be one too many is added to that of the user `other`.
fn add_sums(
    transaction: &Transaction<'_>,
    sums: &Sums,
    rows_of_day: &mut HashMap<u32, u64>,
) -> rusqlite::Result<()> {
    if sums.groups().is_empty() {
        return Ok(());
    }
    let mut known = transaction.prepare_cached(&known_statement())?;
    let mut count = transaction.prepare_cached("SELECT count(*) FROM rollup WHERE day = ?")?;
    let mut add = transaction.prepare_cached(&add_statement())?;
    for (group, counters) in sums.groups() {
        bind_labels(&mut known, group, &group.user)?;
        let is_known = known.raw_query().next()?.is_some();
        let mut user = group.user.as_str();
        if !is_known {
            let rows = match rows_of_day.get(&group.day) {
                Some(rows) => *rows,
                None => count
                    .query_row([group.day], |row| row.get::<_, i64>(0))
                    .map(from_sql)?,
            };
            if rows >= ROLLUP_ROWS_PER_DAY_MAX && !user.is_empty() {
                user = OTHER;
            } else {
                rows_of_day.insert(group.day, rows + 1);
            }
        }
        let first = bind_labels(&mut add, group, user)?;
        for (place, value) in (first..).zip(counters.to_array()) {
            add.raw_bind_parameter(place, to_sql(value))?;
        }
        add.raw_execute()?;
    }
    Ok(())
}

/// Binds the labels of a group to the first parameters; returns the next one's number.
fn bind_labels(
    statement: &mut rusqlite::CachedStatement<'_>,
    group: &Group,
    user: &str,
) -> rusqlite::Result<usize> {
    let names = [
        group.key.as_str(),
        &group.team,
        &group.organization,
        user,
        &group.model,
        &group.provider,
        &group.upstream_model,
    ];
    statement.raw_bind_parameter(1, group.day)?;
    for (place, name) in names.iter().enumerate() {
        statement.raw_bind_parameter(2 + place, name)?;
    }
    statement.raw_bind_parameter(2 + names.len(), group.api as u8)?;
    Ok(3 + names.len())
}

fn known_statement() -> String {
    let labels = LABELS.map(|label| format!("{label} = ?"));
    format!("SELECT 1 FROM rollup WHERE {}", labels.join(" AND "))
}

/// Adds without overflow: an integer that overflows would become a floating point number.
fn add_statement() -> String {
    let names = Counters::NAMES;
    let values = vec!["?"; LABELS.len() + Counters::COUNT].join(", ");
    let sums = names.map(|name| {
        format!(
            "{name} = min({name}, {} - excluded.{name}) + excluded.{name}",
            i64::MAX
        )
    });
    format!(
        "INSERT INTO rollup ({}, {}) VALUES ({values}) ON CONFLICT DO UPDATE SET {}",
        LABELS.join(", "),
        names.join(", "),
        sums.join(", ")
    )
}

fn positions(connection: &Connection) -> rusqlite::Result<Positions> {
    let mut positions = Positions::default();
    let mut statement = connection.prepare("SELECT core, seq, id, position, done FROM segment")?;
    let mut rows = statement.query([])?;
    while let Some(row) = rows.next()? {
        let name = Name {
            core: row.get(0)?,
            seq: from_sql(row.get(1)?),
        };
        let position = Position {
            name,
            id: row.get::<_, i64>(2)? as u64,
            bytes: from_sql(row.get(3)?) as usize,
            done: row.get(4)?,
        };
        positions.by_name.insert(name, position);
    }
    let mut statement = connection.prepare("SELECT core, seq FROM removed")?;
    let mut rows = statement.query([])?;
    while let Some(row) = rows.next()? {
        positions.removed.insert(row.get(0)?, from_sql(row.get(1)?));
    }
    Ok(positions)
}

fn rollup(connection: &Connection, day_min: u32) -> rusqlite::Result<Vec<(Group, Counters)>> {
    let query = format!(
        "SELECT {}, {} FROM rollup WHERE day >= ?",
        LABELS.join(", "),
        Counters::NAMES.join(", ")
    );
    let mut statement = connection.prepare(&query)?;
    let mut rows = statement.query([day_min])?;
    let mut groups = Vec::new();
    while let Some(row) = rows.next()? {
        // An api that this gateway does not know can only be of a newer one.
        let api = Api::from_u8(row.get(8)?)
            .ok_or_else(|| rusqlite::Error::IntegralValueOutOfRange(8, row.get(8).unwrap_or(-1)))?;
        let group = Group {
            day: row.get(0)?,
            key: row.get(1)?,
            team: row.get(2)?,
            organization: row.get(3)?,
            user: row.get(4)?,
            model: row.get(5)?,
            provider: row.get(6)?,
            upstream_model: row.get(7)?,
            api,
        };
        let mut values = [0; Counters::COUNT];
        for (index, value) in values.iter_mut().enumerate() {
            *value = from_sql(row.get(LABELS.len() + index)?);
        }
        groups.push((group, Counters::from_array(values)));
    }
    Ok(groups)
}

/// SQLite's integers are signed.
fn to_sql(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

fn from_sql(value: i64) -> u64 {
    u64::try_from(value).unwrap_or(0)
}

#[cfg(test)]
mod tests;
