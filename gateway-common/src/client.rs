//! Who a client is to the kernel.

use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// The first twelve bytes of an IPv4 address written as IPv6, `::ffff:0:0/96` (RFC 4291 section 2.5.5.2).
pub const V4_MAPPED_PREFIX: [u8; 12] = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff];

/// How many bits of an address make one client.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Prefixes {
    /// Of an IPv4 address, at most 32.
    pub v4: u8,
    /// Of an IPv6 address, at most 128.
    pub v6: u8,
}

impl Prefixes {
    /// A host has one IPv4 address, and all of an IPv6 /64 (RFC 7421): it would otherwise dodge every block, and fill the
    /// maps, by changing the lower half.
    pub const DEFAULT: Prefixes = Prefixes { v4: 32, v6: 64 };

    /// The masks that keep these bits of a key: of an IPv4 client, of an IPv6 one.
    pub const fn masks(self) -> (Mask, Mask) {
        (mask(96 + self.v4 as u32), mask(self.v6 as u32))
    }
}

impl Default for Prefixes {
    fn default() -> Self {
        Prefixes::DEFAULT
    }
}

/// Bits of a key that count, as two words in the order of their bytes in memory.
pub type Mask = [u64; 2];

const fn mask(bits: u32) -> Mask {
    let bits = if bits > 128 { 128 } else { bits };
    let ones = if bits == 0 { 0 } else { u128::MAX << (128 - bits) };
    [((ones >> 64) as u64).to_be(), (ones as u64).to_be()]
}

/// A client's address as the maps know it, in network byte order; IPv4 in its v4-mapped form. Bits beyond the client's
/// prefix are zero.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct ClientKey(pub [u8; 16]);

impl ClientKey {
    /// The key of a whole IPv4 address.
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

    /// The key of a whole IPv6 address; a v4-mapped one is its IPv4 client's.
    #[inline(always)]
    pub const fn v6(octets: [u8; 16]) -> ClientKey {
        ClientKey(octets)
    }

    /// The key of a client's whole address.
    #[inline]
    pub const fn whole(client: IpAddr) -> ClientKey {
        match client {
            IpAddr::V4(v4) => ClientKey::v4(v4.octets()),
            IpAddr::V6(v6) => ClientKey::v6(v6.octets()),
        }
    }

    /// The key of a client, cut to its prefix.
    #[inline]
    pub const fn of(client: IpAddr, prefixes: Prefixes) -> ClientKey {
        let (v4, v6) = prefixes.masks();
        ClientKey::whole(client).cut(v4, v6)
    }

    /// The key of a client, cut to the default prefixes.
    #[inline]
    pub const fn new(client: IpAddr) -> ClientKey {
        ClientKey::of(client, Prefixes::DEFAULT)
    }

    /// Keeps the bits of the client's prefix, by the masks of [`Prefixes::masks`].
    #[inline(always)]
    pub const fn cut(self, v4: Mask, v6: Mask) -> ClientKey {
        let (high, low) = self.words();
        let mask = if self.is_v4() { v4 } else { v6 };
        ClientKey::from_words(high & mask[0], low & mask[1])
    }

    #[inline(always)]
    const fn words(&self) -> (u64, u64) {
        let key = &self.0;
        (
            u64::from_ne_bytes([key[0], key[1], key[2], key[3], key[4], key[5], key[6], key[7]]),
            u64::from_ne_bytes([
                key[8], key[9], key[10], key[11], key[12], key[13], key[14], key[15],
            ]),
        )
    }

    #[inline(always)]
    const fn from_words(high: u64, low: u64) -> ClientKey {
        let (a, b) = (high.to_ne_bytes(), low.to_ne_bytes());
        ClientKey([
            a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7],
        ])
    }

    #[inline(always)]
    const fn is_v4(&self) -> bool {
        let (high, low) = self.words();
        high == 0 && u64::from_be(low) >> 32 == 0xffff
    }

    /// The IPv4 address, or the IPv6 one; the first of the client's prefix where it was cut.
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
        if self.is_v4() {
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

    fn cut(text: &str, v4: u8, v6: u8) -> IpAddr {
        let client = text.parse().expect("an address");
        ClientKey::of(client, Prefixes { v4, v6 }).address()
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
    fn other_prefixes() {
        let ip = |text: &str| text.parse::<IpAddr>().expect("an address");
        assert_eq!(cut("192.0.2.77", 24, 64), ip("192.0.2.0"));
        assert_eq!(cut("192.255.2.77", 9, 64), ip("192.128.0.0"));
        assert_eq!(cut("2001:db8:1:2:3::4", 32, 48), ip("2001:db8:1::"));
        assert_eq!(cut("2001:db8:1:2:3::4", 32, 128), ip("2001:db8:1:2:3::4"));
        assert_eq!(cut("2001:dbf:1:2:3::4", 32, 29), ip("2001:db8::"));
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
