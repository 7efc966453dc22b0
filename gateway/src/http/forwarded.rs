//! `X-Forwarded-For` and `Forwarded` (RFC 7239): the way of a request over several proxies, each of which adds at the
//! right whom it got the request from.
//!
//! What a client wrote itself stands at the left of what honest proxies added. So the list is walked from the right for
//! as long as proxies are trusted, and what is further left is not even parsed: garbage there changes nothing.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use crate::bounds::FORWARDED_HOPS_MAX;

/// Which of the two fields is believed. Never both: a proxy maintains one, and passes on the other as the client
/// wrote it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// `X-Forwarded-For: 203.0.113.7, 10.0.0.2`
    XForwardedFor,
    /// `Forwarded: for=203.0.113.7;proto=https, for="[2001:db8::1]:4711"`
    Forwarded,
}

impl Form {
    /// The field's name in lower case.
    pub fn field(self) -> &'static str {
        match self {
            Form::XForwardedFor => "x-forwarded-for",
            Form::Forwarded => "forwarded",
        }
    }
}

/// The client of a request that came from the trusted `hop`: the first address from the right that is not
/// `trusted`. `values` are the field's values in their order; several are one list (RFC 9110, section 5.3).
///
/// Where the list ends, or has no address (`unknown`, `_hidden`, garbage), it is the last trusted one that is known.
pub fn client<'a>(
    form: Form,
    values: impl DoubleEndedIterator<Item = &'a [u8]>,
    hop: IpAddr,
    trusted: impl Fn(IpAddr) -> bool,
) -> IpAddr {
    let mut client = hop;
    let elements = values.rev().flat_map(|value| Elements { rest: Some(value) });
    for element in elements.take(FORWARDED_HOPS_MAX) {
        // Empty elements are allowed and mean nothing (RFC 9110, section 5.6.1).
        if element.is_empty() {
            continue;
        }
        let node = match form {
            Form::XForwardedFor => Some(element),
            Form::Forwarded => node_of(element),
        };
        let Some(address) = node.and_then(address) else {
            return client;
        };
        client = address;
        if !trusted(client) {
            return client;
        }
    }
    client
}

/// Elements of a list from the right, without the white space around them. A comma within a quoted string is none; a
/// string that was never ended hides only what stands left of it.
struct Elements<'a> {
    rest: Option<&'a [u8]>,
}

impl<'a> Iterator for Elements<'a> {
    type Item = &'a [u8];

    fn next(&mut self) -> Option<&'a [u8]> {
        let rest = self.rest?;
        let (before, element) = match last_unquoted(rest, b',') {
            Some(at) => (Some(&rest[..at]), &rest[at + 1..]),
            None => (None, rest),
        };
        self.rest = before;
        Some(element.trim_ascii())
    }
}

/// The place of the last `byte` outside quotes.
fn last_unquoted(bytes: &[u8], byte: u8) -> Option<usize> {
    let mut quoted = false;
    for (place, &here) in bytes.iter().enumerate().rev() {
        let escaped = here == b'"' && place > 0 && bytes[place - 1] == b'\\';
        if here == b'"' && !escaped {
            quoted = !quoted;
        } else if here == byte && !quoted {
            return Some(place);
        }
    }
    None
}

/// The value of `for` in an element of `Forwarded`; none where it is not there exactly once (RFC 7239, section 4).
fn node_of(element: &[u8]) -> Option<&[u8]> {
    let mut node = None;
    let mut rest = Some(element);
    while let Some(pairs) = rest {
        let (before, pair) = match last_unquoted(pairs, b';') {
            Some(at) => (Some(&pairs[..at]), &pairs[at + 1..]),
            None => (None, pairs),
        };
        rest = before;
        let Some(equals) = memchr::memchr(b'=', pair) else {
            continue;
        };
        let (name, value) = (pair[..equals].trim_ascii(), &pair[equals + 1..]);
        if !name.eq_ignore_ascii_case(b"for") {
            continue;
        }
        let value = value.trim_ascii();
        let bare = match value.strip_prefix(b"\"") {
            Some(opened) => opened.strip_suffix(b"\"")?,
            None => value,
        };
        if node.replace(bare).is_some() {
            return None;
        }
    }
    node
}

/// An address with or without a port: `192.0.2.7`, `192.0.2.7:80`, `[2001:db8::1]`, `[2001:db8::1]:80`, and, as many
/// proxies write it, `2001:db8::1`.
fn address(node: &[u8]) -> Option<IpAddr> {
    let text = std::str::from_utf8(node).ok()?;
    let bracketed = || {
        text.strip_prefix('[')?
            .strip_suffix(']')?
            .parse::<Ipv6Addr>()
            .ok()
            .map(IpAddr::V6)
    };
    let address = text
        .parse::<IpAddr>()
        .ok()
        .or_else(bracketed)
        .or_else(|| text.parse::<SocketAddr>().ok().map(|address| address.ip()))?;
    Some(address.to_canonical())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(form: Form, values: &[&str]) -> String {
        let hop = IpAddr::from([10, 0, 0, 1]);
        let trusted = |ip: IpAddr| matches!(ip, IpAddr::V4(v4) if v4.octets()[0] == 10);
        client(form, values.iter().map(|value| value.as_bytes()), hop, trusted).to_string()
    }

    #[test]
    fn the_first_untrusted_from_the_right() {
        for (values, wanted) in [
            (&["203.0.113.7"][..], "203.0.113.7"),
            (&["1.1.1.1, 203.0.113.7, 10.0.0.9"], "203.0.113.7"),
            (&["1.1.1.1", "203.0.113.7,10.0.0.9", "10.0.0.8"], "203.0.113.7"),
            (&["<garbage>, 203.0.113.7"], "203.0.113.7"),
            (&["\"open, 203.0.113.7"], "203.0.113.7"),
            (&["203.0.113.7:4711 , ,"], "203.0.113.7"),
            (&["2001:db8::7"], "2001:db8::7"),
            (&["[2001:db8::7]:80"], "2001:db8::7"),
            (&["::ffff:203.0.113.7"], "203.0.113.7"),
            (&["203.0.113.7, unknown"], "10.0.0.1"),
            (&["203.0.113.7, ?, 10.0.0.9"], "10.0.0.9"),
            (&["10.0.0.3, 10.0.0.2"], "10.0.0.3"),
            (&[""], "10.0.0.1"),
            (&[], "10.0.0.1"),
        ] {
            assert_eq!(of(Form::XForwardedFor, values), wanted, "{values:?}");
        }
    }

    #[test]
    fn the_same_by_rfc_7239() {
        for (values, wanted) in [
            (&["for=203.0.113.7"][..], "203.0.113.7"),
            (&["proto=https;For=\"203.0.113.7:80\";by=10.0.0.1"], "203.0.113.7"),
            (
                &["for=1.1.1.1, for=203.0.113.7;host=\"a,b;for=x\", for=10.0.0.9"],
                "203.0.113.7",
            ),
            (&["for=\"[2001:db8::7]:4711\""], "2001:db8::7"),
            (&["for=\"1.1.1.1, for=203.0.113.7"], "203.0.113.7"),
            (&["for=203.0.113.7, for=_hidden"], "10.0.0.1"),
            (&["for=unknown"], "10.0.0.1"),
            (&["for=1.1.1.1;for=2.2.2.2"], "10.0.0.1"),
            (&["proto=https"], "10.0.0.1"),
            (&["203.0.113.7"], "10.0.0.1"),
        ] {
            assert_eq!(of(Form::Forwarded, values), wanted, "{values:?}");
        }
    }

    #[test]
    fn a_long_list_is_not_walked_to_its_end() {
        let long = format!("203.0.113.7{}", ", 10.0.0.2".repeat(FORWARDED_HOPS_MAX));
        assert_eq!(of(Form::XForwardedFor, &[&long]), "10.0.0.2");
    }
}
