//! Reports and answers as `lease.lua` reads and says them.

use redis::{Cmd, Value};

use super::level::{Answer, Report};
use crate::quota::lease::Kind;

/// How long a level is kept at least that nothing is reported of, milliseconds: ten times the longest lease.
const SHORTEST_MS: u64 = 600_000;

/// What one part of the store answered.
#[derive(Debug)]
pub struct Heard {
    /// Another one than before: the part lost its data.
    pub mark: u64,
    /// For each report, in their order; `None`: that level could not be counted.
    pub answers: Vec<Option<Answer>>,
    /// Which level that is, one of them, and why.
    pub trouble: Option<String>,
}

/// A report as `lease.lua` reads it.
pub(super) fn write_report(report: &Report, command: &mut Cmd) {
    let window_us = |window_ns: u64| (window_ns / 1_000).max(1);
    let (kind, window, length_ms, ttl_ms) = match report.kind {
        Kind::Bucket { window_ns } => (
            "b",
            window_us(window_ns),
            window_ns / 1_000_000,
            kept_ms(window_ns),
        ),
        Kind::Sliding { window_ns } => (
            "s",
            window_us(window_ns),
            window_ns / 1_000_000,
            kept_ms(window_ns),
        ),
        Kind::Period {
            end_unix_ms,
            length_ms,
        } => ("p", end_unix_ms, length_ms, (2 * length_ms).max(SHORTEST_MS)),
        Kind::Credit => ("c", 0, 0, 0),
        Kind::Parallel => ("c", 0, 0, SHORTEST_MS),
    };
    command.arg(&report.host).arg(kind).arg(report.amount).arg(window);
    let numbers = [
        length_ms,
        ttl_ms,
        report.seq,
        report.spent,
        report.from_start,
        report.from_known,
        report.birth,
        report.kept,
        report.wanted,
        report.needed,
        report.held,
        u64::from(report.hard),
    ];
    for number in numbers {
        command.arg(number);
    }
}

/// How long a window's level is kept, milliseconds: until it is unused in any case.
fn kept_ms(window_ns: u64) -> u64 {
    (window_ns / 1_000_000 * 3).max(SHORTEST_MS)
}

/// Whether a level's trouble is the whole server's: no memory, a replica, no persistence, no rights.
pub(super) fn is_ill(trouble: &str) -> bool {
    const ILL: [&str; 6] = [
        "OOM",
        "READONLY",
        "MISCONF",
        "NOREPLICAS",
        "NOPERM",
        "The user executing the script",
    ];
    ILL.iter().any(|kind| trouble.contains(kind))
}

/// What the store says of one level; `Err`: what is wrong with it.
pub(super) fn answer(line: &Value) -> Result<Answer, String> {
    let Value::Array(values) = line else {
        return Err(match line {
            Value::BulkString(bytes) => String::from_utf8_lossy(bytes).into_owned(),
            _ => "an answer of another form".into(),
        });
    };
    let number = |value: &Value| match value {
        Value::Int(number) => u64::try_from(*number).ok(),
        _ => None,
    };
    let numbers: Vec<u64> = values.iter().filter_map(number).collect();
    let &[accepted, out, free, used, hosts, reset_us, settled_us, birth] = &numbers[..] else {
        return Err("an answer of another form".into());
    };
    Ok(Answer {
        accepted: accepted == 1,
        out,
        free,
        used,
        hosts,
        reset_us,
        settled_us,
        birth,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_of_another_form_is_none() {
        let line = |numbers: &[i64]| Value::Array(numbers.iter().copied().map(Value::Int).collect());
        let read = answer(&line(&[1, 2, 3, 4, 5, 6, 7, 8])).expect("an answer");
        assert!(read.accepted && read.out == 2 && read.birth == 8);
        assert!(answer(&line(&[1, 2])).is_err());
        assert!(answer(&line(&[1, -2, 3, 4, 5, 6, 7, 8])).is_err());
        let trouble = answer(&Value::BulkString(b"WRONGTYPE".to_vec()));
        assert_eq!(trouble.expect_err("no answer"), "WRONGTYPE");
    }
}
