//! The memory that the kernel receives into: one ring of provided buffers per core (io_uring_register_buf_ring(3)).

use std::{
    io,
    ops::Range,
    slice,
    sync::atomic::{AtomicU16, Ordering},
};

use io_uring::{Submitter, types::BufRingEntry};
use memmap2::{MmapMut, UncheckedAdvice};

/// Bytes of one buffer, and so of one receive at most. A streamed event is some 250 bytes; a flooding upstream fills them.
pub const BUFFER_BYTES: usize = 16 * 1024;

/// Buffers of a core: 8 MiB of addresses, a power of two as the kernel wants it. A buffer is held from its receive to
/// the end of the turn at most, so this bounds what is received in one turn; what finds none is received in the next.
pub const BUFFERS: u16 = 512;

/// Buffers that are handed to the kernel at first, and how many more each time they do not suffice: the kernel takes
/// them in turn, so that each one handed out becomes resident.
const BUFFERS_STEP: u16 = 16;

/// The one buffer group of a ring.
pub const GROUP: u16 = 0;

/// See the module.
pub struct Buffers {
    /// The buffers; anonymous memory that is resident as far as it was used. Only its pointers are used: the kernel writes
    /// to some of them at any time.
    bytes: *mut u8,
    /// The ring of entries, shared with the kernel.
    entries: *mut BufRingEntry,
    mapped: [MmapMut; 2],
    /// Entries written; published with [`Buffers::publish`].
    tail: u16,
    published: u16,
    /// Buffers that the kernel has been given at least once.
    in_use: u16,
}

impl Buffers {
    /// Maps the memory and registers it with the ring, which must be gone before this is dropped.
    pub fn new(submitter: &Submitter<'_>) -> io::Result<Buffers> {
        let mut bytes = MmapMut::map_anon(usize::from(BUFFERS) * BUFFER_BYTES)?;
        let mut entries = MmapMut::map_anon(usize::from(BUFFERS) * size_of::<BufRingEntry>())?;
        // SAFETY: the mapping is page-aligned, has the size that is told, and outlives the ring: see above.
        unsafe { submitter.register_buf_ring(entries.as_ptr() as u64, BUFFERS, GROUP)? };
        let mut buffers = Buffers {
            bytes: bytes.as_mut_ptr(),
            entries: entries.as_mut_ptr().cast(),
            mapped: [bytes, entries],
            tail: 0,
            published: 0,
            in_use: 0,
        };
        buffers.grow();
        Ok(buffers)
    }

    /// Hands more buffers out; false when all are.
    pub fn grow(&mut self) -> bool {
        let from = self.in_use;
        self.in_use = (from + BUFFERS_STEP).min(BUFFERS);
        for buffer in from..self.in_use {
            self.give(buffer);
        }
        self.publish();
        from < self.in_use
    }

    /// Whether more are handed out than at first.
    pub fn has_grown(&self) -> bool {
        self.in_use > BUFFERS_STEP
    }

    /// Buffers handed out so far.
    pub fn in_use(&self) -> usize {
        self.in_use.into()
    }

    /// Gives the memory of all buffers back to the system, though not the buffers: the kernel writes to them anew when it
    /// needs them. To be called while every buffer handed out is the kernel's to use, on the ring's own thread and not
    /// within a system call of it: then (`DEFER_TASKRUN`) nothing is being received.
    pub fn release_memory(&mut self) {
        let [bytes, _] = &self.mapped;
        // SAFETY: nobody relies on what the buffers hold: no slice of them is borrowed, by `&mut self`, and none is owned by a
        // reader or used by the kernel, by the caller. Errors: it stays resident.
        let _ = unsafe { bytes.unchecked_advise(UncheckedAdvice::DontNeed) };
    }

    /// Gives a buffer back to the kernel; it learns of it with the next [`Buffers::publish`].
    pub fn give(&mut self, buffer: u16) {
        let place = usize::from(self.tail & (BUFFERS - 1));
        let address = self.bytes.wrapping_add(usize::from(buffer) * BUFFER_BYTES);
        let entry = self.entries.wrapping_add(place);
        // SAFETY: `place` is within the mapping. The kernel reads an entry only below the published tail, and this one
        // is not: there are as many entries as buffers, and this buffer's last entry has been used up. The setters
        // leave the last two bytes alone, which in the first entry are the tail.
        let entry = unsafe { &mut *entry };
        entry.set_addr(address as u64);
        entry.set_len(BUFFER_BYTES as u32);
        entry.set_bid(buffer);
        self.tail = self.tail.wrapping_add(1);
    }

    /// Tells the kernel of all buffers given.
    pub fn publish(&mut self) {
        if self.published == self.tail {
            return;
        }
        self.published = self.tail;
        // The last two bytes of the first entry (struct io_uring_buf_ring).
        let tail = self.entries.cast::<AtomicU16>().wrapping_add(7);
        // SAFETY: mapped, aligned, and written by this thread alone; the kernel only reads it, with acquire semantics
        // (io_uring/kbuf.c).
        let tail = unsafe { &*tail };
        tail.store(self.tail, Ordering::Release);
    }

    /// Bytes of a buffer that a completion has handed to this process and that has not been given back.
    pub fn bytes(&self, buffer: u16, range: Range<usize>) -> &[u8] {
        assert!(buffer < BUFFERS && range.start <= range.end && range.end <= BUFFER_BYTES);
        let from = self
            .bytes
            .wrapping_add(usize::from(buffer) * BUFFER_BYTES + range.start);
        // SAFETY: within the mapping by the assertion; initialised (zeroes at least); the kernel does not write to a
        // buffer between its completion and its return by `give`, which takes `&mut self`.
        unsafe { slice::from_raw_parts(from, range.len()) }
    }
}
