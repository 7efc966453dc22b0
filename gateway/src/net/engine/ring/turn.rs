//! The end of a turn: what the tasks have left to do goes to the kernel, and what has come is dealt with.

use std::{io, time::Duration};

use io_uring::{IoUring, cqueue, opcode, types};

use super::{Kind, Ring, close_now, end_if_flushed, parts, tag};
use crate::net::{
    clock,
    engine::{
        buffers::{BUFFER_BYTES, GROUP},
        slot::{Receiving, Slot},
    },
};

/// Bytes received in a turn from which on the next wait gathers nothing: somebody sends as fast as it goes, who would wait for
/// each turn. Streamed events of a turn are some kilobytes.
const GATHER_BYTES_MAX: usize = 64 * 1024;

/// How long a socket that nobody owns any more may take none of what it was sent; then it is reset. The kernel would
/// keep it for minutes.
const LINGER: Duration = Duration::from_secs(30);

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

impl Ring {
    /// Hands the turn's requests to the kernel and waits, at most `time`, until there is something to do; not at all where
    /// `time` is zero. `gather`: how long events may be collected before the first is acted on.
    pub fn park(&mut self, time: Duration, gather: Duration) {
        let gather = match std::mem::take(&mut self.received_bytes) {
            0..GATHER_BYTES_MAX => gather,
            _ => Duration::ZERO,
        };
        let mut deadline_ns = None;
        let mut left = time;
        loop {
            if self.end_turn() && !left.is_zero() {
                // Most sends are over when the call returns, and are not what is to be waited for.
                let _ = self.uring.submit();
                if self.reap() {
                    break;
                }
                continue;
            }
            if deadline_ns.is_none() && !left.is_zero() {
                deadline_ns = Some(clock::monotonic_ns() + time.as_nanos() as u64);
            }
            self.enter(left, gather);
            if self.reap() || left.is_zero() {
                break;
            }
            let deadline_ns = deadline_ns.unwrap_or_default();
            left = Duration::from_nanos(deadline_ns.saturating_sub(clock::monotonic_ns()));
            if left.is_zero() {
                break;
            }
        }
        if self.closing > 0 {
            self.sweep_closing();
        }
    }

    /// Makes requests of what the turn has left to do. Tells whether there are sends among them.
    fn end_turn(&mut self) -> bool {
        let mut touched = std::mem::take(&mut self.touched);
        for index in touched.drain(..) {
            self.spill(index);
        }
        self.touched = touched;
        // What was received has been copied out above, and nothing has been asked of the kernel since the last look at what
        // has come: no buffer is held but by the kernel. Else the next turn does it.
        if self.releases && !self.uring.submission().cq_overflow() && self.uring.completion().is_empty() {
            self.releases = false;
            self.buffers.release_memory();
        }
        let mut dirty = std::mem::take(&mut self.dirty);
        let any = !dirty.is_empty();
        for index in dirty.drain(..) {
            self.slots[index as usize].is_dirty = false;
            self.send_queue(index);
        }
        self.dirty = dirty;
        let mut due = std::mem::take(&mut self.due);
        for index in due.drain(..) {
            self.receive(index);
        }
        self.due = due;
        self.buffers.publish();
        any
    }

    /// Copies out what was not read within the turn.
    fn spill(&mut self, index: u32) {
        let slot = &mut self.slots[index as usize];
        slot.is_touched = false;
        if slot.received.is_empty() {
            return;
        }
        slot.spill.drain(..std::mem::take(&mut slot.spill_read));
        if slot.spill.capacity() == 0 {
            slot.spill = self.spare.take();
        }
        // Few different sizes, so that the allocator finds the last one's place for the next.
        let wanted = slot.spill.len() + self.links.bytes(&slot.received);
        let more = wanted.next_power_of_two() - slot.spill.len();
        slot.spill.reserve_exact(more);
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

    /// Sends what is queued.
    fn send_queue(&mut self, index: u32) {
        let slot = &mut self.slots[index as usize];
        if slot.in_flight || slot.queue.is_empty() || slot.broken != 0 {
            return;
        }
        slot.sending = std::mem::take(&mut slot.queue);
        slot.sent = 0;
        slot.in_flight = true;
        self.send_rest(index);
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

    /// Submits what there is and waits.
    fn enter(&mut self, time: Duration, gather: Duration) {
        let timeout = types::Timespec::new()
            .sec(time.as_secs())
            .nsec(time.subsec_nanos());
        let (mut events, mut min_wait) = (u32::from(!time.is_zero()), Duration::ZERO);
        if events > 0 && self.can_gather && !gather.is_zero() {
            (events, min_wait) = (self.enough.at(clock::turn_ns()), gather);
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
        self.receives += 1;
        self.enough.count();
        if let Some(number) = cqueue::buffer_select(flags) {
            if result > 0 && !slot.closing {
                self.links.push(&mut slot.received, number, result as u32);
                self.received_bytes += result as usize;
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
                errno
                    if errno > 0
                        && errno != libc::EINTR
                        && errno != libc::EAGAIN
                        && errno != libc::ECANCELED =>
                {
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
        self.spare.give(std::mem::take(&mut slot.sending));
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
        (Some(accepted), next) => accepted.0.push_back(next),
        // The listener is gone.
        (None, Ok(fd)) => close_now(fd),
        (None, Err(_)) => {}
    }
    slot.wake_reader();
    true
}

/// Whether a wait can have a minimum time (6.12). Kernels that cannot demand that its field is zero.
pub(super) fn can_gather(uring: &IoUring) -> bool {
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
