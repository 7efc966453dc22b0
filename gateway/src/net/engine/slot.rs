//! What the ring knows of one descriptor.

use std::{collections::VecDeque, io, os::fd::RawFd, task::Waker};

use super::chain::Chain;

/// Bytes that wait to be sent behind those that are being sent, for one socket. A writer that has more is told to
/// wait: this is the back-pressure, together with what the kernel takes.
pub const QUEUE_BYTES_MAX: usize = 16 * 1024;

/// Bytes that are kept for a reader that does not read, before the kernel is told to stop receiving; what comes until it
/// has stopped, a turn's buffers at most, is kept too. The rest waits in the kernel and holds the peer back.
const SPILL_BYTES_MAX: usize = 16 * 1024;

/// How receiving stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Receiving {
    /// The kernel delivers what comes.
    Armed,
    /// To be armed before the next wait.
    Due,
    /// The reader does not keep up; the kernel has been told to stop and may still deliver a little.
    Stopping,
    /// Nothing is asked of the kernel until the reader has taken what is here.
    Stopped,
    /// The peer has ended its side.
    End,
    /// The connection is broken (errno).
    Broken(i32),
}

/// One socket, connected or listening, or one that is being closed.
pub struct Slot {
    pub fd: RawFd,
    /// Tells uses of the same place apart.
    pub generation: u32,
    /// Requests of this socket that the kernel has not completed. The descriptor is closed when there are none.
    pub pending: u16,
    pub receiving: Receiving,
    /// It is in the list of those that received something this turn.
    pub is_touched: bool,
    /// A send waits for the end of the turn.
    pub is_dirty: bool,
    /// `sending` is the kernel's until its completion.
    pub in_flight: bool,
    /// Something was sent since a write last found no room.
    pub progress: bool,
    /// The kernel took less than it was given by a direct write: wait for readiness.
    pub blocked: bool,
    /// A wait for readiness is in the kernel.
    pub polling: bool,
    /// End the sending side when all is sent.
    pub end_wanted: bool,
    /// Nobody owns it any more.
    pub closing: bool,
    /// Buffers received and not read.
    pub received: Chain,
    /// What was received and not read within its turn, copied out so that the buffers are free for others.
    pub spill: Vec<u8>,
    /// How much of `spill` has been read.
    pub spill_read: usize,
    pub reader: Option<Waker>,
    /// What is being sent, and how much of it has been.
    pub sending: Vec<u8>,
    pub sent: usize,
    /// What is to be sent next.
    pub queue: Vec<u8>,
    pub writer: Option<Waker>,
    /// Why sending has failed (errno); 0: it has not.
    pub broken: i32,
    /// Of a listener: connections that nobody has taken yet. Boxed: there are many connections and few listeners.
    pub accepted: Option<Box<Backlog>>,
    /// When a closing socket last made progress, nanoseconds of the monotonic clock.
    pub moved_ns: u64,
}

// Two of them for each open stream.
const _: () = assert!(size_of::<Slot>() <= 176);

/// See [`Slot::accepted`].
#[derive(Default)]
pub struct Backlog(pub VecDeque<io::Result<RawFd>>);

impl Slot {
    pub fn new(fd: RawFd, generation: u32) -> Slot {
        Slot {
            fd,
            generation,
            pending: 0,
            receiving: Receiving::Stopped,
            is_touched: false,
            is_dirty: false,
            in_flight: false,
            progress: false,
            blocked: false,
            polling: false,
            end_wanted: false,
            closing: false,
            received: Chain::default(),
            spill: Vec::new(),
            spill_read: 0,
            reader: None,
            sending: Vec::new(),
            sent: 0,
            queue: Vec::new(),
            writer: None,
            broken: 0,
            accepted: None,
            moved_ns: 0,
        }
    }

    /// Whether a read would bring something: bytes, the end, or an error.
    pub fn is_readable(&self) -> bool {
        !self.received.is_empty()
            || self.spill_read < self.spill.len()
            || matches!(self.receiving, Receiving::End | Receiving::Broken(_))
    }

    /// Whether more is kept for the reader than it should be.
    pub fn is_overfull(&self) -> bool {
        self.spill.len() - self.spill_read > SPILL_BYTES_MAX
    }

    /// Whether everything written has been handed to the kernel.
    pub fn is_flushed(&self) -> bool {
        !self.in_flight && self.queue.is_empty()
    }

    /// Whether a write would bring something: room, an error, or the news that the peer takes bytes.
    pub fn is_writable(&self) -> bool {
        self.broken != 0 || (!self.blocked && (self.progress || self.queue.len() < QUEUE_BYTES_MAX))
    }

    /// Wakes who waits to read.
    pub fn wake_reader(&mut self) {
        if let Some(waker) = self.reader.take() {
            waker.wake();
        }
    }

    /// Wakes who waits to write.
    pub fn wake_writer(&mut self) {
        if let Some(waker) = self.writer.take() {
            waker.wake();
        }
    }
}
