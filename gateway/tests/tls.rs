//! HTTPS on both sides: certificates by name, resumption, bad handshakes, own authorities, ends of streams.

mod support;

use std::{
    fs,
    io::{self, ErrorKind, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    path::Path,
    sync::Arc,
    thread,
};

use gateway::ledger::record::Outcome;
use gateway_bench::upstream::Server;
use rcgen::{CertifiedKey, KeyPair};
use rustls::{
    ClientConfig, ClientConnection, HandshakeKind, ProtocolVersion, RootCertStore, ServerConfig,
    ServerConnection, StreamOwned, SupportedProtocolVersion,
    crypto::aws_lc_rs,
    version::{TLS12, TLS13},
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use support::{
    Gateway, PATIENCE, Setup,
    client::{Client, chat, expected_content, raw},
    eventually, fleet,
};

type Pair = CertifiedKey<KeyPair>;
type Tls = StreamOwned<ClientConnection, TcpStream>;

fn certificate(names: &[&str]) -> Pair {
    let names: Vec<String> = names.iter().map(|name| name.to_string()).collect();
    rcgen::generate_simple_self_signed(names).expect("a certificate")
}

fn save(directory: &Path, name: &str, pair: &Pair) {
    fs::write(directory.join(format!("{name}.pem")), pair.cert.pem()).expect("a file");
    fs::write(
        directory.join(format!("{name}.key")),
        pair.signing_key.serialize_pem(),
    )
    .expect("a file");
}

/// A configuration whose listener has these certificates of its directory.
fn with_tls(setup: &Setup, names: &[&str]) -> String {
    let certificate =
        |name: &&str| format!("{{ certificate: \"{{dir}}/{name}.pem\", key: \"{{dir}}/{name}.key\" }}");
    let certificates: Vec<String> = names.iter().map(certificate).collect();
    let listener = format!("- address: 127.0.0.1:0\n    tls: [{}]", certificates.join(", "));
    setup.config().replacen("- address: 127.0.0.1:0", &listener, 1)
}

/// A gateway with one certificate, for `localhost` and 127.0.0.1.
fn start(setup: &Setup) -> (Gateway, Pair) {
    let directory = tempfile::tempdir().expect("a directory");
    let pair = certificate(&["localhost", "127.0.0.1"]);
    save(directory.path(), "own", &pair);
    (Gateway::start_in(directory, &with_tls(setup, &["own"])), pair)
}

/// A client that trusts these certificates. It keeps its sessions.
fn trusting(pairs: &[&Pair], versions: &[&'static SupportedProtocolVersion]) -> Arc<ClientConfig> {
    let mut roots = RootCertStore::empty();
    for pair in pairs {
        roots.add(pair.cert.der().clone()).expect("a root");
    }
    let config = ClientConfig::builder_with_provider(aws_lc_rs::default_provider().into())
        .with_protocol_versions(versions)
        .expect("versions")
        .with_root_certificates(roots)
        .with_no_client_auth();
    Arc::new(config)
}

fn connect(to: SocketAddr, config: &Arc<ClientConfig>, name: &str) -> io::Result<Tls> {
    let name = ServerName::try_from(name.to_string()).expect("a name");
    let session = ClientConnection::new(config.clone(), name).map_err(io::Error::other)?;
    let socket = TcpStream::connect(to)?;
    socket.set_read_timeout(Some(PATIENCE))?;
    socket.set_nodelay(true)?;
    let mut tls = StreamOwned::new(session, socket);
    while tls.conn.is_handshaking() {
        tls.conn.complete_io(&mut tls.sock)?;
    }
    Ok(tls)
}

/// A chat request on a connection that is to be closed behind its answer.
fn request(model: &str, stream: bool, more: &str) -> Vec<u8> {
    let body = chat(model, stream).replacen('{', &format!("{{{more}"), 1);
    raw(
        &format!("connection: close\r\ncontent-length: {}\r\n", body.len()),
        &body,
    )
}

/// Sends a request and takes the answer. That it ends by a `close_notify` is a part of the check: without it rustls
/// reports an error.
fn ask(tls: &mut Tls, model: &str, stream: bool) -> String {
    tls.write_all(&request(model, stream, "")).expect("sent");
    let mut answer = Vec::new();
    tls.read_to_end(&mut answer).expect("a proper end");
    String::from_utf8(answer).expect("text")
}

fn content(answer: &str) -> String {
    let pieces = answer.split("\"content\":\"").skip(1);
    pieces
        .filter_map(|piece| Some(piece.split_once('"')?.0))
        .collect()
}

fn shown(tls: &Tls) -> CertificateDer<'static> {
    tls.conn.peer_certificates().expect("certificates")[0].clone()
}

#[test]
fn certificates_by_name_in_both_versions() {
    let fleet = fleet("tokens=3,pace=0,first=0");
    let directory = tempfile::tempdir().expect("a directory");
    let (first, second) = (
        certificate(&["a.test", "127.0.0.1"]),
        certificate(&["b.test", "*.b.test"]),
    );
    save(directory.path(), "first", &first);
    save(directory.path(), "second", &second);
    let gateway = Gateway::start_in(
        directory,
        &with_tls(&Setup::new(fleet.url()), &["first", "second"]),
    );
    for (version, is) in [
        (&TLS12, ProtocolVersion::TLSv1_2),
        (&TLS13, ProtocolVersion::TLSv1_3),
    ] {
        let mut config = trusting(&[&first, &second], &[version]);
        Arc::make_mut(&mut config).alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        for (name, pair) in [
            ("a.test", &first),
            ("A.TEST", &first),
            ("b.test", &second),
            ("x.b.test", &second),
            ("127.0.0.1", &first),
        ] {
            let mut tls = connect(gateway.addr(), &config, name).expect(name);
            assert_eq!(&shown(&tls), pair.cert.der(), "{name}");
            assert_eq!(tls.conn.protocol_version(), Some(is));
            assert_eq!(tls.conn.alpn_protocol(), Some(b"http/1.1".as_slice()));
            assert!(ask(&mut tls, "fast", false).starts_with("HTTP/1.1 200"), "{name}");
        }
        // A name that nobody has gets the first certificate, which does not fit: the client says no, not the gateway.
        let error = connect(gateway.addr(), &config, "x.y.b.test").expect_err("no such name");
        assert!(error.to_string().contains("not valid for name"), "{error}");
    }
}

/// What a proxy sends before its client's bytes, and whose client that makes this one.
#[test]
fn a_proxy_header_stands_before_the_handshake() {
    let fleet = fleet("tokens=1,pace=0,first=0");
    let directory = tempfile::tempdir().expect("a directory");
    let pair = certificate(&["localhost"]);
    save(directory.path(), "own", &pair);
    let listener =
        "- address: 127.0.0.1:0\n    trusted_proxies: [127.0.0.1/32]\n    proxy_protocol: required";
    let text = with_tls(&Setup::new(fleet.url()), &["own"]);
    let gateway = Gateway::start_in(directory, &text.replacen("- address: 127.0.0.1:0", listener, 1));
    let config = trusting(&[&pair], &[&TLS13]);
    let text = b"PROXY TCP4 203.0.113.7 10.0.0.1 4711 443\r\n".to_vec();
    let mut binary = b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c".to_vec();
    binary.extend([203, 0, 113, 8, 10, 0, 0, 1, 0x30, 0x39, 1, 187]);
    for (header, client) in [(text, "203.0.113.7"), (binary, "203.0.113.8")] {
        let mut socket = TcpStream::connect(gateway.addr()).expect("a connection");
        socket.set_read_timeout(Some(PATIENCE)).expect("set");
        // In two pieces, the second in one with the handshake's beginning.
        let (first, second) = header.split_at(header.len() / 2);
        socket.write_all(first).expect("sent");
        let name = ServerName::try_from("localhost").expect("a name");
        let mut session = ClientConnection::new(config.clone(), name).expect("a session");
        let mut rest = second.to_vec();
        session.write_tls(&mut rest).expect("a hello");
        socket.write_all(&rest).expect("sent");
        let mut tls = StreamOwned::new(session, socket);
        assert!(
            ask(&mut tls, "fast", false).starts_with("HTTP/1.1 200"),
            "{client}"
        );
        let shown = format!("\"client\":\"{client}\"");
        eventually("a line in the access log", || {
            gateway.log().contains(&shown).then_some(())
        });
    }
    // A handshake without it is not begun.
    let error = connect(gateway.addr(), &config, "localhost").expect_err("no header");
    assert_ne!(error.kind(), ErrorKind::WouldBlock, "closed, not left hanging");
    let metrics = gateway.admin("GET /metrics", "").text();
    assert!(
        metrics.contains("gateway_proxy_headers_refused_total 1\n"),
        "{metrics}"
    );
}

#[test]
fn sessions_resume_on_every_core() {
    const CONNECTIONS: usize = 30;
    let fleet = fleet("tokens=1,pace=0,first=0");
    let (gateway, pair) = start(&Setup::new(fleet.url()).workers(2, "auto"));
    for version in [&TLS12, &TLS13] {
        let config = trusting(&[&pair], &[version]);
        for number in 0..CONNECTIONS {
            let mut tls = connect(gateway.addr(), &config, "localhost").expect("a handshake");
            // The answer brings the tickets of TLS 1.3.
            assert!(ask(&mut tls, "fast", false).starts_with("HTTP/1.1 200"));
            let resumed = tls.conn.handshake_kind() == Some(HandshakeKind::Resumed);
            assert_eq!(resumed, number > 0, "connection {number}, {version:?}");
        }
    }
}

#[test]
fn bad_and_slow_handshakes_hold_up_nobody() {
    let fleet = fleet("tokens=3,pace=0,first=0");
    let setup = Setup::new(fleet.url())
        .workers(1, "auto")
        .more("http: { head_timeout: 1s }\n");
    let (gateway, pair) = start(&setup);
    let hello = {
        let config = trusting(&[&pair], &[&TLS13]);
        let name = ServerName::try_from("localhost").expect("a name");
        let mut session = ClientConnection::new(config, name).expect("a session");
        let mut hello = Vec::new();
        session.write_tls(&mut hello).expect("a hello");
        hello
    };
    let open = |bytes: &[u8]| {
        let mut client = Client::connect(gateway.addr());
        client.send(bytes);
        client
    };
    let mut slow: Vec<Client> = (0..hello.len())
        .step_by(5)
        .map(|cut| open(&hello[..cut]))
        .collect();
    let mut bad: Vec<Client> = [
        b"GET / HTTP/1.1\r\nhost: test\r\n\r\n".as_slice(),
        &[0; 2000],
        &[0xff; 2000],
        b"\x16\x03\x01\xff\xff",
        b"\x15\x03\x01\x00\x02\x02\x00",
        b"\x16\x03\x01\x00\x05\x01\x00\xff\xff\xff\x16\x03\x01\x00\x05\xff\xff\xff\xff\xff",
    ]
    .into_iter()
    .map(open)
    .collect();
    // An alert may come first; then the end, well before the others' time is over.
    let config = trusting(&[&pair], &[&TLS13]);
    for _ in 0..5 {
        let mut tls = connect(gateway.addr(), &config, "localhost").expect("a handshake");
        assert_eq!(content(&ask(&mut tls, "fast", true)), expected_content(3));
    }
    for client in bad.iter_mut().chain(&mut slow) {
        let rest = client.rest();
        let is_reset = |error: &io::Error| error.kind() == ErrorKind::ConnectionReset;
        assert!(
            rest.as_ref().is_ok_and(|rest| rest.len() <= 64) || rest.as_ref().is_err_and(is_reset),
            "{rest:?}"
        );
    }
    assert_eq!(fleet.stats().requests, 5);
}

/// A gateway behind a gateway: TLS on both of the first one's sides.
fn chain(fleet: &Server, names: &[&str], trusted: Option<&Pair>) -> (Gateway, Gateway, Pair) {
    let directory = tempfile::tempdir().expect("a directory");
    let back_pair = certificate(names);
    save(directory.path(), "own", &back_pair);
    let models = |setup: Setup| {
        setup
            .model("long", "long")
            .model("big", "big")
            .model("endless", "endless")
    };
    // What the first one presents is its own credential.
    let behind = Setup::new(fleet.url())
        .model("sim", "sim")
        .model("long", "sim:tokens=3000,pace=0,first=0")
        .model("big", "sim:tokens=20,pace=0,huge=3000000,split=1009")
        .model("endless", "sim:tokens=1000000,pace=2ms")
        .key("front", "upstream-secret", "");
    let back = Gateway::start_in(directory, &with_tls(&behind, &["own"]));
    let directory = tempfile::tempdir().expect("a directory");
    let pair = certificate(&["localhost"]);
    save(directory.path(), "own", &pair);
    save(directory.path(), "ca", trusted.unwrap_or(&back_pair));
    let setup = models(Setup::new(format!("https://{}", back.addr())));
    let config =
        with_tls(&setup, &["own"]).replacen("kind: openai,", "kind: openai, ca: \"{dir}/ca.pem\",", 1);
    (Gateway::start_in(directory, &config), back, pair)
}

#[test]
fn streams_over_tls_on_both_sides_are_whole() {
    let fleet = fleet("tokens=3,pace=0,first=0");
    let (front, _back, pair) = chain(&fleet, &["127.0.0.1"], None);
    let config = trusting(&[&pair], &[&TLS12, &TLS13]);
    let ask = |model: &str, stream: bool| {
        let mut tls = connect(front.addr(), &config, "localhost").expect("a handshake");
        ask(&mut tls, model, stream)
    };
    for _ in 0..3 {
        assert!(ask("fast", false).starts_with("HTTP/1.1 200"));
    }
    let long = ask("long", true);
    // Chunk borders may fall inside an event, so they are taken out first.
    assert!(long.contains("[DONE]"), "{}", &long[long.len() - 200..]);
    assert_eq!(dechunked(&long).matches("\"content\":\"t").count(), 3000);
    assert_eq!(content(&dechunked(&long)), expected_content(3000));
    let big = dechunked(&ask("big", true));
    assert!(big.len() > 3_000_000 && big.contains("[DONE]"), "{}", big.len());
    // Some streams at the same time, byte for byte as without TLS.
    thread::scope(|scope| {
        let streams: Vec<_> = (0..8)
            .map(|_| scope.spawn(|| content(&dechunked(&ask("long", true)))))
            .collect();
        for stream in streams {
            assert_eq!(stream.join().expect("a stream"), expected_content(3000));
        }
    });
    assert!(
        front
            .records()
            .iter()
            .all(|record| record.outcome == Outcome::Complete)
    );
}

/// The body of an answer in chunks.
fn dechunked(answer: &str) -> String {
    let (_, body) = answer.split_once("\r\n\r\n").expect("a head");
    let mut bytes = body.as_bytes().to_vec();
    let mut decoder = gateway::http::chunked::ChunkedDecoder::new();
    let decoded = decoder.decode(&mut bytes).expect("chunks");
    assert!(decoded.done);
    String::from_utf8(bytes[decoded.payload].to_vec()).expect("text")
}

#[test]
fn an_upstream_that_is_not_trusted_is_not_used() {
    let fleet = fleet("tokens=3,pace=0,first=0");
    let stranger = certificate(&["127.0.0.1"]);
    for (names, trusted) in [
        (["127.0.0.1"], Some(&stranger)),
        // Trusted, and for another name.
        (["other.test"], None),
    ] {
        let (front, _back, pair) = chain(&fleet, &names, trusted);
        let config = trusting(&[&pair], &[&TLS13]);
        let mut tls = connect(front.addr(), &config, "localhost").expect("a handshake");
        let answer = ask(&mut tls, "fast", false);
        assert!(answer.starts_with("HTTP/1.1 502"), "{answer}");
        assert!(
            !answer.contains("127.0.0.1") && !answer.contains("certificate"),
            "{answer}"
        );
        let line = front.await_log("TLS handshake failed");
        assert!(line.contains("certificate"), "{line}");
        assert_eq!(front.await_records(1)[0].outcome, Outcome::UpstreamFailed);
    }
    assert_eq!(fleet.stats().requests, 0);
}

/// A TLS upstream that begins an answer without framing and is cut from it: no `close_notify`.
fn cut_upstream(pair: &Pair, answer: &'static str) -> String {
    let key = PrivateKeyDer::try_from(pair.signing_key.serialize_der()).expect("a key");
    let config = ServerConfig::builder_with_provider(aws_lc_rs::default_provider().into())
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_no_client_auth()
        .with_single_cert(vec![pair.cert.der().clone()], key)
        .expect("a certificate");
    let config = Arc::new(config);
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let url = format!("https://{}", listener.local_addr().expect("an address"));
    thread::spawn(move || {
        let (socket, _) = listener.accept().expect("a connection");
        socket.set_read_timeout(Some(PATIENCE)).expect("a socket");
        let mut tls = StreamOwned::new(ServerConnection::new(config).expect("a session"), socket);
        let mut request = Vec::new();
        let mut buffer = [0; 4096];
        // The body's closing brace, wherever the gateway has put what it adds.
        while !request.ends_with(b"}") {
            let n = tls.read(&mut buffer).expect("a request");
            request.extend_from_slice(&buffer[..n]);
        }
        tls.write_all(answer.as_bytes()).expect("sent");
        tls.flush().expect("sent");
    });
    url
}

/// Without framing the end of the connection is the end of the answer, but only a `close_notify` proves that the end is
/// the upstream's own (RFC 8446, section 6.1).
#[test]
fn an_answer_that_is_cut_is_not_taken_for_whole() {
    for (stream, answer) in [
        (
            false,
            "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n\r\n{\"choices\":[]}",
        ),
        (
            true,
            "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\ndata: {\"choices\":[{\"delta\":{\"content\":\"a\"}}]}\n\n",
        ),
    ] {
        let pair = certificate(&["127.0.0.1"]);
        let directory = tempfile::tempdir().expect("a directory");
        save(directory.path(), "ca", &pair);
        let setup = Setup::new(cut_upstream(&pair, answer));
        let config = setup
            .config()
            .replacen("kind: openai,", "kind: openai, ca: \"{dir}/ca.pem\",", 1);
        let gateway = Gateway::start_in(directory, &config);
        let mut client = Client::connect(gateway.addr());
        client.post("/v1/chat/completions", &chat("fast", stream));
        let answer = client.answer();
        assert_eq!(answer.status, if stream { 200 } else { 502 }, "{}", answer.text());
        assert!(answer.text().contains("upstream_cut"), "{}", answer.text());
        assert_eq!(gateway.await_records(1)[0].outcome, Outcome::UpstreamFailed);
    }
}

#[test]
fn certificates_are_swapped_by_a_reload() {
    let fleet = fleet("tokens=200,pace=5ms,first=0");
    let setup = Setup::new(fleet.url());
    let (gateway, old) = start(&setup);
    let config = with_tls(&setup, &["own"]);
    let mut running =
        connect(gateway.addr(), &trusting(&[&old], &[&TLS13]), "localhost").expect("a handshake");
    running.write_all(&request("fast", true, "")).expect("sent");
    eventually("the stream is running", || {
        (fleet.stats().streams_open == 1).then_some(())
    });

    let new = certificate(&["localhost"]);
    save(gateway.dir(), "own", &new);
    assert!(gateway.reload(&config).contains("configuration reloaded"));
    let both = trusting(&[&old, &new], &[&TLS13]);
    let tls = connect(gateway.addr(), &both, "localhost").expect("a handshake");
    assert_eq!(&shown(&tls), new.cert.der());

    // A key that does not fit, and a file that holds nothing: refused, with the file's name.
    for (name, text) in [
        ("own.key", old.signing_key.serialize_pem()),
        ("own.pem", String::new()),
    ] {
        save(gateway.dir(), "own", &new);
        fs::write(gateway.dir().join(name), text).expect("a file");
        let outcome = gateway.reload(&config);
        assert!(
            outcome.contains("the old one stays") && outcome.contains("own."),
            "{outcome}"
        );
        let tls = connect(gateway.addr(), &both, "localhost").expect("a handshake");
        assert_eq!(&shown(&tls), new.cert.der());
    }
    let mut answer = Vec::new();
    running.read_to_end(&mut answer).expect("a proper end");
    let answer = String::from_utf8(answer).expect("text");
    assert_eq!(content(&dechunked(&answer)), expected_content(200));
}

#[test]
fn a_reload_never_gives_an_address_the_certificate_of_another() {
    let fleet = fleet("tokens=1,pace=0,first=0");
    let setup = Setup::new(fleet.url());
    let directory = tempfile::tempdir().expect("a directory");
    let pairs = [certificate(&["localhost"]), certificate(&["localhost"])];
    save(directory.path(), "one", &pairs[0]);
    save(directory.path(), "two", &pairs[1]);
    let free = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let second = free.local_addr().expect("an address");
    drop(free);
    let listener = |address: &str, name: &str| {
        format!(
            "- address: {address}\n    tls: {{ certificate: \"{{dir}}/{name}.pem\", key: \"{{dir}}/{name}.key\" }}"
        )
    };
    let (one, two) = (
        listener("127.0.0.1:0", "one"),
        listener(&second.to_string(), "two"),
    );
    let with = |first: &str, second: &str| {
        let listeners = format!("{first}\n  {second}");
        setup.config().replacen("- address: 127.0.0.1:0", &listeners, 1)
    };
    let gateway = Gateway::start_in(directory, &with(&one, &two));
    let outcome = gateway.reload(&with(&two, &one));
    assert!(outcome.contains("configuration reloaded"), "{outcome}");
    let both = trusting(&[&pairs[0], &pairs[1]], &[&TLS13]);
    for (address, pair) in [(gateway.addr(), &pairs[0]), (second, &pairs[1])] {
        let tls = connect(address, &both, "localhost").expect("a handshake");
        assert_eq!(&shown(&tls), pair.cert.der(), "{address}");
    }
}

#[test]
fn a_client_that_leaves_is_noticed_however_it_leaves() {
    let fleet = fleet("tokens=1000000,pace=2ms,first=0");
    let (gateway, pair) = start(&Setup::new(fleet.url()));
    let config = trusting(&[&pair], &[&TLS13]);
    let begin = || {
        let mut tls = connect(gateway.addr(), &config, "localhost").expect("a handshake");
        tls.write_all(&request("fast", true, "")).expect("sent");
        let mut seen = Vec::new();
        let mut buffer = [0; 4096];
        while memchr::memmem::find(&seen, b"\"content\"").is_none() {
            let n = tls.read(&mut buffer).expect("a stream");
            seen.extend_from_slice(&buffer[..n]);
        }
        tls
    };
    let mut left = 0;
    let mut noticed = |how: &str| {
        left += 1;
        eventually(&format!("the upstream is told ({how})"), || {
            (fleet.stats().streams_aborted == left).then_some(())
        });
        let records = gateway.await_records(left as usize);
        assert!(
            records.iter().all(|record| record.outcome == Outcome::ClientGone),
            "{how}"
        );
    };
    let mut tls = begin();
    tls.conn.send_close_notify();
    tls.conn.complete_io(&mut tls.sock).expect("sent");
    noticed("close_notify alone");
    drop(tls);

    let tls = begin();
    tls.sock.shutdown(std::net::Shutdown::Write).expect("a socket");
    noticed("the end of the connection without close_notify");
    drop(tls);

    let tls = begin();
    socket2::SockRef::from(&tls.sock)
        .set_linger(Some(std::time::Duration::ZERO))
        .expect("a socket");
    drop(tls);
    noticed("a reset");

    let mut tls = begin();
    tls.sock
        .write_all(b"\x17\x03\x03\x00\x20 no record of this session ......")
        .expect("sent");
    noticed("a record that does not decrypt");
    drop(tls);
}
