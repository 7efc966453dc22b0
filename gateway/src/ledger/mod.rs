//! The books: one record for every accepted request, in the journal before the answer's last byte
//! leaves.
//!
//! Each core appends to its own [`Journal`]: segment files, mapped, so that an append is a copy into
//! memory that outlives the process. One thread, the [`Ledger`]'s, makes the segments beforehand,
//! brings them to the disk, and folds them into the sums of `usage.db`. In the state directory:
//!
//! ```text
//! lock                       held by the running gateway, which wrote its process id into it
//! usage.db                   sums by day and group, and how far each segment is in them
//! export.json                how far records are delivered to the server of `ledger.export`
//! journal/0-0000000001.seg   records of core 0; kept, when folded, up to `ledger.keep` bytes
//! ```

mod archive;
mod export;
mod journal;
pub mod line;
pub mod prices;
pub mod read;
pub mod record;
mod replay;
mod segment;
mod store;
pub mod totals;
mod worker;

use std::{
    collections::BTreeMap,
    fs::{DirBuilder, File, OpenOptions, TryLockError},
    io::{self, Read, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError, atomic::Ordering, mpsc},
    thread::JoinHandle,
    time::Duration,
};

use anyhow::{Context, bail};

use self::{
    export::Exporter,
    segment::Name,
    totals::Totals,
    worker::{Command, Worker},
};
pub use self::{
    journal::{Full, Journal},
    segment::frame_bytes_max,
    totals::Counters,
};
use crate::config::schema;

/// Name of the journal's directory in the state directory.
const JOURNAL: &str = "journal";
/// Name of the file that the running gateway locks.
const LOCK: &str = "lock";

/// How long [`Ledger::flush`] waits.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(10);

/// The ledger's thread, as the control plane sees it. Dropping it folds and syncs what is there, and
/// ends the thread; drop the journals first, so that nothing comes later.
#[derive(Debug)]
pub struct Ledger {
    commands: mpsc::Sender<Command>,
    public: Arc<Public>,
    thread: Option<JoinHandle<()>>,
    /// Ends its thread when it is dropped.
    /// Ends after the ledger's thread, whose last fold it delivers.
    _exporter: Option<Exporter>,
    /// Keeps other gateways out until the last delivery is noted.
    _lock: File,
}

/// The state of the ledger.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize)]
pub struct LedgerStatus {
    /// Records appended since start.
    pub records: u64,
    /// Those of them that are in the sums.
    pub folded: u64,
    /// Records of earlier runs that were put into the sums at start.
    pub replayed: u64,
    /// Records for which the journal was full.
    pub refused: u64,
    /// Journal bytes that a power cut would take now.
    pub unsynced_bytes: u64,
    /// Segment files, those that wait included.
    pub segments: u64,
    /// Size of the folded segments that are kept.
    pub archive_bytes: u64,
    /// Places in segments where no whole record stands, found since start.
    pub torn: u64,
    /// Segments with records that the start did not find, though nobody but the gateway should remove them. Their folded
    /// part is in the sums; their records are gone.
    pub missing_segments: u64,
    /// Failed operations on files and the database since start. All but those on start are tried again.
    pub io_errors: u64,
    /// Segments whose file could not be synced and was written anew since start.
    pub rewritten: u64,
    /// Records delivered to the export's server since start; the same one may have come twice.
    pub exported: u64,
    /// Attempts to deliver that failed since start.
    pub export_failures: u64,
    /// Segments removed since start before they were delivered.
    pub export_lost_segments: u64,
    /// Journal bytes that are in the sums and not delivered yet.
    pub export_behind_bytes: u64,
    /// Why the export is behind: its last attempt failed.
    pub export_trouble: Option<String>,
    /// What fails now: the last attempt at it did, and it is tried again.
    pub trouble: Option<String>,
    /// The latest failure since start, perhaps long over.
    pub last_error: Option<String>,
}

/// What the ledger's thread shows.
#[derive(Debug, Default)]
struct Public {
    journals: Vec<Arc<journal::Shared>>,
    status: Mutex<LedgerStatus>,
    totals: Mutex<Totals>,
    /// For the export: segments, and how far each is folded, bytes.
    readable: Mutex<BTreeMap<Name, usize>>,
    /// For the export: how far each core is delivered.
    exported: Mutex<BTreeMap<u32, export::Reached>>,
    /// For the export: of each core the sequence number of this run's first segment.
    seq_next: BTreeMap<u32, u64>,
}

impl Public {
    fn lock_status(&self) -> MutexGuard<'_, LedgerStatus> {
        self.status.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn readable(&self) -> MutexGuard<'_, BTreeMap<Name, usize>> {
        self.readable.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn exported(&self) -> MutexGuard<'_, BTreeMap<u32, export::Reached>> {
        self.exported.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether all records of a segment to which nothing is added any more are delivered.
    fn is_exported(&self, name: Name) -> bool {
        let folded = self.readable().get(&name).copied().unwrap_or(0);
        let exported = self.exported();
        let reached = exported.get(&name.core);
        reached.is_some_and(|reached| (reached.seq, reached.at) >= (name.seq, folded))
    }
}

impl Ledger {
    /// Opens the state directory (making it, mode 0700), puts what an earlier run left into the
    /// sums, and returns one journal for each of `cores`, in their order.
    ///
    /// # Errors
    /// Where the directory is in use by another gateway, cannot be written, or its database is damaged.
    pub fn start(config: &schema::Ledger, cores: usize) -> anyhow::Result<(Ledger, Vec<Journal>)> {
        let state = config.path.as_path();
        make_directory(state)?;
        let lock = lock(state)?;
        let journal = state.join(JOURNAL);
        make_directory(&journal)?;
        let held = lock.try_clone().context("cannot keep the lock")?;
        let (mut worker, journals) = Worker::open(config, journal, lock, cores)
            .with_context(|| format!("cannot open the ledger in {}", state.display()))?;
        let public = worker.public();
        let exporter = match &config.export {
            Some(export) => Some(Exporter::start(&export.clickhouse, state, public.clone())?),
            None => None,
        };
        let (commands, inbox) = mpsc::channel();
        let thread = std::thread::Builder::new()
            .name("ledger".into())
            .spawn(move || worker.run(&inbox))
            .context("cannot start the ledger's thread")?;
        let ledger = Ledger {
            commands,
            public,
            thread: Some(thread),
            _exporter: exporter,
            _lock: held,
        };
        Ok((ledger, journals))
    }

    /// The ledger's state; what is not a number of records is up to one turn of its thread old.
    pub fn status(&self) -> LedgerStatus {
        let mut status = self
            .public
            .status
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        for journal in &self.public.journals {
            status.records += journal.appended.load(Ordering::Relaxed);
            status.refused += journal.refused.load(Ordering::Relaxed);
        }
        if self.thread.as_ref().is_some_and(JoinHandle::is_finished) {
            status.trouble = Some("the ledger's thread has ended".into());
            status.last_error.clone_from(&status.trouble);
        }
        status
    }

    /// Sums since start by key and model, in their order, of what is folded. Bounded: what comes after
    /// [`crate::bounds::USAGE_LABELS_MAX`] pairs is summed as (`other`, `other`).
    pub fn totals(&self) -> Vec<(String, String, Counters)> {
        self.public
            .totals
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .list()
    }

    /// Folds and syncs what was appended before this call, and waits for it, at most 10 s.
    ///
    /// # Errors
    /// What stood in the way; the records are safe in the journal nonetheless.
    pub fn flush(&self) -> anyhow::Result<()> {
        let (reply, answer) = mpsc::sync_channel(1);
        self.commands
            .send(Command::Flush(reply))
            .context("the ledger's thread has ended")?;
        match answer.recv_timeout(FLUSH_TIMEOUT) {
            Ok(result) => result.map_err(anyhow::Error::msg),
            Err(_) => bail!("the ledger did not flush within {} s", FLUSH_TIMEOUT.as_secs()),
        }
    }
}

impl Drop for Ledger {
    fn drop(&mut self) {
        // A thread that is gone already takes no command and is joined at once.
        let _ = self.commands.send(Command::Stop);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Makes a directory that only its owner may enter. One that exists is left as it is.
fn make_directory(path: &Path) -> anyhow::Result<()> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .with_context(|| format!("cannot make the directory {}", path.display()))
}

/// Locks the state directory for this process, for as long as the file is open.
fn lock(state: &Path) -> anyhow::Result<File> {
    let path: PathBuf = state.join(LOCK);
    let attempt = || -> io::Result<Option<File>> {
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Ok(None),
            Err(TryLockError::Error(error)) => return Err(error),
        }
        file.set_len(0)?;
        writeln!(file, "{}", std::process::id())?;
        Ok(Some(file))
    };
    if let Some(file) = attempt().with_context(|| format!("cannot lock {}", path.display()))? {
        return Ok(file);
    }
    let mut holder = String::new();
    // Best effort: the holder may be about to write it.
    let _ = File::open(&path).and_then(|file| file.take(32).read_to_string(&mut holder));
    let holder = match holder.trim() {
        "" => "another gateway".to_owned(),
        pid => format!("another gateway (process {pid})"),
    };
    bail!("the state directory {} is in use by {holder}", state.display());
}
