//! The grammar of RFC 8259 as functions that take an offset and give the one behind what they read.

use wide::u8x16;

use super::{JsonError, Kind};
use crate::bounds::JSON_DEPTH_MAX;

// The object whose members are walked is a level of its own.
const _: () = assert!(JSON_DEPTH_MAX > 0 && JSON_DEPTH_MAX - 1 <= u128::BITS as usize);

/// The containers that are open, one bit each: 1 is an object.
#[derive(Default)]
struct Nest {
    bits: u128,
    depth: usize,
}

impl Nest {
    fn push(&mut self, is_object: bool, offset: usize) -> Result<(), JsonError> {
        if self.depth + 1 >= JSON_DEPTH_MAX {
            return Err(JsonError {
                offset,
                what: "nested too deeply",
            });
        }
        self.depth += 1;
        self.bits = self.bits << 1 | u128::from(is_object);
        Ok(())
    }

    fn pop(&mut self) {
        self.depth -= 1;
        self.bits >>= 1;
    }

    /// Whether the innermost open container is an object; `None` where none is open.
    fn innermost(&self) -> Option<bool> {
        (self.depth > 0).then_some(self.bits & 1 == 1)
    }
}

fn fail<T>(body: &[u8], offset: usize, what: &'static str) -> Result<T, JsonError> {
    let what = if offset >= body.len() {
        "unexpected end of document"
    } else {
        what
    };
    Err(JsonError {
        offset: offset.min(body.len()),
        what,
    })
}

/// Text that is exchanged is UTF-8 (RFC 8259, section 8.1).
pub(super) fn check_utf8(body: &[u8]) -> Result<(), JsonError> {
    match simdutf8::compat::from_utf8(body) {
        Ok(_) => Ok(()),
        Err(error) => Err(JsonError {
            offset: error.valid_up_to(),
            what: "not utf-8",
        }),
    }
}

#[inline]
pub(super) fn skip_blank(body: &[u8], mut at: usize) -> usize {
    while let Some(b' ' | b'\n' | b'\r' | b'\t') = body.get(at) {
        at += 1;
    }
    at
}

/// Reads `"key" :` and the white space behind it: the end of the key, and where its value starts.
#[inline]
pub(super) fn skip_key(body: &[u8], at: usize) -> Result<(usize, usize), JsonError> {
    if body.get(at) != Some(&b'"') {
        return fail(body, at, "expected a key");
    }
    let end = skip_string(body, at + 1)?;
    let colon = skip_blank(body, end);
    if body.get(colon) != Some(&b':') {
        return fail(body, colon, "expected `:`");
    }
    Ok((end, skip_blank(body, colon + 1)))
}

/// Reads one value that starts at `at`, whatever it contains.
pub(super) fn skip_value(body: &[u8], at: usize) -> Result<(usize, Kind), JsonError> {
    let mut nest = Nest::default();
    let (mut at, kind) = skip_start(body, at, &mut nest)?;
    // The start of an array or object may be followed by its end or by its first element;
    // everything else by what may stand behind a value.
    let mut has_opened = nest.depth > 0;
    while let Some(in_object) = nest.innermost() {
        at = skip_blank(body, at);
        match body.get(at) {
            Some(b'}') if in_object => nest.pop(),
            Some(b']') if !in_object => nest.pop(),
            Some(b',') if !has_opened => {
                at = skip_blank(body, at + 1);
                (at, has_opened) = skip_element(body, at, in_object, &mut nest)?;
                continue;
            }
            _ if has_opened => {
                (at, has_opened) = skip_element(body, at, in_object, &mut nest)?;
                continue;
            }
            _ => return fail(body, at, "expected `,` or the end of the array or object"),
        }
        at += 1;
        has_opened = false;
    }
    Ok((at, kind))
}

/// Reads an element of the innermost container, its key included, as far as [`skip_start`] goes.
/// Also tells whether that opened another container.
#[inline]
fn skip_element(
    body: &[u8],
    at: usize,
    in_object: bool,
    nest: &mut Nest,
) -> Result<(usize, bool), JsonError> {
    let value = if in_object { skip_key(body, at)?.1 } else { at };
    let (end, kind) = skip_start(body, value, nest)?;
    Ok((end, matches!(kind, Kind::Object | Kind::Array)))
}

/// Reads a scalar, or the opening of an array or object, which is put on `nest`.
#[inline]
fn skip_start(body: &[u8], at: usize, nest: &mut Nest) -> Result<(usize, Kind), JsonError> {
    match body.get(at) {
        Some(b'"') => Ok((skip_string(body, at + 1)?, Kind::String)),
        Some(b'{') => nest.push(true, at).map(|()| (at + 1, Kind::Object)),
        Some(b'[') => nest.push(false, at).map(|()| (at + 1, Kind::Array)),
        Some(b'-' | b'0'..=b'9') => Ok((skip_number(body, at)?, Kind::Number)),
        Some(b't') => skip_literal(body, at, b"true").map(|end| (end, Kind::Bool)),
        Some(b'f') => skip_literal(body, at, b"false").map(|end| (end, Kind::Bool)),
        Some(b'n') => skip_literal(body, at, b"null").map(|end| (end, Kind::Null)),
        _ => fail(body, at, "expected a value"),
    }
}

fn skip_literal(body: &[u8], at: usize, literal: &[u8]) -> Result<usize, JsonError> {
    let end = at + literal.len();
    if body.get(at..end) == Some(literal) {
        Ok(end)
    } else {
        fail(body, at, "expected a value")
    }
}

/// Reads a string whose opening quote stands just before `at`; gives the offset behind its closing
/// one. Prompts are long strings, so this loop sets the speed of the walk.
#[inline]
fn skip_string(body: &[u8], mut at: usize) -> Result<usize, JsonError> {
    loop {
        at = find_special(body, at);
        match body.get(at) {
            Some(b'"') => return Ok(at + 1),
            Some(b'\\') => at = skip_escape(body, at + 1)?,
            _ => return fail(body, at, "control character in a string"),
        }
    }
}

/// The first quote, backslash or control character at or behind `start`; the end where there is
/// none. Keys are short, and text has an escape in every line or two: what counts is how soon a short run is over, so it goes by
/// sixteen bytes and not by calls of memchr.
#[inline]
fn find_special(body: &[u8], start: usize) -> usize {
    let (chunks, rest) = body[start..].as_chunks::<CHUNK>();
    for (index, chunk) in chunks.iter().enumerate() {
        if let Some(place) = first_special(chunk) {
            return start + index * CHUNK + place;
        }
    }
    let from = body.len() - rest.len();
    let place = rest
        .iter()
        .position(|&byte| byte < b' ' || byte == b'"' || byte == b'\\');
    from + place.unwrap_or(rest.len())
}

/// Bytes that are looked at together.
const CHUNK: usize = 16;

/// Where the first quote, backslash or byte below 0x20 stands.
#[inline]
fn first_special(chunk: &[u8; CHUNK]) -> Option<usize> {
    let bytes = u8x16::new(*chunk);
    let is = |byte| bytes.simd_eq(u8x16::splat(byte));
    let is_control = bytes.min(u8x16::splat(0x1f)).simd_eq(bytes);
    let marks = (is_control | is(b'"') | is(b'\\')).to_bitmask();
    (marks != 0).then(|| marks.trailing_zeros() as usize)
}

/// Reads an escape whose backslash stands just before `at`.
#[inline]
fn skip_escape(body: &[u8], at: usize) -> Result<usize, JsonError> {
    match body.get(at) {
        Some(b'"' | b'\\' | b'/' | b'b' | b'f' | b'n' | b'r' | b't') => Ok(at + 1),
        Some(b'u') => {
            for offset in at + 1..at + 5 {
                if !body.get(offset).is_some_and(u8::is_ascii_hexdigit) {
                    return fail(body, offset, "invalid unicode escape");
                }
            }
            Ok(at + 5)
        }
        _ => fail(body, at, "invalid escape"),
    }
}

/// Reads `[ "-" ] int [ frac ] [ exp ]`.
fn skip_number(body: &[u8], at: usize) -> Result<usize, JsonError> {
    let mut at = if body[at] == b'-' { at + 1 } else { at };
    at = match body.get(at) {
        Some(b'0') => at + 1,
        _ => skip_digits(body, at)?,
    };
    if body.get(at).is_some_and(u8::is_ascii_digit) {
        return fail(body, at, "number with a leading zero");
    }
    if body.get(at) == Some(&b'.') {
        at = skip_digits(body, at + 1)?;
    }
    if let Some(b'e' | b'E') = body.get(at) {
        let has_sign = matches!(body.get(at + 1), Some(b'+' | b'-'));
        at = skip_digits(body, at + 1 + usize::from(has_sign))?;
    }
    Ok(at)
}

/// Reads one digit or more.
fn skip_digits(body: &[u8], start: usize) -> Result<usize, JsonError> {
    let mut at = start;
    while body.get(at).is_some_and(u8::is_ascii_digit) {
        at += 1;
    }
    if at == start {
        fail(body, at, "expected a digit")
    } else {
        Ok(at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every byte at every place, alone and with another special one behind it.
    #[test]
    fn specials_are_found_where_they_stand() {
        for byte in 0..=u8::MAX {
            let is_special = byte < b' ' || byte == b'"' || byte == b'\\';
            for place in 0..CHUNK {
                let mut chunk = [b'a'; CHUNK];
                chunk[place] = byte;
                assert_eq!(
                    first_special(&chunk),
                    is_special.then_some(place),
                    "{byte} at {place}"
                );
                for behind in place + 1..CHUNK {
                    let mut both = chunk;
                    both[behind] = b'"';
                    let first = if is_special { place } else { behind };
                    assert_eq!(first_special(&both), Some(first));
                }
            }
        }
    }

    #[test]
    fn a_run_of_any_length_ends_where_its_first_special_byte_stands() {
        for len in 0..70 {
            let mut body = vec![b'a'; len];
            assert_eq!(find_special(&body, 0), len);
            for place in 0..len {
                body[place] = b'\n';
                for start in 0..=len {
                    let found = if start <= place { place } else { len };
                    assert_eq!(find_special(&body, start), found);
                }
                body[place] = b'a';
            }
        }
    }
}
