//! Server-sent events (WHATWG HTML, section 9.2.6): where one ends, and what it says.
//!
//! Finding the ends takes one memchr a line and needs no byte that is gone already, so the bytes
//! can be passed on as they come, cut anywhere.

/// May stand once, at the start of a stream.
const BYTE_ORDER_MARK: &[u8; 3] = b"\xef\xbb\xbf";

const _: () = assert!(size_of::<Framer>() <= 16);

/// Finds the ends of events in a stream of bytes. Lines end in LF, CRLF or CR, also mixed.
#[derive(Clone, Debug)]
pub struct Framer {
    /// Bytes of a byte order mark seen at the start of the stream; 3 when that is settled.
    mark_bytes: u8,
    /// The current line has no byte yet.
    line_is_empty: bool,
    /// The last byte was CR: an LF that follows is part of that line end.
    after_return: bool,
}

impl Default for Framer {
    fn default() -> Framer {
        Framer {
            mark_bytes: 0,
            line_is_empty: true,
            after_return: false,
        }
    }
}

impl Framer {
    /// A framer at the start of a stream.
    pub fn new() -> Framer {
        Framer::default()
    }

    /// Takes the next bytes of the stream up to the end of the event, and returns how many those
    /// are, the empty line included. `None` where the event goes on behind `bytes`: all of them
    /// have been taken then.
    ///
    /// After `Some(n)`, call again with `&bytes[n..]`. Every empty line ends an event, which may
    /// then be empty or a comment; [`data`] tells.
    ///
    /// Where `bytes` end in the CR of an event's empty line, the event has ended, since nothing may
    /// ever follow. Should the next bytes start with the LF of that CR, it is counted to the next
    /// event, so that the number of events does not depend on how the stream is cut; [`data`]
    /// overlooks it.
    pub fn next_end(&mut self, bytes: &[u8]) -> Option<usize> {
        let mut at = if self.mark_bytes < 3 {
            self.skip_mark(bytes)
        } else {
            0
        };
        if self.after_return && at < bytes.len() {
            self.after_return = false;
            at += usize::from(bytes[at] == b'\n');
        }
        while at < bytes.len() {
            let Some(offset) = memchr::memchr2(b'\n', b'\r', &bytes[at..]) else {
                self.line_is_empty = false;
                return None;
            };
            let line_end = at + offset;
            let ends_event = self.line_is_empty && offset == 0;
            self.line_is_empty = true;
            at = line_end + 1;
            if bytes[line_end] == b'\r' {
                match bytes.get(at) {
                    Some(b'\n') => at += 1,
                    Some(_) => {}
                    None => self.after_return = true,
                }
            }
            if ends_event {
                return Some(at);
            }
            // The empty line right behind, as nearly always, needs no search.
            if bytes.get(at) == Some(&b'\n') {
                return Some(at + 1);
            }
        }
        None
    }

    /// Takes what of `bytes` belongs to a byte order mark at the start of the stream.
    fn skip_mark(&mut self, bytes: &[u8]) -> usize {
        let mut at = 0;
        while let (Some(&byte), Some(&expected)) =
            (bytes.get(at), BYTE_ORDER_MARK.get(usize::from(self.mark_bytes)))
        {
            if byte != expected {
                // A mark that breaks off is the start of a line like another.
                self.line_is_empty = self.mark_bytes == 0;
                self.mark_bytes = 3;
                break;
            }
            self.mark_bytes += 1;
            at += 1;
        }
        at
    }
}

/// What one event says, borrowed from its bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Data<'a> {
    /// Value of the last `event:` line; empty where there is none, which means `message`.
    pub name: &'a [u8],
    /// Value of the first `data:` line.
    first: Option<&'a [u8]>,
    /// From the second `data:` line to the event's end; empty where there is only one.
    more: &'a [u8],
}

/// Reads one event, as [`Framer::next_end`] cuts them; a cut-off one is read as far as it goes.
/// Comments and unknown fields are overlooked. A byte order mark in front is skipped wherever the
/// event stood, since no sender puts one elsewhere.
pub fn data(event: &[u8]) -> Data<'_> {
    let mut found = Data {
        name: b"",
        first: None,
        more: b"",
    };
    for line in Lines(event.strip_prefix(BYTE_ORDER_MARK).unwrap_or(event)) {
        match field(line.text) {
            (b"event", value) => found.name = value,
            (b"data", value) if found.first.is_none() => found.first = Some(value),
            (b"data", _) if found.more.is_empty() => found.more = line.rest_with_line,
            _ => {}
        }
    }
    found
}

impl<'a> Data<'a> {
    /// Whether there is a `data:` line: an event without one is not dispatched.
    pub fn is_some(&self) -> bool {
        self.first.is_some()
    }

    /// The payload where it stands in one line, as nearly every event's does.
    pub fn single(&self) -> Option<&'a [u8]> {
        self.first.filter(|_| self.more.is_empty())
    }

    /// The payload: a slice of the event where it stands in one line, else the lines joined by LF
    /// in `joined`, which is cleared before. `None` where there is no `data:` line.
    pub fn payload<'s>(&self, joined: &'s mut Vec<u8>) -> Option<&'s [u8]>
    where
        'a: 's,
    {
        let first = self.first?;
        if self.more.is_empty() {
            return Some(first);
        }
        joined.clear();
        joined.extend_from_slice(first);
        for line in Lines(self.more) {
            if let (b"data", value) = field(line.text) {
                joined.push(b'\n');
                joined.extend_from_slice(value);
            }
        }
        Some(joined)
    }
}

/// Splits a line into field name and value: at the first colon, with one space behind it dropped.
/// A line without a colon is a name with an empty value; a comment has an empty name.
fn field(line: &[u8]) -> (&[u8], &[u8]) {
    match memchr::memchr(b':', line) {
        Some(colon) => {
            let value = &line[colon + 1..];
            (&line[..colon], value.strip_prefix(b" ").unwrap_or(value))
        }
        None => (line, b""),
    }
}

struct Line<'a> {
    text: &'a [u8],
    /// This line and all that follow it.
    rest_with_line: &'a [u8],
}

/// The lines of a slice without their ends.
struct Lines<'a>(&'a [u8]);

impl<'a> Iterator for Lines<'a> {
    type Item = Line<'a>;

    fn next(&mut self) -> Option<Line<'a>> {
        let rest_with_line = self.0;
        if rest_with_line.is_empty() {
            return None;
        }
        let end = memchr::memchr2(b'\n', b'\r', rest_with_line).unwrap_or(rest_with_line.len());
        let end_len = if rest_with_line[end..].starts_with(b"\r\n") {
            2
        } else {
            1
        };
        self.0 = rest_with_line.get(end + end_len..).unwrap_or_default();
        Some(Line {
            text: &rest_with_line[..end],
            rest_with_line,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ends(stream: &[u8]) -> Vec<usize> {
        let mut framer = Framer::new();
        let (mut at, mut found) = (0, Vec::new());
        while let Some(len) = framer.next_end(&stream[at..]) {
            assert!(len > 0);
            at += len;
            found.push(at);
        }
        found
    }

    #[test]
    fn finds_ends_with_every_line_end() {
        assert_eq!(ends(b"data: a\n\ndata: b\n\ndata"), [9, 18]);
        assert_eq!(ends(b"data: a\r\n\r\ndata: b\r\n\r\n"), [11, 22]);
        assert_eq!(ends(b"data: a\r\rdata: b\r\r"), [9, 18]);
        assert_eq!(ends(b"a\r\n\nb\n\r\nc\r\r\nd\n\r"), [4, 8, 12, 15]);
        assert!(ends(b"a\nb\r\nc\rd").is_empty());
        assert_eq!(ends(b"\n\na\n\n"), [1, 2, 5]);
        assert!(ends(b"").is_empty());
    }

    #[test]
    fn a_byte_order_mark_is_no_line() {
        assert_eq!(ends(b"\xef\xbb\xbf\n\xef\xbb\xbf\n\n"), [4, 9]);
        assert_eq!(ends(b"\xef\xbb\n\n"), [4]);
        assert_eq!(data(b"\xef\xbb\xbfdata: a\n\n").single(), Some(&b"a"[..]));
        let mut framer = Framer::new();
        assert_eq!(framer.next_end(b"\xef"), None);
        assert_eq!(framer.next_end(b"\xbb\xbf"), None);
        assert_eq!(framer.next_end(b"\n"), Some(1));
    }

    #[test]
    fn a_line_feed_cut_from_its_return_ends_nothing() {
        let mut framer = Framer::new();
        assert_eq!(framer.next_end(b"data: a\r"), None);
        assert_eq!(framer.next_end(b"\n\r"), Some(2));
        assert_eq!(framer.next_end(b""), None);
        assert_eq!(framer.next_end(b"\ndata: b\n\n"), Some(10));
        assert_eq!(data(b"\ndata: b\n\n").single(), Some(&b"b"[..]));
    }

    #[test]
    fn reads_events() {
        let mut joined = b"old".to_vec();
        let event = data(b"event: response.completed\ndata: {\"a\":1}\n\n");
        assert_eq!(event.name, b"response.completed");
        assert_eq!(event.single(), Some(&b"{\"a\":1}"[..]));
        assert_eq!(event.payload(&mut joined), Some(&b"{\"a\":1}"[..]));
        let event = data(b": hi\r\ndata:a\r\nid: 3\r\ndata:  b\rdata\ndata: c\nevent:x\nevent:y\n\n");
        assert_eq!((event.name, event.single()), (&b"y"[..], None));
        assert_eq!(event.payload(&mut joined), Some(&b"a\n b\n\nc"[..]));
        for event in [
            &b": ping\n\n"[..],
            b"\n",
            b"event: x\n\n",
            b"Data: a\n\n",
            b" data: a\n\n",
            b"",
        ] {
            assert!(!data(event).is_some(), "{}", event.escape_ascii());
        }
        assert_eq!(data(b"data\n\n").single(), Some(&b""[..]));
        assert_eq!(data(b"data: cut of").single(), Some(&b"cut of"[..]));
    }
}
