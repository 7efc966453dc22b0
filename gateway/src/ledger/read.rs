//! Reading the books from outside: while a gateway runs, and when none does. Nothing is written.

use std::{
    collections::VecDeque,
    fs::File,
    io::{self, Seek},
    path::{Path, PathBuf},
};

use anyhow::{Context, bail};

pub use super::totals::{Counters, Group, day_of};
use super::{
    JOURNAL,
    record::{Record, RecordView},
    replay::read_segment,
    segment::{self, FRAMES_AT, Found, Header, Name},
    store,
    totals::Sums,
};

/// How often a reading is begun again because the gateway removed a segment meanwhile.
const ATTEMPTS_MAX: usize = 5;

/// A segment that is read, perhaps while a gateway writes to it.
#[derive(Debug)]
struct Cursor {
    file: File,
    bytes: Vec<u8>,
    id: u64,
    at: usize,
    /// Where the file was read anew because no whole record stood there.
    read_again_at: Option<usize>,
}

impl Cursor {
    /// Opens a segment. `None` where it is gone, or its header is damaged.
    fn open(name: Name, path: &Path) -> io::Result<Option<Cursor>> {
        let file = match File::open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let bytes = read_segment(&file)?;
        let header = Header::decode(&bytes).filter(|header| header.name == name);
        Ok(header.map(|header| Cursor {
            file,
            bytes,
            id: header.id,
            at: FRAMES_AT,
            read_again_at: None,
        }))
    }

    /// The next thing found. A read is no snapshot: it may have passed over the place of a record just
    /// before that was written, and yet have caught the record after it. So a place without a whole
    /// record is read once more before it is called torn.
    fn next(&mut self) -> io::Result<Option<Found<'_>>> {
        let mut at = self.at;
        if let Some(Found::Torn { offset }) = segment::next(&self.bytes, self.id, &mut at)
            && self.read_again_at != Some(offset)
        {
            self.read_again_at = Some(offset);
            self.file.rewind()?;
            self.bytes = read_segment(&self.file)?;
        }
        Ok(segment::next(&self.bytes, self.id, &mut self.at))
    }
}

/// All records of a state directory, by core and in the order in which each core wrote them. Those
/// not yet folded are among them; those of removed segments are not.
#[derive(Debug)]
pub struct Records {
    segments: VecDeque<(Name, PathBuf)>,
    current: Option<Cursor>,
    torn: u64,
}

/// [`Records::open`], for tests: without a readable journal there are no records, and the log says why.
pub fn records(state: &Path) -> impl Iterator<Item = Record> + use<> {
    Records::open(state).unwrap_or_else(|error| {
        tracing::error!(state = %state.display(), %error, "cannot read the journal");
        Records {
            segments: VecDeque::new(),
            current: None,
            torn: 0,
        }
    })
}

impl Records {
    /// Starts reading. Segments are opened one after the other; one that was removed meanwhile is
    /// passed over.
    pub fn open(state: &Path) -> io::Result<Records> {
        Ok(Records {
            segments: segment::list(&state.join(JOURNAL))?.into(),
            current: None,
            torn: 0,
        })
    }

    /// Places met so far where no whole record stands, unreadable segments included.
    pub fn torn(&self) -> u64 {
        self.torn
    }

    /// Calls `look` with each record until it returns false.
    ///
    /// # Errors
    /// Of reading the files.
    pub fn each(&mut self, mut look: impl FnMut(&RecordView<'_>) -> bool) -> io::Result<()> {
        loop {
            let Some(cursor) = &mut self.current else {
                let Some((name, path)) = self.segments.pop_front() else {
                    return Ok(());
                };
                self.current = Cursor::open(name, &path)?;
                continue;
            };
            match cursor.next()? {
                Some(Found::Record(record)) => {
                    if !look(&record) {
                        return Ok(());
                    }
                }
                Some(Found::Torn { .. }) => self.torn += 1,
                None => self.current = None,
            }
        }
    }
}

impl Iterator for Records {
    type Item = Record;

    fn next(&mut self) -> Option<Record> {
        let mut found = None;
        let read = self.each(|record| {
            found = Some(record.to_record());
            false
        });
        if let Err(error) = read {
            tracing::error!(%error, "cannot read the journal");
        }
        found
    }
}

/// Sums by group, of what is folded and of what is not yet.
#[derive(Debug, Default)]
pub struct Books {
    /// A group may be there twice.
    pub groups: Vec<(Group, Counters)>,
    /// Places without a whole record in what is not folded.
    pub torn: u64,
}

/// Reads the sums of days from `day_min` (days since the Unix epoch, UTC) on. Each record that was
/// appended before the call is counted exactly once, and some that are appended during it.
///
/// # Errors
/// Where the directory holds no ledger or cannot be read.
pub fn books(state: &Path, day_min: u32) -> anyhow::Result<Books> {
    let journal = state.join(JOURNAL);
    if !journal
        .try_exists()
        .with_context(|| format!("cannot look into {}", state.display()))?
    {
        bail!("{} holds no ledger", state.display());
    }
    for _ in 0..ATTEMPTS_MAX {
        if let Some(books) = attempt(state, &journal, day_min)? {
            return Ok(books);
        }
    }
    bail!("segments are removed faster than they can be read; raise `ledger.keep`");
}

/// Reads the books; `None` where a segment was removed before it could be opened.
fn attempt(state: &Path, journal: &Path, day_min: u32) -> anyhow::Result<Option<Books>> {
    let list = || segment::list(journal).with_context(|| format!("cannot list {}", journal.display()));
    // Listed before the sums are read, so that none with records that are not yet in them is missed;
    // and afterwards, for those that cores have begun since.
    let mut segments = list()?;
    let (positions, groups) = store::snapshot(state, day_min)?.unwrap_or_default();
    segments.extend(list()?);
    segments.sort();
    segments.dedup();
    let mut books = Books { groups, torn: 0 };
    let mut sums = Sums::default();
    for (name, path) in segments {
        if positions.removed(name) || positions.done(name) {
            continue;
        }
        let opened = Cursor::open(name, &path).with_context(|| format!("cannot read {}", path.display()))?;
        let Some(mut cursor) = opened else {
            if !path.exists() {
                return Ok(None);
            }
            books.torn += 1;
            continue;
        };
        cursor.at = positions.of(name, cursor.id).bytes.max(FRAMES_AT);
        while let Some(found) = cursor
            .next()
            .with_context(|| format!("cannot read {}", path.display()))?
        {
            match found {
                Found::Record(record) if day_of(record.time_unix_ms) >= day_min => sums.add(&record),
                Found::Record(_) => {}
                Found::Torn { .. } => books.torn += 1,
            }
        }
    }
    books.groups.extend(sums.into_groups());
    Ok(Some(books))
}
