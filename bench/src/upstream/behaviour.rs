//! What a simulated upstream does, read from the model's name: `sim` or `sim:key=value,key=value`.

use std::time::Duration;

/// How an answer dies before its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Death {
    /// The connection is reset (`SO_LINGER` 0).
    Reset,
    /// The connection is closed in good order, but the body's end is missing.
    Close,
    /// Nothing more is sent and the connection stays open.
    Stall,
}

/// What happens to a kept connection after an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stale {
    /// Kept as HTTP/1.1 says.
    No,
    /// Closed, without an answer, when its next request arrives.
    OnRequest,
    /// Closed right after the answer, though the answer did not say so.
    AtOnce,
}

/// When a stream carries the usage chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Usage {
    /// When `stream_options.include_usage` asks for it.
    Asked,
    /// Never, though asked; plain answers lack it too.
    Never,
    /// Always, though not asked.
    Always,
}

/// What a simulated upstream does with one request. [`Behaviour::apply`] documents the words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Behaviour {
    pub tokens: u32,
    pub pace: Duration,
    pub first: Duration,
    pub slow_head: Duration,
    pub token_bytes: usize,
    pub huge_bytes: usize,
    /// Each token tells when it was sent.
    pub stamp: bool,
    pub usage: Usage,
    pub cached_tokens: u64,
    pub reasoning_tokens: u32,
    /// Bytes of one write; 0 writes whole events.
    pub split_bytes: usize,
    /// Pause between two such writes.
    pub split_gap: Duration,
    pub crlf: bool,
    pub done: bool,
    pub azure: bool,
    /// A comment line comes before every so many tokens; 0 for none.
    pub comment_every: u32,
    pub status: u16,
    pub retry_after_s: u32,
    pub after: Option<u32>,
    pub death: Option<Death>,
    pub error_after: Option<u32>,
    pub bad_chunk: bool,
    pub garbage: bool,
    pub close: bool,
    /// The body's end is the connection's end: neither length nor chunks.
    pub unframed: bool,
    pub stale: Stale,
    pub content_type: Option<String>,
    pub dimensions: u32,
}

impl Default for Behaviour {
    fn default() -> Self {
        Self {
            tokens: 100,
            pace: Duration::from_millis(20),
            first: Duration::from_millis(50),
            slow_head: Duration::ZERO,
            token_bytes: 0,
            huge_bytes: 0,
            stamp: false,
            usage: Usage::Asked,
            cached_tokens: 0,
            reasoning_tokens: 0,
            split_bytes: 0,
            split_gap: Duration::ZERO,
            crlf: false,
            done: true,
            azure: false,
            comment_every: 0,
            status: 200,
            retry_after_s: 1,
            after: None,
            death: None,
            error_after: None,
            bad_chunk: false,
            garbage: false,
            close: false,
            unframed: false,
            stale: Stale::No,
            content_type: None,
            dimensions: 8,
        }
    }
}

/// Largest `size` and `huge` in bytes.
const TEXT_BYTES_MAX: usize = 16 * 1024 * 1024;
/// Largest `tokens` and `reasoning`.
const TOKENS_MAX: u32 = 100_000_000;

impl Behaviour {
    /// The behaviour that `model` asks for, with `self` for what it does not say. A name that is neither `sim` nor
    /// starts with `sim:` gets `self`.
    pub fn for_model(&self, model: &str) -> Result<Self, String> {
        let mut behaviour = self.clone();
        if let Some(words) = model.strip_prefix("sim:") {
            behaviour.apply(words)?;
        }
        Ok(behaviour)
    }

    /// The same with `words` applied.
    ///
    /// # Errors
    /// A text that names the word.
    pub fn with_words(&self, words: &str) -> Result<Self, String> {
        let mut behaviour = self.clone();
        behaviour.apply(words)?;
        Ok(behaviour)
    }

    /// The tokens of every answer, where all have as many.
    pub fn tokens_fixed(&self) -> Option<u32> {
        Some(self.tokens)
    }

    /// Applies `key=value` words separated by commas; a key alone means `key=on`.
    ///
    /// | word | meaning | default |
    /// |---|---|---|
    /// | `tokens=N` | tokens of the answer (`max_tokens` cuts them) | 100 |
    /// | `pace=TIME` | time between tokens; 0: as fast as the socket takes them | 20ms |
    /// | `first=TIME` | head to first token; a plain answer takes this long | 50ms |
    /// | `slowhead=TIME` | request to head | 0 |
    /// | `size=BYTES` | bytes of a token's text | as short as can be |
    /// | `huge=BYTES` | bytes of the first token's text | `size` |
    /// | `stamp` | in streams, each token's text has the time at which it was sent (microseconds of `CLOCK_MONOTONIC`) | off |
    /// | `usage=on\|off\|always` | usage when asked, never, or always | on |
    /// | `cached=N` `reasoning=N` | usage details; reasoning tokens are also sent | 0 |
    /// | `split=BYTES` `gap=TIME` | writes of so many bytes, so far apart | whole events |
    /// | `crlf` `done=off` `azure` `comment=N` | CRLF lines; no `[DONE]`; a first chunk without choices; comments | off |
    /// | `status=N` `retry=S` | an error object; `Retry-After` of a 429 or 503 | 200, 1 |
    /// | `die=rst\|fin\|stall` `after=N` | death after N tokens; without `after` before the head | none |
    /// | `error=N` | an `error` object inside the 200 stream after N tokens | none |
    /// | `badchunk` `garbage` | a chunk size that is none, after `after` tokens; an answer that is not HTTP | off |
    /// | `close` `unframed` | `Connection: close`; body ends with the connection | off |
    /// | `stale=on\|now` | a kept connection closed at its next request, or at once | off |
    /// | `ctype=TYPE` `dims=N` | another content type; dimensions of an embedding | own, 8 |
    ///
    /// Times are `250us`, `20ms`, `2s` or a bare number of milliseconds. Errors name the word.
    pub fn apply(&mut self, words: &str) -> Result<(), String> {
        for word in words.split(',').map(str::trim).filter(|word| !word.is_empty()) {
            let (key, value) = word.split_once('=').unwrap_or((word, "on"));
            self.set(key, value)
                .ok_or_else(|| format!("unknown behaviour `{word}`"))?;
        }
        Ok(())
    }

    fn set(&mut self, key: &str, value: &str) -> Option<()> {
        match key {
            "tokens" => self.tokens = tokens(value)?,
            "pace" => self.pace = duration(value)?,
            "first" => self.first = duration(value)?,
            "slowhead" => self.slow_head = duration(value)?,
            "size" => self.token_bytes = text_bytes(value)?,
            "huge" => self.huge_bytes = text_bytes(value)?,
            "usage" => {
                self.usage = match value {
                    "always" => Usage::Always,
                    _ if switch(value)? => Usage::Asked,
                    _ => Usage::Never,
                }
            }
            "cached" => self.cached_tokens = value.parse().ok()?,
            "reasoning" => self.reasoning_tokens = tokens(value)?,
            "split" => self.split_bytes = value.parse().ok()?,
            "gap" => self.split_gap = duration(value)?,
            "stamp" => self.stamp = switch(value)?,
            "crlf" => self.crlf = switch(value)?,
            "done" => self.done = switch(value)?,
            "azure" => self.azure = switch(value)?,
            "comment" => self.comment_every = value.parse().ok()?,
            "ctype" => self.content_type = content_type(value)?,
            "dims" => self.dimensions = value.parse().ok().filter(|dims| (1..=65_536).contains(dims))?,
            _ => return self.set_fault(key, value),
        }
        Some(())
    }

    fn set_fault(&mut self, key: &str, value: &str) -> Option<()> {
        match key {
            "status" => self.status = value.parse().ok().filter(|status| (200..600).contains(status))?,
            "retry" => self.retry_after_s = value.parse().ok()?,
            "after" => self.after = Some(value.parse().ok()?),
            "die" => {
                self.death = Some(match value {
                    "rst" => Death::Reset,
                    "fin" => Death::Close,
                    "stall" => Death::Stall,
                    _ => return None,
                })
            }
            "error" => self.error_after = Some(value.parse().ok()?),
            "badchunk" => self.bad_chunk = switch(value)?,
            "garbage" => self.garbage = switch(value)?,
            "close" => self.close = switch(value)?,
            "unframed" => self.unframed = switch(value)?,
            "stale" => {
                self.stale = match value {
                    "now" => Stale::AtOnce,
                    _ if switch(value)? => Stale::OnRequest,
                    _ => Stale::No,
                }
            }
            _ => return None,
        }
        Some(())
    }
}

fn switch(value: &str) -> Option<bool> {
    match value {
        "on" | "true" | "1" => Some(true),
        "off" | "false" | "0" => Some(false),
        _ => None,
    }
}

fn tokens(value: &str) -> Option<u32> {
    value.parse().ok().filter(|count| *count <= TOKENS_MAX)
}

fn text_bytes(value: &str) -> Option<usize> {
    value.parse().ok().filter(|bytes| *bytes <= TEXT_BYTES_MAX)
}

/// A content type is copied into a head, so it must not be able to end a line.
fn content_type(value: &str) -> Option<Option<String>> {
    value
        .bytes()
        .all(|byte| (b' '..=b'~').contains(&byte))
        .then(|| Some(value.to_owned()))
}

/// Reads `250us`, `20ms`, `2s`, `5m` or a bare number of milliseconds, at most a day.
pub fn duration(text: &str) -> Option<Duration> {
    let digits = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let seconds_per_unit = match unit {
        "us" => 1e-6,
        "ms" | "" => 1e-3,
        "s" => 1.0,
        "m" => 60.0,
        "h" => 3600.0,
        _ => return None,
    };
    let seconds = number.parse::<f64>().ok()? * seconds_per_unit;
    (0.0..=86_400.0)
        .contains(&seconds)
        .then(|| Duration::from_secs_f64(seconds))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_model_name_says_the_behaviour() {
        let base = Behaviour::default();
        let read = base
            .for_model("sim:tokens=5,pace=0,first=1.5s,die=rst,after=3,crlf,usage=off")
            .unwrap();
        assert_eq!(read.tokens, 5);
        assert_eq!(read.pace, Duration::ZERO);
        assert_eq!(read.first, Duration::from_millis(1500));
        assert_eq!((read.death, read.after), (Some(Death::Reset), Some(3)));
        assert!(read.crlf);
        assert_eq!(read.usage, Usage::Never);
        assert_eq!(base.for_model("gpt-5").unwrap(), base);
        assert_eq!(base.for_model("sim").unwrap(), base);
    }

    #[test]
    fn unknown_words_are_named() {
        let base = Behaviour::default();
        for word in [
            "colour=red",
            "tokens=many",
            "die=slowly",
            "pace=1y",
            "status=99",
            "ctype=a\r\nb",
        ] {
            let error = base.for_model(&format!("sim:{word}")).unwrap_err();
            assert!(error.contains(word), "{error}");
        }
    }

    #[test]
    fn durations_have_units() {
        assert_eq!(duration("250us"), Some(Duration::from_micros(250)));
        assert_eq!(duration("20"), Some(Duration::from_millis(20)));
        assert_eq!(duration("2m"), Some(Duration::from_secs(120)));
        assert_eq!(duration("-1s"), None);
        assert_eq!(duration("2d"), None);
        assert_eq!(duration(""), None);
    }
}
