//! Who may be blocked at all: the one place where that is decided.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use gateway_common::{ClientKey, Prefixes};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};

/// Fewest bits of a network that can be blocked: a slip of the hand (`/0`) must not shut everybody out.
const BITS_MIN_V4: u8 = 8;
const BITS_MIN_V6: u8 = 16;

/// Clients that are never blocked, whatever they do.
#[derive(Debug, Clone)]
pub struct Policy {
    exempt: Vec<IpNet>,
    prefixes: Prefixes,
}

impl Policy {
    pub fn new(exempt: &[IpNet], prefixes: Prefixes) -> Policy {
        // 127.0.0.1 and ::1 are the host itself: a proxy, a health check or the operator comes from there. Other addresses of
        // 127.0.0.0/8 are only used on purpose, and are clients like any other.
        let own = [IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)];
        let own = own.map(IpNet::from);
        let exempt = own.into_iter().chain(exempt.iter().copied());
        Policy {
            exempt: exempt.map(canonical).collect(),
            prefixes,
        }
    }

    /// The exempt networks, the host's own addresses first.
    pub fn exempt(&self) -> &[IpNet] {
        &self.exempt
    }

    pub fn prefixes(&self) -> Prefixes {
        self.prefixes
    }

    /// The network that a client counts as.
    pub fn net_of(&self, client: IpAddr) -> IpNet {
        let Prefixes { v4, v6 } = self.prefixes;
        match ClientKey::of(client, self.prefixes).address() {
            // The prefixes are within bounds by the configuration; the fallback is the narrower choice.
            IpAddr::V4(address) => IpNet::V4(Ipv4Net::new(address, v4).unwrap_or(Ipv4Net::from(address))),
            IpAddr::V6(address) => IpNet::V6(Ipv6Net::new(address, v6).unwrap_or(Ipv6Net::from(address))),
        }
    }

    /// Whether a network is exactly what one client counts as.
    pub fn is_client(&self, net: &IpNet) -> bool {
        net.prefix_len() == self.net_of(net.addr()).prefix_len()
    }

    /// Whether the program must ask, for each address in a blocked network, whether it is exempt: always where that is not one
    /// client's, because the exempt networks may change while it is blocked.
    pub fn exempts_within(&self, net: &IpNet) -> bool {
        !self.is_client(net) || self.exempt.iter().any(|exempt| net.contains(exempt))
    }

    /// Why a network must not be blocked, or None when it may be. A network in which some addresses are exempt may be: the
    /// program lets those through.
    pub fn refusal(&self, net: IpNet) -> Option<String> {
        let address = net.addr();
        let bits_min = match net {
            IpNet::V4(_) => BITS_MIN_V4,
            IpNet::V6(_) => BITS_MIN_V6,
        };
        if net.prefix_len() < bits_min {
            return Some(format!("{net} is too wide; the least is /{bits_min}"));
        }
        // All of IPv4 lies within it, in the form in which the maps keep it.
        if net.contains(&IpAddr::V6(Ipv4Addr::UNSPECIFIED.to_ipv6_mapped())) {
            return Some(format!("{net} is too wide; it has all IPv4 clients in it"));
        }
        if address.is_unspecified() && net.prefix_len() == net.max_prefix_len() || address.is_multicast() {
            return Some(format!("{net} is no client's address"));
        }
        let exempt = self.exempt.iter().find(|exempt| exempt.contains(&net))?;
        let shown = match net.prefix_len() == net.max_prefix_len() {
            true => address.to_string(),
            false => net.to_string(),
        };
        match exempt.addr().is_loopback() && exempt.prefix_len() == exempt.max_prefix_len() {
            true => Some(format!("{shown} is this host itself")),
            false => Some(format!("{shown} is exempt by kernel.drop.exempt ({exempt})")),
        }
    }

    /// Why a client must not be blocked, or None when it may be. Its own address decides; but one exempt address of its
    /// prefix protects all of it from a block that nobody asked for.
    pub fn refusal_of_client(&self, client: IpAddr) -> Option<String> {
        let net = self.net_of(client);
        let inside = self.exempt.iter().find(|exempt| net.contains(*exempt));
        inside.map_or_else(|| self.refusal(net), |exempt| self.refusal(*exempt))
    }
}

/// Without bits beyond the prefix, and IPv4 written as IPv6 as IPv4.
pub fn canonical(net: IpNet) -> IpNet {
    let net = net.trunc();
    let IpNet::V6(v6) = net else {
        return net;
    };
    let mapped = v6.addr().to_ipv4_mapped().filter(|_| v6.prefix_len() >= 96);
    mapped
        .and_then(|v4| Ipv4Net::new(v4, v6.prefix_len() - 96).ok())
        .map_or(net, IpNet::V4)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy(exempt: &[&str]) -> Policy {
        let exempt: Vec<IpNet> = exempt.iter().map(|net| net.parse().expect("a network")).collect();
        Policy::new(&exempt, Prefixes::DEFAULT)
    }

    fn may(exempt: &[&str], client: &str) -> bool {
        let client = client.parse().expect("an address");
        policy(exempt).refusal_of_client(client).is_none()
    }

    fn may_net(exempt: &[&str], net: &str) -> bool {
        let net = canonical(net.parse().expect("a network"));
        policy(exempt).refusal(net).is_none()
    }

    #[test]
    fn the_host_itself_is_never_blocked() {
        assert!(!may(&[], "127.0.0.1"));
        assert!(!may(&[], "::1"));
        assert!(!may(&[], "::ffff:127.0.0.1"));
        assert!(!may(&[], "::2"), "shares its /64 with ::1");
        assert!(may(&[], "127.0.0.2"));
        assert!(may(&[], "192.0.2.1"));
        assert!(!may_net(&[], "127.0.0.1/32"));
        assert!(may_net(&[], "127.0.0.0/8"), "the program lets the host through");
    }

    #[test]
    fn exempt_networks() {
        assert!(!may(&["10.0.0.0/8"], "10.1.2.3"));
        assert!(!may(&["10.0.0.0/8"], "::ffff:10.1.2.3"));
        assert!(!may(&["::ffff:10.0.0.0/104"], "10.1.2.3"));
        assert!(may(&["10.0.0.0/8"], "11.0.0.1"));
        assert!(!may(&["2001:db8::/32"], "2001:db8:7::9"));
        assert!(!may_net(&["10.0.0.0/8"], "10.1.0.0/16"));
        assert!(may_net(&["10.1.2.3/32"], "10.1.0.0/16"));
    }

    #[test]
    fn an_exempt_host_protects_its_64() {
        assert!(!may(&["2001:db8::5/128"], "2001:db8::6"));
        assert!(may(&["2001:db8::5/128"], "2001:db8:0:1::6"));
    }

    #[test]
    fn only_where_some_are_exempt_each_is_asked_for() {
        let policy = policy(&["2001:db8::5/128", "10.1.2.3/32"]);
        let within = |net: &str| policy.exempts_within(&net.parse().expect("a network"));
        assert!(within("2001:db8::/64") && within("10.1.0.0/16") && within("192.0.2.0/24"));
        assert!(!within("2001:db8:0:1::/64") && !within("10.1.2.4/32"));
    }

    #[test]
    fn what_is_no_client_is_not_blocked() {
        for address in ["0.0.0.0", "224.0.0.1", "ff02::1"] {
            assert!(!may(&[], address), "{address}");
        }
    }

    #[test]
    fn what_is_too_wide_is_not_blocked() {
        for net in ["0.0.0.0/0", "128.0.0.0/7", "::/0", "2000::/15", "::/80"] {
            assert!(!may_net(&[], net), "{net}");
        }
        assert!(may_net(&[], "198.0.0.0/8"));
        assert!(may_net(&[], "2001::/16"));
    }

    #[test]
    fn the_reason_names_the_network() {
        let reason = policy(&["10.0.0.0/8"]).refusal_of_client([10, 0, 0, 1].into());
        let reason = reason.expect("exempt");
        assert_eq!(reason, "10.0.0.1 is exempt by kernel.drop.exempt (10.0.0.0/8)");
    }

    #[test]
    fn a_client_is_its_prefix() {
        let policy = Policy::new(&[], Prefixes { v4: 24, v6: 48 });
        let net = |text: &str| text.parse::<IpNet>().expect("a network");
        let ip = |text: &str| text.parse::<IpAddr>().expect("an address");
        assert_eq!(policy.net_of(ip("192.0.2.7")), net("192.0.2.0/24"));
        assert_eq!(policy.net_of(ip("::ffff:192.0.2.7")), net("192.0.2.0/24"));
        assert_eq!(policy.net_of(ip("2001:db8:1:2::3")), net("2001:db8:1::/48"));
        assert!(policy.is_client(&net("192.0.2.0/24")));
        assert!(!policy.is_client(&net("192.0.2.7/32")));
    }
}
