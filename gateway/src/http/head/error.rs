//! Why a head is refused, and what a client is told.

use thiserror::Error;

#[cfg(doc)]
use crate::bounds::{HEAD_BYTES_MAX, HEADERS_MAX};

/// Why a head is refused. The connection cannot be used further: where the next message starts is
/// not known. [`HeadError::status`] is the answer to a client; from an upstream it is a bad gateway.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum HeadError {
    /// The first bytes cannot be HTTP/1 (a TLS hello on a plain port, say).
    #[error("not an http/1 message")]
    NotHttp,
    /// An empty line before the request line, beyond the one that RFC 9112, section 2.2 allows.
    #[error("empty line before the start line")]
    LeadingLine,
    /// A line that ends in LF alone (RFC 9112, section 2.2 leaves accepting it to the recipient).
    #[error("line ends in a bare line feed")]
    BareLineFeed,
    /// A line that starts with white space (RFC 9112, section 5.2).
    #[error("folded header line")]
    FoldedLine,
    /// A request or status line that does not follow the grammar.
    #[error("malformed start line")]
    StartLine,
    /// A version that is neither 1.0 nor 1.1.
    #[error("unsupported http version")]
    Version,
    /// A request target in no form that is allowed for the method (RFC 9112, section 3.2).
    #[error("invalid request target")]
    Target,
    /// The request line alone is longer than [`HEAD_BYTES_MAX`].
    #[error("request target is too long")]
    TargetTooLong,
    /// The head is longer than [`HEAD_BYTES_MAX`].
    #[error("head is too large")]
    TooLarge,
    /// More fields than [`HEADERS_MAX`].
    #[error("too many header fields")]
    TooManyFields,
    /// An empty field name, one with a byte that is no token character, or white space before the
    /// colon (RFC 9112, section 5.1).
    #[error("invalid header field name")]
    FieldName,
    /// A control character, NUL or bare CR in a field value.
    #[error("invalid header field value")]
    FieldValue,
    /// An HTTP/1.1 request without `Host` (RFC 9112, section 3.2).
    #[error("host header is missing")]
    HostMissing,
    /// More than one `Host`.
    #[error("host header is repeated")]
    HostRepeated,
    /// `Host` is no `uri-host [":" port]`.
    #[error("host header is invalid")]
    HostInvalid,
    /// `Content-Length` is not made of digits alone, or does not fit 64 bits.
    #[error("content-length is invalid")]
    LengthInvalid,
    /// `Content-Length` is repeated, be the values equal or not.
    #[error("content-length is repeated")]
    LengthRepeated,
    /// `Content-Length` and `Transfer-Encoding` together (RFC 9112, section 6.1).
    #[error("both content-length and transfer-encoding")]
    LengthAndEncoding,
    /// `Transfer-Encoding` does not end in exactly one `chunked`, or comes with HTTP/1.0.
    #[error("transfer-encoding is invalid")]
    EncodingInvalid,
    /// A coding before the final `chunked` (RFC 9112, section 6.1).
    #[error("transfer coding is not supported")]
    EncodingUnknown,
    /// `Connection` is no list of tokens.
    #[error("connection header is invalid")]
    ConnectionInvalid,
    /// `Expect` asks for something else than `100-continue` (RFC 9110, section 10.1.1).
    #[error("expectation is not supported")]
    Expectation,
}

impl HeadError {
    /// HTTP status to answer a client with.
    pub fn status(self) -> u16 {
        match self {
            HeadError::TargetTooLong => 414,
            HeadError::Expectation => 417,
            HeadError::TooLarge | HeadError::TooManyFields => 431,
            HeadError::EncodingUnknown => 501,
            HeadError::Version => 505,
            _ => 400,
        }
    }

    pub(super) fn from_httparse(error: httparse::Error) -> HeadError {
        match error {
            httparse::Error::HeaderName => HeadError::FieldName,
            httparse::Error::HeaderValue => HeadError::FieldValue,
            httparse::Error::TooManyHeaders => HeadError::TooManyFields,
            httparse::Error::Version => HeadError::Version,
            httparse::Error::NewLine | httparse::Error::Status | httparse::Error::Token => {
                HeadError::StartLine
            }
        }
    }
}

/// httparse says `Version` for `HTTP/2.0` and for rubbish alike; only the first is a version.
pub(super) fn refine_version(error: httparse::Error, head: &[u8]) -> HeadError {
    let line_end = memchr::memchr(b'\r', head).unwrap_or(head.len());
    let mut words = head[..line_end].split(|&byte| byte == b' ');
    let is_version = match (words.nth(2), words.next()) {
        (Some([b'H', b'T', b'T', b'P', b'/', major, b'.', minor]), None) => {
            major.is_ascii_digit() && minor.is_ascii_digit()
        }
        _ => false,
    };
    match HeadError::from_httparse(error) {
        HeadError::Version if !is_version => HeadError::StartLine,
        other => other,
    }
}
