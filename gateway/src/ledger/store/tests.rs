use super::*;
use crate::ledger::record::tests::numbered;

/// The tables of version 1, with one row.
const OLD: &str = "
CREATE TABLE rollup (
day INTEGER NOT NULL, key TEXT NOT NULL, team TEXT NOT NULL, model TEXT NOT NULL, provider TEXT NOT NULL,
upstream_model TEXT NOT NULL, api INTEGER NOT NULL, requests INTEGER NOT NULL, completed INTEGER NOT NULL,
client_gone INTEGER NOT NULL, failed INTEGER NOT NULL, estimated INTEGER NOT NULL,
prompt_tokens INTEGER NOT NULL, cached_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL,
reasoning_tokens INTEGER NOT NULL, bytes_in INTEGER NOT NULL, bytes_out INTEGER NOT NULL,
PRIMARY KEY (day, key, team, model, provider, upstream_model, api)
) STRICT, WITHOUT ROWID;
INSERT INTO rollup VALUES (20000, 'alice', 't', 'fast', 'p', 'u', 1, 7, 6, 1, 0, 1, 100, 40, 20, 5, 9, 10);
PRAGMA user_version = 1;
";

#[test]
fn the_tables_of_version_1_are_brought_to_this_one() {
    let dir = tempfile::tempdir().unwrap();
    let connection = Connection::open(dir.path().join(FILE)).unwrap();
    connection.execute_batch(TABLES).unwrap();
    connection.execute_batch(OLD).unwrap();
    drop(connection);
    assert!(snapshot(dir.path(), 0).is_err());
    let mut store = Store::open(dir.path()).unwrap();
    let rollup = store.rollup().unwrap();
    assert_eq!(rollup.len(), 1);
    let (group, counters) = &rollup[0];
    assert_eq!(
        (group.key.as_str(), group.user.as_str(), group.day),
        ("alice", "", 20_000)
    );
    assert_eq!(
        (counters.requests, counters.prompt_tokens, counters.bytes_out),
        (7, 100, 10)
    );
    assert_eq!((counters.cost_nano_usd, counters.unpriced), (0, 7));
    let mut sums = Sums::default();
    sums.add(&numbered(5).view());
    store.fold(&sums, &[]).unwrap();
    drop(store);
    assert_eq!(Store::open(dir.path()).unwrap().rollup().unwrap().len(), 2);
}

#[test]
fn a_day_has_a_bounded_number_of_rows_and_nothing_is_lost() {
    let dir = tempfile::tempdir().unwrap();
    let mut store = Store::open(dir.path()).unwrap();
    let mut fold = |users: std::ops::Range<u64>| {
        let mut sums = Sums::default();
        for user in users {
            let mut record = numbered(1);
            record.user = format!("user {user}").into();
            sums.add(&record.view());
        }
        store.fold(&sums, &[]).unwrap();
        store.rollup().unwrap()
    };
    let most = ROLLUP_ROWS_PER_DAY_MAX;
    fold(0..most);
    let rollup = fold(most - 10..most + 50);
    assert_eq!(rollup.len() as u64, most + 1);
    let requests: u64 = rollup.iter().map(|(_, counters)| counters.requests).sum();
    assert_eq!(requests, most + 60);
    let other = rollup.iter().find(|(group, _)| group.user == OTHER).unwrap();
    assert_eq!(other.1.requests, 50);
}

#[test]
fn days_are_forgotten_one_at_a_time_the_oldest_first() {
    let dir = tempfile::tempdir().unwrap();
    let mut store = Store::open(dir.path()).unwrap();
    let mut sums = Sums::default();
    for day in [100_u64, 101, 200] {
        let mut record = numbered(1);
        record.time_unix_ms = day * 86_400_000;
        sums.add(&record.view());
    }
    store.fold(&sums, &[]).unwrap();
    let days = |store: &Store| -> Vec<u32> {
        let mut days: Vec<_> = store
            .rollup()
            .unwrap()
            .iter()
            .map(|(group, _)| group.day)
            .collect();
        days.sort_unstable();
        days
    };
    assert!(store.forget_a_day(150).unwrap());
    assert_eq!(days(&store), [101, 200]);
    assert!(store.forget_a_day(150).unwrap());
    assert!(!store.forget_a_day(150).unwrap());
    assert_eq!(days(&store), [200]);
}
