//! Who is turned away now: written by the control thread, read by every core at every request, without a lock.
//!
//! A fixed table of sets, each of [`WAYS`] places. A full set gives up the client whose time ends first: that one is then
//! left to the kernel, or, behind a proxy, is refused as before until it offends again.

use std::{
    hash::{BuildHasher, RandomState},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use arc_swap::ArcSwap;
use ipnet::IpNet;

use super::{Origin, Prefixes, Via};
use crate::bounds::{BLOCK_NETS_MAX, BLOCK_SLOTS};

/// Places of a set.
const WAYS: usize = 8;

const _: () = assert!(BLOCK_SLOTS.is_multiple_of(WAYS));

/// A place: a client's keyed hash, 0 for none, and until when.
#[derive(Default)]
struct Place {
    tag: AtomicU64,
    until_ns: AtomicU64,
}

/// Blocked clients, shared by all cores. One thread writes.
pub struct Blocks {
    places: Box<[Place]>,
    hasher: RandomState,
    /// Networks blocked by hand, few, with their ends.
    nets: ArcSwap<Vec<(IpNet, u64)>>,
    /// Networks that a block of a wider one leaves out.
    exempt: ArcSwap<Vec<IpNet>>,
    /// When the last of all blocks ends: mostly nobody is blocked, and that is then all that is looked at.
    last_until_ns: AtomicU64,
    /// Rises with each new block.
    generation: AtomicU64,
    observe: AtomicBool,
}

impl Default for Blocks {
    fn default() -> Self {
        Blocks {
            places: (0..BLOCK_SLOTS).map(|_| Place::default()).collect(),
            hasher: RandomState::new(),
            nets: ArcSwap::default(),
            exempt: ArcSwap::default(),
            last_until_ns: AtomicU64::new(0),
            generation: AtomicU64::new(0),
            observe: AtomicBool::new(false),
        }
    }
}

impl Blocks {
    fn set(&self, net: IpNet, via: Via) -> (&[Place], u64) {
        let hash = self.hasher.hash_one((net, via));
        let first = hash as usize % (BLOCK_SLOTS / WAYS) * WAYS;
        // A tag is never 0, which is an empty place's.
        (&self.places[first..first + WAYS], hash | 1 << 63)
    }

    /// Until when a client is turned away, nanoseconds of the monotonic clock.
    pub fn until(&self, client: Origin, prefixes: Prefixes, now_ns: u64) -> Option<u64> {
        if self.last_until_ns.load(Ordering::Relaxed) <= now_ns || client.via == Via::Proxy {
            return None;
        }
        let (set, tag) = self.set(prefixes.net(client.ip), client.via);
        let of_place = |place: &Place| {
            if place.tag.load(Ordering::Acquire) != tag {
                return None;
            }
            let until_ns = place.until_ns.load(Ordering::Acquire);
            // The place may have been given to another client in between.
            (place.tag.load(Ordering::Relaxed) == tag && until_ns > now_ns).then_some(until_ns)
        };
        set.iter()
            .find_map(of_place)
            .or_else(|| self.until_by_net(client, now_ns))
    }

    fn until_by_net(&self, client: Origin, now_ns: u64) -> Option<u64> {
        let nets = self.nets.load();
        let hit = nets
            .iter()
            .find(|(net, until_ns)| *until_ns > now_ns && net.contains(&client.ip));
        let (_, until_ns) = hit?;
        let is_exempt = self
            .exempt
            .load()
            .iter()
            .any(|exempt| exempt.contains(&client.ip));
        (!is_exempt).then_some(*until_ns)
    }

    /// Replaces the networks that are let in though a wider one is blocked, as the kernel does. This host's own two
    /// addresses always are.
    pub fn set_exempt(&self, exempt: Vec<IpNet>) {
        let own = [IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)].map(IpNet::from);
        self.exempt
            .store(Arc::new(own.into_iter().chain(exempt).collect()));
    }

    /// Rises with each new block: what is open then looks whether it is hit.
    pub fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    /// Whether who is blocked is only counted.
    pub fn observes(&self) -> bool {
        self.observe.load(Ordering::Relaxed)
    }

    /// Switches between turning away and counting.
    pub fn set_observe(&self, observe: bool) {
        self.observe.store(observe, Ordering::Relaxed);
    }

    /// Turns a client away from now on. For the control thread.
    pub fn block(&self, net: IpNet, via: Via, until_ns: u64) {
        let (set, tag) = self.set(net, via);
        let same = set.iter().find(|place| place.tag.load(Ordering::Relaxed) == tag);
        let first_to_end = || {
            set.iter()
                .min_by_key(|place| place.until_ns.load(Ordering::Relaxed))
        };
        if let Some(place) = same {
            // Never free in between.
            place.until_ns.store(until_ns, Ordering::Release);
        } else if let Some(place) = first_to_end() {
            // In this order a reader never takes one client's time for another's.
            place.until_ns.store(0, Ordering::Release);
            place.tag.store(tag, Ordering::Release);
            place.until_ns.store(until_ns, Ordering::Release);
        }
        self.announce(until_ns);
    }

    /// Whether [`Blocks::block_net`] takes this network. For the control thread, so it still does a moment later.
    pub fn has_room(&self, net: IpNet, now_ns: u64) -> bool {
        let nets = self.nets.load();
        let others = nets
            .iter()
            .filter(|(other, until_ns)| *other != net && *until_ns > now_ns);
        others.count() < BLOCK_NETS_MAX
    }

    /// Turns away a network, however its clients come; false when there are too many. For the control thread.
    pub fn block_net(&self, net: IpNet, until_ns: u64, now_ns: u64) -> bool {
        let mut nets: Vec<_> = self.nets.load().iter().copied().collect();
        nets.retain(|(other, until_ns)| *other != net && *until_ns > now_ns);
        if nets.len() >= BLOCK_NETS_MAX {
            return false;
        }
        nets.push((net, until_ns));
        self.nets.store(nets.into());
        self.announce(until_ns);
        true
    }

    /// Lets a client or a network in again. For the control thread.
    pub fn unblock(&self, net: IpNet) {
        for via in [Via::Direct, Via::Proxied] {
            let (set, tag) = self.set(net, via);
            for place in set
                .iter()
                .filter(|place| place.tag.load(Ordering::Relaxed) == tag)
            {
                place.until_ns.store(0, Ordering::Release);
            }
        }
        let mut nets: Vec<_> = self.nets.load().iter().copied().collect();
        nets.retain(|(other, _)| *other != net);
        self.nets.store(nets.into());
    }

    fn announce(&self, until_ns: u64) {
        self.last_until_ns.fetch_max(until_ns, Ordering::Relaxed);
        self.generation.fetch_add(1, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PREFIXES: Prefixes = Prefixes { v4: 32, v6: 64 };

    fn at(text: &str, via: Via) -> Origin {
        Origin {
            ip: text.parse::<IpAddr>().expect("address"),
            via,
        }
    }

    fn net(text: &str) -> IpNet {
        text.parse().expect("network")
    }

    #[test]
    fn a_blocked_network_leaves_out_who_is_exempt() {
        let blocks = Blocks::default();
        blocks.set_exempt(vec![net("10.1.0.0/16")]);
        assert!(blocks.block_net(net("10.0.0.0/8"), 100, 1));
        assert!(blocks.block_net(net("127.0.0.0/8"), 100, 1));
        for (client, turned_away) in [
            ("10.0.0.1", true),
            ("10.1.0.1", false),
            ("127.0.0.1", false),
            ("127.0.0.2", true),
        ] {
            let until = blocks.until(at(client, Via::Direct), PREFIXES, 1);
            assert_eq!(until.is_some(), turned_away, "{client}");
        }
    }

    #[test]
    fn blocks_until_its_time_and_only_whom_it_says() {
        let blocks = Blocks::default();
        let client = at("10.0.0.1", Via::Direct);
        assert_eq!(blocks.until(client, PREFIXES, 1), None);
        blocks.block(net("10.0.0.1/32"), Via::Direct, 100);
        assert_eq!(blocks.generation(), 1);
        assert_eq!(blocks.until(client, PREFIXES, 99), Some(100));
        assert_eq!(blocks.until(client, PREFIXES, 100), None);
        assert_eq!(blocks.until(at("10.0.0.2", Via::Direct), PREFIXES, 1), None);
        assert_eq!(blocks.until(at("10.0.0.1", Via::Proxied), PREFIXES, 1), None);
        blocks.block(net("2001:db8::/64"), Via::Proxied, 100);
        assert!(
            blocks
                .until(at("2001:db8::9", Via::Proxied), PREFIXES, 1)
                .is_some()
        );
        blocks.block(net("10.0.0.1/32"), Via::Direct, 50);
        assert_eq!(blocks.until(client, PREFIXES, 60), None, "a shorter one replaces");
        blocks.block(net("10.0.0.1/32"), Via::Direct, 500);
        blocks.unblock(net("10.0.0.1/32"));
        assert_eq!(blocks.until(client, PREFIXES, 1), None);
    }

    #[test]
    fn networks_hit_everybody_in_them_but_proxies() {
        let blocks = Blocks::default();
        assert!(blocks.block_net(net("10.0.0.0/8"), 100, 1));
        assert!(blocks.until(at("10.9.9.9", Via::Proxied), PREFIXES, 1).is_some());
        assert!(blocks.until(at("10.9.9.9", Via::Direct), PREFIXES, 1).is_some());
        assert!(blocks.until(at("10.9.9.9", Via::Proxy), PREFIXES, 1).is_none());
        for n in 1..BLOCK_NETS_MAX as u32 {
            assert!(blocks.block_net(net(&format!("{}/32", std::net::Ipv4Addr::from(n))), 100, 1));
        }
        assert!(!blocks.has_room(net("11.0.0.0/8"), 1) && blocks.has_room(net("10.0.0.0/8"), 1));
        assert!(!blocks.block_net(net("11.0.0.0/8"), 100, 1), "full");
        assert!(
            blocks.has_room(net("11.0.0.0/8"), 100),
            "the others' time is over"
        );
        assert!(
            blocks.block_net(net("11.0.0.0/8"), 200, 100),
            "the others are over"
        );
    }

    #[test]
    fn a_full_set_gives_up_whose_time_ends_first() {
        let blocks = Blocks::default();
        let nets: Vec<IpNet> = (0..)
            .map(|n: u32| IpNet::from(IpAddr::from(n.to_be_bytes())))
            .take(2 * BLOCK_SLOTS)
            .collect();
        for (n, net) in nets.iter().enumerate() {
            blocks.block(*net, Via::Direct, 1000 + n as u64);
        }
        let held = |net: &IpNet| {
            let origin = Origin {
                ip: net.addr(),
                via: Via::Direct,
            };
            blocks.until(origin, PREFIXES, 1).is_some()
        };
        let count = nets.iter().filter(|net| held(net)).count();
        assert!(count <= BLOCK_SLOTS && count > BLOCK_SLOTS * 9 / 10, "{count}");
        assert!(nets.iter().rev().take(1000).all(held), "the latest are all there");
        assert!(!nets.iter().take(1000).all(held));
    }
}
