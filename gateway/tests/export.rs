//! Continuous delivery to ClickHouse: each record at least once, whatever fails in between.
//!
//! Against ClickHouse's own engine: the Python package chdb in `target/chdb-venv` (`tests/setup.sh` puts it there), with as
//! much of its HTTP interface as the export uses. Without it the tests print `skipped: …` and pass.

mod support;

use std::{
    collections::BTreeSet,
    io::{BufRead, BufReader},
    net::SocketAddr,
    path::Path,
    process::{Child, ChildStdin, Command, Stdio},
};

use support::{
    Gateway, Setup,
    client::{Client, chat},
    eventually, fleet, skipped,
};

/// The engine. Dropping it ends it.
struct ClickHouse {
    child: Child,
    _stdin: Option<ChildStdin>,
    addr: SocketAddr,
}

impl ClickHouse {
    fn start() -> Option<ClickHouse> {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let python = root.join("../target/chdb-venv/bin/python");
        let import = Command::new(&python).args(["-c", "import chdb"]).output();
        if !import.is_ok_and(|output| output.status.success()) {
            skipped(
                "clickhouse",
                "no Python with chdb in target/chdb-venv (tests/setup.sh makes it)",
            );
            return None;
        }
        let mut child = Command::new(python)
            .arg(root.join("tests/support/clickhouse.py"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("python");
        let mut line = String::new();
        let stdout = child.stdout.take().expect("a pipe");
        BufReader::new(stdout).read_line(&mut line).expect("a port");
        let port: u16 = line.trim().parse().expect("a port");
        Some(ClickHouse {
            _stdin: child.stdin.take(),
            child,
            addr: ([127, 0, 0, 1], port).into(),
        })
    }

    fn post(&self, target: &str, body: &str) -> (u16, String) {
        let mut client = Client::connect(self.addr);
        let length = body.len();
        client.send(format!(
            "POST {target} HTTP/1.1\r\nhost: clickhouse\r\nx-test: yes\r\ncontent-length: {length}\r\n\r\n{body}"
        ));
        let answer = client.answer();
        (answer.status, answer.text())
    }

    /// Makes the server answer 503 (`down`), lose its next answer (`lost`), or work (`ok`).
    fn mode(&self, mode: &str) {
        assert_eq!(self.post("/fail", mode).0, 200);
    }

    /// The rows of a query; none while the table is not there.
    fn query(&self, query: &str) -> Vec<String> {
        let (status, text) = self.post(&format!("/?query={}", query.replace(' ', "+")), "");
        match status {
            200 => text.lines().map(str::to_owned).collect(),
            _ if text.contains("UNKNOWN_TABLE") => Vec::new(),
            _ => panic!("{text}"),
        }
    }
}

impl Drop for ClickHouse {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn config(server: &ClickHouse, upstream: &str) -> String {
    let addr = server.addr;
    let ledger = format!(
        "ledger: {{ path: \"{{dir}}/state\", keep: 0, export: {{ clickhouse: {{ url: \"http://{addr}\", every: 100ms }} }} }}\n"
    );
    let config = Setup::new(upstream)
        .more("prices: [{ model: sim, input: 1, output: 2 }]\n")
        .model("unknown", "unpriced")
        .config();
    config.replace("ledger: { path: \"{dir}/state\" }\n", &ledger)
}

fn ask(gateway: &Gateway, times: usize) {
    let mut client = Client::connect(gateway.addr());
    for number in 0..times {
        let model = if number % 5 == 0 { "unknown" } else { "fast" };
        client.post("/v1/chat/completions", &chat(model, number % 2 == 0));
        assert_eq!(client.answer().status, 200);
    }
}

/// Times, ids, tokens and costs as the gateway's own books have them.
fn own(gateway: &Gateway) -> BTreeSet<String> {
    gateway.records().iter().map(line_of).collect()
}

fn line_of(record: &gateway::ledger::record::Record) -> String {
    let cost = record.cost.map_or("\\N".into(), |cost| cost.to_string());
    let usage = record.usage;
    format!("{}\t{}\t{}\t{cost}", record.id, usage.prompt, usage.completion)
}

const EXPORTED: &str =
    "SELECT id, prompt_tokens, completion_tokens, cost_nano_usd FROM gateway_requests FINAL ORDER BY id";

fn metric(gateway: &Gateway, name: &str) -> u64 {
    let text = gateway.admin("GET /metrics", "").text();
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix(&format!("{name} ")));
    line.unwrap_or_else(|| panic!("{name} in {text}"))
        .parse()
        .expect("a number")
}

#[test]
fn each_record_comes_at_least_once_whatever_fails() {
    let Some(server) = ClickHouse::start() else { return };
    let fleet = fleet("tokens=3,pace=0,first=0");
    let config = config(&server, &fleet.url());
    let gateway = Gateway::start(&config);
    ask(&gateway, 20);
    // `keep: 0`: what was delivered may be gone from the gateway's own books after a restart.
    let mut seen = BTreeSet::new();
    let delivered = |gateway: &Gateway, seen: &mut BTreeSet<String>, count: usize| {
        seen.extend(own(gateway));
        eventually(&format!("{count} rows"), || {
            let rows: BTreeSet<String> = server.query(EXPORTED).into_iter().collect();
            (rows.len() >= count).then_some(rows)
        });
        assert_eq!(server.query(EXPORTED).into_iter().collect::<BTreeSet<_>>(), *seen);
    };
    delivered(&gateway, &mut seen, 20);

    // The server is gone: clients notice nothing, operators do.
    server.mode("down");
    ask(&gateway, 15);
    eventually("the failure is seen", || {
        (metric(&gateway, "gateway_export_failures_total") > 0).then_some(())
    });
    let status = gateway.admin("GET /status", "").text();
    assert!(status.contains("export: ") && status.contains("503"), "{status}");
    assert!(metric(&gateway, "gateway_export_behind_bytes") > 0);
    server.mode("ok");
    delivered(&gateway, &mut seen, 35);

    // An answer is lost: the batch comes again, and ids tell.
    server.mode("lost");
    ask(&gateway, 5);
    delivered(&gateway, &mut seen, 40);

    // Killed while the server is gone, it goes on where it was.
    server.mode("down");
    ask(&gateway, 10);
    seen.extend(gateway.await_records(50).iter().map(line_of));
    let directory = gateway.kill();
    server.mode("ok");
    let gateway = Gateway::start_in(directory, &config);
    delivered(&gateway, &mut seen, 50);
    eventually("nothing is left", || {
        (metric(&gateway, "gateway_export_behind_bytes") == 0).then_some(())
    });
    assert_eq!(metric(&gateway, "gateway_export_lost_segments_total"), 0);
}

#[test]
fn a_stopping_gateway_delivers_what_is_left() {
    let Some(server) = ClickHouse::start() else { return };
    let fleet = fleet("tokens=3,pace=0,first=0");
    let config = config(&server, &fleet.url()).replace("every: 100ms", "every: 10m");
    let mut gateway = Gateway::start(&config);
    ask(&gateway, 5);
    let own: BTreeSet<String> = gateway.await_records(5).iter().map(line_of).collect();
    assert!(server.query(EXPORTED).is_empty());
    gateway.signal(libc::SIGTERM);
    assert!(gateway.wait().success());
    assert_eq!(server.query(EXPORTED).into_iter().collect::<BTreeSet<_>>(), own);
}

#[test]
fn what_cannot_be_a_server_or_a_table_is_refused() {
    let refused = |text: &str| {
        let config = Setup::new("http://127.0.0.1:1").config();
        let ledger = format!("ledger: {{ path: \"{{dir}}/state\", export: {{ clickhouse: {text} }} }}\n");
        let config = config.replace("ledger: { path: \"{dir}/state\" }\n", &ledger);
        match Gateway::try_start_in(tempfile::tempdir().expect("a directory"), &config) {
            Ok(_) => panic!("{text} was taken"),
            Err(log) => log,
        }
    };
    assert!(refused("{ url: \"nowhere\" }").contains("ledger.export.clickhouse.url"));
    assert!(refused("{ url: \"http://h:1\", table: \"a; DROP TABLE b\" }").contains("not a table's name"));
}
