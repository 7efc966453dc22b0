//! One accepted request, as the ledger keeps it.

use std::sync::Arc;

use crate::dialect::{Api, Usage};

/// Identifies a request across log, ledger, answer (`x-request-id`) and upstream: 128 bits, of
/// which the first 48 are the Unix time in milliseconds (as in UUIDv7, RFC 9562), so that ids sort.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RequestId(pub [u8; 16]);

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
