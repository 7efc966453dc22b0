//! `gateway status`: how a running gateway is.

use std::{fmt::Write, process::ExitCode};

use serde_json::{Map, Value};

use super::client::{AdminArgs, Client, exit, print, print_json};

/// Show how a running gateway is
///
/// Asks the admin API. What does not work as it could (no BPF, no io_uring, …) stands under `degraded`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  gateway status
  gateway status --json | jq .degraded
  gateway status --admin 10.0.0.5:9900 --token-file ~/gateway.token

Exit code: 0 it answered, 1 it did not.")]
pub struct Args {
    #[command(flatten)]
    admin: AdminArgs,
}

/// Runs the command.
pub fn run(args: &Args) -> ExitCode {
    exit(show(args))
}

fn show(args: &Args) -> anyhow::Result<()> {
    let status = Client::new(&args.admin)?.get("/status")?;
    match args.admin.json {
        true => print_json(&status),
        false => print(&render(&status)),
    }
}

/// An object for people: its plain fields first, then a section for each field that has more in it.
pub(super) fn render(value: &Value) -> String {
    let mut out = String::new();
    if let Value::Object(fields) = value {
        write_fields(fields, "", &mut out);
        for (name, value) in fields.iter().filter(|(_, value)| !is_plain(value)) {
            write_section(name, value, &mut out);
        }
    }
    out
}

fn write_section(name: &str, value: &Value, out: &mut String) {
    let title = name.replace('_', " ");
    match value {
        Value::Object(fields) if fields.is_empty() => {}
        Value::Object(fields) => {
            let _ = writeln!(out, "\n{title}");
            write_fields(fields, "  ", out);
        }
        Value::Array(items) if items.is_empty() => {}
        Value::Array(items) => {
            let _ = writeln!(out, "\n{title}");
            let rows: Vec<&Map<String, Value>> = items.iter().filter_map(Value::as_object).collect();
            if rows.len() == items.len() {
                write_table(&rows, out);
                return;
            }
            for item in items {
                let _ = writeln!(out, "  {}", cell(name, item));
            }
        }
        _ => {}
    }
}

/// Plain fields, one a line, their values in one column.
fn write_fields(fields: &Map<String, Value>, indent: &str, out: &mut String) {
    let plain = || {
        fields
            .iter()
            .filter(|(_, value)| is_plain(value) && !value.is_null())
    };
    let width = plain()
        .map(|(name, _)| label(name).chars().count())
        .max()
        .unwrap_or(0);
    for (name, value) in plain() {
        let _ = writeln!(out, "{indent}{:width$}  {}", label(name), cell(name, value));
    }
}

/// Objects with the same fields as a table: texts first, then numbers, these to the right.
fn write_table(rows: &[&Map<String, Value>], out: &mut String) {
    let Some(first) = rows.first() else { return };
    let mut columns: Vec<&String> = first.keys().collect();
    columns.sort_by_key(|column| first[*column].is_number());
    let cells = |row: &Map<String, Value>| -> Vec<String> {
        let value = |column: &&String| {
            row.get(*column)
                .map_or_else(String::new, |value| cell(column, value))
        };
        columns.iter().map(value).collect()
    };
    let head: Vec<String> = columns.iter().map(|column| label(column)).collect();
    let lines: Vec<Vec<String>> = std::iter::once(head)
        .chain(rows.iter().map(|row| cells(row)))
        .collect();
    let width = |place: usize| {
        lines
            .iter()
            .map(|line| line[place].chars().count())
            .max()
            .unwrap_or(0)
    };
    let widths: Vec<usize> = (0..columns.len()).map(width).collect();
    for line in &lines {
        let mut text = String::from(" ");
        for (place, cell) in line.iter().enumerate() {
            let width = widths[place];
            let _ = match first[columns[place]].is_number() {
                true => write!(text, " {cell:>width$} "),
                false => write!(text, " {cell:width$} "),
            };
        }
        let _ = writeln!(out, "{}", text.trim_end());
    }
}

fn is_plain(value: &Value) -> bool {
    !value.is_object() && !value.is_array()
}

/// A field's name without the unit that its value is shown with.
fn label(name: &str) -> String {
    let bare = ["_us", "_ms", "_seconds", "_bytes"]
        .iter()
        .find_map(|unit| name.strip_suffix(unit))
        .unwrap_or(name);
    bare.replace('_', " ")
}

/// A value for people, by the unit at the end of its field's name.
fn cell(name: &str, value: &Value) -> String {
    let number = value.as_f64();
    match (value, number) {
        (Value::String(text), _) => printable(text),
        (Value::Bool(yes), _) => if *yes { "yes" } else { "no" }.to_owned(),
        (Value::Null, _) => "-".to_owned(),
        (_, Some(number)) if name.ends_with("_us") => duration(number / 1e6),
        (_, Some(number)) if name.ends_with("_ms") => duration(number / 1e3),
        (_, Some(number)) if name.ends_with("_seconds") => duration(number),
        (_, Some(number)) if name.ends_with("_bytes") || name == "bytes_in" || name == "bytes_out" => {
            size(number)
        }
        _ => printable(&value.to_string()),
    }
}

/// Text without control characters: names come from elsewhere, and a terminal obeys what it is sent.
pub(super) fn printable(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect()
}

pub(super) fn duration(seconds: f64) -> String {
    match seconds {
        s if s <= 0.0 => "0".to_owned(),
        s if s < 0.001 => format!("{:.0} µs", s * 1e6),
        s if s < 1.0 => format!("{:.1} ms", s * 1e3),
        s if s < 120.0 => format!("{s:.1} s"),
        s if s < 2.0 * 3_600.0 => format!("{:.0} min", s / 60.0),
        s if s < 2.0 * 86_400.0 => format!("{:.1} h", s / 3_600.0),
        s => format!("{:.1} d", s / 86_400.0),
    }
}

pub(super) fn size(bytes: f64) -> String {
    const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    if bytes < 1024.0 {
        return format!("{bytes:.0} B");
    }
    let mut scaled = bytes / 1024.0;
    let mut unit = 0;
    while scaled >= 1024.0 && unit + 1 < UNITS.len() {
        scaled /= 1024.0;
        unit += 1;
    }
    format!("{scaled:.1} {}", UNITS[unit])
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_status_is_readable() {
        let text = render(&json!({
            "degraded": ["no BPF\u{1b}[2J: all else works"],
            "empty": [],
            "last_error": null,
            "latency": [
                { "count": 12, "of": "time to first token", "p50_us": 250 },
                { "count": 1_000, "of": "total", "p50_us": 1_500_000 },
            ],
            "state": "running",
            "traffic": { "open": true, "sent_bytes": 3_145_728 },
            "uptime_seconds": 7_200,
        }));
        let wanted = "\
state   running
uptime  2.0 h

degraded
  no BPF [2J: all else works

latency
  of                   count     p50
  time to first token     12  250 µs
  total                 1000   1.5 s

traffic
  open  yes
  sent  3.0 MiB
";
        assert_eq!(text, wanted);
    }

    #[test]
    fn units_fit_their_size() {
        assert_eq!(duration(0.0), "0");
        assert_eq!(duration(0.000_25), "250 µs");
        assert_eq!(duration(0.012), "12.0 ms");
        assert_eq!(duration(90_000.0), "25.0 h");
        assert_eq!(duration(259_200.0), "3.0 d");
        assert_eq!(size(1023.0), "1023 B");
        assert_eq!(size(1024.0 * 1024.0), "1.0 MiB");
        assert_eq!(size(f64::MAX), format!("{:.1} PiB", f64::MAX / 1024f64.powi(5)));
    }

    #[test]
    fn rows_that_differ_do_no_harm() {
        let text = render(&json!({ "rows": [{ "a": 1, "b": "x" }, { "a": "text" }, { "c": 1 }] }));
        assert_eq!(text, "\nrows\n  b     a\n  x     1\n     text\n\n");
    }
}
