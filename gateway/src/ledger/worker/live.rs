//! A segment that is not wholly folded and closed, as the ledger's thread sees it.

use std::{
    fs::{self, File},
    io::{self, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    sync::atomic::Ordering,
};

use anyhow::{Context, bail};

use crate::{
    ledger::{
        archive::Kept,
        journal::Shared,
        segment::{FRAMES_AT, Header, TEMPORARY},
        store::{Position, Store},
        totals::Sums,
    },
    net::mapped::View,
};

/// A segment that a core writes to, may write to, or that is not wholly folded.
#[derive(Debug)]
pub struct Live {
    pub header: Header,
    pub path: PathBuf,
    pub file: File,
    pub view: View,
    /// Bytes that are in the sums.
    pub folded: usize,
    /// Bytes that are on the disk.
    pub synced: usize,
    /// What was appended, where bringing it to the disk failed. Linux marks the pages of a failed write-back clean, so
    /// that the next `fdatasync` succeeds without having written them (LWN, "PostgreSQL's fsync() surprise", 2018) and they
    /// may be dropped: what is in memory now is written to a new file.
    pub rescued: Option<Vec<u8>>,
    /// The new file is in place of the old one.
    pub rewritten: bool,
}

impl Live {
    /// What was appended and can be trusted.
    pub fn bytes(&self) -> &[u8] {
        match &self.rescued {
            Some(bytes) => bytes,
            None => self.view.committed(),
        }
    }

    pub fn committed_bytes(&self) -> usize {
        self.bytes().len()
    }

    /// Brings what was appended to the disk. True where that took a new file.
    pub fn sync(&mut self, shared: &Shared, journal: &Path, fail: bool) -> anyhow::Result<bool> {
        if self.rewritten {
            return Ok(false);
        }
        if self.rescued.is_none() {
            let committed = self.view.committed_bytes();
            if committed <= self.synced {
                return Ok(false);
            }
            let result = match fail {
                true => Err(io::Error::from_raw_os_error(libc::EIO)),
                false => self.file.sync_data(),
            };
            let Err(error) = result else {
                self.synced = committed;
                return Ok(false);
            };
            // All of it, also what an earlier sync has brought to the disk: the new file holds the whole segment.
            self.rescued = Some(self.view.committed().to_vec());
            shared.leave.store(self.header.id, Ordering::Release);
            return Err(error).context("the file is given up, its records are written to a new one");
        }
        // In this order: once sealed, nothing comes any more.
        let sealed = self.view.sealed();
        let rescued = self.rescued.get_or_insert_default();
        let known = rescued.len();
        rescued.extend_from_slice(&self.view.committed()[known..]);
        if !sealed {
            bail!("the file failed; its core goes on to another one at its next tick");
        }
        self.rewrite(journal)?;
        Ok(true)
    }

    /// Writes what was rescued to a new file in place of the old one.
    fn rewrite(&mut self, journal: &Path) -> anyhow::Result<()> {
        let bytes = self.rescued.as_deref().unwrap_or_default();
        let unfinished = journal.join(self.header.name.file() + TEMPORARY);
        let write = || -> io::Result<File> {
            // What an attempt before this one left.
            match fs::remove_file(&unfinished) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
            let mut file = File::options()
                .write(true)
                .create_new(true)
                .mode(0o600)
                .open(&unfinished)?;
            file.write_all(bytes)?;
            file.set_len(bytes.len().next_multiple_of(4096) as u64)?;
            file.sync_all()?;
            fs::rename(&unfinished, &self.path)?;
            File::open(journal)?.sync_all()?;
            Ok(file)
        };
        self.file = write().with_context(|| format!("cannot write {}", unfinished.display()))?;
        self.synced = bytes.len();
        self.rewritten = true;
        Ok(())
    }

    pub fn position(&self, bytes: usize, done: bool) -> Position {
        Position {
            name: self.header.name,
            id: self.header.id,
            bytes,
            done,
        }
    }

    /// Closes a sealed, folded and synced segment. `None` for one that was never used: its file is gone.
    pub fn retire(&self, store: &mut Store) -> anyhow::Result<Option<Kept>> {
        if self.folded == FRAMES_AT {
            fs::remove_file(&self.path)?;
            return Ok(None);
        }
        let bytes = self.folded.next_multiple_of(4096) as u64;
        // The appender is gone, and the view is not asked for what lies behind.
        self.file.set_len(bytes)?;
        store.fold(&Sums::default(), &[self.position(self.folded, true)])?;
        Ok(Some(Kept {
            name: self.header.name,
            path: self.path.clone(),
            bytes,
            created_unix_ms: self.header.created_unix_ms,
        }))
    }
}
