//! The engine on epoll, for hosts where io_uring is forbidden or too old.
//!
//! Each socket is registered once, edge-triggered; what the kernel has told is remembered until a call finds that it is
//! no longer so.

use std::{
    io::{self, IoSlice},
    os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd},
    task::{Context, Poll, Waker},
    time::Duration,
};

use crate::net::tcp;

/// Events taken with one call.
const EVENTS: usize = 512;

/// What is known of one descriptor.
struct Slot {
    fd: OwnedFd,
    generation: u32,
    readable: bool,
    writable: bool,
    /// The peer has ended, or the connection is broken: a read will always tell something.
    ended: bool,
    end_wanted: bool,
    reader: Option<Waker>,
    writer: Option<Waker>,
}

/// Which socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Key {
    index: u32,
    generation: u32,
}

/// See the module.
pub struct Epoll {
    epoll: OwnedFd,
    slots: Vec<Option<Slot>>,
    free: Vec<u32>,
    generation: u32,
    events: Vec<libc::epoll_event>,
}

impl Epoll {
    /// An engine for this thread.
    pub fn new() -> io::Result<Epoll> {
        // SAFETY: epoll_create1 takes no memory; the descriptor it returns is ours.
        let epoll = unsafe {
            let fd = libc::epoll_create1(libc::EPOLL_CLOEXEC);
            if fd < 0 {
                return Err(io::Error::last_os_error());
            }
            OwnedFd::from_raw_fd(fd)
        };
        Ok(Epoll {
            epoll,
            slots: Vec::new(),
            free: Vec::new(),
            generation: 0,
            events: vec![libc::epoll_event { events: 0, u64: 0 }; EVENTS],
        })
    }

    /// Takes a descriptor in.
    pub fn add(&mut self, fd: OwnedFd) -> io::Result<Key> {
        self.generation = self.generation.wrapping_add(1);
        let index = self.free.pop().unwrap_or_else(|| {
            self.slots.push(None);
            (self.slots.len() - 1) as u32
        });
        let key = Key {
            index,
            generation: self.generation,
        };
        let mut event = libc::epoll_event {
            events: (libc::EPOLLIN | libc::EPOLLOUT | libc::EPOLLRDHUP | libc::EPOLLET) as u32,
            u64: u64::from(key.generation) << 32 | u64::from(index),
        };
        // SAFETY: the event lives over the call, which only reads it.
        let added = unsafe {
            libc::epoll_ctl(
                self.epoll.as_raw_fd(),
                libc::EPOLL_CTL_ADD,
                fd.as_raw_fd(),
                &mut event,
            )
        };
        if added < 0 {
            self.free.push(index);
            return Err(io::Error::last_os_error());
        }
        self.slots[index as usize] = Some(Slot {
            fd,
            generation: key.generation,
            readable: false,
            writable: false,
            ended: false,
            end_wanted: false,
            reader: None,
            writer: None,
        });
        Ok(key)
    }

    fn slot(&mut self, key: Key) -> Option<&mut Slot> {
        let slot = self.slots.get_mut(key.index as usize)?.as_mut()?;
        (slot.generation == key.generation).then_some(slot)
    }

    /// As [`tcp::Sock::try_read`].
    pub fn try_read(&mut self, key: Key, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        let Some(slot) = self.slot(key) else {
            return Err(io::ErrorKind::NotConnected.into());
        };
        let got = tcp::receive_now(slot.fd.as_raw_fd(), buffer, 0);
        // A read that does not fill the buffer has taken everything (epoll(7)), but for an end behind it.
        slot.readable = match &got {
            Ok(None) => false,
            Ok(Some(n)) => slot.ended || *n == buffer.len(),
            Err(_) => true,
        };
        got
    }

    /// As [`tcp::Sock::try_peek`].
    pub fn try_peek(&mut self, key: Key, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        let Some(slot) = self.slot(key) else {
            return Err(io::ErrorKind::NotConnected.into());
        };
        let got = tcp::receive_now(slot.fd.as_raw_fd(), buffer, libc::MSG_PEEK);
        if matches!(got, Ok(None)) {
            slot.readable = false;
        }
        got
    }

    /// As [`tcp::Sock::peek`].
    pub fn peek(&mut self, key: Key) -> Option<bool> {
        let Some(slot) = self.slot(key) else {
            return Some(true);
        };
        let mut byte = [0];
        match tcp::receive_now(slot.fd.as_raw_fd(), &mut byte, libc::MSG_PEEK) {
            Ok(None) => None,
            Ok(Some(n)) => Some(n == 0),
            Err(_) => Some(true),
        }
    }

    /// As [`super::ring::Ring::poll_readable`].
    pub fn poll_readable(&mut self, key: Key, cx: &mut Context<'_>) -> Poll<()> {
        let Some(slot) = self.slot(key) else {
            return Poll::Ready(());
        };
        if slot.readable {
            return Poll::Ready(());
        }
        note(&mut slot.reader, cx.waker());
        Poll::Pending
    }

    /// As [`tcp::Sock::try_write_vectored`].
    pub fn try_write(&mut self, key: Key, pieces: &[IoSlice<'_>]) -> io::Result<Option<usize>> {
        let Some(slot) = self.slot(key) else {
            return Err(io::ErrorKind::NotConnected.into());
        };
        let taken = tcp::send_now(slot.fd.as_raw_fd(), pieces);
        let total: usize = pieces.iter().map(|piece| piece.len()).sum();
        if matches!(taken, Ok(n) if n != Some(total)) {
            slot.writable = false;
        }
        taken
    }

    /// As [`super::ring::Ring::poll_writable`].
    pub fn poll_writable(&mut self, key: Key, cx: &mut Context<'_>) -> Poll<()> {
        let Some(slot) = self.slot(key) else {
            return Poll::Ready(());
        };
        if slot.writable {
            return Poll::Ready(());
        }
        note(&mut slot.writer, cx.waker());
        Poll::Pending
    }

    /// Ends the sending side.
    pub fn shutdown_write(&mut self, key: Key) {
        if let Some(slot) = self.slot(key).filter(|slot| !slot.end_wanted) {
            slot.end_wanted = true;
            tcp::end_sending(slot.fd.as_raw_fd());
        }
    }

    /// As [`super::ring::Ring::poll_accept`].
    pub fn poll_accept(&mut self, key: Key, cx: &mut Context<'_>) -> Poll<io::Result<RawFd>> {
        let Some(slot) = self.slot(key) else {
            return Poll::Ready(Err(io::ErrorKind::NotConnected.into()));
        };
        let flags = libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
        // SAFETY: no address is asked for; the descriptor is the slot's own.
        let fd = unsafe {
            libc::accept4(
                slot.fd.as_raw_fd(),
                std::ptr::null_mut(),
                std::ptr::null_mut(),
                flags,
            )
        };
        if fd >= 0 {
            return Poll::Ready(Ok(fd));
        }
        let error = io::Error::last_os_error();
        if matches!(
            error.kind(),
            io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
        ) {
            note(&mut slot.reader, cx.waker());
            return Poll::Pending;
        }
        Poll::Ready(Err(error))
    }

    /// Closes a socket.
    pub fn close(&mut self, key: Key) {
        if self.slot(key).is_some() {
            self.slots[key.index as usize] = None;
            self.free.push(key.index);
        }
    }

    /// Waits, at most `time`, until something can be done.
    pub fn park(&mut self, time: Duration) {
        let milliseconds = time.as_nanos().div_ceil(1_000_000).min(i32::MAX as u128) as i32;
        // SAFETY: the events are as many as is told and live over the call. Errors: a signal.
        let count = unsafe {
            libc::epoll_wait(
                self.epoll.as_raw_fd(),
                self.events.as_mut_ptr(),
                EVENTS as i32,
                milliseconds,
            )
        };
        for place in 0..usize::try_from(count).unwrap_or(0) {
            let libc::epoll_event { events, u64: tag } = self.events[place];
            let key = Key {
                index: tag as u32,
                generation: (tag >> 32) as u32,
            };
            let has = |flags: i32| events & flags as u32 != 0;
            let Some(slot) = self.slot(key) else {
                continue;
            };
            let ended = has(libc::EPOLLRDHUP | libc::EPOLLHUP | libc::EPOLLERR);
            slot.ended |= ended;
            if ended || has(libc::EPOLLIN) {
                slot.readable = true;
                wake(&mut slot.reader);
            }
            if ended || has(libc::EPOLLOUT) {
                slot.writable = true;
                wake(&mut slot.writer);
            }
        }
    }
}

fn note(place: &mut Option<Waker>, waker: &Waker) {
    match place {
        Some(known) => known.clone_from(waker),
        None => *place = Some(waker.clone()),
    }
}

fn wake(place: &mut Option<Waker>) {
    if let Some(waker) = place.take() {
        waker.wake();
    }
}
