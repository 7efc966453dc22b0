//! The socket of a client, with or without TLS.

use std::io::{self, ErrorKind, IoSlice, Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;

use mio::net::TcpStream;
use rustls::client::Resumption;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, aws_lc_rs, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{
    ClientConfig, ClientConnection, DigitallySignedStruct, RootCertStore, SignatureScheme, StreamOwned,
};
use socket2::{Domain, Protocol, Socket, Type};

use super::invalid;

/// Receive buffer of a slow reader in bytes: a large one would hide that it is slow.
const SLOW_RECEIVE_BYTES: usize = 4096;

/// How server certificates are judged.
#[derive(Clone, Debug)]
pub enum Trust {
    /// Any certificate is taken.
    Anything,
    /// Certificates under the authorities in this PEM text.
    Authorities(Vec<u8>),
}

impl Trust {
    /// Settings of the load generator's TLS. Without `resume` every connection has a whole handshake: servers differ in
    /// whether they hand tickets out, and a resumed session skips the costly half.
    pub(super) fn config(&self, resume: bool) -> io::Result<Arc<ClientConfig>> {
        let provider = Arc::new(aws_lc_rs::default_provider());
        let builder = ClientConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()
            .map_err(io::Error::other)?;
        let mut config = match self {
            Self::Anything => {
                let verifier = Arc::new(TakeAnything(provider));
                builder
                    .dangerous()
                    .with_custom_certificate_verifier(verifier)
                    .with_no_client_auth()
            }
            Self::Authorities(pem) => {
                let mut roots = RootCertStore::empty();
                for certificate in CertificateDer::pem_slice_iter(pem) {
                    roots
                        .add(certificate.map_err(io::Error::other)?)
                        .map_err(io::Error::other)?;
                }
                if roots.is_empty() {
                    return Err(invalid("there is no certificate among the authorities"));
                }
                builder.with_root_certificates(roots).with_no_client_auth()
            }
        };
        if !resume {
            config.resumption = Resumption::disabled();
        }
        Ok(Arc::new(config))
    }
}

/// Takes any certificate, but still wants its signatures right. For measurements against a test certificate.
#[derive(Debug)]
struct TakeAnything(Arc<CryptoProvider>);

impl ServerCertVerifier for TakeAnything {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(
            message,
            certificate,
            signed,
            &self.0.signature_verification_algorithms,
        )
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(
            message,
            certificate,
            signed,
            &self.0.signature_verification_algorithms,
        )
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

/// A connection that never blocks.
pub(super) enum Link {
    Plain(TcpStream),
    Tls(Box<StreamOwned<ClientConnection, TcpStream>>),
}

impl Link {
    /// Starts to connect. `source` is the address to connect from.
    pub fn open(
        peer: SocketAddr,
        source: Option<IpAddr>,
        slow: bool,
        tls: Option<(&Arc<ClientConfig>, &ServerName<'static>)>,
    ) -> io::Result<Self> {
        let socket = Socket::new(Domain::for_address(peer), Type::STREAM, Some(Protocol::TCP))?;
        socket.set_nonblocking(true)?;
        socket.set_tcp_nodelay(true)?;
        if slow {
            socket.set_recv_buffer_size(SLOW_RECEIVE_BYTES)?;
        }
        if let Some(source) = source {
            socket.bind(&SocketAddr::new(source, 0).into())?;
        }
        match socket.connect(&peer.into()) {
            Ok(()) => {}
            Err(error) if error.raw_os_error() == Some(libc::EINPROGRESS) => {}
            Err(error) => return Err(error),
        }
        let socket = TcpStream::from_std(socket.into());
        Ok(match tls {
            None => Self::Plain(socket),
            Some((config, name)) => {
                let session =
                    ClientConnection::new(config.clone(), name.clone()).map_err(io::Error::other)?;
                Self::Tls(Box::new(StreamOwned::new(session, socket)))
            }
        })
    }

    pub fn socket(&mut self) -> &mut TcpStream {
        match self {
            Self::Plain(socket) => socket,
            Self::Tls(stream) => &mut stream.sock,
        }
    }

    /// Whether the connection has come about; an error where it has failed.
    pub fn is_connected(&mut self) -> io::Result<bool> {
        let socket = self.socket();
        if let Some(error) = socket.take_error()? {
            return Err(error);
        }
        match socket.peer_addr() {
            Ok(_) => Ok(true),
            Err(error) if error.kind() == ErrorKind::NotConnected => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Whether a TLS handshake is still under way.
    pub fn is_handshaking(&self) -> bool {
        match self {
            Self::Plain(_) => false,
            Self::Tls(stream) => stream.conn.is_handshaking(),
        }
    }

    /// Whether a short read tells that the socket is empty. With TLS a record may end a read early.
    pub fn short_read_is_empty(&self) -> bool {
        matches!(self, Self::Plain(_))
    }
}

impl Read for Link {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Plain(socket) => socket.read(buffer),
            Self::Tls(stream) => stream.read(buffer),
        }
    }
}

impl Write for Link {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Plain(socket) => socket.write(bytes),
            Self::Tls(stream) => stream.write(bytes),
        }
    }

    fn write_vectored(&mut self, pieces: &[IoSlice<'_>]) -> io::Result<usize> {
        match self {
            Self::Plain(socket) => socket.write_vectored(pieces),
            Self::Tls(stream) => stream.write_vectored(pieces),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Self::Plain(_) => Ok(()),
            Self::Tls(stream) => stream.flush(),
        }
    }
}

/// An IPv4 network whose addresses are used in turn as the clients' own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sources {
    network: u32,
    hosts: u32,
}

impl Sources {
    /// Reads `ADDRESS/BITS`, of 8 to 32 bits, or an address alone.
    pub fn parse(text: &str) -> Option<Self> {
        let (address, bits) = text.split_once('/').unwrap_or((text, "32"));
        let bits: u32 = bits.parse().ok().filter(|bits| (8..=32).contains(bits))?;
        let address = u32::from(address.parse::<Ipv4Addr>().ok()?);
        let hosts = 1_u32 << (32 - bits);
        Some(Self {
            network: address & !(hosts - 1),
            hosts,
        })
    }

    /// Address number `index`, network and broadcast addresses left out where there are others.
    pub fn address(&self, index: u64) -> IpAddr {
        let host = if self.hosts > 2 {
            1 + (index % u64::from(self.hosts - 2)) as u32
        } else {
            index as u32 % self.hosts
        };
        IpAddr::V4(Ipv4Addr::from(self.network + host))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_are_spread_over_the_network() {
        let sources = Sources::parse("127.0.5.9/30").unwrap();
        let addresses: Vec<String> = (0..3).map(|index| sources.address(index).to_string()).collect();
        assert_eq!(addresses, ["127.0.5.9", "127.0.5.10", "127.0.5.9"]);
        assert_eq!(
            Sources::parse("127.0.0.7").unwrap().address(12).to_string(),
            "127.0.0.7"
        );
        assert_eq!(
            Sources::parse("127.0.0.0/8").unwrap().address(255).to_string(),
            "127.0.1.0"
        );
        assert_eq!(Sources::parse("127.0.0.0/7"), None);
        assert_eq!(Sources::parse("::1/64"), None);
    }
}
