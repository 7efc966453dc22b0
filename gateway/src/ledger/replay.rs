//! At start: what earlier runs left in the journal is put into the sums.

use std::{
    collections::{BTreeMap, HashSet},
    fs::{self, File},
    io::{self, Read},
    path::{Path, PathBuf},
};

use anyhow::Context;

use super::{
    archive::{Archive, Kept},
    segment::{self, DAMAGED, FRAMES_AT, Found, Header, Name, TEMPORARY},
    store::{Position, Positions, Store},
    totals::Sums,
};
use crate::bounds::SEGMENT_BYTES;

/// What the replay found.
#[derive(Debug, Default)]
pub struct Replayed {
    pub archive: Archive,
    /// Greatest sequence number of each core that a file has or had.
    pub seq_max: BTreeMap<u32, u64>,
    /// Records put into the sums.
    pub records: u64,
    /// Places where no whole record stands.
    pub torn: u64,
    /// Segments with records whose file is gone, though it was not removed by a gateway.
    pub missing: u64,
}

/// Replays all segments of a journal that nobody writes to. May be stopped anywhere and begun anew.
pub fn replay(journal: &Path, store: &mut Store) -> anyhow::Result<Replayed> {
    remove_unfinished(journal)?;
    let positions = store.positions().context("cannot read usage.db")?;
    let mut replayed = Replayed::default();
    let mut present = HashSet::new();
    for (name, path) in
        segment::list(journal).with_context(|| format!("cannot list {}", journal.display()))?
    {
        let seq_max = replayed.seq_max.entry(name.core).or_default();
        *seq_max = name.seq.max(*seq_max);
        replay_segment(name, &path, &positions, store, &mut replayed)
            .with_context(|| format!("cannot replay {}", path.display()))?;
        present.insert(name);
    }
    for position in positions.known() {
        if !present.contains(&position.name) && position.bytes > FRAMES_AT {
            replayed.missing += 1;
            tracing::error!(
                file = position.name.file(),
                in_sums_bytes = position.bytes,
                "a journal segment is gone, removed by hand or set aside as damaged: its records can be neither shown nor \
                 exported, and what of it was not in the sums is lost"
            );
            // Said once; its number is not given again.
            let told = Position {
                bytes: 0,
                done: true,
                ..*position
            };
            store
                .fold(&Sums::default(), &[told])
                .context("cannot write usage.db")?;
        }
    }
    Ok(replayed)
}

/// The start of a segment file, never more than a segment's size.
pub fn read_segment(file: &File) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    file.take(SEGMENT_BYTES as u64).read_to_end(&mut bytes)?;
    Ok(bytes)
}

fn replay_segment(
    name: Name,
    path: &Path,
    positions: &Positions,
    store: &mut Store,
    replayed: &mut Replayed,
) -> anyhow::Result<()> {
    if positions.removed(name) {
        // Folded for good; the last run was stopped before it could remove the file.
        return Ok(fs::remove_file(path)?);
    }
    let file = File::options().read(true).write(true).open(path)?;
    let bytes = read_segment(&file)?;
    let Some(header) = Header::decode(&bytes).filter(|header| header.name == name) else {
        replayed.torn += 1;
        return set_aside(path);
    };
    let position = positions.of(name, header.id);
    if !position.done {
        let records = replayed.records;
        let found = fold(&bytes, header.id, position.bytes, path, replayed);
        let nothing = replayed.records == records && !found.torn;
        if position.bytes <= FRAMES_AT && nothing {
            // It was made ready and never used.
            return Ok(fs::remove_file(path)?);
        }
        if !found.torn {
            // Gives the unused rest back. It holds nothing but zeros.
            file.set_len(found.end.next_multiple_of(4096).min(bytes.len()) as u64)?;
        }
        file.sync_all()?;
        let done = Position {
            name,
            id: header.id,
            bytes: found.end,
            done: true,
        };
        store
            .fold(&found.sums, &[done])
            .context("cannot write usage.db")?;
    }
    replayed.archive.push(Kept {
        name,
        path: path.into(),
        bytes: file.metadata()?.len(),
        created_unix_ms: header.created_unix_ms,
    });
    Ok(())
}

struct Folded {
    sums: Sums,
    /// Where the last record ends.
    end: usize,
    torn: bool,
}

fn fold(bytes: &[u8], id: u64, position: usize, path: &Path, replayed: &mut Replayed) -> Folded {
    // After a power cut the sums may know more of a segment than the disk.
    let mut at = position.clamp(FRAMES_AT, bytes.len().next_multiple_of(64).max(FRAMES_AT));
    let mut folded = Folded {
        sums: Sums::default(),
        end: at,
        torn: false,
    };
    while let Some(found) = segment::next(bytes, id, &mut at) {
        match found {
            Found::Record(record) => {
                folded.sums.add(&record);
                folded.end = at;
                replayed.records += 1;
            }
            Found::Torn { offset } => {
                folded.torn = true;
                replayed.torn += 1;
                tracing::warn!(
                    file = %path.display(),
                    offset,
                    bytes = at.min(bytes.len()).saturating_sub(offset),
                    "the journal is damaged here: no whole record, reading on behind it"
                );
            }
        }
    }
    folded
}

/// Segments that a run was stopped in making.
fn remove_unfinished(journal: &Path) -> anyhow::Result<()> {
    for entry in fs::read_dir(journal).with_context(|| format!("cannot list {}", journal.display()))? {
        let path = entry?.path();
        if path.to_str().is_some_and(|path| path.ends_with(TEMPORARY)) {
            fs::remove_file(&path).with_context(|| format!("cannot remove {}", path.display()))?;
        }
    }
    Ok(())
}

/// Renames a segment whose header is gone, and with it the key to its checksums.
fn set_aside(path: &Path) -> anyhow::Result<()> {
    let mut aside = path.as_os_str().to_owned();
    aside.push(DAMAGED);
    tracing::error!(
        file = %path.display(),
        "the head of this journal segment is damaged: its records cannot be read; it is kept as *{DAMAGED}"
    );
    Ok(fs::rename(path, PathBuf::from(aside))?)
}
