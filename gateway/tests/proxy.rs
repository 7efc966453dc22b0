//! Clients behind proxies: PROXY headers, `X-Forwarded-For`, `Forwarded`, and what is held against whom.

mod support;

use std::net::{IpAddr, Ipv4Addr};

use support::{
    Gateway, KEY, Setup,
    client::{Client, chat, chat_request, expected_content},
    eventually, fleet,
};

/// Refusals that make an offender in these tests.
const AFTER: usize = 5;
/// Where the trusted proxy is, and where somebody else is.
const PROXY: IpAddr = IpAddr::V4(Ipv4Addr::new(127, 0, 0, 7));
const STRANGER: IpAddr = IpAddr::V4(Ipv4Addr::new(127, 0, 0, 8));

/// A configuration whose one listener has these settings beside its address.
fn config(upstream: &str, listener: &str) -> String {
    let mut setup = Setup::new(upstream).model("endless", "sim:tokens=1000000,pace=5ms,first=0");
    setup.more = format!(
        "kernel: {{ mode: auto, drop: {{ after_refusals: {AFTER}, within: 1m, for: 1h }} }}\nworkers: {{ threads: 2 }}\n"
    );
    setup.config().replace(
        "  - address: 127.0.0.1:0\n",
        &format!("  - {{ address: \"0.0.0.0:0\", trusted_proxies: [{PROXY}/32], {listener} }}\n"),
    )
}

fn from(gateway: &Gateway, source: IpAddr) -> Client {
    let to = ([127, 0, 0, 1], gateway.addr().port()).into();
    Client::try_connect(to, Some(source)).expect("a connection")
}

/// A request with these further header lines and this key.
fn request(fields: &str, key: &str, model: &str, stream: bool) -> String {
    let body = chat(model, stream);
    format!(
        "POST /v1/chat/completions HTTP/1.1\r\nhost: test\r\nauthorization: Bearer {key}\r\n{fields}\
         content-length: {}\r\n\r\n{body}",
        body.len()
    )
}

/// The client of the last line of the access log, when there are `lines`.
fn logged(gateway: &Gateway, lines: usize) -> String {
    eventually("a line in the access log", || {
        let log = gateway.log();
        let mut access = log.lines().filter(|line| line.contains("\"outcome\":"));
        let line = access.nth(lines - 1)?;
        let entry: serde_json::Value = serde_json::from_str(line).expect("JSON");
        Some(entry["client"].as_str().expect("a client").to_owned())
    })
}

fn metric(gateway: &Gateway, name: &str) -> u64 {
    let text = gateway.admin("GET /metrics", "").text();
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    line.expect("the metric").trim().parse().expect("a number")
}

/// A header of version 2 for an IPv4 client, with an extension.
fn v2(client: [u8; 4]) -> Vec<u8> {
    let mut header = b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x11".to_vec();
    header.extend(client);
    header.extend([10, 0, 0, 1, 0x30, 0x39, 0, 80]);
    header.extend([0x04, 0, 2, 1, 2]);
    header
}

#[test]
fn a_proxy_header_says_who_the_client_is() {
    let fleet = fleet("tokens=2,pace=0,first=0");
    let gateway = Gateway::start(&config(&fleet.url(), "proxy_protocol: required"));
    let asked = chat_request("fast", false);

    let mut client = from(&gateway, PROXY);
    client.send(b"PROXY TCP4 203.0.113.7 10.0.0.1 4711 80\r\n");
    client.send(&asked);
    assert_eq!(client.answer().status, 200);
    assert_eq!(logged(&gateway, 1), "203.0.113.7");
    // It stands before a connection, not before a request.
    client.send(&asked);
    assert_eq!(client.answer().status, 200);
    assert_eq!(logged(&gateway, 2), "203.0.113.7");

    let mut client = from(&gateway, PROXY);
    client.send([v2([203, 0, 113, 8]), asked.clone()].concat());
    assert_eq!(client.answer().status, 200);
    assert_eq!(logged(&gateway, 3), "203.0.113.8");

    // In pieces, the last together with the request.
    let mut client = from(&gateway, PROXY);
    let header = b"PROXY TCP6 2001:db8::7 ::1 1 2\r\n";
    for byte in &header[..header.len() - 1] {
        client.send([*byte]);
    }
    client.send([b"\n".as_slice(), &asked].concat());
    assert_eq!(client.answer().status, 200);
    assert_eq!(logged(&gateway, 4), "2001:db8::7");

    // The proxy speaks for itself.
    let mut client = from(&gateway, PROXY);
    client.send([b"PROXY UNKNOWN\r\n".as_slice(), &asked].concat());
    assert_eq!(client.answer().status, 200);
    assert_eq!(logged(&gateway, 5), PROXY.to_string());
}

#[test]
fn without_the_header_that_is_required_nobody_is_served() {
    let fleet = fleet("tokens=1,pace=0,first=0");
    let gateway = Gateway::start(&config(&fleet.url(), "proxy_protocol: required"));
    let header = b"PROXY TCP4 203.0.113.7 10.0.0.1 4711 80\r\n".to_vec();
    let asked = chat_request("fast", false);
    let refused = [
        (PROXY, asked.clone()),
        (PROXY, b"PROXY TCP4 203.0.113.7\r\n".to_vec()),
        (STRANGER, [header, asked].concat()),
    ];
    for (count, (source, bytes)) in refused.into_iter().enumerate() {
        // A stranger may be reset before it knows that it was connected.
        let to = ([127, 0, 0, 1], gateway.addr().port()).into();
        if let Ok(mut client) = Client::try_connect(to, Some(source)) {
            let _ = client.try_send(bytes);
            assert!(client.is_closed());
        }
        support::eventually("the count", || {
            let refused = metric(&gateway, "gateway_proxy_headers_refused_total");
            (refused == count as u64 + 1).then_some(())
        });
    }
    assert_eq!(metric(&gateway, "gateway_requests_total"), 0);
}

#[test]
fn an_optional_header_is_taken_from_the_proxy_alone() {
    let fleet = fleet("tokens=1,pace=0,first=0");
    let gateway = Gateway::start(&config(&fleet.url(), "proxy_protocol: optional"));
    let header = b"PROXY TCP4 203.0.113.7 10.0.0.1 4711 80\r\n".as_slice();
    let asked = chat_request("fast", false);
    for (lines, (source, bytes, wanted)) in [
        (PROXY, [header, &asked].concat(), "203.0.113.7".to_owned()),
        (PROXY, asked.clone(), PROXY.to_string()),
        (STRANGER, asked.clone(), STRANGER.to_string()),
    ]
    .into_iter()
    .enumerate()
    {
        let mut client = from(&gateway, source);
        client.send(bytes);
        assert_eq!(client.answer().status, 200);
        assert_eq!(logged(&gateway, lines + 1), wanted);
    }
    let mut stranger = from(&gateway, STRANGER);
    stranger.send([header, &asked].concat());
    assert_eq!(stranger.answer().status, 400, "its own bytes, and no HTTP");
}

#[test]
fn header_fields_are_believed_from_the_right_as_far_as_trust_goes() {
    let fleet = fleet("tokens=1,pace=0,first=0");
    let gateway = Gateway::start(&config(&fleet.url(), "client_header: x_forwarded_for"));
    let mut proxy = from(&gateway, PROXY);
    let mut stranger = from(&gateway, STRANGER);
    let own = STRANGER.to_string();
    for (lines, (is_proxy, fields, wanted)) in [
        (true, "x-forwarded-for: 1.1.1.1, 203.0.113.7\r\n", "203.0.113.7"),
        (true, "x-forwarded-for: 203.0.113.9, 127.0.0.7\r\n", "203.0.113.9"),
        (
            true,
            "forwarded: for=1.1.1.1\r\nX-Forwarded-For: 203.0.113.8\r\n",
            "203.0.113.8",
        ),
        (false, "x-forwarded-for: 203.0.113.7\r\n", &own),
    ]
    .into_iter()
    .enumerate()
    {
        let client = if is_proxy { &mut proxy } else { &mut stranger };
        client.send(request(fields, KEY, "fast", false));
        assert_eq!(client.answer().status, 200);
        assert_eq!(logged(&gateway, lines + 1), wanted, "{fields}");
    }
    let reloaded = gateway.reload(&config(&fleet.url(), "client_header: forwarded"));
    assert!(reloaded.contains("configuration reloaded"), "{reloaded}");
    let mut proxy = from(&gateway, PROXY);
    proxy.send(request(
        "x-forwarded-for: 1.1.1.1\r\nForwarded: for=\"[2001:db8::1]:80\"\r\n",
        KEY,
        "fast",
        false,
    ));
    assert_eq!(proxy.answer().status, 200);
    assert_eq!(logged(&gateway, 5), "2001:db8::1");
}

/// Behind a proxy an offender is answered early, and its neighbours on the same connection notice nothing.
#[test]
fn an_offender_behind_a_proxy_is_turned_away_and_its_neighbours_are_not() {
    const BAD: &str = "x-forwarded-for: 203.0.113.7\r\n";
    const GOOD: &str = "x-forwarded-for: 203.0.113.8\r\n";
    let fleet = fleet("tokens=200,pace=5ms,first=0");
    let gateway = Gateway::start(&config(&fleet.url(), "client_header: x_forwarded_for"));
    let mut own = from(&gateway, PROXY);
    own.send(request(BAD, KEY, "endless", true));
    own.receive_until(b"t0 ");
    let mut neighbour = from(&gateway, PROXY);
    neighbour.send(request(GOOD, KEY, "fast", true));
    neighbour.receive_until(b"t0 ");

    let (mut proxy, answer) = eventually("the offender is turned away", || {
        let mut proxy = from(&gateway, PROXY);
        proxy.send(request(BAD, "wrong", "fast", false));
        let answer = proxy.answer();
        (answer.status != 401).then_some((proxy, answer))
    });
    assert!(answer.keep_alive, "the connection is the proxy's");
    assert_eq!(
        (answer.status, &answer.json()["error"]["code"]),
        (429, &"client_blocked".into())
    );
    let seconds: u64 = answer
        .field("retry-after")
        .expect("retry-after")
        .parse()
        .expect("a number");
    assert!((3500..=3601).contains(&seconds), "{seconds}");
    assert!(metric(&gateway, "gateway_turned_away_total{what=\"request\"}") >= 1);
    // The right key changes nothing: it is not looked at.
    proxy.send(request(BAD, KEY, "fast", false));
    assert_eq!(proxy.answer().status, 429);
    // A body that is still to come is not waited for.
    let mut other = from(&gateway, PROXY);
    other.send(format!(
        "POST /v1/chat/completions HTTP/1.1\r\nhost: test\r\n{BAD}content-length: 100000\r\n\r\n"
    ));
    let answer = other.answer();
    assert_eq!((answer.status, answer.keep_alive), (429, false));

    proxy.send(request(GOOD, KEY, "fast", false));
    assert_eq!(proxy.answer().status, 200);
    // What the offender had running ends with an error that its API knows; the neighbour's goes on to its end.
    let rest = own.rest().expect("a proper end");
    assert!(String::from_utf8_lossy(&rest).contains("client_blocked"));
    assert!(rest.ends_with(b"0\r\n\r\n"));
    let rest = neighbour.receive_until(b"0\r\n\r\n");
    let last = expected_content(200);
    assert!(String::from_utf8_lossy(&rest).contains(last.split(' ').nth(199).expect("a word")));
}

#[test]
fn a_trusted_proxy_itself_is_never_held_to_account() {
    let fleet = fleet("tokens=1,pace=0,first=0");
    let gateway = Gateway::start(&config(&fleet.url(), "client_header: off"));
    for _ in 0..4 * AFTER {
        let mut proxy = from(&gateway, PROXY);
        proxy.send(request("", "wrong", "fast", false));
        assert_eq!(proxy.answer().status, 401);
    }
    let block = format!(r#"{{"client":"{PROXY}"}}"#);
    let answer = gateway.admin("POST /kernel/block", &block);
    assert_eq!(answer.status, 409, "{}", answer.text());
}

#[test]
fn a_header_without_trusted_proxies_is_refused_at_the_start() {
    let fleet = fleet("tokens=1,pace=0,first=0");
    let text = config(&fleet.url(), "proxy_protocol: required").replace(&format!("{PROXY}/32"), "");
    let directory = tempfile::tempdir().expect("a directory");
    let log = Gateway::try_start_in(directory, &text).err().expect("no start");
    assert!(log.contains("needs `trusted_proxies`"), "{log}");
}
