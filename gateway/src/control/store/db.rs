//! `control.db`: documents, the audit log, times of last use.

use std::{fs::OpenOptions, os::unix::fs::OpenOptionsExt, path::Path, time::Duration};

use anyhow::{Context, bail};
use rusqlite::{Connection, OpenFlags, OptionalExtension, params};

pub use log::Entry;

use super::{
    Failure,
    model::{Change, Changed, Doc, Kind, Stamp},
};
use crate::{config::sha256_hex, net::clock};

/// Name of the database in the state directory.
pub const FILE: &str = "control.db";

/// How long a lock that another process holds (a backup, an operator's shell) is waited for.
const BUSY_TIMEOUT: Duration = Duration::from_secs(1);

/// How long a deleted document's name is kept for other hosts that have not heard of it.
const TOMBSTONE_MS: u64 = 30 * 86_400_000;

/// Greatest stamp that is taken from another host, milliseconds: no clock shows a later one. A change that is made here of a
/// document with that very stamp has the next one, for which SQLite's integers have room; it stands on this host, and the
/// others refuse it.
const STAMP_MS_MAX: u64 = 1 << 62;

/// Each step takes the tables from one version, `PRAGMA user_version`, to the next. Steps are never changed.
const MIGRATIONS: [&str; 1] = ["
CREATE TABLE meta (name TEXT PRIMARY KEY, value ANY NOT NULL) STRICT, WITHOUT ROWID;
CREATE TABLE document (
    kind       INTEGER NOT NULL, -- model::Kind
    id         TEXT NOT NULL,
    name       TEXT NOT NULL,
    grp        TEXT NOT NULL,
    doc        TEXT,             -- JSON; NULL: deleted
    changed_ms INTEGER NOT NULL, -- stamp
    host       TEXT NOT NULL,    -- stamp
    version    INTEGER NOT NULL, -- of this database, rising
    PRIMARY KEY (kind, id)
) STRICT, WITHOUT ROWID;
CREATE INDEX document_name ON document (kind, name, id) WHERE doc IS NOT NULL;
CREATE INDEX document_group ON document (kind, grp, name) WHERE doc IS NOT NULL AND grp <> '';
CREATE UNIQUE INDEX document_version ON document (version);
-- Whose secret a hash is of.
CREATE TABLE secret (sha256 BLOB PRIMARY KEY, key TEXT NOT NULL) STRICT, WITHOUT ROWID;
CREATE TABLE used (key TEXT PRIMARY KEY, unix_ms INTEGER NOT NULL) STRICT, WITHOUT ROWID;
CREATE TABLE audit (
    seq     INTEGER PRIMARY KEY AUTOINCREMENT,
    unix_ms INTEGER NOT NULL,
    actor   TEXT NOT NULL,
    action  TEXT NOT NULL,
    kind    TEXT NOT NULL,
    id      TEXT NOT NULL,
    name    TEXT NOT NULL,
    detail  TEXT NOT NULL        -- JSON, without secrets
) STRICT;
"];

/// The database and what a transaction in it has changed so far.
pub struct Db {
    connection: Connection,
    host: String,
    /// Of the transaction that runs.
    changed: Vec<Changed>,
}

/// A document as it stands.
#[derive(Debug, Clone)]
pub struct Row<D> {
    pub doc: D,
    pub stamp: Stamp,
    /// Of this database.
    pub version: u64,
}

impl Db {
    /// Opens the database in `state`, or makes it (mode 0600).
    ///
    /// # Errors
    /// Where it cannot be opened, is damaged, or is of a newer gateway.
    pub fn open(state: &Path) -> anyhow::Result<Db> {
        let path = state.join(FILE);
        let open = || -> anyhow::Result<Connection> {
            // SQLite gives its side files the mode of the main file, which must thus be right from the start.
            OpenOptions::new()
                .append(true)
                .create(true)
                .mode(0o600)
                .open(&path)?;
            let mut connection = Connection::open_with_flags(
                &path,
                OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX,
            )?;
            connection.busy_timeout(BUSY_TIMEOUT)?;
            connection.pragma_update(None, "journal_mode", "WAL")?;
            connection.pragma_update(None, "synchronous", "FULL")?;
            migrate(&mut connection)?;
            Ok(connection)
        };
        let connection = open().with_context(|| format!("cannot open {}", path.display()))?;
        let host = host_id(&connection)?;
        let db = Db {
            connection,
            host,
            changed: Vec::new(),
        };
        db.forget_deleted()?;
        Ok(db)
    }

    /// This host's id, 16 hex digits.
    pub fn host(&self) -> &str {
        &self.host
    }

    fn forget_deleted(&self) -> anyhow::Result<()> {
        let before = clock::unix_ms().saturating_sub(TOMBSTONE_MS);
        self.connection.execute(
            "DELETE FROM document WHERE doc IS NULL AND changed_ms < ?1",
            [before],
        )?;
        Ok(())
    }

    /// Begins a transaction, in which several changes are tried.
    pub(super) fn begin(&mut self) -> Result<(), Failure> {
        self.changed.clear();
        Ok(self.connection.execute_batch("BEGIN IMMEDIATE")?)
    }

    /// Ends the transaction; gives what changed. After an error nothing has.
    pub(super) fn commit(&mut self) -> Result<Vec<Changed>, Failure> {
        let done = self.connection.execute_batch("COMMIT");
        if let Err(error) = done {
            self.abandon();
            return Err(error.into());
        }
        Ok(std::mem::take(&mut self.changed))
    }

    pub(super) fn abandon(&mut self) {
        self.changed.clear();
        // Where SQLite has rolled back by itself there is nothing to roll back, which is as good.
        let _ = self.connection.execute_batch("ROLLBACK");
    }

    /// Runs a change in a transaction of its own, without a thread and without followers.
    ///
    /// # Errors
    /// The change's own, or the database's; then nothing has changed.
    pub fn together<T>(&mut self, change: impl FnOnce(&mut Db) -> Result<T, Failure>) -> Result<T, Failure> {
        self.begin()?;
        match change(self) {
            Ok(value) => self.commit().map(|_| value),
            Err(failure) => {
                self.abandon();
                Err(failure)
            }
        }
    }

    /// Runs one change within the transaction: all of it, or nothing.
    pub(super) fn attempt<T>(
        &mut self,
        change: impl FnOnce(&mut Db) -> Result<T, Failure>,
    ) -> Result<T, Failure> {
        // A full or failing disk makes SQLite roll all back by itself. A savepoint would then begin a transaction of its
        // own, whose release would commit what nobody follows.
        if self.connection.is_autocommit() {
            return Err(Failure::broken(format!("{FILE}: the transaction was given up")));
        }
        let before = self.changed.len();
        self.connection.execute_batch("SAVEPOINT attempt")?;
        let result = change(self);
        if result.is_err() {
            self.changed.truncate(before);
            self.connection.execute_batch("ROLLBACK TO attempt")?;
        }
        self.connection.execute_batch("RELEASE attempt")?;
        result
    }

    /// A document that is not deleted.
    pub fn get<D: Doc>(&self, id: &str) -> Result<Option<Row<D>>, Failure> {
        let mut statement = self.connection.prepare_cached(
            "SELECT doc, changed_ms, host, version FROM document WHERE kind = ?1 AND id = ?2 AND doc IS NOT NULL",
        )?;
        let found = statement
            .query_row(params![D::KIND as i64, id], raw_row)
            .optional()?;
        found.map(Row::read).transpose()
    }

    /// The documents of this name; several where hosts named theirs alike before they heard of each other.
    pub fn named<D: Doc>(&self, name: &str) -> Result<Vec<Row<D>>, Failure> {
        self.rows(
            // Ordered by id, the planner would rather walk all documents by their primary key.
            "SELECT doc, changed_ms, host, version FROM document INDEXED BY document_name
             WHERE kind = ?1 AND name = ?2 AND doc IS NOT NULL ORDER BY id LIMIT 100",
            params![D::KIND as i64, name],
        )
    }

    /// Up to `max` documents behind this name and id, in their order; of one group, where that is not empty.
    pub fn list<D: Doc>(&self, group: &str, after: (&str, &str), max: usize) -> Result<Vec<Row<D>>, Failure> {
        let max = i64::try_from(max).unwrap_or(i64::MAX);
        if group.is_empty() {
            return self.rows(
                "SELECT doc, changed_ms, host, version FROM document
                 WHERE kind = ?1 AND doc IS NOT NULL AND (name, id) > (?2, ?3) ORDER BY name, id LIMIT ?4",
                params![D::KIND as i64, after.0, after.1, max],
            );
        }
        self.rows(
            "SELECT doc, changed_ms, host, version FROM document
             WHERE kind = ?1 AND doc IS NOT NULL AND grp <> '' AND grp = ?5 AND (name, id) > (?2, ?3)
             ORDER BY name, id LIMIT ?4",
            params![D::KIND as i64, after.0, after.1, max, group],
        )
    }

    fn rows<D: Doc>(&self, sql: &str, with: impl rusqlite::Params) -> Result<Vec<Row<D>>, Failure> {
        let mut statement = self.connection.prepare_cached(sql)?;
        let rows = statement.query_map(with, raw_row)?;
        rows.map(|row| Row::read(row?)).collect()
    }

    /// Shows every document of a kind, for the start.
    pub fn each<D: Doc>(&self, mut show: impl FnMut(D)) -> Result<(), Failure> {
        let mut statement = self
            .connection
            .prepare("SELECT doc FROM document WHERE kind = ?1 AND doc IS NOT NULL")?;
        let mut rows = statement.query([D::KIND as i64])?;
        while let Some(row) = rows.next()? {
            show(read(row.get_ref(0)?.as_str().map_err(rusqlite::Error::from)?)?);
        }
        Ok(())
    }

    /// How many documents there are of a kind. It is counted along: a million rows are not to be walked for it.
    pub fn count(&self, kind: Kind) -> Result<u64, Failure> {
        let mut statement = self
            .connection
            .prepare_cached("SELECT value FROM meta WHERE name = ?1")?;
        let name = format!("count of {}", kind.name());
        Ok(statement
            .query_row([name], |row| row.get(0))
            .optional()?
            .unwrap_or(0))
    }

    fn count_along<D>(&self, kind: Kind, old: &Option<D>, new: &Option<D>) -> Result<(), Failure> {
        let by = i64::from(new.is_some()) - i64::from(old.is_some());
        if by == 0 {
            return Ok(());
        }
        let mut statement = self.connection.prepare_cached(
            "INSERT INTO meta (name, value) VALUES (?1, ?2)
             ON CONFLICT (name) DO UPDATE SET value = value + excluded.value",
        )?;
        statement.execute(params![format!("count of {}", kind.name()), by])?;
        Ok(())
    }

    /// How many documents of a kind are in a group, counted up to `max`.
    pub fn count_group(&self, kind: Kind, group: &str, max: u64) -> Result<u64, Failure> {
        let mut statement = self.connection.prepare_cached(
            "SELECT count(*) FROM (SELECT 1 FROM document
             WHERE kind = ?1 AND doc IS NOT NULL AND grp <> '' AND grp = ?2 LIMIT ?3)",
        )?;
        Ok(statement.query_row(params![kind as i64, group, max], |row| row.get(0))?)
    }

    /// The sum of a budget's top-ups, nano-dollars.
    pub fn credit(&self, budget: &str) -> Result<i64, Failure> {
        let mut statement = self.connection.prepare_cached(
            "SELECT coalesce(sum(json_extract(doc, '$.nano_usd')), 0) FROM document
             WHERE kind = ?1 AND doc IS NOT NULL AND grp <> '' AND grp = ?2",
        )?;
        Ok(statement.query_row(params![Kind::TopUp as i64, budget], |row| row.get(0))?)
    }

    /// The version of a budget's last top-up; 0 without one.
    pub fn credit_version(&self, budget: &str) -> Result<u64, Failure> {
        let mut statement = self.connection.prepare_cached(
            "SELECT coalesce(max(version), 0) FROM document WHERE kind = ?1 AND doc IS NOT NULL AND grp <> '' AND grp = ?2",
        )?;
        Ok(statement.query_row(params![Kind::TopUp as i64, budget], |row| row.get(0))?)
    }

    /// Writes a document, under a stamp above the one it had.
    pub fn put<D: Doc>(&mut self, doc: &D) -> Result<(), Failure> {
        let text = serde_json::to_string(doc).map_err(|error| Failure::broken(error.to_string()))?;
        let stamp = self.next_stamp(D::KIND, &doc.id())?;
        self.write(D::KIND, &doc.id(), Some(&text), &stamp)
    }

    /// Deletes a document; what is left of it says so to other hosts.
    pub fn delete<D: Doc>(&mut self, id: &str) -> Result<(), Failure> {
        let stamp = self.next_stamp(D::KIND, id)?;
        self.write(D::KIND, id, None, &stamp)
    }

    fn stamp_of(&self, kind: Kind, id: &str) -> Result<Option<Stamp>, Failure> {
        let mut statement = self
            .connection
            .prepare_cached("SELECT changed_ms, host FROM document WHERE kind = ?1 AND id = ?2")?;
        let read = |row: &rusqlite::Row<'_>| {
            Ok(Stamp {
                unix_ms: row.get(0)?,
                host: row.get(1)?,
            })
        };
        Ok(statement.query_row(params![kind as i64, id], read).optional()?)
    }

    fn next_stamp(&self, kind: Kind, id: &str) -> Result<Stamp, Failure> {
        let before = self.stamp_of(kind, id)?.map_or(0, |stamp| stamp.unix_ms);
        Ok(Stamp {
            unix_ms: clock::unix_ms().max(before + 1),
            host: self.host.clone(),
        })
    }

    /// Takes over another host's change; false where it is not newer than what is here.
    ///
    /// # Errors
    /// The document is not understood, or its stamp leaves no room for later ones; or the database's.
    pub fn apply(&mut self, change: &Change) -> Result<bool, Failure> {
        if change.stamp.unix_ms > STAMP_MS_MAX {
            return Err(Failure::invalid("its stamp is no time"));
        }
        if self
            .stamp_of(change.kind, &change.id)?
            .is_some_and(|own| own >= change.stamp)
        {
            return Ok(false);
        }
        self.write(change.kind, &change.id, change.doc.as_deref(), &change.stamp)?;
        Ok(true)
    }

    fn write(&mut self, kind: Kind, id: &str, doc: Option<&str>, stamp: &Stamp) -> Result<(), Failure> {
        let (name, group) = self.note(kind, id, doc)?;
        let version = self.next_version()?;
        let mut put = self.connection.prepare_cached(
            "INSERT INTO document (kind, id, name, grp, doc, changed_ms, host, version)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)
             ON CONFLICT (kind, id) DO UPDATE SET name = excluded.name, grp = excluded.grp, doc = excluded.doc,
             changed_ms = excluded.changed_ms, host = excluded.host, version = excluded.version",
        )?;
        put.execute(params![
            kind as i64,
            id,
            name,
            group,
            doc,
            stamp.unix_ms,
            stamp.host,
            version
        ])?;
        drop(put);
        match kind {
            Kind::Budget => self.note_budget(id),
            Kind::TopUp => self.note_budget(id.split('\n').next().unwrap_or_default()),
            Kind::Key | Kind::Team => Ok(()),
        }
    }

    /// Remembers how a budget and its credit stand now, for the data plane.
    fn note_budget(&mut self, id: &str) -> Result<(), Failure> {
        let new = self.get(id)?.map(|row| row.doc);
        let credit = self.credit(id)?;
        let id = id.to_owned();
        self.changed.push(Changed::Budget { id, new, credit });
        Ok(())
    }

    /// Remembers a change for the data plane, keeps the table of secrets, and gives name and group of the new state.
    fn note(&mut self, kind: Kind, id: &str, doc: Option<&str>) -> Result<(String, String), Failure> {
        fn both<D: Doc>(db: &Db, id: &str, doc: Option<&str>) -> Result<(Option<D>, Option<D>), Failure> {
            let new: Option<D> = doc.map(read).transpose()?;
            if new.as_ref().is_some_and(|new| new.id() != id) {
                return Err(Failure::broken(format!("a document of another id than {id}")));
            }
            let old: Option<D> = db.get(id)?.map(|row| row.doc);
            db.count_along(D::KIND, &old, &new)?;
            Ok((old, new))
        }
        fn labels<D: Doc>(doc: Option<&D>) -> (String, String) {
            doc.map_or_else(Default::default, |doc| (doc.name().into(), doc.group().into()))
        }
        let labels = match kind {
            Kind::Key => {
                let (old, new) = both::<super::Key>(self, id, doc)?;
                self.swap_secrets(old.as_ref(), new.as_ref())?;
                let found = labels(new.as_ref());
                self.changed.push(Changed::Key { old, new });
                found
            }
            Kind::Team => {
                let (old, new) = both(self, id, doc)?;
                let found = labels(new.as_ref());
                self.changed.push(Changed::Team { old, new });
                found
            }
            Kind::Budget => labels(both::<super::Budget>(self, id, doc)?.1.as_ref()),
            Kind::TopUp => labels(both::<super::TopUp>(self, id, doc)?.1.as_ref()),
        };
        Ok(labels)
    }

    fn swap_secrets(&self, old: Option<&super::Key>, new: Option<&super::Key>) -> Result<(), Failure> {
        let hashes = |key: Option<&super::Key>| -> Vec<[u8; 32]> {
            let secrets = key.map(|key| key.secrets.as_slice()).unwrap_or_default();
            secrets
                .iter()
                .filter_map(|secret| crate::config::parse_sha256(&secret.sha256))
                .collect()
        };
        let mut remove = self
            .connection
            .prepare_cached("DELETE FROM secret WHERE sha256 = ?1")?;
        for hash in hashes(old) {
            remove.execute([&hash[..]])?;
        }
        let mut add = self
            .connection
            .prepare_cached("INSERT OR REPLACE INTO secret (sha256, key) VALUES (?1, ?2)")?;
        for hash in hashes(new) {
            let id = new.map(Doc::id).unwrap_or_default();
            add.execute(params![&hash[..], id])?;
        }
        Ok(())
    }

    /// Whose secret has this hash.
    pub fn owner(&self, hash: &[u8; 32]) -> Result<Option<String>, Failure> {
        let mut statement = self
            .connection
            .prepare_cached("SELECT key FROM secret WHERE sha256 = ?1")?;
        Ok(statement.query_row([&hash[..]], |row| row.get(0)).optional()?)
    }

    fn next_version(&self) -> Result<u64, Failure> {
        let mut statement = self.connection.prepare_cached(
            "INSERT INTO meta (name, value) VALUES ('version', 1)
             ON CONFLICT (name) DO UPDATE SET value = value + 1 RETURNING value",
        )?;
        Ok(statement.query_row([], |row| row.get(0))?)
    }

    /// The version of the last change; 0 before the first.
    pub fn version(&self) -> Result<u64, Failure> {
        let mut statement = self
            .connection
            .prepare_cached("SELECT value FROM meta WHERE name = 'version'")?;
        Ok(statement.query_row([], |row| row.get(0)).optional()?.unwrap_or(0))
    }

    /// Up to `max` documents that changed behind this version, in the order of their changes; of each only its last.
    pub fn changes_since(&self, version: u64, max: usize) -> Result<Vec<Change>, Failure> {
        let mut statement = self.connection.prepare_cached(
            "SELECT kind, id, doc, changed_ms, host, version FROM document WHERE version > ?1
             ORDER BY version LIMIT ?2",
        )?;
        let max = i64::try_from(max).unwrap_or(i64::MAX);
        let rows = statement.query_map(params![version, max], |row| {
            let stamp = Stamp {
                unix_ms: row.get(3)?,
                host: row.get(4)?,
            };
            Ok((row.get(0)?, row.get(1)?, row.get(2)?, stamp, row.get(5)?))
        })?;
        let mut changes = Vec::new();
        for row in rows {
            let (kind, id, doc, stamp, version): (i64, _, _, _, _) = row?;
            let Some(kind) = Kind::of(kind) else { continue };
            changes.push(Change {
                kind,
                id,
                doc,
                stamp,
                version,
            });
        }
        Ok(changes)
    }
}

type RawRow = (String, Stamp, u64);

fn raw_row(row: &rusqlite::Row<'_>) -> rusqlite::Result<RawRow> {
    let stamp = Stamp {
        unix_ms: row.get(1)?,
        host: row.get(2)?,
    };
    Ok((row.get(0)?, stamp, row.get(3)?))
}

impl<D: Doc> Row<D> {
    fn read((text, stamp, version): RawRow) -> Result<Row<D>, Failure> {
        Ok(Row {
            doc: read(&text)?,
            stamp,
            version,
        })
    }
}

fn read<D: Doc>(text: &str) -> Result<D, Failure> {
    serde_json::from_str(text).map_err(|error| {
        let what = D::KIND.name();
        Failure::broken(format!("a {what} in {FILE} is not understood: {error}"))
    })
}

fn migrate(connection: &mut Connection) -> anyhow::Result<()> {
    let version: i64 = connection.pragma_query_value(None, "user_version", |row| row.get(0))?;
    let known = MIGRATIONS.len() as i64;
    if !(0..=known).contains(&version) {
        bail!("its tables are of version {version}, made by a newer gateway; this one knows {known}");
    }
    for (step, sql) in MIGRATIONS.iter().enumerate().skip(version as usize) {
        let transaction = connection.transaction()?;
        transaction.execute_batch(sql)?;
        transaction.pragma_update(None, "user_version", step as i64 + 1)?;
        transaction.commit()?;
    }
    Ok(())
}

/// The host's id, made once.
fn host_id(connection: &Connection) -> anyhow::Result<String> {
    let mut random = [0; 32];
    getrandom::fill(&mut random).map_err(|error| anyhow::anyhow!("no random bytes: {error}"))?;
    let fresh = &sha256_hex(&random)[..16];
    connection.execute(
        "INSERT OR IGNORE INTO meta (name, value) VALUES ('host', ?1)",
        [fresh],
    )?;
    Ok(connection.query_row("SELECT value FROM meta WHERE name = 'host'", [], |row| row.get(0))?)
}

mod log;
#[cfg(test)]
mod tests;
