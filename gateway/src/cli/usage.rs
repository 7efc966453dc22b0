//! `gateway usage`: what the books say.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BinaryHeap},
    io::{self, BufWriter, Write},
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use anyhow::{Context, bail};
use clap::ValueEnum;
use serde_json::{Map, Value, json};

use super::common::{ConfigArg, beside};
use crate::{
    config::{
        schema,
        units::{self, Dollars},
    },
    ledger::{
        line::{Line, write_csv_row},
        read::{self, Books, Counters, Group, Records, day_of},
        record::{Record, RecordView, RequestId},
    },
    net::clock,
};

const EXAMPLES: &str = "\
Examples:
  gateway usage                               all, by key and model
  gateway usage --by team,day --since 7d      the last seven days and today, UTC
  gateway usage --by user,model --since 7d --format csv
  gateway usage --by model --json | jq .total
  gateway usage --records --last 20           the latest requests, one JSON object a line
  gateway usage --records --since 1d --format csv > requests.csv
  gateway usage --records --id 0199b2c47a3e7c01a5d2f0b1c2d3e4f5";

/// Sum up what requests used, by key and model
///
/// Works while the gateway runs and when it does not; nothing is written. Run it as the service's
/// user or as root.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    #[command(flatten)]
    config: ConfigArg,
    /// State directory, instead of the configuration's `ledger.path`
    #[arg(long, value_name = "DIR")]
    state: Option<PathBuf>,
    /// What to sum by, in this order, with commas between
    #[arg(
        long,
        value_enum,
        value_delimiter = ',',
        default_value = "key,model",
        conflicts_with = "records"
    )]
    by: Vec<By>,
    /// Only from then on: `7d`, `12h`, or a day as `2026-01-31` (UTC). Sums are of whole days
    #[arg(long, value_name = "SPAN|DATE", value_parser = parse_since)]
    since: Option<Since>,
    /// How to print. Records are never a table: they are JSON Lines unless this says csv
    #[arg(long, value_enum)]
    format: Option<Format>,
    /// As `--format json`
    #[arg(long, conflicts_with = "format")]
    json: bool,
    /// Print single records, as far back as segments are kept (`ledger.keep`)
    #[arg(long)]
    records: bool,
    /// Only the latest N records, in order of time
    #[arg(long, value_name = "N", requires = "records", value_parser = clap::value_parser!(u32).range(1..=LAST_MAX))]
    last: Option<u32>,
    /// Only the record of this request (`x-request-id`)
    #[arg(long, requires = "records", conflicts_with = "last")]
    id: Option<RequestId>,
}

/// Most records that `--last` holds in memory.
const LAST_MAX: i64 = 1_000_000;

/// How sums and records are printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    /// For people
    Table,
    /// One document
    Json,
    /// One JSON object a line
    Jsonl,
    /// Comma-separated, with a line of names
    Csv,
}

impl Args {
    fn format(&self) -> Format {
        match self.format {
            Some(format) => format,
            None if self.json => Format::Json,
            None => Format::Table,
        }
    }
}

/// What sums are told apart by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum By {
    Key,
    Team,
    Organization,
    User,
    Model,
    Provider,
    UpstreamModel,
    Api,
    Day,
}

/// From when on.
#[derive(Debug, Clone, Copy)]
enum Since {
    Ago(Duration),
    UnixMs(u64),
}

/// Runs the command.
pub fn run(args: &Args) -> ExitCode {
    match print(args, &mut BufWriter::new(io::stdout().lock())) {
        Ok(code) => code,
        // Whoever reads has seen enough (`| head`).
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("gateway usage: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error
        .downcast_ref::<io::Error>()
        .is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
}

fn print(args: &Args, out: &mut impl Write) -> anyhow::Result<ExitCode> {
    let state = state_directory(args)?;
    let since_unix_ms = args.since.map_or(0, |since| since.unix_ms(clock::unix_ms()));
    let code = if args.records {
        print_records(args, &state, since_unix_ms, out)?
    } else {
        let day_min = day_of(since_unix_ms);
        let books = read::books(&state, day_min)?;
        warn_of_torn(books.torn);
        let (rows, total) = sum(&books, &args.by);
        match args.format() {
            Format::Table => print_table(&args.by, &rows, &total, out)?,
            Format::Json => print_json(args, day_min, &rows, &total, out)?,
            Format::Jsonl => {
                for (labels, sum) in &rows {
                    let row = Value::Object(row(&args.by, labels, sum)?);
                    writeln!(out, "{row}")?;
                }
            }
            Format::Csv => print_csv(&args.by, &rows, out)?,
        }
        ExitCode::SUCCESS
    };
    out.flush()?;
    Ok(code)
}

/// The part of the configuration that this command needs. The whole is not loaded: its secrets may be
/// out of this user's reach, and a mistake elsewhere is no reason to keep the books shut.
#[derive(serde::Deserialize)]
struct LedgerOnly {
    #[serde(default)]
    ledger: schema::Ledger,
}

fn state_directory(args: &Args) -> anyhow::Result<PathBuf> {
    if let Some(state) = &args.state {
        return Ok(state.clone());
    }
    let path = args.config.config.display();
    let text = std::fs::read_to_string(&args.config.config).with_context(|| {
        format!("cannot read {path} (name one with -c, or the state directory with --state)")
    })?;
    let config: LedgerOnly =
        serde_saphyr::from_str(&text).with_context(|| format!("{path} is not a configuration"))?;
    Ok(beside(&args.config.config, &config.ledger.path))
}

fn warn_of_torn(torn: u64) {
    if torn > 0 {
        eprintln!("gateway usage: the journal is damaged in {torn} places; all whole records were read");
    }
}

impl Since {
    fn unix_ms(self, now_unix_ms: u64) -> u64 {
        match self {
            Since::Ago(span) => {
                now_unix_ms.saturating_sub(u64::try_from(span.as_millis()).unwrap_or(u64::MAX))
            }
            Since::UnixMs(time) => time,
        }
    }
}

fn parse_since(text: &str) -> Result<Since, String> {
    if let Ok(span) = units::parse_span(text) {
        return Ok(Since::Ago(span.0));
    }
    let wrong = || format!("`{text}` is neither a span such as 7d nor a day such as 2026-01-31");
    let date: jiff::civil::Date = text.parse().map_err(|_| wrong())?;
    let midnight = date.to_zoned(jiff::tz::TimeZone::UTC).map_err(|_| wrong())?;
    let time = u64::try_from(midnight.timestamp().as_millisecond()).map_err(|_| wrong())?;
    Ok(Since::UnixMs(time))
}

/// A day of the books, `2026-01-31`.
fn day_text(day: u32) -> String {
    let date = jiff::civil::date(1970, 1, 1).checked_add(jiff::Span::new().days(i64::from(day)));
    date.map_or_else(|_| format!("day {day}"), |date| date.to_string())
}

impl By {
    fn name(self) -> &'static str {
        match self {
            By::Key => "key",
            By::Team => "team",
            By::Organization => "organization",
            By::User => "user",
            By::Model => "model",
            By::Provider => "provider",
            By::UpstreamModel => "upstream_model",
            By::Api => "api",
            By::Day => "day",
        }
    }

    fn of(self, group: &Group) -> String {
        match self {
            By::Key => group.key.clone(),
            By::Team => group.team.clone(),
            By::Organization => group.organization.clone(),
            By::User => group.user.clone(),
            By::Model => group.model.clone(),
            By::Provider => group.provider.clone(),
            By::UpstreamModel => group.upstream_model.clone(),
            By::Api => group.api.name().into(),
            By::Day => day_text(group.day),
        }
    }
}

/// Sums by labels, in their order, and over all.
fn sum(books: &Books, by: &[By]) -> (BTreeMap<Vec<String>, Counters>, Counters) {
    let mut rows: BTreeMap<Vec<String>, Counters> = BTreeMap::new();
    let mut total = Counters::default();
    for (group, counters) in &books.groups {
        let labels = by.iter().map(|by| by.of(group)).collect();
        rows.entry(labels).or_default().add(counters);
        total.add(counters);
    }
    (rows, total)
}

/// A row of sums: the labels, the counters, and the cost in dollars besides.
fn row(by: &[By], labels: &[String], counters: &Counters) -> anyhow::Result<Map<String, Value>> {
    let mut object = Map::new();
    for (by, label) in by.iter().zip(labels) {
        object.insert(by.name().into(), Value::from(label.as_str()));
    }
    if let Value::Object(counters) = serde_json::to_value(counters)? {
        object.extend(counters);
    }
    object.insert("cost_usd".into(), dollars(counters).into());
    Ok(object)
}

/// Cost in dollars, exact. Where no record has a price there is no cost, which is not the same as none.
fn dollars(counters: &Counters) -> Option<String> {
    let any = counters.unpriced < counters.requests;
    any.then(|| Dollars(counters.cost_nano_usd).to_string())
}

fn print_csv(by: &[By], rows: &BTreeMap<Vec<String>, Counters>, out: &mut impl Write) -> anyhow::Result<()> {
    let names = by.iter().map(|by| by.name());
    let names: Vec<Value> = names
        .chain(Counters::NAMES)
        .chain(["cost_usd"])
        .map(Value::from)
        .collect();
    write_csv_row(&mut *out, &names)?;
    for (labels, sum) in rows {
        let row = row(by, labels, sum)?;
        let values: Vec<&Value> = names
            .iter()
            .map(|name| &row[name.as_str().unwrap_or_default()])
            .collect();
        write_csv_row(&mut *out, values)?;
    }
    Ok(())
}

fn print_json(
    args: &Args,
    day_min: u32,
    rows: &BTreeMap<Vec<String>, Counters>,
    total: &Counters,
    out: &mut impl Write,
) -> anyhow::Result<()> {
    let rows: Vec<Value> = rows
        .iter()
        .map(|(labels, sum)| row(&args.by, labels, sum).map(Value::Object))
        .collect::<Result<_, _>>()?;
    let mut total_row = row(&[], &[], total)?;
    let total = Value::Object(std::mem::take(&mut total_row));
    let since = args.since.map(|_| day_text(day_min));
    let document = json!({ "since": since, "rows": rows, "total": total });
    serde_json::to_writer_pretty(&mut *out, &document).map_err(io::Error::from)?;
    Ok(writeln!(out)?)
}

/// Columns of numbers in the table.
const COLUMNS: [&str; 11] = [
    "requests",
    "complete",
    "gone",
    "failed",
    "estimated",
    "prompt",
    "cached",
    "completion",
    "reasoning",
    "usd",
    "unpriced",
];

fn cells(counters: &Counters) -> Vec<String> {
    let numbers = [
        counters.requests,
        counters.completed,
        counters.client_gone,
        counters.failed,
        counters.estimated,
        counters.prompt_tokens,
        counters.cached_tokens,
        counters.completion_tokens,
        counters.reasoning_tokens,
    ];
    let cost = dollars(counters).unwrap_or_else(|| "-".into());
    numbers
        .iter()
        .map(u64::to_string)
        .chain([cost, counters.unpriced.to_string()])
        .collect()
}

fn print_table(
    by: &[By],
    rows: &BTreeMap<Vec<String>, Counters>,
    total: &Counters,
    out: &mut impl Write,
) -> io::Result<()> {
    let mut lines: Vec<Vec<String>> = Vec::with_capacity(rows.len() + 2);
    let head = by.iter().map(|by| by.name()).chain(COLUMNS).map(str::to_owned);
    lines.push(head.collect());
    for (labels, counters) in rows {
        let labels = labels.iter().map(|label| {
            if label.is_empty() {
                "-".into()
            } else {
                label.clone()
            }
        });
        lines.push(labels.chain(cells(counters)).collect());
    }
    let labels = by
        .iter()
        .enumerate()
        .map(|(index, _)| if index == 0 { "total" } else { "" }.to_owned());
    lines.push(labels.chain(cells(total)).collect());
    let width = |column: usize| {
        lines
            .iter()
            .map(|line| line[column].chars().count())
            .max()
            .unwrap_or(0)
    };
    let widths: Vec<usize> = (0..by.len() + COLUMNS.len()).map(width).collect();
    for line in &lines {
        let mut text = String::new();
        for (column, (cell, width)) in line.iter().zip(&widths).enumerate() {
            if column < by.len() {
                text += &format!("{cell:<width$}  ");
            } else {
                text += &format!("{cell:>width$}  ");
            }
        }
        writeln!(out, "{}", text.trim_end())?;
    }
    Ok(())
}

/// Prints a record in the format asked for.
fn print_record(format: Format, record: &RecordView<'_>, out: &mut impl Write) -> io::Result<()> {
    let line = Line::of(record);
    match format {
        Format::Csv => line.write_csv(out),
        Format::Table | Format::Json | Format::Jsonl => line.write_json(out),
    }
}

/// A record in order of time.
struct ByTime(Record);

impl ByTime {
    fn key(&self) -> (u64, RequestId) {
        (self.0.time_unix_ms, self.0.id)
    }
}
impl PartialEq for ByTime {
    fn eq(&self, other: &ByTime) -> bool {
        self.key() == other.key()
    }
}
impl Eq for ByTime {}
impl PartialOrd for ByTime {
    fn partial_cmp(&self, other: &ByTime) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for ByTime {
    fn cmp(&self, other: &ByTime) -> std::cmp::Ordering {
        self.key().cmp(&other.key())
    }
}

fn print_records(
    args: &Args,
    state: &Path,
    since_unix_ms: u64,
    out: &mut impl Write,
) -> anyhow::Result<ExitCode> {
    let mut records =
        Records::open(state).with_context(|| format!("{} holds no readable ledger", state.display()))?;
    let wanted = |record: &RecordView<'_>| record.time_unix_ms >= since_unix_ms;
    let mut printed = Ok(());
    let mut found = false;
    let format = args.format();
    if format == Format::Csv {
        Line::write_csv_head(&mut *out)?;
    }
    let mut latest: BinaryHeap<Reverse<ByTime>> = BinaryHeap::new();
    records.each(|record| {
        match (args.id, args.last) {
            _ if !wanted(record) => return true,
            (Some(id), _) if record.id != id => return true,
            (None, Some(last)) => {
                latest.push(Reverse(ByTime(record.to_record())));
                if latest.len() > last as usize {
                    latest.pop();
                }
                return true;
            }
            _ => {}
        }
        found = true;
        printed = print_record(format, record, out);
        printed.is_ok() && args.id.is_none()
    })?;
    printed?;
    while let Some(Reverse(ByTime(record))) = latest.pop() {
        print_record(format, &record.view(), out)?;
    }
    warn_of_torn(records.torn());
    if let (Some(id), false) = (args.id, found) {
        out.flush()?;
        bail!("no record of {id} is kept in {}", state.display());
    }
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests;
