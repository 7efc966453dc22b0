//! Requests that two programs could read differently are refused, the connection is closed, and nothing of them
//! reaches an upstream. Each shape holds a request that an upstream would count if it were let through.

mod support;

use std::{
    io::Write,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use gateway_bench::upstream::Server;
use support::{
    Gateway, KEY, Setup,
    client::{Client, chat, chat_request, raw},
    eventually, fleet,
    scripted::{Scripted, Then},
};

/// A gateway that answers at once, and what stands behind it.
fn pair() -> (Server, Gateway) {
    let fleet = fleet("tokens=1,pace=0,first=0");
    let gateway = Setup::new(fleet.url()).start();
    (fleet, gateway)
}

/// Sends the bytes and takes all that comes until the gateway closes.
fn exchange(gateway: &Gateway, bytes: &[u8]) -> String {
    let mut client = Client::connect(gateway.addr());
    client.send(bytes);
    let came = client
        .rest()
        .unwrap_or_else(|error| panic!("{error}: not answered and closed: {}", bytes.escape_ascii()));
    String::from_utf8_lossy(&came).into_owned()
}

/// The statuses of all answers in a text.
fn statuses(text: &str) -> Vec<u16> {
    let lines = text.split("HTTP/1.1 ").skip(1);
    lines.map(|line| line[..3].parse().expect("a status")).collect()
}

/// Sends each shape on a connection of its own: one answer with its status, then the end; and upstream sees nothing.
fn all_refused(shapes: &[(u16, &str, Vec<u8>)]) {
    let (fleet, gateway) = pair();
    for (status, name, bytes) in shapes {
        // What a confused reader would take for the next request.
        let bytes = [bytes.as_slice(), &chat_request("fast", false)].concat();
        let text = exchange(&gateway, &bytes);
        assert_eq!(statuses(&text), [*status], "{name}: {text}");
        assert!(
            text.to_lowercase().contains("\r\nconnection: close\r\n"),
            "{name}: {text}"
        );
        assert!(text.contains("\"error\""), "{name}: {text}");
        let stats = fleet.stats();
        assert_eq!((stats.requests, stats.bad_requests), (0, 0), "{name}");
    }
    // The gateway is as well as before.
    let mut client = Client::connect(gateway.addr());
    client.send(chat_request("fast", false));
    assert_eq!(client.answer().status, 200);
    assert_eq!(fleet.stats().requests, 1);
}

/// A chat body in one chunk.
fn chunked(body: &str) -> String {
    format!("{:x}\r\n{body}\r\n0\r\n\r\n", body.len())
}

#[test]
fn lengths_that_contradict_each_other() {
    let body = chat("fast", false);
    let length = body.len();
    let with = |fields: String| raw(&fields, &body);
    let coded = |fields: String| raw(&fields, &chunked(&body));
    let one = |value: &str| with(format!("content-length: {value}\r\n"));
    all_refused(&[
        (
            400,
            "length, then coding",
            coded(format!(
                "content-length: {length}\r\ntransfer-encoding: chunked\r\n"
            )),
        ),
        (
            400,
            "coding, then length",
            coded(format!(
                "transfer-encoding: chunked\r\ncontent-length: {length}\r\n"
            )),
        ),
        (
            400,
            "length 0 and coding",
            coded("content-length: 0\r\ntransfer-encoding: chunked\r\n".into()),
        ),
        (
            400,
            "length and unknown coding",
            coded(format!("content-length: {length}\r\ntransfer-encoding: x\r\n")),
        ),
        (
            400,
            "two equal lengths",
            with(format!(
                "content-length: {length}\r\ncontent-length: {length}\r\n"
            )),
        ),
        (
            400,
            "two lengths",
            with(format!("content-length: {length}\r\nContent-Length: 0\r\n")),
        ),
        (400, "a list of lengths", one(&format!("{length}, {length}"))),
        (400, "a list with nothing", one(&format!("{length},"))),
        (400, "a sign", one(&format!("+{length}"))),
        (400, "a minus", one("-1")),
        (400, "hex", one("0x10")),
        (400, "a fraction", one("5.0")),
        (400, "an exponent", one("1e2")),
        (400, "an inner space", one("1 0")),
        (400, "no digit", one("")),
        (400, "a quoted number", one(&format!("\"{length}\""))),
        (400, "over 64 bits", one("18446744073709551616")),
        (400, "wide digits", one("\u{ff11}\u{ff12}")),
        (400, "a vertical tab", one(&format!("\u{b}{length}"))),
        (
            400,
            "a NUL behind",
            with(format!("content-length: {length}\0\r\n")),
        ),
    ]);
}

#[test]
fn transfer_codings_that_hide_or_repeat() {
    let body = chunked(&chat("fast", false));
    let coding = |value: &str| raw(&format!("transfer-encoding: {value}\r\n"), &body);
    let lines = |fields: &str| raw(fields, &body);
    let mut old = lines("transfer-encoding: chunked\r\n");
    let version = memchr::memmem::find(&old, b"HTTP/1.1").expect("a version");
    old[version + 7] = b'0';
    all_refused(&[
        (400, "xchunked", coding("xchunked")),
        (400, "chunkedx", coding("chunkedx")),
        (400, "identity", coding("identity")),
        (400, "gzip", coding("gzip")),
        (400, "chunked twice", coding("chunked, chunked")),
        (400, "chunked, identity", coding("chunked, identity")),
        (400, "chunked, gzip", coding("chunked, gzip")),
        (501, "gzip, chunked", coding("gzip, chunked")),
        (400, "an empty element", coding(", chunked")),
        (400, "nothing", coding("")),
        (400, "a parameter", coding("chunked;q=1")),
        (400, "quoted", coding("\"chunked\"")),
        (400, "in an apostrophe", coding("'chunked'")),
        (400, "a vertical tab", coding("\u{b}chunked")),
        (400, "a form feed", coding("chunked\u{c}")),
        (400, "a NUL", coding("chunked\0")),
        (400, "a bare CR", coding("chunked\rx")),
        (400, "a no-break space", coding("chunked\u{a0}")),
        (
            400,
            "two lines",
            lines("transfer-encoding: chunked\r\ntransfer-encoding: chunked\r\n"),
        ),
        (
            400,
            "a second line that undoes it",
            lines("transfer-encoding: chunked\r\nTransfer-Encoding: identity\r\n"),
        ),
        (
            400,
            "a blank before the colon",
            lines("transfer-encoding : chunked\r\n"),
        ),
        (
            400,
            "a tab before the colon",
            lines("transfer-encoding\t: chunked\r\n"),
        ),
        (400, "folded", lines("transfer-encoding:\r\n chunked\r\n")),
        (
            400,
            "folded onto another",
            lines("x-a: b\r\n\ttransfer-encoding: chunked\r\n"),
        ),
        (400, "in HTTP/1.0", old),
    ]);
}

#[test]
fn lines_and_fields_that_break_the_grammar() {
    let body = chat("fast", false);
    let length = format!("content-length: {}\r\n", body.len());
    let with = |field: &str| raw(&format!("{field}{length}"), &body);
    let bare = raw(&format!("content-length: {}\n", body.len()), &body);
    let all_bare = String::from_utf8(raw(&length, &body))
        .expect("text")
        .replace("\r\n", "\n");
    all_refused(&[
        (400, "a bare LF", bare),
        (400, "bare LFs only", all_bare.into_bytes()),
        (400, "a bare LF in a value", with("x-a: b\nx-c: d\r\n")),
        (
            400,
            "a bare CR in a value",
            with("x-a: b\rtransfer-encoding: chunked\r\n"),
        ),
        (400, "CR CR LF", with("x-a: b\r\r\n")),
        (400, "a fold by a space", with("x-a: b\r\n c\r\n")),
        (400, "a fold by a tab", with("x-a: b\r\n\tc\r\n")),
        (400, "a NUL in a value", with("x-a: b\0c\r\n")),
        (400, "a NUL in a name", with("x\0a: b\r\n")),
        (400, "a DEL in a value", with("x-a: b\x7f\r\n")),
        (400, "no colon", with("x-a\r\n")),
        (400, "no name", with(": b\r\n")),
        (400, "a blank in a name", with("x a: b\r\n")),
        (400, "a blank before the colon", with("x-a : b\r\n")),
        (400, "a letter that is none", with("x-\u{e4}: b\r\n")),
        (400, "parentheses in a name", with("x(a): b\r\n")),
        (
            400,
            "a connection option with a blank",
            with("connection: a b\r\n"),
        ),
        (417, "another expectation", with("expect: 200-ok\r\n")),
        (417, "two expectations", with("expect: 100-continue, x\r\n")),
        (
            431,
            "a head too long",
            with(&format!("x-a: {}\r\n", "b".repeat(40_000))),
        ),
        (431, "too many fields", with(&"x-a: b\r\n".repeat(101))),
    ]);
}

#[test]
fn request_lines_and_hosts() {
    let body = chat("fast", false);
    let rest = format!(
        "authorization: Bearer {KEY}\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    let line = |line: &str| format!("{line}\r\nhost: test\r\n{rest}").into_bytes();
    let hosts = |hosts: &str| format!("POST /v1/chat/completions HTTP/1.1\r\n{hosts}{rest}").into_bytes();
    all_refused(&[
        (505, "HTTP/2.0", line("POST /v1/chat/completions HTTP/2.0")),
        (505, "HTTP/1.2", line("POST /v1/chat/completions HTTP/1.2")),
        (505, "HTTP/0.9", line("POST /v1/chat/completions HTTP/0.9")),
        (400, "HTTP/1.10", line("POST /v1/chat/completions HTTP/1.10")),
        (400, "http/1.1", line("POST /v1/chat/completions http/1.1")),
        (400, "no version", line("POST /v1/chat/completions")),
        (400, "two blanks", line("POST  /v1/chat/completions HTTP/1.1")),
        (400, "a tab", line("POST\t/v1/chat/completions\tHTTP/1.1")),
        (400, "a blank behind", line("POST /v1/chat/completions HTTP/1.1 ")),
        (
            400,
            "a target with a blank",
            line("POST /v1/chat/completions x HTTP/1.1"),
        ),
        (400, "a fragment", line("POST /v1/chat/completions#x HTTP/1.1")),
        (400, "no slash", line("POST v1/chat/completions HTTP/1.1")),
        (
            400,
            "another scheme",
            line("POST ftp://test/v1/chat/completions HTTP/1.1"),
        ),
        (
            400,
            "no authority",
            line("POST http:///v1/chat/completions HTTP/1.1"),
        ),
        (
            400,
            "a user",
            line("POST http://a@b/v1/chat/completions HTTP/1.1"),
        ),
        (400, "an authority", line("CONNECT test:80 HTTP/1.1")),
        (400, "a star", line("POST * HTTP/1.1")),
        (400, "a method that is none", line("PO(ST / HTTP/1.1")),
        (
            414,
            "a target too long",
            line(&format!("POST /{} HTTP/1.1", "a".repeat(40_000))),
        ),
        (
            505,
            "an HTTP/2 preface",
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec(),
        ),
        (400, "a TLS hello", b"\x16\x03\x01\x02\x00\x01\x00".to_vec()),
        (
            400,
            "two empty lines before",
            [b"\r\n\r\n".as_slice(), &chat_request("fast", false)].concat(),
        ),
        (400, "a blank before", b" ".to_vec()),
        (400, "no host", hosts("")),
        (400, "two hosts", hosts("host: test\r\nhost: test\r\n")),
        (400, "two hosts in one", hosts("host: a, b\r\n")),
        (400, "a host with a user", hosts("host: a@b\r\n")),
        (400, "a host with a path", hosts("host: a/b\r\n")),
        (400, "a host with a blank", hosts("host: a b\r\n")),
        (400, "a port that is none", hosts("host: a:b\r\n")),
        (400, "a blank before the first field", hosts(" host: test\r\n")),
    ]);
}

#[test]
fn chunks_that_break_the_grammar() {
    let body = chat("fast", false);
    let length = body.len();
    let sent = |text: String| raw("transfer-encoding: chunked\r\n", &text);
    let sized = |size: &str| sent(format!("{size}\r\n{body}\r\n0\r\n\r\n"));
    let ended = |end: &str| sent(format!("{length:x}\r\n{body}{end}"));
    let long = "x".repeat(300);
    all_refused(&[
        (400, "a sign", sized(&format!("+{length:x}"))),
        (400, "a minus", sized(&format!("-{length:x}"))),
        (400, "0x", sized(&format!("0x{length:x}"))),
        (400, "a blank before", sized(&format!(" {length:x}"))),
        (400, "a blank behind", sized(&format!("{length:x} "))),
        (400, "a blank before `;`", sized(&format!("{length:x} ;a=b"))),
        (400, "an underscore", sized(&format!("{length:x}_0"))),
        (400, "no hex", sized("g")),
        (400, "no size", sized("")),
        (400, "only an extension", sized(";a=b")),
        (400, "17 digits", sized(&format!("0000000000000000{length:02x}"))),
        (400, "a size that overflows", sized(&format!("1{:016x}", length))),
        (400, "a NUL in an extension", sized(&format!("{length:x};a\0b"))),
        (
            400,
            "a bare LF in an extension",
            sent(format!("{length:x};a\n{body}\r\n0\r\n\r\n")),
        ),
        (
            400,
            "a bare CR in an extension",
            sent(format!("{length:x};a\rb\r\n{body}\r\n0\r\n\r\n")),
        ),
        (400, "an extension too long", sized(&format!("{length:x};{long}"))),
        (
            400,
            "a bare LF behind the size",
            sent(format!("{length:x}\n{body}\r\n0\r\n\r\n")),
        ),
        (
            400,
            "a bare CR behind the size",
            sent(format!("{length:x}\r{body}")),
        ),
        (400, "no CRLF behind the chunk", ended("0\r\n\r\n")),
        (400, "a bare LF behind the chunk", ended("\n0\r\n\r\n")),
        (400, "two bytes too many", ended("xx\r\n0\r\n\r\n")),
        (400, "a bare LF at the end", ended("\r\n0\r\n\n")),
        (400, "a trailer that is none", ended("\r\n0\r\nx\r\n\r\n")),
        (
            400,
            "a trailer with a blank before the colon",
            ended("\r\n0\r\nx : y\r\n\r\n"),
        ),
        (400, "a folded trailer", ended("\r\n0\r\n x: y\r\n\r\n")),
        (
            400,
            "trailers too long",
            ended(&format!("\r\n0\r\n{}\r\n", format!("x: {long}\r\n").repeat(40))),
        ),
    ]);
}

/// An answer that was given before the body was read must not make the body the next request.
#[test]
fn a_body_that_was_not_read_is_no_request() {
    let (fleet, gateway) = pair();
    let inner = String::from_utf8(chat_request("fast", false)).expect("text");
    let outer = |line: &str, key: &str, length: usize| {
        format!(
            "{line} HTTP/1.1\r\nhost: test\r\nauthorization: Bearer {key}\r\ncontent-length: {length}\r\n\r\n{inner}"
        )
    };
    let length = inner.len();
    for (status, request) in [
        (200, outer("GET /healthz", KEY, length)),
        (200, outer("GET /v1/models", KEY, length)),
        (401, outer("POST /v1/chat/completions", "wrong", length)),
        (404, outer("POST /v1/nothing", KEY, length)),
        (405, outer("GET /v1/chat/completions", KEY, length)),
        (405, outer("DELETE /v1/models", KEY, length)),
        (413, outer("POST /v1/chat/completions", KEY, 1 << 40)),
    ] {
        let text = exchange(&gateway, request.as_bytes());
        assert_eq!(statuses(&text), [status], "{request}: {text}");
    }
    assert_eq!(fleet.stats().requests, 0);
}

/// Odd, and right: they are served, and the next request on the connection too.
#[test]
fn what_is_odd_and_valid_is_served() {
    let (fleet, gateway) = pair();
    let body = chat("fast", false);
    let length = body.len();
    let plain = format!("content-length: {length}\r\n");
    let coded = "transfer-encoding: chunked\r\n";
    let target = |target: &str| {
        let text = String::from_utf8(chat_request("fast", false)).expect("text");
        text.replacen("/v1/chat/completions", target, 1).into_bytes()
    };
    let requests = [
        (
            "an empty line before",
            [b"\r\n".as_slice(), &chat_request("fast", false)].concat(),
        ),
        (
            "leading zeros",
            raw(&format!("content-length: 000{length}\r\n"), &body),
        ),
        (
            "blanks around a value",
            raw(&format!("content-length: \t {length} \t\r\n"), &body),
        ),
        ("no blank", raw(&format!("content-length:{length}\r\n"), &body)),
        (
            "a name in capitals",
            raw("TRANSFER-ENCODING: CHUNKED\r\n", &chunked(&body)),
        ),
        (
            "an extension",
            raw(coded, &format!("{length:x};a=\"b\";c\r\n{body}\r\n0;d\r\n\r\n")),
        ),
        (
            "a size with zeros, in capitals",
            raw(coded, &format!("00{length:X}\r\n{body}\r\n000\r\n\r\n")),
        ),
        (
            "trailers",
            raw(
                coded,
                &format!("{length:x}\r\n{body}\r\n0\r\ncontent-length: 9\r\nhost: b\r\n\r\n"),
            ),
        ),
        (
            "an absolute target",
            target("http://other.example:80/v1/chat/completions"),
        ),
        (
            "an absolute target in capitals",
            target("HTTP://TEST/v1/chat/completions"),
        ),
        ("a query", target("/v1/chat/completions?a=b")),
        (
            "an upgrade that is not wanted",
            raw(
                &format!(
                    "connection: upgrade, http2-settings\r\nupgrade: h2c\r\nhttp2-settings: x\r\n{plain}"
                ),
                &body,
            ),
        ),
        (
            "a connection that names the length",
            raw(
                &format!("connection: content-length, host, x-secret\r\nx-secret: 1\r\n{plain}"),
                &body,
            ),
        ),
        (
            "empty values",
            raw(&format!("x-a:\r\nx-b: \r\nconnection: ,\r\n{plain}"), &body),
        ),
        (
            "bytes over 127 in a value",
            raw(&format!("x-a: \u{e9}\r\n{plain}"), &body),
        ),
    ];
    let count = requests.len() as u64;
    let mut client = Client::connect(gateway.addr());
    for (name, bytes) in requests {
        client.send(bytes);
        let answer = client.answer();
        assert_eq!(answer.status, 200, "{name}: {}", answer.text());
        assert!(answer.keep_alive, "{name}");
        let last = fleet.last();
        assert_eq!(last.target().1, "/v1/chat/completions", "{name}");
        assert_eq!(
            last.header("content-length"),
            Some(last.body.len().to_string()),
            "{name}"
        );
        for field in [
            "transfer-encoding",
            "upgrade",
            "connection",
            "http2-settings",
            "x-secret",
            "trailer",
        ] {
            assert_eq!(last.header(field), None, "{name}");
        }
        let hosts = last
            .fields()
            .iter()
            .filter(|(name, _)| name.eq_ignore_ascii_case("host"))
            .count();
        assert_eq!(hosts, 1, "{name}");
        assert_eq!(last.header("host"), Some(fleet.addr().to_string()), "{name}");
    }
    assert_eq!(fleet.stats().requests, count);
}

#[test]
fn a_request_may_be_cut_at_every_byte() {
    let (fleet, gateway) = pair();
    let body = chat("fast", false);
    let (first, second) = body.split_at(7);
    let request = raw(
        "transfer-encoding: chunked\r\n",
        &format!(
            "7;a=b\r\n{first}\r\n{:x}\r\n{second}\r\n0\r\nx: y\r\n\r\n",
            second.len()
        ),
    );
    let mut client = Client::connect(gateway.addr());
    for cut in 1..request.len() {
        client.send(&request[..cut]);
        client.send(&request[cut..]);
        assert_eq!(client.answer().status, 200, "cut at {cut}");
    }
    for byte in &request {
        client.send([*byte]);
    }
    assert_eq!(client.answer().status, 200);
    assert_eq!(fleet.stats().requests, request.len() as u64);
}

#[test]
fn a_bad_request_is_bad_wherever_it_is_cut() {
    let (fleet, gateway) = pair();
    let body = chat("fast", false);
    let request = raw(
        &format!("content-length: {}\r\ntransfer-encoding: chunked\r\n", body.len()),
        &chunked(&body),
    );
    let head = memchr::memmem::find(&request, b"\r\n\r\n").expect("a head") + 4;
    for cut in 1..head {
        let mut client = Client::connect(gateway.addr());
        client.send(&request[..cut]);
        client.send(&request[cut..]);
        assert_eq!(client.answer().status, 400, "cut at {cut}");
        assert!(client.is_closed(), "cut at {cut}");
    }
    assert_eq!(fleet.stats().requests, 0);
}

/// The other direction: what an upstream may not say is a bad gateway, and never part of an answer.
#[test]
fn malformed_answers_of_an_upstream() {
    let body = r#"{"choices":[]}"#;
    let length = body.len();
    let head = |fields: &str| format!("HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n{fields}\r\n");
    let with = |fields: &str| head(fields) + body;
    let coded = |text: &str| head("transfer-encoding: chunked\r\n") + text;
    for (name, answer) in [
        (
            "length and coding",
            with(&format!(
                "content-length: {length}\r\ntransfer-encoding: chunked\r\n"
            )),
        ),
        (
            "two lengths",
            with(&format!("content-length: {length}\r\ncontent-length: 5\r\n")),
        ),
        (
            "a list of lengths",
            with(&format!("content-length: {length}, {length}\r\n")),
        ),
        ("a sign", with(&format!("content-length: +{length}\r\n"))),
        (
            "a bare LF",
            with(&format!("content-length: {length}\nx-a: b\r\n")),
        ),
        (
            "a fold",
            with(&format!("x-a: b\r\n c\r\ncontent-length: {length}\r\n")),
        ),
        (
            "a blank before the colon",
            with(&format!("content-length : {length}\r\n")),
        ),
        ("a NUL", with(&format!("x-a: \0\r\ncontent-length: {length}\r\n"))),
        (
            "a bare CR",
            with(&format!("x-a: b\rset-cookie: c\r\ncontent-length: {length}\r\n")),
        ),
        ("an unknown coding", with("transfer-encoding: x\r\n")),
        ("chunked twice", with("transfer-encoding: chunked, chunked\r\n")),
        (
            "a status that is none",
            format!("HTTP/1.1 20 OK\r\ncontent-length: {length}\r\n\r\n{body}"),
        ),
        (
            "another protocol",
            format!("ICY 200 OK\r\ncontent-length: {length}\r\n\r\n{body}"),
        ),
        (
            "another version",
            format!("HTTP/2.0 200 OK\r\ncontent-length: {length}\r\n\r\n{body}"),
        ),
        (
            "a switch of protocols",
            "HTTP/1.1 101 Switching\r\nupgrade: x\r\n\r\n".to_string(),
        ),
        (
            "a head too long",
            with(&format!("x-a: {}\r\n", "b".repeat(40_000))),
        ),
        (
            "a chunk size that is none",
            coded(&format!("0x{length:x}\r\n{body}\r\n0\r\n\r\n")),
        ),
        (
            "no CRLF behind a chunk",
            coded(&format!("{length:x}\r\n{body}0\r\n\r\n")),
        ),
        ("a body that is cut", head("content-length: 100\r\n") + body),
        ("chunks that are cut", coded(&format!("{length:x}\r\n{body}\r\n"))),
    ] {
        let upstream = Scripted::saying(answer, Then::Close);
        let gateway = Setup::new(upstream.url()).start();
        let mut client = Client::connect(gateway.addr());
        client.send(chat_request("fast", false));
        let answer = client.answer();
        assert_eq!(answer.status, 502, "{name}: {}", answer.text());
        assert_eq!(answer.json()["error"]["type"], "server_error", "{name}");
        assert!(!answer.text().contains("choices"), "{name}");
        assert_eq!(upstream.requests().len(), 1, "{name}");
    }
}

/// A second answer behind the first, with it or after it, belongs to nobody. (One that comes when the next request is on
/// its way cannot be told from that request's answer: HTTP/1.1 has no other link between them than their order.)
#[test]
fn what_follows_an_upstreams_answer_is_not_the_next_one() {
    let answer = |text: &str| {
        let body = format!(r#"{{"said":"{text}"}}"#);
        format!(
            "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        )
    };
    for late in [false, true] {
        let (right, planted) = (answer("right"), answer("planted"));
        let planted_count = Arc::new(AtomicUsize::new(0));
        let planted_so_far = planted_count.clone();
        let upstream = Scripted::start(move |socket, _| {
            if late {
                let _ = socket.write_all(right.as_bytes());
                let _ = socket.write_all(planted.as_bytes());
            } else {
                let _ = socket.write_all([right.as_bytes(), planted.as_bytes()].concat().as_slice());
            }
            planted_count.fetch_add(1, Ordering::Release);
            Then::Keep
        });
        let gateway = Setup::new(upstream.url()).workers(1, "auto").start();
        let mut client = Client::connect(gateway.addr());
        for number in 0..20 {
            client.send(chat_request("fast", false));
            let answer = client.answer();
            assert_eq!(
                (answer.status, answer.text().as_str()),
                (200, r#"{"said":"right"}"#)
            );
            // Over loopback what was written has arrived.
            eventually("the second answer", || {
                (planted_so_far.load(Ordering::Acquire) > number).then_some(())
            });
        }
    }
}
