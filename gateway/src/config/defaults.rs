//! The defaults of the configuration and the bounds of its numbers, each with its reason.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use super::{
    schema::{Admin, Driver, Http, Ledger, Log, LogFormat, OnError, Timeouts, Workers},
    units::{Bytes, Span},
};

/// Only processes of the host itself reach the admin address unless the operator wants otherwise.
const ADMIN_ADDRESS: ([u8; 4], u16) = ([127, 0, 0, 1], 9900);

/// Long enough for most answers; a supervisor's own patience (systemd: 90 s) must be longer.
const DRAIN: Span = Span::secs(30);

/// Targets without a weight share alike.
const WEIGHT: u32 = 1;

/// A connection across the world takes under a second, TLS included.
const CONNECT: Span = Span::secs(2);
/// A loaded server may take this long to read a long prompt.
const FIRST_TOKEN: Span = Span::secs(60);
/// Servers that think send pings or events at least every 15 s.
const IDLE: Span = Span::secs(30);
/// Longer than the longest answers of present models.
const TOTAL: Span = Span::secs(600);

/// Images and files in base64; the largest that providers take is 32 MB.
const BODY_MAX: Bytes = Bytes(32 << 20);
/// 32 of the largest bodies at a time.
const BODIES_MAX: Bytes = Bytes(1 << 30);
/// At about 10 KiB a connection, 160 MiB a core.
const CONNECTIONS_MAX: usize = 16_384;
/// A head is one or two packets; who takes longer is a slowloris.
const HEAD_TIMEOUT: Span = Span::secs(10);
const BODY_TIMEOUT: Span = Span::secs(30);
/// Longer than the 60 s of common load balancers, so that they close first.
const IDLE_TIMEOUT: Span = Span::secs(75);
const WRITE_TIMEOUT: Span = Span::secs(60);

/// The state directory of the systemd unit.
const LEDGER_PATH: &str = "/var/lib/gateway";
/// 20 syncs a second are little for an SSD, and 50 ms of records little to lose.
const LEDGER_SYNC: Span = Span(Duration::from_millis(50));
/// About four million records.
const LEDGER_KEEP: Bytes = Bytes(1 << 30);
/// A year and a month: this month can be compared with the same one a year ago.
const LEDGER_RETENTION: Span = Span::secs(400 * 86_400);

/// More threads than any host that this was tried on has CPUs; each has its own ring and pools.
pub const THREADS_MAX: usize = 256;
/// Listeners: each core has a socket for each.
pub const LISTENERS_MAX: usize = 64;
/// Endpoints of one provider: each core has a pool to each.
pub const ENDPOINTS_MAX: usize = 1024;
/// Targets of one model: a choice looks at all of them.
pub const TARGETS_MAX: usize = 64;
/// Trusted proxies of one listener: the largest content delivery networks publish some hundred networks.
pub const TRUSTED_PROXIES_MAX: usize = 1024;
/// Sums of weights stay far from overflow.
pub const WEIGHT_MAX: u32 = 1_000_000;
/// More than any model can write, and small enough that reservations do not overflow.
pub const OUTPUT_TOKENS_MAX: u32 = 10_000_000;
/// Requests or tokens of a limit: far from what overflows, beyond what a month can use.
pub const LIMIT_MAX: u64 = 1_000_000_000_000_000;
/// Connections of one core: the descriptors of a process are bounded (fs.nr_open, 2^20).
pub const CONNECTIONS_LIMIT: usize = 1_000_000;

pub(super) fn drain() -> Span {
    DRAIN
}

pub(super) fn yes() -> bool {
    true
}

pub(super) fn weight() -> u32 {
    WEIGHT
}

impl Default for Admin {
    fn default() -> Self {
        Admin {
            address: SocketAddr::from(ADMIN_ADDRESS),
            token: None,
            tokens: Vec::new(),
        }
    }
}

impl Default for Timeouts {
    fn default() -> Self {
        Timeouts {
            connect: CONNECT,
            first_token: FIRST_TOKEN,
            idle: IDLE,
            total: TOTAL,
        }
    }
}

impl Default for Workers {
    fn default() -> Self {
        Workers {
            threads: None,
            driver: Driver::Auto,
            pin: true,
        }
    }
}

impl Default for Http {
    fn default() -> Self {
        Http {
            body_max: BODY_MAX,
            bodies_max: BODIES_MAX,
            connections_max: CONNECTIONS_MAX,
            head_timeout: HEAD_TIMEOUT,
            body_timeout: BODY_TIMEOUT,
            idle_timeout: IDLE_TIMEOUT,
            write_timeout: WRITE_TIMEOUT,
        }
    }
}

impl Default for Ledger {
    fn default() -> Self {
        Ledger {
            path: PathBuf::from(LEDGER_PATH),
            sync: LEDGER_SYNC,
            keep: LEDGER_KEEP,
            retention: LEDGER_RETENTION,
            on_error: OnError::Refuse,
            export: None,
        }
    }
}

impl Default for Log {
    fn default() -> Self {
        Log {
            level: "info".into(),
            format: LogFormat::Text,
            access: "stdout".into(),
        }
    }
}
