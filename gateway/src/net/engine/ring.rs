//! The engine on io_uring: one ring per core, entered once a turn, and once more when it has something to send.
//!
//! Receives are multishot into one ring of provided buffers; what is not read within its turn is copied out. Writes are
//! queued in memory and sent, one request a socket at a time, when the turn is over. Needs Linux 6.1
//! (`DEFER_TASKRUN`, multishot receive, provided buffer rings); with 6.12 a wait can gather events for a time.
//!
//! The kernel uses three kinds of memory of this process while a request runs: the provided buffers (owned by
//! [`Buffers`], which outlives the ring), the bytes being sent (owned by the slot until the completion), and the argument
//! of the wait (on the stack, over the call). A slot and its descriptor live until the last completion is here.

mod socket;
mod turn;

use std::{io, os::fd::RawFd, time::Duration};

use io_uring::{IoUring, opcode, squeue, types};

use super::{
    buffers::{BUFFERS, Buffers},
    chain::Links,
    enough::Enough,
    slot::{Receiving, Slot},
    spare::Spare,
};
use crate::net::clock;

/// Submission queue entries: requests of one turn. When there are more, they are submitted early.
const ENTRIES: u32 = 1024;

/// Completion queue entries. The kernel keeps what does not fit.
const COMPLETIONS: u32 = 8192;

/// What a completion belongs to.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum Kind {
    Receive = 1,
    Send,
    Ready,
    Accept,
    /// Nobody waits for it.
    Aside,
}

/// Which socket; see [`Slot::generation`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Key {
    index: u32,
    generation: u32,
}

/// See the module.
pub struct Ring {
    // Dropped first: the kernel then uses nothing of this process any more.
    uring: IoUring,
    buffers: Buffers,
    links: Links,
    slots: Vec<Slot>,
    free: Vec<u32>,
    /// Rises with each socket.
    generation: u32,
    /// Sockets that received something this turn, have something to send, want to be armed.
    touched: Vec<u32>,
    dirty: Vec<u32>,
    due: Vec<u32>,
    /// Sockets that nobody owns and that are not closed yet.
    closing: u32,
    swept_ns: u64,
    /// Receives since [`Ring::give_back`] was last called.
    receives: usize,
    /// Bytes received since the last wait began.
    received_bytes: usize,
    /// How many events end a gathering wait.
    enough: Enough,
    /// The buffers' memory is to be given back at the turn's end.
    releases: bool,
    spare: Spare,
    can_gather: bool,
}

/// Tells whether the kernel has what the ring needs.
pub fn probe() -> io::Result<()> {
    Ring::with_entries(8).map(drop)
}

impl Ring {
    /// Sets a ring up for this thread.
    pub fn new() -> io::Result<Ring> {
        Ring::with_entries(ENTRIES)
    }

    /// To be called every few seconds: gives the buffers' memory back if a burst has made more of them than were needed since,
    /// and frees what has not been used of the buffers that are kept for sending.
    pub fn give_back(&mut self) {
        self.releases = self.buffers.in_use() > self.receives && self.buffers.has_grown();
        self.receives = 0;
        self.spare.release();
    }

    fn with_entries(entries: u32) -> io::Result<Ring> {
        let uring: IoUring = IoUring::builder()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .setup_submit_all()
            .setup_cqsize(COMPLETIONS.min(entries * 8))
            .build(entries)?;
        let buffers = Buffers::new(&uring.submitter())?;
        let can_gather = turn::can_gather(&uring);
        Ok(Ring {
            links: Links::new(BUFFERS),
            uring,
            buffers,
            slots: Vec::new(),
            free: Vec::new(),
            generation: 0,
            touched: Vec::new(),
            dirty: Vec::new(),
            due: Vec::new(),
            closing: 0,
            receives: 0,
            received_bytes: 0,
            enough: Enough::default(),
            releases: false,
            swept_ns: 0,
            spare: Spare::default(),
            can_gather,
        })
    }

    fn add(&mut self, fd: RawFd) -> Key {
        self.generation = self.generation.wrapping_add(1) & GENERATION_MASK;
        let slot = Slot::new(fd, self.generation);
        let index = match self.free.pop() {
            Some(index) => {
                self.slots[index as usize] = slot;
                index
            }
            None => {
                self.slots.push(slot);
                (self.slots.len() - 1) as u32
            }
        };
        Key {
            index,
            generation: self.generation,
        }
    }

    /// Takes a connected socket in; it is received from at once.
    pub fn add_connected(&mut self, fd: RawFd) -> Key {
        let key = self.add(fd);
        self.start_receiving(key);
        key
    }

    /// Takes a socket in whose connection is being made: writable when that is over. Then to be followed by
    /// [`Ring::start_receiving`].
    pub fn add_connecting(&mut self, fd: RawFd) -> Key {
        let key = self.add(fd);
        self.slots[key.index as usize].blocked = true;
        key
    }

    /// Begins to receive.
    pub fn start_receiving(&mut self, key: Key) {
        if let Some(slot) = self.slot(key) {
            slot.receiving = Receiving::Due;
            self.due.push(key.index);
        }
    }

    /// Takes a listening socket in; connections are accepted at once.
    pub fn add_listening(&mut self, fd: RawFd) -> Key {
        let key = self.add(fd);
        self.slots[key.index as usize].accepted = Some(Box::default());
        self.start_accepting(key.index);
        key
    }

    fn slot(&mut self, key: Key) -> Option<&mut Slot> {
        let slot = self.slots.get_mut(key.index as usize)?;
        (slot.generation == key.generation && !slot.closing).then_some(slot)
    }

    fn start_accepting(&mut self, index: u32) {
        let slot = &mut self.slots[index as usize];
        slot.receiving = Receiving::Armed;
        slot.pending += 1;
        let key = slot.key(index);
        let entry = opcode::AcceptMulti::new(types::Fd(slot.fd))
            .flags(libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK)
            .build();
        self.submit(entry.user_data(tag(Kind::Accept, key)));
    }

    /// Gives a socket up. What was written is still sent, unless `reset`; then the descriptor is closed.
    pub fn close(&mut self, key: Key, reset: bool) {
        let Some(slot) = self.slot(key) else {
            return;
        };
        slot.closing = true;
        slot.reader = None;
        slot.writer = None;
        slot.spill = Vec::new();
        slot.moved_ns = clock::monotonic_ns();
        let is_armed = matches!(slot.receiving, Receiving::Armed | Receiving::Stopping);
        let polling = slot.polling;
        let accepted = slot.accepted.take();
        let kind = if accepted.is_some() {
            Kind::Accept
        } else {
            Kind::Receive
        };
        let abort = reset && slot.in_flight;
        if reset {
            slot.queue = Vec::new();
        }
        self.closing += 1;
        for fd in accepted.into_iter().flat_map(|accepted| accepted.0).flatten() {
            close_now(fd);
        }
        self.release_received(key.index);
        if is_armed {
            self.cancel(kind, key);
        }
        if polling {
            self.cancel(Kind::Ready, key);
        }
        if abort {
            self.cancel(Kind::Send, key);
        }
        self.finish_if_idle(key.index);
    }

    fn cancel(&mut self, kind: Kind, key: Key) {
        let entry = opcode::AsyncCancel::new(tag(kind, key)).build();
        self.submit(
            entry
                .flags(squeue::Flags::SKIP_SUCCESS)
                .user_data(tag(Kind::Aside, key)),
        );
    }

    /// Gives the buffers of a socket back.
    fn release_received(&mut self, index: u32) {
        let slot = &mut self.slots[index as usize];
        while let Some((_, range)) = self.links.first(&slot.received) {
            if let Some(number) = self.links.consume(&mut slot.received, range.len()) {
                self.buffers.give(number);
            }
        }
    }

    /// Closes the descriptor of a closing socket when the kernel is done with it.
    fn finish_if_idle(&mut self, index: u32) {
        let slot = &mut self.slots[index as usize];
        if !slot.closing || slot.pending > 0 || !slot.queue.is_empty() {
            return;
        }
        let (fd, key) = (slot.fd, slot.key(index));
        slot.generation = NOBODY;
        slot.closing = false;
        self.closing -= 1;
        self.free.push(index);
        let entry = opcode::Close::new(types::Fd(fd)).build();
        self.submit(
            entry
                .flags(squeue::Flags::SKIP_SUCCESS)
                .user_data(tag(Kind::Aside, key)),
        );
    }

    /// Puts a request into the queue; a full queue is handed to the kernel first.
    fn submit(&mut self, entry: squeue::Entry) {
        loop {
            // SAFETY: what the entry points to, the bytes of a send, lives in its slot until the completion; all other
            // entries name descriptors and numbers only.
            if unsafe { self.uring.submission().push(&entry) }.is_ok() {
                return;
            }
            // An error (no memory, too many completions waiting) passes: completions are taken at the next wait. Until
            // then there is nothing better to do than to ask again.
            let _ = self.uring.submit();
        }
    }

    /// Ends the ring: what was given up is still sent, for at most `time`; everything else is cancelled.
    pub fn end(mut self, time: Duration) {
        for index in 0..self.slots.len() as u32 {
            let slot = &self.slots[index as usize];
            if slot.generation != NOBODY && !slot.closing {
                // Its owner outlives the engine.
                let key = slot.key(index);
                self.close(key, true);
            }
        }
        let deadline_ns = clock::monotonic_ns() + time.as_nanos() as u64;
        const STEP: Duration = Duration::from_millis(5);
        while self.closing > 0 && clock::monotonic_ns() < deadline_ns {
            self.park(STEP, Duration::ZERO);
        }
        for index in 0..self.slots.len() as u32 {
            let slot = &self.slots[index as usize];
            if slot.closing {
                let key = slot.key(index);
                self.cancel(Kind::Send, key);
            }
        }
        let until_ns = clock::monotonic_ns() + Duration::from_secs(1).as_nanos() as u64;
        while self.closing > 0 && clock::monotonic_ns() < until_ns {
            self.park(STEP, Duration::ZERO);
        }
        self.park(Duration::ZERO, Duration::ZERO);
        if self.closing > 0 {
            // The kernel still uses bytes of a slot, for whatever reason: better they leak with this thread's end than are
            // used by others.
            Box::leak(Box::new(self));
        }
    }
}

impl Slot {
    fn key(&self, index: u32) -> Key {
        Key {
            index,
            generation: self.generation,
        }
    }
}

/// Ends the sending side where that is wanted and nothing is left to send.
fn end_if_flushed(slot: &mut Slot) {
    if slot.end_wanted && slot.is_flushed() {
        slot.end_wanted = false;
        crate::net::tcp::end_sending(slot.fd);
    }
}

fn close_now(fd: RawFd) {
    // SAFETY: the descriptor came from an accept and has no other owner.
    drop(unsafe { <std::os::fd::OwnedFd as std::os::fd::FromRawFd>::from_raw_fd(fd) });
}

/// Generations have this many bits, so that they fit into a tag.
const GENERATION_MASK: u32 = (1 << 24) - 1;

/// The generation of a free slot: none that a key could have.
const NOBODY: u32 = u32::MAX;

fn tag(kind: Kind, key: Key) -> u64 {
    (kind as u64) << 56 | u64::from(key.generation) << 32 | u64::from(key.index)
}

fn parts(tag: u64) -> (Kind, Key) {
    let kind = match tag >> 56 {
        1 => Kind::Receive,
        2 => Kind::Send,
        3 => Kind::Ready,
        4 => Kind::Accept,
        _ => Kind::Aside,
    };
    let key = Key {
        index: tag as u32,
        generation: (tag >> 32) as u32 & GENERATION_MASK,
    };
    (kind, key)
}
