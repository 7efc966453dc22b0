//! The books: appended records survive, are summed once, and stay within their bounds.
//!
//! Tests that need a process of their own run this test binary again, for one of the `child_…`
//! tests, which do nothing unless they are told a directory in [`CHILD`].

#[path = "support/skip.rs"]
mod skip;

use std::{
    collections::HashMap,
    io::{BufRead, BufReader, Write},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use gateway::{
    config::{
        schema,
        units::{Bytes, Span},
    },
    dialect::{Api, Usage},
    ledger::{
        Full, Journal, Ledger, read,
        record::{Flags, Outcome, Record, RequestId},
    },
};
use skip::skipped;

/// Environment variable that tells a child its state directory.
const CHILD: &str = "LEDGER_TEST_STATE";

fn config(path: &Path) -> schema::Ledger {
    schema::Ledger {
        path: path.into(),
        sync: Span(Duration::from_millis(5)),
        keep: Bytes(1 << 30),
        retention: Span::secs(0),
        ..schema::Ledger::default()
    }
}

fn record(number: u64) -> Record {
    let mut random = [0; 10];
    random[2..].copy_from_slice(&number.to_be_bytes());
    Record {
        time_unix_ms: 1_760_000_000_000 + number,
        id: RequestId::new(1_760_000_000_000 + number, random),
        key: Arc::from("alice"),
        team: Arc::from("search"),
        model: Arc::from("fast"),
        provider: Arc::from("fleet"),
        upstream_model: Arc::from("llama-3.3-70b"),
        api: Api::ChatCompletions,
        outcome: Outcome::Complete,
        flags: Flags::STREAM,
        status: 200,
        usage: Usage {
            prompt: 10,
            cached: 4,
            completion: 20,
            reasoning: 5,
            ..Usage::default()
        },
        ttft_us: 1000,
        duration_us: 2000,
        bytes_in: 100,
        bytes_out: 1000,
        cost: Some(1_000_000_001),
        ..Record::default()
    }
}

/// A record of 832 bytes, so that segments fill soon.
fn large_record(number: u64) -> Record {
    let name: Arc<str> = "n".repeat(128).into();
    Record {
        key: name.clone(),
        team: name.clone(),
        model: name.clone(),
        provider: name.clone(),
        upstream_model: name,
        ..record(number)
    }
}

fn requests(state: &Path) -> u64 {
    let books = read::books(state, 0).unwrap();
    assert_eq!(books.torn, 0);
    books.groups.iter().map(|(_, counters)| counters.requests).sum()
}

/// Waits for something that another thread brings about.
fn wait_for(what: &str, mut holds: impl FnMut() -> bool) {
    let until = Instant::now() + Duration::from_secs(60);
    while !holds() {
        assert!(Instant::now() < until, "in vain: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn append_when_ready(journal: &mut Journal, record: &Record) {
    wait_for("a segment is ready", || journal.ready());
    journal.append(record).unwrap();
}

/// This test binary, to run one of its ignored tests.
fn child(test: &str) -> Vec<String> {
    let program = std::env::current_exe().unwrap();
    let arguments = [
        "--exact",
        test,
        "--include-ignored",
        "--nocapture",
        "--test-threads=1",
    ];
    std::iter::once(program.to_str().unwrap())
        .chain(arguments)
        .map(str::to_owned)
        .collect()
}

fn spawn(test: &str, state: &Path) -> Child {
    let command = child(test);
    Command::new(&command[0])
        .args(&command[1..])
        .env(CHILD, state)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap()
}

/// In a child: its directory.
fn child_state() -> Option<PathBuf> {
    std::env::var_os(CHILD).map(PathBuf::from)
}

#[test]
fn what_is_appended_is_summed_once_over_restarts() {
    let dir = tempfile::tempdir().unwrap();
    for round in 1..=3 {
        let (ledger, mut journals) = Ledger::start(&config(dir.path()), 2).unwrap();
        for number in 0..1000 {
            journals[(number % 2) as usize].append(&record(number)).unwrap();
        }
        ledger.flush().unwrap();
        let status = ledger.status();
        assert_eq!(
            (
                status.records,
                status.folded,
                status.replayed,
                status.unsynced_bytes
            ),
            (1000, 1000, 0, 0),
            "round {round}"
        );
        let totals = ledger.totals();
        assert_eq!(totals.len(), 1);
        assert_eq!(totals[0].2.prompt_tokens, 10_000);
    }
}

#[test]
fn segments_rotate_and_old_ones_are_removed() {
    const SEGMENTS_BYTES: u64 = 8 << 20;
    let dir = tempfile::tempdir().unwrap();
    let config = schema::Ledger {
        keep: Bytes(SEGMENTS_BYTES),
        ..config(dir.path())
    };
    // Some ten segments.
    let records = 55_000;
    let (ledger, mut journals) = Ledger::start(&config, 1).unwrap();
    for number in 0..records {
        append_when_ready(&mut journals[0], &large_record(number));
    }
    ledger.flush().unwrap();
    let status = ledger.status();
    assert_eq!(
        (status.records, status.folded, status.refused),
        (records, records, 0)
    );
    assert!(
        (4 << 20..=SEGMENTS_BYTES).contains(&status.archive_bytes),
        "{status:?}"
    );
    assert_eq!(requests(dir.path()), records);
    drop((journals, ledger));

    // At rest: the archive alone, within its bound, and the latest records in it.
    let files = std::fs::read_dir(dir.path().join("journal")).unwrap();
    let bytes: u64 = files.map(|file| file.unwrap().metadata().unwrap().len()).sum();
    assert!(bytes <= SEGMENTS_BYTES, "{bytes}");
    let kept: Vec<Record> = read::records(dir.path()).collect();
    let oldest = records - kept.len() as u64;
    assert!(kept.len() > 5000);
    assert!(
        kept.iter()
            .zip(oldest..)
            .all(|(record, number)| record.id == large_record(number).id)
    );

    let (ledger, _journals) = Ledger::start(&config, 1).unwrap();
    assert_eq!((ledger.status().replayed, requests(dir.path())), (0, records));
}

#[test]
fn a_reader_of_running_books_counts_each_record_once() {
    let dir = tempfile::tempdir().unwrap();
    // Nothing is kept: segments also vanish under the reader.
    let config = schema::Ledger {
        keep: Bytes(0),
        ..config(dir.path())
    };
    let (ledger, mut journals) = Ledger::start(&config, 1).unwrap();
    let appended = Arc::new(AtomicU64::new(0));
    let stop = Arc::new(AtomicBool::new(false));
    let writer = {
        let (appended, stop) = (appended.clone(), stop.clone());
        std::thread::spawn(move || {
            for number in 0.. {
                if stop.load(Ordering::Relaxed) {
                    return number;
                }
                append_when_ready(&mut journals[0], &large_record(number));
                appended.store(number + 1, Ordering::Release);
            }
            unreachable!()
        })
    };
    let mut readings = 0;
    while readings < 50 || appended.load(Ordering::Acquire) < 30_000 {
        let before = appended.load(Ordering::Acquire);
        let counted = requests(dir.path());
        let after = appended.load(Ordering::Acquire);
        // One more may be in the journal and not yet in `appended`.
        assert!(
            (before..=after + 1).contains(&counted),
            "{before} <= {counted} <= {after}"
        );
        readings += 1;
    }
    stop.store(true, Ordering::Relaxed);
    let records = writer.join().unwrap();
    drop(ledger);
    assert_eq!(requests(dir.path()), records);
}

#[test]
fn a_second_gateway_in_one_directory_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let mut child = spawn("child_holds_the_directory", dir.path());
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap() == "holding"));
    let refused = Ledger::start(&config(dir.path()), 1).unwrap_err().to_string();
    let wanted = format!(
        "the state directory {} is in use by another gateway (process {})",
        dir.path().display(),
        child.id()
    );
    assert_eq!(refused, wanted);
    child.kill().unwrap();
    child.wait().unwrap();
    Ledger::start(&config(dir.path()), 1).unwrap();
}

#[test]
#[ignore = "a child of a_second_gateway_in_one_directory_is_refused"]
fn child_holds_the_directory() {
    let Some(state) = child_state() else { return };
    let _ledger = Ledger::start(&config(&state), 1).unwrap();
    println!("\nholding");
    // Until the parent kills this process, or is gone itself.
    std::io::stdin().read_line(&mut String::new()).unwrap();
}

#[test]
fn the_directory_is_private() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("a/state");
    let (_ledger, mut journals) = Ledger::start(&config(&state), 1).unwrap();
    journals[0].append(&record(1)).unwrap();
    let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode(&state), mode(&state.join("journal"))), (0o700, 0o700));
    for file in [
        "lock",
        "usage.db",
        "usage.db-wal",
        "usage.db-shm",
        "journal/0-0000000001.seg",
    ] {
        assert_eq!(mode(&state.join(file)), 0o600, "{file}");
    }
}

#[test]
fn kill_9_takes_no_record() {
    const ROUNDS: u64 = 20;
    let dir = tempfile::tempdir().unwrap();
    let mut printed: Vec<RequestId> = Vec::new();
    for _ in 0..ROUNDS {
        let mut child = spawn("child_appends", dir.path());
        // From "during start" to "in its third segment".
        let lines_until_kill = getrandom::u32().unwrap() % 12_000;
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        for _ in 0..lines_until_kill {
            note(&mut printed, &lines.next().unwrap().unwrap());
        }
        child.kill().unwrap();
        child.wait().unwrap();
        // What it said before it died. The last line may be cut.
        let rest: Vec<String> = lines.map_while(Result::ok).collect();
        for line in &rest {
            note(&mut printed, line);
        }
    }

    let mut times: HashMap<RequestId, u32> = HashMap::new();
    for record in read::records(dir.path()) {
        *times.entry(record.id).or_default() += 1;
    }
    assert!(printed.len() > 1000, "{}", printed.len());
    assert!(times.values().all(|times| *times == 1));
    let lost: Vec<_> = printed.iter().filter(|id| !times.contains_key(id)).collect();
    assert!(lost.is_empty(), "{} of {} lost", lost.len(), printed.len());
    // Each core may have been at one more when it was killed.
    assert!(
        times.len() <= printed.len() + 2 * ROUNDS as usize,
        "{} of {}",
        times.len(),
        printed.len()
    );

    let (ledger, _journals) = Ledger::start(&config(dir.path()), 2).unwrap();
    assert_eq!(ledger.status().torn, 0);
    assert_eq!(requests(dir.path()), times.len() as u64);
}

fn note(printed: &mut Vec<RequestId>, line: &str) {
    if let Some(id) = line.strip_prefix("appended ") {
        printed.extend(id.parse::<RequestId>());
    }
}

#[test]
#[ignore = "a child of kill_9_takes_no_record"]
fn child_appends() {
    let Some(state) = child_state() else { return };
    let run = getrandom::u32().unwrap();
    let (_ledger, journals) = Ledger::start(&config(&state), 2).unwrap();
    let cores: Vec<_> = journals
        .into_iter()
        .zip(0_u64..)
        .map(|(mut journal, core)| {
            std::thread::spawn(move || {
                for number in 0..1_u64 << 31 {
                    let record = large_record(u64::from(run) << 32 | core << 31 | number);
                    append_when_ready(&mut journal, &record);
                    let line = format!("appended {}\n", record.id);
                    // One write a line; the parent is gone when it fails.
                    if std::io::stdout().write_all(line.as_bytes()).is_err() {
                        return;
                    }
                }
            })
        })
        .collect();
    for core in cores {
        core.join().unwrap();
    }
}

#[test]
fn a_full_disk_refuses_new_records_and_keeps_the_earlier() {
    const NO_MOUNT: i32 = 77;
    let dir = tempfile::tempdir().unwrap();
    // In a mount namespace of its own, so that nothing is left mounted whatever happens.
    let script = format!("mount -t tmpfs -o size=24m tmpfs \"${CHILD}\" || exit {NO_MOUNT}; exec \"$@\"");
    let status = Command::new("unshare")
        .args(["--mount", "sh", "-c", &script, "sh"])
        .args(child("child_fills_the_disk"))
        .env(CHILD, dir.path())
        .status();
    match status {
        Ok(status) if status.success() => {}
        Ok(status) if status.code() == Some(NO_MOUNT) || status.code() == Some(1) => {
            skipped("root", "mounting a tmpfs is not permitted here");
        }
        Ok(status) => panic!("{status}"),
        Err(error) => skipped("root", format_args!("no unshare(1): {error}")),
    }
}

#[test]
#[ignore = "a child of a_full_disk_refuses_new_records_and_keeps_the_earlier"]
fn child_fills_the_disk() {
    let Some(dir) = child_state() else { return };
    let state = dir.join("state");
    let (ledger, mut journals) = Ledger::start(&config(&state), 1).unwrap();
    let journal = &mut journals[0];
    wait_for("three segments", || ledger.status().segments == 3);
    let mut filler = std::fs::File::create(dir.join("filler")).unwrap();
    while filler.write_all(&[0; 4096]).is_ok() {}
    drop(filler);

    let mut appended = 0;
    while journal.append(&large_record(appended)) == Ok(()) {
        appended += 1;
    }
    assert!(appended > 15_000, "{appended}");
    assert!(!journal.ready());
    assert_eq!(journal.append(&large_record(appended)), Err(Full));
    assert_eq!(journal.room_bytes(), 0);
    wait_for("the trouble is seen", || ledger.status().io_errors > 0);
    assert!(ledger.status().last_error.is_some());
    assert!(ledger.status().trouble.is_some());
    assert_eq!(ledger.status().refused, 2);
    assert_eq!(read::records(&state).count() as u64, appended);

    std::fs::remove_file(dir.join("filler")).unwrap();
    append_when_ready(journal, &large_record(appended));
    wait_for("a flush", || ledger.flush().is_ok());
    assert_eq!(ledger.status().folded, appended + 1);
    assert_eq!(requests(&state), appended + 1);
    drop((journals, ledger));
    assert_eq!(read::records(&state).count() as u64, appended + 1);
}
