//! Who is refused again and again, and what follows: evidence (by all cores), how long it is held against whom (by the
//! control thread), and who is turned away now (read by all cores).
//!
//! A client that connects itself is dropped by the kernel, and user space only ends what it has open. A client behind a
//! trusted proxy has no connection of its own that could be dropped: it is answered early, before its body is read.

mod blocks;
mod evidence;
mod offenders;

use std::{net::IpAddr, time::Duration};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

pub use blocks::Blocks;
pub use evidence::Refusals;
pub use offenders::{Growth, Offenders};

/// How a client reaches the gateway.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Via {
    /// By its own connection.
    Direct,
    /// Over a trusted proxy. Its address is what that proxy says; the same address of a direct client may be another host,
    /// where the proxy stands in another network.
    Proxied,
    /// It is a trusted proxy, and nothing more is known: whatever comes from it is held against nobody.
    Proxy,
}

/// A client as limits, blocks and logs know it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Origin {
    pub ip: IpAddr,
    pub via: Via,
}

/// What counts as one client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Prefixes {
    /// Bits of an IPv4 address, at most 32.
    pub v4: u8,
    /// Bits of an IPv6 address, at most 128. A single host owns a /64 (RFC 7421) and would otherwise never be refused
    /// twice at the same address.
    pub v6: u8,
}

impl Prefixes {
    /// The network that counts as the same client.
    pub fn net(self, ip: IpAddr) -> IpNet {
        match ip.to_canonical() {
            IpAddr::V4(ip) => IpNet::V4(Ipv4Net::new(ip, self.v4).unwrap_or(ip.into()).trunc()),
            IpAddr::V6(ip) => IpNet::V6(Ipv6Net::new(ip, self.v6).unwrap_or(ip.into()).trunc()),
        }
    }
}

/// When an address is to be dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rule {
    /// Refusals that make an offender; 0 watches nothing.
    pub after: u32,
    /// Time within which they must fall.
    pub within: Duration,
    pub prefixes: Prefixes,
}
