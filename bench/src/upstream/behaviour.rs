//! What a simulated upstream does, read from the model's name: `sim` or `sim:key=value,key=value`.

use std::time::Duration;

use crate::random::{Random, Spread, seconds};

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
#[derive(Clone, Debug, PartialEq)]
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
    /// Tool calls behind the text (chat, Messages, Gemini).
    pub tool_calls: u32,
    /// What is drawn anew for each call instead of the fields above.
    pub spreads: Spreads,
    /// Faults and the share of calls, 0 to 1, that have each.
    pub faults: Vec<(Fault, f64)>,
    pub limits: ProviderLimits,
    /// Blocks of 256 bytes of prompt that an endpoint's cache of prefixes holds; 0 for no cache.
    pub cache_blocks: usize,
    /// Time that 1,000 prompt tokens take that are not in the cache, on top of `first`.
    pub prefill: Duration,
}

/// Figures that differ from call to call.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Spreads {
    /// Seconds.
    pub first: Option<Spread>,
    /// Seconds; drawn for each token.
    pub pace: Option<Spread>,
    pub tokens: Option<Spread>,
    /// Bytes.
    pub size: Option<Spread>,
}

/// A fault that comes at random.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Fault {
    Status(u16),
    /// After a random number of tokens.
    Death(Death),
    /// An `error` object after a random number of tokens.
    Error,
    BadChunk,
    Garbage,
    /// The head comes so much later.
    Slow(Duration),
}

/// What a provider allows one model on one endpoint; 0 for no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ProviderLimits {
    pub requests_per_minute: u32,
    pub tokens_per_minute: u32,
    /// Calls at once.
    pub parallel: u32,
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
            tool_calls: 0,
            spreads: Spreads::default(),
            faults: Vec::new(),
            limits: ProviderLimits::default(),
            cache_blocks: 0,
            prefill: Duration::ZERO,
        }
    }
}

/// Largest `size` and `huge` in bytes.
const TEXT_BYTES_MAX: usize = 16 * 1024 * 1024;
/// Largest `tokens` and `reasoning`.
const TOKENS_MAX: u32 = 100_000_000;
/// Most faults of one behaviour.
const FAULTS_MAX: usize = 16;
/// Most tool calls of one answer.
const TOOL_CALLS_MAX: u32 = 64;
/// Most blocks of a cache of prefixes: a gigabyte of prompts.
const CACHE_BLOCKS_MAX: usize = 4 * 1024 * 1024;

impl Behaviour {
    /// The behaviour that `model` asks for, with `self` for what it does not say. A name that is neither `sim` nor
    /// starts with `sim:` gets `self`.
    pub fn for_model(&self, model: &str) -> Result<Self, String> {
        let mut behaviour = self.clone();
        if let Some(words) = model.strip_prefix("sim:") {
            // A client must not make the simulator read files.
            if words.contains("file:") {
                return Err("`file:` is for the command line only".to_owned());
            }
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
        let fixed = self.spreads.tokens.is_none() && self.faults.is_empty() && self.error_after.is_none();
        fixed.then_some(self.tokens)
    }

    /// Draws what differs from call to call.
    pub fn draw(&mut self, random: &mut Random) {
        if let Some(spread) = &self.spreads.first {
            self.first = seconds(spread.sample(random));
        }
        if let Some(spread) = &self.spreads.tokens {
            self.tokens = (spread.sample(random).round() as u32).clamp(1, TOKENS_MAX);
        }
        if let Some(spread) = &self.spreads.size {
            self.token_bytes = (spread.sample(random) as usize).min(TEXT_BYTES_MAX);
        }
        let mut drawn = random.unit();
        let fault = self.faults.iter().find(|(_, share)| {
            let hit = drawn < *share;
            drawn -= share;
            hit
        });
        if let Some((fault, _)) = fault {
            let after = random.below(u64::from(self.tokens)) as u32;
            match *fault {
                Fault::Status(status) => self.status = status,
                Fault::Death(death) => (self.death, self.after) = (Some(death), Some(after)),
                Fault::Error => self.error_after = Some(after),
                Fault::BadChunk => (self.bad_chunk, self.after) = (true, Some(after)),
                Fault::Garbage => self.garbage = true,
                Fault::Slow(time) => self.slow_head += time,
            }
        }
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
    /// | `tools=N` | tool calls behind the text | 0 |
    /// | `fault=KIND@SHARE` | a share of calls (0 to 1) has a fault: a status, `rst`, `fin`, `stall`, `error`, `badchunk`, `garbage`, `slow:TIME`; can be repeated | none |
    /// | `rpm=N` `tpm=N` `parallel=N` | the provider's limits for one model on one endpoint, with its headers and 429 | none |
    /// | `kv=BLOCKS` `prefill=TIME` | cache of prompt prefixes, blocks of 64 tokens; time of 1,000 tokens that are not in it | none |
    /// | `ctype=TYPE` `dims=N` | another content type; dimensions of an embedding | own, 8 |
    ///
    /// `tokens`, `pace`, `first` and `size` also take `uniform:LOW:HIGH`, `normal:MEAN:DEVIATION`, `lognormal:MEDIAN:SIGMA`,
    /// `exp:MEAN`, and (on the command line) `file:PATH` with one value a line.
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
            "tokens" | "pace" | "first" | "size" => self.set_spread(key, value)?,
            "slowhead" => self.slow_head = duration(value)?,
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

    fn set_spread(&mut self, key: &str, value: &str) -> Option<()> {
        let read: fn(&str) -> Option<f64> = match key {
            "tokens" => |text| tokens(text).map(f64::from),
            "size" => |text| text_bytes(text).map(|bytes| bytes as f64),
            _ => |text| duration(text).map(|time| time.as_secs_f64()),
        };
        let spread = match value.strip_prefix("file:") {
            Some(path) => Spread::parse_list(&std::fs::read_to_string(path).ok()?, read)?,
            None => Spread::parse(value, read)?,
        };
        let fixed = spread.fixed();
        let drawn = fixed.is_none().then_some(spread);
        match key {
            "tokens" => {
                self.tokens = fixed.map_or(self.tokens, |tokens| tokens as u32);
                self.spreads.tokens = drawn;
            }
            "size" => {
                self.token_bytes = fixed.map_or(self.token_bytes, |bytes| bytes as usize);
                self.spreads.size = drawn;
            }
            "pace" => {
                self.pace = fixed.map_or(self.pace, seconds);
                self.spreads.pace = drawn;
            }
            _ => {
                self.first = fixed.map_or(self.first, seconds);
                self.spreads.first = drawn;
            }
        }
        Some(())
    }

    /// Words of what a provider is beside its answers.
    fn set_provider(&mut self, key: &str, value: &str) -> Option<()> {
        match key {
            "tools" => self.tool_calls = value.parse().ok().filter(|calls| *calls <= TOOL_CALLS_MAX)?,
            "fault" => {
                let (kind, share) = value.split_once('@')?;
                let share: f64 = share.parse().ok().filter(|share| (0.0..=1.0).contains(share))?;
                if self.faults.len() >= FAULTS_MAX {
                    return None;
                }
                self.faults.push((fault(kind)?, share));
            }
            "rpm" => self.limits.requests_per_minute = value.parse().ok()?,
            "tpm" => self.limits.tokens_per_minute = value.parse().ok()?,
            "parallel" => self.limits.parallel = value.parse().ok()?,
            "kv" => self.cache_blocks = value.parse().ok().filter(|blocks| *blocks <= CACHE_BLOCKS_MAX)?,
            "prefill" => self.prefill = duration(value)?,
            _ => return None,
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
            _ => return self.set_provider(key, value),
        }
        Some(())
    }
}

fn fault(kind: &str) -> Option<Fault> {
    Some(match kind {
        "rst" => Fault::Death(Death::Reset),
        "fin" => Fault::Death(Death::Close),
        "stall" => Fault::Death(Death::Stall),
        "error" => Fault::Error,
        "badchunk" => Fault::BadChunk,
        "garbage" => Fault::Garbage,
        _ => match kind.strip_prefix("slow:") {
            Some(time) => Fault::Slow(duration(time)?),
            None => Fault::Status(kind.parse().ok().filter(|status| (400..600).contains(status))?),
        },
    })
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
