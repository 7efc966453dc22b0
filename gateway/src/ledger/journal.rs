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

    /// Bytes of frames that surely fit now, however long each of them is. Only the ledger's thread makes it grow; a core
    /// whose open requests have frames of no more in sum records each of them. A segment is left when a frame does not fit,
    /// so that its end may be lost up to the length of the longest.
    pub fn room_bytes(&self) -> usize {
        let of = |bytes: usize| bytes.saturating_sub(RECORD_BYTES_MAX - 1);
        of(self.active.appender.remaining())
            + self.shared.blanks.len() * of(SEGMENT_BYTES - segment::FRAMES_AT)
    }
}

/// Adds one to a counter that has one writer: cheaper than an atomic read-modify-write.
fn add(counter: &AtomicU64) {
    counter.store(counter.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{bounds::SEGMENTS_READY, ledger::record::tests::numbered, net::mapped};

    /// A journal with as many segments waiting as a core has, and nobody who makes more.
    fn journal(dir: &std::path::Path) -> Journal {
        let blank = |id: u64| {
            let path = dir.join(id.to_string());
            let (_, appender, _) =
                mapped::create(&path, SEGMENT_BYTES, &[0; segment::FRAMES_AT]).expect("a segment");
            Blank { id, appender }
        };
        let blanks = ArrayQueue::new(SEGMENTS_READY);
        for id in 1..=SEGMENTS_READY as u64 {
            assert!(blanks.push(blank(id)).is_ok());
        }
        let shared = Shared {
            blanks,
            appended: AtomicU64::new(0).into(),
            refused: AtomicU64::new(0),
            leave: AtomicU64::new(0),
        };
        Journal::new(blank(99), Arc::new(shared))
    }

    #[test]
    fn what_there_is_room_for_fits_whatever_its_length() {
        let dir = tempfile::tempdir().expect("a directory");
        let mut journal = journal(dir.path());
        let mut promised = journal.room_bytes();
        let mut appended = 0;
        loop {
            let mut record = numbered(appended);
            record.user = "u".repeat((appended * 37 % 129) as usize).into();
            record.tags = "t".repeat((appended * 101 % 256) as usize).into();
            let bytes = segment::encode(&record, &mut [0; RECORD_BYTES_MAX]);
            if bytes > promised {
                break;
            }
            promised -= bytes;
            journal.append(&record).expect("what was promised");
            appended += 1;
        }
        assert!(appended > 20_000, "{appended}");
    }

    /// However full the segment in use, a core takes 10,000 idle and 1,000 busy streams, with names twice as long as usual.
    #[test]
    fn the_waiting_segments_have_room_for_eleven_thousand_requests() {
        let dir = tempfile::tempdir().expect("a directory");
        let mut journal = journal(dir.path());
        let record = numbered(1);
        while journal.active.appender.remaining() >= RECORD_BYTES_MAX {
            journal.append(&record).expect("room");
        }
        let names_bytes = 9 * 40;
        assert!(journal.room_bytes() / segment::frame_bytes_max(names_bytes) >= 11_000);
        assert!(journal.room_bytes() / RECORD_BYTES_MAX >= 5600);
    }
}
