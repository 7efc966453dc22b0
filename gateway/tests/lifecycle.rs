//! Start, reload, drain and end of the process.

mod support;

use std::{
    net::{TcpListener, TcpStream},
    os::unix::net::UnixDatagram,
    process::{Command, Output, Stdio},
};

use gateway::ledger::record::Outcome;
use support::{
    BINARY, Gateway, KEY, PATIENCE, Setup,
    client::{Client, chat, chat_request, expected_content},
    eventually, fleet, write_config,
};

/// A stream that does not end while a test lasts.
const ENDLESS: &str = "sim:tokens=1000000,pace=5ms,first=0";

/// A configuration without [`KEY`], in which `secret` is the key of `bob`.
fn only_bob(setup: &Setup, secret: &str) -> String {
    let hash = |key: &str| gateway::config::sha256_hex(&gateway::config::key_hash(key));
    let alice = format!("name: alice, sha256: {}", hash(KEY));
    let config = setup.config();
    assert!(config.contains(&alice), "{config}");
    config.replace(&alice, &format!("name: bob, sha256: {}", hash(secret)))
}

fn status_with(gateway: &Gateway, key: &str) -> u16 {
    let mut client = Client::connect(gateway.addr());
    let fields = format!("authorization: Bearer {key}\r\n");
    client.post_with("/v1/chat/completions", &chat("fast", false), &fields);
    client.answer().status
}

/// Begins a stream and waits for its first token.
fn begin_stream(gateway: &Gateway, model: &str) -> Client {
    let mut client = Client::connect(gateway.addr());
    client.send(chat_request(model, true));
    client.receive_until(b"\"content\"");
    client
}

/// Takes the rest of a stream that was begun, framing included.
fn rest_of(client: &mut Client) -> String {
    String::from_utf8(client.rest().expect("a proper end")).expect("text")
}

/// Runs the binary to its end.
fn run(arguments: &[&str], config: &str) -> Output {
    let directory = tempfile::tempdir().expect("a directory");
    let path = write_config(directory.path(), config);
    let mut command = Command::new(BINARY);
    command.args(arguments).arg("-c").arg(path).stdin(Stdio::null());
    command.output().expect("the gateway's binary")
}

fn errors(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// The answer of a refused start that is not the configuration's fault.
fn assert_fails_with(config: &str, words: &[&str]) {
    let output = run(&["run"], config);
    let errors = errors(&output);
    assert_eq!(output.status.code(), Some(1), "{errors}");
    for word in words {
        assert!(errors.contains(word), "{word:?} is not in: {errors}");
    }
}

#[test]
fn a_reload_swaps_keys_and_leaves_running_streams_alone() {
    let fleet = fleet("tokens=60,pace=5ms,first=0");
    let setup = Setup::new(fleet.url());
    let gateway = setup.start();
    assert_eq!(status_with(&gateway, "sk-bob"), 401);
    let mut kept = Client::connect(gateway.addr());
    kept.send(chat_request("fast", false));
    assert_eq!(kept.answer().status, 200);
    let mut stream = Client::connect(gateway.addr());
    stream.send(chat_request("fast", true));
    eventually("the stream is running", || {
        (fleet.stats().streams_open == 1).then_some(())
    });

    let outcome = gateway.reload(&only_bob(&setup, "sk-bob"));
    assert!(outcome.contains("configuration reloaded"), "{outcome}");
    assert_eq!(status_with(&gateway, "sk-bob"), 200);
    assert_eq!(status_with(&gateway, KEY), 401);
    kept.send(chat_request("fast", false));
    assert_eq!(kept.answer().status, 401, "on a connection from before");

    let answer = stream.answer();
    assert_eq!(answer.content(), expected_content(60));
    assert_eq!(answer.events().last().map(String::as_str), Some("[DONE]"));
    let records = gateway.await_records(3);
    let names: Vec<&str> = records.iter().map(|record| &*record.key).collect();
    assert_eq!(
        names.iter().filter(|name| **name == "alice").count(),
        2,
        "{names:?}"
    );
}

#[test]
fn a_bad_file_is_refused_with_its_reason_and_changes_nothing() {
    let fleet = fleet("tokens=1,pace=0,first=0");
    let setup = Setup::new(fleet.url());
    let gateway = setup.start();
    let other_upstream = setup.config().replace("provider: sim", "provider: nobody");
    for (config, reason) in [
        (setup.config() + "lisseners: []\n", "listeners"),
        (other_upstream, "nobody"),
        (
            only_bob(&setup, "x").replace("kind: openai", "kind: opnai"),
            "openai",
        ),
        ("]".to_string(), "gateway.yaml:1"),
        (String::new(), "the file is empty"),
    ] {
        let outcome = gateway.reload(&config);
        assert!(outcome.contains("the old one stays"), "{outcome}");
        assert!(outcome.contains("\"level\":\"ERROR\""), "{outcome}");
        assert!(outcome.contains(reason), "{reason:?} is not in: {outcome}");
        assert_eq!(status_with(&gateway, KEY), 200);
    }
    let outcome = gateway.reload(&only_bob(&setup, "sk-bob"));
    assert!(outcome.contains("configuration reloaded"), "{outcome}");
    assert_eq!(status_with(&gateway, "sk-bob"), 200);
}

#[test]
fn what_needs_a_restart_is_said() {
    let fleet = fleet("tokens=1,pace=0,first=0");
    let setup = Setup::new(fleet.url());
    let gateway = setup.start();
    gateway.reload(&setup.config().replace("threads: 2", "threads: 1"));
    let warning = gateway.await_log("take effect with a restart only");
    assert!(warning.contains("workers"), "{warning}");
    // It is said as long as it is so, not only when it is new.
    let outcome = gateway.admin("POST /reload", "").text();
    assert!(outcome.contains("workers need a restart"), "{outcome}");
}

#[test]
fn sigterm_drains_streams_finish_idle_connections_close() {
    let fleet = fleet("tokens=100,pace=5ms,first=0");
    let mut gateway = Setup::new(fleet.url()).start();
    let mut idle = Client::connect(gateway.addr());
    idle.send(chat_request("none", false));
    assert_eq!(idle.answer().status, 404);
    let mut fresh = Client::connect(gateway.addr());
    // A request that is half there when the end begins.
    let mut half = Client::connect(gateway.addr());
    let request = chat_request("fast", false);
    let (first, second) = request.split_at(request.len() - 10);
    half.send(first);
    let mut stream = Client::connect(gateway.addr());
    stream.send(chat_request("fast", true));
    eventually("the stream is running", || {
        (fleet.stats().streams_open == 1).then_some(())
    });

    gateway.signal(libc::SIGTERM);
    gateway.await_log("draining");
    assert!(idle.is_closed());
    assert!(fresh.is_closed());
    eventually("connections are refused", || {
        let attempt = TcpStream::connect_timeout(&gateway.addr(), PATIENCE);
        attempt.is_err().then_some(())
    });
    half.send(second);
    let answer = half.answer();
    assert_eq!((answer.status, answer.keep_alive), (200, false));
    let answer = stream.answer();
    assert_eq!(answer.content(), expected_content(100));
    assert_eq!(answer.events().last().map(String::as_str), Some("[DONE]"));
    assert_eq!(gateway.wait().code(), Some(0), "{}", gateway.log());
    let records = gateway.records();
    assert_eq!(records.len(), 2);
    assert!(
        records.iter().all(|record| record.outcome == Outcome::Complete),
        "{records:?}"
    );
}

#[test]
fn the_drain_is_bounded() {
    let fleet = fleet("tokens=3,pace=0,first=0");
    let setup = Setup::new(fleet.url())
        .model("endless", ENDLESS)
        .model("slow", "sim:first=5m")
        .more("drain: 200ms\n");
    let mut gateway = setup.start();
    let mut stream = begin_stream(&gateway, "endless");
    let mut whole = Client::connect(gateway.addr());
    whole.send(chat_request("slow", false));
    eventually("both run", || (fleet.stats().requests == 2).then_some(()));

    gateway.signal(libc::SIGTERM);
    let text = rest_of(&mut stream);
    assert!(!text.contains("[DONE]"), "{text}");
    assert!(text.contains("data: {\"error\":{"), "{text}");
    assert!(text.ends_with("\r\n0\r\n\r\n"), "{text}");
    let answer = whole.answer();
    assert_eq!(answer.status, 503);
    assert!(answer.json()["error"]["message"].is_string(), "{}", answer.text());
    assert_eq!(gateway.wait().code(), Some(0), "{}", gateway.log());
    let records = gateway.records();
    assert_eq!(records.len(), 2, "{records:?}");
    assert!(
        records.iter().all(|record| record.outcome == Outcome::Stopped),
        "{records:?}"
    );
    eventually("the upstream is told", || {
        (fleet.stats().streams_aborted == 1 && fleet.stats().plain_aborted == 1).then_some(())
    });
}

#[test]
fn a_reloaded_drain_time_counts() {
    let fleet = fleet("tokens=3,pace=0,first=0");
    let setup = Setup::new(fleet.url())
        .model("endless", ENDLESS)
        .more("drain: 1h\n");
    let mut gateway = setup.start();
    let mut stream = begin_stream(&gateway, "endless");
    gateway.reload(&setup.config().replace("drain: 1h", "drain: 100ms"));
    gateway.signal(libc::SIGTERM);
    assert!(rest_of(&mut stream).contains("\"error\""));
    assert_eq!(gateway.wait().code(), Some(0), "{}", gateway.log());
}

#[test]
fn a_second_signal_ends_at_once() {
    for (first, second) in [(libc::SIGTERM, libc::SIGTERM), (libc::SIGINT, libc::SIGTERM)] {
        let fleet = fleet("tokens=3,pace=0,first=0");
        let setup = Setup::new(fleet.url())
            .model("endless", ENDLESS)
            .more("drain: 1h\n");
        let mut gateway = setup.start();
        let mut stream = begin_stream(&gateway, "endless");
        gateway.signal(first);
        gateway.await_log("draining");
        gateway.signal(second);
        assert!(rest_of(&mut stream).contains("\"error\""));
        assert_eq!(gateway.wait().code(), Some(0), "{}", gateway.log());
        assert_eq!(gateway.records()[0].outcome, Outcome::Stopped);
    }
}

/// A client that takes nothing cannot hold up the end.
#[test]
fn a_client_that_does_not_read_does_not_hold_up_the_end() {
    let fleet = fleet("tokens=1000000,pace=0,first=0,size=1000");
    let mut gateway = Setup::new(fleet.url()).more("drain: 100ms\n").start();
    let stream = begin_stream(&gateway, "fast");
    let sent = || fleet.stats().tokens_sent;
    let mut before = 0;
    eventually("the stream stalls", || {
        let now = sent();
        std::mem::replace(&mut before, now).eq(&now).then_some(())
    });
    gateway.signal(libc::SIGTERM);
    assert_eq!(gateway.wait().code(), Some(0), "{}", gateway.log());
    assert_eq!(gateway.records()[0].outcome, Outcome::Stopped);
    drop(stream);
}

#[test]
fn systemd_is_told() {
    let fleet = fleet("tokens=1,pace=0,first=0");
    let setup = Setup::new(fleet.url());
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("notify");
    let socket = UnixDatagram::bind(&path).expect("a socket");
    socket.set_read_timeout(Some(PATIENCE)).expect("a socket");
    let mut command = Command::new(BINARY);
    command.env("NOTIFY_SOCKET", &path);
    let mut gateway = Gateway::try_start_by(command, directory, &setup.config()).expect("a start");
    let await_line = |wanted: &str| {
        let mut buffer = [0; 4096];
        loop {
            let n = socket
                .recv(&mut buffer)
                .unwrap_or_else(|error| panic!("{error}: {wanted}"));
            let text = String::from_utf8_lossy(&buffer[..n]);
            if text.lines().any(|line| line == wanted) {
                return text.into_owned();
            }
        }
    };
    await_line("READY=1");
    gateway.reload(&setup.config());
    assert!(await_line("RELOADING=1").contains("MONOTONIC_USEC="));
    await_line("READY=1");
    // A refused reload is over, too.
    gateway.reload("]");
    await_line("RELOADING=1");
    await_line("READY=1");
    gateway.signal(libc::SIGTERM);
    await_line("STOPPING=1");
    assert_eq!(gateway.wait().code(), Some(0));
}

#[test]
fn an_address_in_use_is_named() {
    let fleet = fleet("tokens=1,pace=0,first=0");
    let taken = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = taken.local_addr().expect("an address").to_string();
    let config = Setup::new(fleet.url()).config();
    let listener = config.replacen("- address: 127.0.0.1:0", &format!("- address: {address}"), 1);
    assert_fails_with(&listener, &[&address, "in use"]);
    let admin = config.replacen(
        "admin: { address: \"127.0.0.1:0\"",
        &format!("admin: {{ address: \"{address}\""),
        1,
    );
    assert_fails_with(&admin, &[&address, "in use"]);
    // `SO_REUSEPORT` would let a second gateway take half of the first one's clients.
    let running = Setup::new(fleet.url()).start();
    let address = running.addr().to_string();
    let second = config.replacen("- address: 127.0.0.1:0", &format!("- address: {address}"), 1);
    assert_fails_with(&second, &[&address, "in use"]);
    let nowhere = config.replacen("- address: 127.0.0.1:0", "- address: 192.0.2.1:1", 1);
    assert_fails_with(&nowhere, &["192.0.2.1:1"]);
}

#[test]
fn a_state_directory_has_one_gateway() {
    let fleet = fleet("tokens=1,pace=0,first=0");
    let running = Setup::new(fleet.url()).start();
    let state = running.state().display().to_string();
    let config = Setup::new(fleet.url()).config().replace("{dir}/state", &state);
    assert_fails_with(&config, &[&state, &format!("process {}", running.pid())]);
    assert_eq!(status_with(&running, KEY), 200);
}

#[test]
fn check_tells_by_its_exit_code() {
    let good = Setup::new("http://127.0.0.1:1").config();
    let output = run(&["check"], &good);
    assert_eq!(output.status.code(), Some(0), "{}", errors(&output));
    assert!(String::from_utf8_lossy(&output.stdout).contains("1 listener, 1 provider, 1 model"));
    // The upstream's key stands in the file, which is a warning.
    assert!(errors(&output).contains("warning: "));
    assert_eq!(run(&["check", "--strict"], &good).status.code(), Some(2));
    let bad = good.clone() + "modles: []\n";
    for command in ["check", "run"] {
        let output = run(&[command], &bad);
        assert_eq!(output.status.code(), Some(2), "{}", errors(&output));
        assert!(errors(&output).contains("models"), "{}", errors(&output));
        assert!(output.stdout.is_empty());
    }
    let output = Command::new(BINARY)
        .args(["check", "-c", "/nonexistent/gateway.yaml"])
        .output()
        .expect("the gateway's binary");
    assert_eq!(output.status.code(), Some(2));
    assert!(errors(&output).contains("/nonexistent/gateway.yaml"));
}

#[test]
fn both_engines_serve_and_are_named() {
    for (driver, engine) in [("epoll", "epoll"), ("auto", "")] {
        let fleet = fleet("tokens=5,pace=0,first=0");
        let mut gateway = Setup::new(fleet.url()).workers(2, driver).start();
        let ready = gateway.await_log("\"ready\"");
        assert!(ready.contains(&format!("\"engine\":\"{engine}")), "{ready}");
        let mut client = Client::connect(gateway.addr());
        client.send(chat_request("fast", true));
        assert_eq!(client.answer().content(), expected_content(5));
        gateway.signal(libc::SIGTERM);
        assert_eq!(gateway.wait().code(), Some(0));
    }
}
