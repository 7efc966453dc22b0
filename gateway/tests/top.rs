//! `gateway top`: the figures of clients and keys, as JSON, as a table, and live on a terminal.

mod support;

use std::{
    io::{Read, Write},
    net::{IpAddr, Ipv4Addr},
    process::{Command, Stdio},
    sync::mpsc,
    time::Instant,
};

use support::{
    BINARY, Gateway, PATIENCE, Setup,
    client::{Client, chat_request},
    eventually, fleet, skipped,
};

/// Kills a command that a failing test leaves behind.
struct Killed(std::process::Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

const ONE: IpAddr = IpAddr::V4(Ipv4Addr::new(127, 0, 0, 31));
const OTHER: IpAddr = IpAddr::V4(Ipv4Addr::new(127, 0, 0, 32));

fn ask(gateway: &Gateway, from: IpAddr, request: impl AsRef<[u8]>) -> Client {
    let mut client = Client::try_connect(gateway.addr(), Some(from)).expect("a connection");
    client.send(request);
    assert!(client.answer().status > 0);
    client
}

/// A gateway with one client that used it and one that was refused; both still connected.
fn used() -> (gateway_bench::upstream::Server, Gateway, [Client; 2]) {
    let fleet = fleet("tokens=7,pace=0,first=0");
    let gateway = Setup::new(fleet.url()).start();
    let one = ask(&gateway, ONE, chat_request("fast", false));
    let other = ask(
        &gateway,
        OTHER,
        "GET /v1/models HTTP/1.1\r\nhost: test\r\nauthorization: Bearer no\r\n\r\n",
    );
    gateway.await_records(1);
    (fleet, gateway, [one, other])
}

/// Arguments by which a command finds the gateway, whose configuration says port 0.
fn reach(gateway: &Gateway) -> [String; 4] {
    let token = gateway.state().join("admin.token");
    [
        "--admin".into(),
        gateway.admin.to_string(),
        "--token-file".into(),
        token.display().to_string(),
    ]
}

#[test]
fn figures_of_clients_and_keys() {
    let (_fleet, gateway, _clients) = used();
    let row = |sort: &str, place: usize| {
        let top = gateway.admin(&format!("GET /top?sort={sort}&limit=5"), "").json();
        assert!(top["kernel_off"].is_string(), "{top}");
        (top["clients"][place].clone(), top["keys"][0].clone())
    };
    let (client, _) = row("tokens", 0);
    assert_eq!(client["client"], ONE.to_string());
    assert_eq!(
        (&client["requests"], &client["connections"]),
        (&1.into(), &1.into())
    );
    assert!(client["tokens"].as_u64() >= Some(7), "{client}");
    assert!(client["bytes_out"].as_u64() > Some(0), "{client}");
    assert!(client["rtt_us"].is_null(), "without the kernel nobody knows");
    let (client, _) = row("refusals", 0);
    assert_eq!(
        (&client["client"], &client["refusals"]),
        (&OTHER.to_string().into(), &1.into())
    );
    let key = eventually("the ledger's sums", || {
        Some(row("tokens", 0).1).filter(|key| !key.is_null())
    });
    assert_eq!((&key["key"], &key["requests"]), (&"alice".into(), &1.into()));

    for wrong in ["sort=beauty", "limit=x", "order=up"] {
        let answer = gateway.admin(&format!("GET /top?{wrong}"), "");
        assert_eq!(answer.status, 400, "{wrong}");
    }
}

#[test]
fn a_closed_connection_is_not_counted_as_open() {
    let (_fleet, gateway, clients) = used();
    drop(clients);
    eventually("both are gone", || {
        let top = gateway.admin("GET /top", "").json();
        let clients = top["clients"].as_array().expect("a list").clone();
        (clients.len() == 2 && clients.iter().all(|client| client["connections"] == 0)).then_some(())
    });
}

#[test]
fn once_and_json_print_and_end() {
    let (_fleet, gateway, _clients) = used();
    let run = |arguments: &[&str]| {
        let mut command = Command::new(BINARY);
        command.arg("top").args(arguments).args(reach(&gateway));
        command.stdin(Stdio::null()).output().expect("the binary")
    };
    let output = run(&["--once", "--sort", "refusals"]);
    let text = String::from_utf8(output.stdout).expect("text");
    assert!(output.status.success(), "{text}");
    let lines: Vec<&str> = text.lines().collect();
    assert!(lines[0].starts_with("by refusals: connections 2 "), "{text}");
    assert!(lines[1].contains("switched off"), "{text}");
    let head = lines.iter().position(|line| line.starts_with("CLIENT"));
    let first = lines[head.expect("a table") + 1];
    assert!(first.starts_with(&OTHER.to_string()), "{text}");
    assert!(!text.contains('\u{1b}'), "no control characters into a pipe");
    let output = run(&["--json"]);
    let top: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(top["clients"].as_array().map(Vec::len), Some(2));
    let arguments = reach(&gateway);
    let directory = gateway.kill();
    let output = Command::new(BINARY)
        .arg("top")
        .args(arguments)
        .output()
        .expect("the binary");
    assert_eq!(output.status.code(), Some(1), "nobody answers");
    drop(directory);
}

/// What comes out of a pipe, so that it can be waited for with a deadline.
fn drawn(mut pipe: impl Read + Send + 'static) -> mpsc::Receiver<Vec<u8>> {
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        let mut buffer = [0; 4096];
        while let Ok(n @ 1..) = pipe.read(&mut buffer) {
            if sender.send(buffer[..n].to_vec()).is_err() {
                return;
            }
        }
    });
    receiver
}

/// The process of a command that `script` runs.
fn child_of(script: u32) -> Option<u32> {
    let children = std::fs::read_to_string(format!("/proc/{script}/task/{script}/children")).ok()?;
    children.split_whitespace().next()?.parse().ok()
}

/// On a terminal it draws until a key or a signal ends it, and leaves the terminal as it was.
#[test]
fn live_on_a_terminal_until_it_is_ended() {
    let (_fleet, gateway, _clients) = used();
    // script(1) gives the command a terminal of its own.
    if !Command::new("script")
        .arg("--version")
        .output()
        .is_ok_and(|output| output.status.success())
    {
        return skipped("tools", "script(1) is not here");
    }
    for end in [Some(b"q".as_slice()), Some(b"\x03"), None] {
        let command = format!("exec {BINARY} top --every 200ms {}", reach(&gateway).join(" "));
        let child = Command::new("script")
            .args(["-qefc", &command, "/dev/null"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("script");
        let mut child = Killed(child);
        let mut input = child.0.stdin.take().expect("a pipe");
        let drawn = drawn(child.0.stdout.take().expect("a pipe"));
        let mut seen = Vec::new();
        let receive_until = |text: &str, seen: &mut Vec<u8>| {
            let began = Instant::now();
            while memchr::memmem::find(seen, text.as_bytes()).is_none() {
                assert!(
                    began.elapsed() < PATIENCE,
                    "{text:?} did not come: {}",
                    seen.escape_ascii()
                );
                match drawn.recv_timeout(PATIENCE) {
                    Ok(bytes) => seen.extend(bytes),
                    Err(_) => panic!("{text:?} did not come: {}", seen.escape_ascii()),
                }
            }
        };
        receive_until("by connections", &mut seen);
        input.write_all(b"t").expect("a key");
        receive_until("by tokens", &mut seen);
        match end {
            Some(key) => input.write_all(key).expect("a key"),
            None => {
                let top = child_of(child.0.id()).expect("the command");
                gateway::net::process::terminate(top);
            }
        }
        receive_until("\u{1b}[?1049l", &mut seen);
        let began = Instant::now();
        let status = eventually("it ends", || child.0.try_wait().expect("a child"));
        assert!(status.success() && began.elapsed() < PATIENCE);
        assert!(
            memchr::memmem::find(&seen, b"\x1b[?25h").is_some(),
            "the cursor is back"
        );
    }
}
