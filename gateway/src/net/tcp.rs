//! TCP sockets by readiness.

use std::{
    future::Future,
    io::{self, IoSlice},
    net::{SocketAddr, TcpListener as StdListener},
    os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd},
    rc::Rc,
    time::Duration,
};

use monoio::net::{TcpListener, TcpStream};
use socket2::{Domain, Protocol, SockRef, Socket, Type};

use super::{Either, race, sleep};

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
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

/// A listening socket of this core.
pub struct Listener(TcpListener);

impl Listener {
    /// Takes a socket made by [`listen`] into this core's runtime.
    pub fn new(socket: StdListener) -> io::Result<Listener> {
        Ok(Listener(TcpListener::from_std(socket)?))
    }

    /// Waits for the next connection. Never drop this future while the listener shall go on: the
    /// runtime would leak the accepted descriptor.
    pub async fn accept(&self) -> io::Result<(Rc<Sock>, SocketAddr)> {
        let (stream, peer) = self.0.accept().await?;
        Ok((Rc::new(Sock::new(stream)), peer))
    }

    /// The listening descriptor.
    pub fn fd(&self) -> RawFd {
        self.0.as_raw_fd()
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
    stream: TcpStream,
    fd: RawFd,
}

impl AsFd for Sock {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor is the stream's, which lives as long as `self`.
        unsafe { BorrowedFd::borrow_raw(self.fd) }
    }
}

impl Sock {
    fn new(stream: TcpStream) -> Sock {
        let fd = stream.as_raw_fd();
        let _ = stream.set_nodelay(true);
        let sock = Sock { stream, fd };
        let _ = SockRef::from(&sock).set_tcp_notsent_lowat(NOT_SENT_LOW_WATER_BYTES);
        sock
    }

    /// Connects within `time`.
    pub async fn connect(address: SocketAddr, time: Duration) -> io::Result<Rc<Sock>> {
        match race(TcpStream::connect_addr(address), sleep(time)).await {
            Either::First(stream) => Ok(Rc::new(Sock::new(stream?))),
            Either::Second(()) => Err(io::ErrorKind::TimedOut.into()),
        }
    }

    /// Takes what has arrived. `None`: nothing yet; `Some(0)`: the peer has ended its side.
    pub fn try_read(&self, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        // SAFETY: the pointer and the length are those of `buffer`, which lives over the call.
        let got = unsafe {
            libc::recv(
                self.fd,
                buffer.as_mut_ptr().cast(),
                buffer.len(),
                libc::MSG_DONTWAIT,
            )
        };
        settle(got)
    }

    /// Whether something has arrived, without taking it: `None` nothing, `Some(false)` bytes,
    /// `Some(true)` the end or an error.
    pub fn peek(&self) -> Option<bool> {
        let mut byte = 0_u8;
        // SAFETY: one byte is written at most, into a local that lives over the call.
        let got = unsafe {
            libc::recv(
                self.fd,
                (&raw mut byte).cast(),
                1,
                libc::MSG_DONTWAIT | libc::MSG_PEEK,
            )
        };
        match settle(got) {
            Ok(None) => None,
            Ok(Some(n)) => Some(n == 0),
            Err(_) => Some(true),
        }
    }

    /// As [`Sock::try_read`], but what has arrived stays where it is.
    pub fn try_peek(&self, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        const FLAGS: i32 = libc::MSG_DONTWAIT | libc::MSG_PEEK;
        // SAFETY: the pointer and the length are those of `buffer`, which lives over the call.
        settle(unsafe { libc::recv(self.fd, buffer.as_mut_ptr().cast(), buffer.len(), FLAGS) })
    }

    /// Hands bytes to the kernel. `None`: it takes none now.
    pub fn try_write(&self, bytes: &[u8]) -> io::Result<Option<usize>> {
        const FLAGS: i32 = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        // SAFETY: the pointer and the length are those of `bytes`, which lives over the call.
        settle(unsafe { libc::send(self.fd, bytes.as_ptr().cast(), bytes.len(), FLAGS) })
    }

    /// Hands several pieces to the kernel in one call. `None`: it takes none now.
    pub fn try_write_vectored(&self, pieces: &[IoSlice<'_>]) -> io::Result<Option<usize>> {
        const FLAGS: i32 = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        // SAFETY: msghdr is plain data for which all zeroes is valid.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        // IoSlice is guaranteed to have the layout of iovec on Unix; sendmsg only reads it.
        message.msg_iov = pieces.as_ptr().cast_mut().cast();
        message.msg_iovlen = pieces.len() as _;
        // SAFETY: the pieces live over the call and are only read.
        settle(unsafe { libc::sendmsg(self.fd, &message, FLAGS) })
    }

    /// Waits until there is something to read, or the peer has ended or reset. May return without cause.
    pub fn readable(self: &Rc<Self>) -> impl Future<Output = ()> + 'static {
        let sock = self.clone();
        async move {
            // An error here is seen by the read that follows.
            let _ = sock.stream.readable(false).await;
        }
    }

    /// Waits until the kernel takes bytes again. May return without cause.
    pub async fn writable(&self) {
        let _ = self.stream.writable(false).await;
    }

    /// Tells the peer that nothing more will come from this side.
    pub fn shutdown_write(&self) {
        // SAFETY: shutdown has no memory effects; the descriptor is this socket's own.
        unsafe { libc::shutdown(self.fd, libc::SHUT_WR) };
    }

    /// Makes the coming close a reset, so that the peer cannot take a cut answer for a whole one and the
    /// kernel keeps nothing of it.
    pub fn reset_on_close(&self) {
        let _ = SockRef::from(self).set_linger(Some(Duration::ZERO));
    }
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
