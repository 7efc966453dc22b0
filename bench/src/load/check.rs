//! Checks that an answer is whole: every token of the simulator once and in order, then a reason and an end.
//!
//! A token is `t{number}`, dots for padding, and a space, so that a lost, repeated or swapped one shows whatever the
//! gateway did to the events. The common event is checked by a needle; all others are parsed.

use memchr::memmem::Finder;
use serde_json::Value;

/// Bytes of one event that the checker accepts.
const EVENT_BYTES_MAX: usize = 64 * 1024 * 1024;

/// The API that an answer belongs to, told by the target's path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Api {
    Chat,
    Completions,
    Embeddings,
    Responses,
}

impl Api {
    pub fn of(path: &str) -> Self {
        let path = path.split('?').next().unwrap_or_default();
        match path {
            _ if path.ends_with("/chat/completions") => Self::Chat,
            _ if path.ends_with("/completions") => Self::Completions,
            _ if path.ends_with("/embeddings") => Self::Embeddings,
            _ if path.ends_with("/responses") => Self::Responses,
            _ => Self::Chat,
        }
    }
}

/// What was wrong with an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flaw {
    /// A token is missing, repeated or out of order, or the usage disagrees with what came.
    Mismatch,
    /// No `finish_reason` (or closing event) came.
    NoFinish,
    /// No `[DONE]` came.
    NoDone,
    /// An `error` object came inside the stream.
    ErrorEvent,
}

/// Needles of the events that come thousands of times.
pub struct Needles {
    text: Finder<'static>,
    unfinished: Finder<'static>,
}

impl Needles {
    pub fn new(api: Api) -> Self {
        let (text, unfinished) = match api {
            Api::Completions => ("\"text\":\"", "\"finish_reason\":null"),
            Api::Responses => ("\"delta\":\"", "\"response.output_text.delta\""),
            Api::Chat | Api::Embeddings => ("\"delta\":{\"content\":\"", "\"finish_reason\":null"),
        };
        Self {
            text: Finder::new(text),
            unfinished: Finder::new(unfinished),
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
    Dots(u64),
}

/// Reads one answer.
#[derive(Debug)]
pub struct Checker {
    api: Api,
    /// An event line cut by a read, or a plain body.
    carry: Vec<u8>,
    place: Place,
    /// Tokens seen whole.
    pub tokens: u64,
    /// `data` lines seen, `[DONE]` included.
    pub events: u64,
    finished: bool,
    done: bool,
    failed: bool,
    mismatch: bool,
    /// Completion tokens of the usage, without reasoning.
    pub usage_tokens: Option<u64>,
}

impl Checker {
    pub fn new(api: Api) -> Self {
        Self {
            api,
            carry: Vec::new(),
            place: Place::Between,
            tokens: 0,
            events: 0,
            finished: false,
            done: false,
            failed: false,
            mismatch: false,
            usage_tokens: None,
        }
    }

    /// Forgets the last answer and keeps the memory.
    pub fn reset(&mut self) {
        let mut carry = std::mem::take(&mut self.carry);
        carry.clear();
        *self = Self {
            carry,
            ..Self::new(self.api)
        };
    }

    /// Takes a piece of a stream, its transfer coding already off.
    pub fn feed_stream(&mut self, needles: &Needles, mut data: &[u8]) {
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
            return;
        };
        let data = data.strip_prefix(b" ").unwrap_or(data);
        self.events += 1;
        if self.done {
            // Nothing may follow the end.
            self.mismatch = true;
        }
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
        if text[end] != b'"' || needles.unfinished.find(data).is_none() {
            return false;
        }
        self.text(&text[..end]);
        true
    }

    fn other_event(&mut self, data: &[u8]) {
        if data == b"[DONE]" {
            self.done = true;
            return;
        }
        match serde_json::from_slice::<Value>(data) {
            Ok(event) if self.api == Api::Responses => self.responses_event(&event),
            Ok(event) => self.chunk(&event),
            Err(_) => self.mismatch = true,
        }
    }

    fn chunk(&mut self, event: &Value) {
        if event.get("error").is_some_and(|error| !error.is_null()) {
            self.failed = true;
        }
        if let Some(choice) = event["choices"].get(0) {
            let text = if self.api == Api::Completions {
                &choice["text"]
            } else {
                &choice["delta"]["content"]
            };
            self.text(text.as_str().unwrap_or_default().as_bytes());
            self.finished |= choice["finish_reason"].is_string();
        }
        self.usage(&event["usage"], "completion_tokens", "completion_tokens_details");
    }

    fn responses_event(&mut self, event: &Value) {
        match event["type"].as_str().unwrap_or_default() {
            "response.output_text.delta" => self.text(event["delta"].as_str().unwrap_or_default().as_bytes()),
            "response.completed" | "response.incomplete" => {
                self.finished = true;
                self.done = true;
                self.usage(
                    &event["response"]["usage"],
                    "output_tokens",
                    "output_tokens_details",
                );
            }
            "response.failed" | "error" => self.failed = true,
            _ if event.get("error").is_some_and(|error| !error.is_null()) => self.failed = true,
            _ => {}
        }
    }

    fn usage(&mut self, usage: &Value, tokens: &str, details: &str) {
        if let Some(tokens) = usage[tokens].as_u64() {
            let reasoning = usage[details]["reasoning_tokens"].as_u64().unwrap_or(0);
            self.usage_tokens = Some(tokens.saturating_sub(reasoning));
        }
    }

    /// Goes on in the tokens' text.
    fn text(&mut self, text: &[u8]) {
        for byte in text {
            self.place = match (self.place, *byte) {
                (Place::Between, b't') => Place::Start,
                (Place::Start, digit @ b'0'..=b'9') => Place::Number(u64::from(digit - b'0')),
                (Place::Number(number), digit @ b'0'..=b'9') if number < u64::MAX / 20 => {
                    Place::Number(number * 10 + u64::from(digit - b'0'))
                }
                (Place::Number(number) | Place::Dots(number), b'.') => Place::Dots(number),
                (Place::Number(number) | Place::Dots(number), b' ') => {
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
            _ if !self.finished => Some(Flaw::NoFinish),
            _ if !self.done => Some(Flaw::NoDone),
            _ if self.miscounted(expected_tokens) => Some(Flaw::Mismatch),
            _ => None,
        }
    }

    /// What is wrong with a plain answer that has ended, if anything.
    pub fn plain_flaw(&mut self, expected_tokens: Option<u64>) -> Option<Flaw> {
        let body = std::mem::take(&mut self.carry);
        let Ok(answer) = serde_json::from_slice::<Value>(&body) else {
            return Some(Flaw::Mismatch);
        };
        self.carry = body;
        if answer.get("error").is_some_and(|error| !error.is_null()) {
            return Some(Flaw::ErrorEvent);
        }
        let choice = &answer["choices"][0];
        let text = match self.api {
            Api::Embeddings => {
                let whole = answer["data"][0]["embedding"]
                    .as_array()
                    .is_some_and(|numbers| !numbers.is_empty());
                return (!whole).then_some(Flaw::Mismatch);
            }
            Api::Chat => &choice["message"]["content"],
            Api::Completions => &choice["text"],
            Api::Responses => &answer["output"][0]["content"][0]["text"],
        };
        self.text(text.as_str().unwrap_or_default().as_bytes());
        match self.api {
            Api::Responses => self.usage(&answer["usage"], "output_tokens", "output_tokens_details"),
            _ => self.usage(&answer["usage"], "completion_tokens", "completion_tokens_details"),
        }
        let finished = choice["finish_reason"].is_string() || answer["status"].is_string();
        match finished {
            _ if self.mismatch || self.miscounted(expected_tokens) => Some(Flaw::Mismatch),
            false => Some(Flaw::NoFinish),
            true => None,
        }
    }

    fn miscounted(&self, expected_tokens: Option<u64>) -> bool {
        self.place != Place::Between
            || self.usage_tokens.is_some_and(|tokens| tokens != self.tokens)
            || expected_tokens.is_some_and(|tokens| tokens != self.tokens)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(body: &str, cut: usize) -> Checker {
        let needles = Needles::new(Api::Chat);
        let mut checker = Checker::new(Api::Chat);
        body.as_bytes()
            .chunks(cut)
            .for_each(|piece| checker.feed_stream(&needles, piece));
        checker
    }

    fn token(text: &str) -> String {
        format!("data: {{\"choices\":[{{\"delta\":{{\"content\":\"{text}\"}},\"finish_reason\":null}}]}}\n\n")
    }

    const FINISH: &str = "data: {\"choices\":[{\"delta\":{},\"finish_reason\":\"stop\"}]}\n\n";
    const DONE: &str = "data: [DONE]\n\n";

    #[test]
    fn a_whole_stream_passes_at_every_cut() {
        let role = "data: {\"choices\": [{\"delta\": {\"role\": \"assistant\", \"content\": \"\"}}]}\r\n\r\n";
        let usage = "data: {\"choices\":[],\"usage\":{\"completion_tokens\":5,\
                     \"completion_tokens_details\":{\"reasoning_tokens\":2}}}\n\n";
        let body = [
            role,
            &token("t0 "),
            ": ping\n\n",
            &token("t1.. t"),
            &token("2 "),
            FINISH,
            usage,
            DONE,
        ]
        .concat();
        for cut in 1..=body.len() {
            let checker = check(&body, cut);
            assert_eq!(checker.stream_flaw(Some(3)), None, "cut at {cut}");
            assert_eq!((checker.tokens, checker.events), (3, 7));
        }
        assert_eq!(check(&body, 9).stream_flaw(Some(4)), Some(Flaw::Mismatch));
    }

    #[test]
    fn every_flaw_is_seen() {
        let (t0, t1, t2) = (token("t0 "), token("t1 "), token("t2 "));
        let error = "data: {\"error\":{\"message\":\"x\"}}\n\n";
        let cases: [(Vec<&str>, Flaw); 9] = [
            (vec![&t0, &t2, FINISH, DONE], Flaw::Mismatch),
            (vec![&t0, &t0, FINISH, DONE], Flaw::Mismatch),
            (vec![&t1, &t0, FINISH, DONE], Flaw::Mismatch),
            (vec![&t0, "data: {\n\n", FINISH, DONE], Flaw::Mismatch),
            (vec![&t0, FINISH, DONE, &t1], Flaw::Mismatch),
            (vec![&t0, DONE], Flaw::NoFinish),
            (vec![&t0, FINISH], Flaw::NoDone),
            (vec![&t0, error, DONE], Flaw::ErrorEvent),
            (
                vec![
                    &t0,
                    "data: {\"choices\":[],\"usage\":{\"completion_tokens\":2}}\n\n",
                    FINISH,
                    DONE,
                ],
                Flaw::Mismatch,
            ),
        ];
        for (pieces, flaw) in cases {
            let body = pieces.concat();
            assert_eq!(check(&body, body.len()).stream_flaw(None), Some(flaw), "{body}");
        }
    }

    #[test]
    fn plain_answers_are_checked() {
        let flaw = |body: &str| {
            let mut checker = Checker::new(Api::Chat);
            checker.feed_plain(body.as_bytes());
            checker.plain_flaw(Some(2))
        };
        assert_eq!(
            flaw(r#"{"choices":[{"message":{"content":"t0 t1 "},"finish_reason":"stop"}]}"#),
            None
        );
        let short = r#"{"choices":[{"message":{"content":"t0 "},"finish_reason":"stop"}]}"#;
        assert_eq!(flaw(short), Some(Flaw::Mismatch));
        assert_eq!(flaw(r#"{"error":{"message":"no"}}"#), Some(Flaw::ErrorEvent));
        assert_eq!(flaw("{\"choices\""), Some(Flaw::Mismatch));
    }
}
