//! Which fields end at this hop, and which bytes make a token.

use super::Field;

/// Fields that belong to one connection and are never passed on (RFC 9110, section 7.6.1, and the
/// ones that older practice adds to it).
const HOP_BY_HOP: [&str; 10] = [
    "connection",
    "keep-alive",
    "proxy-connection",
    "proxy-authenticate",
    "proxy-authorization",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
    "http2-settings",
];

/// Whether a field of this name, in any case, belongs to one connection only.
pub fn is_hop_by_hop(name: &[u8]) -> bool {
    HOP_BY_HOP
        .iter()
        .any(|hop| name.eq_ignore_ascii_case(hop.as_bytes()))
}

/// Whether `field` may be passed on. `nominates` spares the walk over `fields` for the usual head
/// whose `Connection` names no other field.
pub(super) fn is_end_to_end(fields: &[Field], nominates: bool, buf: &[u8], field: &Field) -> bool {
    let name = field.name.of(buf);
    if is_hop_by_hop(name) {
        return false;
    }
    !nominates
        || !super::values_named(fields, buf, "connection")
            .flat_map(|value| value.split(|&byte| byte == b','))
            .any(|option| option.trim_ascii().eq_ignore_ascii_case(name))
}

/// Token characters (RFC 9110, section 5.6.2).
const TOKEN: [bool; 256] = {
    let mut table = [false; 256];
    let mut byte = 0;
    while byte < 256 {
        table[byte] = (byte as u8).is_ascii_alphanumeric();
        byte += 1;
    }
    let marks = b"!#$%&'*+-.^_`|~";
    let mut mark = 0;
    while mark < marks.len() {
        table[marks[mark] as usize] = true;
        mark += 1;
    }
    table
};

/// Whether `byte` is a token character.
#[inline]
pub(in crate::http) fn is_token(byte: u8) -> bool {
    TOKEN[byte as usize]
}
