//! The ledger's thread: makes segments before they are needed, syncs, folds, and removes old ones.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    fmt::Display,
    fs::{self, File},
    path::PathBuf,
    sync::{Arc, PoisonError, atomic::AtomicU64, mpsc},
    time::{Duration, Instant},
};

use anyhow::Context;
use crossbeam::queue::ArrayQueue;

use super::{
    Journal, Public,
    archive::Archive,
    journal::{Blank, Shared},
    replay::{self, Replayed},
    segment::{self, FRAMES_AT, Found, Header, Name, TEMPORARY},
    store::{Positions, Store},
    totals::{Sums, day_of},
};
use crate::{
    bounds::{SEGMENT_BYTES, SEGMENTS_LIVE_MAX, SEGMENTS_READY},
    config::schema,
    net::{clock, mapped},
};

mod live;

use live::Live;

/// Longest turn of the thread: how soon a segment that a core has taken is replaced.
const TURN_MAX: Duration = Duration::from_millis(50);
/// Shortest turn, for `ledger.sync: 0`.
const TURN_MIN: Duration = Duration::from_millis(1);
/// How often new records are folded.
const FOLD_EVERY: Duration = Duration::from_millis(200);
/// How often a day's sums may be removed: soon enough for the days that a shorter `ledger.retention` has made old.
const FORGET_EVERY: Duration = Duration::from_secs(600);
/// Journal bytes folded in one transaction.
const FOLD_BYTES_MAX: usize = 32 * 1024 * 1024;
/// How long an operation that failed is left alone.
const RETRY_AFTER: Duration = Duration::from_millis(500);
/// The same trouble is logged once in this time.
const LOG_EVERY: Duration = Duration::from_secs(10);

/// The kinds of trouble. What a flush could not do the next turn tries again: its success ends that trouble too.
const MAKE: &str = "cannot make a journal segment";
const SYNC: &str = "cannot sync the journal";
const FOLD: &str = "cannot fold the journal";
const FORGET: &str = "cannot remove old sums";
const FLUSH: &str = "cannot flush the ledger";

/// What the thread can be told.
#[derive(Debug)]
pub enum Command {
    /// Fold and sync, then say how it went.
    Flush(mpsc::SyncSender<Result<(), String>>),
    Stop,
}

/// The journal of one core, as the thread sees it.
#[derive(Debug)]
struct Lane {
    core: u32,
    shared: Arc<Shared>,
    next_seq: u64,
    live: VecDeque<Live>,
}

/// The thread's state.
#[derive(Debug)]
pub struct Worker {
    journal: PathBuf,
    sync_every: Duration,
    keep_bytes: u64,
    /// Random, the same for all segments of this run.
    run: u64,
    lanes: Vec<Lane>,
    store: Store,
    archive: Archive,
    public: Arc<Public>,
    /// When each kind of trouble was logged last.
    logged: HashMap<&'static str, Instant>,
    /// What failed at its last attempt.
    failing: BTreeMap<&'static str, String>,
    next_sync: Instant,
    next_fold: Instant,
    next_refill: Instant,
    next_forget: Instant,
    /// How many days the sums are kept; `None` for ever.
    retention_days: Option<u64>,
    /// Journal bytes that are kept for the export, where there is one and it is behind.
    backlog_bytes: Option<u64>,
    /// The next sync fails, as a broken disk's would.
    #[cfg(test)]
    fail_next_sync: bool,
    /// Keeps other gateways out of the directory.
    _lock: File,
}

impl Worker {
    /// Replays what is in the directory and makes a first segment for each core.
    pub fn open(
        config: &schema::Ledger,
        journal: PathBuf,
        lock: File,
        cores: usize,
    ) -> anyhow::Result<(Worker, Vec<Journal>)> {
        let mut store = Store::open(&config.path)?;
        let replayed = replay::replay(&journal, &mut store)?;
        let positions = store.positions().context("cannot read usage.db")?;
        let lanes = lanes(cores, &replayed, &positions);
        let public = Public {
            journals: lanes.iter().map(|lane| lane.shared.clone()).collect(),
            seq_next: lanes.iter().map(|lane| (lane.core, lane.next_seq)).collect(),
            ..Public::default()
        };
        if config.export.is_some() {
            let kept = replayed.archive.iter();
            public
                .readable()
                .extend(kept.map(|kept| (kept.name, kept.bytes as usize)));
        }
        if let Ok(mut status) = public.status.lock() {
            status.replayed = replayed.records;
            status.torn = replayed.torn;
            status.missing_segments = replayed.missing;
        }
        let now = Instant::now();
        let mut worker = Worker {
            journal,
            sync_every: config.sync.0.max(TURN_MIN),
            keep_bytes: config.keep.0,
            run: random()?,
            lanes,
            store,
            archive: replayed.archive,
            public: Arc::new(public),
            logged: HashMap::new(),
            failing: BTreeMap::new(),
            next_sync: now,
            next_fold: now,
            next_refill: now,
            next_forget: now,
            retention_days: Some(config.retention.0.as_secs().div_ceil(86_400)).filter(|days| *days > 0),
            backlog_bytes: config.export.as_ref().map(|export| export.clickhouse.backlog.0),
            #[cfg(test)]
            fail_next_sync: false,
            _lock: lock,
        };
        let mut journals = Vec::with_capacity(cores);
        for index in 0..cores {
            let active = worker.make_segment(index)?;
            journals.push(Journal::new(active, worker.lanes[index].shared.clone()));
        }
        worker.show();
        Ok((worker, journals))
    }

    /// What the thread shows to others.
    pub fn public(&self) -> Arc<Public> {
        self.public.clone()
    }

    /// The thread's life.
    pub fn run(&mut self, inbox: &mpsc::Receiver<Command>) {
        let turn = self.sync_every.min(TURN_MAX);
        // The first turn is at once: the segments that wait are to be made.
        let mut wait = Duration::ZERO;
        loop {
            match inbox.recv_timeout(wait) {
                Err(mpsc::RecvTimeoutError::Timeout) => self.turn(Instant::now()),
                Ok(Command::Flush(reply)) => {
                    let result = self.flush();
                    self.show();
                    // Whoever asked may have given up waiting.
                    let _ = reply.send(result);
                }
                Ok(Command::Stop) | Err(mpsc::RecvTimeoutError::Disconnected) => break,
            }
            self.show();
            wait = turn;
        }
        self.finish();
        self.show();
    }

    fn turn(&mut self, now: Instant) {
        if now >= self.next_refill {
            let result = self.refill();
            self.next_refill = self.attempted(MAKE, result, now);
        }
        if now >= self.next_sync {
            let result = self.sync();
            self.next_sync = self.attempted(SYNC, result, now + self.sync_every);
        }
        if now >= self.next_fold {
            let result = self.fold().and_then(|()| self.retire());
            self.next_fold = self.attempted(FOLD, result, now + FOLD_EVERY);
        }
        if now >= self.next_forget {
            let result = self.forget(clock::unix_ms());
            self.next_forget = self.attempted(FORGET, result, now + FORGET_EVERY);
        }
    }

    /// Notes how an operation went; returns when it is to be done again: at `next` where it succeeded.
    fn attempted(&mut self, what: &'static str, result: anyhow::Result<()>, next: Instant) -> Instant {
        match result {
            Ok(()) => {
                self.mended(what);
                next
            }
            Err(error) => self.trouble(what, &error),
        }
    }

    fn flush(&mut self) -> Result<(), String> {
        let result = self
            .sync()
            .and_then(|()| self.fold())
            .and_then(|()| self.retire());
        match result {
            Ok(()) => {
                for what in [SYNC, FOLD, FLUSH] {
                    self.mended(what);
                }
                Ok(())
            }
            Err(error) => {
                self.trouble(FLUSH, &error);
                Err(format!("{error:#}"))
            }
        }
    }

    /// Brings all to rest. What cannot be done now is done by the next start.
    fn finish(&mut self) {
        for lane in &self.lanes {
            while lane.shared.blanks.pop().is_some() {}
        }
        // An error is counted and logged by `flush`. The second time writes anew what the first one could not sync.
        if self.flush().is_err() {
            let _ = self.flush();
        }
    }

    /// Fills the cores' queues of segments.
    fn refill(&mut self) -> anyhow::Result<()> {
        for index in 0..self.lanes.len() {
            while !self.lanes[index].shared.blanks.is_full()
                && self.lanes[index].live.len() < SEGMENTS_LIVE_MAX
            {
                let blank = self.make_segment(index)?;
                // Full it cannot be: this thread alone fills it.
                let _ = self.lanes[index].shared.blanks.push(blank);
            }
        }
        Ok(())
    }

    /// Makes a core's next segment. It has its name only when it is whole and on the disk.
    fn make_segment(&mut self, index: usize) -> anyhow::Result<Blank> {
        let lane = &mut self.lanes[index];
        let name = Name {
            core: lane.core,
            seq: lane.next_seq,
        };
        // Also where it fails: no later attempt meets what this one could not remove.
        lane.next_seq += 1;
        let header = Header {
            name,
            id: random()?,
            run: self.run,
            created_unix_ms: clock::unix_ms(),
        };
        let path = self.journal.join(name.file());
        let unfinished = self.journal.join(name.file() + TEMPORARY);
        let (file, appender, view) = mapped::create(&unfinished, SEGMENT_BYTES, &header.encode())
            .with_context(|| format!("cannot make {}", unfinished.display()))?;
        let named = fs::rename(&unfinished, &path).and_then(|()| File::open(&self.journal)?.sync_all());
        if let Err(error) = named {
            // One of the two names is there. Both are swept up at start if not now.
            let _ = fs::remove_file(&unfinished);
            let _ = fs::remove_file(&path);
            return Err(error).with_context(|| format!("cannot make {}", path.display()));
        }
        lane.live.push_back(Live {
            header,
            path,
            file,
            view,
            folded: FRAMES_AT,
            synced: FRAMES_AT,
            rescued: None,
            rewritten: false,
        });
        Ok(Blank {
            id: header.id,
            appender,
        })
    }

    /// Brings what was appended to the disk: all that can be, also where one file fails.
    fn sync(&mut self) -> anyhow::Result<()> {
        let mut result = Ok(());
        for lane in &mut self.lanes {
            for live in &mut lane.live {
                #[cfg(test)]
                let fail = std::mem::take(&mut self.fail_next_sync);
                #[cfg(not(test))]
                let fail = false;
                let synced = live.sync(&lane.shared, &self.journal, fail);
                match synced.with_context(|| format!("cannot sync {}", live.path.display())) {
                    Ok(rewritten) if rewritten => {
                        tracing::warn!(file = %live.path.display(), "a journal segment that could not be synced was written anew");
                        self.public.lock_status().rewritten += 1;
                    }
                    Ok(_) => {}
                    Err(error) => result = Err(error),
                }
            }
        }
        result
    }

    /// Puts what was appended into the sums.
    fn fold(&mut self) -> anyhow::Result<()> {
        while self.fold_some()? {}
        Ok(())
    }

    /// Folds up to about [`FOLD_BYTES_MAX`]; tells whether there may be more.
    fn fold_some(&mut self) -> anyhow::Result<bool> {
        let mut sums = Sums::default();
        let mut positions = Vec::new();
        let (mut bytes, mut records, mut torn) = (0, 0, 0);
        for live in self.lanes.iter().flat_map(|lane| &lane.live) {
            let segment = live.bytes();
            if segment.len() == live.folded || bytes >= FOLD_BYTES_MAX {
                continue;
            }
            bytes += segment.len() - live.folded;
            let mut at = live.folded;
            while at < segment.len() {
                match segment::next(segment, live.header.id, &mut at) {
                    Some(Found::Record(record)) => {
                        sums.add(&record);
                        records += 1;
                    }
                    // Not by this program: somebody wrote to the file or the memory.
                    Some(Found::Torn { offset }) => {
                        torn += 1;
                        tracing::error!(file = %live.path.display(), offset, "the journal is damaged here");
                    }
                    None => at = segment.len(),
                }
            }
            positions.push(live.position(segment.len(), false));
        }
        if positions.is_empty() {
            return Ok(false);
        }
        self.store
            .fold(&sums, &positions)
            .context("cannot write usage.db")?;
        for live in self.lanes.iter_mut().flat_map(|lane| &mut lane.live) {
            if let Some(position) = positions
                .iter()
                .find(|position| position.name == live.header.name)
            {
                live.folded = position.bytes;
            }
        }
        self.public
            .totals
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .add(&sums);
        if self.backlog_bytes.is_some() {
            let mut readable = self.public.readable();
            readable.extend(positions.iter().map(|position| (position.name, position.bytes)));
        }
        let mut status = self.public.lock_status();
        status.folded += records;
        status.torn += torn;
        Ok(bytes >= FOLD_BYTES_MAX)
    }

    /// Moves segments that cores are done with to the archive, and keeps that within its size.
    fn retire(&mut self) -> anyhow::Result<()> {
        for lane in &mut self.lanes {
            while let Some(live) = lane.live.front() {
                // In this order: once sealed, the size does not change any more.
                let sealed = live.view.sealed();
                let committed = live.committed_bytes();
                if !sealed || live.folded != committed || live.synced != committed {
                    break;
                }
                let kept = live
                    .retire(&mut self.store)
                    .with_context(|| format!("cannot close {}", live.path.display()))?;
                if let Some(kept) = kept {
                    self.archive.push(kept);
                }
                lane.live.pop_front();
            }
        }
        let (public, keep) = (&self.public, self.keep_bytes);
        let backlog = self.backlog_bytes.map(|bytes| keep.saturating_add(bytes));
        let may_go = |name: Name, bytes: u64| match backlog {
            None => true,
            // Beyond that the export has lost it.
            Some(backlog) => public.is_exported(name) || bytes > backlog,
        };
        let removed = self
            .archive
            .trim(keep, &mut self.store, may_go)
            .context("cannot remove an old journal segment")?;
        if backlog.is_some() {
            for name in removed {
                if !public.is_exported(name) {
                    public.lock_status().export_lost_segments += 1;
                    tracing::error!(
                        file = name.file(),
                        "a journal segment was removed before it was exported: raise `backlog`"
                    );
                }
                public.readable().remove(&name);
            }
        }
        Ok(())
    }

    /// Removes the sums of a day that is older than they are kept.
    fn forget(&mut self, now_unix_ms: u64) -> anyhow::Result<()> {
        let Some(days) = self.retention_days else {
            return Ok(());
        };
        let day_min = u64::from(day_of(now_unix_ms)).saturating_sub(days);
        self.store
            .forget_a_day(u32::try_from(day_min).unwrap_or(0))
            .context("cannot write usage.db")?;
        Ok(())
    }

    /// Counts and logs a failure; returns when to try again.
    fn trouble(&mut self, what: &'static str, error: &dyn Display) -> Instant {
        let now = Instant::now();
        let text = format!("{what}: {error:#}");
        if self.logged.get(what).is_none_or(|last| now - *last >= LOG_EVERY) {
            self.logged.insert(what, now);
            tracing::error!(error = text, "the ledger is in trouble; trying again");
        }
        self.failing.insert(what, text.clone());
        let mut status = self.public.lock_status();
        status.io_errors += 1;
        status.trouble = Some(text.clone());
        status.last_error = Some(text);
        now + RETRY_AFTER
    }

    /// Notes that an operation succeeded, whatever it did before.
    fn mended(&mut self, what: &'static str) {
        let flushed = what == FOLD && self.failing.remove(FLUSH).is_some();
        if self.failing.remove(what).is_none() && !flushed {
            return;
        }
        tracing::info!("the ledger's trouble is over: {what}");
        let mut status = self.public.lock_status();
        status.trouble = self.failing.values().next().cloned();
    }

    /// Updates what others see.
    fn show(&self) {
        let live = || self.lanes.iter().flat_map(|lane| &lane.live);
        let mut status = self.public.lock_status();
        status.unsynced_bytes = live()
            .map(|live| live.view.committed_bytes().saturating_sub(live.synced) as u64)
            .sum();
        status.segments = (live().count() + self.archive.len()) as u64;
        status.archive_bytes = self.archive.bytes();
    }
}

fn lanes(cores: usize, replayed: &Replayed, positions: &Positions) -> Vec<Lane> {
    let lane = |core: u32| Lane {
        core,
        shared: Arc::new(Shared {
            blanks: ArrayQueue::new(SEGMENTS_READY),
            appended: AtomicU64::new(0).into(),
            refused: AtomicU64::new(0),
            leave: AtomicU64::new(0),
        }),
        next_seq: positions
            .seq_max(core)
            .max(replayed.seq_max.get(&core).copied().unwrap_or(0))
            + 1,
        live: VecDeque::new(),
    };
    (0..cores).map(|core| lane(core as u32)).collect()
}

/// A random number that is not guessed.
fn random() -> anyhow::Result<u64> {
    getrandom::u64().map_err(|error| anyhow::anyhow!("no random numbers: {error}"))
}

#[cfg(test)]
mod tests;
