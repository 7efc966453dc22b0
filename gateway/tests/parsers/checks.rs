//! What must hold for every input, whatever its bytes: the same checks serve the property tests
//! here and the fuzz targets in `fuzz/`, which include this file. Each panics where its parser
//! disagrees with a slow reference or with itself on the same bytes cut elsewhere.

use super::bounds::{CHUNK_LINE_BYTES_MAX, JSON_DEPTH_MAX, TRAILER_BYTES_MAX};
use super::dialect::json;
use super::http::chunked::{ChunkError, ChunkedDecoder};
use super::http::forwarded::{self, Form};
use super::http::head::{Framing, HeadError, Method, RequestHead, ResponseHead};
use super::http::proxy;
use super::http::sse;

/// Cuts that are tried: at every byte, and at two distances that drift against all framing.
const STEPS: [usize; 3] = [1, 7, 61];

/// A head that is parsed as it arrives says the same as one that is there at once, and one that is
/// taken keeps to the letter of RFC 9112.
pub fn head(bytes: &[u8]) {
    let mut whole = RequestHead::new();
    let result = whole.parse(bytes);
    for step in STEPS {
        let mut resumed = RequestHead::new();
        let outcome = arrive(bytes, step, |prefix| resumed.parse(prefix));
        assert_eq!(
            outcome.is_err(),
            result.is_err(),
            "by {step}: {}",
            bytes.escape_ascii()
        );
        assert_eq!(outcome.unwrap_or(false), result.unwrap_or(false));
        if result == Ok(true) {
            assert_eq!(
                (resumed.len, resumed.framing, &resumed.fields),
                (whole.len, whole.framing, &whole.fields)
            );
        }
    }
    if result == Ok(true) {
        let text = &bytes[..whole.len];
        check_lines(text);
        check_framing(&whole, text);
    }

    let mut whole = ResponseHead::new();
    let result = whole.parse(bytes, Method::Post);
    for step in STEPS {
        let mut resumed = ResponseHead::new();
        let outcome = arrive(bytes, step, |prefix| resumed.parse(prefix, Method::Post));
        assert_eq!(
            outcome.is_err(),
            result.is_err(),
            "by {step}: {}",
            bytes.escape_ascii()
        );
        assert_eq!(outcome.unwrap_or(false), result.unwrap_or(false));
    }
    if result == Ok(true) {
        check_lines(&bytes[..whole.len]);
        let fields = whole
            .fields
            .iter()
            .filter(|field| whole.is_end_to_end(bytes, field));
        assert!(fields.count() <= whole.fields.len());
    }
}

/// Feeds ever longer prefixes until the parser has made up its mind.
fn arrive(
    bytes: &[u8],
    step: usize,
    mut parse: impl FnMut(&[u8]) -> Result<bool, HeadError>,
) -> Result<bool, HeadError> {
    let mut end = 0;
    loop {
        end = (end + step).min(bytes.len());
        match parse(&bytes[..end]) {
            Ok(false) if end < bytes.len() => {}
            decided => return decided,
        }
    }
}

/// Every line ends in CRLF, no other CR, LF or NUL stands anywhere, every field has a token for a
/// name with a colon right behind it, and the head ends with its first empty line.
fn check_lines(head: &[u8]) {
    let text = head.strip_prefix(b"\r\n").unwrap_or(head);
    let lines: Vec<&[u8]> = split_crlf(text);
    let [start, fields @ .., last, rest] = &lines[..] else {
        panic!("no lines: {}", head.escape_ascii())
    };
    assert!(last.is_empty() && rest.is_empty() && !start.is_empty());
    for line in &lines {
        assert!(
            !line.iter().any(|byte| matches!(byte, b'\r' | b'\n' | 0)),
            "{}",
            line.escape_ascii()
        );
    }
    for line in fields {
        let name = line.split(|&byte| byte == b':').next().unwrap_or_default();
        let is_token = |byte: &u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(byte);
        assert!(
            name.len() < line.len() && !name.is_empty(),
            "{}",
            line.escape_ascii()
        );
        assert!(name.iter().all(is_token), "{}", line.escape_ascii());
    }
}

fn split_crlf(text: &[u8]) -> Vec<&[u8]> {
    let (mut lines, mut start) = (Vec::new(), 0);
    for at in 1..text.len() {
        if at > start && &text[at - 1..=at] == b"\r\n" {
            lines.push(&text[start..at - 1]);
            start = at + 1;
        }
    }
    lines.push(&text[start..]);
    lines
}

/// The framing is the only one that the fields allow.
fn check_framing(head: &RequestHead, text: &[u8]) {
    let lengths: Vec<&[u8]> = head.fields_named(text, "content-length").collect();
    let codings: Vec<&[u8]> = head.fields_named(text, "transfer-encoding").collect();
    match head.framing {
        Framing::None => assert!(lengths.is_empty() && codings.is_empty()),
        Framing::Length(length) => {
            assert!(codings.is_empty() && lengths.len() == 1);
            assert!(lengths[0].iter().all(u8::is_ascii_digit));
            let digits = std::str::from_utf8(lengths[0]).expect("digits");
            assert_eq!(digits.parse(), Ok(length));
        }
        Framing::Chunked => {
            assert!(lengths.is_empty() && codings.len() == 1);
            assert!(codings[0].eq_ignore_ascii_case(b"chunked"));
        }
    }
    let target = head.target.of(text);
    assert!(target.starts_with(b"/") || (target == b"*" && head.method == Method::Options));
}

/// A chunked body is decoded alike however it is cut, and as the reference reads it.
pub fn chunked(bytes: &[u8]) {
    let whole = decode(bytes, bytes.len().max(1));
    for step in STEPS {
        assert_eq!(decode(bytes, step), whole, "by {step}: {}", bytes.escape_ascii());
    }
    let done = match whole {
        Ok((payload, Some(end))) => Some((payload, end)),
        _ => None,
    };
    assert_eq!(done, decode_slowly(bytes), "{}", bytes.escape_ascii());
}

/// Payload, and where the body ended if it did.
pub type Body = (Vec<u8>, Option<usize>);

/// Decodes a body that arrives in pieces of `step` bytes.
pub fn decode(bytes: &[u8], step: usize) -> Result<Body, ChunkError> {
    let mut decoder = ChunkedDecoder::new();
    let (mut payload, mut consumed) = (Vec::new(), 0);
    for piece in bytes.chunks(step) {
        let mut piece = piece.to_vec();
        let decoded = decoder.decode(&mut piece)?;
        payload.extend_from_slice(&piece[decoded.payload]);
        consumed += decoded.consumed;
        if decoded.done {
            return Ok((payload, Some(consumed)));
        }
        assert_eq!(decoded.consumed, piece.len());
    }
    Ok((payload, None))
}

/// A whole chunked body after the grammar of RFC 9112, section 7.1, and where it ends.
fn decode_slowly(bytes: &[u8]) -> Option<(Vec<u8>, usize)> {
    let is_text = |byte: &u8| *byte == b'\t' || (*byte >= b' ' && *byte != 0x7f);
    let line = |start: usize| {
        let end = start + bytes.get(start..)?.windows(2).position(|pair| pair == b"\r\n")?;
        bytes[start..end]
            .iter()
            .all(is_text)
            .then_some((&bytes[start..end], end + 2))
    };
    let (mut payload, mut at) = (Vec::new(), 0);
    loop {
        let (text, data) = line(at)?;
        let digits = text.split(|&byte| byte == b';').next()?;
        let is_size = digits.iter().all(u8::is_ascii_hexdigit) && (1..=16).contains(&digits.len());
        if !is_size || text.len() >= CHUNK_LINE_BYTES_MAX {
            return None;
        }
        let size = usize::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()?;
        if size == 0 {
            at = data;
            break;
        }
        let end = data.checked_add(size)?;
        payload.extend_from_slice(bytes.get(data..end)?);
        if bytes.get(end..end + 2)? != b"\r\n" {
            return None;
        }
        at = end + 2;
    }
    let trailers = at;
    loop {
        let (text, next) = line(at)?;
        at = next;
        if text.is_empty() {
            // The last line feed is not counted, as none is.
            let line_feeds = bytes[trailers..at].iter().filter(|&&byte| byte == b'\n').count();
            return (at - trailers - line_feeds <= TRAILER_BYTES_MAX).then_some((payload, at));
        }
        let name = text.split(|&byte| byte == b':').next()?;
        let is_token = |byte: &u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(byte);
        if name.is_empty() || name.len() == text.len() || !name.iter().all(is_token) {
            return None;
        }
    }
}

/// An event as it is dispatched: its name and its data.
type Dispatched = (Vec<u8>, Vec<u8>);

/// A stream says the same events however it is cut, and the ones that the WHATWG's text gives.
pub fn events(bytes: &[u8]) {
    const MARK: &[u8] = b"\xef\xbb\xbf";
    // Documented difference: a mark at the start of a later event is skipped as well.
    if bytes
        .get(1..)
        .is_some_and(|rest| rest.windows(3).any(|window| window == MARK))
    {
        return;
    }
    let expected = dispatch_slowly(bytes);
    for step in STEPS.into_iter().chain([bytes.len().max(1)]) {
        assert_eq!(
            dispatch(bytes, step),
            expected,
            "by {step}: {}",
            bytes.escape_ascii()
        );
    }
}

/// The events of a stream that arrives in pieces, and how many empty lines there were.
fn dispatch(bytes: &[u8], step: usize) -> (Vec<Dispatched>, usize) {
    let mut framer = sse::Framer::new();
    let (mut found, mut ends, mut event, mut joined) = (Vec::new(), 0, Vec::new(), Vec::new());
    for mut piece in bytes.chunks(step) {
        while let Some(len) = framer.next_end(piece) {
            event.extend_from_slice(&piece[..len]);
            piece = &piece[len..];
            ends += 1;
            let data = sse::data(&event);
            if let Some(payload) = data.payload(&mut joined) {
                found.push((data.name.to_vec(), payload.to_vec()));
            }
            event.clear();
        }
        event.extend_from_slice(piece);
    }
    (found, ends)
}

/// WHATWG HTML, sections 9.2.5 and 9.2.6, one byte at a time.
fn dispatch_slowly(bytes: &[u8]) -> (Vec<Dispatched>, usize) {
    let bytes = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes);
    let (mut found, mut ends, mut at) = (Vec::new(), 0, 0);
    let (mut name, mut data) = (Vec::new(), Vec::new());
    let mut line = Vec::new();
    while at < bytes.len() {
        let byte = bytes[at];
        at += 1;
        if byte != b'\r' && byte != b'\n' {
            line.push(byte);
            continue;
        }
        if byte == b'\r' && bytes.get(at) == Some(&b'\n') {
            at += 1;
        }
        if line.is_empty() {
            ends += 1;
            if data.pop().is_some() {
                found.push((std::mem::take(&mut name), std::mem::take(&mut data)));
            }
            name.clear();
        } else {
            let colon = line.iter().position(|&byte| byte == b':').unwrap_or(line.len());
            let value = line.get(colon + 1..).unwrap_or_default();
            let value = if value.first() == Some(&b' ') {
                &value[1..]
            } else {
                value
            };
            match &line[..colon] {
                b"event" => name = value.to_vec(),
                b"data" => {
                    data.extend_from_slice(value);
                    data.push(b'\n');
                }
                _ => {}
            }
        }
        line.clear();
    }
    (found, ends)
}

/// A document is taken where `serde_json` takes it for a `RawValue` that is an object and not
/// nested too deeply; the members are the same, and each names its own bytes.
pub fn document(bytes: &[u8]) {
    let walked: Result<Vec<json::Member<'_>>, json::JsonError> = json::members(bytes).collect();
    let raw: Result<&serde_json::value::RawValue, _> = serde_json::from_slice(bytes);
    let expected = raw.is_ok_and(|raw| raw.get().starts_with('{') && depth(raw.get()) <= JSON_DEPTH_MAX);
    assert_eq!(walked.is_ok(), expected, "{walked:?}: {}", bytes.escape_ascii());
    let members = match walked {
        Ok(members) => members,
        Err(error) => return assert!(error.offset <= bytes.len()),
    };
    for member in &members {
        check_member(bytes, member);
    }
    // Keys with lone surrogates are no strings for serde_json.
    if let Ok(Pairs(pairs)) = serde_json::from_slice(bytes) {
        let found: Vec<_> = members
            .iter()
            .map(|member| (member.key.clone().into_owned(), member.raw()))
            .collect();
        let pairs: Vec<_> = pairs
            .iter()
            .map(|(key, value)| (key.clone(), value.get().as_bytes()))
            .collect();
        assert_eq!(found, pairs);
    }
}

fn check_member(bytes: &[u8], member: &json::Member<'_>) {
    assert_eq!(member.raw(), &bytes[member.value.clone()]);
    assert_eq!(
        serde_json::from_slice(member.raw()).ok(),
        member.as_str().map(|text| text.into_owned())
    );
    assert_eq!(serde_json::from_slice(member.raw()).ok(), member.as_bool());
    if let Ok(number) = serde_json::from_slice::<u64>(member.raw()) {
        assert_eq!(member.as_u64(), Some(number));
    }
    assert_eq!(member.is_null(), member.raw() == b"null");
    for inner in member.members().into_iter().flatten() {
        let inner = inner.expect("the document is valid");
        assert_eq!(inner.raw(), &member.raw()[inner.value.clone()]);
    }
    if let Some(text) = member.as_str() {
        let mut written = Vec::new();
        json::write_string(&text, &mut written);
        assert_eq!(written, serde_json::to_vec(&*text).expect("a string"));
    }
}

/// Deepest nesting of a valid document.
fn depth(text: &str) -> usize {
    let (mut depth, mut deepest, mut in_string, mut escaped) = (0, 0, false, false);
    for byte in text.bytes() {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if in_string => escaped = true,
            b'"' => in_string = !in_string,
            b'{' | b'[' if !in_string => {
                depth += 1;
                deepest = deepest.max(depth);
            }
            b'}' | b']' if !in_string => depth -= 1,
            _ => {}
        }
    }
    deepest
}

/// Members in order, repeated keys included.
struct Pairs<'a>(Vec<(String, &'a serde_json::value::RawValue)>);

impl<'de> serde::Deserialize<'de> for Pairs<'de> {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl<'de> serde::de::Visitor<'de> for Visitor {
            type Value = Pairs<'de>;

            fn expecting(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                formatter.write_str("an object")
            }

            fn visit_map<A: serde::de::MapAccess<'de>>(self, mut map: A) -> Result<Pairs<'de>, A::Error> {
                let mut pairs = Vec::new();
                while let Some(pair) = map.next_entry()? {
                    pairs.push(pair);
                }
                Ok(Pairs(pairs))
            }
        }
        deserializer.deserialize_map(Visitor)
    }
}

/// A PROXY header is the same however it arrives, and no prefix of it is another one.
pub fn proxy(bytes: &[u8]) {
    let whole = proxy::parse(bytes);
    for end in 0..bytes.len().min(300) {
        match proxy::parse(&bytes[..end]) {
            // Not certain yet; more may be wrong with it.
            Ok(None) => {}
            told => assert_eq!(told, whole, "{end} of {}", bytes.escape_ascii()),
        }
    }
    if let Ok(Some(header)) = whole {
        assert!(header.len > 0 && header.len <= bytes.len());
        assert_eq!(proxy::parse(&bytes[..header.len]), whole);
        assert_eq!(proxy::parse(&bytes[..header.len - 1]), Ok(None));
    }
}

/// What stands left of a trusted element changes nothing, whatever it is.
pub fn forwarded(bytes: &[u8]) {
    let hop = std::net::IpAddr::from([10, 0, 0, 1]);
    let honest = std::net::IpAddr::from([203, 0, 113, 7]);
    let trusted = |ip: std::net::IpAddr| ip == hop;
    for (form, added) in [
        (Form::XForwardedFor, b", 203.0.113.7".as_slice()),
        (Form::Forwarded, b", for=203.0.113.7;proto=https"),
    ] {
        forwarded::client(form, [bytes].into_iter(), hop, trusted);
        let list = [bytes, added].concat();
        let client = forwarded::client(form, [list.as_slice()].into_iter(), hop, trusted);
        assert_eq!(client, honest, "{}", list.escape_ascii());
        let fields = [bytes, &added[2..]];
        assert_eq!(forwarded::client(form, fields.into_iter(), hop, trusted), honest);
    }
}
