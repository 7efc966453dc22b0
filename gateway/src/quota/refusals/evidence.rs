//! What is held against clients: refusals since the last request that was accepted.
//!
//! A fixed table of atomics, indexed by a keyed hash of the client. A collision forgets the older one, which delays a
//! drop and never drops a client that behaves: a slot counts for one client only.

use std::{
    hash::{BuildHasher, RandomState},
    net::IpAddr,
    sync::{
        OnceLock,
        atomic::{AtomicU64, Ordering},
    },
    task::Waker,
};

use crossbeam::queue::ArrayQueue;

use super::{Origin, Prefixes, Rule, Via};
use crate::bounds::REFUSAL_SLOTS;

/// Clients that may wait for the control thread. Of more at once, offenders are found again at their next refusal, and who
/// is to be forgiven is forgiven by time.
const WAITING_MAX: usize = 4096;

/// Refusals of all clients, shared by all cores.
pub struct Refusals {
    slots: Box<[AtomicU64]>,
    hasher: RandomState,
    offenders: ArrayQueue<Origin>,
    redeemed: ArrayQueue<Origin>,
    /// Woken for each offender.
    listener: OnceLock<Waker>,
}

/// A slot: 24 bits of the client's hash, whether it was an offender, 15 bits count, 24 bits start of the window in
/// units of 2^26 ns (67 ms).
struct Slot {
    tag: u64,
    offended: bool,
    count: u64,
    start: u64,
}

const START_SHIFT: u32 = 26;
const START_MASK: u64 = (1 << 24) - 1;
const COUNT_MASK: u64 = (1 << 15) - 1;
const OFFENDED: u64 = 1 << 39;

impl Slot {
    fn unpack(word: u64) -> Slot {
        Slot {
            tag: word >> 40,
            offended: word & OFFENDED != 0,
            count: (word >> 24) & COUNT_MASK,
            start: word & START_MASK,
        }
    }

    fn pack(&self) -> u64 {
        let offended = if self.offended { OFFENDED } else { 0 };
        self.tag << 40 | offended | self.count << 24 | self.start
    }
}

impl Default for Refusals {
    fn default() -> Self {
        Refusals {
            slots: (0..REFUSAL_SLOTS).map(|_| AtomicU64::new(0)).collect(),
            hasher: RandomState::new(),
            offenders: ArrayQueue::new(WAITING_MAX),
            redeemed: ArrayQueue::new(WAITING_MAX),
            listener: OnceLock::new(),
        }
    }
}

impl Refusals {
    fn slot(&self, client: Origin, prefixes: Prefixes) -> (&AtomicU64, u64) {
        // One write, since a hash costs by the number of them.
        let mut bytes = [0; 19];
        let net = prefixes.net(client.ip);
        let (family, bits) = match net.network() {
            IpAddr::V4(ip) => (4, ip.to_ipv6_mapped().to_bits()),
            IpAddr::V6(ip) => (6, ip.to_bits()),
        };
        bytes[..16].copy_from_slice(&bits.to_le_bytes());
        bytes[16] = family;
        bytes[17] = net.prefix_len();
        bytes[18] = client.via as u8;
        let hash = self.hasher.hash_one(&bytes[..]);
        // The tag is never 0, which is an empty slot's.
        (&self.slots[hash as usize % REFUSAL_SLOTS], (hash >> 40) | 1)
    }

    /// Notes a refusal; true when it makes the client an offender.
    pub fn refused(&self, client: Origin, rule: &Rule, now_ns: u64) -> bool {
        if rule.after == 0 || client.via == Via::Proxy {
            return false;
        }
        let (slot, tag) = self.slot(client, rule.prefixes);
        let now = (now_ns >> START_SHIFT) & START_MASK;
        let within = (rule.within.as_nanos() as u64 >> START_SHIFT).max(1);
        let mut word = slot.load(Ordering::Relaxed);
        loop {
            let mut next = Slot::unpack(word);
            let age = now.wrapping_sub(next.start) & START_MASK;
            if next.tag != tag || age > within {
                next = Slot {
                    tag,
                    offended: next.tag == tag && next.offended,
                    count: 0,
                    start: now,
                };
            }
            next.count += 1;
            let offends = next.count >= u64::from(rule.after).min(COUNT_MASK);
            if offends {
                next.count = 0;
                next.offended = true;
            }
            match slot.compare_exchange_weak(word, next.pack(), Ordering::Relaxed, Ordering::Relaxed) {
                Ok(_) if offends => {
                    let _ = self.offenders.push(client);
                    if let Some(listener) = self.listener.get() {
                        listener.wake_by_ref();
                    }
                    return true;
                }
                Ok(_) => return false,
                Err(seen) => word = seen,
            }
        }
    }

    /// Notes that a request was accepted: what was held against the client is forgotten.
    pub fn accepted(&self, client: Origin, prefixes: Prefixes) {
        let (slot, tag) = self.slot(client, prefixes);
        let word = slot.load(Ordering::Relaxed);
        // Mostly there is nothing to forget, and then nothing is written.
        if word == 0 || Slot::unpack(word).tag != tag {
            return;
        }
        // Losing the race against a refusal at the same moment leaves one count more or less.
        let forgot = slot.compare_exchange(word, 0, Ordering::Relaxed, Ordering::Relaxed);
        if forgot.is_ok() && Slot::unpack(word).offended {
            let _ = self.redeemed.push(client);
        }
    }

    /// Wakes `listener` from now on whenever a client has become an offender. Only the first call counts.
    pub fn listen(&self, listener: Waker) {
        let _ = self.listener.set(listener);
    }

    /// The next client that became an offender. For the control thread.
    pub fn next_offender(&self) -> Option<Origin> {
        self.offenders.pop()
    }

    /// The next offender of which a request was accepted. For the control thread.
    pub fn next_redeemed(&self) -> Option<Origin> {
        self.redeemed.pop()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const PREFIXES: Prefixes = Prefixes { v4: 32, v6: 64 };
    const RULE: Rule = Rule {
        after: 3,
        within: Duration::from_secs(10),
        prefixes: PREFIXES,
    };
    const SECOND: u64 = 1_000_000_000;

    fn at(text: &str) -> Origin {
        Origin {
            ip: text.parse::<IpAddr>().expect("address"),
            via: Via::Direct,
        }
    }

    fn client(n: u8) -> Origin {
        at(&format!("10.0.0.{n}"))
    }

    #[test]
    fn an_offender_wakes_who_listens() {
        struct Count(AtomicU64);
        impl std::task::Wake for Count {
            fn wake(self: std::sync::Arc<Self>) {
                self.0.fetch_add(1, Ordering::Relaxed);
            }
        }
        let count = std::sync::Arc::new(Count(AtomicU64::new(0)));
        let refusals = Refusals::default();
        refusals.listen(Waker::from(count.clone()));
        for _ in 0..RULE.after - 1 {
            assert!(!refusals.refused(client(1), &RULE, 0));
        }
        assert_eq!(count.0.load(Ordering::Relaxed), 0, "not an offender yet");
        assert!(refusals.refused(client(1), &RULE, 0));
        assert_eq!(count.0.load(Ordering::Relaxed), 1);
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
    fn a_client_is_its_prefix() {
        let refusals = Refusals::default();
        assert!(!refusals.refused(at("2001:db8::1"), &RULE, SECOND));
        let other = at("2001:db8:0:1::1");
        assert!(!refusals.refused(other, &RULE, SECOND), "another /64");
        assert!(!refusals.refused(at("2001:db8::2"), &RULE, SECOND));
        assert!(refusals.refused(at("2001:db8::ffff:3"), &RULE, SECOND));
        refusals.refused(at("2001:db8::4"), &RULE, SECOND);
        refusals.refused(at("2001:db8::5"), &RULE, SECOND);
        refusals.accepted(at("2001:db8::6"), PREFIXES);
        assert!(!refusals.refused(at("2001:db8::7"), &RULE, SECOND));
        let wide = Rule {
            prefixes: Prefixes { v4: 24, v6: 48 },
            ..RULE
        };
        assert!(!refusals.refused(client(1), &wide, SECOND));
        assert!(!refusals.refused(client(2), &wide, SECOND));
        assert!(refusals.refused(client(3), &wide, SECOND));
    }

    #[test]
    fn behind_a_proxy_is_another_client_and_a_proxy_is_none() {
        let refusals = Refusals::default();
        let via = |via| Origin { via, ..client(1) };
        assert!(!refusals.refused(via(Via::Direct), &RULE, SECOND));
        assert!(!refusals.refused(via(Via::Direct), &RULE, SECOND));
        assert!(!refusals.refused(via(Via::Proxied), &RULE, SECOND));
        for _ in 0..10 {
            assert!(!refusals.refused(via(Via::Proxy), &RULE, SECOND));
        }
        assert!(refusals.refused(via(Via::Direct), &RULE, SECOND));
    }

    #[test]
    fn forgets_with_time_and_with_good_behaviour() {
        let refusals = Refusals::default();
        refusals.refused(client(1), &RULE, SECOND);
        refusals.refused(client(1), &RULE, SECOND);
        assert!(!refusals.refused(client(1), &RULE, 20 * SECOND));
        assert!(!refusals.refused(client(1), &RULE, 21 * SECOND));
        refusals.accepted(client(1), PREFIXES);
        assert!(!refusals.refused(client(1), &RULE, 22 * SECOND));
        assert_eq!(refusals.next_offender(), None);
        assert_eq!(refusals.next_redeemed(), None, "it never was an offender");
    }

    #[test]
    fn an_offender_redeems_itself_once() {
        let refusals = Refusals::default();
        for _ in 0..3 {
            refusals.refused(client(1), &RULE, SECOND);
        }
        // A refusal in between, after the window, does not hide that it has offended.
        refusals.refused(client(1), &RULE, 60 * SECOND);
        refusals.accepted(client(1), PREFIXES);
        refusals.accepted(client(1), PREFIXES);
        assert_eq!(refusals.next_redeemed(), Some(client(1)));
        assert_eq!(refusals.next_redeemed(), None);
    }
}
