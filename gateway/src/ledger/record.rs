//! One accepted request, as the ledger keeps it.
//!
//! On disk, version 2 (little-endian; the first 8 bytes are the frame's word, see [`super::segment`]):
//!
//! | at  | bytes | field                                                                         |
//! |-----|-------|-------------------------------------------------------------------------------|
//! | 8   | 16    | request id                                                                    |
//! | 24  | 8     | time, Unix milliseconds                                                       |
//! | 32  | 48    | tokens: prompt, cached, cache writes 5m and 1h, completion, reasoning         |
//! | 80  | 8     | cost, nano-dollars; all bits set: unknown                                     |
//! | 88  | 16    | time to first token, duration, microseconds                                   |
//! | 104 | 16    | bytes in, bytes out                                                           |
//! | 120 | 6     | flags (4), status (2)                                                         |
//! | 126 | 6     | api, outcome, tier, finish reason, attempts, fallback                         |
//! | 132 | 9     | lengths of the names: key, team, user, organization, model, provider, upstream model, endpoint, tags |
//! | 141 | 3     | zero                                                                          |
//! | 144 |       | the names, one after the other                                                |
//!
//! Version 1, which is still read, is in [`v1`].

mod v1;

use std::{fmt, str::FromStr, sync::Arc};

use crate::{
    bounds::{NAME_BYTES_MAX, RECORD_BYTES_MAX, TAGS_BYTES_MAX},
    dialect::{Api, Finish, Tier, Usage},
    net::mapped::WORD_BYTES,
};

/// Version of the frames that are written.
pub(super) const VERSION: u8 = 2;

/// Where the names start in a frame, bytes.
pub(super) const NAMES_AT: usize = 144;
/// Names of a record; the last are the tags.
const NAMES: usize = 9;

/// An unknown cost on disk.
const COST_UNKNOWN: u64 = u64::MAX;

const _: () = assert!(NAMES_AT + (NAMES - 1) * NAME_BYTES_MAX + TAGS_BYTES_MAX <= RECORD_BYTES_MAX);
const _: () = assert!(TAGS_BYTES_MAX <= u8::MAX as usize);
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
pub struct Flags(pub u32);

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
    /// End user, as the client names them; empty for none.
    pub user: Arc<str>,
    /// Organization of the key; empty for none.
    pub organization: Arc<str>,
    /// Virtual model that the client asked for.
    pub model: Arc<str>,
    /// Provider that answered; empty when none was reached.
    pub provider: Arc<str>,
    /// The upstream's own name of the model; empty when none was reached.
    pub upstream_model: Arc<str>,
    /// Base URL of the endpoint that answered; empty when none was reached.
    pub endpoint: Arc<str>,
    /// The client's tags, `a=b,c=d`; empty for none. At most [`TAGS_BYTES_MAX`] bytes.
    pub tags: Arc<str>,
    pub api: Api,
    pub outcome: Outcome,
    pub finish: Finish,
    pub flags: Flags,
    /// Status that the client was sent; 0 when it was sent none.
    pub status: u16,
    /// Requests made to upstreams.
    pub attempts: u8,
    /// Place of the target that answered among those of the model in the order tried; 0 is the first.
    pub fallback: u8,
    pub usage: Usage,
    /// What it cost, nano-dollars; `None` where nobody knows the price.
    pub cost: Option<u64>,
    /// From complete head to the first byte of the answer's body, microseconds; 0 for none.
    pub ttft_us: u64,
    /// From complete head to the end, microseconds.
    pub duration_us: u64,
    /// Bytes of the request's and of the answer's body.
    pub bytes_in: u64,
    pub bytes_out: u64,
}

impl Default for Record {
    /// A record of nothing, to be filled in.
    fn default() -> Record {
        let empty: Arc<str> = Arc::from("");
        Record {
            time_unix_ms: 0,
            id: RequestId([0; 16]),
            key: empty.clone(),
            team: empty.clone(),
            user: empty.clone(),
            organization: empty.clone(),
            model: empty.clone(),
            provider: empty.clone(),
            upstream_model: empty.clone(),
            endpoint: empty.clone(),
            tags: empty,
            api: Api::ChatCompletions,
            outcome: Outcome::Complete,
            finish: Finish::Unknown,
            flags: Flags::default(),
            status: 0,
            attempts: 0,
            fallback: 0,
            usage: Usage::default(),
            cost: None,
            ttft_us: 0,
            duration_us: 0,
            bytes_in: 0,
            bytes_out: 0,
        }
    }
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
            self.usage.cache_write_5m,
            self.usage.cache_write_1h,
            self.usage.completion,
            self.usage.reasoning,
            self.cost.map_or(COST_UNKNOWN, |cost| cost.min(COST_UNKNOWN - 1)),
            self.ttft_us,
            self.duration_us,
            self.bytes_in,
            self.bytes_out,
        ];
        frame[WORD_BYTES..24].copy_from_slice(&self.id.0);
        for (field, word) in frame[24..120].chunks_exact_mut(8).zip(words) {
            field.copy_from_slice(&word.to_le_bytes());
        }
        let mut flags = self.flags;
        if self.usage.clamped {
            flags.set(Flags::CLAMPED);
        }
        frame[120..124].copy_from_slice(&flags.0.to_le_bytes());
        frame[124..126].copy_from_slice(&self.status.to_le_bytes());
        let small = [
            self.api as u8,
            self.outcome as u8,
            self.usage.tier as u8,
            self.finish as u8,
            self.attempts,
            self.fallback,
        ];
        frame[126..132].copy_from_slice(&small);
        frame[141..NAMES_AT].fill(0);
        let names: [&str; NAMES] = [
            &self.key,
            &self.team,
            &self.user,
            &self.organization,
            &self.model,
            &self.provider,
            &self.upstream_model,
            &self.endpoint,
            &self.tags,
        ];
        let mut at = NAMES_AT;
        for (index, name) in names.into_iter().enumerate() {
            let most = if index + 1 == NAMES {
                TAGS_BYTES_MAX
            } else {
                NAME_BYTES_MAX
            };
            let bytes = name.floor_char_boundary(most);
            frame[132 + index] = bytes as u8;
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
            user: &self.user,
            organization: &self.organization,
            model: &self.model,
            provider: &self.provider,
            upstream_model: &self.upstream_model,
            endpoint: &self.endpoint,
            tags: &self.tags,
            api: self.api,
            outcome: self.outcome,
            finish: self.finish,
            flags: self.flags,
            status: self.status,
            attempts: self.attempts,
            fallback: self.fallback,
            usage: self.usage,
            cost: self.cost,
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
    pub user: &'a str,
    pub organization: &'a str,
    pub model: &'a str,
    pub provider: &'a str,
    pub upstream_model: &'a str,
    pub endpoint: &'a str,
    pub tags: &'a str,
    pub api: Api,
    pub outcome: Outcome,
    pub finish: Finish,
    pub flags: Flags,
    pub status: u16,
    pub attempts: u8,
    pub fallback: u8,
    pub usage: Usage,
    pub cost: Option<u64>,
    pub ttft_us: u64,
    pub duration_us: u64,
    pub bytes_in: u64,
    pub bytes_out: u64,
}

impl<'a> RecordView<'a> {
    /// Reads a frame of a version, its word included. `None` for what no gateway writes.
    pub(super) fn decode(frame: &'a [u8], version: u8) -> Option<RecordView<'a>> {
        match version {
            VERSION => RecordView::decode_v2(frame),
            v1::VERSION => v1::decode(frame),
            _ => None,
        }
    }

    fn decode_v2(frame: &'a [u8]) -> Option<RecordView<'a>> {
        let fixed: &[u8; NAMES_AT] = frame.first_chunk()?;
        let [
            key,
            team,
            user,
            organization,
            model,
            provider,
            upstream_model,
            endpoint,
            tags,
        ] = names(&frame[NAMES_AT..], &fixed[132..141])?;
        let flags = Flags(u32::from_le_bytes(*fixed[120..].first_chunk()?));
        Some(RecordView {
            time_unix_ms: word(fixed, 24),
            id: RequestId(*fixed[WORD_BYTES..].first_chunk()?),
            key,
            team,
            user,
            organization,
            model,
            provider,
            upstream_model,
            endpoint,
            tags,
            api: Api::from_u8(fixed[126])?,
            outcome: Outcome::from_u8(fixed[127])?,
            finish: Finish::from_u8(fixed[129])?,
            flags,
            status: u16::from_le_bytes([fixed[124], fixed[125]]),
            attempts: fixed[130],
            fallback: fixed[131],
            usage: Usage {
                prompt: word(fixed, 32),
                cached: word(fixed, 40),
                cache_write_5m: word(fixed, 48),
                cache_write_1h: word(fixed, 56),
                completion: word(fixed, 64),
                reasoning: word(fixed, 72),
                tier: Tier::from_u8(fixed[128])?,
                clamped: flags.has(Flags::CLAMPED),
            },
            cost: Some(word(fixed, 80)).filter(|cost| *cost != COST_UNKNOWN),
            ttft_us: word(fixed, 88),
            duration_us: word(fixed, 96),
            bytes_in: word(fixed, 104),
            bytes_out: word(fixed, 112),
        })
    }

    /// The record with names of its own.
    pub fn to_record(&self) -> Record {
        Record {
            time_unix_ms: self.time_unix_ms,
            id: self.id,
            key: self.key.into(),
            team: self.team.into(),
            user: self.user.into(),
            organization: self.organization.into(),
            model: self.model.into(),
            provider: self.provider.into(),
            upstream_model: self.upstream_model.into(),
            endpoint: self.endpoint.into(),
            tags: self.tags.into(),
            api: self.api,
            outcome: self.outcome,
            finish: self.finish,
            flags: self.flags,
            status: self.status,
            attempts: self.attempts,
            fallback: self.fallback,
            usage: self.usage,
            cost: self.cost,
            ttft_us: self.ttft_us,
            duration_us: self.duration_us,
            bytes_in: self.bytes_in,
            bytes_out: self.bytes_out,
        }
    }
}

/// The little-endian number at a place; 0 where there is none.
fn word(bytes: &[u8], at: usize) -> u64 {
    bytes
        .get(at..)
        .and_then(<[u8]>::first_chunk)
        .map_or(0, |field| u64::from_le_bytes(*field))
}

/// Names that stand one after the other, with these lengths.
fn names<'a, const N: usize>(bytes: &'a [u8], lengths: &[u8]) -> Option<[&'a str; N]> {
    let mut names = [""; N];
    let mut rest = bytes;
    for (name, bytes) in names.iter_mut().zip(lengths) {
        let (text, behind) = rest.split_at_checked(usize::from(*bytes))?;
        *name = std::str::from_utf8(text).ok()?;
        rest = behind;
    }
    Some(names)
}

#[cfg(test)]
pub(super) mod tests;
