//! Which proxies stand before a listener, and what they are believed.

use std::net::{IpAddr, Ipv6Addr};

use ipnet::IpNet;

use crate::{
    config::schema::{ClientHeader, Listener, ProxyProtocol},
    http::{forwarded::Form, head::RequestHead},
    quota::refusals::{Origin, Via},
};

/// A listener's proxies, as the hot path wants them.
#[derive(Debug, Default)]
pub struct Trust {
    pub proxy_protocol: ProxyProtocol,
    /// Ranges of addresses, first and last, IPv4 as mapped IPv6; sorted and apart from each other.
    ranges: Vec<(u128, u128)>,
    form: Option<Form>,
}

impl Trust {
    /// As a listener is configured.
    pub fn new(listener: &Listener) -> Trust {
        let mut ranges: Vec<(u128, u128)> = listener.trusted_proxies.iter().map(range).collect();
        ranges.sort_unstable();
        ranges.dedup_by(|next, kept| {
            let joined = next.0 <= kept.1;
            if joined {
                kept.1 = kept.1.max(next.1);
            }
            joined
        });
        Trust {
            proxy_protocol: listener.proxy_protocol,
            ranges,
            form: match listener.client_header {
                ClientHeader::XForwardedFor => Some(Form::XForwardedFor),
                ClientHeader::Forwarded => Some(Form::Forwarded),
                ClientHeader::Off => None,
            },
        }
    }

    /// Whether nobody stands before the listener.
    pub fn is_nobody(&self) -> bool {
        self.ranges.is_empty()
    }

    /// Whether an address is a trusted proxy's.
    pub fn trusts(&self, ip: IpAddr) -> bool {
        let number = number(ip);
        let after = self.ranges.partition_point(|(first, _)| *first <= number);
        after > 0 && self.ranges[after - 1].1 >= number
    }

    /// Who is at the other end of a connection whose peer, or whose PROXY header's source, is `ip`.
    pub fn origin(&self, ip: IpAddr, by_header: bool) -> Origin {
        let via = match (self.trusts(ip), by_header) {
            (true, _) => Via::Proxy,
            (false, true) => Via::Proxied,
            (false, false) => Via::Direct,
        };
        Origin { ip, via }
    }

    /// Whose request it is that came over `hop`. Fields of somebody who is no trusted proxy are not looked at.
    pub fn client(&self, hop: Origin, head: &RequestHead, bytes: &[u8]) -> Origin {
        let Some(form) = self.form.filter(|_| hop.via == Via::Proxy) else {
            return hop;
        };
        let name = form.field().as_bytes();
        let values = head
            .fields
            .iter()
            .filter(|field| field.name.of(bytes).eq_ignore_ascii_case(name))
            .map(|field| field.value.of(bytes));
        let ip = crate::http::forwarded::client(form, values, hop.ip, |ip| self.trusts(ip));
        self.origin(ip, true)
    }
}

fn number(ip: IpAddr) -> u128 {
    match ip {
        IpAddr::V4(ip) => ip.to_ipv6_mapped().to_bits(),
        IpAddr::V6(ip) => ip.to_bits(),
    }
}

fn range(net: &IpNet) -> (u128, u128) {
    match net {
        IpNet::V4(net) => (number(net.network().into()), number(net.broadcast().into())),
        IpNet::V6(net) => (
            Ipv6Addr::to_bits(net.network()),
            Ipv6Addr::to_bits(net.broadcast()),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn trust(nets: &[&str]) -> Trust {
        Trust::new(&Listener {
            address: ([127, 0, 0, 1], 0).into(),
            tls: None,
            trusted_proxies: nets.iter().map(|net| net.parse().expect("network")).collect(),
            proxy_protocol: ProxyProtocol::Off,
            client_header: ClientHeader::XForwardedFor,
        })
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().expect("address")
    }

    #[test]
    fn networks_are_found_however_they_overlap() {
        let trust = trust(&[
            "10.1.0.0/16",
            "10.0.0.0/8",
            "192.0.2.7/32",
            "2001:db8::/32",
            "192.0.2.8/32",
        ]);
        for (text, wanted) in [
            ("10.0.0.0", true),
            ("10.255.255.255", true),
            ("11.0.0.0", false),
            ("9.255.255.255", false),
            ("192.0.2.7", true),
            ("192.0.2.8", true),
            ("192.0.2.9", false),
            ("2001:db8:ffff::1", true),
            ("2001:db9::", false),
            ("::1", false),
        ] {
            assert_eq!(trust.trusts(ip(text)), wanted, "{text}");
        }
        assert!(!trust.is_nobody());
        assert!(Trust::default().is_nobody());
    }

    #[test]
    fn only_trusted_hops_are_believed() {
        let trust = trust(&["10.0.0.0/8"]);
        let bytes = b"GET / HTTP/1.1\r\nhost: x\r\nX-Forwarded-For: 1.1.1.1, 203.0.113.7\r\n\r\n";
        let mut head = RequestHead::new();
        assert_eq!(head.parse(bytes), Ok(true));
        let of = |hop: Origin| trust.client(hop, &head, bytes);
        let client = of(trust.origin(ip("10.0.0.1"), false));
        assert_eq!((client.ip, client.via), (ip("203.0.113.7"), Via::Proxied));
        let direct = trust.origin(ip("9.9.9.9"), false);
        assert_eq!(of(direct), direct);
        assert_eq!(direct.via, Via::Direct);
        let by_header = trust.origin(ip("9.9.9.9"), true);
        assert_eq!((of(by_header), by_header.via), (by_header, Via::Proxied));
    }
}
