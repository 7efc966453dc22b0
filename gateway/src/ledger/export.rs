//! Continuous delivery of records to a ClickHouse server, over its HTTP interface.
//!
//! A thread of its own reads what is folded from the journal's segments, sends it in batches, and then notes how far it is
//! in `export.json`. A batch whose answer is lost is sent again: each record comes at least once, and its time and id,
//! which the table is sorted by, tell duplicates, which ClickHouse's ReplacingMergeTree merges away. The data plane knows
//! nothing of it; while the server is gone, segments are kept for it up to `backlog`.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{self, Write as _},
    os::unix::fs::{FileExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    sync::{Arc, mpsc},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use anyhow::Context;
use crossbeam::channel;
use serde::{Deserialize, Serialize};

use super::{
    JOURNAL, Public,
    line::Line,
    segment::{self, FRAMES_AT, Found, Header, Name},
};
use crate::{
    bounds::{RECORD_BYTES_MAX, SEGMENT_BYTES},
    config::schema::ClickHouse,
};

mod server;

use server::Server;

/// Name of the file in the state directory that says how far the export is.
const POSITION: &str = "export.json";

/// Bytes of a segment read at a time: some thousand records.
const READ_BYTES: usize = 256 * 1024;

/// Bytes of one insert, JSON. The batch ends at this or at its number of records.
const INSERT_BYTES_MAX: usize = 32 * 1024 * 1024;

/// How long a stopping gateway delivers what the last fold has brought. The rest is delivered by the next start.
const LAST_DELIVERY_MAX: Duration = Duration::from_secs(5);

/// Pauses after failures: doubled from the first to the last.
const RETRY_FIRST: Duration = Duration::from_secs(1);
const RETRY_LAST: Duration = Duration::from_secs(60);

/// How far a core's records are delivered.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reached {
    /// The segment that comes next, or in part already is, delivered.
    pub seq: u64,
    /// Bytes of it that are.
    pub at: usize,
}

/// How long the end waits for the batch that is on its way and for [`LAST_DELIVERY_MAX`]. What is not receipted is sent again
/// by the next run.
const END_TIME_MAX: Duration = Duration::from_secs(6);

/// The thread that delivers. Dropping it ends it, after the batch that is on its way and a last delivery, or [`END_TIME_MAX`].
#[derive(Debug)]
pub struct Exporter {
    stop: Option<mpsc::Sender<()>>,
    /// Disconnected when the thread is done.
    done: channel::Receiver<()>,
    thread: Option<JoinHandle<()>>,
}

impl Exporter {
    /// Starts delivering what is in the journal and was not delivered before.
    pub fn start(config: &ClickHouse, state: &Path, public: Arc<Public>) -> anyhow::Result<Exporter> {
        let mut delivery = Delivery::new(config, state, public)?;
        delivery.check_numbers();
        let (stop, stopped) = mpsc::channel();
        let (ending, done) = channel::bounded(0);
        let thread = std::thread::Builder::new()
            .name("export".into())
            .spawn(move || {
                let _ending: channel::Sender<()> = ending;
                delivery.run(&stopped);
            })
            .context("cannot start the export's thread")?;
        Ok(Exporter {
            stop: Some(stop),
            done,
            thread: Some(thread),
        })
    }
}

impl Drop for Exporter {
    fn drop(&mut self) {
        self.stop = None;
        if self.done.recv_timeout(END_TIME_MAX) == Err(channel::RecvTimeoutError::Timeout) {
            // The server does not answer, and the end of the gateway does not wait for it.
            return;
        }
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// What `export.json` holds.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Position {
    /// Where records went: another place begins from the start.
    target: String,
    cores: BTreeMap<u32, Reached>,
}

/// The thread's state.
struct Delivery {
    server: Server,
    every: Duration,
    records_max: usize,
    journal: PathBuf,
    file: PathBuf,
    position: Position,
    public: Arc<Public>,
    table_is_there: bool,
}

/// Records put together for one insert, and where the cores are when it is delivered.
#[derive(Default)]
struct Batch {
    json: Vec<u8>,
    records: usize,
    reached: BTreeMap<u32, Reached>,
}

impl Delivery {
    fn new(config: &ClickHouse, state: &Path, public: Arc<Public>) -> anyhow::Result<Delivery> {
        let server = Server::new(config);
        let file = state.join(POSITION);
        let target = format!("{} {}", config.url, config.table);
        let mut position = read_position(&file)?;
        if position.target != target {
            position = Position {
                target,
                ..Position::default()
            };
        }
        *public.exported() = position.cores.clone();
        Ok(Delivery {
            server,
            every: config.every.0,
            records_max: config.batch as usize,
            journal: state.join(JOURNAL),
            file,
            position,
            public,
            table_is_there: !config.create,
        })
    }

    /// Forgets how far cores are delivered whose numbering has begun anew, at the start of a run: somebody removed the books
    /// by hand. What is there would otherwise pass for delivered until its numbers have caught up.
    fn check_numbers(&mut self) {
        self.position.cores.retain(|core, reached| {
            // A core that does not run any more has no next segment.
            let next = self.public.seq_next.get(core).copied().unwrap_or(u64::MAX);
            if reached.seq >= next {
                tracing::error!(
                    core,
                    delivered_up_to = reached.seq,
                    begins_with = next,
                    "journal and usage.db were removed by hand: the export begins anew with the oldest record that is \
                     there; what was removed before it was exported is lost to it"
                );
            }
            reached.seq < next
        });
        *self.public.exported() = self.position.cores.clone();
    }

    /// Delivers until it is told to stop.
    fn run(&mut self, stopped: &mpsc::Receiver<()>) {
        let mut pause = self.every;
        while let Err(mpsc::RecvTimeoutError::Timeout) = stopped.recv_timeout(pause) {
            pause = match self.deliver_some() {
                // There may be more.
                Ok(records) if records >= self.records_max => Duration::ZERO,
                Ok(_) => self.every,
                Err(error) => {
                    self.failed(&error);
                    (pause * 2).clamp(RETRY_FIRST, RETRY_LAST)
                }
            };
            self.show();
        }
        self.finish();
        self.show();
    }

    /// Delivers what is left, within [`LAST_DELIVERY_MAX`].
    fn finish(&mut self) {
        let end = Instant::now() + LAST_DELIVERY_MAX;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            self.server.answer_timeout = left;
            match self.deliver_some() {
                Ok(0) => return,
                Ok(_) => {}
                Err(error) => {
                    tracing::warn!(
                        error = format!("{error:#}"),
                        "the last records are not exported; the next start does it"
                    );
                    return;
                }
            }
        }
    }

    /// Sends one batch; returns its number of records.
    fn deliver_some(&mut self) -> anyhow::Result<usize> {
        let batch = self.gather()?;
        if batch.records == 0 {
            if !batch.reached.is_empty() {
                self.reached(batch.reached)?;
            }
            return Ok(0);
        }
        if !self.table_is_there {
            self.server.create_table().context("cannot make the table")?;
            self.table_is_there = true;
        }
        self.server.insert(&batch.json)?;
        let mut status = self.public.lock_status();
        status.exported += batch.records as u64;
        if status.export_trouble.take().is_some() {
            tracing::info!("records are exported again");
        }
        drop(status);
        self.reached(batch.reached)?;
        Ok(batch.records)
    }

    /// Puts together what is folded and not delivered, core by core, up to the size of a batch.
    fn gather(&self) -> anyhow::Result<Batch> {
        let readable = self.public.readable().clone();
        let mut batch = Batch::default();
        for (name, folded) in readable {
            if batch.is_full(self.records_max) {
                break;
            }
            let reached = batch
                .reached
                .get(&name.core)
                .or(self.position.cores.get(&name.core));
            let reached = reached.copied().unwrap_or_default();
            let from = match name.seq.cmp(&reached.seq) {
                std::cmp::Ordering::Less => continue,
                std::cmp::Ordering::Equal => reached.at,
                std::cmp::Ordering::Greater => 0,
            };
            if from >= folded {
                continue;
            }
            let at = self.read(name, from, folded, &mut batch)?;
            batch.reached.insert(name.core, Reached { seq: name.seq, at });
        }
        Ok(batch)
    }

    /// Adds the records of a segment between two places to a batch, until that is full; returns how far it came.
    fn read(&self, name: Name, from: usize, folded: usize, batch: &mut Batch) -> anyhow::Result<usize> {
        let path = self.journal.join(name.file());
        let file = match File::open(&path) {
            Ok(file) => file,
            // Removed since: it was full of what is delivered, or is counted as lost.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(folded),
            Err(error) => return Err(error).with_context(|| format!("cannot read {}", path.display())),
        };
        let read = |bytes: &mut [u8], at: usize| -> io::Result<usize> {
            let mut done = 0;
            while done < bytes.len() {
                match file.read_at(&mut bytes[done..], (at + done) as u64)? {
                    0 => break,
                    n => done += n,
                }
            }
            Ok(done)
        };
        let end = folded.min(SEGMENT_BYTES);
        let mut bytes = vec![0; end.max(FRAMES_AT)];
        read(&mut bytes[..FRAMES_AT], 0)?;
        let Some(header) = Header::decode(&bytes).filter(|header| header.name == name) else {
            return Ok(folded);
        };
        let mut at = from.max(FRAMES_AT);
        while at < end {
            let upto = (at + READ_BYTES).min(end);
            let got =
                read(&mut bytes[at..upto], at).with_context(|| format!("cannot read {}", path.display()))?;
            let known = &bytes[..at + got];
            // A record may be cut by the end of what was read; the next read begins with it.
            let whole = if upto < end { upto - RECORD_BYTES_MAX } else { upto };
            let begun = at;
            while at < whole {
                if batch.is_full(self.records_max) {
                    return Ok(at);
                }
                match segment::next(known, header.id, &mut at) {
                    Some(Found::Record(record)) => {
                        batch.records += 1;
                        Line::of(&record).write_json(&mut batch.json)?;
                    }
                    // Damage is reported by who folds it. What follows it may be cut by the end of what was read.
                    Some(Found::Torn { offset }) if at >= known.len() && upto < end => {
                        at = whole.max(offset + 64);
                    }
                    Some(Found::Torn { .. }) => {}
                    None => at = whole.max(begun + 64),
                }
            }
            if got == 0 {
                break;
            }
        }
        Ok(folded)
    }

    /// Notes how far the cores are: first on the disk, then for who removes segments.
    fn reached(&mut self, reached: BTreeMap<u32, Reached>) -> anyhow::Result<()> {
        self.position.cores.extend(reached);
        write_position(&self.file, &self.position)
            .with_context(|| format!("cannot write {}", self.file.display()))?;
        *self.public.exported() = self.position.cores.clone();
        Ok(())
    }

    fn failed(&self, error: &anyhow::Error) {
        let text = format!("{error:#}");
        let mut status = self.public.lock_status();
        status.export_failures += 1;
        // The pauses between attempts are long enough for a line each.
        tracing::error!(error = text, "records cannot be exported; trying again");
        status.export_trouble = Some(text);
    }

    /// Updates what others see.
    fn show(&self) {
        let behind = |(name, folded): (&Name, &usize)| {
            let reached = self.position.cores.get(&name.core).copied().unwrap_or_default();
            match name.seq.cmp(&reached.seq) {
                std::cmp::Ordering::Less => 0,
                std::cmp::Ordering::Equal => folded.saturating_sub(reached.at) as u64,
                std::cmp::Ordering::Greater => *folded as u64,
            }
        };
        let bytes = self.public.readable().iter().map(behind).sum();
        self.public.lock_status().export_behind_bytes = bytes;
    }
}

impl Batch {
    fn is_full(&self, records_max: usize) -> bool {
        self.records >= records_max || self.json.len() >= INSERT_BYTES_MAX
    }
}

fn read_position(file: &Path) -> anyhow::Result<Position> {
    let text = match fs::read(file) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Position::default()),
        Err(error) => return Err(error).with_context(|| format!("cannot read {}", file.display())),
    };
    serde_json::from_slice(&text).with_context(|| {
        let file = file.display();
        format!("{file} is damaged (removed, the export begins anew with the oldest record that is kept)")
    })
}

/// Whole or not at all, also when the power is cut.
fn write_position(file: &Path, position: &Position) -> anyhow::Result<()> {
    let unfinished = file.with_extension("json.new");
    let mut out = File::options()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&unfinished)?;
    out.write_all(&serde_json::to_vec(position)?)?;
    out.sync_all()?;
    fs::rename(&unfinished, file)?;
    Ok(())
}

#[cfg(test)]
mod tests;
