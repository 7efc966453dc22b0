//! Counters of one data-plane core: written by that core alone, read by anyone.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// A count that only ever grows, with exactly one writing thread.
///
/// A lone writer needs no read-modify-write: a load and a store, both relaxed, cost what a plain
/// integer costs, without the `lock` prefix of `fetch_add`. Two writers would lose counts, which is
/// why a [`Counters`] belongs to one core.
#[derive(Debug, Default)]
#[repr(transparent)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds `n`. Only the owning core calls this.
    #[inline]
    pub fn add(&self, n: u64) {
        self.0.store(self.0.load(Relaxed).wrapping_add(n), Relaxed);
    }

    /// Adds one. Only the owning core calls this.
    #[inline]
    pub fn inc(&self) {
        self.add(1);
    }

    /// Starts again at 0. Only the owning core calls this.
    pub(super) fn clear(&self) {
        self.0.store(0, Relaxed);
    }

    /// The count so far; from any thread.
    #[inline]
    pub fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

/// Why a request was refused before it was sent to an upstream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Refusal {
    /// No key, or one that is not known: 401.
    Unauthenticated = 0,
    /// The key may not do this: 403.
    Forbidden = 1,
    /// Not a request that can be understood: 400 and its kin.
    BadRequest = 2,
    /// A limit is used up: 429.
    RateLimited = 3,
    /// Head or body over its bound: 413, 431.
    TooLarge = 4,
    /// The gateway itself has no room: 503.
    Overloaded = 5,
    /// No such path or model: 404, 405.
    NotFound = 6,
}

impl Refusal {
    /// All reasons, in the order of their numbers.
    pub const ALL: [Refusal; 7] = [
        Refusal::Unauthenticated,
        Refusal::Forbidden,
        Refusal::BadRequest,
        Refusal::RateLimited,
        Refusal::TooLarge,
        Refusal::Overloaded,
        Refusal::NotFound,
    ];

    /// The name used in metrics and in `gateway status`.
    pub fn name(self) -> &'static str {
        match self {
            Refusal::Unauthenticated => "unauthenticated",
            Refusal::Forbidden => "forbidden",
            Refusal::BadRequest => "bad_request",
            Refusal::RateLimited => "rate_limited",
            Refusal::TooLarge => "too_large",
            Refusal::Overloaded => "overloaded",
            Refusal::NotFound => "not_found",
        }
    }
}

/// Labels of the answers' statuses: the codes that are told apart, then one for the rest of each
/// class. The set is fixed, so an upstream that invents codes cannot grow it.
pub const STATUS_LABELS: [&str; STATUS_SLOTS] = [
    "200", "400", "401", "403", "404", "405", "408", "411", "413", "415", "417", "422", "429", "431", "500",
    "501", "502", "503", "504", "505", "529", "1xx", "2xx", "3xx", "4xx", "5xx", "other",
];

/// Entries of [`STATUS_LABELS`].
pub const STATUS_SLOTS: usize = 27;

/// Codes with a slot of their own, in the order of [`STATUS_LABELS`].
const OWN_CODES: [u16; 21] = [
    200, 400, 401, 403, 404, 405, 408, 411, 413, 415, 417, 422, 429, 431, 500, 501, 502, 503, 504, 505, 529,
];

/// Slot of each status from 0 to 599; built by the compiler.
const STATUS_SLOT: [u8; 600] = {
    let mut slots = [(STATUS_SLOTS - 1) as u8; 600];
    let mut code = 100;
    while code < 600 {
        slots[code] = (OWN_CODES.len() + code / 100 - 1) as u8;
        code += 1;
    }
    let mut own = 0;
    while own < OWN_CODES.len() {
        slots[OWN_CODES[own] as usize] = own as u8;
        own += 1;
    }
    slots
};

/// The slot of a status in [`Counters::responses`].
#[inline]
pub fn status_slot(status: u16) -> usize {
    STATUS_SLOT
        .get(usize::from(status))
        .map_or(STATUS_SLOTS - 1, |slot| usize::from(*slot))
}

/// Declares [`Counters`] and [`Totals`] from one list, so that no counter is left out of the sum.
macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// What one core counts. Two cache lines of alignment keep the neighbour line, which x86
        /// prefetches along, from being shared with another core's counters.
        #[derive(Debug, Default)]
        #[repr(align(128))]
        pub struct Counters {
            $($(#[$doc])* pub $name: Counter,)*
            /// Answers sent, by [`status_slot`].
            pub responses: [Counter; STATUS_SLOTS],
            /// Requests refused before dispatch, by [`Refusal`].
            pub refused: [Counter; Refusal::ALL.len()],
        }

        /// The sum of several cores' [`Counters`] at about one moment.
        #[derive(Debug, Clone, Default, PartialEq, Eq)]
        pub struct Totals {
            $($(#[$doc])* pub $name: u64,)*
            /// Answers sent, by [`status_slot`].
            pub responses: [u64; STATUS_SLOTS],
            /// Requests refused before dispatch, by [`Refusal`].
            pub refused: [u64; Refusal::ALL.len()],
        }

        impl Totals {
            /// Adds what one core counted.
            pub fn add(&mut self, counters: &Counters) {
                $(self.$name = self.$name.wrapping_add(counters.$name.get());)*
                for (sum, counter) in self.responses.iter_mut().zip(&counters.responses) {
                    *sum = sum.wrapping_add(counter.get());
                }
                for (sum, counter) in self.refused.iter_mut().zip(&counters.refused) {
                    *sum = sum.wrapping_add(counter.get());
                }
            }
        }
    };
}

counters! {
    /// Connections of clients accepted.
    connections_opened,
    /// Connections of clients ended, for whatever reason.
    connections_closed,
    /// Connections closed at once because the core was at its limit.
    connections_refused,
    /// Connections reset at once because their client is turned away.
    connections_turned_away,
    /// Requests answered early, and streams ended, because their client is turned away.
    clients_turned_away,
    /// Requests and connections that would have been turned away, had the mode not been `observe`.
    clients_would_turn_away,
    /// Connections closed because their PROXY header was missing, malformed or from no trusted proxy.
    proxy_headers_refused,
    /// TLS handshakes with clients completed.
    tls_handshakes,
    /// TLS handshakes with clients failed.
    tls_failures,
    /// Requests accepted: known key, permitted, within limits. Each has one ledger record.
    requests,
    /// Streamed answers begun.
    streams_opened,
    /// Streamed answers ended, for whatever reason.
    streams_closed,
    /// Server-sent events passed to clients.
    events_relayed,
    /// Bytes received from clients, heads included, TLS framing not.
    bytes_from_clients,
    /// Bytes sent to clients, heads included, TLS framing not.
    bytes_to_clients,
    /// Connections to upstreams opened.
    upstream_connects,
    /// Requests sent over a pooled connection.
    upstream_reuses,
    /// Connections to upstreams that could not be opened.
    upstream_connect_failures,
    /// Requests sent again, to the same or to another endpoint.
    upstream_retries,
    /// Answers of upstreams that were errors, cut off or not understood.
    upstream_errors,
    /// Clients that went away before the end of their answer.
    client_disconnects,
    /// Streams that ended with an error after they began.
    stream_errors,
    /// Input tokens, cached ones included.
    tokens_prompt,
    /// Output tokens.
    tokens_completion,
    /// Input tokens that the provider read from its cache.
    tokens_cached,
    /// Requests whose tokens are the gateway's estimate.
    usage_estimated,
    /// Streams that were ended because a limit had nothing left.
    limit_cuts,
    /// Entries of the access log dropped because its queue was full.
    access_log_dropped,
    /// Requests turned away because the ledger's queue was full.
    ledger_full,
    /// Requests served that are not in the books (`ledger.on_error: serve`).
    ledger_unrecorded,
    /// Requests whose cost nobody knows.
    unpriced,
    /// Requests whose provider told figures that contradict themselves.
    usage_clamped,
    /// What settled requests cost, nano-dollars.
    cost_nano_usd,
    /// Answers read on after their client had hung up.
    answers_drained,
}

impl Counters {
    /// Counts an answer of this status.
    #[inline]
    pub fn response(&self, status: u16) {
        self.responses[status_slot(status)].inc();
    }

    /// Counts a refusal.
    #[inline]
    pub fn refuse(&self, reason: Refusal) {
        self.refused[reason as usize].inc();
    }

    /// Client connections open now.
    pub fn connections_open(&self) -> u64 {
        open(self.connections_opened.get(), self.connections_closed.get())
    }

    /// Streams running now.
    pub fn streams_open(&self) -> u64 {
        open(self.streams_opened.get(), self.streams_closed.get())
    }
}

impl Totals {
    /// Client connections open now.
    pub fn connections_open(&self) -> u64 {
        open(self.connections_opened, self.connections_closed)
    }

    /// Streams running now.
    pub fn streams_open(&self) -> u64 {
        open(self.streams_opened, self.streams_closed)
    }

    /// Refusals of all reasons.
    pub fn refused_total(&self) -> u64 {
        self.refused.iter().sum()
    }
}

/// Opened less closed. The two are read one after the other while the core goes on, so a close may
/// be seen whose opening was not: that is zero, not 2^64.
fn open(opened: u64, closed: u64) -> u64 {
    opened.saturating_sub(closed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_is_counted_under_its_code_or_class() {
        let cases = [
            (200, "200"),
            (204, "2xx"),
            (100, "1xx"),
            (302, "3xx"),
            (418, "4xx"),
            (429, "429"),
            (529, "529"),
            (599, "5xx"),
            (0, "other"),
            (99, "other"),
            (600, "other"),
            (u16::MAX, "other"),
        ];
        for (status, label) in cases {
            assert_eq!(STATUS_LABELS[status_slot(status)], label, "{status}");
        }
        for code in OWN_CODES {
            assert_eq!(STATUS_LABELS[status_slot(code)], code.to_string());
        }
    }

    #[test]
    fn totals_sum_all_cores() {
        let cores = [Counters::default(), Counters::default()];
        for core in &cores {
            core.requests.add(3);
            core.response(200);
            core.refuse(Refusal::RateLimited);
            core.connections_opened.add(5);
            core.connections_closed.add(1);
        }
        let mut totals = Totals::default();
        cores.iter().for_each(|core| totals.add(core));
        assert_eq!(totals.requests, 6);
        assert_eq!(totals.responses[status_slot(200)], 2);
        assert_eq!(totals.refused[Refusal::RateLimited as usize], 2);
        assert_eq!(totals.refused_total(), 2);
        assert_eq!(totals.connections_open(), 8);
    }

    #[test]
    fn a_gauge_never_goes_below_zero() {
        let counters = Counters::default();
        counters.streams_closed.inc();
        assert_eq!(counters.streams_open(), 0);
    }

    #[test]
    fn refusal_numbers_are_their_places() {
        for (place, reason) in Refusal::ALL.into_iter().enumerate() {
            assert_eq!(reason as usize, place);
        }
    }
}
