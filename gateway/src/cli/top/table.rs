//! The state as lines of text.

use std::{collections::HashMap, time::Duration};

use serde_json::Value;

use crate::{
    cli::status::{duration, printable, size},
    control::admin::top::Sort,
};

/// What grew how fast between the last two looks.
#[derive(Default)]
pub struct Rates {
    /// By kind and name: requests and tokens at the last look.
    last: HashMap<(char, String), [f64; 2]>,
    last_s: f64,
    rates: HashMap<(char, String), [f64; 2]>,
}

impl Rates {
    /// Takes in one more look.
    pub fn learn(&mut self, state: &Value) {
        let now_s = number(state, "uptime_seconds");
        let passed_s = now_s - self.last_s;
        // A look at the same moment, or at a gateway that was started anew, tells no rate.
        let is_later = self.last_s > 0.0 && passed_s >= Duration::from_millis(50).as_secs_f64();
        let mut seen = HashMap::new();
        let mut rates = HashMap::new();
        for (kind, list, name) in [('c', "clients", "client"), ('k', "keys", "key")] {
            for row in rows(state, list) {
                let id = (kind, text(row, name));
                let counts = [number(row, "requests"), number(row, "tokens")];
                if let Some(before) = self.last.get(&id).filter(|_| is_later) {
                    let rate = |place: usize| ((counts[place] - before[place]) / passed_s).max(0.0);
                    rates.insert(id.clone(), [rate(0), rate(1)]);
                }
                seen.insert(id, counts);
            }
        }
        self.last = seen;
        self.last_s = now_s;
        self.rates = rates;
    }

    fn of(&self, kind: char, name: &str) -> [String; 2] {
        match self.rates.get(&(kind, name.to_owned())) {
            Some(rates) => rates.map(rate),
            None => ["-".into(), "-".into()],
        }
    }
}

/// The lines; `room`: columns and lines of the terminal, of which clients get two thirds.
pub fn render(state: &Value, sort: Sort, rates: &Rates, room: Option<(u16, u16)>) -> Vec<String> {
    let count = |name: &str| whole(number(state, name));
    let mut lines = vec![format!(
        "by {}: connections {}  streams {}  requests {}  refusals {}  tokens {}  up {}",
        sort.name(),
        count("connections"),
        count("streams"),
        count("requests"),
        count("refusals"),
        count("tokens"),
        duration(number(state, "uptime_seconds")),
    )];
    if let Some(reason) = state["kernel_off"].as_str() {
        lines.push(format!(
            "RTT, RETR and drops are not known: {}",
            printable(reason)
        ));
    }
    lines.push(String::new());
    let left = room.map(|(_, height)| usize::from(height).saturating_sub(lines.len() + 3));
    let clients: Vec<[String; 12]> = rows(state, "clients").map(|row| client(row, rates)).collect();
    let keys: Vec<[String; 8]> = rows(state, "keys").map(|row| key(row, rates)).collect();
    let (of_clients, of_keys) = share(left, clients.len(), keys.len());
    table(
        [
            "CLIENT", "CONN", "REQ/S", "TOK/S", "REQUESTS", "TOKENS", "REFUSED", "IN", "OUT", "RTT", "RETR",
            "BLOCKED",
        ],
        &clients[..of_clients],
        &mut lines,
    );
    lines.push(String::new());
    table(
        [
            "KEY", "REQ/S", "TOK/S", "REQUESTS", "TOKENS", "FAILED", "IN", "OUT",
        ],
        &keys[..of_keys],
        &mut lines,
    );
    lines
}

/// How many rows of each are shown in so much room: what one does not need the other gets.
fn share(room: Option<usize>, clients: usize, keys: usize) -> (usize, usize) {
    let Some(room) = room else { return (clients, keys) };
    let of_keys = keys.min((room / 3).max(room.saturating_sub(clients)));
    (clients.min(room - of_keys), of_keys)
}

fn client(row: &Value, rates: &Rates) -> [String; 12] {
    let name = text(row, "client");
    let [requests, tokens] = rates.of('c', &name);
    let known = |field: &str, show: fn(f64) -> String| row[field].as_f64().map_or_else(|| "-".into(), show);
    [
        name,
        whole(number(row, "connections")),
        requests,
        tokens,
        whole(number(row, "requests")),
        whole(number(row, "tokens")),
        whole(number(row, "refusals")),
        size(number(row, "bytes_in")),
        size(number(row, "bytes_out")),
        known("rtt_us", |us| duration(us / 1e6)),
        known("retransmits", whole),
        known("blocked_seconds", duration),
    ]
}

fn key(row: &Value, rates: &Rates) -> [String; 8] {
    let name = text(row, "key");
    let [requests, tokens] = rates.of('k', &name);
    [
        name,
        requests,
        tokens,
        whole(number(row, "requests")),
        whole(number(row, "tokens")),
        whole(number(row, "failed")),
        size(number(row, "bytes_in")),
        size(number(row, "bytes_out")),
    ]
}

/// The first column to the left, the others to the right.
fn table<const N: usize>(head: [&str; N], rows: &[[String; N]], lines: &mut Vec<String>) {
    let width = |place: usize| {
        let cells = rows.iter().map(|row| row[place].chars().count());
        cells.max().unwrap_or(0).max(head[place].len())
    };
    let widths: Vec<usize> = (0..N).map(width).collect();
    let line = |cells: &[String; N]| {
        let mut text = format!("{:1$}", cells[0], widths[0]);
        for (cell, width) in cells.iter().zip(&widths).skip(1) {
            text.push_str(&format!("  {cell:>width$}"));
        }
        text.truncate(text.trim_end().len());
        text
    };
    lines.push(line(&head.map(str::to_owned)));
    lines.extend(rows.iter().map(line));
}

fn rows<'v>(state: &'v Value, list: &str) -> impl Iterator<Item = &'v Value> {
    state[list].as_array().into_iter().flatten()
}

fn number(row: &Value, field: &str) -> f64 {
    row[field].as_f64().unwrap_or(0.0)
}

fn text(row: &Value, field: &str) -> String {
    printable(row[field].as_str().unwrap_or("-"))
}

/// A count that stays short: 999999, 1.0M, 2.5G.
fn whole(count: f64) -> String {
    match count {
        n if n >= 1e12 => format!("{:.1}T", n / 1e12),
        n if n >= 1e9 => format!("{:.1}G", n / 1e9),
        n if n >= 1e6 => format!("{:.1}M", n / 1e6),
        n => format!("{n:.0}"),
    }
}

fn rate(a_second: f64) -> String {
    match a_second {
        r if r < 0.05 => "0".into(),
        r if r < 10.0 => format!("{r:.1}"),
        r => whole(r),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn state(uptime: f64, requests: u64) -> Value {
        json!({
            "connections": 3, "streams": 1, "requests": 12, "refusals": 0, "tokens": 2_500_000, "uptime_seconds": uptime,
            "kernel_off": "CAP_BPF is missing\u{1b}[2J",
            "clients": [{ "client": "10.0.0.1", "connections": 2, "requests": requests, "tokens": 10, "refusals": 4,
                "bytes_in": 1024, "bytes_out": 2048, "rtt_us": null, "retransmits": null, "blocked_seconds": 7.5 }],
            "keys": [{ "key": "alice", "requests": requests, "failed": 0, "tokens": 10, "bytes_in": 1, "bytes_out": 2 }],
        })
    }

    #[test]
    fn a_table_is_readable() {
        let mut rates = Rates::default();
        rates.learn(&state(10.0, 4));
        rates.learn(&state(12.0, 24));
        let text = render(&state(12.0, 24), Sort::Tokens, &rates, None).join("\n");
        let wanted = "\
by tokens: connections 3  streams 1  requests 12  refusals 0  tokens 2.5M  up 12.0 s
RTT, RETR and drops are not known: CAP_BPF is missing [2J

CLIENT    CONN  REQ/S  TOK/S  REQUESTS  TOKENS  REFUSED       IN      OUT  RTT  RETR  BLOCKED
10.0.0.1     2     10      0        24      10        4  1.0 KiB  2.0 KiB    -     -    7.5 s

KEY    REQ/S  TOK/S  REQUESTS  TOKENS  FAILED   IN  OUT
alice     10      0        24      10       0  1 B  2 B";
        assert_eq!(text, wanted);
    }

    #[test]
    fn a_gateway_that_began_anew_has_no_negative_rates() {
        let mut rates = Rates::default();
        rates.learn(&state(100.0, 1000));
        rates.learn(&state(1.0, 0));
        assert!(rates.rates.is_empty());
    }

    #[test]
    fn rows_share_the_room() {
        assert_eq!(share(None, 7, 9), (7, 9));
        assert_eq!(share(Some(30), 100, 100), (20, 10));
        assert_eq!(share(Some(30), 5, 100), (5, 25));
        assert_eq!(share(Some(30), 100, 2), (28, 2));
        assert_eq!(share(Some(0), 100, 100), (0, 0));
    }

    #[test]
    fn an_answer_of_another_kind_does_no_harm() {
        for state in [json!(null), json!([]), json!({ "clients": 7, "keys": [null, 1] })] {
            render(&state, Sort::Bytes, &Rates::default(), Some((3, 1)));
        }
    }
}
