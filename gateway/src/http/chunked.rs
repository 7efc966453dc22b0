//! The chunked transfer coding (RFC 9112, section 7.1): decoding in place, encoding in front.

use std::ops::Range;

use thiserror::Error;

use super::head::is_token;
use crate::bounds::{CHUNK_LINE_BYTES_MAX, TRAILER_BYTES_MAX};

/// Most hexadecimal digits of a chunk size: 64 bits.
const SIZE_DIGITS_MAX: u8 = 16;

/// Longest line in front of a chunk that [`write_chunk_head`] makes, bytes.
pub const CHUNK_HEAD_BYTES_MAX: usize = SIZE_DIGITS_MAX as usize + 2;

/// What stands behind a chunk's payload.
pub const CHUNK_END: &[u8] = b"\r\n";

/// The last chunk and an empty trailer section: the end of a chunked body.
pub const LAST_CHUNK: &[u8] = b"0\r\n\r\n";

const _: () = assert!(size_of::<ChunkedDecoder>() <= 32);
const _: () = assert!(CHUNK_LINE_BYTES_MAX <= u16::MAX as usize);
const _: () = assert!(TRAILER_BYTES_MAX <= u16::MAX as usize);

/// Why a chunked body is refused. Its end is not known then: the connection must be closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum ChunkError {
    /// No hexadecimal digit where a size must stand, or something else behind the digits than
    /// CRLF or `;`.
    #[error("invalid chunk size")]
    Size,
    /// A size of more than 16 digits.
    #[error("chunk size is too large")]
    SizeTooLarge,
    /// A control character in a chunk extension.
    #[error("invalid chunk extension")]
    Extension,
    /// A size line longer than [`CHUNK_LINE_BYTES_MAX`].
    #[error("chunk size line is too long")]
    LineTooLong,
    /// CR without LF, LF without CR, or no CRLF behind a chunk's payload.
    #[error("invalid line end in chunked body")]
    LineEnd,
    /// A trailer line that is no header field.
    #[error("invalid trailer field")]
    Trailer,
    /// A trailer section longer than [`TRAILER_BYTES_MAX`].
    #[error("trailer section is too large")]
    TrailerTooLarge,
}

/// What one call of [`ChunkedDecoder::decode`] found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decoded {
    /// Where the payload lies in the buffer that was given; may be empty.
    pub payload: Range<usize>,
    /// Bytes of the buffer that belong to this body. All of them, unless `done`: what follows is
    /// the next message.
    pub consumed: usize,
    /// Whether the body has ended.
    pub done: bool,
}

/// Which byte is expected next.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum State {
    /// The first digit of a size.
    #[default]
    SizeStart,
    Size,
    Extension,
    SizeLineFeed,
    Payload,
    PayloadReturn,
    PayloadLineFeed,
    /// The first byte of a trailer line, or of the empty line that ends the body.
    TrailerStart,
    TrailerName,
    TrailerValue,
    TrailerLineFeed,
    EndLineFeed,
    Done,
}

/// Decodes one chunked body that may be cut at any byte.
///
/// The total of a body is not bounded here; the caller adds up the payload.
#[derive(Clone, Debug, Default)]
pub struct ChunkedDecoder {
    /// Payload bytes of the current chunk that are still to come; while its size line is read, the
    /// size so far.
    remaining: u64,
    /// Bytes of the current size line, or of the trailer section.
    line_bytes: u16,
    digits: u8,
    state: State,
}

impl ChunkedDecoder {
    /// A decoder at the start of a body.
    pub fn new() -> ChunkedDecoder {
        ChunkedDecoder::default()
    }

    /// Whether the body has ended.
    pub fn is_done(&self) -> bool {
        self.state == State::Done
    }

    /// Decodes the next bytes of the body in place.
    ///
    /// The payload of a single chunk stays where it is; that of several is moved together behind
    /// the first one's. Bytes behind `consumed` are not touched.
    ///
    /// # Errors
    /// [`ChunkError`]; the buffer's content and the decoder are of no use afterwards.
    pub fn decode(&mut self, buf: &mut [u8]) -> Result<Decoded, ChunkError> {
        let mut payload = 0..0;
        let mut at = 0;
        while at < buf.len() && self.state != State::Done {
            if self.state == State::Payload {
                let take = usize::try_from(self.remaining)
                    .unwrap_or(usize::MAX)
                    .min(buf.len() - at);
                if payload.is_empty() {
                    payload = at..at + take;
                } else {
                    buf.copy_within(at..at + take, payload.end);
                    payload.end += take;
                }
                at += take;
                self.remaining -= take as u64;
                if self.remaining == 0 {
                    self.state = State::PayloadReturn;
                }
            } else {
                self.state = self.step(buf[at])?;
                at += 1;
            }
        }
        Ok(Decoded {
            payload,
            consumed: at,
            done: self.is_done(),
        })
    }

    /// Takes one byte that is not payload.
    fn step(&mut self, byte: u8) -> Result<State, ChunkError> {
        match self.state {
            State::SizeStart | State::Size | State::Extension => self.step_size_line(byte),
            State::SizeLineFeed => {
                expect(byte, b'\n')?;
                self.line_bytes = 0;
                self.digits = 0;
                Ok(if self.remaining == 0 {
                    State::TrailerStart
                } else {
                    State::Payload
                })
            }
            State::PayloadReturn => expect(byte, b'\r').map(|()| State::PayloadLineFeed),
            State::PayloadLineFeed => expect(byte, b'\n').map(|()| State::SizeStart),
            State::TrailerStart | State::TrailerName | State::TrailerValue => self.step_trailer(byte),
            State::TrailerLineFeed => expect(byte, b'\n').map(|()| State::TrailerStart),
            State::EndLineFeed => expect(byte, b'\n').map(|()| State::Done),
            // `decode` takes payload in one piece and stops when done.
            State::Payload | State::Done => Ok(self.state),
        }
    }

    /// `chunk-size [ chunk-ext ] CRLF`. White space before `;`, which the grammar calls bad, is
    /// refused: it is where parsers disagree.
    fn step_size_line(&mut self, byte: u8) -> Result<State, ChunkError> {
        self.line_bytes += 1;
        if usize::from(self.line_bytes) > CHUNK_LINE_BYTES_MAX {
            return Err(ChunkError::LineTooLong);
        }
        if self.state == State::Extension {
            return match byte {
                b'\r' => Ok(State::SizeLineFeed),
                b'\n' => Err(ChunkError::LineEnd),
                b'\t' | b' '..=b'~' | 0x80.. => Ok(State::Extension),
                _ => Err(ChunkError::Extension),
            };
        }
        let digit = match byte {
            b'0'..=b'9' => byte - b'0',
            b'a'..=b'f' => byte - b'a' + 10,
            b'A'..=b'F' => byte - b'A' + 10,
            _ if self.state == State::SizeStart => return Err(ChunkError::Size),
            b';' => return Ok(State::Extension),
            b'\r' => return Ok(State::SizeLineFeed),
            b'\n' => return Err(ChunkError::LineEnd),
            _ => return Err(ChunkError::Size),
        };
        if self.digits == SIZE_DIGITS_MAX {
            return Err(ChunkError::SizeTooLarge);
        }
        // Sixteen digits at most, so no bit is shifted out; `remaining` is 0 before the first.
        self.digits += 1;
        self.remaining = self.remaining << 4 | u64::from(digit);
        Ok(State::Size)
    }

    /// Trailer fields are checked as far as it takes to know where they end, and dropped.
    fn step_trailer(&mut self, byte: u8) -> Result<State, ChunkError> {
        self.line_bytes += 1;
        if usize::from(self.line_bytes) > TRAILER_BYTES_MAX {
            return Err(ChunkError::TrailerTooLarge);
        }
        match (self.state, byte) {
            (State::TrailerStart, b'\r') => Ok(State::EndLineFeed),
            (State::TrailerValue, b'\r') => Ok(State::TrailerLineFeed),
            (_, b'\n') => Err(ChunkError::LineEnd),
            (State::TrailerName, b':') => Ok(State::TrailerValue),
            (State::TrailerValue, b'\t' | b' '..=b'~' | 0x80..) => Ok(State::TrailerValue),
            (State::TrailerStart | State::TrailerName, _) if is_token(byte) => Ok(State::TrailerName),
            _ => Err(ChunkError::Trailer),
        }
    }
}

fn expect(byte: u8, wanted: u8) -> Result<(), ChunkError> {
    if byte == wanted {
        Ok(())
    } else {
        Err(ChunkError::LineEnd)
    }
}

/// Writes the line that goes in front of a chunk of `len` bytes to the end of `out` and returns it.
///
/// `len` must not be 0: such a chunk would end the body; that is [`LAST_CHUNK`]'s task.
pub fn write_chunk_head(len: usize, out: &mut [u8; CHUNK_HEAD_BYTES_MAX]) -> &[u8] {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    debug_assert!(len > 0, "an empty chunk ends the body");
    let mut start = CHUNK_HEAD_BYTES_MAX - CHUNK_END.len();
    out[start..].copy_from_slice(CHUNK_END);
    let mut rest = len;
    loop {
        start -= 1;
        out[start] = DIGITS[rest & 0xf];
        rest >>= 4;
        if rest == 0 {
            return &out[start..];
        }
    }
}

/// Makes a chunk of `buf[payload]` where it lies: the size line goes directly in front of it and
/// CRLF behind it. Returns the range of the whole chunk; an empty payload makes no chunk.
///
/// # Panics
/// Where `buf` has less than [`CHUNK_HEAD_BYTES_MAX`] bytes in front of the payload or less than
/// 2 behind it and the chunk needs them: the caller's layout is wrong.
pub fn frame_in_place(buf: &mut [u8], payload: Range<usize>) -> Range<usize> {
    if payload.is_empty() {
        return payload;
    }
    let mut line = [0; CHUNK_HEAD_BYTES_MAX];
    let head = write_chunk_head(payload.len(), &mut line);
    let start = payload.start - head.len();
    let end = payload.end + CHUNK_END.len();
    buf[start..payload.start].copy_from_slice(head);
    buf[payload.end..end].copy_from_slice(CHUNK_END);
    start..end
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Decodes `body` in pieces of `step` bytes; the payload, and what follows the body.
    fn decode(body: &[u8], step: usize) -> Result<(Vec<u8>, Option<usize>), ChunkError> {
        let mut decoder = ChunkedDecoder::new();
        let (mut payload, mut consumed) = (Vec::new(), 0);
        for piece in body.chunks(step) {
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

    #[test]
    fn decodes_at_any_cut() {
        let body = b"5\r\nhello\r\n1;a=\"b\"\r\n,\r\n0006\r\n world\r\n00;x\r\nX-Sum: 1\r\nY:\r\n\r\nGET /";
        for step in 1..=body.len() {
            let (payload, end) = decode(body, step).unwrap();
            assert_eq!(payload, b"hello, world", "{step}");
            assert_eq!(&body[end.unwrap()..], b"GET /", "{step}");
        }
    }

    #[test]
    fn leaves_a_single_chunk_where_it_is_and_moves_several_together() {
        let mut buf = *b"3\r\nabc\r\n";
        let decoded = ChunkedDecoder::new().decode(&mut buf).unwrap();
        assert_eq!(
            (decoded.payload, decoded.consumed, decoded.done),
            (3..6, 8, false)
        );
        assert_eq!(&buf, b"3\r\nabc\r\n");
        let mut buf = *b"3\r\nabc\r\n4\r\ndefg\r\n0\r\n\r\nnext";
        let decoded = ChunkedDecoder::new().decode(&mut buf).unwrap();
        assert_eq!(&buf[decoded.payload], b"abcdefg");
        assert!(decoded.done);
        assert_eq!(&buf[decoded.consumed..], b"next");
    }

    #[test]
    fn stays_done() {
        let mut decoder = ChunkedDecoder::new();
        assert!(decoder.decode(&mut LAST_CHUNK.to_vec()).unwrap().done);
        let again = decoder.decode(&mut b"5\r\n".to_vec()).unwrap();
        assert_eq!(
            again,
            Decoded {
                payload: 0..0,
                consumed: 0,
                done: true
            }
        );
    }

    #[test]
    fn refuses_what_smuggles() {
        use ChunkError::*;
        for (body, error) in [
            ("\r\n", Size),
            ("+5\r\n", Size),
            ("-5\r\n", Size),
            (" 5\r\n", Size),
            ("5 \r\n", Size),
            ("5 ;x\r\n", Size),
            ("0x5\r\n", Size),
            ("5_0\r\n", Size),
            ("g\r\n", Size),
            (";x\r\n", Size),
            ("5\n", LineEnd),
            ("5;x\n", LineEnd),
            ("5\rx", LineEnd),
            ("5;\u{0}\r\n", Extension),
            ("5;a\u{7f}\r\n", Extension),
            ("00000000000000001\r\n", SizeTooLarge),
            ("fffffffffffffffff\r\n", SizeTooLarge),
            ("1\r\nab\r\n", LineEnd),
            ("1\r\na\n", LineEnd),
            ("1\r\na\r\r", LineEnd),
            ("0\r\n\n", LineEnd),
            ("0\r\n\rx", LineEnd),
            ("0\r\nX: a\n", LineEnd),
            ("0\r\nX\r\n", Trailer),
            ("0\r\n: a\r\n", Trailer),
            ("0\r\n X: a\r\n", Trailer),
            ("0\r\nX : a\r\n", Trailer),
            ("0\r\nX: \u{0}\r\n", Trailer),
            ("0\r\nX: a\rb", LineEnd),
        ] {
            for step in 1..=body.len() {
                assert_eq!(decode(body.as_bytes(), step), Err(error), "{body:?} by {step}");
            }
        }
    }

    #[test]
    fn bounds_lines_and_trailers() {
        let line = |len: usize| decode(format!("1;{}\r\na", "x".repeat(len - 3)).as_bytes(), 7);
        assert!(line(CHUNK_LINE_BYTES_MAX).is_ok());
        assert_eq!(line(CHUNK_LINE_BYTES_MAX + 1), Err(ChunkError::LineTooLong));
        // Each line is bounded anew.
        let many = "1;xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx\r\na\r\n".repeat(100);
        assert_eq!(decode(many.as_bytes(), 64), Ok((vec![b'a'; 100], None)));
        let trailers = "0\r\n".to_owned() + &"X: a\r\n".repeat(TRAILER_BYTES_MAX / 5 + 1);
        assert_eq!(decode(trailers.as_bytes(), 64), Err(ChunkError::TrailerTooLarge));
    }

    #[test]
    fn takes_the_largest_size() {
        let mut decoder = ChunkedDecoder::new();
        let decoded = decoder.decode(&mut b"ffffffffffffffff\r\nabc".to_vec()).unwrap();
        assert_eq!(
            decoded,
            Decoded {
                payload: 18..21,
                consumed: 21,
                done: false
            }
        );
    }

    #[test]
    fn encodes_in_front_of_the_payload() {
        let mut line = [0; CHUNK_HEAD_BYTES_MAX];
        assert_eq!(write_chunk_head(1, &mut line), b"1\r\n");
        assert_eq!(write_chunk_head(0xabc0, &mut line), b"abc0\r\n");
        assert_eq!(write_chunk_head(usize::MAX, &mut line), b"ffffffffffffffff\r\n");
        let mut buf = *b"..................hello..";
        let chunk = frame_in_place(&mut buf, 18..23);
        assert_eq!(&buf[chunk], b"5\r\nhello\r\n");
        assert_eq!(frame_in_place(&mut buf, 18..18), 18..18);
    }
}
