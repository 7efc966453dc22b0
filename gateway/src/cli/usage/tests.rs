//! Tests of `gateway usage` over a running and an ended ledger.

use std::{fs, sync::Arc};

use clap::Parser;

use super::*;
use crate::{
    dialect::{Api, Usage},
    ledger::{
        Ledger,
        record::{Flags, Outcome},
    },
};

#[derive(Parser)]
struct Command {
    #[command(flatten)]
    args: Args,
}

fn usage(state: &Path, arguments: &[&str]) -> anyhow::Result<String> {
    let state = state.to_str().unwrap();
    let all = ["usage", "--state", state]
        .into_iter()
        .chain(arguments.iter().copied());
    let args = Command::try_parse_from(all)?.args;
    let mut out = Vec::new();
    print(&args, &mut out)?;
    Ok(String::from_utf8(out)?)
}

fn record(number: u8, key: &str, model: &str, day: u64) -> Record {
    let time_unix_ms = day * 86_400_000 + u64::from(number);
    Record {
        time_unix_ms,
        id: RequestId::new(time_unix_ms, [number; 10]),
        key: Arc::from(key),
        team: Arc::from(""),
        model: Arc::from(model),
        provider: Arc::from("fleet"),
        upstream_model: Arc::from("llama"),
        api: Api::ChatCompletions,
        outcome: Outcome::Complete,
        flags: Flags::STREAM,
        status: 200,
        usage: Usage {
            prompt: 100,
            cached: 40,
            completion: 7,
            reasoning: 2,
            ..Usage::default()
        },
        ttft_us: 1,
        duration_us: 2,
        bytes_in: 3,
        bytes_out: 4,
        cost: Some(1_500_000_001),
        ..Record::default()
    }
}

/// 2026-01-31.
const DAY: u64 = 20_484;

/// A ledger of four records, half of them folded.
fn ledger() -> (tempfile::TempDir, Ledger) {
    let dir = tempfile::tempdir().unwrap();
    let config = schema::Ledger {
        path: dir.path().into(),
        retention: units::Span::secs(0),
        ..schema::Ledger::default()
    };
    let (ledger, mut journals) = Ledger::start(&config, 2).unwrap();
    journals[0].append(&record(1, "alice", "fast", DAY)).unwrap();
    let mut gone = record(2, "bob", "fast", DAY);
    gone.outcome = Outcome::ClientGone;
    gone.cost = None;
    gone.user = Arc::from("u,1");
    gone.flags.set(Flags::ESTIMATED);
    journals[1].append(&gone).unwrap();
    ledger.flush().unwrap();
    journals[0].append(&record(3, "alice", "fast", DAY + 1)).unwrap();
    journals[0].append(&record(4, "alice", "deep", DAY + 1)).unwrap();
    (dir, ledger)
}

#[test]
fn the_table_is_aligned_and_has_a_total() {
    let (dir, _ledger) = ledger();
    let table = usage(dir.path(), &[]).unwrap();
    let wanted = "\
key    model  requests  complete  gone  failed  estimated  prompt  cached  completion  reasoning          usd  unpriced
alice  deep          1         1     0       0          0     100      40           7          2  1.500000001         0
alice  fast          2         2     0       0          0     200      80          14          4  3.000000002         0
bob    fast          1         0     1       0          1     100      40           7          2            -         1
total                4         3     1       0          1     400     160          28          8  4.500000003         1
";
    assert_eq!(table, wanted);
    let by_team = usage(dir.path(), &["--by", "team"]).unwrap();
    assert!(by_team.contains("\n-             4"), "{by_team}");
}

#[test]
fn sums_are_told_apart_as_asked_and_since_a_day() {
    let (dir, _ledger) = ledger();
    let text = usage(
        dir.path(),
        &["--by", "day,model", "--since", "2026-02-01", "--json"],
    )
    .unwrap();
    let json: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(json["since"], "2026-02-01");
    assert_eq!(json["rows"].as_array().unwrap().len(), 2);
    assert_eq!(json["rows"][0]["day"], "2026-02-01");
    assert_eq!(json["rows"][0]["model"], "deep");
    assert_eq!(
        (&json["total"]["requests"], &json["total"]["prompt_tokens"]),
        (&json!(2), &json!(200))
    );
}

#[test]
fn csv_has_names_and_exact_money() {
    let (dir, _ledger) = ledger();
    let csv = usage(dir.path(), &["--by", "user", "--format", "csv"]).unwrap();
    let lines: Vec<&str> = csv.split("\r\n").collect();
    assert!(lines[0].starts_with("user,requests,completed,"), "{csv}");
    assert!(
        lines[0].ends_with(",cost_nano_usd,unpriced,bytes_in,bytes_out,cost_usd"),
        "{csv}"
    );
    assert!(
        lines[1].starts_with(",3,3,") && lines[1].ends_with(",4500000003,0,9,12,4.500000003"),
        "{csv}"
    );
    // Nobody knows the price: there is no cost, rather than none.
    assert!(
        lines[2].starts_with("\"u,1\",1,0,") && lines[2].ends_with(",0,1,3,4,"),
        "{csv}"
    );
    let records = usage(dir.path(), &["--records", "--format", "csv"]).unwrap();
    assert_eq!(records.split("\r\n").count(), 6, "{records}");
    let lines = usage(dir.path(), &["--by", "key", "--format", "jsonl"]).unwrap();
    assert_eq!(lines.lines().count(), 2);
    let first: Value = serde_json::from_str(lines.lines().next().unwrap()).unwrap();
    assert_eq!(
        (&first["key"], &first["cost_usd"]),
        (&json!("alice"), &json!("4.500000003"))
    );
}

#[test]
fn the_sums_are_those_of_the_records() {
    let (dir, ledger) = ledger();
    let of_records = || {
        let text = usage(dir.path(), &["--records"]).unwrap();
        let lines = text
            .lines()
            .map(|line| serde_json::from_str::<Value>(line).unwrap());
        let mut sums = [0; 4];
        for line in lines {
            for (sum, name) in
                sums.iter_mut()
                    .zip(["prompt_tokens", "completion_tokens", "cost_nano_usd", "bytes_out"])
            {
                *sum += line[name].as_u64().unwrap_or(0);
            }
        }
        sums
    };
    let of_sums = || {
        let text = usage(dir.path(), &["--json"]).unwrap();
        let json: Value = serde_json::from_str(&text).unwrap();
        let sum = |name: &str| json["total"][name].as_u64().unwrap();
        ["prompt_tokens", "completion_tokens", "cost_nano_usd", "bytes_out"].map(sum)
    };
    assert_eq!(of_sums(), of_records());
    ledger.flush().unwrap();
    assert_eq!(of_sums(), of_records());
}

#[test]
fn the_books_can_be_read_when_no_gateway_runs() {
    let (dir, ledger) = ledger();
    let running = usage(dir.path(), &["--json"]).unwrap();
    drop(ledger);
    assert_eq!(usage(dir.path(), &["--json"]).unwrap(), running);
}

#[test]
fn records_are_printed_one_a_line() {
    let (dir, _ledger) = ledger();
    let id = record(2, "bob", "fast", DAY).id.to_string();
    let line = usage(dir.path(), &["--records", "--id", &id]).unwrap();
    let json: Value = serde_json::from_str(&line).unwrap();
    assert_eq!(
        (&json["id"], &json["outcome"]),
        (&json!(id), &json!("client_gone"))
    );
    assert_eq!(
        (&json["time"], &json["estimated"]),
        (&json!("2026-01-31T00:00:00.002Z"), &json!(true))
    );

    let last = usage(dir.path(), &["--records", "--last", "3"]).unwrap();
    let keys: Vec<String> = last.lines().map(|line| line[..60].to_owned()).collect();
    assert_eq!(keys.len(), 3);
    assert!(keys.is_sorted(), "{keys:?}");
    assert_eq!(usage(dir.path(), &["--records"]).unwrap().lines().count(), 4);
    assert_eq!(
        usage(dir.path(), &["--records", "--since", "2026-02-01"])
            .unwrap()
            .lines()
            .count(),
        2
    );
}

#[test]
fn what_is_not_there_is_said() {
    let (dir, _ledger) = ledger();
    let id = "00000000000000000000000000000000";
    let error = usage(dir.path(), &["--records", "--id", id])
        .unwrap_err()
        .to_string();
    assert_eq!(
        error,
        format!("no record of {id} is kept in {}", dir.path().display())
    );
    let empty = tempfile::tempdir().unwrap();
    let error = usage(empty.path(), &[]).unwrap_err().to_string();
    assert_eq!(error, format!("{} holds no ledger", empty.path().display()));
    for wrong in [
        &["--since", "yesterday"][..],
        &["--by", "colour"],
        &["--last", "3"],
        &["--records", "--id", "x"],
    ] {
        assert!(usage(dir.path(), wrong).is_err(), "{wrong:?}");
    }
}

#[test]
fn the_state_directory_is_the_configurations() {
    let (dir, _ledger) = ledger();
    let file = dir.path().join("gateway.yaml");
    let text = format!(
        "listeners: []\nkeys: [{{ name: x }}]\nledger: {{ path: {} }}\n",
        dir.path().display()
    );
    fs::write(&file, text).unwrap();
    let args = Command::try_parse_from(["usage", "-c", file.to_str().unwrap()])
        .unwrap()
        .args;
    assert_eq!(state_directory(&args).unwrap(), dir.path());

    // A relative one begins at the file's directory, wherever the command is run.
    fs::write(&file, "ledger: { path: state }\n").unwrap();
    assert_eq!(state_directory(&args).unwrap(), dir.path().join("state"));
}
