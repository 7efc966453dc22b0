//! What a client saw completed is in the books, once, whenever the process is killed.

mod support;

use std::{
    collections::{HashMap, HashSet},
    io,
    net::SocketAddr,
    process::{Command, Stdio},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    thread,
    time::Duration,
};

use gateway::ledger::record::{Flags, Outcome, Record};
use support::{
    Gateway, KEY, Setup,
    client::{Client, chat, chat_request},
    eventually, fleet, skipped,
};

/// Times that the process is killed, unless the environment says otherwise: `GATEWAY_CRASH_ROUNDS=100`.
const ROUNDS: usize = 20;

fn rounds() -> usize {
    let number = std::env::var("GATEWAY_CRASH_ROUNDS").ok();
    number.map_or(ROUNDS, |number| {
        number.parse().expect("GATEWAY_CRASH_ROUNDS is a number")
    })
}

/// Nano-dollars per input and output token.
const PRICE: (u64, u64) = (2500, 10_000);
const PRICES: &str = "prices: [{ model: sim, input: 2.5, output: 10 }]\n";

/// Clients that ask at the same time.
const CLIENTS: usize = 6;
/// Tokens of each answer.
const TOKENS: u64 = 5;

/// An answer that a client saw complete.
#[derive(Debug, Clone)]
struct Seen {
    id: String,
    stream: bool,
}

/// What clients saw over all rounds.
type Notes = Arc<Mutex<Vec<Seen>>>;

/// One request; returns the id of its answer when that was seen complete: for a stream that is its `[DONE]`, though the
/// last chunk of the body may be missing.
fn ask(client: &mut Client, stream: bool) -> io::Result<Seen> {
    client.try_send(chat_request("fast", stream))?;
    let id = if stream {
        let head = client.try_receive_until(b"\r\n\r\n")?;
        let head = String::from_utf8_lossy(&head).to_lowercase();
        let (_, rest) = head.split_once("x-request-id: ").expect("an id");
        let id = rest.lines().next().expect("a line").to_string();
        client.try_receive_until(b"data: [DONE]\n\n")?;
        id
    } else {
        let answer = client.try_answer()?;
        assert_eq!(answer.status, 200, "{}", answer.text());
        answer.field("x-request-id").expect("an id").to_string()
    };
    Ok(Seen { id, stream })
}

/// Asks, connection after connection, until the gateway is gone.
fn ask_until_killed(gateway: SocketAddr, client: usize, notes: &Notes, noted: &AtomicUsize) {
    let mut stream = client.is_multiple_of(2);
    while let Ok(mut connection) = Client::try_connect(gateway, None) {
        // The rest of a stream's last chunk stands before the next answer, so a stream ends its connection.
        while let Ok(seen) = ask(&mut connection, stream) {
            notes.lock().expect("no panic while locked").push(seen);
            noted.fetch_add(1, Ordering::Relaxed);
            stream = !stream;
            if !stream {
                break;
            }
        }
    }
}

/// A number that differs from run to run: where in a request's life the kill comes is left to chance.
fn chance(below: u64) -> u64 {
    static STATE: AtomicU64 = AtomicU64::new(0);
    let mut seed = [0; 8];
    getrandom::fill(&mut seed).expect("entropy");
    let state = STATE.fetch_add(u64::from_le_bytes(seed), Ordering::Relaxed);
    state % below
}

/// Each noted answer has one record, complete and with its tokens, and no id is there twice.
fn check(records: &[Record], notes: &Notes) {
    let mut by_id = HashMap::new();
    for record in records {
        let twice = by_id.insert(record.id.to_string(), record);
        assert!(twice.is_none(), "{} is in the books twice", record.id);
    }
    for seen in notes.lock().expect("no panic while locked").iter() {
        let record = by_id
            .get(&seen.id)
            .unwrap_or_else(|| panic!("{seen:?} was seen complete and is not in the books"));
        assert_eq!(record.outcome, Outcome::Complete, "{seen:?}");
        assert_eq!(record.usage.completion, TOKENS, "{seen:?}");
        assert_eq!(record.status, 200, "{seen:?}");
        let cost = record.usage.prompt * PRICE.0 + TOKENS * PRICE.1;
        assert_eq!(record.cost, Some(cost), "{seen:?}");
        assert_eq!(record.flags.has(Flags::STREAM), seen.stream, "{seen:?}");
    }
}

/// The sums of `gateway usage`: requests, prompt tokens, completion tokens, nano-dollars.
fn sums(gateway: &Gateway) -> [u64; 4] {
    let output = gateway.command(&["usage", "--json"]);
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let document: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    ["requests", "prompt_tokens", "completion_tokens", "cost_nano_usd"].map(|name| {
        document["total"][name]
            .as_u64()
            .unwrap_or_else(|| panic!("{name} in {document}"))
    })
}

/// The same, from the records.
fn sums_of(records: &[Record]) -> [u64; 4] {
    [
        records.len() as u64,
        records.iter().map(|record| record.usage.prompt).sum(),
        records.iter().map(|record| record.usage.completion).sum(),
        records.iter().filter_map(|record| record.cost).sum(),
    ]
}

#[test]
fn what_was_seen_complete_is_in_the_books_once_whenever_it_is_killed() {
    let fleet = fleet(&format!("tokens={TOKENS},pace=300us,first=300us"));
    let config = Setup::new(fleet.url()).more(PRICES).config();
    let notes = Notes::default();
    let mut directory = tempfile::tempdir().expect("a directory");
    for round in 0..rounds() {
        let gateway = Gateway::start_in(directory, &config);
        check(&gateway.records(), &notes);
        let noted = AtomicUsize::new(0);
        directory = thread::scope(|scope| {
            for client in 0..CLIENTS {
                let (to, notes, noted) = (gateway.addr(), &notes, &noted);
                scope.spawn(move || ask_until_killed(to, client, notes, noted));
            }
            eventually("answers", || {
                (noted.load(Ordering::Relaxed) >= CLIENTS * (1 + round % 3)).then_some(())
            });
            thread::sleep(Duration::from_micros(chance(3000)));
            gateway.kill()
        });
    }
    let gateway = Gateway::start_in(directory, &config);
    let records = gateway.records();
    check(&records, &notes);
    assert!(records.iter().any(|record| record.outcome == Outcome::Complete));
    assert_eq!(sums(&gateway), sums_of(&records));
    let ids: HashSet<String> = records.iter().map(|record| record.id.to_string()).collect();
    assert_eq!(ids.len(), records.len());
}

/// Replay itself may be killed, at any moment and again and again: nothing is lost and nothing summed up twice.
#[test]
fn a_start_that_is_killed_changes_no_sum() {
    const REQUESTS: usize = 40;
    let fleet = fleet(&format!("tokens={TOKENS},pace=0,first=0"));
    let config = Setup::new(fleet.url()).more(PRICES).config();
    let gateway = Gateway::start(&config);
    let mut client = Client::connect(gateway.addr());
    for _ in 0..REQUESTS {
        client.post("/v1/chat/completions", &chat("fast", false));
        assert_eq!(client.answer().status, 200);
    }
    let path = gateway.config_path();
    let directory = gateway.kill();
    for _ in 0..rounds() {
        let mut command = Command::new(env!("CARGO_BIN_EXE_gateway"));
        command.arg("run").arg("-c").arg(&path);
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let mut child = command.spawn().expect("the gateway's binary");
        thread::sleep(Duration::from_micros(chance(60_000)));
        child.kill().expect("a running process");
        child.wait().expect("a child");
    }
    let gateway = Gateway::start_in(directory, &config);
    let records = gateway.records();
    assert_eq!(records.len(), REQUESTS);
    assert_eq!(sums(&gateway), sums_of(&records));
    assert_eq!(sums(&gateway)[2], REQUESTS as u64 * TOKENS);
}

/// A torn tail and a place of garbage: both are found, reported and skipped, and nothing around them is lost.
#[test]
fn what_a_power_cut_tore_is_reported_and_costs_nothing_else() {
    const REQUESTS: usize = 40;
    let fleet = fleet(&format!("tokens={TOKENS},pace=0,first=0"));
    let config = Setup::new(fleet.url()).workers(1, "auto").more(PRICES).config();
    let gateway = Gateway::start(&config);
    let mut client = Client::connect(gateway.addr());
    for _ in 0..REQUESTS {
        client.post("/v1/chat/completions", &chat("fast", false));
        assert_eq!(client.answer().status, 200);
    }
    let before = gateway.await_records(REQUESTS);
    let directory = gateway.kill();
    // The sums are lost too, as they are written back later than the journal: they are made again from it.
    let state = directory.path().join("state");
    for file in ["usage.db", "usage.db-wal", "usage.db-shm"] {
        let _ = std::fs::remove_file(state.join(file));
    }
    let path = state.join("journal/0-0000000001.seg");
    let mut bytes = std::fs::read(&path).expect("the segment");
    let end = bytes.iter().rposition(|&byte| byte != 0).expect("records") + 1;
    // The last record lost its end, and one in the middle a byte.
    bytes[end - 20..end].fill(0);
    bytes[end / 2] ^= 0x5a;
    std::fs::write(&path, &bytes).expect("a file");
    let gateway = Gateway::start_in(directory, &config);
    let records = gateway.records();
    assert_eq!(records.len(), REQUESTS - 2);
    assert!(records.iter().all(|record| before.contains(record)));
    assert_eq!(sums(&gateway), sums_of(&records));
    gateway.await_log("the journal is damaged here");
    let text = gateway.admin("GET /metrics", "").text();
    assert!(text.contains("\ngateway_ledger_torn_total 2\n"), "{text}");
}

/// Environment variable that tells a child the small file system.
const CHILD: &str = "CRASH_TEST_DISK";

/// A disk that is full: by `ledger.on_error` new requests are refused, or served and counted; either way what was
/// recorded stays, and with room again all is well.
#[test]
fn a_full_disk_ends_service_or_the_books_as_configured() {
    const NO_MOUNT: i32 = 77;
    let dir = tempfile::tempdir().expect("a directory");
    // In a mount namespace of its own, so that nothing is left mounted whatever happens.
    let script = format!("mount -t tmpfs -o size=7m tmpfs \"${CHILD}\" || exit {NO_MOUNT}; exec \"$@\"");
    for policy in ["refuse", "serve"] {
        let output = Command::new("unshare")
            .args(["--mount", "sh", "-c", &script, "sh"])
            .arg(std::env::current_exe().expect("this test"))
            .args(["--ignored", "--exact", "child_fills_the_disk", "--nocapture"])
            .env(CHILD, dir.path())
            .env("CRASH_TEST_POLICY", policy)
            .output();
        match output {
            Ok(output) if output.status.success() => {}
            Ok(output) if matches!(output.status.code(), Some(NO_MOUNT | 1)) => {
                return skipped("root", "mounting a tmpfs is not permitted here");
            }
            Ok(output) => panic!(
                "{policy}: {}\n{}{}",
                output.status,
                String::from_utf8_lossy(&output.stdout),
                String::from_utf8_lossy(&output.stderr)
            ),
            Err(error) => return skipped("root", format_args!("no unshare(1): {error}")),
        }
    }
}

#[test]
#[ignore = "a child of a_full_disk_ends_service_or_the_books_as_configured"]
fn child_fills_the_disk() {
    let Some(disk) = std::env::var_os(CHILD) else {
        return;
    };
    let policy = std::env::var("CRASH_TEST_POLICY").expect("a policy");
    let fleet = fleet("tokens=1,pace=0,first=0");
    // Names as long as can be: the journal is full sooner.
    let name = "n".repeat(120);
    let config = Setup::new(fleet.url())
        .model(&name, "sim")
        .workers(1, "auto")
        .more("prices: [{ model: sim, input: 2.5, output: 10 }]\nlimit_state: { levels: 1024 }\n")
        .config()
        .replace("state\" }", &format!("state\", on_error: {policy} }}"));
    let gateway = Gateway::start_in(tempfile::tempdir_in(&disk).expect("room"), &config);
    let body =
        format!(r#"{{"model":"{name}","user":"{name}","messages":[{{"role":"user","content":"hello"}}]}}"#);
    let tags = format!("a={}", "t".repeat(250));
    let fields = format!("authorization: Bearer {KEY}\r\nx-gateway-tags: {tags}\r\n");
    let mut client = Client::connect(gateway.addr());
    let unrecorded = || -> u64 {
        let text = gateway.admin("GET /metrics", "").text();
        let value = text
            .lines()
            .find_map(|line| line.strip_prefix("gateway_ledger_unrecorded_total "));
        value.expect("the metric").parse().expect("a number")
    };
    let mut served = 0;
    loop {
        client.post_with("/v1/chat/completions", &body, &fields);
        let answer = client.answer();
        if answer.status == 503 {
            assert_eq!(policy, "refuse");
            assert_eq!(answer.json()["error"]["code"], "ledger_full");
            break;
        }
        assert_eq!(answer.status, 200, "{}", answer.text());
        served += 1;
        assert!(served < 100_000, "the journal never fills");
        if policy == "serve" && served % 100 == 0 && unrecorded() > 100 {
            break;
        }
    }
    assert_eq!(gateway.records().len() as u64 + unrecorded(), served);
    let status = gateway.admin("GET /status", "").text();
    assert!(
        status.contains("ledger: cannot make a journal segment"),
        "{status}"
    );
    // With room again records are written again.
    let mounted = Command::new("mount")
        .args(["-o", "remount,size=64m"])
        .arg(&disk)
        .status();
    assert!(mounted.expect("mount").success());
    let before = gateway.records().len();
    eventually("a record", || {
        client.post_with("/v1/chat/completions", &body, &fields);
        let status = client.answer().status;
        assert!(status == 200 || policy == "refuse");
        (gateway.records().len() > before).then_some(())
    });
    let records = gateway.records();
    eventually("the sums", || (sums(&gateway) == sums_of(&records)).then_some(()));
}
