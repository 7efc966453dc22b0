use super::*;

fn request(text: &[u8]) -> Result<RequestHead, HeadError> {
    let mut head = RequestHead::new();
    let complete = head.parse(text)?;
    assert!(complete, "incomplete: {}", text.escape_ascii());
    Ok(head)
}

fn response(text: &[u8], method: Method) -> Result<ResponseHead, HeadError> {
    let mut head = ResponseHead::new();
    let complete = head.parse(text, method)?;
    assert!(complete, "incomplete: {}", text.escape_ascii());
    Ok(head)
}

/// A POST with these lines, `Host` given.
fn post(lines: &str) -> Result<RequestHead, HeadError> {
    request(format!("POST /v1 HTTP/1.1\r\nHost: h\r\n{lines}\r\n").as_bytes())
}

fn answer(lines: &str) -> Result<ResponseHead, HeadError> {
    response(format!("HTTP/1.1 200 OK\r\n{lines}\r\n").as_bytes(), Method::Post)
}

#[test]
fn reads_a_usual_request() {
    let text =
        b"POST /v1/chat/completions?a=b HTTP/1.1\r\nHost: gateway:8080\r\nAuthorization:  Bearer k \r\n\
        Content-Length: 5\r\nX-Empty:\r\nx-a: 1\r\nX-A: 2\r\n\r\nhelloGET";
    let head = request(text).unwrap();
    assert_eq!(head.method, Method::Post);
    assert_eq!(head.target.of(text), b"/v1/chat/completions?a=b");
    assert_eq!(head.version, Version::Http11);
    assert_eq!(head.framing, Framing::Length(5));
    assert!(head.keep_alive && !head.expect_continue);
    assert_eq!(&text[head.len..], b"helloGET");
    assert_eq!(head.fields.len(), 6);
    assert_eq!(head.field(text, "authorization"), Some(&b"Bearer k"[..]));
    assert_eq!(head.field(text, "x-empty"), Some(&b""[..]));
    assert_eq!(head.field(text, "x-none"), None);
    assert_eq!(head.fields_named(text, "x-a").collect::<Vec<_>>(), [b"1", b"2"]);
}

#[test]
fn skips_one_empty_line_and_no_more() {
    let text = b"\r\nGET / HTTP/1.1\r\nHost: h\r\n\r\n";
    let head = request(text).unwrap();
    assert_eq!((head.len, head.target.of(text)), (text.len(), &b"/"[..]));
    assert_eq!(head.field(text, "host"), Some(&b"h"[..]));
    assert_eq!(
        request(b"\r\n\r\nGET / HTTP/1.1\r\n").unwrap_err(),
        HeadError::LeadingLine
    );
    assert_eq!(
        response(b"\r\nHTTP/1.1 200 OK\r\n\r\n", Method::Get).unwrap_err(),
        HeadError::NotHttp
    );
}

#[test]
fn refuses_bad_lines_as_soon_as_they_are_there() {
    use HeadError::*;
    for (text, error) in [
        (&b"GET / HTTP/1.1\nHost: h\r\n\r\n"[..], BareLineFeed),
        (b"GET / HTTP/1.1\r\nHost: h\n", BareLineFeed),
        (b"GET / HTTP/1.1\r\nHost: h\r\n\n", BareLineFeed),
        (b"\nGET / HTTP/1.1\r\n", BareLineFeed),
        (b"GET / HTTP/1.1\r\nHost: h\r\n a: b\r\n", FoldedLine),
        (b"GET / HTTP/1.1\r\n\tHost: h\r\n", FoldedLine),
        (b" GET / HTTP/1.1\r\n", NotHttp),
        (b"\x16\x03\x01\x02\x00\x01", NotHttp),
        (b"\0", NotHttp),
    ] {
        assert_eq!(
            RequestHead::new().parse(text).unwrap_err(),
            error,
            "{}",
            text.escape_ascii()
        );
    }
}

#[test]
fn refuses_bad_start_lines() {
    use HeadError::*;
    for (line, error) in [
        ("GET /", StartLine),
        ("GET  / HTTP/1.1", StartLine),
        ("GET /  HTTP/1.1", StartLine),
        ("GET / HTTP/1.1 ", StartLine),
        ("GET\t/ HTTP/1.1", StartLine),
        ("GET / x HTTP/1.1", StartLine),
        ("GET /\u{1} HTTP/1.1", StartLine),
        ("GET / http/1.1", StartLine),
        ("GET / HTTP/1.1\rX", StartLine),
        ("GET / HTTP/2.0", Version),
        ("GET / HTTP/1.2", Version),
        ("G(T / HTTP/1.1", StartLine),
        ("GET foo HTTP/1.1", Target),
        ("GET * HTTP/1.1", Target),
        ("GET /a#b HTTP/1.1", Target),
        ("CONNECT h:443 HTTP/1.1", Target),
        ("GET ftp://h/ HTTP/1.1", Target),
        ("GET http:///a HTTP/1.1", Target),
        ("GET http://u@h/a HTTP/1.1", Target),
        ("GET http://h?a HTTP/1.1", Target),
    ] {
        let text = format!("{line}\r\nHost: h\r\n\r\n");
        assert_eq!(request(text.as_bytes()).unwrap_err(), error, "{line}");
    }
}

#[test]
fn reduces_targets_to_origin_form() {
    for (line, target) in [
        ("GET http://h:80/a?b=c HTTP/1.1", "/a?b=c"),
        ("GET HTTPS://[::1]:443/ HTTP/1.1", "/"),
        ("GET http://h HTTP/1.1", "/"),
        ("OPTIONS * HTTP/1.1", "*"),
        ("PURGE //a/../b HTTP/1.1", "//a/../b"),
        ("GET /\u{e9}%00 HTTP/1.1", "/\u{e9}%00"),
    ] {
        let text = format!("{line}\r\nHost: h\r\n\r\n");
        let head = request(text.as_bytes()).unwrap();
        assert_eq!(head.target.of(text.as_bytes()), target.as_bytes(), "{line}");
    }
}

#[test]
fn refuses_what_smuggles() {
    use HeadError::*;
    for (lines, error) in [
        (
            "Content-Length: 5\r\nTransfer-Encoding: chunked\r\n",
            LengthAndEncoding,
        ),
        (
            "Transfer-Encoding: chunked\r\nContent-Length: 5\r\n",
            LengthAndEncoding,
        ),
        ("Content-Length: 5\r\nContent-Length: 6\r\n", LengthRepeated),
        ("Content-Length: 5\r\ncontent-length: 5\r\n", LengthRepeated),
        ("Content-Length: 5, 5\r\n", LengthInvalid),
        ("Content-Length: +5\r\n", LengthInvalid),
        ("Content-Length: -5\r\n", LengthInvalid),
        ("Content-Length: 0x5\r\n", LengthInvalid),
        ("Content-Length: 5 5\r\n", LengthInvalid),
        ("Content-Length: 5.0\r\n", LengthInvalid),
        ("Content-Length:\r\n", LengthInvalid),
        ("Content-Length: 18446744073709551616\r\n", LengthInvalid),
        ("Transfer-Encoding: chunked, chunked\r\n", EncodingInvalid),
        (
            "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n",
            EncodingInvalid,
        ),
        (
            "Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n",
            EncodingInvalid,
        ),
        ("Transfer-Encoding: identity\r\n", EncodingInvalid),
        ("Transfer-Encoding: identity, chunked\r\n", EncodingInvalid),
        ("Transfer-Encoding: xchunked\r\n", EncodingInvalid),
        ("Transfer-Encoding: chunked;x\r\n", EncodingInvalid),
        ("Transfer-Encoding: chunked;q=0.5\r\n", EncodingInvalid),
        ("Transfer-Encoding: chunked, gzip\r\n", EncodingInvalid),
        ("Transfer-Encoding: gzip\r\n", EncodingInvalid),
        ("Transfer-Encoding: \"chunked\"\r\n", EncodingInvalid),
        ("Transfer-Encoding: , chunked\r\n", EncodingInvalid),
        ("Transfer-Encoding: chunked,\r\n", EncodingInvalid),
        ("Transfer-Encoding:\r\n", EncodingInvalid),
        ("Transfer-Encoding: gzip, chunked\r\n", EncodingUnknown),
        (
            "Transfer-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n",
            EncodingUnknown,
        ),
        ("Transfer-Encoding : chunked\r\n", FieldName),
        ("Transfer-Encoding\t: chunked\r\n", FieldName),
        ("Transfer-Encoding\r\n", FieldName),
        (": chunked\r\n", FieldName),
        ("X\u{b}: 1\r\n", FieldName),
        ("X\u{e9}: 1\r\n", FieldName),
        ("Transfer-Encoding: \u{b}chunked\r\n", FieldValue),
        ("Transfer-Encoding: chunked\u{0}\r\n", FieldValue),
        ("X: a\rb\r\n", FieldValue),
        ("X: a\r\rb\r\n", FieldValue),
        ("X: a\u{7f}\r\n", FieldValue),
        ("Host: h\r\n", HostRepeated),
        ("Connection: close; x\r\n", ConnectionInvalid),
        ("Expect: 200-ok\r\n", Expectation),
    ] {
        let status = match error {
            EncodingUnknown => 501,
            Expectation => 417,
            _ => 400,
        };
        let found = post(lines).expect_err(lines);
        assert_eq!((found, found.status()), (error, status), "{lines}");
    }
}

#[test]
fn takes_what_is_odd_but_sound() {
    assert_eq!(
        post("Transfer-Encoding: Chunked \t\r\n").unwrap().framing,
        Framing::Chunked
    );
    assert_eq!(
        post("TRANSFER-ENCODING:chunked\r\n").unwrap().framing,
        Framing::Chunked
    );
    assert_eq!(
        post("Content-Length: 0005\r\n").unwrap().framing,
        Framing::Length(5)
    );
    assert_eq!(
        post("Content-Length: 18446744073709551615\r\n").unwrap().framing,
        Framing::Length(u64::MAX)
    );
    assert_eq!(post("X: \u{e9}\tb\r\n").unwrap().framing, Framing::None);
}

#[test]
fn asks_for_one_valid_host() {
    let with = |host: &str| request(format!("GET / HTTP/1.1\r\nHost: {host}\r\n\r\n").as_bytes()).map(|_| ());
    for host in [
        "",
        "h",
        "a.b-c_d:80",
        "127.0.0.1:8080",
        "[::1]",
        "[fe80::1]:443",
        "h:",
        "%41",
    ] {
        assert_eq!(with(host), Ok(()), "{host}");
    }
    for host in [
        "a b", "a,b", "a/b", "u@h", "h:80a", "h:123456", "h:80:80", ":80", "[::1", "[]", "[::g]", "[::1]x",
        "a\"b",
    ] {
        assert_eq!(with(host), Err(HeadError::HostInvalid), "{host}");
    }
    assert_eq!(
        request(b"GET / HTTP/1.1\r\n\r\n").unwrap_err(),
        HeadError::HostMissing
    );
    assert_eq!(
        request(b"GET / HTTP/1.0\r\n\r\n").unwrap().version,
        Version::Http10
    );
    assert_eq!(
        request(b"GET / HTTP/1.0\r\nHost: a\r\nHost: a\r\n\r\n").unwrap_err(),
        HeadError::HostRepeated
    );
}

#[test]
fn tells_whether_the_connection_persists() {
    for (version, lines, keep_alive) in [
        ("1.1", "", true),
        ("1.1", "Connection: close\r\n", false),
        ("1.1", "Connection: x, Close\r\n", false),
        ("1.1", "Connection: keep-alive\r\nConnection: close\r\n", false),
        ("1.1", "Connection: close, keep-alive\r\n", false),
        ("1.1", "Connection: closed\r\n", true),
        ("1.0", "", false),
        ("1.0", "Connection: Keep-Alive\r\n", true),
        ("1.0", "Connection: keep-alive, close\r\n", false),
    ] {
        let text = format!("GET / HTTP/{version}\r\nHost: h\r\n{lines}\r\n");
        assert_eq!(request(text.as_bytes()).unwrap().keep_alive, keep_alive, "{text}");
    }
}

#[test]
fn http10_has_no_transfer_codings_and_no_expectations() {
    let text = b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n";
    assert_eq!(request(text).unwrap_err(), HeadError::EncodingInvalid);
    assert!(
        !request(b"POST / HTTP/1.0\r\nExpect: 100-continue\r\n\r\n")
            .unwrap()
            .expect_continue
    );
    assert!(
        post("Expect: 100-Continue\r\nContent-Length: 1\r\n")
            .unwrap()
            .expect_continue
    );
}

#[test]
fn tells_fields_that_end_at_this_hop() {
    let text = b"GET / HTTP/1.1\r\nHost: h\r\nConnection: keep-alive, X-Mine\r\nx-mine: 1\r\nx-yours: 2\r\n\
        Upgrade: h2c\r\nTE: trailers\r\n\r\n";
    let head = request(text).unwrap();
    let kept: Vec<_> = head
        .fields
        .iter()
        .filter(|field| head.is_end_to_end(text, field))
        .map(|field| field.name.of(text))
        .collect();
    assert_eq!(kept, [&b"Host"[..], b"x-yours"]);
    assert!(is_hop_by_hop(b"Transfer-Encoding") && !is_hop_by_hop(b"Content-Length"));
}

#[test]
fn bounds_the_head() {
    let long_target = [b"GET /".as_slice(), &vec![b'a'; HEAD_BYTES_MAX]].concat();
    let error = RequestHead::new().parse(&long_target).unwrap_err();
    assert_eq!((error, error.status()), (HeadError::TargetTooLong, 414));
    let long_field = [b"GET / HTTP/1.1\r\nX: ".as_slice(), &vec![b'a'; HEAD_BYTES_MAX]].concat();
    let error = RequestHead::new().parse(&long_field).unwrap_err();
    assert_eq!((error, error.status()), (HeadError::TooLarge, 431));

    let start = "GET / HTTP/1.1\r\nHost: h\r\nX: ";
    for (total, result) in [
        (HEAD_BYTES_MAX, Ok(true)),
        (HEAD_BYTES_MAX + 1, Err(HeadError::TooLarge)),
    ] {
        let text = format!("{start}{}\r\n\r\n", "a".repeat(total - start.len() - 4));
        assert_eq!(text.len(), total);
        assert_eq!(RequestHead::new().parse(text.as_bytes()), result, "{total}");
    }

    let fields = |count: usize| post(&"A: b\r\n".repeat(count - 1)).map(|head| head.fields.len());
    assert_eq!(fields(HEADERS_MAX), Ok(HEADERS_MAX));
    assert_eq!(fields(HEADERS_MAX + 1), Err(HeadError::TooManyFields));
}

#[test]
fn resumes_at_every_byte_and_starts_anew() {
    let text = b"\r\nPOST /a HTTP/1.1\r\nHost: h\r\nContent-Length: 3\r\n\r\nabc";
    let whole = request(text).unwrap();
    let mut head = RequestHead::new();
    for _ in 0..2 {
        for end in 0..whole.len {
            assert_eq!(head.parse(&text[..end]), Ok(false));
        }
        assert_eq!(head.parse(text), Ok(true));
        assert_eq!(
            (head.len, &head.fields, head.framing),
            (whole.len, &whole.fields, whole.framing)
        );
    }
    assert_eq!(head.parse(b"GET / HT"), Ok(false));
    head.reset();
    assert_eq!(head.parse(b"GET /other HTTP/1.0\r\n\r\n"), Ok(true));
    assert_eq!(head.fields, []);
}

#[test]
fn frames_responses() {
    assert_eq!(
        answer("Content-Length: 7\r\n").unwrap().framing,
        ResponseFraming::Length(7)
    );
    assert_eq!(
        answer("Transfer-Encoding: chunked\r\n").unwrap().framing,
        ResponseFraming::Chunked
    );
    let open = answer("").unwrap();
    assert_eq!(
        (open.framing, open.keep_alive),
        (ResponseFraming::UntilClose, false)
    );
    for (text, method, keep_alive) in [
        ("HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\n", Method::Head, true),
        (
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
            Method::Head,
            true,
        ),
        (
            "HTTP/1.1 304 Not Modified\r\nContent-Length: 7\r\n\r\n",
            Method::Get,
            true,
        ),
        ("HTTP/1.1 204 No Content\r\n\r\n", Method::Get, true),
        (
            "HTTP/1.1 204 No Content\r\nContent-Length: 0\r\n\r\n",
            Method::Get,
            true,
        ),
        (
            "HTTP/1.1 204 No Content\r\nContent-Length: 7\r\n\r\n",
            Method::Get,
            false,
        ),
        (
            "HTTP/1.1 204 No Content\r\nTransfer-Encoding: chunked\r\n\r\n",
            Method::Get,
            false,
        ),
        ("HTTP/1.1 100 Continue\r\n\r\n", Method::Post, true),
    ] {
        let head = response(text.as_bytes(), method).unwrap();
        assert_eq!(
            (head.framing, head.keep_alive),
            (ResponseFraming::None, keep_alive),
            "{text}"
        );
    }
    let old = response(
        b"HTTP/1.0 200\r\nContent-Length: 1\r\nConnection: keep-alive\r\n\r\n",
        Method::Get,
    );
    let old = old.unwrap();
    assert_eq!(
        (old.status, old.keep_alive, old.version),
        (200, true, Version::Http10)
    );
}

#[test]
fn refuses_bad_responses() {
    use HeadError::*;
    for (lines, error) in [
        (
            "Content-Length: 7\r\nTransfer-Encoding: chunked\r\n",
            LengthAndEncoding,
        ),
        ("Content-Length: 7\r\nContent-Length: 7\r\n", LengthRepeated),
        ("Transfer-Encoding: gzip, chunked\r\n", EncodingUnknown),
        ("X: a\r\n b\r\n", FoldedLine),
        ("X : a\r\n", FieldName),
        ("X: a\n", BareLineFeed),
    ] {
        assert_eq!(answer(lines).unwrap_err(), error, "{lines}");
    }
    for (text, error) in [
        (&b"HTTP/1.1 20 OK\r\n\r\n"[..], StartLine),
        (b"HTTP/1.1 099 OK\r\n\r\n", StartLine),
        (b"HTTP/1.1  200 OK\r\n\r\n", StartLine),
        (b"HTTP/1.1 200 O\x01K\r\n\r\n", StartLine),
        (b"HTTP/2.0 200 OK\r\n\r\n", Version),
        (b"ICY 200", NotHttp),
    ] {
        let found = ResponseHead::new().parse(text, Method::Get).unwrap_err();
        assert_eq!(found, error, "{}", text.escape_ascii());
    }
    let long = [b"HTTP/1.1 200 ".as_slice(), &vec![b'a'; HEAD_BYTES_MAX]].concat();
    assert_eq!(ResponseHead::new().parse(&long, Method::Get), Err(TooLarge));
}
