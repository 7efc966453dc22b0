//! What a ledger record costs the core that writes it, and the ledger's thread that sums it:
//! `cargo run --release -p gateway --example ledger_cost -- [DIRECTORY] [RECORDS]`.
//!
//! The directory decides what is measured: a disk, or a tmpfs. Default: a temporary one.

use std::{
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use gateway::{
    config::schema,
    dialect::{Api, Usage},
    ledger::{
        Ledger,
        record::{Flags, Outcome, Record, RequestId},
    },
};

/// Records of one burst, which the two segments that wait have room for; between bursts the ledger's thread is let catch up,
/// as at a real rate.
const BURST: u64 = 5_000;

/// Room for one of the records here, bytes.
const FRAME_BYTES: usize = 512;

fn main() -> anyhow::Result<()> {
    let mut arguments = std::env::args().skip(1);
    let temporary = tempfile::tempdir()?;
    let path = arguments
        .next()
        .map_or_else(|| temporary.path().join("ledger"), PathBuf::from);
    let records: u64 = arguments.next().map_or(Ok(1_000_000), |text| text.parse())?;
    let config = schema::Ledger {
        path,
        ..schema::Ledger::default()
    };
    let (ledger, mut journals) = Ledger::start(&config, 1)?;
    let journal = &mut journals[0];
    let mut record = record();

    let cpu_before = cpu()?;
    let mut appending_cpu = Duration::ZERO;
    let mut appending = Duration::ZERO;
    let mut slowest = Duration::ZERO;
    let mut appended = 0;
    while appended < records {
        while journal.room_bytes() < BURST as usize * FRAME_BYTES {
            std::thread::sleep(Duration::from_millis(1));
        }
        let burst = BURST.min(records - appended);
        let (begun, begun_cpu) = (Instant::now(), thread_cpu()?);
        for _ in 0..burst {
            record.id.0[8..].copy_from_slice(&appended.to_be_bytes());
            journal.append(&record)?;
            appended += 1;
        }
        appending_cpu += thread_cpu()?.saturating_sub(begun_cpu);
        appending += begun.elapsed();
        slowest = slowest.max(begun.elapsed() / burst as u32);
    }
    ledger.flush()?;
    let cpu = cpu()?.saturating_sub(cpu_before);

    let per_record = |time: Duration| time.as_nanos() as f64 / records as f64;
    println!("records              {records}");
    println!(
        "append, CPU          {:8.1} ns a record (page faults included)",
        per_record(appending_cpu)
    );
    println!("append, wall         {:8.1} ns a record", per_record(appending));
    println!(
        "slowest burst        {:8.1} ns a record",
        slowest.as_nanos() as f64
    );
    println!(
        "whole process, CPU   {:8.1} ns a record (append, fold, zero-fill, sync)",
        per_record(cpu)
    );
    println!("status               {:?}", ledger.status());
    Ok(())
}

/// CPU time of this thread: the first field of schedstat (Documentation/scheduler/sched-stats.rst).
fn thread_cpu() -> anyhow::Result<Duration> {
    let stat = std::fs::read_to_string("/proc/thread-self/schedstat")?;
    let on_cpu = stat.split_whitespace().next().unwrap_or_default();
    Ok(Duration::from_nanos(on_cpu.parse()?))
}

/// CPU time of this process: fields utime and stime of /proc/self/stat (proc(5)), in ticks of 10 ms.
fn cpu() -> anyhow::Result<Duration> {
    let stat = std::fs::read_to_string("/proc/self/stat")?;
    let behind_name = stat.rsplit(')').next().unwrap_or_default();
    let fields: Vec<&str> = behind_name.split_whitespace().collect();
    let ticks = fields[11].parse::<u64>()? + fields[12].parse::<u64>()?;
    Ok(Duration::from_millis(10 * ticks))
}

fn record() -> Record {
    Record {
        time_unix_ms: 1_760_000_000_000,
        id: RequestId::new(1_760_000_000_000, [7; 10]),
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
            prompt: 1000,
            cached: 400,
            completion: 200,
            reasoning: 0,
            ..Usage::default()
        },
        ttft_us: 120_000,
        duration_us: 4_000_000,
        bytes_in: 5000,
        bytes_out: 40_000,
        endpoint: Arc::from("http://10.0.0.11:8000"),
        cost: Some(123_456),
        ..Record::default()
    }
}
