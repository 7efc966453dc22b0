//! The books: appended records survive, are summed once, and stay within their bounds.

use std::{path::Path, sync::Arc};

use gateway::{
    config::{
        schema,
        units::{Bytes, Span},
    },
    dialect::{Api, Usage},
    ledger::{
        Ledger,
        record::{Flags, Outcome, Record, RequestId},
    },
};

fn config(path: &Path) -> schema::Ledger {
    schema::Ledger {
        path: path.into(),
        sync: Span(std::time::Duration::from_millis(5)),
        keep: Bytes(1 << 30),
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
        },
        ttft_us: 1000,
        duration_us: 2000,
        bytes_in: 100,
        bytes_out: 1000,
    }
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
