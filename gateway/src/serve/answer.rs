//! Answers to clients: heads, and the whole answers that the gateway gives by itself.

use crate::{
    error::{Dialect, Error},
    http::head::{ResponseHead, Version},
    ledger::record::RequestId,
    quota::{Denied, Report},
};

/// What every answer's head depends on.
#[derive(Debug, Clone, Copy, Default)]
pub struct Head {
    /// Sent as `x-request-id`; `None` where the request was not even a head.
    pub id: Option<RequestId>,
    pub version: Version,
    /// The connection stays open.
    pub keep_alive: bool,
    /// HEAD: the answer has no body, only its length.
    pub bodyless: bool,
}

/// How the end of an answer's body is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Framing {
    Length(usize),
    Chunked,
    UntilClose,
}

/// An error as a whole answer.
pub fn error(error: &Error, dialect: Dialect, head: Head) -> Vec<u8> {
    let body = error.body(dialect);
    let mut out = begin(error.status(), head, 512 + body.len());
    if let Some(seconds) = error.retry_after_s {
        field_number(&mut out, "retry-after", seconds);
    }
    if error.status() == 401 {
        out.extend_from_slice(b"www-authenticate: Bearer\r\n");
    }
    finish_json(out, head, &body)
}

/// A refusal by a limit: the error, and how the limit stands.
pub fn denied(refusal: &Error, denied: &Denied, dialect: Dialect, head: Head) -> Vec<u8> {
    let body = refusal.body(dialect);
    let mut out = begin(refusal.status(), head, 768 + body.len());
    if let Some(seconds) = refusal.retry_after_s {
        field_number(&mut out, "retry-after", seconds);
    }
    rate_limit(&mut out, &Report::of(denied));
    // Which policy it was, for programs: names of the configuration may hold what no header may.
    if denied.name.bytes().all(|byte| matches!(byte, b' '..=b'~')) {
        field(&mut out, "x-gateway-limit".as_bytes(), denied.name.as_bytes());
    }
    finish_json(out, head, &body)
}

/// A whole JSON answer.
pub fn json(status: u16, body: &[u8], head: Head) -> Vec<u8> {
    finish_json(begin(status, head, 256 + body.len()), head, body)
}

/// The head of an upstream's answer, as the client gets it.
pub fn relayed(
    upstream: &ResponseHead,
    bytes: &[u8],
    framing: Framing,
    report: &Report,
    head: Head,
) -> Vec<u8> {
    let mut out = begin(upstream.status, head, upstream.len + 512);
    for relayed in &upstream.fields {
        let name = relayed.name.of(bytes);
        if upstream.is_end_to_end(bytes, relayed) && !is_withheld(name) {
            field(&mut out, name, relayed.value.of(bytes));
        }
    }
    rate_limit(&mut out, report);
    match framing {
        // RFC 9110, section 8.6.
        Framing::Length(_) if upstream.status == 204 => {}
        Framing::Length(length) => field_number(&mut out, "content-length", length as u64),
        Framing::Chunked => out.extend_from_slice(b"transfer-encoding: chunked\r\n"),
        Framing::UntilClose => {}
    }
    end(&mut out, head);
    out
}

/// Fields of an upstream's answer that are about the operator's account or about that connection.
fn is_withheld(name: &[u8]) -> bool {
    const WITHHELD: [&str; 13] = [
        "content-length",
        // Where an upstream lives is nobody else's business; its APIs redirect nowhere.
        "location",
        "x-request-id",
        "request-id",
        "set-cookie",
        "alt-svc",
        "server",
        "openai-organization",
        "openai-project",
        "strict-transport-security",
        "www-authenticate",
        "cf-ray",
        "via",
    ];
    let is = |other: &str| name.eq_ignore_ascii_case(other.as_bytes());
    let starts =
        |prefix: &[u8]| name.len() >= prefix.len() && name[..prefix.len()].eq_ignore_ascii_case(prefix);
    WITHHELD.into_iter().any(is) || starts(b"x-ratelimit-") || starts(b"anthropic-ratelimit-")
}

fn begin(status: u16, head: Head, capacity: usize) -> Vec<u8> {
    let mut out = Vec::with_capacity(capacity);
    // An HTTP/1.0 client is answered in HTTP/1.1 all the same (RFC 9110, section 6.2).
    out.extend_from_slice(b"HTTP/1.1 ");
    number(&mut out, status.into());
    out.push(b' ');
    out.extend_from_slice(reason(status).as_bytes());
    out.extend_from_slice(b"\r\n");
    if let Some(id) = head.id {
        out.extend_from_slice(b"x-request-id: ");
        out.extend_from_slice(&id.hex());
        out.extend_from_slice(b"\r\n");
    }
    out
}

fn finish_json(mut out: Vec<u8>, head: Head, body: &[u8]) -> Vec<u8> {
    out.extend_from_slice(b"content-type: application/json\r\n");
    field_number(&mut out, "content-length", body.len() as u64);
    end(&mut out, head);
    if !head.bodyless {
        out.extend_from_slice(body);
    }
    out
}

fn end(out: &mut Vec<u8>, head: Head) {
    match (head.keep_alive, head.version) {
        (false, _) => out.extend_from_slice(b"connection: close\r\n"),
        (true, Version::Http10) => out.extend_from_slice(b"connection: keep-alive\r\n"),
        (true, Version::Http11) => {}
    }
    out.extend_from_slice(b"\r\n");
}

/// `x-ratelimit-*` as OpenAI sends them (platform.openai.com/docs/guides/rate-limits): limit, remaining, and the
/// time to a full allowance.
fn rate_limit(out: &mut Vec<u8>, report: &Report) {
    for (unit, state) in [("requests", report.requests), ("tokens", report.tokens)] {
        let Some((amount, standing)) = state else { continue };
        for (what, value) in [("limit", amount), ("remaining", standing.remaining)] {
            out.extend_from_slice(b"x-ratelimit-");
            out.extend_from_slice(what.as_bytes());
            out.push(b'-');
            field_number(out, unit, value);
        }
        out.extend_from_slice(b"x-ratelimit-reset-");
        out.extend_from_slice(unit.as_bytes());
        out.extend_from_slice(b": ");
        number(out, standing.reset_ns.div_ceil(1_000_000));
        out.extend_from_slice(b"ms\r\n");
    }
}

fn field(out: &mut Vec<u8>, name: &[u8], value: &[u8]) {
    out.extend_from_slice(name);
    out.extend_from_slice(b": ");
    out.extend_from_slice(value);
    out.extend_from_slice(b"\r\n");
}

fn field_number(out: &mut Vec<u8>, name: &str, value: u64) {
    out.extend_from_slice(name.as_bytes());
    out.extend_from_slice(b": ");
    number(out, value);
    out.extend_from_slice(b"\r\n");
}

fn number(out: &mut Vec<u8>, value: u64) {
    out.extend_from_slice(itoa::Buffer::new().format(value).as_bytes());
}

/// Reason phrases (RFC 9110, section 15; RFC 6585).
fn reason(status: u16) -> &'static str {
    match status {
        200 => "OK",
        201 => "Created",
        202 => "Accepted",
        204 => "No Content",
        304 => "Not Modified",
        400 => "Bad Request",
        401 => "Unauthorized",
        402 => "Payment Required",
        403 => "Forbidden",
        404 => "Not Found",
        405 => "Method Not Allowed",
        408 => "Request Timeout",
        409 => "Conflict",
        413 => "Content Too Large",
        414 => "URI Too Long",
        415 => "Unsupported Media Type",
        417 => "Expectation Failed",
        422 => "Unprocessable Content",
        429 => "Too Many Requests",
        431 => "Request Header Fields Too Large",
        500 => "Internal Server Error",
        501 => "Not Implemented",
        502 => "Bad Gateway",
        503 => "Service Unavailable",
        504 => "Gateway Timeout",
        505 => "HTTP Version Not Supported",
        529 => "Overloaded",
        _ => "Unknown",
    }
}
