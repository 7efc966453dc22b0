//! Who a client is to the kernel.

use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// The first twelve bytes of an IPv4 address written as IPv6, `::ffff:0:0/96` (RFC 4291 section 2.5.5.2).
pub const V4_MAPPED_PREFIX: [u8; 12] = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff];

/// A client's address as the maps know it, in network byte order.
///
/// IPv4 is kept whole, in its v4-mapped form. IPv6 is cut to its /64: a single host owns all of a /64 (RFC 7421) and
/// would otherwise dodge every block, and fill the maps, by changing the lower half.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct ClientKey(pub [u8; 16]);

impl ClientKey {
    /// The key of an IPv4 client.
    #[inline(always)]
    pub const fn v4(octets: [u8; 4]) -> ClientKey {
        let mut key = [0; 16];
        key[10] = 0xff;
        key[11] = 0xff;
        key[12] = octets[0];
        key[13] = octets[1];
        key[14] = octets[2];
        key[15] = octets[3];
        ClientKey(key)
    }

    /// The key of an IPv6 client: its /64, or the IPv4 client that a v4-mapped address stands for.
    #[inline(always)]
    pub const fn v6(octets: [u8; 16]) -> ClientKey {
        let mut key = octets;
        let high = u64::from_be_bytes([key[0], key[1], key[2], key[3], key[4], key[5], key[6], key[7]]);
        let mapped = u32::from_be_bytes([key[8], key[9], key[10], key[11]]) == 0xffff;
        if high != 0 || !mapped {
            let mut index = 8;
            while index < 16 {
                key[index] = 0;
                index += 1;
            }
        }
        ClientKey(key)
    }

    /// The key of any client.
    #[inline]
    pub const fn new(client: IpAddr) -> ClientKey {
        match client {
            IpAddr::V4(v4) => ClientKey::v4(v4.octets()),
            IpAddr::V6(v6) => ClientKey::v6(v6.octets()),
        }
    }

    /// The IPv4 address, or the first address of the IPv6 /64.
    #[inline]
    pub const fn address(&self) -> IpAddr {
        match self.as_v4() {
            Some(octets) => IpAddr::V4(Ipv4Addr::new(octets[0], octets[1], octets[2], octets[3])),
            None => IpAddr::V6(Ipv6Addr::from_octets(self.0)),
        }
    }

    /// The four octets when the client is an IPv4 one.
    #[inline(always)]
    pub const fn as_v4(&self) -> Option<[u8; 4]> {
        let key = &self.0;
        let high = u64::from_be_bytes([key[0], key[1], key[2], key[3], key[4], key[5], key[6], key[7]]);
        let mapped = u32::from_be_bytes([key[8], key[9], key[10], key[11]]) == 0xffff;
        if high == 0 && mapped {
            Some([key[12], key[13], key[14], key[15]])
        } else {
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(text: &str) -> ClientKey {
        ClientKey::new(text.parse().expect("an address"))
    }

    #[test]
    fn v4_is_kept_whole() {
        assert_eq!(key("192.0.2.7").address(), "192.0.2.7".parse::<IpAddr>().unwrap());
        assert_ne!(key("192.0.2.7"), key("192.0.2.8"));
        assert_eq!(key("192.0.2.7").0[..12], V4_MAPPED_PREFIX);
    }

    #[test]
    fn v4_mapped_v6_is_the_v4_client() {
        assert_eq!(key("::ffff:192.0.2.7"), key("192.0.2.7"));
    }

    #[test]
    fn v6_is_cut_to_64() {
        assert_eq!(key("2001:db8:1:2:aaaa::1"), key("2001:db8:1:2:bbbb::2"));
        assert_ne!(key("2001:db8:1:2::1"), key("2001:db8:1:3::1"));
        assert_eq!(
            key("2001:db8:1:2:3::4").address(),
            "2001:db8:1:2::".parse::<IpAddr>().unwrap()
        );
        assert_eq!(key("2001:db8:1:2:3::4").as_v4(), None);
    }

    #[test]
    fn an_address_that_only_looks_mapped_is_cut() {
        // The same lower half under a real prefix is an interface identifier like any other.
        assert_eq!(key("2001:db8::ffff:192.0.2.7"), key("2001:db8::1"));
    }

    #[test]
    fn loopback_v6_is_not_v4() {
        assert_eq!(key("::1").address(), "::".parse::<IpAddr>().unwrap());
    }
}
