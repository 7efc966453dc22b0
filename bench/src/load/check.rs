//! Checks that an answer is whole: every token of the simulator once and in order, events with their borders, then a
//! reason and an end.
//!
//! A token is `t{number}`, perhaps `~{time}`, dots for padding, and a space, so that a lost, repeated or swapped one shows
//! whatever the gateway did to the events. The common event is checked by a needle; all others are parsed.

mod array;
mod event;

use memchr::memmem::Finder;
use serde_json::Value;

use super::part::Check;
use array::Splitter;

/// Bytes of one event that the checker accepts.
const EVENT_BYTES_MAX: usize = 64 * 1024 * 1024;
/// Tool calls of one answer that are put together.
const TOOL_CALLS_MAX: usize = 128;

/// The API that an answer belongs to, told by the target's path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Api {
    Chat,
    Completions,
    Embeddings,
    Responses,
    /// Anthropic's.
    Messages,
    /// Google's, as server-sent events or as one plain answer.
    Gemini,
    /// Google's, as one JSON array that comes in pieces.
    GeminiArray,
}

impl Api {
    pub fn of(target: &str) -> Self {
        let (path, query) = target.split_once('?').unwrap_or((target, ""));
        match path {
            _ if path.ends_with("/chat/completions") => Self::Chat,
            _ if path.ends_with("/completions") => Self::Completions,
            _ if path.ends_with("/embeddings") => Self::Embeddings,
            _ if path.ends_with("/responses") => Self::Responses,
            _ if path.ends_with("/messages") => Self::Messages,
            _ if path.ends_with(":generateContent") => Self::Gemini,
            _ if path.ends_with(":streamGenerateContent") => {
                if query.split('&').any(|word| word == "alt=sse") {
                    Self::Gemini
                } else {
                    Self::GeminiArray
                }
            }
            _ => Self::Chat,
        }
    }

    /// Whether its events have names.
    fn names_events(self) -> bool {
        matches!(self, Self::Responses | Self::Messages)
    }
}

/// What was wrong with an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flaw {
    /// A token is missing, repeated or out of order, or the usage disagrees with what came.
    Mismatch,
    /// Events are not parted by an empty line, the last one lacks it, or an event's name is not its type.
    Border,
    /// No `finish_reason` (or closing event) came.
    NoFinish,
    /// No `[DONE]` (or what ends a stream of that API) came.
    NoDone,
    /// An `error` object came inside the stream.
    ErrorEvent,
}

/// Needles of the events that come thousands of times.
pub struct Needles {
    text: Finder<'static>,
    /// It is in each such event.
    present: Option<Finder<'static>>,
    /// It is in no such event.
    absent: Option<Finder<'static>>,
    /// The name of such an event, where events have names.
    name: &'static [u8],
}

impl Needles {
    pub fn new(api: Api) -> Self {
        let unfinished = "\"finish_reason\":null";
        let (text, present, absent, name) = match api {
            Api::Completions => ("\"text\":\"", Some(unfinished), None, ""),
            Api::Responses => {
                let name = "response.output_text.delta";
                ("\"delta\":\"", Some("\"response.output_text.delta\""), None, name)
            }
            Api::Messages => {
                let text = "\"delta\":{\"type\":\"text_delta\",\"text\":\"";
                (text, None, None, "content_block_delta")
            }
            Api::Gemini | Api::GeminiArray => ("\"parts\":[{\"text\":\"", None, Some("\"finishReason\""), ""),
            Api::Chat | Api::Embeddings => ("\"delta\":{\"content\":\"", Some(unfinished), None, ""),
        };
        Self {
            text: Finder::new(text),
            present: present.map(Finder::new),
            absent: absent.map(Finder::new),
            name: name.as_bytes(),
        }
    }
}

/// Where in a token's text the last byte stood.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Place {
    #[default]
    Between,
    Start,
    Number(u64),
    /// In the time at which the token was sent.
    Stamp(u64, u64),
    Dots(u64),
}

/// Reads one answer.
#[derive(Debug)]
pub struct Checker {
    api: Api,
    check: Check,
    /// An event line cut by a read, or a plain body.
    carry: Vec<u8>,
    /// The array of a Gemini stream.
    splitter: Splitter,
    place: Place,
    /// Tokens seen whole; under [`Check::Shape`] events with content.
    pub tokens: u64,
    /// `data` lines seen, `[DONE]` included.
    pub events: u64,
    /// When the tokens were sent, for the reader to take.
    pub stamps: Vec<u64>,
    /// The name of the event that is being read.
    name: Vec<u8>,
    /// A `data` line has come and the empty line behind it has not.
    open: bool,
    border: bool,
    finished: bool,
    done: bool,
    failed: bool,
    mismatch: bool,
    /// Arguments of tool calls by their index, as far as they have come.
    tool_calls: Vec<(u64, String)>,
    /// Completion tokens of the usage, without reasoning.
    pub usage_tokens: Option<u64>,
}

impl Checker {
    pub fn new(api: Api) -> Self {
        Self {
            api,
            check: Check::Tokens,
            carry: Vec::new(),
            splitter: Splitter::default(),
            place: Place::Between,
            tokens: 0,
            events: 0,
            stamps: Vec::new(),
            name: Vec::new(),
            open: false,
            border: false,
            finished: false,
            done: false,
            failed: false,
            mismatch: false,
            tool_calls: Vec::new(),
            usage_tokens: None,
        }
    }

    /// Forgets the last answer and keeps the memory.
    pub fn reset(&mut self, check: Check) {
        let (mut carry, mut stamps, mut name) = (
            std::mem::take(&mut self.carry),
            std::mem::take(&mut self.stamps),
            std::mem::take(&mut self.name),
        );
        carry.clear();
        stamps.clear();
        name.clear();
        *self = Self {
            check,
            carry,
            stamps,
            name,
            ..Self::new(self.api)
        };
    }

    /// Takes a piece of a stream, its transfer coding already off.
    pub fn feed_stream(&mut self, needles: &Needles, mut data: &[u8]) {
        if self.api == Api::GeminiArray {
            return self.feed_array(needles, data);
        }
        while let Some(end) = memchr::memchr(b'\n', data) {
            let (line, rest) = (&data[..end], &data[end + 1..]);
            if self.carry.is_empty() {
                self.line(needles, line);
            } else {
                let mut whole = std::mem::take(&mut self.carry);
                whole.extend_from_slice(line);
                self.line(needles, &whole);
                whole.clear();
                self.carry = whole;
            }
            data = rest;
        }
        self.feed_plain(data);
    }

    fn feed_array(&mut self, needles: &Needles, mut data: &[u8]) {
        let mut splitter = std::mem::take(&mut self.splitter);
        while !data.is_empty() {
            let (eaten, object) = splitter.step(data);
            if let Some(object) = object {
                self.events += 1;
                self.event(needles, &object);
                splitter.reuse(object);
            }
            data = &data[eaten..];
        }
        self.mismatch |= splitter.is_broken();
        self.done = splitter.is_done();
        self.splitter = splitter;
    }

    /// Takes a piece of a plain answer.
    pub fn feed_plain(&mut self, data: &[u8]) {
        if self.carry.len() + data.len() > EVENT_BYTES_MAX {
            self.mismatch = true;
            return;
        }
        self.carry.extend_from_slice(data);
    }

    fn line(&mut self, needles: &Needles, line: &[u8]) {
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        let Some(data) = line.strip_prefix(b"data:") else {
            return self.other_line(line);
        };
        let data = data.strip_prefix(b" ").unwrap_or(data);
        self.events += 1;
        // Several lines of data are one event to a client: where the simulator sent several events, a border was lost.
        self.border |= self.open;
        self.open = true;
        // Nothing may follow the end.
        self.mismatch |= self.done;
        self.event(needles, data);
    }

    /// A line that is not data: an empty one ends an event.
    fn other_line(&mut self, line: &[u8]) {
        if line.is_empty() {
            self.open = false;
            self.name.clear();
        } else if let Some(name) = line.strip_prefix(b"event:") {
            self.border |= self.open;
            self.name.clear();
            self.name
                .extend_from_slice(name.strip_prefix(b" ").unwrap_or(name));
        }
    }

    fn event(&mut self, needles: &Needles, data: &[u8]) {
        if !self.content_event(needles, data) {
            self.other_event(data);
        }
    }

    /// Checks the most common event; false where it is another one.
    fn content_event(&mut self, needles: &Needles, data: &[u8]) -> bool {
        let Some(at) = needles.text.find(data) else {
            return false;
        };
        let text = &data[at + needles.text.needle().len()..];
        let Some(end) = memchr::memchr2(b'"', b'\\', text) else {
            return false;
        };
        let is_wanted = |finder: &Finder<'_>| finder.find(data).is_some();
        // Google's thoughts look the same up to what comes behind their text.
        let is_thought =
            matches!(self.api, Api::Gemini | Api::GeminiArray) && text.get(end + 1) != Some(&b'}');
        if text[end] != b'"'
            || is_thought
            || !needles.present.as_ref().is_none_or(is_wanted)
            || needles.absent.as_ref().is_some_and(is_wanted)
        {
            return false;
        }
        self.border |= self.api.names_events() && self.name != needles.name;
        self.text(&text[..end]);
        true
    }

    /// Goes on in the tokens' text.
    fn text(&mut self, text: &[u8]) {
        if self.check == Check::Shape {
            self.tokens += u64::from(!text.is_empty());
            return;
        }
        for byte in text {
            self.place = match (self.place, *byte) {
                (Place::Between, b't') => Place::Start,
                (Place::Start, digit @ b'0'..=b'9') => Place::Number(u64::from(digit - b'0')),
                (Place::Number(number), digit @ b'0'..=b'9') if number < u64::MAX / 20 => {
                    Place::Number(number * 10 + u64::from(digit - b'0'))
                }
                (Place::Number(number), b'~') => Place::Stamp(number, 0),
                (Place::Stamp(number, time), digit @ b'0'..=b'9') if time < u64::MAX / 20 => {
                    Place::Stamp(number, time * 10 + u64::from(digit - b'0'))
                }
                (Place::Stamp(number, time), b'.') => {
                    self.stamps.push(time);
                    Place::Dots(number)
                }
                (Place::Number(number) | Place::Dots(number), b'.') => Place::Dots(number),
                (Place::Number(number) | Place::Dots(number) | Place::Stamp(number, _), b' ') => {
                    if let Place::Stamp(_, time) = self.place {
                        self.stamps.push(time);
                    }
                    self.mismatch |= number != self.tokens;
                    self.tokens = number + 1;
                    Place::Between
                }
                _ => {
                    self.mismatch = true;
                    Place::Between
                }
            };
        }
    }

    /// What is wrong with a stream that has ended, if anything.
    pub fn stream_flaw(&self, expected_tokens: Option<u64>) -> Option<Flaw> {
        match self {
            _ if self.mismatch => Some(Flaw::Mismatch),
            _ if self.failed => Some(Flaw::ErrorEvent),
            _ if self.border => Some(Flaw::Border),
            _ if !self.finished => Some(Flaw::NoFinish),
            _ if !self.done => Some(Flaw::NoDone),
            _ if self.miscounted(expected_tokens) => Some(Flaw::Mismatch),
            // A client never sees an event whose empty line does not come.
            _ if self.open || !self.carry.is_empty() => Some(Flaw::Border),
            _ => None,
        }
    }

    fn miscounted(&self, expected_tokens: Option<u64>) -> bool {
        let whole_calls = self
            .tool_calls
            .iter()
            .all(|(_, arguments)| arguments.is_empty() || serde_json::from_str::<Value>(arguments).is_ok());
        // What a real model calls a token is not what it puts into one event.
        let counts = self.check == Check::Tokens;
        self.place != Place::Between
            || !whole_calls
            || counts && self.usage_tokens.is_some_and(|tokens| tokens != self.tokens)
            || counts && expected_tokens.is_some_and(|tokens| tokens != self.tokens)
    }
}

#[cfg(test)]
mod tests;
