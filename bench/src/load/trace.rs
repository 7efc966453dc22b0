//! Recorded traffic, sent again: when each request came, how long its prompt was and how long its answer.
//!
//! One JSON object a line:
//!
//! | field | meaning |
//! |---|---|
//! | `at_ms` (or `timestamp`) | milliseconds since the trace's beginning; lines stand in this order |
//! | `prompt_tokens` (or `input_length`) | length of the prompt; four bytes of text are sent for each |
//! | `output_tokens` (or `output_length`) | length of the answer, asked for with `max_tokens` |
//! | `prefix` (or `hash_ids`) | numbers of the prompt's blocks of 512 tokens: equal numbers are equal text, so that caches of prefixes hit as they did |
//! | `ttft_ms`, `itl_ms` | what was measured; the simulated upstream plays it (`--trace`), the load generator does not look |
//!
//! The names in parentheses are those of the published Mooncake traces, which so need no conversion.

use std::sync::Arc;

use serde::Deserialize;

use crate::prompt;

/// Lines of one trace.
const ROWS_MAX: usize = 10_000_000;
/// Bytes of text for a token.
const TOKEN_BYTES: usize = 4;
/// Tokens of a block in `prefix`.
const BLOCK_TOKENS: usize = 512;
/// Tokens of one prompt.
const PROMPT_TOKENS_MAX: usize = 4_000_000;

/// One request as it was recorded.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
pub struct Row {
    #[serde(alias = "timestamp")]
    pub at_ms: f64,
    #[serde(alias = "input_length", default)]
    pub prompt_tokens: usize,
    #[serde(alias = "output_length", default)]
    pub output_tokens: u32,
    #[serde(alias = "hash_ids", default)]
    pub prefix: Vec<u64>,
    pub ttft_ms: Option<f64>,
    pub itl_ms: Option<f64>,
}

/// A trace, in the order in which its requests came.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Trace {
    rows: Arc<[Row]>,
    /// Its time is divided by this.
    speed: f64,
}

impl Trace {
    /// Reads JSON lines; empty ones are left out.
    ///
    /// # Errors
    /// A text that names the line.
    pub fn parse(text: &str) -> Result<Self, String> {
        let mut rows: Vec<Row> = Vec::new();
        for (number, line) in text
            .lines()
            .enumerate()
            .filter(|(_, line)| !line.trim().is_empty())
        {
            let place = number + 1;
            let row: Row = serde_json::from_str(line).map_err(|error| format!("line {place}: {error}"))?;
            if !(row.at_ms >= 0.0 && row.at_ms <= 1e12) {
                return Err(format!("line {place}: at_ms is no time"));
            }
            if rows.last().is_some_and(|last| last.at_ms > row.at_ms) {
                return Err(format!("line {place}: at_ms goes back"));
            }
            if row.prompt_tokens > PROMPT_TOKENS_MAX {
                return Err(format!(
                    "line {place}: more than {PROMPT_TOKENS_MAX} prompt tokens"
                ));
            }
            if rows.len() == ROWS_MAX {
                return Err(format!("more than {ROWS_MAX} lines"));
            }
            rows.push(row);
        }
        if rows.is_empty() {
            return Err("it is empty".to_owned());
        }
        Ok(Self {
            rows: rows.into(),
            speed: 1.0,
        })
    }

    /// The same, `speed` times as fast.
    pub fn at_speed(self, speed: f64) -> Self {
        Self { speed, ..self }
    }

    pub fn rows(&self) -> &[Row] {
        &self.rows
    }
}

/// A request of a trace, ready to be sent.
pub(super) struct Played {
    pub text: String,
    pub max_tokens: Option<u32>,
}

/// Goes through a trace once.
pub(super) struct Player {
    trace: Trace,
    at: usize,
}

impl Player {
    pub fn new(trace: Trace) -> Self {
        Self { trace, at: 0 }
    }

    pub fn is_over(&self) -> bool {
        self.at >= self.trace.rows.len()
    }

    /// When the next request is due, in nanoseconds since the trace's beginning.
    pub fn due_ns(&self) -> Option<u64> {
        let row = self.trace.rows.get(self.at)?;
        Some((row.at_ms * 1e6 / self.trace.speed.max(1e-6)) as u64)
    }

    /// Leaves the next request out.
    pub fn skip(&mut self) {
        self.at += 1;
    }

    pub fn next(&mut self) -> Option<Played> {
        let row = self.trace.rows.get(self.at)?;
        let own = self.at as u64;
        self.at += 1;
        Some(Played {
            text: text(row, own),
            max_tokens: (row.output_tokens > 0).then_some(row.output_tokens),
        })
    }
}

/// The prompt of a row: its blocks, then text of its own.
fn text(row: &Row, own: u64) -> String {
    let bytes = row.prompt_tokens * TOKEN_BYTES;
    let mut text = String::with_capacity(bytes);
    for block in &row.prefix {
        let left = bytes - text.len();
        text.push_str(&prompt::text(left.min(BLOCK_TOKENS * TOKEN_BYTES), *block));
    }
    // Numbers of rows must not look like numbers of blocks.
    text.push_str(&prompt::text(bytes - text.len(), !own));
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_spellings_are_read() {
        let text = "{\"at_ms\":0,\"prompt_tokens\":10,\"output_tokens\":3}\n\n\
                    {\"timestamp\":2000,\"input_length\":1024,\"output_length\":0,\"hash_ids\":[4,9]}\n";
        let trace = Trace::parse(text).unwrap().at_speed(2.0);
        assert_eq!((trace.rows().len(), trace.rows()[1].prefix.len()), (2, 2));
        let mut player = Player::new(trace);
        let first = player.next().unwrap();
        assert_eq!((first.text.len(), first.max_tokens), (40, Some(3)));
        assert_eq!(player.due_ns(), Some(1_000_000_000));
        let second = player.next().unwrap();
        assert_eq!((second.text.len(), second.max_tokens), (4096, None));
        assert!(player.is_over() && player.next().is_none());
    }

    #[test]
    fn equal_blocks_are_equal_text() {
        let row = |prefix: &[u64]| Row {
            prompt_tokens: 1200,
            prefix: prefix.to_vec(),
            ..Row::default()
        };
        let (left, right) = (text(&row(&[1, 2]), 0), text(&row(&[1, 3]), 1));
        assert_eq!(left[..2048], right[..2048]);
        assert_ne!(left[2048..4096], right[2048..4096]);
        // A short prompt has room for a part of its blocks only.
        let short = Row {
            prompt_tokens: 5,
            prefix: vec![1, 2, 3],
            ..Row::default()
        };
        assert_eq!(text(&short, 0), left[..20]);
    }

    #[test]
    fn errors_name_the_line() {
        for (text, part) in [
            ("", "empty"),
            ("{\"at_ms\":5}\n{\"at_ms\":4}", "line 2"),
            ("{\"at_ms\":-5}", "line 1"),
            ("{\"at_ms\":0}\nx", "line 2"),
            ("{\"at_ms\":0,\"prompt_tokens\":9000000}", "line 1"),
        ] {
            let error = Trace::parse(text).unwrap_err();
            assert!(error.contains(part), "{text}: {error}");
        }
    }
}
