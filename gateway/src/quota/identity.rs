//! What levels are known by: 64-bit hashes of policies, subjects and periods.
//!
//! Names come from operators and clients, so they are hashed with SHA-256 before they are mixed: nobody can choose
//! two names that meet. The hashes are in the state file and must stay what they are.

use std::net::IpAddr;

use sha2::{Digest, Sha256};

/// The identity of a name; 0 for the empty one, which stands for "none".
pub fn of_name(name: &str) -> u64 {
    if name.is_empty() {
        return 0;
    }
    let hash: [u8; 32] = Sha256::digest(name.as_bytes()).into();
    u64::from_le_bytes([
        hash[0], hash[1], hash[2], hash[3], hash[4], hash[5], hash[6], hash[7],
    ])
}

/// The identity of a client's address. One IPv6 subscriber has a /64 (RFC 6177), so that is one client.
pub fn of_client(client: IpAddr) -> u64 {
    match client.to_canonical() {
        IpAddr::V4(v4) => mix(4, u64::from(v4.to_bits())),
        IpAddr::V6(v6) => mix(6, (v6.to_bits() >> 64) as u64),
    }
}

/// Joins two identities; the order counts. A multiplication to 128 bits, folded (the core of wyhash), twice.
#[inline]
pub fn mix(a: u64, b: u64) -> u64 {
    let fold = |x: u64, y: u64| {
        let product = u128::from(x) * u128::from(y);
        (product as u64) ^ (product >> 64) as u64
    };
    let once = fold(a ^ 0x9E37_79B9_7F4A_7C15, b ^ 0xD1B5_4A32_D192_ED03 | 1);
    fold(once ^ a.rotate_left(23), 0xA076_1D64_78BD_642F) ^ b.rotate_left(41)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn identities_differ_and_stay() {
        // printf alice | sha256sum
        assert_eq!(of_name("alice"), 0xaf00_0e7f_c906_d82b);
        assert_eq!(of_name(""), 0);
        assert_ne!(mix(1, 2), mix(2, 1));
        let mut seen = HashSet::new();
        for a in 0..300 {
            for b in 0..300 {
                assert!(seen.insert(mix(a, b)), "{a} {b}");
            }
        }
        let ip = |text: &str| of_client(text.parse().expect("an address"));
        assert_eq!(ip("2001:db8::1"), ip("2001:db8::ffff:1"));
        assert_ne!(ip("2001:db8::1"), ip("2001:db8:0:1::1"));
        assert_eq!(ip("192.0.2.1"), ip("::ffff:192.0.2.1"));
        assert_ne!(ip("192.0.2.1"), ip("192.0.2.2"));
    }
}
