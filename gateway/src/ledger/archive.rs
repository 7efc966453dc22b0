//! Folded segments, kept as the record of single requests up to `ledger.keep` bytes.

use std::{
    collections::{BTreeMap, VecDeque},
    fs, io,
    path::PathBuf,
};

use super::{segment::Name, store::Store};

/// A folded segment.
#[derive(Debug)]
pub struct Kept {
    pub name: Name,
    pub path: PathBuf,
    pub bytes: u64,
    pub created_unix_ms: u64,
}

/// All folded segments.
#[derive(Debug, Default)]
pub struct Archive {
    /// By core, in order of sequence.
    by_core: BTreeMap<u32, VecDeque<Kept>>,
    bytes: u64,
}

impl Archive {
    /// Adds a segment, newer than the others of its core.
    pub fn push(&mut self, kept: Kept) {
        self.bytes += kept.bytes;
        self.by_core.entry(kept.name.core).or_default().push_back(kept);
    }

    /// Size of all, bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Number of all.
    pub fn len(&self) -> usize {
        self.by_core.values().map(VecDeque::len).sum()
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = &Kept> {
        self.by_core.values().flatten()
    }

    /// Removes the oldest until at most `keep` bytes are left, or `may_go`, which is told the oldest's name and the size of
    /// all, says no; returns the names of the removed. Within a core the order is that of sequence numbers whatever the
    /// clock did, as [`Store::remove`] wants it.
    pub fn trim(
        &mut self,
        keep: u64,
        store: &mut Store,
        may_go: impl Fn(Name, u64) -> bool,
    ) -> anyhow::Result<Vec<Name>> {
        let mut removed = Vec::new();
        while self.bytes > keep {
            let fronts = self
                .by_core
                .iter()
                .filter_map(|(core, kept)| Some((*core, kept.front()?)));
            let Some((core, oldest)) = fronts.min_by_key(|(_, kept)| kept.created_unix_ms) else {
                break;
            };
            if !may_go(oldest.name, self.bytes) {
                break;
            }
            store.remove(oldest.name)?;
            removed.push(oldest.name);
            match fs::remove_file(&oldest.path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error.into()),
                _ => {}
            }
            self.bytes -= oldest.bytes;
            if let Some(kept) = self.by_core.get_mut(&core) {
                kept.pop_front();
            }
        }
        Ok(removed)
    }
}
