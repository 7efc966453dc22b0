//! The PROXY protocol, versions 1 and 2: a few bytes in front of a connection, in which a proxy says who its client
//! is (haproxy.org/download/3.2/doc/proxy-protocol.txt; section numbers below are that document's).
//!
//! Whoever may write this header may claim any address, so it is read from trusted proxies only; that is the
//! caller's to see to. What the document lets a receiver be lenient about is refused here.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use crate::bounds::PROXY_HEADER_BYTES_MAX;

/// What version 1 begins with (section 2.1).
const V1: &[u8] = b"PROXY ";
/// Longest line of version 1, bytes, its end included (section 2.1).
const V1_BYTES_MAX: usize = 107;
/// What version 2 begins with (section 2.2): no HTTP, TLS or version 1 begins so.
const V2: &[u8; 12] = b"\r\n\r\n\0\r\nQUIT\n";
/// Bytes of version 2 before its addresses.
const V2_FIXED_BYTES: usize = 16;

/// Bytes of the addresses of version 2 by their family (section 2.2).
const V4_BYTES: usize = 12;
const V6_BYTES: usize = 36;
const UNIX_BYTES: usize = 216;

/// The extension that holds a checksum over the whole header (section 2.2.3).
const TYPE_CRC32C: u8 = 0x03;

const _: () = assert!(PROXY_HEADER_BYTES_MAX >= V2_FIXED_BYTES + UNIX_BYTES);

/// A header that was read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Its bytes; the client's own begin behind them.
    pub len: usize,
    /// The client, where the proxy says one: not for its own health checks (`LOCAL`), for `UNKNOWN`, or for clients of a
    /// Unix socket.
    pub source: Option<SocketAddr>,
}

/// Why bytes are no PROXY header. The connection is closed: who sent them cannot be told.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ProxyError {
    #[error("no PROXY header")]
    Absent,
    #[error("malformed PROXY line")]
    Line,
    #[error("PROXY header of another version than 1 or 2")]
    Version,
    #[error("PROXY header with an unknown command or family")]
    Unsupported,
    #[error("PROXY header with a wrong length")]
    Length,
    #[error("PROXY header longer than {PROXY_HEADER_BYTES_MAX} bytes")]
    TooLong,
    #[error("PROXY header with a wrong checksum")]
    Checksum,
}

/// Reads the header at the start of `buf`; `None` until it is complete.
///
/// # Errors
/// Any [`ProxyError`], as soon as it is certain.
pub fn parse(buf: &[u8]) -> Result<Option<Header>, ProxyError> {
    if begins(buf, V2) {
        return if buf.len() < V2_FIXED_BYTES {
            Ok(None)
        } else {
            parse_v2(buf)
        };
    }
    if begins(buf, V1) {
        return parse_v1(buf);
    }
    Err(ProxyError::Absent)
}

/// Whether `buf` begins like `word`, as far as it goes.
fn begins(buf: &[u8], word: &[u8]) -> bool {
    let here = buf.len().min(word.len());
    buf[..here] == word[..here]
}

fn parse_v1(buf: &[u8]) -> Result<Option<Header>, ProxyError> {
    let window = &buf[..buf.len().min(V1_BYTES_MAX)];
    let Some(end) = memchr::memchr(b'\n', window) else {
        return if buf.len() < V1_BYTES_MAX {
            Ok(None)
        } else {
            Err(ProxyError::Line)
        };
    };
    let line = window[..end].strip_suffix(b"\r").ok_or(ProxyError::Line)?;
    let line = std::str::from_utf8(line).map_err(|_| ProxyError::Line)?;
    let mut words = line.split(' ').skip(1);
    let family = words.next().unwrap_or_default();
    let source = match family {
        // What follows is to be ignored.
        "UNKNOWN" => None,
        "TCP4" => Some(endpoints::<Ipv4Addr>(words)?),
        "TCP6" => Some(endpoints::<Ipv6Addr>(words)?),
        _ => return Err(ProxyError::Line),
    };
    Ok(Some(Header { len: end + 1, source }))
}

/// Source address, destination address and both ports, with one space between; returns the source.
fn endpoints<'a, A>(mut words: impl Iterator<Item = &'a str>) -> Result<SocketAddr, ProxyError>
where
    A: std::str::FromStr + Into<IpAddr>,
{
    let mut word = || words.next().ok_or(ProxyError::Line);
    let (source, destination, source_port, destination_port) = (word()?, word()?, word()?, word()?);
    let address = |text: &str| text.parse::<A>().map_err(|_| ProxyError::Line);
    let source: IpAddr = address(source)?.into();
    address(destination)?;
    let port = port(source_port)?;
    self::port(destination_port)?;
    match words.next() {
        None => Ok(SocketAddr::new(source, port)),
        Some(_) => Err(ProxyError::Line),
    }
}

/// A decimal port without leading zeros or sign (section 2.1).
fn port(text: &str) -> Result<u16, ProxyError> {
    let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    if !digits || (text.len() > 1 && text.starts_with('0')) {
        return Err(ProxyError::Line);
    }
    text.parse().map_err(|_| ProxyError::Line)
}

/// `buf` has at least the fixed part.
fn parse_v2(buf: &[u8]) -> Result<Option<Header>, ProxyError> {
    if buf[12] >> 4 != 2 {
        return Err(ProxyError::Version);
    }
    let len = V2_FIXED_BYTES + usize::from(u16::from_be_bytes([buf[14], buf[15]]));
    if len > PROXY_HEADER_BYTES_MAX {
        return Err(ProxyError::TooLong);
    }
    let family = buf[13];
    let is_local = match buf[12] & 0x0f {
        0 => true,
        1 => false,
        _ => return Err(ProxyError::Unsupported),
    };
    let address_bytes = match family {
        // LOCAL: the proxy speaks for itself, and the rest is to be skipped whatever it is.
        _ if is_local => None,
        0x00 => Some(0),
        0x11 => Some(V4_BYTES),
        0x21 => Some(V6_BYTES),
        0x31 => Some(UNIX_BYTES),
        // Datagrams do not come over TCP.
        _ => return Err(ProxyError::Unsupported),
    };
    if address_bytes.is_some_and(|bytes| len < V2_FIXED_BYTES + bytes) {
        return Err(ProxyError::Length);
    }
    let Some(header) = buf.get(..len) else {
        return Ok(None);
    };
    let Some(address_bytes) = address_bytes else {
        return Ok(Some(Header { len, source: None }));
    };
    // What follows an unspecified family may be addresses of a kind that is not known here.
    if family != 0x00 {
        check_extensions(header, V2_FIXED_BYTES + address_bytes)?;
    }
    let source = source_v2(family, &header[V2_FIXED_BYTES..]);
    Ok(Some(Header { len, source }))
}

/// The source in the addresses of version 2, whose length has been checked.
fn source_v2(family: u8, addresses: &[u8]) -> Option<SocketAddr> {
    match family {
        0x11 => {
            let (octets, rest) = addresses.split_first_chunk::<4>()?;
            Some(SocketAddr::from((*octets, port_at(rest, 4)?)))
        }
        0x21 => {
            let (octets, rest) = addresses.split_first_chunk::<16>()?;
            Some(SocketAddr::from((*octets, port_at(rest, 16)?)))
        }
        _ => None,
    }
}

fn port_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes([*bytes.get(at)?, *bytes.get(at + 1)?]))
}

/// Walks the extensions (type, 16-bit length, value) from `at` to the header's end: they must fill it exactly, and a
/// checksum must be right.
fn check_extensions(header: &[u8], mut at: usize) -> Result<(), ProxyError> {
    while at < header.len() {
        let [kind, high, low] = *header
            .get(at..at + 3)
            .and_then(|head| head.first_chunk())
            .ok_or(ProxyError::Length)?;
        let value = at + 3;
        let end = value + usize::from(u16::from_be_bytes([high, low]));
        let bytes = header.get(value..end).ok_or(ProxyError::Length)?;
        if kind == TYPE_CRC32C {
            let told: [u8; 4] = bytes.try_into().map_err(|_| ProxyError::Length)?;
            // Its own place counts as zeroes.
            let sum = [&header[..value], &[0; 4], &header[end..]]
                .into_iter()
                .fold(!0, crc32c);
            if !sum != u32::from_be_bytes(told) {
                return Err(ProxyError::Checksum);
            }
        }
        at = end;
    }
    Ok(())
}

/// CRC-32C (Castagnoli; RFC 3720, appendix B.4), reflected, without the last inversion.
fn crc32c(sum: u32, bytes: &[u8]) -> u32 {
    bytes.iter().fold(sum, |sum, byte| {
        (sum >> 8) ^ CRC32C[usize::from(sum as u8 ^ byte)]
    })
}

const CRC32C: [u32; 256] = {
    let mut table = [0; 256];
    let mut index = 0;
    while index < 256 {
        let mut value = index as u32;
        let mut bit = 0;
        while bit < 8 {
            value = if value & 1 == 1 {
                (value >> 1) ^ 0x82f6_3b78
            } else {
                value >> 1
            };
            bit += 1;
        }
        table[index] = value;
        index += 1;
    }
    table
};

#[cfg(test)]
mod tests;
