//! The engine on io_uring: one ring per core, entered once a turn.
//!
//! Receives are multishot into one ring of provided buffers; what is not read within its turn is copied out. Writes are
//! queued in memory and sent, one request a socket at a time, when the turn is over. Needs Linux 6.1
//! (`DEFER_TASKRUN`, multishot receive, provided buffer rings); with 6.12 a wait can gather events for a time.
//!
//! The kernel uses three kinds of memory of this process while a request runs: the provided buffers (owned by
//! [`Buffers`], which outlives the ring), the bytes being sent (owned by the slot until the completion), and the argument
//! of the wait (on the stack, over the call). A slot and its descriptor live until the last completion is here.

use std::{
    io::{self, IoSlice},
    os::fd::RawFd,
    task::{Context, Poll, Waker},
    time::Duration,
};

use io_uring::{IoUring, cqueue, opcode, squeue, types};

use super::{
    buffers::{BUFFER_BYTES, Buffers, GROUP},
    chain::Links,
    slot::{QUEUE_BYTES_MAX, Receiving, Slot},
};
use crate::net::clock;

/// Submission queue entries: requests of one turn. When there are more, they are submitted early.
const ENTRIES: u32 = 1024;

/// Completion queue entries. The kernel keeps what does not fit.
const COMPLETIONS: u32 = 8192;

/// From how many bytes on a write goes to the kernel at once, from the caller's memory: then the copy costs more than a
/// system call.
const DIRECT_BYTES: usize = 4 * 1024;

/// Events for which a gathering wait ends early: more would not be cheaper, and the buffers must suffice for them.
const GATHER_EVENTS: u32 = 128;

/// How long a wait that expects its own sends to complete at once may be held up when they do not.
const SENDS_WAIT: Duration = Duration::from_micros(100);

/// Send buffers that are kept for the next turn, and the largest kept.
const SPARE_MAX: usize = 1024;
const SPARE_BYTES: usize = 1024;
const SPARE_BYTES_MAX: usize = 4 * 1024;

/// How long a socket that nobody owns any more may take none of what it was sent; then it is reset. The kernel would
/// keep it for minutes.
const LINGER: Duration = Duration::from_secs(10);

/// `IORING_ENTER_GETEVENTS` and `IORING_ENTER_EXT_ARG` (linux/io_uring.h).
const ENTER_GET_EVENTS: u32 = 1;
const ENTER_EXTENDED: u32 = 1 << 3;

/// `struct io_uring_getevents_arg` (linux/io_uring.h).
#[repr(C)]
struct WaitArgument {
    sigmask: u64,
    sigmask_bytes: u32,
    min_wait_us: u32,
    timeout: u64,
}

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
    /// Send buffers for reuse, the last used on top.
    spare: Vec<Vec<u8>>,
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

    fn with_entries(entries: u32) -> io::Result<Ring> {
        let uring: IoUring = IoUring::builder()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .setup_submit_all()
            .setup_cqsize(COMPLETIONS.min(entries * 8))
            .build(entries)?;
        let buffers = Buffers::new(&uring.submitter())?;
        let can_gather = can_gather(&uring);
        Ok(Ring {
            links: Links::new(super::buffers::BUFFERS),
            uring,
            buffers,
            slots: Vec::new(),
            free: Vec::new(),
            generation: 0,
            touched: Vec::new(),
            dirty: Vec::new(),
            due: Vec::new(),
            closing: 0,
            swept_ns: 0,
            spare: Vec::new(),
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

    /// As [`crate::net::tcp::Sock::try_read`].
    pub fn try_read(&mut self, key: Key, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        if self.slot(key).is_none() {
            return Err(io::ErrorKind::NotConnected.into());
        }
        let slot = &mut self.slots[key.index as usize];
        let mut n = 0;
        if slot.spill_read < slot.spill.len() {
            n = buffer.len().min(slot.spill.len() - slot.spill_read);
            buffer[..n].copy_from_slice(&slot.spill[slot.spill_read..slot.spill_read + n]);
            slot.spill_read += n;
            if slot.spill_read == slot.spill.len() {
                slot.spill = Vec::new();
                slot.spill_read = 0;
            }
        }
        while n < buffer.len() {
            let Some((number, range)) = self.links.first(&slot.received) else {
                break;
            };
            let take = (buffer.len() - n).min(range.len());
            let bytes = self.buffers.bytes(number, range.start..range.start + take);
            buffer[n..n + take].copy_from_slice(bytes);
            n += take;
            if let Some(number) = self.links.consume(&mut slot.received, take) {
                self.buffers.give(number);
            }
        }
        if n > 0 || buffer.is_empty() {
            if slot.receiving == Receiving::Stopped && slot.spill.is_empty() {
                slot.receiving = Receiving::Due;
                self.due.push(key.index);
            }
            return Ok(Some(n));
        }
        match slot.receiving {
            Receiving::End => Ok(Some(0)),
            Receiving::Broken(errno) => Err(io::Error::from_raw_os_error(errno)),
            _ => Ok(None),
        }
    }

    /// As [`crate::net::tcp::Sock::peek`]; knows what has been received by the last wait.
    pub fn peek(&mut self, key: Key) -> Option<bool> {
        let Some(slot) = self.slot(key) else {
            return Some(true);
        };
        let has_bytes = !slot.received.is_empty() || slot.spill_read < slot.spill.len();
        slot.is_readable().then_some(!has_bytes)
    }

    /// Ready when a read would bring something; otherwise notes who waits.
    pub fn poll_readable(&mut self, key: Key, cx: &mut Context<'_>) -> Poll<()> {
        let Some(slot) = self.slot(key) else {
            return Poll::Ready(());
        };
        if slot.is_readable() {
            return Poll::Ready(());
        }
        note(&mut slot.reader, cx.waker());
        Poll::Pending
    }

    /// As [`crate::net::tcp::Sock::try_write_vectored`].
    pub fn try_write(&mut self, key: Key, pieces: &[IoSlice<'_>]) -> io::Result<Option<usize>> {
        let Some(slot) = self.slot(key) else {
            return Err(io::ErrorKind::NotConnected.into());
        };
        if slot.broken != 0 {
            return Err(io::Error::from_raw_os_error(slot.broken));
        }
        let total: usize = pieces.iter().map(|piece| piece.len()).sum();
        if total >= DIRECT_BYTES && slot.is_flushed() {
            let taken = crate::net::tcp::send_now(slot.fd, pieces)?;
            slot.blocked = taken != Some(total);
            return Ok(taken);
        }
        let slot = &mut self.slots[key.index as usize];
        if slot.queue.capacity() == 0 {
            slot.queue = self.spare.pop().unwrap_or_else(|| Vec::with_capacity(SPARE_BYTES));
        }
        let mut taken = 0;
        for piece in pieces {
            let take = piece.len().min(QUEUE_BYTES_MAX - slot.queue.len());
            slot.queue.extend_from_slice(&piece[..take]);
            taken += take;
            if take < piece.len() {
                break;
            }
        }
        if !slot.in_flight && !slot.is_dirty {
            slot.is_dirty = true;
            self.dirty.push(key.index);
        }
        if taken < total {
            slot.progress = false;
        }
        Ok((taken > 0 || total == 0).then_some(taken))
    }

    /// Ready when a write may bring something; otherwise notes who waits.
    pub fn poll_writable(&mut self, key: Key, cx: &mut Context<'_>) -> Poll<()> {
        let Some(slot) = self.slot(key) else {
            return Poll::Ready(());
        };
        if slot.is_writable() {
            return Poll::Ready(());
        }
        note(&mut slot.writer, cx.waker());
        if slot.blocked && !slot.polling {
            slot.polling = true;
            slot.pending += 1;
            let entry = opcode::PollAdd::new(types::Fd(slot.fd), libc::POLLOUT as u32).build();
            self.submit(entry.user_data(tag(Kind::Ready, key)));
        }
        Poll::Pending
    }

    /// Ends the sending side when everything written has been sent.
    pub fn shutdown_write(&mut self, key: Key) {
        if let Some(slot) = self.slot(key) {
            slot.end_wanted = true;
            end_if_flushed(slot);
        }
    }

    /// The next connection of a listener.
    pub fn poll_accept(&mut self, key: Key, cx: &mut Context<'_>) -> Poll<io::Result<RawFd>> {
        let Some(slot) = self.slot(key) else {
            return Poll::Ready(Err(io::ErrorKind::NotConnected.into()));
        };
        if let Some(next) = slot.accepted.as_mut().and_then(|accepted| accepted.pop_front()) {
            return Poll::Ready(next);
        }
        note(&mut slot.reader, cx.waker());
        if slot.receiving != Receiving::Armed {
            self.start_accepting(key.index);
        }
        Poll::Pending
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
        let kind = if accepted.is_some() { Kind::Accept } else { Kind::Receive };
        let abort = reset && slot.in_flight;
        if reset {
            slot.queue = Vec::new();
        }
        self.closing += 1;
        for fd in accepted.into_iter().flat_map(|accepted| *accepted).flatten() {
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
        self.submit(entry.flags(squeue::Flags::SKIP_SUCCESS).user_data(tag(Kind::Aside, key)));
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
        // Of no generation that a key could have.
        slot.generation = u32::MAX;
        slot.closing = false;
        self.closing -= 1;
        self.free.push(index);
        let entry = opcode::Close::new(types::Fd(fd)).build();
        self.submit(entry.flags(squeue::Flags::SKIP_SUCCESS).user_data(tag(Kind::Aside, key)));
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

    /// Hands the turn's requests to the kernel and waits, at most `time`, until there is something to do; not at all where
    /// `time` is zero. `gather`: how long events may be collected before the first is acted on.
    pub fn park(&mut self, time: Duration, gather: Duration) {
        let deadline_ns = clock::monotonic_ns() + time.as_nanos() as u64;
        let mut left = time;
        loop {
            let sends = self.end_turn();
            self.enter(sends, left, gather);
            if self.reap() || left.is_zero() {
                break;
            }
            left = Duration::from_nanos(deadline_ns.saturating_sub(clock::monotonic_ns()));
            if left.is_zero() {
                break;
            }
        }
        if self.closing > 0 {
            self.sweep_closing();
        }
    }

    /// Makes requests of what the turn has left to do. Returns how many sends there are whose completion nobody waits for.
    fn end_turn(&mut self) -> u32 {
        let mut touched = std::mem::take(&mut self.touched);
        for index in touched.drain(..) {
            self.spill(index);
        }
        self.touched = touched;
        let mut unwatched = 0;
        let mut dirty = std::mem::take(&mut self.dirty);
        for index in dirty.drain(..) {
            self.slots[index as usize].is_dirty = false;
            unwatched += u32::from(self.send_queue(index));
        }
        self.dirty = dirty;
        let mut due = std::mem::take(&mut self.due);
        for index in due.drain(..) {
            self.receive(index);
        }
        self.due = due;
        self.buffers.publish();
        unwatched
    }

    /// Copies out what was not read within the turn.
    fn spill(&mut self, index: u32) {
        let slot = &mut self.slots[index as usize];
        slot.is_touched = false;
        if slot.received.is_empty() {
            return;
        }
        slot.spill.drain(..std::mem::take(&mut slot.spill_read));
        slot.spill.reserve_exact(self.links.bytes(&slot.received));
        while let Some((number, range)) = self.links.first(&slot.received) {
            let n = range.len();
            slot.spill.extend_from_slice(self.buffers.bytes(number, range));
            if let Some(number) = self.links.consume(&mut slot.received, n) {
                self.buffers.give(number);
            }
        }
        if slot.is_overfull() && slot.receiving == Receiving::Armed {
            slot.receiving = Receiving::Stopping;
            let key = slot.key(index);
            self.cancel(Kind::Receive, key);
        }
    }

    /// Sends what is queued. Tells whether it does and nobody waits for that.
    fn send_queue(&mut self, index: u32) -> bool {
        let slot = &mut self.slots[index as usize];
        if slot.in_flight || slot.queue.is_empty() || slot.broken != 0 {
            return false;
        }
        slot.sending = std::mem::take(&mut slot.queue);
        slot.sent = 0;
        slot.in_flight = true;
        let unwatched = !slot.is_watched();
        self.send_rest(index);
        unwatched
    }

    fn send_rest(&mut self, index: u32) {
        let slot = &mut self.slots[index as usize];
        slot.pending += 1;
        let rest = &slot.sending[slot.sent..];
        let entry = opcode::Send::new(types::Fd(slot.fd), rest.as_ptr(), rest.len() as u32)
            .flags(libc::MSG_NOSIGNAL | libc::MSG_WAITALL)
            .build();
        let key = slot.key(index);
        self.submit(entry.user_data(tag(Kind::Send, key)));
    }

    fn receive(&mut self, index: u32) {
        let slot = &mut self.slots[index as usize];
        if slot.receiving != Receiving::Due || slot.closing {
            return;
        }
        if slot.is_overfull() {
            // Reading arms it again.
            slot.receiving = Receiving::Stopped;
            return;
        }
        slot.receiving = Receiving::Armed;
        slot.pending += 1;
        let key = slot.key(index);
        let entry = opcode::RecvMulti::new(types::Fd(slot.fd), GROUP).build();
        self.submit(entry.user_data(tag(Kind::Receive, key)));
    }

    /// The one system call of a turn.
    fn enter(&mut self, sends: u32, time: Duration, gather: Duration) {
        let timeout = types::Timespec::new()
            .sec(time.as_secs())
            .nsec(time.subsec_nanos());
        let (mut events, mut min_wait) = (u32::from(!time.is_zero()), Duration::ZERO);
        if events > 0 && self.can_gather {
            // Sends to sockets with room complete at once and are not what is waited for.
            if !gather.is_zero() {
                (events, min_wait) = (sends + GATHER_EVENTS, gather);
            } else if sends > 0 {
                (events, min_wait) = (sends + 1, SENDS_WAIT);
            }
        } else if sends > 0 {
            // They would end the wait at once.
            events = 0;
        }
        let argument = WaitArgument {
            sigmask: 0,
            sigmask_bytes: 0,
            min_wait_us: min_wait.min(time).as_micros() as u32,
            timeout: (&raw const timeout) as u64,
        };
        let submitted = self.uring.submission().len() as u32;
        let flags = ENTER_GET_EVENTS | ENTER_EXTENDED;
        // SAFETY: the argument and the timespec live over the call; the entries are sound by `submit`. Errors: a signal
        // or the time is up, or the completion queue is full, which reaping mends.
        let _ = unsafe {
            self.uring
                .submitter()
                .enter(submitted, events, flags, Some(&argument))
        };
    }

    /// Deals with all completions. Tells whether anything came that somebody may wait for.
    fn reap(&mut self) -> bool {
        let mut any = false;
        loop {
            let Some(entry) = self.uring.completion().next() else {
                return any;
            };
            let (kind, key) = parts(entry.user_data());
            let (result, flags) = (entry.result(), entry.flags());
            let Some(slot) = self.slots.get_mut(key.index as usize) else {
                continue;
            };
            if kind == Kind::Aside || slot.generation != key.generation {
                // A cancellation that found nothing, a close that failed.
                continue;
            }
            if !cqueue::more(flags) {
                slot.pending -= 1;
            }
            match kind {
                Kind::Receive => any |= self.received(key.index, result, flags),
                Kind::Send => any |= self.sent(key.index, result),
                Kind::Ready => {
                    slot.polling = false;
                    slot.blocked = false;
                    slot.wake_writer();
                    any = true;
                }
                Kind::Accept => any |= accepted(slot, result, flags),
                Kind::Aside => {}
            }
            if self.slots[key.index as usize].closing {
                self.finish_if_idle(key.index);
            }
        }
    }

    fn received(&mut self, index: u32, result: i32, flags: u32) -> bool {
        let slot = &mut self.slots[index as usize];
        let ended = !cqueue::more(flags);
        if let Some(number) = cqueue::buffer_select(flags) {
            if result > 0 && !slot.closing {
                self.links.push(&mut slot.received, number, result as u32);
                debug_assert!(result as usize <= BUFFER_BYTES);
                if !slot.is_touched {
                    slot.is_touched = true;
                    self.touched.push(index);
                }
            } else {
                self.buffers.give(number);
            }
        }
        if ended {
            let stopped = slot.receiving == Receiving::Stopping;
            slot.receiving = match -result {
                0 => Receiving::End,
                libc::ENOBUFS => {
                    // Many sockets want many buffers; for a few that flood, the next turn is soon enough.
                    if self.touched.len() * 2 >= self.buffers.in_use() {
                        self.buffers.grow();
                    }
                    Receiving::Due
                }
                libc::ECANCELED if stopped => Receiving::Stopped,
                errno if errno > 0 && errno != libc::EINTR && errno != libc::EAGAIN && errno != libc::ECANCELED => {
                    Receiving::Broken(errno)
                }
                // Ended for the kernel's own reasons, for example a full completion queue.
                _ => Receiving::Due,
            };
            // A reader that has caught up meanwhile would never say so again.
            if slot.receiving == Receiving::Stopped && slot.spill.is_empty() {
                slot.receiving = Receiving::Due;
            }
            if slot.receiving == Receiving::Due {
                self.due.push(index);
            }
        }
        let wakes = slot.is_readable() && slot.reader.is_some();
        if wakes {
            slot.wake_reader();
        }
        // What is due must be armed before the next wait, which ends the turn too.
        wakes
    }

    fn sent(&mut self, index: u32, result: i32) -> bool {
        let slot = &mut self.slots[index as usize];
        slot.moved_ns = 0;
        if result <= 0 {
            // Nothing sent and no reason told: never seen, and not to be tried for ever.
            let errno = if result == 0 { libc::EPIPE } else { -result };
            if errno == libc::EINTR || errno == libc::EAGAIN {
                self.send_rest(index);
                return false;
            }
            slot.broken = errno;
            slot.queue = Vec::new();
        } else {
            slot.sent += result as usize;
            if slot.sent < slot.sending.len() {
                self.send_rest(index);
                return false;
            }
            slot.progress = true;
        }
        slot.in_flight = false;
        let mut done = std::mem::take(&mut slot.sending);
        if done.capacity() <= SPARE_BYTES_MAX && self.spare.len() < SPARE_MAX {
            done.clear();
            self.spare.push(done);
        }
        if !slot.queue.is_empty() && !slot.is_dirty {
            slot.is_dirty = true;
            self.dirty.push(index);
        }
        end_if_flushed(slot);
        let wakes = slot.writer.is_some();
        slot.wake_writer();
        wakes
    }

    /// Resets what was given up and whose peer takes nothing.
    fn sweep_closing(&mut self) {
        let now_ns = clock::monotonic_ns();
        if now_ns - self.swept_ns < Duration::from_secs(1).as_nanos() as u64 {
            return;
        }
        self.swept_ns = now_ns;
        for index in 0..self.slots.len() as u32 {
            let slot = &mut self.slots[index as usize];
            if !slot.closing {
                continue;
            }
            if slot.moved_ns == 0 {
                slot.moved_ns = now_ns;
            }
            if now_ns - slot.moved_ns > LINGER.as_nanos() as u64 {
                let key = slot.key(index);
                slot.queue = Vec::new();
                crate::net::tcp::linger_zero(slot.fd);
                self.cancel(Kind::Send, key);
            }
        }
    }

    /// Ends the ring: what was given up is still sent, for at most `time`; everything else is cancelled.
    pub fn end(mut self, time: Duration) {
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

fn accepted(slot: &mut Slot, result: i32, flags: u32) -> bool {
    if !cqueue::more(flags) {
        slot.receiving = Receiving::Stopped;
    }
    let next = if result >= 0 {
        Ok(result)
    } else {
        Err(io::Error::from_raw_os_error(-result))
    };
    match (&mut slot.accepted, next) {
        (Some(accepted), next) => accepted.push_back(next),
        // The listener is gone.
        (None, Ok(fd)) => close_now(fd),
        (None, Err(_)) => {}
    }
    slot.wake_reader();
    true
}

/// Ends the sending side where that is wanted and nothing is left to send.
fn end_if_flushed(slot: &mut Slot) {
    if slot.end_wanted && slot.is_flushed() {
        slot.end_wanted = false;
        crate::net::tcp::end_sending(slot.fd);
    }
}

fn note(place: &mut Option<Waker>, waker: &Waker) {
    match place {
        Some(known) => known.clone_from(waker),
        None => *place = Some(waker.clone()),
    }
}

fn close_now(fd: RawFd) {
    // SAFETY: the descriptor came from an accept and has no other owner.
    drop(unsafe { <std::os::fd::OwnedFd as std::os::fd::FromRawFd>::from_raw_fd(fd) });
}

/// Generations have this many bits, so that they fit into a tag.
const GENERATION_MASK: u32 = (1 << 24) - 1;

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

/// Whether a wait can have a minimum time (6.12). Kernels that cannot demand that its field is zero.
fn can_gather(uring: &IoUring) -> bool {
    let timeout = types::Timespec::new();
    let argument = WaitArgument {
        sigmask: 0,
        sigmask_bytes: 0,
        min_wait_us: 1,
        timeout: (&raw const timeout) as u64,
    };
    // SAFETY: the argument and the timespec live over the call, which submits nothing.
    let waited = unsafe {
        uring
            .submitter()
            .enter(0, 1, ENTER_GET_EVENTS | ENTER_EXTENDED, Some(&argument))
    };
    !waited.is_err_and(|error| error.raw_os_error() == Some(libc::EINVAL))
}
