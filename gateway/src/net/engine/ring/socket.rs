//! What a socket's owner asks of the ring, between two waits.

use std::{
    io::{self, IoSlice},
    os::fd::RawFd,
    task::{Context, Poll, Waker},
};

use io_uring::{opcode, types};

use super::{Key, Kind, Ring, end_if_flushed, tag};
use crate::net::{
    engine::slot::{QUEUE_BYTES_MAX, Receiving},
    tcp,
};

/// From how many bytes on a write goes to the kernel at once, from the caller's memory: then the copy costs more than a
/// system call.
const DIRECT_BYTES: usize = 4 * 1024;

impl Ring {
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
                self.spare.give(std::mem::take(&mut slot.spill));
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
        if slot.receiving == Receiving::Due {
            // The kernel has not been asked yet, and on a new connection the request is mostly there already.
            let got = tcp::receive_now(slot.fd, buffer, 0);
            match &got {
                Ok(Some(0)) => slot.receiving = Receiving::End,
                Ok(_) => {}
                Err(error) => {
                    slot.receiving = Receiving::Broken(error.raw_os_error().unwrap_or(libc::ECONNRESET));
                }
            }
            return got;
        }
        match slot.receiving {
            Receiving::End => Ok(Some(0)),
            Receiving::Broken(errno) => Err(io::Error::from_raw_os_error(errno)),
            _ => Ok(None),
        }
    }

    /// As [`crate::net::tcp::Sock::try_peek`]. What is looked at is copied once more: for headers before the client's own
    /// bytes, of which there is one a connection.
    pub fn try_peek(&mut self, key: Key, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        let got = self.try_read(key, buffer)?;
        if let Some(n) = got {
            let mut back = self.spare.take();
            let slot = &mut self.slots[key.index as usize];
            back.extend_from_slice(&buffer[..n]);
            back.extend_from_slice(&slot.spill[slot.spill_read..]);
            self.spare.give(std::mem::replace(&mut slot.spill, back));
            slot.spill_read = 0;
        }
        Ok(got)
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
            let taken = tcp::send_now(slot.fd, pieces)?;
            slot.blocked = taken != Some(total);
            return Ok(taken);
        }
        let slot = &mut self.slots[key.index as usize];
        if slot.queue.capacity() == 0 {
            slot.queue = self.spare.take();
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
        if let Some(next) = slot.accepted.as_mut().and_then(|accepted| accepted.0.pop_front()) {
            return Poll::Ready(next);
        }
        note(&mut slot.reader, cx.waker());
        if slot.receiving != Receiving::Armed {
            self.start_accepting(key.index);
        }
        Poll::Pending
    }
}

fn note(place: &mut Option<Waker>, waker: &Waker) {
    match place {
        Some(known) => known.clone_from(waker),
        None => *place = Some(waker.clone()),
    }
}
