//! A record as it leaves the ledger: one JSON object, or one line of CSV. The same columns for both and for exports.

use std::io::{self, Write};

use serde::Serialize;
use serde_json::Value;

use super::record::{Flags, Record, RecordView};
use crate::{config::units::Dollars, dialect::json};

/// A record's columns. Money is in `cost_nano_usd`, exact, and the same in dollars in `cost_usd`; both are null where
/// nobody knows the price.
#[derive(Debug, Serialize)]
pub struct Line<'a> {
    /// RFC 3339, UTC, milliseconds.
    time: String,
    id: String,
    key: &'a str,
    team: &'a str,
    organization: &'a str,
    user: &'a str,
    model: &'a str,
    provider: &'a str,
    upstream_model: &'a str,
    endpoint: &'a str,
    api: &'static str,
    outcome: &'static str,
    finish_reason: &'static str,
    status: u16,
    stream: bool,
    estimated: bool,
    retried: bool,
    fallback: bool,
    cut: bool,
    upstream_error: bool,
    cache_hit: bool,
    drained: bool,
    clamped: bool,
    attempts: u8,
    fallback_index: u8,
    tier: &'static str,
    prompt_tokens: u64,
    cached_tokens: u64,
    cache_write_5m_tokens: u64,
    cache_write_1h_tokens: u64,
    completion_tokens: u64,
    reasoning_tokens: u64,
    cost_nano_usd: Option<u64>,
    cost_usd: Option<String>,
    ttft_us: u64,
    duration_us: u64,
    bytes_in: u64,
    bytes_out: u64,
    tags: &'a str,
}

impl<'a> Line<'a> {
    /// The columns of a record.
    pub fn of(record: &RecordView<'a>) -> Line<'a> {
        let has = |flag| record.flags.has(flag);
        Line {
            time: time_text(record.time_unix_ms),
            id: record.id.to_string(),
            key: record.key,
            team: record.team,
            organization: record.organization,
            user: record.user,
            model: record.model,
            provider: record.provider,
            upstream_model: record.upstream_model,
            endpoint: record.endpoint,
            api: record.api.name(),
            outcome: record.outcome.name(),
            finish_reason: record.finish.name(),
            status: record.status,
            stream: has(Flags::STREAM),
            estimated: has(Flags::ESTIMATED),
            retried: has(Flags::RETRIED),
            fallback: has(Flags::FALLBACK),
            cut: has(Flags::CUT),
            upstream_error: has(Flags::UPSTREAM_ERROR),
            cache_hit: has(Flags::CACHE_HIT),
            drained: has(Flags::DRAINED),
            clamped: has(Flags::CLAMPED),
            attempts: record.attempts,
            fallback_index: record.fallback,
            tier: record.usage.tier.name(),
            prompt_tokens: record.usage.prompt,
            cached_tokens: record.usage.cached,
            cache_write_5m_tokens: record.usage.cache_write_5m,
            cache_write_1h_tokens: record.usage.cache_write_1h,
            completion_tokens: record.usage.completion,
            reasoning_tokens: record.usage.reasoning,
            cost_nano_usd: record.cost,
            cost_usd: record.cost.map(|nano| Dollars(nano).to_string()),
            ttft_us: record.ttft_us,
            duration_us: record.duration_us,
            bytes_in: record.bytes_in,
            bytes_out: record.bytes_out,
            tags: record.tags,
        }
    }

    /// Writes it as a JSON object and a line feed.
    pub fn write_json(&self, mut out: impl Write) -> io::Result<()> {
        serde_json::to_writer(&mut out, self).map_err(io::Error::from)?;
        writeln!(out)
    }

    /// Writes it as a line of CSV.
    pub fn write_csv(&self, out: impl Write) -> io::Result<()> {
        write_csv_row(out, self.columns().iter().map(|(_, value)| value))
    }

    /// Writes the names of the columns as a line of CSV.
    pub fn write_csv_head(out: impl Write) -> io::Result<()> {
        let record = Record::default();
        let names: Vec<Value> = Line::of(&record.view())
            .columns()
            .into_iter()
            .map(|(name, _)| name.into())
            .collect();
        write_csv_row(out, &names)
    }

    /// Names and values in their order.
    fn columns(&self) -> Vec<(String, Value)> {
        // Not by way of a `Value`: its objects are sorted by name.
        let text = serde_json::to_vec(self).unwrap_or_default();
        json::members(&text)
            .map_while(Result::ok)
            .map(|member| {
                let value = serde_json::from_slice(&text[member.value.clone()]);
                (member.key.into_owned(), value.unwrap_or_default())
            })
            .collect()
    }
}

/// Writes a line of CSV (RFC 4180): null is empty, text is quoted where it must be. A text that a spreadsheet would take
/// for a formula gets an apostrophe in front: names come from clients.
pub fn write_csv_row<'v>(mut out: impl Write, values: impl IntoIterator<Item = &'v Value>) -> io::Result<()> {
    for (place, value) in values.into_iter().enumerate() {
        if place > 0 {
            out.write_all(b",")?;
        }
        match value {
            Value::Null => {}
            Value::String(text) => {
                let text = match text.as_bytes().first() {
                    Some(b'=' | b'+' | b'-' | b'@' | b'\t' | b'\r') => format!("'{text}"),
                    _ => text.clone(),
                };
                if text.contains(['"', ',', '\n', '\r']) {
                    write!(out, "\"{}\"", text.replace('"', "\"\""))?;
                } else {
                    out.write_all(text.as_bytes())?;
                }
            }
            other => write!(out, "{other}")?,
        }
    }
    out.write_all(b"\r\n")
}

/// A time as RFC 3339 has it; a number where it is beyond the calendar.
fn time_text(unix_ms: u64) -> String {
    let time = i64::try_from(unix_ms)
        .ok()
        .and_then(|ms| jiff::Timestamp::from_millisecond(ms).ok());
    time.map_or_else(|| unix_ms.to_string(), |time| format!("{time:.3}"))
}

#[cfg(test)]
mod tests {
    use super::{super::record::tests::numbered, *};

    #[test]
    fn csv_and_json_have_the_same_columns() {
        let mut record = numbered(7);
        record.user = "=cmd(\"x\"),\nb".into();
        record.cost = None;
        let view = record.view();
        let line = Line::of(&view);
        let mut csv = Vec::new();
        Line::write_csv_head(&mut csv).unwrap();
        line.write_csv(&mut csv).unwrap();
        let csv = String::from_utf8(csv).unwrap();
        let (head, row) = csv.split_once("\r\n").unwrap();
        let mut json = Vec::new();
        line.write_json(&mut json).unwrap();
        let json: serde_json::Map<String, Value> = serde_json::from_slice(&json).unwrap();
        assert_eq!(head.split(',').count(), json.len());
        assert!(head.starts_with("time,id,key,"), "{head}");
        assert!(row.contains("\"'=cmd(\"\"x\"\"),\nb\""), "{row}");
        assert_eq!(json["cost_nano_usd"], Value::Null);
        assert_eq!(json["time"], "2025-10-09T08:53:20.000Z");
    }
}
