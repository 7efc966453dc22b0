//! A client that keeps being refused is dropped by the kernel, for a while, and nobody else notices.
//!
//! Clients are told apart by their loopback address. Needs root and BPF; without them the tests print `skipped: …` and
//! pass, unless `GATEWAY_TESTS_REQUIRED=kernel` is set.

mod support;

use std::{
    io,
    net::{IpAddr, Ipv4Addr},
    process::Command,
};

use gateway_bench::upstream::Server;
use serde_json::Value;
use support::{
    BINARY, Gateway, KEY, Setup,
    client::{Client, chat, chat_request, expected_content},
    eventually, fleet, skipped,
};

/// Refusals that make an offender in these tests.
const AFTER: usize = 10;
/// Who floods, who behaves, and one more whose block shows that the gateway has caught up.
const FLOOD: IpAddr = IpAddr::V4(Ipv4Addr::new(127, 0, 0, 2));
const GOOD: IpAddr = IpAddr::V4(Ipv4Addr::new(127, 0, 0, 3));
const CONTROL: IpAddr = IpAddr::V4(Ipv4Addr::new(127, 0, 0, 4));

fn config(fleet: &Server, mode: &str, drop: &str) -> String {
    let mut setup = Setup::new(fleet.url()).model("endless", "sim:tokens=1000000,pace=5ms,first=0");
    setup.more = format!(
        "kernel: {{ mode: {mode}, drop: {{ after_refusals: {AFTER}, within: 1m, {drop} }} }}\nworkers: {{ threads: 2 }}\n"
    );
    setup.config()
}

/// A gateway with the kernel's help; `None` where there is none to be had.
fn start(fleet: &Server, mode: &str, drop: &str) -> Option<Gateway> {
    let gateway = Gateway::start(&config(fleet, mode, drop));
    let log = gateway.log();
    let Some(off) = log.lines().find(|line| line.contains("kernel plane is off")) else {
        return Some(gateway);
    };
    skipped("kernel", off);
    None
}

/// One request from an address; the status of its answer.
fn ask(gateway: &Gateway, from: IpAddr, key: &str) -> io::Result<u16> {
    let mut client = Client::try_connect(gateway.addr(), Some(from))?;
    let body = chat("fast", false);
    client.try_send(format!(
        "POST /v1/chat/completions HTTP/1.1\r\nhost: test\r\nauthorization: Bearer {key}\r\n\
         content-length: {}\r\n\r\n{body}",
        body.len()
    ))?;
    Ok(client.try_answer()?.status)
}

/// Whether a new connection from an address is dropped.
fn is_dropped(gateway: &Gateway, from: IpAddr) -> bool {
    match Client::try_connect(gateway.addr(), Some(from)) {
        Ok(_) => false,
        Err(error) => {
            let kind = error.kind();
            assert!(
                matches!(
                    kind,
                    io::ErrorKind::ConnectionRefused | io::ErrorKind::ConnectionReset
                ),
                "{error}"
            );
            true
        }
    }
}

/// Lets an address be refused until the kernel drops it; how often it was answered before.
fn flood_until_dropped(gateway: &Gateway, from: IpAddr) -> usize {
    let mut answered = 0;
    eventually("the kernel drops the flood", || {
        match ask(gateway, from, "wrong") {
            // Came through before the kernel knew of the block, and met a core that did.
            Ok(429) => None,
            Ok(status) => {
                assert_eq!(status, 401);
                answered += 1;
                None
            }
            Err(_) => is_dropped(gateway, from).then_some(()),
        }
    });
    answered
}

fn kernel(gateway: &Gateway) -> Value {
    let answer = gateway.admin("GET /kernel", "");
    assert_eq!(answer.status, 200, "{}", answer.text());
    answer.json()
}

#[test]
fn a_flood_is_dropped_in_the_kernel_and_streams_of_others_lose_nothing() {
    const STREAMS: usize = 4;
    const DROPS: usize = 500;
    let fleet = fleet("tokens=300,pace=5ms,first=0");
    let Some(gateway) = start(&fleet, "auto", "for: 1h") else {
        return;
    };
    let from = |address| Client::try_connect(gateway.addr(), Some(address)).expect("a connection");
    let mut streams: Vec<Client> = (0..STREAMS).map(|_| from(GOOD)).collect();
    for stream in &mut streams {
        stream.send(chat_request("fast", true));
    }
    // What the offender itself has open from before: a stream, a kept connection, a head that has begun.
    let mut own = from(FLOOD);
    own.send(chat_request("endless", true));
    own.receive_until(b"t0 ");
    let mut kept = from(FLOOD);
    kept.get("/healthz");
    assert_eq!(kept.answer().status, 200);
    let mut begun = from(FLOOD);
    begun.send("POST /v1/chat/completions HTTP/1.1\r\n");

    let answered = flood_until_dropped(&gateway, FLOOD);
    assert!(answered >= AFTER, "dropped after {answered} refusals");
    let before = kernel(&gateway)["dropped"].as_u64().expect("a number");
    for _ in 0..DROPS {
        assert!(is_dropped(&gateway, FLOOD));
    }
    assert_eq!(ask(&gateway, GOOD, KEY).expect("an answer"), 200);
    let state = kernel(&gateway);
    assert!(
        state["dropped"].as_u64() >= Some(before + DROPS as u64),
        "{state}"
    );
    assert_eq!(state["blocked"][0]["net"], format!("{FLOOD}/32"), "{state}");
    assert!(gateway.log().contains("blocked"), "{}", gateway.log());
    for mut stream in streams {
        let answer = stream.answer();
        assert_eq!(answer.content(), expected_content(300));
        assert_eq!(answer.events().last().map(String::as_str), Some("[DONE]"));
    }
    let rest = own.rest().expect("a proper end");
    assert!(String::from_utf8_lossy(&rest).contains("client_blocked"));
    assert!(rest.ends_with(b"0\r\n\r\n"), "the last chunk");
    assert!(kept.is_closed());
    let answer = begun.answer();
    assert_eq!((answer.status, answer.keep_alive), (429, false));

    let unblock = format!(r#"{{"client":"{FLOOD}"}}"#);
    assert_eq!(gateway.admin("POST /kernel/unblock", &unblock).status, 200);
    assert_eq!(ask(&gateway, FLOOD, KEY).expect("an answer"), 200);
}

#[test]
fn after_its_time_a_client_may_come_back() {
    let fleet = fleet("tokens=1,pace=0,first=0");
    let Some(gateway) = start(&fleet, "auto", "for: 1s") else {
        return;
    };
    flood_until_dropped(&gateway, FLOOD);
    eventually("the hold is over", || {
        (!is_dropped(&gateway, FLOOD)).then_some(())
    });
    assert_eq!(ask(&gateway, FLOOD, KEY).expect("an answer"), 200);
    // And is watched as before.
    assert!(flood_until_dropped(&gateway, FLOOD) >= AFTER);
}

#[test]
fn observe_counts_and_drops_nobody() {
    let fleet = fleet("tokens=1,pace=0,first=0");
    let Some(gateway) = start(&fleet, "observe", "for: 1h") else {
        return;
    };
    eventually("what would be dropped is counted", || {
        assert_eq!(ask(&gateway, FLOOD, "wrong").expect("an answer"), 401);
        (kernel(&gateway)["would_drop"].as_u64() > Some(0)).then_some(())
    });
    for _ in 0..AFTER {
        assert_eq!(ask(&gateway, FLOOD, "wrong").expect("an answer"), 401);
    }
    assert_eq!(kernel(&gateway)["dropped"], 0);
}

#[test]
fn exempt_networks_and_clients_that_are_let_in_are_not_dropped() {
    let fleet = fleet("tokens=1,pace=0,first=0");
    let Some(gateway) = start(&fleet, "auto", "for: 1h, exempt: [127.0.0.2/32]") else {
        return;
    };
    for turn in 0..5 * AFTER {
        assert_eq!(ask(&gateway, FLOOD, "wrong").expect("an answer"), 401);
        // Every third request of this one is good: what was held against it is forgotten.
        let key = if turn % 3 == 0 { KEY } else { "wrong" };
        let status = ask(&gateway, GOOD, key).expect("an answer");
        assert_eq!(status, if key == KEY { 200 } else { 401 });
    }
    flood_until_dropped(&gateway, CONTROL);
    assert!(!is_dropped(&gateway, FLOOD));
    assert!(!is_dropped(&gateway, GOOD));
    let state = kernel(&gateway);
    assert_eq!(state["blocked"].as_array().map(Vec::len), Some(1), "{state}");
}

/// Without the right to load programs everything else works, and it is said what does not.
#[test]
fn without_rights_it_serves_and_says_what_is_off() {
    let fleet = fleet("tokens=1,pace=0,first=0");
    let directory = tempfile::tempdir().expect("a directory");
    let powerless = || {
        let mut command = Command::new("setpriv");
        command.args(["--bounding-set", "-bpf,-sys_admin", "--inh-caps", "-all", BINARY]);
        command
    };
    let probe = powerless().arg("--version").output();
    if !probe.is_ok_and(|output| output.status.success()) {
        return skipped("root", "setpriv cannot take capabilities away here");
    }
    let gateway = Gateway::try_start_by(powerless(), directory, &config(&fleet, "auto", "for: 1h"))
        .unwrap_or_else(|log| panic!("{log}"));
    let warning = gateway.await_log("kernel plane is off");
    assert!(warning.contains("CAP_BPF is missing"), "{warning}");
    assert!(warning.contains("\"level\":\"WARN\""), "{warning}");
    for _ in 0..2 * AFTER {
        assert_eq!(ask(&gateway, FLOOD, "wrong").expect("an answer"), 401);
    }
    assert_eq!(ask(&gateway, FLOOD, KEY).expect("an answer"), 200);
    let status = gateway.admin("GET /status", "").json();
    assert!(status["degraded"].to_string().contains("CAP_BPF"), "{status}");
    assert_eq!(kernel(&gateway)["loaded"], false);

    let directory = tempfile::tempdir().expect("a directory");
    let required = config(&fleet, "required", "for: 1h");
    let log = Gateway::try_start_by(powerless(), directory, &required)
        .err()
        .expect("no start");
    assert!(
        log.contains("kernel.mode is required") && log.contains("CAP_BPF"),
        "{log}"
    );
}
