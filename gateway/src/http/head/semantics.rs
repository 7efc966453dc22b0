//! What the fields of a head say about the message: its length, its connection, its host.

use super::{HeadError, Method, Version, table::is_token};

/// Longest port that is read, digits; leading zeros are nobody's honest port.
const PORT_DIGITS_MAX: usize = 5;

/// The body as the fields announce it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Body {
    Absent,
    Length(u64),
    Chunked,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Expect {
    #[default]
    Absent,
    Continue,
    Unknown,
}

/// The last transfer coding seen, over all `Transfer-Encoding` lines.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Encoding {
    #[default]
    Absent,
    Unknown,
    Chunked,
    UnknownThenChunked,
}

/// Gathers, field by field, what the fields say about the message.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Semantics {
    content_length: Option<u64>,
    encoding: Encoding,
    has_host: bool,
    close: bool,
    keep_alive: bool,
    /// `Connection` names fields of its own.
    pub(super) nominates: bool,
    pub(super) expect: Expect,
}

impl Semantics {
    /// Takes note of one field; the value has no white space around it.
    pub(super) fn note(&mut self, name: &str, value: &[u8]) -> Result<(), HeadError> {
        // The length tells most fields apart from these before a byte is compared.
        match name.len() {
            4 if name.eq_ignore_ascii_case("host") => self.note_host(value),
            6 if name.eq_ignore_ascii_case("expect") => {
                self.note_expect(value);
                Ok(())
            }
            10 if name.eq_ignore_ascii_case("connection") => self.note_connection(value),
            14 if name.eq_ignore_ascii_case("content-length") => self.note_length(value),
            17 if name.eq_ignore_ascii_case("transfer-encoding") => self.note_encoding(value),
            _ => Ok(()),
        }
    }

    fn note_host(&mut self, value: &[u8]) -> Result<(), HeadError> {
        if self.has_host {
            return Err(HeadError::HostRepeated);
        }
        self.has_host = true;
        // An empty value is what a client sends whose target has no authority.
        if value.is_empty() || is_authority(value) {
            Ok(())
        } else {
            Err(HeadError::HostInvalid)
        }
    }

    fn note_expect(&mut self, value: &[u8]) {
        let is_continue = value.eq_ignore_ascii_case(b"100-continue") && self.expect != Expect::Unknown;
        self.expect = if is_continue {
            Expect::Continue
        } else {
            Expect::Unknown
        };
    }

    /// RFC 9110, section 7.6.1: a list of tokens. Empty elements are ignored (section 5.6.1.2).
    fn note_connection(&mut self, value: &[u8]) -> Result<(), HeadError> {
        for option in value.split(|&byte| byte == b',').map(trim_blank) {
            if option.eq_ignore_ascii_case(b"close") {
                self.close = true;
            } else if option.eq_ignore_ascii_case(b"keep-alive") {
                self.keep_alive = true;
            } else if !option.iter().all(|&byte| is_token(byte)) {
                return Err(HeadError::ConnectionInvalid);
            } else if !option.is_empty() {
                self.nominates = true;
            }
        }
        Ok(())
    }

    /// RFC 9110, section 8.6: `1*DIGIT`. The list form `5, 5`, which a recipient may repair, is
    /// refused with everything else that is not a digit.
    fn note_length(&mut self, value: &[u8]) -> Result<(), HeadError> {
        if self.content_length.is_some() {
            return Err(HeadError::LengthRepeated);
        }
        if value.is_empty() {
            return Err(HeadError::LengthInvalid);
        }
        let mut length: u64 = 0;
        for &byte in value {
            let digit = byte.wrapping_sub(b'0');
            if digit > 9 {
                return Err(HeadError::LengthInvalid);
            }
            length = length
                .checked_mul(10)
                .and_then(|tens| tens.checked_add(u64::from(digit)))
                .ok_or(HeadError::LengthInvalid)?;
        }
        self.content_length = Some(length);
        Ok(())
    }

    /// RFC 9112, sections 6.1 and 7. `chunked` must stand last and once; another coding before it
    /// is one that we do not know, which is not the sender's mistake. `identity` was taken out of
    /// HTTP and parameters never existed on `chunked`: both are known only from attacks.
    fn note_encoding(&mut self, value: &[u8]) -> Result<(), HeadError> {
        for coding in value.split(|&byte| byte == b',') {
            let coding = trim_blank(coding);
            self.encoding = if coding.eq_ignore_ascii_case(b"chunked") {
                match self.encoding {
                    Encoding::Absent => Encoding::Chunked,
                    Encoding::Unknown => Encoding::UnknownThenChunked,
                    Encoding::Chunked | Encoding::UnknownThenChunked => {
                        return Err(HeadError::EncodingInvalid);
                    }
                }
            } else {
                let is_name = !coding.is_empty() && coding.iter().all(|&byte| is_token(byte));
                let is_first = matches!(self.encoding, Encoding::Absent | Encoding::Unknown);
                if !is_name || !is_first || coding.eq_ignore_ascii_case(b"identity") {
                    return Err(HeadError::EncodingInvalid);
                }
                Encoding::Unknown
            };
        }
        Ok(())
    }

    /// Requests of HTTP/1.1 have a `Host` (RFC 9112, section 3.2).
    pub(super) fn check_host(&self, version: Version) -> Result<(), HeadError> {
        if version == Version::Http11 && !self.has_host {
            Err(HeadError::HostMissing)
        } else {
            Ok(())
        }
    }

    /// How the message's body is framed (RFC 9112, section 6.3), before status and method.
    pub(super) fn body(&self, version: Version) -> Result<Body, HeadError> {
        match (self.encoding, self.content_length) {
            (Encoding::Absent, None) => Ok(Body::Absent),
            (Encoding::Absent, Some(length)) => Ok(Body::Length(length)),
            (_, Some(_)) => Err(HeadError::LengthAndEncoding),
            // Transfer codings came with HTTP/1.1: framing of such a message is faulty.
            (_, None) if version == Version::Http10 => Err(HeadError::EncodingInvalid),
            (Encoding::Chunked, None) => Ok(Body::Chunked),
            (Encoding::Unknown, None) => Err(HeadError::EncodingInvalid),
            (Encoding::UnknownThenChunked, None) => Err(HeadError::EncodingUnknown),
        }
    }

    /// Whether the connection persists (RFC 9112, section 9.3).
    pub(super) fn keep_alive(&self, version: Version) -> bool {
        !self.close && (version == Version::Http11 || self.keep_alive)
    }
}

/// Reduces a request target to origin form (RFC 9112, section 3.2). The authority of an absolute
/// form is checked and dropped: the gateway serves every name that reaches it.
pub(super) fn origin_form(method: Method, target: &str) -> Result<&str, HeadError> {
    if target.contains('#') {
        // A fragment is no part of a target; what follows `#` is read differently by different servers.
        return Err(HeadError::Target);
    }
    if target.starts_with('/') || (target == "*" && method == Method::Options) {
        return Ok(target);
    }
    let scheme_len = ["http://", "https://"]
        .iter()
        .find(|scheme| {
            target
                .get(..scheme.len())
                .is_some_and(|start| start.eq_ignore_ascii_case(scheme))
        })
        .map(|scheme| scheme.len())
        .ok_or(HeadError::Target)?;
    let (scheme, rest) = target.split_at(scheme_len);
    let (authority, path) = rest.split_at(rest.find(['/', '?']).unwrap_or(rest.len()));
    if !is_authority(authority.as_bytes()) {
        return Err(HeadError::Target);
    }
    match path.as_bytes().first() {
        Some(b'/') => Ok(path),
        // An empty path is `/` (RFC 9110, section 4.2.3), and the scheme ends in one.
        None => Ok(&scheme[scheme_len - 1..]),
        Some(_) => Err(HeadError::Target),
    }
}

/// `uri-host [ ":" port ]` with a host that is not empty (RFC 9112, section 3.2). Of the characters
/// that RFC 3986, section 3.2.2 allows in a name the comma is left out: it is what two joined
/// `Host` lines look like.
fn is_authority(value: &[u8]) -> bool {
    let (host_is_valid, port) = if let Some(literal) = value.strip_prefix(b"[") {
        let Some(end) = memchr::memchr(b']', literal) else {
            return false;
        };
        let address = &literal[..end];
        let is_address = |byte: u8| byte.is_ascii_hexdigit() || byte == b':' || byte == b'.';
        (
            !address.is_empty() && address.iter().all(|&byte| is_address(byte)),
            &literal[end + 1..],
        )
    } else {
        let end = memchr::memchr(b':', value).unwrap_or(value.len());
        let host = &value[..end];
        let is_host = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~%!$&'()*+;=".contains(&byte);
        (
            !host.is_empty() && host.iter().all(|&byte| is_host(byte)),
            &value[end..],
        )
    };
    host_is_valid
        && match port.split_first() {
            None => true,
            Some((b':', digits)) => digits.len() <= PORT_DIGITS_MAX && digits.iter().all(u8::is_ascii_digit),
            Some(_) => false,
        }
}

/// Takes off optional white space (RFC 9110, section 5.6.3): space and tab only.
fn trim_blank(mut value: &[u8]) -> &[u8] {
    while let [b' ' | b'\t', rest @ ..] | [rest @ .., b' ' | b'\t'] = value {
        value = rest;
    }
    value
}
