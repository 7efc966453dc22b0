//! Request and response heads, read strictly by RFC 9112.
//!
//! Two programs that read one byte stream differently are how requests are smuggled past a
//! gateway. So whatever RFC 9112 lets a recipient repair (bare LF, folded lines, repeated lengths)
//! is refused here instead, and the connection is closed.
//!
//! A head is parsed when it is complete and not before. Until then every new byte is looked at
//! once, for line ends only, so a head that arrives byte by byte costs O(n).

mod error;
mod scan;
mod semantics;
mod table;

use std::mem::MaybeUninit;

use crate::bounds::{HEAD_BYTES_MAX, HEADERS_MAX};
pub use error::HeadError;
use error::refine_version;
use scan::LineScan;
use semantics::Semantics;
pub use table::is_hop_by_hop;
pub(super) use table::is_token;

/// Most fields that are set aside when a head's vector is first used; more grow it once.
const FIELDS_TYPICAL: usize = 24;

const _: () = assert!(HEAD_BYTES_MAX < u32::MAX as usize, "spans are 32 bits wide");
const _: () = assert!(size_of::<Field>() == 16);

/// A range of bytes of the buffer that held the head.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Span {
    /// First byte.
    pub start: u32,
    /// One past the last byte.
    pub end: u32,
}

impl Span {
    /// The bytes, from the same buffer (or a copy of it) that was parsed. Empty where the buffer
    /// does not reach so far.
    #[inline]
    pub fn of(self, buf: &[u8]) -> &[u8] {
        buf.get(self.start as usize..self.end as usize)
            .unwrap_or_default()
    }

    /// Length in bytes.
    #[inline]
    pub fn len(self) -> usize {
        self.end.saturating_sub(self.start) as usize
    }

    /// Whether the range has no bytes.
    #[inline]
    pub fn is_empty(self) -> bool {
        self.len() == 0
    }

    /// The span of `part` within `buf`; `part` must be a slice of `buf`.
    fn within(buf: &[u8], part: &[u8]) -> Span {
        let start = part.as_ptr() as usize - buf.as_ptr() as usize;
        debug_assert!(start + part.len() <= buf.len());
        Span {
            start: start as u32,
            end: (start + part.len()) as u32,
        }
    }
}

/// One header field. The value has no white space around it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Field {
    /// Field name, in the sender's case.
    pub name: Span,
    /// Field value without its surrounding white space.
    pub value: Span,
}

/// The request methods that the gateway tells apart.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Method {
    /// `GET`
    #[default]
    Get,
    /// `HEAD`
    Head,
    /// `POST`
    Post,
    /// `PUT`
    Put,
    /// `DELETE`
    Delete,
    /// `OPTIONS`
    Options,
    /// `PATCH`
    Patch,
    /// Any other token, `CONNECT` and `TRACE` among them.
    Other,
}

impl Method {
    /// Methods are case-sensitive (RFC 9110, section 9.1): `get` is [`Method::Other`].
    fn of(token: &str) -> Method {
        match token {
            "GET" => Method::Get,
            "HEAD" => Method::Head,
            "POST" => Method::Post,
            "PUT" => Method::Put,
            "DELETE" => Method::Delete,
            "OPTIONS" => Method::Options,
            "PATCH" => Method::Patch,
            _ => Method::Other,
        }
    }

    /// The method's token; `OTHER` for [`Method::Other`].
    pub fn name(self) -> &'static str {
        match self {
            Method::Get => "GET",
            Method::Head => "HEAD",
            Method::Post => "POST",
            Method::Put => "PUT",
            Method::Delete => "DELETE",
            Method::Options => "OPTIONS",
            Method::Patch => "PATCH",
            Method::Other => "OTHER",
        }
    }
}

/// Protocol version of a head.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Version {
    /// `HTTP/1.0`
    Http10,
    /// `HTTP/1.1`
    #[default]
    Http11,
}

/// How the end of a request's body is found (RFC 9112, section 6.3).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Framing {
    /// There is no body.
    #[default]
    None,
    /// `Content-Length`, bytes; it may be 0.
    Length(u64),
    /// `Transfer-Encoding: chunked`; see [`super::chunked`].
    Chunked,
}

/// How the end of a response's body is found (RFC 9112, section 6.3).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ResponseFraming {
    /// There is no body: the answer to HEAD, 1xx, 204 or 304.
    #[default]
    None,
    /// `Content-Length`, bytes; it may be 0.
    Length(u64),
    /// `Transfer-Encoding: chunked`; see [`super::chunked`].
    Chunked,
    /// The body ends where the connection does.
    UntilClose,
}

/// A request's head. One is kept per connection and reused, so that parsing does not allocate.
#[derive(Clone, Debug, Default)]
pub struct RequestHead {
    /// Request method.
    pub method: Method,
    /// Target in origin form (`/path?query`), whichever form it came in; `*` only with OPTIONS.
    pub target: Span,
    /// Protocol version of the client.
    pub version: Version,
    /// Fields in their order, at most [`HEADERS_MAX`].
    pub fields: Vec<Field>,
    /// How the body's end is found.
    pub framing: Framing,
    /// Whether the client lets the connection be used again.
    pub keep_alive: bool,
    /// Whether the client waits for `100 Continue` before it sends the body.
    pub expect_continue: bool,
    /// Bytes of the head, its empty line included (and a skipped one before it). The body follows.
    pub len: usize,
    nominates: bool,
    scan: LineScan,
}

impl RequestHead {
    /// An empty head, ready to parse.
    pub fn new() -> RequestHead {
        RequestHead::default()
    }

    /// Parses the head at the start of `buf`; `false` until it is complete.
    ///
    /// Called again with the same bytes and more behind them, it goes on where it stopped. After
    /// `true` or an error the next call starts a new head, at the start of its `buf`.
    ///
    /// # Errors
    /// Any [`HeadError`]; answer [`HeadError::status`] and close the connection.
    pub fn parse(&mut self, buf: &[u8]) -> Result<bool, HeadError> {
        let result = self.parse_resumed(buf);
        if !matches!(result, Ok(false)) {
            self.scan = LineScan::default();
        }
        result
    }

    /// Forgets a head that is not complete, so that the next call of [`RequestHead::parse`] starts
    /// a new one.
    pub fn reset(&mut self) {
        self.scan = LineScan::default();
    }

    fn parse_resumed(&mut self, buf: &[u8]) -> Result<bool, HeadError> {
        // A shorter buffer than last time is not the same head.
        if buf.len() < self.scan.scanned as usize {
            self.scan = LineScan::default();
        }
        let end = self.scan.advance(buf, true)?;
        let head_start = self.scan.head_start as usize;
        if buf
            .get(head_start)
            .is_some_and(|&first| !table::is_token(first) && first != b'\r')
        {
            return Err(HeadError::NotHttp);
        }
        let Some(end) = end else { return Ok(false) };
        self.parse_complete(&buf[..end], head_start)?;
        Ok(true)
    }

    fn parse_complete(&mut self, head: &[u8], head_start: usize) -> Result<(), HeadError> {
        let mut headers = [const { MaybeUninit::uninit() }; HEADERS_MAX];
        let mut request = httparse::Request::new(&mut []);
        let parsed = request
            .parse_with_uninit_headers(&head[head_start..], &mut headers)
            .map_err(|error| refine_version(error, &head[head_start..]))?;
        let (Some(method), Some(target), Some(minor)) = (request.method, request.path, request.version)
        else {
            return Err(HeadError::StartLine);
        };
        if parsed != httparse::Status::Complete(head.len() - head_start) {
            return Err(HeadError::StartLine);
        }

        self.method = Method::of(method);
        self.version = if minor == 0 {
            Version::Http10
        } else {
            Version::Http11
        };
        let origin = semantics::origin_form(self.method, target)?;
        self.target = Span::within(head, origin.as_bytes());

        let semantics = collect(head, request.headers, &mut self.fields)?;
        semantics.check_host(self.version)?;
        self.framing = match semantics.body(self.version)? {
            semantics::Body::Absent => Framing::None,
            semantics::Body::Length(length) => Framing::Length(length),
            semantics::Body::Chunked => Framing::Chunked,
        };
        self.keep_alive = semantics.keep_alive(self.version);
        // An expectation in HTTP/1.0 is ignored (RFC 9110, section 10.1.1).
        self.expect_continue = match (semantics.expect, self.version) {
            (semantics::Expect::Unknown, Version::Http11) => return Err(HeadError::Expectation),
            (expect, version) => expect == semantics::Expect::Continue && version == Version::Http11,
        };
        self.nominates = semantics.nominates;
        self.len = head.len();
        Ok(())
    }

    /// Value of the first field of this name; `name_lowercase` in lower case.
    pub fn field<'b>(&self, buf: &'b [u8], name_lowercase: &str) -> Option<&'b [u8]> {
        self.fields_named(buf, name_lowercase).next()
    }

    /// Values of all fields of this name, in order; `name_lowercase` in lower case.
    pub fn fields_named<'b>(&self, buf: &'b [u8], name_lowercase: &str) -> impl Iterator<Item = &'b [u8]> {
        values_named(&self.fields, buf, name_lowercase)
    }

    /// Whether a proxy may pass the field on: it is neither hop-by-hop nor named by `Connection`
    /// (RFC 9110, section 7.6.1).
    pub fn is_end_to_end(&self, buf: &[u8], field: &Field) -> bool {
        table::is_end_to_end(&self.fields, self.nominates, buf, field)
    }
}

/// A response's head. One is kept per upstream connection and reused.
#[derive(Clone, Debug, Default)]
pub struct ResponseHead {
    /// Status code, 100 to 999.
    pub status: u16,
    /// Protocol version of the upstream.
    pub version: Version,
    /// Fields in their order, at most [`HEADERS_MAX`].
    pub fields: Vec<Field>,
    /// How the body's end is found.
    pub framing: ResponseFraming,
    /// Whether the connection may be used again when the body has been read.
    pub keep_alive: bool,
    /// Bytes of the head, its empty line included. The body follows.
    pub len: usize,
    nominates: bool,
    scan: LineScan,
}

impl ResponseHead {
    /// An empty head, ready to parse.
    pub fn new() -> ResponseHead {
        ResponseHead::default()
    }

    /// Parses the head at the start of `buf`, the answer to a request with `request_method`;
    /// `false` until it is complete. Calls resume as with [`RequestHead::parse`].
    ///
    /// An interim (1xx) head is a head like another: skip `len` bytes and parse again.
    ///
    /// # Errors
    /// Any [`HeadError`] but those of request lines; the connection must be closed.
    pub fn parse(&mut self, buf: &[u8], request_method: Method) -> Result<bool, HeadError> {
        let result = self.parse_resumed(buf, request_method);
        if !matches!(result, Ok(false)) {
            self.scan = LineScan::default();
        }
        result
    }

    /// Forgets a head that is not complete, so that the next call of [`ResponseHead::parse`] starts
    /// a new one.
    pub fn reset(&mut self) {
        self.scan = LineScan::default();
    }

    fn parse_resumed(&mut self, buf: &[u8], request_method: Method) -> Result<bool, HeadError> {
        if buf.len() < self.scan.scanned as usize {
            self.scan = LineScan::default();
        }
        const PREFIX: &[u8] = b"HTTP/";
        let prefix = PREFIX.len().min(buf.len());
        if buf[..prefix] != PREFIX[..prefix] {
            return Err(HeadError::NotHttp);
        }
        let Some(end) = self.scan.advance(buf, false).map_err(|error| match error {
            HeadError::TargetTooLong => HeadError::TooLarge,
            other => other,
        })?
        else {
            return Ok(false);
        };
        self.parse_complete(&buf[..end], request_method)?;
        Ok(true)
    }

    fn parse_complete(&mut self, head: &[u8], request_method: Method) -> Result<(), HeadError> {
        let mut headers = [const { MaybeUninit::uninit() }; HEADERS_MAX];
        let mut response = httparse::Response::new(&mut []);
        let parsed = httparse::ParserConfig::default()
            .parse_response_with_uninit_headers(&mut response, head, &mut headers)
            .map_err(HeadError::from_httparse)?;
        let (Some(status), Some(minor)) = (response.code, response.version) else {
            return Err(HeadError::StartLine);
        };
        if parsed != httparse::Status::Complete(head.len()) || status < 100 {
            return Err(HeadError::StartLine);
        }

        self.status = status;
        self.version = if minor == 0 {
            Version::Http10
        } else {
            Version::Http11
        };
        let semantics = collect(head, response.headers, &mut self.fields)?;
        let body = semantics.body(self.version)?;
        self.keep_alive = semantics.keep_alive(self.version);
        self.framing = match body {
            _ if request_method == Method::Head || status == 304 => ResponseFraming::None,
            body if status < 200 || status == 204 => {
                // These must not announce a body (RFC 9112, section 6.1; RFC 9110, section 8.6).
                // An upstream that does may send one, which would be taken for the next answer.
                self.keep_alive &= matches!(body, semantics::Body::Absent | semantics::Body::Length(0));
                ResponseFraming::None
            }
            semantics::Body::Length(length) => ResponseFraming::Length(length),
            semantics::Body::Chunked => ResponseFraming::Chunked,
            semantics::Body::Absent => {
                self.keep_alive = false;
                ResponseFraming::UntilClose
            }
        };
        self.nominates = semantics.nominates;
        self.len = head.len();
        Ok(())
    }

    /// Value of the first field of this name; `name_lowercase` in lower case.
    pub fn field<'b>(&self, buf: &'b [u8], name_lowercase: &str) -> Option<&'b [u8]> {
        self.fields_named(buf, name_lowercase).next()
    }

    /// Values of all fields of this name, in order; `name_lowercase` in lower case.
    pub fn fields_named<'b>(&self, buf: &'b [u8], name_lowercase: &str) -> impl Iterator<Item = &'b [u8]> {
        values_named(&self.fields, buf, name_lowercase)
    }

    /// Whether a proxy may pass the field on: it is neither hop-by-hop nor named by `Connection`
    /// (RFC 9110, section 7.6.1).
    pub fn is_end_to_end(&self, buf: &[u8], field: &Field) -> bool {
        table::is_end_to_end(&self.fields, self.nominates, buf, field)
    }
}

/// Takes over httparse's fields as spans and what they say about the message.
fn collect(
    head: &[u8],
    headers: &[httparse::Header<'_>],
    fields: &mut Vec<Field>,
) -> Result<Semantics, HeadError> {
    fields.clear();
    fields.reserve(FIELDS_TYPICAL.max(headers.len()));
    let mut semantics = Semantics::default();
    for header in headers {
        semantics.note(header.name, header.value)?;
        let name = Span::within(head, header.name.as_bytes());
        fields.push(Field {
            name,
            value: Span::within(head, header.value),
        });
    }
    Ok(semantics)
}

fn values_named<'b>(fields: &[Field], buf: &'b [u8], name_lowercase: &str) -> impl Iterator<Item = &'b [u8]> {
    fields
        .iter()
        .filter(move |field| field.name.of(buf).eq_ignore_ascii_case(name_lowercase.as_bytes()))
        .map(move |field| field.value.of(buf))
}

#[cfg(test)]
mod tests;
