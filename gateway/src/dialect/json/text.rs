//! Strings: escapes decoded and written.

use std::borrow::Cow;
use std::char::REPLACEMENT_CHARACTER;

/// Decodes what stands between the quotes of a valid string; `None` where it has a lone surrogate.
pub(super) fn decode(raw: &[u8]) -> Option<Cow<'_, str>> {
    let (text, is_exact) = decode_parts(raw);
    is_exact.then_some(text)
}

/// Decodes what stands between the quotes of a valid string; lone surrogates become U+FFFD.
pub(super) fn decode_lossy(raw: &[u8]) -> Cow<'_, str> {
    decode_parts(raw).0
}

/// The decoded text, and whether nothing had to be replaced.
fn decode_parts(raw: &[u8]) -> (Cow<'_, str>, bool) {
    let Some(first) = memchr::memchr(b'\\', raw) else {
        return match std::str::from_utf8(raw) {
            Ok(text) => (Cow::Borrowed(text), true),
            Err(_) => (Cow::Owned(String::from_utf8_lossy(raw).into_owned()), false),
        };
    };
    let mut text = String::with_capacity(raw.len());
    let mut is_exact = true;
    let (mut plain, mut rest) = raw.split_at(first);
    loop {
        match String::from_utf8_lossy(plain) {
            Cow::Borrowed(valid) => text.push_str(valid),
            Cow::Owned(repaired) => {
                is_exact = false;
                text.push_str(&repaired);
            }
        }
        if rest.is_empty() {
            return (Cow::Owned(text), is_exact);
        }
        let (character, len) = decode_escape(rest);
        is_exact &= character.is_some();
        text.push(character.unwrap_or(REPLACEMENT_CHARACTER));
        rest = &rest[len..];
        (plain, rest) = rest.split_at(memchr::memchr(b'\\', rest).unwrap_or(rest.len()));
    }
}

/// Decodes the escape at the start of `text`, which starts with a backslash: its character (`None`
/// for a lone surrogate) and its length in bytes.
fn decode_escape(text: &[u8]) -> (Option<char>, usize) {
    let character = match text.get(1) {
        Some(b'b') => '\u{8}',
        Some(b'f') => '\u{c}',
        Some(b'n') => '\n',
        Some(b'r') => '\r',
        Some(b't') => '\t',
        Some(b'u') => return decode_unicode(text),
        Some(&byte) => char::from(byte),
        None => return (None, text.len()),
    };
    (Some(character), 2)
}

/// Decodes `\uXXXX`, together with the escape behind it where the two are a surrogate pair.
fn decode_unicode(text: &[u8]) -> (Option<char>, usize) {
    let Some(unit) = hex_unit(text) else {
        return (None, text.len().min(6));
    };
    if let 0xd800..0xdc00 = unit
        && let Some(low @ 0xdc00..0xe000) = hex_unit(&text[6..])
    {
        return (
            char::from_u32(0x10000 + ((unit - 0xd800) << 10 | (low - 0xdc00))),
            12,
        );
    }
    (char::from_u32(unit), 6)
}

/// The UTF-16 unit of the `\uXXXX` at the start of `text`, where there is one.
fn hex_unit(text: &[u8]) -> Option<u32> {
    let digits = text.get(..6)?.strip_prefix(b"\\u")?;
    digits
        .iter()
        .try_fold(0, |unit, &byte| Some(unit << 4 | char::from(byte).to_digit(16)?))
}

/// Appends `text` to `out` as a JSON string, quotes included.
pub fn write_string(text: &str, out: &mut Vec<u8>) {
    const HEX: &[u8; 16] = b"0123456789abcdef";
    out.push(b'"');
    let mut rest = text.as_bytes();
    while let Some(at) = rest
        .iter()
        .position(|&byte| byte < b' ' || byte == b'"' || byte == b'\\')
    {
        out.extend_from_slice(&rest[..at]);
        match rest[at] {
            byte @ (b'"' | b'\\') => out.extend_from_slice(&[b'\\', byte]),
            0x08 => out.extend_from_slice(b"\\b"),
            0x0c => out.extend_from_slice(b"\\f"),
            b'\n' => out.extend_from_slice(b"\\n"),
            b'\r' => out.extend_from_slice(b"\\r"),
            b'\t' => out.extend_from_slice(b"\\t"),
            byte => {
                out.extend_from_slice(b"\\u00");
                out.extend_from_slice(&[HEX[usize::from(byte >> 4)], HEX[usize::from(byte & 0xf)]]);
            }
        }
        rest = &rest[at + 1..];
    }
    out.extend_from_slice(rest);
    out.push(b'"');
}
