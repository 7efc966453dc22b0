//! Who may be blocked at all: the one place where that is decided.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use gateway_common::ClientKey;
use ipnet::{IpNet, Ipv6Net};

/// Clients that are never blocked, whatever they do.
#[derive(Debug, Clone)]
pub struct Policy {
    exempt: Vec<IpNet>,
}

impl Policy {
    pub fn new(exempt: &[IpNet]) -> Policy {
        Policy {
            exempt: exempt.to_vec(),
        }
    }

    /// Why `client` must not be blocked, or None when it may be.
    ///
    /// - An exempt network of the configuration: behind it stand proxies and NATs, so many hosts.
    /// - `127.0.0.1` and `::1`: the host itself. A proxy, a health check or the operator comes from there. Other addresses
    ///   of 127.0.0.0/8 are only used on purpose, and are clients like any other.
    /// - Addresses that no client has.
    pub fn refusal(&self, client: IpAddr) -> Option<String> {
        let client = client.to_canonical();
        if client.is_unspecified() || client.is_multicast() {
            return Some(format!("{client} is no client's address"));
        }
        let blocked = reach(client);
        for own in [IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)] {
            if blocked.contains(&own) {
                return Some(format!("{client} is this host itself"));
            }
        }
        let exempt = self.exempt.iter().find(|net| overlap(net, &blocked))?;
        Some(format!("{client} is exempt by kernel.drop.exempt ({exempt})"))
    }
}

/// All addresses that a block on `client` hits.
fn reach(client: IpAddr) -> IpNet {
    match ClientKey::new(client).address() {
        IpAddr::V4(v4) => IpNet::from(IpAddr::V4(v4)),
        // 64 is within 0..=128, so the fallback is never taken; it is the narrower choice.
        IpAddr::V6(v6) => IpNet::V6(Ipv6Net::new(v6, 64).unwrap_or(Ipv6Net::from(v6))),
    }
}

/// True when the two share an address: an exempt host within a blocked /64 protects all of it.
fn overlap(a: &IpNet, b: &IpNet) -> bool {
    a.contains(b) || b.contains(a)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn may(exempt: &[&str], client: &str) -> bool {
        let exempt: Vec<IpNet> = exempt.iter().map(|net| net.parse().expect("a network")).collect();
        Policy::new(&exempt)
            .refusal(client.parse().expect("an address"))
            .is_none()
    }

    #[test]
    fn the_host_itself_is_never_blocked() {
        assert!(!may(&[], "127.0.0.1"));
        assert!(!may(&[], "::1"));
        assert!(!may(&[], "::ffff:127.0.0.1"));
        assert!(!may(&[], "::2"), "shares its /64 with ::1");
        assert!(may(&[], "127.0.0.2"));
        assert!(may(&[], "192.0.2.1"));
    }

    #[test]
    fn exempt_networks() {
        assert!(!may(&["10.0.0.0/8"], "10.1.2.3"));
        assert!(!may(&["10.0.0.0/8"], "::ffff:10.1.2.3"));
        assert!(may(&["10.0.0.0/8"], "11.0.0.1"));
        assert!(!may(&["2001:db8::/32"], "2001:db8:7::9"));
    }

    #[test]
    fn an_exempt_host_protects_its_64() {
        assert!(!may(&["2001:db8::5/128"], "2001:db8::6"));
        assert!(may(&["2001:db8::5/128"], "2001:db8:0:1::6"));
    }

    #[test]
    fn what_is_no_client_is_not_blocked() {
        for address in ["0.0.0.0", "::", "224.0.0.1", "ff02::1"] {
            assert!(!may(&[], address), "{address}");
        }
    }

    #[test]
    fn the_reason_names_the_network() {
        let policy = Policy::new(&["10.0.0.0/8".parse().expect("a network")]);
        let reason = policy
            .refusal("10.0.0.1".parse().expect("an address"))
            .expect("exempt");
        assert_eq!(reason, "10.0.0.1 is exempt by kernel.drop.exempt (10.0.0.0/8)");
    }
}
