//! Virtual keys: how they are made, and the hash that the configuration holds of them.
//!
//! A key has 256 random bits, so one plain SHA-256 is enough: there is nothing to guess that a slow
//! password hash would have to protect, and the hash is computed for every request.

use sha2::{Digest, Sha256};

use crate::bounds::NAME_BYTES_MAX;

/// What every generated key starts with, so that secret scanners can find one that leaked.
pub const KEY_PREFIX: &str = "sk-gw-";

/// Random bytes of a key.
const KEY_BYTES: usize = 32;

const BASE64URL: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";

/// Whether the configuration takes this as a name.
///
/// # Errors
/// Says what a name must not be.
pub fn check_name(text: &str) -> Result<(), String> {
    if text.is_empty() || text.len() > NAME_BYTES_MAX {
        return Err(format!("a name has 1 to {NAME_BYTES_MAX} bytes"));
    }
    if text.chars().any(char::is_control) || text.trim() != text {
        return Err("a name has no control characters, nor spaces at its ends".into());
    }
    Ok(())
}

/// SHA-256 of a virtual key as the client sends it.
pub fn key_hash(key: &str) -> [u8; 32] {
    Sha256::digest(key.as_bytes()).into()
}

/// Makes a virtual key: [`KEY_PREFIX`] and 32 random bytes as 43 characters of base64url.
///
/// # Errors
/// Fails if the operating system gives no random bytes.
pub fn generate_key() -> Result<String, getrandom::Error> {
    let mut random = [0; KEY_BYTES];
    getrandom::fill(&mut random)?;
    let mut key = String::from(KEY_PREFIX);
    base64url(&random, &mut key);
    Ok(key)
}

/// Appends base64url without padding (RFC 4648, section 5).
fn base64url(bytes: &[u8], out: &mut String) {
    for group in bytes.chunks(3) {
        let bits =
            group.iter().fold(0u32, |bits, &byte| bits << 8 | u32::from(byte)) << (8 * (3 - group.len()));
        for place in 0..=group.len() {
            let index = bits >> (18 - 6 * place) & 63;
            out.push(char::from(BASE64URL[index as usize]));
        }
    }
}

/// Writes a hash as 64 lower-case hex digits.
pub fn sha256_hex(hash: &[u8; 32]) -> String {
    use std::fmt::Write as _;
    let mut text = String::with_capacity(64);
    for byte in hash {
        let _ = write!(text, "{byte:02x}");
    }
    text
}

/// Reads 64 hex digits, upper or lower case; `None` for anything else.
pub fn parse_sha256(text: &str) -> Option<[u8; 32]> {
    if text.len() != 64 || !text.bytes().all(|b| b.is_ascii_hexdigit()) {
        return None;
    }
    let mut hash = [0; 32];
    for (byte, digits) in hash.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
        *byte = u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()?;
    }
    Some(hash)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64url_is_that_of_the_rfc() {
        for (bytes, expected) in [
            (&b""[..], ""),
            (b"f", "Zg"),
            (b"fo", "Zm8"),
            (b"foo", "Zm9v"),
            (b"foob", "Zm9vYg"),
            (b"fooba", "Zm9vYmE"),
            (b"foobar", "Zm9vYmFy"),
            (&[0xfb, 0xff, 0xfe], "-__-"),
        ] {
            let mut text = String::new();
            base64url(bytes, &mut text);
            assert_eq!(text, expected);
        }
    }

    #[test]
    fn keys_differ_and_have_the_promised_form() {
        let (one, two) = (generate_key().unwrap(), generate_key().unwrap());
        assert_ne!(one, two);
        let random = one.strip_prefix(KEY_PREFIX).unwrap();
        assert_eq!(random.len(), 43);
        assert!(random.bytes().all(|b| BASE64URL.contains(&b)));
    }

    #[test]
    fn hash_and_hex_agree_with_sha256sum() {
        let hash = key_hash("abc");
        let hex = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(sha256_hex(&hash), hex);
        assert_eq!(parse_sha256(hex), Some(hash));
        assert_eq!(parse_sha256(&hex.to_uppercase()), Some(hash));
        for wrong in [
            "",
            "ba",
            &hex[1..],
            &format!("{hex}0"),
            &hex.replace('b', "+"),
            &"é".repeat(32),
        ] {
            assert_eq!(parse_sha256(wrong), None);
        }
    }
}
