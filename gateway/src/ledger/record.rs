//! One accepted request, as the ledger keeps it.
//!
//! On disk (little-endian; the first 8 bytes are the frame's word, see [`super::segment`]):
//!
//! | at  | bytes | field                                                             |
//! |-----|-------|-------------------------------------------------------------------|
//! | 8   | 16    | request id                                                        |
//! | 24  | 8     | time, Unix milliseconds                                           |
//! | 32  | 32    | tokens: prompt, cached, completion, reasoning                     |
//! | 64  | 16    | time to first token, duration, microseconds                       |
//! | 80  | 16    | bytes in, bytes out                                               |
//! | 96  | 4     | status, flags                                                     |
//! | 100 | 2     | api, outcome                                                      |
//! | 102 | 5     | lengths of the names: key, team, model, provider, upstream model  |
//! | 107 | 1     | zero                                                              |
//! | 108 |       | the names, one after the other                                    |

use std::{fmt, str::FromStr, sync::Arc};

use crate::{
    bounds::{NAME_BYTES_MAX, RECORD_BYTES_MAX},
    dialect::{Api, Usage},
    net::mapped::WORD_BYTES,
};

/// Where the names start in a frame, bytes.
const NAMES_AT: usize = 108;
/// Names of a record.
const NAMES: usize = 5;

const _: () = assert!(NAMES_AT + NAMES * NAME_BYTES_MAX <= RECORD_BYTES_MAX);
const _: () = assert!(NAME_BYTES_MAX <= u8::MAX as usize);

/// Identifies a request across log, ledger, answer (`x-request-id`) and upstream: 128 bits, of
/// which the first 48 are the Unix time in milliseconds (as in UUIDv7, RFC 9562), so that ids sort.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RequestId(pub [u8; 16]);

impl RequestId {
    /// When it was made, milliseconds since the Unix epoch.
    pub fn unix_ms(self) -> u64 {
        (u128::from_be_bytes(self.0) >> 80) as u64
    }

    /// An id for a request of now. It is a UUID of version 7 (RFC 9562, section 5.7): 6 of the random
    /// bits give way to version and variant. `now_unix_ms` counts modulo 2^48 (until the year 10889).
    pub fn new(now_unix_ms: u64, random: [u8; 10]) -> RequestId {
        let mut id = [0; 16];
        id[..6].copy_from_slice(&now_unix_ms.to_be_bytes()[2..]);
        id[6..].copy_from_slice(&random);
        id[6] = 0x70 | id[6] & 0x0f;
        id[8] = 0x80 | id[8] & 0x3f;
        RequestId(id)
    }

    /// The 32 hex digits of [`fmt::Display`], without an allocation.
    pub fn hex(self) -> [u8; 32] {
        const DIGITS: &[u8; 16] = b"0123456789abcdef";
        let mut text = [0; 32];
        for (pair, byte) in text.chunks_exact_mut(2).zip(self.0) {
            pair[0] = DIGITS[usize::from(byte >> 4)];
            pair[1] = DIGITS[usize::from(byte & 15)];
        }
        text
    }
}

impl fmt::Display for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(std::str::from_utf8(&self.hex()).unwrap_or_default())
    }
}

/// A text is not a request id.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a request id has 32 hex digits")]
pub struct NotARequestId;

impl FromStr for RequestId {
    type Err = NotARequestId;

    fn from_str(text: &str) -> Result<RequestId, NotARequestId> {
        let digits: &[u8; 32] = text.as_bytes().try_into().map_err(|_| NotARequestId)?;
        let value = |digit: u8| char::from(digit).to_digit(16).ok_or(NotARequestId);
        let mut id = [0; 16];
        for (byte, pair) in id.iter_mut().zip(digits.chunks_exact(2)) {
            *byte = (value(pair[0])? << 4 | value(pair[1])?) as u8;
        }
        Ok(RequestId(id))
    }
}

/// How a request ended. `u8` on disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Outcome {
    /// The upstream's answer was delivered whole.
    Complete = 0,
    /// The client went away before the answer's end.
    ClientGone = 1,
    /// The upstream failed, or went away before the answer's end.
    UpstreamFailed = 2,
    /// A time limit of the gateway ended it.
    TimedOut = 3,
    /// The gateway was stopped while the request ran.
    Stopped = 4,
}

impl Outcome {
    /// The name used in the ledger's output, in logs and in metrics.
    pub fn name(self) -> &'static str {
        match self {
            Outcome::Complete => "complete",
            Outcome::ClientGone => "client_gone",
            Outcome::UpstreamFailed => "upstream_failed",
            Outcome::TimedOut => "timed_out",
            Outcome::Stopped => "stopped",
        }
    }

    /// The inverse of `self as u8`.
    pub fn from_u8(value: u8) -> Option<Outcome> {
        Some(match value {
            0 => Outcome::Complete,
            1 => Outcome::ClientGone,
            2 => Outcome::UpstreamFailed,
            3 => Outcome::TimedOut,
            4 => Outcome::Stopped,
            _ => return None,
        })
    }
}

/// Facts about a record that are true or not; bits on disk.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Flags(pub u16);

impl Flags {
    /// The token counts are the gateway's estimate, not the provider's figures.
    pub const ESTIMATED: Flags = Flags(1);
    /// The answer was streamed.
    pub const STREAM: Flags = Flags(2);
    /// More than one attempt was made upstream.
    pub const RETRIED: Flags = Flags(4);
    /// Not the first target answered.
    pub const FALLBACK: Flags = Flags(8);
    /// A limit ended the answer.
    pub const CUT: Flags = Flags(16);
    /// The upstream failed, or answered with an error.
    pub const UPSTREAM_ERROR: Flags = Flags(32);
    /// The answer came from the gateway's own cache.
    pub const CACHE_HIT: Flags = Flags(64);
    /// Nobody knows the price.
    pub const UNPRICED: Flags = Flags(128);
    /// The client was gone, and the rest of the answer was read for its usage.
    pub const DRAINED: Flags = Flags(256);
    /// The provider's figures contradicted themselves and were brought within their bounds.
    pub const CLAMPED: Flags = Flags(512);

    /// Whether all bits of `other` are set.
    pub fn has(self, other: Flags) -> bool {
        self.0 & other.0 == other.0
    }

    /// Sets the bits of `other`.
    pub fn set(&mut self, other: Flags) {
        self.0 |= other.0;
    }
}

/// One accepted request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// When the request's head was complete, milliseconds since the Unix epoch.
    pub time_unix_ms: u64,
    pub id: RequestId,
    /// Name of the virtual key.
    pub key: Arc<str>,
    /// Team of the key; empty for none.
    pub team: Arc<str>,
    /// Virtual model that the client asked for.
    pub model: Arc<str>,
    /// Provider that answered; empty when none was reached.
    pub provider: Arc<str>,
    /// The upstream's own name of the model; empty when none was reached.
    pub upstream_model: Arc<str>,
    pub api: Api,
    pub outcome: Outcome,
    pub flags: Flags,
    /// Status that the client was sent; 0 when it was sent none.
    pub status: u16,
    pub usage: Usage,
    /// From complete head to the first byte of the answer's body, microseconds; 0 for none.
    pub ttft_us: u64,
    /// From complete head to the end, microseconds.
    pub duration_us: u64,
    /// Bytes of the request's and of the answer's body.
    pub bytes_in: u64,
    pub bytes_out: u64,
}

impl Record {
    /// Writes the record behind the frame's word and returns the bytes used, the word included.
    /// Names longer than [`NAME_BYTES_MAX`] are cut at a character's border; configuration does not
    /// permit them.
    pub(super) fn encode(&self, frame: &mut [u8; RECORD_BYTES_MAX]) -> usize {
        let words = [
            self.time_unix_ms,
            self.usage.prompt,
            self.usage.cached,
            self.usage.completion,
            self.usage.reasoning,
            self.ttft_us,
            self.duration_us,
            self.bytes_in,
            self.bytes_out,
        ];
        frame[WORD_BYTES..24].copy_from_slice(&self.id.0);
        for (field, word) in frame[24..96].chunks_exact_mut(8).zip(words) {
            field.copy_from_slice(&word.to_le_bytes());
        }
        frame[96..98].copy_from_slice(&self.status.to_le_bytes());
        frame[98..100].copy_from_slice(&self.flags.0.to_le_bytes());
        frame[100] = self.api as u8;
        frame[101] = self.outcome as u8;
        frame[107] = 0;
        let names = [
            &self.key,
            &self.team,
            &self.model,
            &self.provider,
            &self.upstream_model,
        ];
        let mut at = NAMES_AT;
        for (index, name) in names.into_iter().enumerate() {
            let bytes = name.floor_char_boundary(NAME_BYTES_MAX);
            frame[102 + index] = bytes as u8;
            frame[at..at + bytes].copy_from_slice(&name.as_bytes()[..bytes]);
            at += bytes;
        }
        at
    }

    /// The record with its names borrowed.
    pub fn view(&self) -> RecordView<'_> {
        RecordView {
            time_unix_ms: self.time_unix_ms,
            id: self.id,
            key: &self.key,
            team: &self.team,
            model: &self.model,
            provider: &self.provider,
            upstream_model: &self.upstream_model,
            api: self.api,
            outcome: self.outcome,
            flags: self.flags,
            status: self.status,
            usage: self.usage,
            ttft_us: self.ttft_us,
            duration_us: self.duration_us,
            bytes_in: self.bytes_in,
            bytes_out: self.bytes_out,
        }
    }
}

/// A record as it stands in a segment: numbers read, names borrowed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RecordView<'a> {
    pub time_unix_ms: u64,
    pub id: RequestId,
    pub key: &'a str,
    pub team: &'a str,
    pub model: &'a str,
    pub provider: &'a str,
    pub upstream_model: &'a str,
    pub api: Api,
    pub outcome: Outcome,
    pub flags: Flags,
    pub status: u16,
    pub usage: Usage,
    pub ttft_us: u64,
    pub duration_us: u64,
    pub bytes_in: u64,
    pub bytes_out: u64,
}

impl<'a> RecordView<'a> {
    /// Reads a frame, its word included. `None` for what [`Record::encode`] does not write.
    pub(super) fn decode(frame: &'a [u8]) -> Option<RecordView<'a>> {
        let fixed: &[u8; NAMES_AT] = frame.first_chunk()?;
        let u64_at = |at: usize| {
            fixed[at..]
                .first_chunk()
                .map_or(0, |field| u64::from_le_bytes(*field))
        };
        let u16_at = |at: usize| u16::from_le_bytes([fixed[at], fixed[at + 1]]);
        let mut names = [""; NAMES];
        let mut rest = &frame[NAMES_AT..];
        for (name, bytes) in names.iter_mut().zip(&fixed[102..107]) {
            let (text, behind) = rest.split_at_checked(usize::from(*bytes))?;
            *name = std::str::from_utf8(text).ok()?;
            rest = behind;
        }
        let [key, team, model, provider, upstream_model] = names;
        Some(RecordView {
            time_unix_ms: u64_at(24),
            id: RequestId(*fixed[WORD_BYTES..].first_chunk()?),
            key,
            team,
            model,
            provider,
            upstream_model,
            api: Api::from_u8(fixed[100])?,
            outcome: Outcome::from_u8(fixed[101])?,
            flags: Flags(u16_at(98)),
            status: u16_at(96),
            usage: Usage {
                prompt: u64_at(32),
                cached: u64_at(40),
                completion: u64_at(48),
                reasoning: u64_at(56),
                ..Usage::default()
            },
            ttft_us: u64_at(64),
            duration_us: u64_at(72),
            bytes_in: u64_at(80),
            bytes_out: u64_at(88),
        })
    }

    /// The record with names of its own.
    pub fn to_record(&self) -> Record {
        Record {
            time_unix_ms: self.time_unix_ms,
            id: self.id,
            key: self.key.into(),
            team: self.team.into(),
            model: self.model.into(),
            provider: self.provider.into(),
            upstream_model: self.upstream_model.into(),
            api: self.api,
            outcome: self.outcome,
            flags: self.flags,
            status: self.status,
            usage: self.usage,
            ttft_us: self.ttft_us,
            duration_us: self.duration_us,
            bytes_in: self.bytes_in,
            bytes_out: self.bytes_out,
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Any record whose names are within their bound.
    pub fn any_record() -> impl Strategy<Value = Record> {
        let name = || {
            "[a-z\u{e4}\u{4e2d}/.:-]{0,128}".prop_map(|name| {
                let end = name.floor_char_boundary(NAME_BYTES_MAX);
                Arc::from(&name[..end])
            })
        };
        let names = (name(), name(), name(), name(), name());
        let facts = (1..=4_u8, 0..=4_u8, any::<u16>(), any::<u16>(), any::<[u8; 16]>());
        (names, facts, any::<[u64; 9]>()).prop_map(|(names, facts, numbers)| Record {
            time_unix_ms: numbers[0],
            id: RequestId(facts.4),
            key: names.0,
            team: names.1,
            model: names.2,
            provider: names.3,
            upstream_model: names.4,
            api: Api::from_u8(facts.0).unwrap(),
            outcome: Outcome::from_u8(facts.1).unwrap(),
            flags: Flags(facts.2),
            status: facts.3,
            usage: Usage {
                prompt: numbers[1],
                cached: numbers[2],
                completion: numbers[3],
                reasoning: numbers[4],
                ..Usage::default()
            },
            ttft_us: numbers[5],
            duration_us: numbers[6],
            bytes_in: numbers[7],
            bytes_out: numbers[8],
        })
    }

    /// A small record that `number` tells from others.
    pub fn numbered(number: u64) -> Record {
        let mut random = [0; 10];
        random[2..].copy_from_slice(&number.to_be_bytes());
        Record {
            time_unix_ms: 1_760_000_000_000,
            id: RequestId::new(1_760_000_000_000, random),
            key: "alice".into(),
            team: "".into(),
            model: "fast".into(),
            provider: "fleet".into(),
            upstream_model: "llama-3.3-70b".into(),
            api: Api::ChatCompletions,
            outcome: Outcome::Complete,
            flags: Flags::STREAM,
            status: 200,
            usage: Usage {
                prompt: number,
                cached: 0,
                completion: 1,
                reasoning: 0,
                ..Usage::default()
            },
            ttft_us: 1,
            duration_us: 2,
            bytes_in: 3,
            bytes_out: 4,
        }
    }

    proptest! {
        #[test]
        fn a_record_reads_back_as_it_was_written(record in any_record()) {
            // What stood in the buffer before does not matter.
            let mut frame = [0xa5; RECORD_BYTES_MAX];
            let bytes = record.encode(&mut frame);
            let view = RecordView::decode(&frame[..bytes]).unwrap();
            prop_assert_eq!(view, record.view());
            prop_assert_eq!(view.to_record(), record);
        }

        #[test]
        fn foreign_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..RECORD_BYTES_MAX)) {
            let _ = RecordView::decode(&bytes);
        }

        #[test]
        fn ids_read_back(bytes in any::<[u8; 16]>()) {
            let id = RequestId(bytes);
            prop_assert_eq!(id.to_string().parse(), Ok(id));
            prop_assert_eq!(id.to_string().to_uppercase().parse(), Ok(id));
        }
    }

    #[test]
    fn names_that_are_too_long_are_cut_between_characters() {
        let mut record = numbered(1);
        record.model = "\u{4e2d}".repeat(100).into();
        let mut frame = [0; RECORD_BYTES_MAX];
        let bytes = record.encode(&mut frame);
        assert_eq!(
            RecordView::decode(&frame[..bytes]).unwrap().model,
            "\u{4e2d}".repeat(42)
        );
    }

    #[test]
    fn ids_are_uuids_of_version_7_and_sort_by_time() {
        let id = RequestId::new(0x0123_4567_89ab, [0xff; 10]);
        assert_eq!(id.to_string(), "0123456789ab7fffbfffffffffffffff");
        assert!(id < RequestId::new(0x0123_4567_89ac, [0; 10]));
        for wrong in [
            "",
            "0123",
            "0123456789ab7fffbfffffffffffffffff",
            "+123456789ab7fffbfffffffffffffff",
            "é",
        ] {
            assert_eq!(wrong.parse::<RequestId>(), Err(NotARequestId), "{wrong}");
        }
    }
}
