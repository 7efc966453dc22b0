//! The socket of a simulated server, with or without TLS.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use mio::net::TcpStream;
use rustls::crypto::aws_lc_rs;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ServerConfig, ServerConnection, StreamOwned};
use socket2::SockRef;

/// How an endpoint serves TLS.
#[derive(Clone, Debug)]
pub struct Tls(Arc<ServerConfig>);

impl Tls {
    /// With a certificate made for this run alone: localhost and 127.0.0.1.
    ///
    /// # Errors
    /// Those of making keys.
    pub fn self_signed() -> io::Result<Self> {
        let names = ["localhost".to_owned(), "127.0.0.1".to_owned()];
        let made = rcgen::generate_simple_self_signed(names).map_err(io::Error::other)?;
        let key = PrivateKeyDer::try_from(made.signing_key.serialize_der()).map_err(io::Error::other)?;
        Self::new(vec![made.cert.der().clone()], key)
    }

    /// With the certificates and the key of these PEM files.
    ///
    /// # Errors
    /// Files that cannot be read, or do not go together.
    pub fn from_files(certificates: &Path, key: &Path) -> io::Result<Self> {
        let certificates: Result<Vec<CertificateDer<'static>>, _> =
            CertificateDer::pem_file_iter(certificates)
                .map_err(io::Error::other)?
                .collect();
        let key = PrivateKeyDer::from_pem_file(key).map_err(io::Error::other)?;
        Self::new(certificates.map_err(io::Error::other)?, key)
    }

    fn new(certificates: Vec<CertificateDer<'static>>, key: PrivateKeyDer<'static>) -> io::Result<Self> {
        let config = ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
            .with_safe_default_protocol_versions()
            .map_err(io::Error::other)?
            .with_no_client_auth()
            .with_single_cert(certificates, key)
            .map_err(io::Error::other)?;
        Ok(Self(Arc::new(config)))
    }
}

pub enum Socket {
    Plain(TcpStream),
    Tls(Box<StreamOwned<ServerConnection, TcpStream>>),
}

impl Socket {
    /// Wraps an accepted connection.
    pub fn new(socket: TcpStream, tls: Option<&Tls>) -> Result<Self, rustls::Error> {
        Ok(match tls {
            None => Self::Plain(socket),
            Some(Tls(config)) => Self::Tls(Box::new(StreamOwned::new(
                ServerConnection::new(config.clone())?,
                socket,
            ))),
        })
    }

    pub fn tcp(&mut self) -> &mut TcpStream {
        match self {
            Self::Plain(socket) => socket,
            Self::Tls(stream) => &mut stream.sock,
        }
    }

    /// Whether a short read tells that the socket is empty. With TLS a record may end a read early.
    pub fn short_read_is_empty(&self) -> bool {
        matches!(self, Self::Plain(_))
    }

    /// Ends the way out in good order. What cannot be sent at once is not: the peer then sees a plain end.
    pub fn end(&mut self) {
        if let Self::Tls(stream) = self {
            stream.conn.send_close_notify();
            let _ = stream.flush();
        }
        let _ = self.tcp().shutdown(Shutdown::Write);
    }

    /// Makes the close a reset.
    pub fn reset(&mut self) {
        // Without the option the close is an orderly one, which a test would then report.
        let _ = SockRef::from(&*self.tcp()).set_linger(Some(Duration::ZERO));
    }
}

impl Read for Socket {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Plain(socket) => socket.read(buffer),
            Self::Tls(stream) => stream.read(buffer),
        }
    }
}

impl Write for Socket {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Plain(socket) => socket.write(bytes),
            Self::Tls(stream) => stream.write(bytes),
        }
    }

    /// Writes records that the session still holds.
    fn flush(&mut self) -> io::Result<()> {
        match self {
            Self::Plain(_) => Ok(()),
            Self::Tls(stream) => stream.flush(),
        }
    }
}
