//! The data plane's end of the ledger: where a core leaves its records.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use crossbeam::{queue::ArrayQueue, utils::CachePadded};

use super::{record::Record, segment};
use crate::{
    bounds::{RECORD_BYTES_MAX, SEGMENT_BYTES},
    net::mapped::Appender,
};

/// No segment is ready to take the record: the disk is full, or too slow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the journal is full")]
pub struct Full;

/// A mapped segment that waits for its first record.
#[derive(Debug)]
pub(super) struct Blank {
    pub id: u64,
    pub appender: Appender,
}

/// What a journal and the ledger's thread share.
#[derive(Debug)]
pub(super) struct Shared {
    /// Filled by the ledger's thread, emptied by the core.
    pub blanks: ArrayQueue<Blank>,
    /// Records appended. Written by the core alone.
    pub appended: CachePadded<AtomicU64>,
    /// Appends that ended in [`Full`]. Written by the core alone.
    pub refused: AtomicU64,
    /// Id of a segment that the core is to leave, because its file failed; 0 for none. Written by the ledger's thread.
    pub leave: AtomicU64,
}

/// One core's journal. An append is a copy into mapped memory: no system call, no lock, no
/// allocation.
#[derive(Debug)]
pub struct Journal {
    active: Blank,
    shared: Arc<Shared>,
    /// Where a record is put together before it is copied.
    frame: Box<[u8; RECORD_BYTES_MAX]>,
}

impl Journal {
    pub(super) fn new(active: Blank, shared: Arc<Shared>) -> Journal {
        Journal {
            active,
            shared,
            frame: Box::new([0; RECORD_BYTES_MAX]),
        }
    }

    /// Appends a record. When this returns `Ok`, the record survives the death of the process; a
    /// power cut takes it only within `ledger.sync` of now.
    ///
    /// # Errors
    /// [`Full`] where [`Journal::ready`] is false. The record is then nowhere; a later attempt may succeed.
    pub fn append(&mut self, record: &Record) -> Result<(), Full> {
        let bytes = segment::encode(record, &mut self.frame);
        if self.active.appender.remaining() < bytes {
            let Some(blank) = self.shared.blanks.pop() else {
                add(&self.shared.refused);
                return Err(Full);
            };
            self.active = blank;
        }
        let frame = &mut self.frame[..bytes];
        segment::seal(frame, self.active.id, self.active.appender.offset());
        if !self.active.appender.append(frame) {
            // Unreachable: a blank segment is longer than any record.
            add(&self.shared.refused);
            return Err(Full);
        }
        add(&self.shared.appended);
        Ok(())
    }

    /// Goes on to the next segment where the ledger's thread asks for it and one waits. To be called now and then.
    pub fn turn(&mut self) {
        if self.shared.leave.load(Ordering::Acquire) == self.active.id
            && let Some(blank) = self.shared.blanks.pop()
        {
            self.active = blank;
        }
    }

    /// Whether the next [`Journal::append`] will succeed whatever the record. Admission asks this, so
    /// that no request is served that could not be recorded.
    pub fn ready(&self) -> bool {
        self.active.appender.remaining() >= RECORD_BYTES_MAX || !self.shared.blanks.is_empty()
    }

    /// Records, of the greatest size, that surely fit now. Only the ledger's thread makes it grow; a
    /// core that admits at most this many requests at the same time records each of them.
    pub fn room(&self) -> usize {
        let blank = (SEGMENT_BYTES - segment::FRAMES_AT) / RECORD_BYTES_MAX;
        self.active.appender.remaining() / RECORD_BYTES_MAX + self.shared.blanks.len() * blank
    }
}

/// Adds one to a counter that has one writer: cheaper than an atomic read-modify-write.
fn add(counter: &AtomicU64) {
    counter.store(counter.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
}
