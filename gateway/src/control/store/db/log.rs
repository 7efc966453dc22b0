//! The audit log, and when keys were used.

use rusqlite::{OptionalExtension, params};

use super::Db;
use crate::{
    control::store::{Failure, model::Kind},
    net::clock,
};

/// Entries of the audit log; the oldest go. A change a minute for nearly two years.
pub const AUDIT_MAX: u64 = 1_000_000;

/// An entry of the audit log.
#[derive(Debug, Clone)]
pub struct Entry {
    pub seq: u64,
    pub unix_ms: u64,
    pub actor: String,
    pub action: String,
    pub kind: String,
    pub id: String,
    pub name: String,
    pub detail: serde_json::Value,
}

impl Db {
    /// Writes an entry of the audit log about a document. `detail` has no secrets.
    pub fn audit(
        &mut self,
        actor: &str,
        action: &str,
        kind: Kind,
        what: (&str, &str),
        detail: &serde_json::Value,
    ) -> Result<(), Failure> {
        self.audit_deed(actor, action, kind.name(), what, detail)
    }

    /// Writes an entry of the audit log, of a document or something else. `detail` has no secrets.
    pub fn audit_deed(
        &mut self,
        actor: &str,
        action: &str,
        kind: &str,
        (id, name): (&str, &str),
        detail: &serde_json::Value,
    ) -> Result<(), Failure> {
        let mut statement = self.connection.prepare_cached(
            "INSERT INTO audit (unix_ms, actor, action, kind, id, name, detail)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)",
        )?;
        statement.execute(params![
            clock::unix_ms(),
            actor,
            action,
            kind,
            id,
            name,
            detail.to_string()
        ])?;
        let seq = self.connection.last_insert_rowid();
        let mut trim = self
            .connection
            .prepare_cached("DELETE FROM audit WHERE seq <= ?1")?;
        trim.execute([seq - AUDIT_MAX as i64])?;
        Ok(())
    }

    /// Up to `max` entries of the audit log before this one, the newest first.
    pub fn audit_before(&self, before: u64, max: usize) -> Result<Vec<Entry>, Failure> {
        let mut statement = self.connection.prepare_cached(
            "SELECT seq, unix_ms, actor, action, kind, id, name, detail FROM audit
             WHERE seq < ?1 ORDER BY seq DESC LIMIT ?2",
        )?;
        let before = i64::try_from(before).unwrap_or(i64::MAX);
        let max = i64::try_from(max).unwrap_or(i64::MAX);
        let rows = statement.query_map(params![before, max], |row| {
            let detail: String = row.get(7)?;
            Ok(Entry {
                seq: row.get(0)?,
                unix_ms: row.get(1)?,
                actor: row.get(2)?,
                action: row.get(3)?,
                kind: row.get(4)?,
                id: row.get(5)?,
                name: row.get(6)?,
                detail: serde_json::from_str(&detail).unwrap_or_default(),
            })
        })?;
        Ok(rows.collect::<Result<_, _>>()?)
    }

    /// When a key was last used, as far as that was written down; milliseconds since 1970.
    pub fn used_ms(&self, key: &str) -> Result<Option<u64>, Failure> {
        let mut statement = self
            .connection
            .prepare_cached("SELECT unix_ms FROM used WHERE key = ?1")?;
        Ok(statement.query_row([key], |row| row.get(0)).optional()?)
    }

    /// All times of last use.
    pub fn each_used(&self, mut show: impl FnMut(String, u64)) -> Result<(), Failure> {
        let mut statement = self.connection.prepare("SELECT key, unix_ms FROM used")?;
        let mut rows = statement.query([])?;
        while let Some(row) = rows.next()? {
            show(row.get(0)?, row.get(1)?);
        }
        Ok(())
    }

    /// Writes times of last use. A power cut may take them.
    pub fn write_used(&mut self, used: &[(String, u64)]) -> Result<(), Failure> {
        self.connection.pragma_update(None, "synchronous", "NORMAL")?;
        let written = self.try_write_used(used);
        self.connection.pragma_update(None, "synchronous", "FULL")?;
        written
    }

    fn try_write_used(&mut self, used: &[(String, u64)]) -> Result<(), Failure> {
        let transaction = self.connection.transaction()?;
        {
            let mut statement = transaction.prepare_cached(
                "INSERT INTO used (key, unix_ms) VALUES (?1, ?2)
                 ON CONFLICT (key) DO UPDATE SET unix_ms = excluded.unix_ms",
            )?;
            for (key, unix_ms) in used {
                statement.execute(params![key, unix_ms])?;
            }
        }
        Ok(transaction.commit()?)
    }

    /// Forgets when a key was used.
    pub fn forget_used(&self, key: &str) -> Result<(), Failure> {
        let mut statement = self
            .connection
            .prepare_cached("DELETE FROM used WHERE key = ?1")?;
        statement.execute([key])?;
        Ok(())
    }
}
