//! Who is refused again and again: the evidence on which an address is dropped by the kernel.
//!
//! A client is what the kernel drops as one: an IPv4 address, or an IPv6 /64, of which a single host owns every address and
//! would otherwise never be refused twice at the same one.
//!
//! A fixed table of atomics, indexed by a keyed hash of the address. A collision forgets the older address,
//! which delays a drop and never drops a client that behaves: a slot counts for one address only.

use std::{
    hash::{BuildHasher, RandomState},
    net::IpAddr,
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use crossbeam::queue::ArrayQueue;
use gateway_common::ClientKey;

use crate::bounds::REFUSAL_SLOTS;

/// Offenders that may wait for the control thread. More at once are found again at their next refusal.
const OFFENDERS_MAX: usize = 4096;

/// When an address is to be dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rule {
    /// Refusals that make an offender; 0 watches nothing.
    pub after: u32,
    /// Time within which they must fall.
    pub within: Duration,
}

/// Refusals of all clients, shared by all cores.
pub struct Refusals {
    slots: Box<[AtomicU64]>,
    hasher: RandomState,
    offenders: ArrayQueue<IpAddr>,
}

/// A slot: 24 bits of the address' hash, 16 bits count, 24 bits start of the window in units of 2^26 ns (67 ms).
struct Slot {
    tag: u64,
    count: u64,
    start: u64,
}

const START_SHIFT: u32 = 26;
const START_MASK: u64 = (1 << 24) - 1;
const COUNT_MASK: u64 = (1 << 16) - 1;

impl Slot {
    fn unpack(word: u64) -> Slot {
        Slot {
            tag: word >> 40,
            count: (word >> 24) & COUNT_MASK,
            start: word & START_MASK,
        }
    }

    fn pack(&self) -> u64 {
        self.tag << 40 | self.count << 24 | self.start
    }
}

impl Default for Refusals {
    fn default() -> Self {
        Refusals {
            slots: (0..REFUSAL_SLOTS).map(|_| AtomicU64::new(0)).collect(),
            hasher: RandomState::new(),
            offenders: ArrayQueue::new(OFFENDERS_MAX),
        }
    }
}

impl Refusals {
    fn slot(&self, client: IpAddr) -> (&AtomicU64, u64) {
        let hash = self.hasher.hash_one(ClientKey::new(client));
        // The tag is never 0, which is an empty slot's.
        (&self.slots[hash as usize % REFUSAL_SLOTS], (hash >> 40) | 1)
    }

    /// Notes a refusal; true when it makes the client an offender.
    pub fn refused(&self, client: IpAddr, rule: &Rule, now_ns: u64) -> bool {
        if rule.after == 0 {
            return false;
        }
        let (slot, tag) = self.slot(client);
        let now = (now_ns >> START_SHIFT) & START_MASK;
        let within = (rule.within.as_nanos() as u64 >> START_SHIFT).max(1);
        let mut word = slot.load(Ordering::Relaxed);
        loop {
            let mut next = Slot::unpack(word);
            let age = now.wrapping_sub(next.start) & START_MASK;
            if next.tag != tag || age > within {
                next = Slot {
                    tag,
                    count: 0,
                    start: now,
                };
            }
            next.count += 1;
            let offends = next.count >= u64::from(rule.after).min(COUNT_MASK);
            let after = if offends { 0 } else { next.pack() };
            match slot.compare_exchange_weak(word, after, Ordering::Relaxed, Ordering::Relaxed) {
                Ok(_) if offends => {
                    let _ = self.offenders.push(client);
                    return true;
                }
                Ok(_) => return false,
                Err(seen) => word = seen,
            }
        }
    }

    /// Notes that a request was accepted: what was held against the client is forgotten.
    pub fn accepted(&self, client: IpAddr) {
        let (slot, tag) = self.slot(client);
        let word = slot.load(Ordering::Relaxed);
        // Mostly there is nothing to forget, and then nothing is written.
        if word != 0 && Slot::unpack(word).tag == tag {
            // Losing the race against a refusal at the same moment leaves one count more or less.
            let _ = slot.compare_exchange(word, 0, Ordering::Relaxed, Ordering::Relaxed);
        }
    }

    /// The next client that became an offender. For the control thread.
    pub fn next_offender(&self) -> Option<IpAddr> {
        self.offenders.pop()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RULE: Rule = Rule {
        after: 3,
        within: Duration::from_secs(10),
    };
    const SECOND: u64 = 1_000_000_000;

    fn client(n: u8) -> IpAddr {
        IpAddr::from([10, 0, 0, n])
    }

    #[test]
    fn offends_after_n_within_t() {
        let refusals = Refusals::default();
        assert!(!refusals.refused(client(1), &RULE, SECOND));
        assert!(!refusals.refused(client(1), &RULE, 2 * SECOND));
        assert!(!refusals.refused(client(2), &RULE, 2 * SECOND));
        assert!(refusals.refused(client(1), &RULE, 3 * SECOND));
        assert_eq!(refusals.next_offender(), Some(client(1)));
        assert_eq!(refusals.next_offender(), None);
    }

    #[test]
    fn an_ipv6_client_is_its_64() {
        let refusals = Refusals::default();
        let at = |text: &str| text.parse::<IpAddr>().expect("address");
        assert!(!refusals.refused(at("2001:db8::1"), &RULE, SECOND));
        assert!(
            !refusals.refused(at("2001:db8:0:1::1"), &RULE, SECOND),
            "another /64"
        );
        assert!(!refusals.refused(at("2001:db8::2"), &RULE, SECOND));
        assert!(refusals.refused(at("2001:db8::ffff:3"), &RULE, SECOND));
        refusals.refused(at("2001:db8::4"), &RULE, SECOND);
        refusals.refused(at("2001:db8::5"), &RULE, SECOND);
        refusals.accepted(at("2001:db8::6"));
        assert!(!refusals.refused(at("2001:db8::7"), &RULE, SECOND));
    }

    #[test]
    fn forgets_with_time_and_with_good_behaviour() {
        let refusals = Refusals::default();
        refusals.refused(client(1), &RULE, SECOND);
        refusals.refused(client(1), &RULE, SECOND);
        assert!(!refusals.refused(client(1), &RULE, 20 * SECOND));
        assert!(!refusals.refused(client(1), &RULE, 21 * SECOND));
        refusals.accepted(client(1));
        assert!(!refusals.refused(client(1), &RULE, 22 * SECOND));
        assert_eq!(refusals.next_offender(), None);
    }
}
