//! Tests of the ledger's thread, turned by hand.

use std::path::Path;

use super::{
    super::{JOURNAL, make_directory, read, record::tests::numbered},
    *,
};
use crate::config::units::{Bytes, Span};

/// A ledger without its thread. Dropping it is a crash: nothing is folded or synced.
fn open(state: &Path) -> anyhow::Result<(Worker, Journal)> {
    let journal = state.join(JOURNAL);
    make_directory(&journal)?;
    let config = schema::Ledger {
        path: state.into(),
        keep: Bytes(64 << 20),
        // The tests' records are of a day long ago.
        retention: Span::secs(0),
        ..schema::Ledger::default()
    };
    let lock = File::create(state.join("lock"))?;
    let (worker, mut journals) = Worker::open(&config, journal, lock, 1)?;
    Ok((worker, journals.remove(0)))
}

/// Requests and prompt tokens in all sums of the database.
fn summed(store: &Store) -> (u64, u64) {
    let rollup = store.rollup().unwrap();
    let sum = |of: fn(&read::Counters) -> u64| rollup.iter().map(|(_, counters)| of(counters)).sum();
    (
        sum(|counters| counters.requests),
        sum(|counters| counters.prompt_tokens),
    )
}

fn append(journal: &mut Journal, numbers: std::ops::Range<u64>) {
    for number in numbers {
        journal.append(&numbered(number)).unwrap();
    }
}

#[test]
fn a_crash_between_any_steps_of_a_fold_counts_each_record_once() {
    let dir = tempfile::tempdir().unwrap();
    let (mut worker, mut journal) = open(dir.path()).unwrap();
    append(&mut journal, 0..10);
    worker.fold().unwrap();
    append(&mut journal, 10..20);
    worker.store.fail_before_commit = true;
    worker.fold().unwrap_err();
    assert_eq!(summed(&worker.store), (10, 45));
    assert_eq!(worker.public.totals.lock().unwrap().list()[0].2.requests, 10);
    drop((worker, journal));

    // The replay itself dies before its commit, and is begun anew.
    let mut store = Store::open(dir.path()).unwrap();
    store.fail_before_commit = true;
    replay::replay(&dir.path().join(JOURNAL), &mut store).unwrap_err();
    store.fail_before_commit = false;
    let replayed = replay::replay(&dir.path().join(JOURNAL), &mut store).unwrap();
    assert_eq!((replayed.records, replayed.torn), (10, 0));
    assert_eq!(summed(&store), (20, 190));
    let again = replay::replay(&dir.path().join(JOURNAL), &mut store).unwrap();
    assert_eq!((again.records, again.archive.len()), (0, 1));
    assert_eq!(summed(&store), (20, 190));
}

#[test]
fn a_fold_that_failed_is_made_good_by_the_next() {
    let dir = tempfile::tempdir().unwrap();
    let (mut worker, mut journal) = open(dir.path()).unwrap();
    append(&mut journal, 0..5);
    worker.store.fail_before_commit = true;
    let now = Instant::now();
    worker.turn(now);
    worker.turn(now);
    let status = worker.public.status.lock().unwrap().clone();
    assert_eq!(
        (status.io_errors, status.folded),
        (1, 0),
        "a failed operation is left alone for a while"
    );
    worker.store.fail_before_commit = false;
    worker.turn(now + 2 * RETRY_AFTER);
    assert_eq!(summed(&worker.store), (5, 10));
    assert_eq!(worker.public.status.lock().unwrap().folded, 5);
}

#[test]
fn a_segment_that_was_to_be_removed_is_not_folded_again() {
    let dir = tempfile::tempdir().unwrap();
    let (mut worker, mut journal) = open(dir.path()).unwrap();
    append(&mut journal, 0..5);
    drop(journal);
    worker.finish();
    let (name, path) = segment::list(&worker.journal).unwrap().remove(0);
    // The crash comes between the database's commit and the file's removal.
    worker.store.remove(name).unwrap();
    drop(worker);
    assert!(path.exists());
    let (worker, _journal) = open(dir.path()).unwrap();
    assert!(!path.exists());
    assert_eq!(summed(&worker.store), (5, 10));
    assert!(worker.lanes[0].live[0].header.name.seq > name.seq);
}

#[test]
fn the_sums_are_made_anew_from_the_segments_that_are_kept() {
    let dir = tempfile::tempdir().unwrap();
    for round in 0..3 {
        let (mut worker, mut journal) = open(dir.path()).unwrap();
        append(&mut journal, 10 * round..10 * (round + 1));
        if round == 1 {
            drop(journal);
            worker.finish();
        }
    }
    for file in ["usage.db", "usage.db-wal", "usage.db-shm"] {
        let _ = fs::remove_file(dir.path().join(file));
    }
    let (worker, _journal) = open(dir.path()).unwrap();
    assert_eq!(summed(&worker.store), (30, 435));
}

#[test]
fn a_segment_that_was_removed_by_hand_is_missed_once() {
    let dir = tempfile::tempdir().unwrap();
    let (mut worker, mut journal) = open(dir.path()).unwrap();
    append(&mut journal, 0..5);
    drop(journal);
    worker.finish();
    let (name, path) = segment::list(&worker.journal).unwrap().remove(0);
    drop(worker);
    fs::remove_file(path).unwrap();
    for missing in [1, 0] {
        let (worker, _journal) = open(dir.path()).unwrap();
        assert_eq!(worker.public.lock_status().missing_segments, missing);
        assert_eq!(summed(&worker.store), (5, 10), "what was summed up stays");
        assert!(worker.lanes[0].live[0].header.name.seq > name.seq);
    }
}

#[test]
fn damage_is_counted_and_costs_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let (worker, mut journal) = open(dir.path()).unwrap();
    append(&mut journal, 0..100);
    drop((worker, journal));
    let (_, path) = segment::list(&dir.path().join(JOURNAL)).unwrap().remove(0);
    let mut bytes = fs::read(&path).unwrap();
    bytes[FRAMES_AT + 50 * 192 + 17] ^= 1;
    fs::write(&path, &bytes).unwrap();
    // A second one with no head left, and one that was never finished.
    fs::write(dir.path().join(JOURNAL).join("0-0000000099.seg"), [0xee; 500]).unwrap();
    fs::write(dir.path().join(JOURNAL).join("0-0000000100.seg.new"), [0; 500]).unwrap();

    let (worker, _journal) = open(dir.path()).unwrap();
    let status = worker.public.status.lock().unwrap().clone();
    assert_eq!((status.replayed, status.torn), (99, 2));
    assert_eq!(summed(&worker.store), (99, 4950 - 50));
    let mut files: Vec<_> = fs::read_dir(dir.path().join(JOURNAL))
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    files.sort();
    assert_eq!(
        files,
        ["0-0000000001.seg", "0-0000000099.seg.damaged", "0-0000000100.seg"]
    );
}

#[test]
fn figures_beyond_all_measure_do_not_overflow_the_sums() {
    let dir = tempfile::tempdir().unwrap();
    let (mut worker, mut journal) = open(dir.path()).unwrap();
    for _ in 0..3 {
        let mut record = numbered(1);
        record.usage.prompt = u64::MAX;
        record.time_unix_ms = u64::MAX;
        journal.append(&record).unwrap();
        worker.fold().unwrap();
    }
    let rollup = worker.store.rollup().unwrap();
    assert_eq!(
        (rollup.len(), rollup[0].1.requests, rollup[0].1.prompt_tokens),
        (1, 3, i64::MAX as u64)
    );
}

#[test]
fn trouble_is_shown_while_it_lasts() {
    let dir = tempfile::tempdir().unwrap();
    let (mut worker, mut journal) = open(dir.path()).unwrap();
    let public = worker.public();
    let shown = || {
        let status = public.status.lock().unwrap();
        (
            status.trouble.clone(),
            status.last_error.is_some(),
            status.io_errors,
        )
    };
    append(&mut journal, 0..1);
    worker.store.fail_before_commit = true;
    let start = Instant::now();
    worker.turn(start);
    let (trouble, ..) = shown();
    assert!(trouble.is_some_and(|trouble| trouble.starts_with(FOLD)));
    worker.flush().unwrap_err();
    worker.store.fail_before_commit = false;
    worker.turn(start + 2 * RETRY_AFTER);
    assert_eq!(shown(), (None, true, 2));
}

#[test]
fn a_sync_that_failed_is_not_believed_when_it_succeeds_and_the_segment_is_written_anew() {
    use std::os::unix::fs::MetadataExt;
    let dir = tempfile::tempdir().unwrap();
    let (mut worker, mut journal) = open(dir.path()).unwrap();
    worker.refill().unwrap();
    append(&mut journal, 0..10);
    worker.sync().unwrap();
    append(&mut journal, 10..20);
    let path = worker.lanes[0].live[0].path.clone();
    let inode = |path: &Path| fs::metadata(path).unwrap().ino();
    let before = inode(&path);
    worker.fail_next_sync = true;
    worker.turn(Instant::now());
    assert!(worker.public.lock_status().trouble.is_some());
    // The core still writes to the file that failed; nothing of that is called synced.
    append(&mut journal, 20..30);
    worker.sync().unwrap_err();
    assert_eq!(worker.public.lock_status().rewritten, 0);
    journal.turn();
    append(&mut journal, 30..40);
    worker.turn(Instant::now() + Duration::from_secs(1));
    assert_eq!(worker.public.lock_status().rewritten, 1);
    assert_ne!(inode(&path), before);
    assert_eq!(worker.public.lock_status().trouble, None);
    // Once is enough: the next segment is not left.
    journal.turn();
    worker.turn(Instant::now() + Duration::from_secs(2));
    assert_eq!(summed(&worker.store), (40, (0..40).sum()));
    assert_eq!(read::records(dir.path()).count(), 40);
    // A crash: what is on the disk is all there, once.
    drop((worker, journal));
    let (worker, _journal) = open(dir.path()).unwrap();
    assert_eq!(summed(&worker.store), (40, (0..40).sum()));
    assert_eq!(worker.public.lock_status().torn, 0);
}

#[test]
fn a_clock_that_goes_back_or_far_ahead_costs_no_record() {
    let dir = tempfile::tempdir().unwrap();
    let (mut worker, mut journal) = open(dir.path()).unwrap();
    for (number, time) in [
        (1, 1_760_000_000_000),
        (2, 1_000),
        (3, u64::MAX),
        (4, 1_760_000_000_001),
    ] {
        let mut record = numbered(number);
        record.time_unix_ms = time;
        journal.append(&record).unwrap();
    }
    worker.fold().unwrap();
    assert_eq!(summed(&worker.store), (4, 10));
    worker.retention_days = Some(400);
    // A clock that is a thousand years ahead for one moment takes one day, not all.
    worker
        .forget(1_760_000_000_000 + 1000 * 365 * 86_400_000)
        .unwrap();
    assert_eq!(summed(&worker.store).0, 3);
    // A clock that went back takes nothing.
    worker.forget(5).unwrap();
    assert_eq!(summed(&worker.store).0, 3);
}
