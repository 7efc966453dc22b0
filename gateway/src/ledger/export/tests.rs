use super::*;
use crate::{
    config::{schema, units::Span},
    ledger::{Ledger, record::tests::numbered},
};

fn config() -> ClickHouse {
    ClickHouse {
        url: "http://127.0.0.1:1".into(),
        table: "t".into(),
        create: true,
        user: None,
        password: None,
        every: Span(Duration::from_millis(100)),
        batch: 700,
        backlog: crate::config::units::Bytes(0),
    }
}

/// What batches hold, put together as if each were delivered, whatever the batches' borders are.
#[test]
fn batches_hold_each_record_once_and_go_on_where_the_last_one_ended() {
    let dir = tempfile::tempdir().unwrap();
    let ledger_config = schema::Ledger {
        path: dir.path().into(),
        export: Some(schema::Export { clickhouse: config() }),
        ..schema::Ledger::default()
    };
    let (ledger, mut journals) = Ledger::start(&ledger_config, 2).unwrap();
    const RECORDS: u64 = 25_000;
    for number in 0..RECORDS {
        let journal = &mut journals[(number % 2) as usize];
        let mut record = numbered(number);
        record.user = "u".repeat((number % 100) as usize).into();
        while journal.append(&record).is_err() {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
    ledger.flush().unwrap();
    let mut delivery = Delivery::new(&config(), dir.path(), ledger.public.clone()).unwrap();
    let mut seen = Vec::new();
    for round in 0.. {
        assert!(round < 1000, "no end");
        let batch = delivery.gather().unwrap();
        if batch.records == 0 {
            break;
        }
        assert!(batch.records <= 700);
        let lines = std::str::from_utf8(&batch.json).unwrap().lines();
        let values = lines.map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
        seen.extend(values.map(|value| value["prompt_tokens"].as_u64().unwrap()));
        delivery.reached(batch.reached).unwrap();
        if round % 10 == 0 {
            // A restart goes on where the last one was.
            delivery = Delivery::new(&config(), dir.path(), ledger.public.clone()).unwrap();
        }
    }
    seen.sort_unstable();
    assert_eq!(seen, (0..RECORDS).collect::<Vec<_>>());
    delivery.show();
    assert_eq!(ledger.status().export_behind_bytes, 0);
    // Another place begins from the start.
    let elsewhere = ClickHouse {
        table: "other".into(),
        ..config()
    };
    let delivery = Delivery::new(&elsewhere, dir.path(), ledger.public.clone()).unwrap();
    assert_eq!(delivery.gather().unwrap().records, 700);
}

/// Journal and sums are removed by hand, and `export.json` is not: numbers begin anew, below those that were delivered.
#[test]
fn records_behind_numbers_that_begin_anew_are_not_taken_for_delivered() {
    let dir = tempfile::tempdir().unwrap();
    let ledger_config = schema::Ledger {
        path: dir.path().into(),
        export: Some(schema::Export { clickhouse: config() }),
        ..schema::Ledger::default()
    };
    let position = Position {
        target: format!("{} {}", config().url, config().table),
        cores: BTreeMap::from([
            (0, Reached { seq: 57, at: 9000 }),
            (9, Reached { seq: 3, at: 64 }),
        ]),
    };
    write_position(&dir.path().join(POSITION), &position).unwrap();
    let (ledger, mut journals) = Ledger::start(&ledger_config, 1).unwrap();
    for number in 0..10 {
        journals[0].append(&numbered(number)).unwrap();
    }
    ledger.flush().unwrap();
    let mut delivery = Delivery::new(&config(), dir.path(), ledger.public.clone()).unwrap();
    assert_eq!(delivery.gather().unwrap().records, 0, "they pass for delivered");
    delivery.check_numbers();
    assert_eq!(delivery.gather().unwrap().records, 10);
    // A core that does not run now keeps its place.
    assert_eq!(delivery.position.cores.keys().collect::<Vec<_>>(), [&9]);
    drop((journals, ledger));
    // Where nobody removed anything all goes on.
    let cores = BTreeMap::from([(0, Reached { seq: 1, at: 9000 })]);
    write_position(&dir.path().join(POSITION), &Position { cores, ..position }).unwrap();
    let (ledger, _journals) = Ledger::start(&ledger_config, 1).unwrap();
    let mut delivery = Delivery::new(&config(), dir.path(), ledger.public.clone()).unwrap();
    delivery.check_numbers();
    assert_eq!(delivery.position.cores[&0].seq, 1);
}

#[test]
fn the_end_does_not_wait_for_a_server_that_does_not_answer() {
    let server = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", server.local_addr().unwrap());
    let dir = tempfile::tempdir().unwrap();
    let ledger_config = schema::Ledger {
        path: dir.path().into(),
        export: Some(schema::Export {
            clickhouse: ClickHouse { url, ..config() },
        }),
        ..schema::Ledger::default()
    };
    let (ledger, mut journals) = Ledger::start(&ledger_config, 1).unwrap();
    journals[0].append(&numbered(1)).unwrap();
    ledger.flush().unwrap();
    // It is on its way, and stays there.
    let connection = server.accept().unwrap();
    let begun = std::time::Instant::now();
    drop((journals, ledger));
    assert!(begun.elapsed() < server::ANSWER_TIMEOUT / 2);
    drop(connection);
}
