//! A byte stream, plain or TLS, with the same calls.

use std::{
    future::Future,
    io::{self, IoSlice, Read, Write},
    rc::Rc,
    time::Duration,
};

use super::{Either, race, sleep, tcp::Sock};

/// Most slices that one vectored write takes: the pieces of a rewritten request.
pub const SLICES_MAX: usize = 16;

/// A connection to a client or an upstream.
pub struct Conn {
    sock: Rc<Sock>,
    tls: Option<Box<Session>>,
}

/// A TLS session and what is known of it.
struct Session {
    rustls: rustls::Connection,
    /// Decrypted bytes wait inside rustls: no wait for the socket is needed to get them.
    has_plaintext: bool,
}

impl Conn {
    /// A plain connection.
    pub fn plain(sock: Rc<Sock>) -> Conn {
        Conn { sock, tls: None }
    }

    /// Does the TLS handshake within `time`. Errors: the peer's alert, a bad certificate, silence.
    ///
    /// Not an `async fn`, which would hold the session's thousand bytes beside its box.
    pub fn tls(
        sock: Rc<Sock>,
        session: rustls::Connection,
        time: Duration,
    ) -> impl Future<Output = io::Result<Conn>> {
        let mut conn = Conn {
            sock,
            tls: Some(Box::new(Session {
                rustls: session,
                has_plaintext: false,
            })),
        };
        async move {
            match race(conn.handshake(), sleep(time)).await {
                Either::First(done) => done.map(|()| conn),
                Either::Second(()) => Err(io::ErrorKind::TimedOut.into()),
            }
        }
    }

    /// Whether the stream is encrypted.
    pub fn is_tls(&self) -> bool {
        self.tls.is_some()
    }

    async fn handshake(&mut self) -> io::Result<()> {
        let Some(session) = self.tls.as_mut() else {
            return Ok(());
        };
        loop {
            while session.rustls.wants_write() {
                if !session.push(&self.sock)? {
                    self.sock.writable().await;
                }
            }
            if !session.rustls.is_handshaking() {
                return Ok(());
            }
            match session.pull(&self.sock)? {
                Pulled::Some => {}
                Pulled::End => return Err(io::ErrorKind::UnexpectedEof.into()),
                Pulled::Nothing => self.sock.readable().await,
            }
        }
    }

    /// Waits until [`Conn::try_read`] is worth calling. May return without cause.
    pub async fn readable(&self) {
        if self.tls.as_ref().is_some_and(|session| session.has_plaintext) {
            return;
        }
        self.sock.readable().await;
    }

    /// The socket below, for a wait that must outlive a borrow of the connection.
    pub fn sock(&self) -> &Rc<Sock> {
        &self.sock
    }

    /// Takes what has arrived. `None`: nothing yet; `Some(0)`: the peer has ended its side properly.
    pub fn try_read(&mut self, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        let Some(session) = self.tls.as_mut() else {
            return self.sock.try_read(buffer);
        };
        loop {
            match session.rustls.reader().read(buffer) {
                Ok(n) => {
                    // A full buffer may mean that more is left; asking once more is cheap.
                    session.has_plaintext = n == buffer.len() && n > 0;
                    return Ok(Some(n));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
            session.has_plaintext = false;
            match session.pull(&self.sock)? {
                Pulled::Nothing => return Ok(None),
                // What the end means (a proper close or a cut) is told by the next read.
                Pulled::Some | Pulled::End => {}
            }
        }
    }

    /// Hands bytes on without waiting; tells how many were taken, which may be none. TLS takes up to the
    /// bound of its send buffer and encrypts what the kernel does not yet take.
    pub fn try_write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.try_write_slices(&[IoSlice::new(bytes)])
    }

    /// As [`Conn::try_write`], for several pieces in order.
    pub fn try_write_slices(&mut self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        let Some(session) = self.tls.as_mut() else {
            return Ok(self.sock.try_write_vectored(slices)?.unwrap_or(0));
        };
        // Nothing new while old ciphertext waits: this is the back-pressure.
        if session.rustls.wants_write() && !session.push(&self.sock)? {
            return Ok(0);
        }
        let taken = session.rustls.writer().write_vectored(slices)?;
        session.push(&self.sock)?;
        Ok(taken)
    }

    /// Whether bytes taken by earlier writes still wait in this process.
    pub fn has_unsent(&self) -> bool {
        self.tls
            .as_ref()
            .is_some_and(|session| session.rustls.wants_write())
    }

    /// Hands all bytes to the kernel. `stall` is the longest time that the peer may take nothing.
    pub async fn write_all(&mut self, bytes: &[u8], stall: Duration) -> io::Result<()> {
        self.write_slices(&[bytes], stall).await
    }

    /// As [`Conn::write_all`], for several pieces in order; at most [`SLICES_MAX`] go in one call.
    pub async fn write_slices(&mut self, pieces: &[&[u8]], stall: Duration) -> io::Result<()> {
        let mut piece = 0;
        let mut offset = 0;
        loop {
            while piece < pieces.len() && offset == pieces[piece].len() {
                piece += 1;
                offset = 0;
            }
            if piece == pieces.len() {
                return self.flush(stall).await;
            }
            let mut slices = [IoSlice::new(&[]); SLICES_MAX];
            let count = (pieces.len() - piece).min(SLICES_MAX);
            slices[0] = IoSlice::new(&pieces[piece][offset..]);
            for (slice, rest) in slices[1..count].iter_mut().zip(&pieces[piece + 1..]) {
                *slice = IoSlice::new(rest);
            }
            let mut taken = self.try_write_slices(&slices[..count])?;
            if taken == 0 {
                self.wait_writable(stall).await?;
            }
            while taken > 0 {
                let left = pieces[piece].len() - offset;
                if taken < left {
                    offset += taken;
                    break;
                }
                taken -= left;
                piece += 1;
                offset = 0;
            }
        }
    }

    /// Hands to the kernel what earlier writes left.
    pub async fn flush(&mut self, stall: Duration) -> io::Result<()> {
        while let Some(session) = self.tls.as_mut() {
            if !session.rustls.wants_write() || session.push(&self.sock)? {
                break;
            }
            self.wait_writable(stall).await?;
        }
        Ok(())
    }

    /// Waits until the peer takes bytes again, at most `stall`.
    pub async fn wait_writable(&self, stall: Duration) -> io::Result<()> {
        match race(self.sock.writable(), sleep(stall)).await {
            Either::First(()) => Ok(()),
            Either::Second(()) => Err(io::ErrorKind::TimedOut.into()),
        }
    }

    /// Says goodbye: TLS close_notify and the end of this side. Never waits.
    pub fn shutdown(&mut self) {
        if let Some(session) = self.tls.as_mut() {
            session.rustls.send_close_notify();
            let _ = session.push(&self.sock);
        }
        self.sock.shutdown_write();
    }
}

enum Pulled {
    Some,
    Nothing,
    End,
}

impl Session {
    /// Reads records from the socket and decrypts them; answers what the protocol must answer.
    fn pull(&mut self, sock: &Sock) -> io::Result<Pulled> {
        match self.rustls.read_tls(&mut Direct(sock)) {
            Ok(0) => return Ok(Pulled::End),
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(Pulled::Nothing),
            Err(error) => return Err(error),
        }
        if let Err(error) = self.rustls.process_new_packets() {
            // The alert tells the peer what was wrong.
            let _ = self.push(sock);
            return Err(io::Error::new(io::ErrorKind::InvalidData, error));
        }
        if self.rustls.wants_write() {
            self.push(sock)?;
        }
        Ok(Pulled::Some)
    }

    /// Sends records; false when the kernel takes no more now.
    fn push(&mut self, sock: &Sock) -> io::Result<bool> {
        while self.rustls.wants_write() {
            match self.rustls.write_tls(&mut Direct(sock)) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) => return Err(error),
            }
        }
        Ok(true)
    }
}

/// The socket as rustls wants it.
struct Direct<'a>(&'a Sock);

impl Read for Direct<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0
            .try_read(buffer)?
            .ok_or_else(|| io::ErrorKind::WouldBlock.into())
    }
}

impl Write for Direct<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0
            .try_write(bytes)?
            .ok_or_else(|| io::ErrorKind::WouldBlock.into())
    }

    fn write_vectored(&mut self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        self.0
            .try_write_vectored(slices)?
            .ok_or_else(|| io::ErrorKind::WouldBlock.into())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
