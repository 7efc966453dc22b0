//! The little HTTP/1.1 that both ends of the harness share: message framing and the chunked coding (RFC 9112).

/// Bytes of a message head that either side accepts.
pub const HEAD_BYTES_MAX: usize = 64 * 1024;
/// Header fields that either side accepts.
pub const HEADERS_MAX: usize = 64;

/// Length of the head at the start of `bytes`, its empty line included, once that is there.
pub fn head_end(bytes: &[u8]) -> Option<usize> {
    memchr::memmem::find(bytes, b"\r\n\r\n").map(|at| at + 4)
}

/// What the fields of a head say about its body and its connection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Fields {
    pub content_length: Option<u64>,
    pub chunked: bool,
    pub close: bool,
    pub expect_continue: bool,
}

impl Fields {
    /// Reads the fields that matter; `None` where a length is not a number.
    pub fn read(headers: &[httparse::Header<'_>]) -> Option<Self> {
        let mut fields = Self::default();
        for header in headers {
            if header.name.eq_ignore_ascii_case("content-length") {
                fields.content_length = Some(std::str::from_utf8(header.value).ok()?.trim().parse().ok()?);
            } else if header.name.eq_ignore_ascii_case("transfer-encoding") {
                fields.chunked = header.value.eq_ignore_ascii_case(b"chunked");
            } else if header.name.eq_ignore_ascii_case("connection") {
                fields.close = header.value.eq_ignore_ascii_case(b"close");
            } else if header.name.eq_ignore_ascii_case("expect") {
                fields.expect_continue = header.value.eq_ignore_ascii_case(b"100-continue");
            }
        }
        Some(fields)
    }
}

/// A chunk that is not as RFC 9112 section 7.1 says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadChunk;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Size { digits: u8 },
    Extension,
    SizeLf,
    Data,
    DataCr,
    DataLf,
    TrailerStart,
    Trailer,
    EndLf,
    Done,
}

/// Takes the chunked coding off a body that arrives in pieces.
#[derive(Clone, Debug)]
pub struct Dechunker {
    state: State,
    /// Size while it is read, then the bytes of the chunk that are still to come.
    left: u64,
}

impl Default for Dechunker {
    fn default() -> Self {
        Self {
            state: State::Size { digits: 0 },
            left: 0,
        }
    }
}

impl Dechunker {
    /// Whether the last chunk and the trailer have been seen.
    pub fn is_done(&self) -> bool {
        self.state == State::Done
    }

    /// Eats from `input` up to and including the next run of data. Returns the bytes eaten and that run, which is
    /// `None` only where the input or the body has ended.
    pub fn step<'a>(&mut self, input: &'a [u8]) -> Result<(usize, Option<&'a [u8]>), BadChunk> {
        let mut at = 0;
        while at < input.len() && self.state != State::Done {
            if self.state == State::Data {
                let run = self.left.min((input.len() - at) as u64) as usize;
                self.left -= run as u64;
                if self.left == 0 {
                    self.state = State::DataCr;
                }
                return Ok((at + run, Some(&input[at..at + run])));
            }
            self.state = self.control(input[at])?;
            at += 1;
        }
        Ok((at, None))
    }

    /// The state after one byte that is not data.
    fn control(&mut self, byte: u8) -> Result<State, BadChunk> {
        match (self.state, byte) {
            (State::Size { digits }, b'0'..=b'9' | b'a'..=b'f' | b'A'..=b'F') if digits < 15 => {
                let digit = (byte as char).to_digit(16).ok_or(BadChunk)?;
                self.left = self.left * 16 + u64::from(digit);
                Ok(State::Size { digits: digits + 1 })
            }
            (State::Size { digits: 1.. }, b'\r') | (State::Extension, b'\r') => Ok(State::SizeLf),
            (State::Size { digits: 1.. }, b';' | b' ' | b'\t') => Ok(State::Extension),
            (State::Extension, byte) if byte != b'\n' => Ok(State::Extension),
            (State::SizeLf, b'\n') if self.left == 0 => Ok(State::TrailerStart),
            (State::SizeLf, b'\n') => Ok(State::Data),
            (State::DataCr, b'\r') => Ok(State::DataLf),
            (State::DataLf, b'\n') => Ok(State::Size { digits: 0 }),
            (State::TrailerStart, b'\r') => Ok(State::EndLf),
            (State::Trailer, b'\n') => Ok(State::TrailerStart),
            (State::TrailerStart | State::Trailer, _) => Ok(State::Trailer),
            (State::EndLf, b'\n') => Ok(State::Done),
            _ => Err(BadChunk),
        }
    }
}

/// Appends `data` to `out` as one chunk. Empty data appends nothing, for that would end the body.
pub fn put_chunk(out: &mut Vec<u8>, data: &[u8]) {
    if data.is_empty() {
        return;
    }
    put_hex(out, data.len());
    out.extend_from_slice(b"\r\n");
    out.extend_from_slice(data);
    out.extend_from_slice(b"\r\n");
}

fn put_hex(out: &mut Vec<u8>, value: usize) {
    let digits = (usize::BITS - value.leading_zeros()).div_ceil(4).max(1);
    for place in (0..digits).rev() {
        out.push(b"0123456789abcdef"[(value >> (place * 4)) & 15]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decode(wire: &[u8], piece: usize) -> Result<(Vec<u8>, bool), BadChunk> {
        let mut decoder = Dechunker::default();
        let mut body = Vec::new();
        for mut input in wire.chunks(piece) {
            while !input.is_empty() && !decoder.is_done() {
                let (eaten, data) = decoder.step(input)?;
                body.extend_from_slice(data.unwrap_or_default());
                input = &input[eaten..];
            }
        }
        Ok((body, decoder.is_done()))
    }

    #[test]
    fn chunks_survive_every_cut() {
        let mut wire = Vec::new();
        put_chunk(&mut wire, b"hello ");
        put_chunk(&mut wire, &[b'x'; 300]);
        wire.extend_from_slice(b"3;name=value\r\nend\r\n0\r\nx-trailer: 1\r\n\r\n");
        let mut expected = b"hello ".to_vec();
        expected.extend_from_slice(&[b'x'; 300]);
        expected.extend_from_slice(b"end");
        for piece in 1..=wire.len() {
            assert_eq!(
                decode(&wire, piece),
                Ok((expected.clone(), true)),
                "cut at {piece}"
            );
        }
    }

    #[test]
    fn malformed_chunks_are_refused() {
        for wire in [
            &b"zz\r\n"[..],
            b"\r\n",
            b"5\nhello\r\n",
            b"2\r\nabc\r\n",
            b"1234567890123456\r\n",
        ] {
            assert_eq!(
                decode(wire, 1),
                Err(BadChunk),
                "{:?}",
                String::from_utf8_lossy(wire)
            );
        }
    }

    #[test]
    fn sizes_are_written_in_hex() {
        for (value, text) in [(1, "1"), (15, "f"), (16, "10"), (255, "ff"), (65_536, "10000")] {
            let mut out = Vec::new();
            put_hex(&mut out, value);
            assert_eq!(out, text.as_bytes());
        }
    }
}
