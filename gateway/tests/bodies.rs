//! Request bodies: large, in pieces, slow, malformed, too large, too many.

mod support;

use std::{
    io::Write,
    net::TcpStream,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
};

use support::{
    Gateway, KEY, PATIENCE, Setup,
    client::{Answer, Client, chat},
    eventually, fleet,
};

const CHAT: &str = "/v1/chat/completions";
const QUICK: &str = "tokens=3,pace=0,first=0";

/// A chat body of exactly `bytes` bytes.
fn body_of(bytes: usize) -> String {
    let body = chat("fast", false);
    let filler = "x".repeat(
        bytes
            .checked_sub(body.len())
            .expect("room for the request itself"),
    );
    body.replace("hello there", &format!("hello there{filler}"))
}

/// What the upstream must get for it.
fn as_sent(body: &str) -> String {
    body.replacen("\"fast\"", "\"sim\"", 1)
}

fn assert_error(answer: &Answer, status: u16, code: &str, param: Option<&str>) {
    assert_eq!(answer.status, status, "{}", answer.text());
    let error = &answer.json()["error"];
    assert_eq!(error["code"], code, "{error}");
    assert_eq!(error["param"].as_str(), param, "{error}");
}

fn head(fields: &str) -> String {
    format!("POST {CHAT} HTTP/1.1\r\nhost: test\r\nauthorization: Bearer {KEY}\r\n{fields}\r\n")
}

/// `body` in chunks of these sizes, again and again.
fn chunked(body: &str, sizes: &[usize]) -> Vec<u8> {
    let (mut out, mut rest) = (Vec::new(), body.as_bytes());
    for size in sizes.iter().cycle() {
        if rest.is_empty() {
            break;
        }
        let (chunk, after) = rest.split_at((*size).min(rest.len()));
        let _ = write!(out, "{:X};name=\"value\"\r\n", chunk.len());
        out.extend_from_slice(chunk);
        out.extend_from_slice(b"\r\n");
        rest = after;
    }
    out.extend_from_slice(b"0\r\nx-trailer: dropped\r\n\r\n");
    out
}

/// A gateway whose bounds are small.
fn bounded(upstream: &str, http: &str) -> Gateway {
    Setup::new(upstream)
        .workers(1, "auto")
        .more(&format!("http: {http}\n"))
        .start()
}

/// Sends without end until the gateway stops it; true when it did.
fn flood(mut socket: TcpStream, stop: &AtomicBool, piece: &[u8]) -> bool {
    socket.set_write_timeout(Some(PATIENCE)).expect("an option");
    while !stop.load(Ordering::Acquire) {
        if socket.write_all(piece).is_err() {
            return true;
        }
    }
    false
}

#[test]
fn large_bodies_arrive_byte_for_byte() {
    let fleet = fleet(QUICK);
    for driver in ["auto", "epoll"] {
        let gateway = Setup::new(fleet.url()).workers(2, driver).start();
        let mut client = Client::connect(gateway.addr());
        for bytes in [65_535, 65_536, 1 << 20, 8 << 20] {
            let body = body_of(bytes);
            client.post(CHAT, &body);
            assert_eq!(client.answer().status, 200);
            assert!(
                fleet.last().body == as_sent(&body).as_bytes(),
                "{bytes} bytes, {driver}"
            );
        }
        let body = body_of(8 << 20);
        client.send(head("transfer-encoding: chunked\r\n"));
        client.send(chunked(&body, &[1, 100_000, 7, 65_536]));
        assert_eq!(client.answer().status, 200);
        assert!(
            fleet.last().body == as_sent(&body).as_bytes(),
            "chunked, {driver}"
        );
        let records = gateway.await_records(5);
        assert_eq!(
            records.iter().filter(|record| record.bytes_in == 8 << 20).count(),
            2
        );
    }
}

#[test]
fn a_body_may_be_cut_anywhere() {
    let fleet = fleet(QUICK);
    let gateway = Setup::new(fleet.url()).start();
    let body = chat("fast", false);
    let mut messages = vec![head("transfer-encoding: chunked\r\n").into_bytes()];
    messages[0].extend(chunked(&body, &[1, 2, 30]));
    let mut with_length = head(&format!("content-length: {}\r\n", body.len())).into_bytes();
    with_length.extend_from_slice(body.as_bytes());
    messages.push(with_length);
    let mut client = Client::connect(gateway.addr());
    let mut count = 0;
    for message in &messages {
        // One byte a segment, then every cut in two.
        for byte in message {
            client.send([*byte]);
        }
        assert_eq!(client.answer().status, 200);
        for cut in (1..message.len()).step_by(3) {
            client.send(&message[..cut]);
            client.send(&message[cut..]);
            let answer = client.answer();
            assert_eq!(answer.status, 200, "cut at {cut}: {}", answer.text());
            count += 1;
        }
        assert_eq!(fleet.last().body, as_sent(&body).as_bytes());
    }
    assert_eq!(fleet.stats().requests, count + 2);
    assert_eq!(fleet.stats().bad_requests, 0);
}

#[test]
fn requests_may_be_pipelined() {
    let fleet = fleet(QUICK);
    let gateway = Setup::new(fleet.url()).start();
    let mut client = Client::connect(gateway.addr());
    let mut bytes = Vec::new();
    for round in 0..20 {
        let body = chat("fast", round % 2 == 0);
        if round % 3 == 0 {
            bytes.extend_from_slice(head("transfer-encoding: chunked\r\n").as_bytes());
            bytes.extend(chunked(&body, &[10]));
        } else {
            bytes.extend_from_slice(head(&format!("content-length: {}\r\n", body.len())).as_bytes());
            bytes.extend_from_slice(body.as_bytes());
        }
        bytes.extend_from_slice(b"GET /healthz HTTP/1.1\r\nhost: test\r\n\r\n");
    }
    client.send(bytes);
    for round in 0..20 {
        let answer = client.answer();
        assert_eq!(answer.status, 200, "round {round}");
        let is_stream = answer
            .field("content-type")
            .expect("a type")
            .starts_with("text/event-stream");
        assert_eq!(is_stream, round % 2 == 0);
        assert_eq!(client.answer().text(), r#"{"status":"ok"}"#);
    }
    assert_eq!(gateway.await_records(20).len(), 20);
}

#[test]
fn a_client_that_asks_first_is_told_to_go_on() {
    let fleet = fleet(QUICK);
    let gateway = bounded(&fleet.url(), "{ body_max: 64KiB, bodies_max: 1MiB }");
    let body = chat("fast", false);
    for framing in [
        format!("content-length: {}\r\n", body.len()),
        "transfer-encoding: chunked\r\n".into(),
    ] {
        let mut client = Client::connect(gateway.addr());
        client.send(head(&format!("expect: 100-continue\r\n{framing}")));
        let interim = client.receive_until(b"\r\n\r\n");
        assert_eq!(interim, b"HTTP/1.1 100 Continue\r\n\r\n");
        match framing.starts_with('t') {
            true => client.send(chunked(&body, &[9])),
            false => client.send(&body),
        }
        let answer = client.answer();
        assert_eq!((answer.status, answer.keep_alive), (200, true));
    }
    // A no comes instead of the go-ahead: nothing of the body need be sent.
    for (fields, status) in [
        ("content-length: 100000\r\n", 413),
        ("content-length: 10\r\nx-none: 1\r\n", 401),
    ] {
        let mut client = Client::connect(gateway.addr());
        let mut head = head(&format!("expect: 100-continue\r\n{fields}"));
        if status == 401 {
            head = head.replace(KEY, "sk-wrong");
        }
        client.send(head);
        let received = client.rest().expect("an answer and the end");
        let text = String::from_utf8_lossy(&received);
        assert!(text.starts_with(&format!("HTTP/1.1 {status} ")), "{text}");
        assert!(text.contains("\r\nconnection: close\r\n"));
    }
    // HTTP/1.0 knows no interim answers (RFC 9110, section 10.1.1).
    let mut client = Client::connect(gateway.addr());
    client.send(
        head(&format!(
            "expect: 100-continue\r\ncontent-length: {}\r\n",
            body.len()
        ))
        .replace("HTTP/1.1", "HTTP/1.0"),
    );
    client.send(&body);
    assert!(client.receive_until(b"\r\n").starts_with(b"HTTP/1.1 200 "));
}

#[test]
fn a_body_over_the_bound_is_refused_while_it_comes() {
    let fleet = fleet(QUICK);
    let gateway = bounded(&fleet.url(), "{ body_max: 64KiB, bodies_max: 1MiB }");
    // Just within, with either framing.
    let mut client = Client::connect(gateway.addr());
    let body = body_of(64 << 10);
    client.post(CHAT, &body);
    assert_eq!(client.answer().status, 200);
    client.send(head("transfer-encoding: chunked\r\n"));
    client.send(chunked(&body, &[10_000]));
    assert_eq!(client.answer().status, 200);
    // A length that says it beforehand; chunks that do not; each sent on and on.
    let piece: Vec<u8> = [b"1000\r\n".to_vec(), vec![b' '; 0x1000], b"\r\n".to_vec()].concat();
    for fields in [
        "content-length: 999999999999\r\n",
        "transfer-encoding: chunked\r\n",
    ] {
        let mut client = Client::connect(gateway.addr());
        client.send(head(fields));
        let stop = Arc::new(AtomicBool::new(false));
        let (socket, stopped, piece) = (
            client.socket.try_clone().expect("a socket"),
            stop.clone(),
            piece.clone(),
        );
        let flooding = thread::spawn(move || flood(socket, &stopped, &piece));
        let answer = client.answer();
        assert_error(&answer, 413, "request_too_large", None);
        assert!(!answer.keep_alive);
        // It does not take the flood for ever.
        assert!(flooding.join().expect("no panic"));
        stop.store(true, Ordering::Release);
    }
    for one_more in ["content-length: 65537\r\n", "transfer-encoding: chunked\r\n"] {
        let mut client = Client::connect(gateway.addr());
        client.send(head(one_more));
        match one_more.starts_with('t') {
            true => client.send(chunked(&body_of(65_537), &[65_536])),
            false => client.send(body_of(65_537)),
        }
        assert_error(&client.answer(), 413, "request_too_large", None);
    }
    assert_eq!(gateway.await_records(2).len(), 2);
    assert_eq!(fleet.stats().requests, 2);
}

#[test]
fn slow_heads_and_bodies_are_given_up() {
    let fleet = fleet(QUICK);
    let gateway = bounded(
        &fleet.url(),
        "{ head_timeout: 300ms, body_timeout: 300ms, idle_timeout: 300ms }",
    );
    let whole = head("content-length: 100\r\n");
    let chunks = head("transfer-encoding: chunked\r\n") + "5\r\n{\"mod\r\n";
    for (sent, what) in [
        (&whole[..1], "head"),
        (&whole[..40], "head"),
        (&whole[..whole.len() - 1], "head"),
        (&whole[..], "body"),
        (&chunks[..], "body"),
        (&(whole.clone() + "{\"model\":")[..], "body"),
    ] {
        let mut client = Client::connect(gateway.addr());
        client.send(sent);
        let answer = client.answer();
        assert_error(&answer, 408, "request_timeout", None);
        assert!(answer.text().contains(what), "{}", answer.text());
        assert!(!answer.keep_alive && client.is_closed());
    }
    // A head that trickles has one time for all of it.
    let mut client = Client::connect(gateway.addr());
    let mut socket = client.socket.try_clone().expect("a socket");
    let trickle = thread::spawn(move || {
        let _ = socket.write_all(b"GET /healthz HTTP/1.1\r\nx: ");
        while socket.write_all(b"y").is_ok() {
            thread::sleep(std::time::Duration::from_millis(20));
        }
    });
    assert_error(&client.answer(), 408, "request_timeout", None);
    assert!(client.is_closed());
    drop(client);
    trickle.join().expect("no panic");
    // Silence between requests is no fault: no answer, only the end.
    let mut client = Client::connect(gateway.addr());
    assert_eq!(client.rest().expect("the end"), b"");
    let mut client = Client::connect(gateway.addr());
    client.get("/healthz");
    assert_eq!(client.answer().status, 200);
    assert_eq!(client.rest().expect("the end"), b"");
    assert_eq!(fleet.stats().requests, 0);
}

#[test]
fn malformed_bodies_and_wrong_fields_are_named() {
    let fleet = fleet(QUICK);
    let gateway = Setup::new(fleet.url()).start();
    let deep = format!(
        "{{\"model\":\"fast\",\"x\":{}{}}}",
        "[".repeat(100_000),
        "]".repeat(100_000)
    );
    let table: &[(&str, Option<&str>)] = &[
        ("", None),
        (" ", None),
        ("[]", None),
        ("null", None),
        ("\"fast\"", None),
        ("{", None),
        ("{\"model\":\"fast\"", None),
        ("{\"model\":\"fast\",}", None),
        ("{\"model\":\"fast\"} x", None),
        ("{\"model\":\"fast\"}{\"model\":\"fast\"}", None),
        ("{'model':'fast'}", None),
        ("{\"model\":\"fa\nst\"}", None),
        ("{\"model\":\"fast\",\"x\":01}", None),
        ("{\"model\":\"fast\",\"x\":nul}", None),
        (&deep, None),
        ("{}", Some("model")),
        ("{\"model\":7}", Some("model")),
        ("{\"model\":null}", Some("model")),
        ("{\"model\":\"fast\",\"model\":\"fast\"}", Some("model")),
        ("{\"model\":\"fast\",\"mod\\u0065l\":\"other\"}", Some("model")),
        ("{\"model\":\"fast\",\"stream\":\"yes\"}", Some("stream")),
        ("{\"model\":\"fast\",\"stream\":1}", Some("stream")),
        (
            "{\"model\":\"fast\",\"stream\":true,\"stream\":false}",
            Some("stream"),
        ),
        (
            "{\"model\":\"fast\",\"stream\":true,\"stream_options\":7}",
            Some("stream_options"),
        ),
        ("{\"model\":\"fast\",\"max_tokens\":-1}", Some("max_tokens")),
        ("{\"model\":\"fast\",\"max_tokens\":\"9\"}", Some("max_tokens")),
        ("{\"model\":\"fast\",\"max_tokens\":1.5}", Some("max_tokens")),
    ];
    let mut client = Client::connect(gateway.addr());
    for (body, param) in table {
        client.post(CHAT, body);
        let answer = client.answer();
        let shown = &body[..body.len().min(80)];
        assert_eq!(answer.status, 400, "{shown}: {}", answer.text());
        let error = &answer.json()["error"];
        assert_eq!(error["type"], "invalid_request_error", "{shown}");
        assert_eq!(error["param"].as_str(), *param, "{shown}: {error}");
        assert!(
            answer.keep_alive,
            "the body was whole, so the connection is good: {shown}"
        );
    }
    // Where the body's end is not known, the connection is not good any more.
    for broken in [
        "zz\r\n",
        "5\r\nhello__",
        "ffffffffffffffff1\r\n",
        "-1\r\n",
        "5 \r\nhello\r\n",
        "0\r\nno colon\r\n\r\n",
    ] {
        let mut client = Client::connect(gateway.addr());
        client.send(head("transfer-encoding: chunked\r\n") + broken);
        let answer = client.answer();
        assert_eq!(answer.status, 400, "{broken:?}: {}", answer.text());
        assert!(!answer.keep_alive && client.is_closed(), "{broken:?}");
    }
    // Nothing of a body comes into the log, whatever stands where the head was.
    let mut client = Client::connect(gateway.addr());
    client.send(head("transfer-encoding: chunked\r\n") + "f0\r\n" + &"PRIVATE ".repeat(30) + "broken");
    assert_eq!(client.answer().status, 400);
    eventually("its line in the access log", || {
        (gateway.log().matches("\"status\":400").count() > table.len() + 6).then_some(())
    });
    assert!(!gateway.log().contains("PRIVATE"), "{}", gateway.log());
    assert_eq!(fleet.stats().requests, 0);
    assert!(!gateway.log().contains("panic"), "{}", gateway.log());
}

#[test]
fn what_all_bodies_together_may_hold_is_bounded_and_given_back() {
    let fleet = fleet(QUICK);
    let gateway = bounded(&fleet.url(), "{ body_max: 1MiB, bodies_max: 4MiB }");
    let body = body_of(1 << 20);
    let start = |share: usize| {
        let mut client = Client::connect(gateway.addr());
        client.send(head(&format!("content-length: {}\r\n", body.len())));
        client.send(&body[..share]);
        client
    };
    // Claims alone hold nothing.
    let claims: Vec<Client> = (0..50).map(|_| start(0)).collect();
    let mut holders: Vec<Client> = (0..3).map(|_| start(body.len() - 1)).collect();
    // The gateway holds three, and room for a fourth: find out by asking until somebody is refused.
    let refused = eventually("a refusal", || {
        let mut client = start(body.len() - 1);
        client
            .socket
            .set_read_timeout(Some(std::time::Duration::from_millis(200)))
            .expect("an option");
        match client.try_answer() {
            Ok(answer) => Some(answer),
            Err(_) => {
                holders.push(client);
                None
            }
        }
    });
    assert_error(&refused, 503, "overloaded", None);
    assert_eq!(refused.field("retry-after"), Some("1"));
    assert_eq!(holders.len(), 4);
    // Small requests need room too; there is none until somebody ends.
    let mut first = holders.remove(0);
    first.send(&body[body.len() - 1..]);
    assert_eq!(first.answer().status, 200);
    drop(holders);
    for _ in 0..3 {
        let answers: Vec<Answer> = (0..4)
            .map(|_| start(body.len()))
            .collect::<Vec<_>>()
            .into_iter()
            .map(|mut client| {
                client.socket.set_read_timeout(Some(PATIENCE)).expect("an option");
                client.answer()
            })
            .collect();
        eventually("room", || {
            answers.iter().any(|answer| answer.status == 200).then_some(())
        });
    }
    drop(claims);
    eventually("all room given back", || {
        let mut clients: Vec<Client> = (0..4).map(|_| start(body.len())).collect();
        clients
            .iter_mut()
            .all(|client| client.answer().status == 200)
            .then_some(())
    });
}
