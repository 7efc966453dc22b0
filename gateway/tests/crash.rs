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
    Gateway, Setup,
    client::{Client, chat, chat_request},
    eventually, fleet,
};

/// Times that the process is killed.
const ROUNDS: usize = 20;
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
        assert_eq!(record.flags.has(Flags::STREAM), seen.stream, "{seen:?}");
    }
}

/// The sums of `gateway usage`: requests, prompt tokens, completion tokens.
fn sums(gateway: &Gateway) -> [u64; 3] {
    let output = gateway.command(&["usage", "--json"]);
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let document: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    ["requests", "prompt_tokens", "completion_tokens"].map(|name| {
        document["total"][name]
            .as_u64()
            .unwrap_or_else(|| panic!("{name} in {document}"))
    })
}

/// The same, from the records.
fn sums_of(records: &[Record]) -> [u64; 3] {
    [
        records.len() as u64,
        records.iter().map(|record| record.usage.prompt).sum(),
        records.iter().map(|record| record.usage.completion).sum(),
    ]
}

#[test]
fn what_was_seen_complete_is_in_the_books_once_whenever_it_is_killed() {
    let fleet = fleet(&format!("tokens={TOKENS},pace=300us,first=300us"));
    let config = Setup::new(fleet.url()).config();
    let notes = Notes::default();
    let mut directory = tempfile::tempdir().expect("a directory");
    for round in 0..ROUNDS {
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
    let config = Setup::new(fleet.url()).config();
    let gateway = Gateway::start(&config);
    let mut client = Client::connect(gateway.addr());
    for _ in 0..REQUESTS {
        client.post("/v1/chat/completions", &chat("fast", false));
        assert_eq!(client.answer().status, 200);
    }
    let path = gateway.config_path();
    let directory = gateway.kill();
    for _ in 0..ROUNDS {
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
