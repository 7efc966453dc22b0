//! TCP sockets.

use std::{
    cell::Cell,
    future::{Future, poll_fn},
    io::{self, IoSlice},
    net::{SocketAddr, TcpListener as StdListener},
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd},
    pin::Pin,
    rc::Rc,
    task::{Context, Poll},
    time::Duration,
};

use socket2::{Domain, Protocol, SockRef, Socket, Type};

use super::{
    Either,
    engine::{self, Key, Role},
    race, sleep,
};

/// Connections that the kernel may hold ready per listening socket; the kernel cuts it to
/// `net.core.somaxconn` (4096 by default).
const BACKLOG: i32 = 4096;

/// Bytes that may wait unsent in the kernel for one peer before a send reports that it would
/// wait. Bounds what a slow reader can pile up beyond what is in flight (tcp(7), `TCP_NOTSENT_LOWAT`).
const NOT_SENT_LOW_WATER_BYTES: u32 = 128 * 1024;

/// Fails where another socket listens on `address`, also one that would share it (`SO_REUSEPORT`) with
/// another process of the same user: a second gateway would silently take a part of the first one's clients.
pub fn ensure_free(address: SocketAddr) -> io::Result<()> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    socket.bind(&address.into())
}

/// Opens one listening socket of a group that shares `address` (`SO_REUSEPORT`).
pub fn listen(address: SocketAddr) -> io::Result<StdListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(true)?;
    if address.is_ipv6() {
        // `[::]` and `0.0.0.0` are separate listeners, as written in the configuration.
        socket.set_only_v6(true)?;
    }
    socket.set_nonblocking(true)?;
    // What a listening socket has set, its connections have from the beginning: two system calls less for each.
    set_options(&SockRef::from(&socket));
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

/// A listening socket of this core.
pub struct Listener {
    key: Key,
    fd: RawFd,
}

impl Listener {
    /// Takes a socket made by [`listen`] into this core's engine.
    pub fn new(socket: StdListener) -> io::Result<Listener> {
        let fd = socket.as_raw_fd();
        let key = engine::add(socket.into(), Role::Listening)?;
        Ok(Listener { key, fd })
    }

    /// Waits for the next connection.
    pub async fn accept(&self) -> io::Result<(Rc<Sock>, SocketAddr)> {
        loop {
            let fd = poll_fn(|cx| engine::poll_accept(self.key, cx)).await?;
            // One that was reset before it could be looked at has no peer.
            let peer = SockRef::from(&fd).peer_addr().ok();
            if let Some(peer) = peer.and_then(|peer| peer.as_socket()) {
                return Ok((Rc::new(Sock::new(fd, Role::Connected)?), peer));
            }
        }
    }

    /// The listening descriptor.
    pub fn fd(&self) -> RawFd {
        self.fd
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        engine::close(self.key, false);
    }
}

/// Ends listening on a descriptor: the kernel takes no more connections for it, and a pending accept
/// fails.
pub fn stop_listening(fd: RawFd) {
    // SAFETY: shutdown on a descriptor that the caller owns has no memory effects.
    unsafe { libc::shutdown(fd, libc::SHUT_RD) };
}

/// A connected socket.
pub struct Sock {
    key: Key,
    fd: RawFd,
    /// The close shall be a reset.
    reset: Cell<bool>,
}

impl AsFd for Sock {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the engine closes the descriptor after `close`, which is called when `self` is dropped.
        unsafe { BorrowedFd::borrow_raw(self.fd) }
    }
}

impl Sock {
    fn new(fd: OwnedFd, role: Role) -> io::Result<Sock> {
        let raw = fd.as_raw_fd();
        Ok(Sock {
            key: engine::add(fd, role)?,
            fd: raw,
            reset: Cell::new(false),
        })
    }

    /// Connects within `time`.
    pub async fn connect(address: SocketAddr, time: Duration) -> io::Result<Rc<Sock>> {
        let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
        socket.set_nonblocking(true)?;
        set_options(&SockRef::from(&socket));
        match socket.connect(&address.into()) {
            Ok(()) => {}
            Err(error) if error.raw_os_error() == Some(libc::EINPROGRESS) => {}
            Err(error) => return Err(error),
        }
        let sock = Sock::new(socket.into(), Role::Connecting)?;
        match race(sock.writable(), sleep(time)).await {
            Either::First(()) => {}
            Either::Second(()) => return Err(io::ErrorKind::TimedOut.into()),
        }
        if let Some(error) = SockRef::from(&sock).take_error()? {
            return Err(error);
        }
        engine::connected(sock.key);
        Ok(Rc::new(sock))
    }

    /// Takes what has arrived. `None`: nothing yet; `Some(0)`: the peer has ended its side.
    pub fn try_read(&self, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        engine::try_read(self.key, buffer)
    }

    /// Whether something has arrived, without taking it: `None` nothing, `Some(false)` bytes,
    /// `Some(true)` the end or an error. With io_uring what has come since the core's last turn is not seen yet.
    pub fn peek(&self) -> Option<bool> {
        engine::peek(self.key)
    }

    /// As [`Sock::try_read`], but what has arrived stays where it is.
    pub fn try_peek(&self, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        engine::try_peek(self.key, buffer)
    }

    /// Takes bytes to be sent. `None`: there is no room now.
    pub fn try_write(&self, bytes: &[u8]) -> io::Result<Option<usize>> {
        self.try_write_vectored(&[IoSlice::new(bytes)])
    }

    /// Takes several pieces to be sent, in order. `None`: there is no room now. What was taken is sent also when the
    /// socket is dropped; that it could not be sent is told by a later call.
    pub fn try_write_vectored(&self, pieces: &[IoSlice<'_>]) -> io::Result<Option<usize>> {
        engine::try_write(self.key, pieces)
    }

    /// Waits until there is something to read, or the peer has ended or reset. May return without cause. One task at a
    /// time can wait to read.
    pub fn readable(self: &Rc<Self>) -> Readable {
        Readable(self.clone())
    }

    /// Waits until there is room to write. May return without cause. One task at a time can wait to write.
    pub async fn writable(&self) {
        poll_fn(|cx| engine::poll_writable(self.key, cx)).await;
    }

    /// Tells the peer that nothing more will come from this side, behind what has been written.
    pub fn shutdown_write(&self) {
        engine::shutdown_write(self.key);
    }

    /// Lets the kernel acknowledge every second small segment instead of each at once, as long as they come within 40 ms
    /// of each other (tcp(7), `TCP_QUICKACK`): for a peer that streams events, of which each acknowledgement costs half as
    /// much as the event. A peer that waits for one (Nagle's algorithm) waits 40 ms once; then the kernel goes back to
    /// acknowledging at once.
    pub fn acknowledge_less(&self) {
        let off: libc::c_int = 0;
        // SAFETY: the option is an int, which lives over the call; the descriptor is open while `self` lives.
        unsafe {
            libc::setsockopt(
                self.fd,
                libc::IPPROTO_TCP,
                libc::TCP_QUICKACK,
                (&raw const off).cast(),
                size_of_val(&off) as libc::socklen_t,
            );
        }
    }

    /// Makes the coming close a reset, so that the peer cannot take a cut answer for a whole one and the
    /// kernel keeps nothing of it.
    pub fn reset_on_close(&self) {
        self.reset.set(true);
        linger_zero(self.fd);
    }
}

impl Drop for Sock {
    fn drop(&mut self) {
        engine::close(self.key, self.reset.get());
    }
}

/// See [`Sock::readable`].
pub struct Readable(Rc<Sock>);

impl Future for Readable {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        engine::poll_readable(self.0.key, cx)
    }
}

/// Receives without waiting. `None`: nothing has come.
pub(super) fn receive_now(fd: RawFd, buffer: &mut [u8], flags: i32) -> io::Result<Option<usize>> {
    let flags = flags | libc::MSG_DONTWAIT;
    // SAFETY: the pointer and the length are those of `buffer`, which lives over the call.
    settle(unsafe { libc::recv(fd, buffer.as_mut_ptr().cast(), buffer.len(), flags) })
}

/// Hands several pieces to the kernel without waiting. `None`: it takes none now.
pub(super) fn send_now(fd: RawFd, pieces: &[IoSlice<'_>]) -> io::Result<Option<usize>> {
    const FLAGS: i32 = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    // SAFETY: msghdr is plain data for which all zeroes is valid.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    // IoSlice is guaranteed to have the layout of iovec on Unix; sendmsg only reads it.
    message.msg_iov = pieces.as_ptr().cast_mut().cast();
    message.msg_iovlen = pieces.len() as _;
    // SAFETY: the pieces live over the call and are only read.
    settle(unsafe { libc::sendmsg(fd, &message, FLAGS) })
}

/// Sends at once, and bounds what waits in the kernel. Without them a connection works all the same.
fn set_options(socket: &SockRef<'_>) {
    let _ = socket.set_tcp_nodelay(true);
    let _ = socket.set_tcp_notsent_lowat(NOT_SENT_LOW_WATER_BYTES);
}

/// Ends the sending side of a socket.
pub(super) fn end_sending(fd: RawFd) {
    // SAFETY: shutdown has no memory effects.
    unsafe { libc::shutdown(fd, libc::SHUT_WR) };
}

/// Makes the coming close of a socket a reset.
pub(super) fn linger_zero(fd: RawFd) {
    // SAFETY: the engine, which calls this, keeps the descriptor open over the call.
    let fd = unsafe { BorrowedFd::borrow_raw(fd) };
    let _ = SockRef::from(&fd).set_linger(Some(Duration::ZERO));
}

/// Turns the result of a system call on a socket into ours.
fn settle(result: isize) -> io::Result<Option<usize>> {
    if result >= 0 {
        return Ok(Some(result as usize));
    }
    let error = io::Error::last_os_error();
    match error.kind() {
        io::ErrorKind::WouldBlock => Ok(None),
        // No signal handler of ours restarts calls, but one of a library may interrupt them.
        io::ErrorKind::Interrupted => Ok(None),
        _ => Err(error),
    }
}
