use super::*;

fn source(bytes: &[u8]) -> Result<Option<String>, ProxyError> {
    let header = parse(bytes)?.expect("complete");
    assert_eq!(header.len, bytes.len());
    Ok(header.source.map(|source| source.to_string()))
}

/// A header of version 2.
fn v2(command: u8, family: u8, rest: &[u8]) -> Vec<u8> {
    let mut bytes = V2.to_vec();
    bytes.extend([0x20 | command, family]);
    bytes.extend((rest.len() as u16).to_be_bytes());
    bytes.extend(rest);
    bytes
}

const ADDRESSES_V4: [u8; 12] = [192, 0, 2, 7, 10, 0, 0, 1, 0x30, 0x39, 0x01, 0xbb];

#[test]
fn lines_of_version_1() {
    for (line, wanted) in [
        (
            "PROXY TCP4 192.0.2.7 10.0.0.1 12345 443\r\n",
            Some("192.0.2.7:12345"),
        ),
        ("PROXY TCP6 2001:db8::7 ::1 0 65535\r\n", Some("[2001:db8::7]:0")),
        ("PROXY UNKNOWN\r\n", None),
        ("PROXY UNKNOWN ffff::1 whatever it is\r\n", None),
    ] {
        assert_eq!(source(line.as_bytes()), Ok(wanted.map(str::to_owned)), "{line:?}");
        for cut in 0..line.len() {
            assert_eq!(parse(&line.as_bytes()[..cut]), Ok(None), "{cut} of {line:?}");
        }
    }
}

#[test]
fn lines_that_are_none() {
    for line in [
        "PROXY TCP4 192.0.2.7 10.0.0.1 12345\r\n",
        "PROXY TCP4 192.0.2.7 10.0.0.1 12345 443 \r\n",
        "PROXY TCP4  192.0.2.7 10.0.0.1 12345 443\r\n",
        "PROXY TCP4 192.0.2.7 10.0.0.1 12345 443\n",
        "PROXY TCP4 192.0.2.7 10.0.0.1 012345 443\r\n",
        "PROXY TCP4 192.0.2.7 10.0.0.1 +1 443\r\n",
        "PROXY TCP4 192.0.2.7 10.0.0.1 1 65536\r\n",
        "PROXY TCP4 192.0.2.07 10.0.0.1 1 2\r\n",
        "PROXY TCP4 2001:db8::7 ::1 1 2\r\n",
        "PROXY TCP6 192.0.2.7 10.0.0.1 1 2\r\n",
        "PROXY UDP4 192.0.2.7 10.0.0.1 1 2\r\n",
        "PROXY \r\n",
    ] {
        assert_eq!(parse(line.as_bytes()), Err(ProxyError::Line), "{line:?}");
    }
    let endless = [b"PROXY UNKNOWN ".as_slice(), &[b'x'; V1_BYTES_MAX]].concat();
    assert_eq!(parse(&endless), Err(ProxyError::Line));
    for other in ["POST / HTTP/1.1\r\n", "proxy TCP4", "\x16\x03\x01", "\r\n\r\nGET"] {
        assert_eq!(parse(other.as_bytes()), Err(ProxyError::Absent), "{other:?}");
    }
}

#[test]
fn addresses_of_version_2() {
    let four = v2(1, 0x11, &ADDRESSES_V4);
    assert_eq!(source(&four), Ok(Some("192.0.2.7:12345".into())));
    for cut in 0..four.len() {
        assert_eq!(parse(&four[..cut]), Ok(None), "{cut}");
    }
    let mut six = [0; V6_BYTES];
    six[..2].copy_from_slice(&[0x20, 0x01]);
    six[15] = 9;
    six[33] = 80;
    assert_eq!(source(&v2(1, 0x21, &six)), Ok(Some("[2001::9]:80".into())));
    assert_eq!(source(&v2(1, 0x31, &[b'x'; UNIX_BYTES])), Ok(None));
    assert_eq!(source(&v2(1, 0x00, b"anything")), Ok(None));
    assert_eq!(source(&v2(0, 0x11, b"skipped")), Ok(None), "LOCAL");
}

#[test]
fn what_version_2_must_not_be() {
    assert_eq!(source(&v2(2, 0x11, &ADDRESSES_V4)), Err(ProxyError::Unsupported));
    assert_eq!(
        source(&v2(1, 0x12, &ADDRESSES_V4)),
        Err(ProxyError::Unsupported),
        "UDP"
    );
    assert_eq!(source(&v2(1, 0x11, &ADDRESSES_V4[..11])), Err(ProxyError::Length));
    assert_eq!(source(&v2(1, 0x21, &ADDRESSES_V4)), Err(ProxyError::Length));
    assert_eq!(
        parse(&v2(1, 0x11, &[0; PROXY_HEADER_BYTES_MAX])),
        Err(ProxyError::TooLong)
    );
    let mut other = v2(1, 0x11, &ADDRESSES_V4);
    other[12] = 0x31;
    assert_eq!(source(&other), Err(ProxyError::Version));
}

#[test]
fn extensions_are_skipped_within_bounds() {
    let with = |more: &[u8]| v2(1, 0x11, &[ADDRESSES_V4.as_slice(), more].concat());
    assert!(source(&with(&[0x04, 0, 3, 1, 2, 3, 0xea, 0, 0])).is_ok());
    assert_eq!(source(&with(&[0x04, 0])), Err(ProxyError::Length));
    assert_eq!(source(&with(&[0x04, 0, 4, 1, 2, 3])), Err(ProxyError::Length));
    assert_eq!(source(&with(&[0x04, 0xff, 0xff])), Err(ProxyError::Length));
}

#[test]
fn a_checksum_must_be_right() {
    assert_eq!(
        !crc32c(!0, b"123456789"),
        0xe306_9283,
        "the check value of CRC-32C"
    );
    let mut bytes = v2(
        1,
        0x11,
        &[
            ADDRESSES_V4.as_slice(),
            &[TYPE_CRC32C, 0, 4, 0, 0, 0, 0, 0x04, 0, 0],
        ]
        .concat(),
    );
    let sum = !crc32c(!0, &bytes);
    let at = V2_FIXED_BYTES + V4_BYTES + 3;
    bytes[at..at + 4].copy_from_slice(&sum.to_be_bytes());
    assert!(source(&bytes).is_ok());
    for place in 16..bytes.len() - 3 {
        let mut wrong = bytes.clone();
        wrong[place] ^= 1;
        assert!(source(&wrong).is_err() || place == at - 3, "bit of byte {place}");
    }
    let short = v2(
        1,
        0x11,
        &[ADDRESSES_V4.as_slice(), &[TYPE_CRC32C, 0, 3, 0, 0, 0]].concat(),
    );
    assert_eq!(source(&short), Err(ProxyError::Length));
}
