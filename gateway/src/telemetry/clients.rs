//! What each client does, as far as a bounded table can tell: for `gateway top`.
//!
//! One table a core, written by that core alone. A set that is full gives its place to the newcomer that was seen longest
//! ago; the figures of that client then start again.

use std::{
    collections::HashMap,
    net::{IpAddr, Ipv6Addr},
    sync::atomic::{AtomicU64, Ordering::Acquire, Ordering::Relaxed, Ordering::Release, fence},
};

use super::counters::Counter;
use crate::bounds::CLIENT_SLOTS;

/// Places of a set.
const WAYS: usize = 8;

const _: () = assert!((CLIENT_SLOTS / WAYS).is_power_of_two());

/// One client's figures on one core.
#[derive(Debug, Default)]
struct Place {
    /// Odd while the place is given to another client.
    version: AtomicU64,
    /// The address as IPv6, v4-mapped for IPv4; both 0 for none.
    high: AtomicU64,
    low: AtomicU64,
    seen_ms: AtomicU64,
    opened: Counter,
    closed: Counter,
    requests: Counter,
    refused: Counter,
    tokens: Counter,
    bytes_in: Counter,
    bytes_out: Counter,
}

/// What a client did since its place was given to it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Figures {
    /// Connections, as the gateway accepted them.
    pub opened: u64,
    pub closed: u64,
    /// Requests accepted.
    pub requests: u64,
    /// Requests refused or turned away.
    pub refused: u64,
    /// Input and output tokens of requests that have ended.
    pub tokens: u64,
    /// Bytes of bodies of requests that have ended.
    pub bytes_in: u64,
    pub bytes_out: u64,
    /// When it was last heard of, by the monotonic clock, milliseconds.
    pub seen_ms: u64,
}

impl Figures {
    /// Adds another core's.
    pub fn add(&mut self, other: &Figures) {
        self.opened += other.opened;
        self.closed += other.closed;
        self.requests += other.requests;
        self.refused += other.refused;
        self.tokens += other.tokens;
        self.bytes_in += other.bytes_in;
        self.bytes_out += other.bytes_out;
        self.seen_ms = self.seen_ms.max(other.seen_ms);
    }
}

/// What happened to a client.
#[derive(Debug, Clone, Copy)]
pub enum Event {
    Opened,
    Closed,
    Accepted,
    Refused,
    /// A request has ended.
    Ended {
        tokens: u64,
        bytes_in: u64,
        bytes_out: u64,
    },
}

/// The clients of one core.
#[derive(Debug)]
pub struct Clients {
    places: Box<[Place]>,
}

impl Default for Clients {
    fn default() -> Self {
        Clients {
            places: (0..CLIENT_SLOTS).map(|_| Place::default()).collect(),
        }
    }
}

impl Clients {
    /// Notes what happened. Only the owning core calls this; one set, a few cache lines, is looked at.
    pub fn note(&self, client: IpAddr, event: Event, now_ms: u64) {
        let (high, low) = halves(client);
        let set = self.set(high, low);
        let is_client = |place: &&Place| place.high.load(Relaxed) == high && place.low.load(Relaxed) == low;
        let place = match (set.iter().find(is_client), event) {
            (Some(place), _) => place,
            // Its connection was opened before its place was given away.
            (None, Event::Closed) => return,
            (None, _) => match give_away(set, high, low) {
                Some(place) => place,
                None => return,
            },
        };
        place.seen_ms.store(now_ms, Relaxed);
        match event {
            Event::Opened => place.opened.inc(),
            Event::Closed => place.closed.inc(),
            Event::Accepted => place.requests.inc(),
            Event::Refused => place.refused.inc(),
            Event::Ended {
                tokens,
                bytes_in,
                bytes_out,
            } => {
                place.tokens.add(tokens);
                place.bytes_in.add(bytes_in);
                place.bytes_out.add(bytes_out);
            }
        }
    }

    fn set(&self, high: u64, low: u64) -> &[Place] {
        // Multiplication by the golden ratio (Knuth, vol. 3, 6.4) spreads what counts up. Whoever aims at one set takes
        // places from others in a table for people.
        let mixed = (high ^ low.rotate_left(32)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let first = (mixed >> 32) as usize % (CLIENT_SLOTS / WAYS) * WAYS;
        &self.places[first..first + WAYS]
    }

    /// Adds every client's figures to `sums`, from any thread.
    pub fn add_to(&self, sums: &mut HashMap<IpAddr, Figures>) {
        for place in &self.places {
            let before = place.version.load(Acquire);
            let (high, low) = (place.high.load(Relaxed), place.low.load(Relaxed));
            let figures = Figures {
                opened: place.opened.get(),
                closed: place.closed.get(),
                requests: place.requests.get(),
                refused: place.refused.get(),
                tokens: place.tokens.get(),
                bytes_in: place.bytes_in.get(),
                bytes_out: place.bytes_out.get(),
                seen_ms: place.seen_ms.load(Relaxed),
            };
            // What was read above was read before the version is looked at again.
            fence(Acquire);
            let whole = before.is_multiple_of(2) && place.version.load(Relaxed) == before;
            if whole && (high, low) != (0, 0) {
                let bits = u128::from(high) << 64 | u128::from(low);
                let client = IpAddr::V6(Ipv6Addr::from_bits(bits)).to_canonical();
                sums.entry(client).or_default().add(&figures);
            }
        }
    }
}

/// Gives the place seen longest ago to another client, first those of clients without a connection.
fn give_away(set: &[Place], high: u64, low: u64) -> Option<&Place> {
    let place = set.iter().min_by_key(|place| {
        let is_open = place.opened.get() > place.closed.get();
        (is_open, place.seen_ms.load(Relaxed))
    })?;
    let version = place.version.load(Relaxed);
    place.version.store(version + 1, Relaxed);
    // Whoever sees any of what follows sees that the version is odd, or has moved on.
    fence(Release);
    place.high.store(high, Relaxed);
    place.low.store(low, Relaxed);
    for counter in [
        &place.opened,
        &place.closed,
        &place.requests,
        &place.refused,
        &place.tokens,
        &place.bytes_in,
        &place.bytes_out,
    ] {
        counter.clear();
    }
    place.version.store(version + 2, Release);
    Some(place)
}

fn halves(client: IpAddr) -> (u64, u64) {
    let bits = match client {
        IpAddr::V4(ip) => ip.to_ipv6_mapped().to_bits(),
        IpAddr::V6(ip) => ip.to_bits(),
    };
    ((bits >> 64) as u64, bits as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn client(n: u32) -> IpAddr {
        IpAddr::from((0x0a00_0000 + n).to_be_bytes())
    }

    fn sums(tables: &[&Clients]) -> HashMap<IpAddr, Figures> {
        let mut sums = HashMap::new();
        tables.iter().for_each(|table| table.add_to(&mut sums));
        sums
    }

    #[test]
    fn figures_of_all_cores_are_one() {
        let (one, two) = (Clients::default(), Clients::default());
        one.note(client(1), Event::Opened, 5);
        one.note(client(1), Event::Accepted, 6);
        two.note(client(1), Event::Refused, 9);
        let ended = Event::Ended {
            tokens: 7,
            bytes_in: 1,
            bytes_out: 2,
        };
        two.note(client(1), ended, 8);
        let sums = sums(&[&one, &two]);
        let wanted = Figures {
            opened: 1,
            closed: 0,
            requests: 1,
            refused: 1,
            tokens: 7,
            bytes_in: 1,
            bytes_out: 2,
            seen_ms: 8,
        };
        assert_eq!(sums[&client(1)], wanted);
        assert_eq!(sums.len(), 1);
    }

    #[test]
    fn a_full_table_keeps_who_is_connected_or_was_seen_last() {
        let table = Clients::default();
        table.note(client(0), Event::Opened, 1);
        for n in 1..20 * CLIENT_SLOTS as u32 {
            table.note(client(n), Event::Refused, u64::from(n));
        }
        let sums = sums(&[&table]);
        assert!(sums.len() <= CLIENT_SLOTS);
        assert_eq!(sums[&client(0)].opened, 1);
        assert!(sums.contains_key(&client(20 * CLIENT_SLOTS as u32 - 1)));
        table.note(client(1), Event::Closed, 1);
        assert!(
            !self::sums(&[&table]).contains_key(&client(1)),
            "an end alone takes no place"
        );
    }
}
