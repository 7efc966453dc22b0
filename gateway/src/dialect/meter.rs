//! Reads along with a stream of server-sent events: counts, finds the usage, takes out what the client did not
//! ask for. Sees every byte once, parses only the event that tells the usage, and keeps nothing but the part of
//! an event that a read has cut.

use std::{
    ops::Range,
    sync::{Arc, LazyLock},
};

use memchr::memmem::{self, Finder};

use super::{
    Api, Finish, Usage,
    estimate::Calibration,
    tokens::{self, TEXT_SAMPLE_BYTES},
    usage,
};
use crate::{bounds::EVENT_BYTES_MAX, http::sse};

/// How much of an event that is too long to be kept is looked at: its end, where the usage stands.
const TAIL_BYTES: usize = 64 * 1024;

/// A carry buffer that grew over this is given back when its event is done.
const CARRY_KEPT_BYTES: usize = 16 * 1024;

/// Events whose text is counted one by one; of later ones every [`SAMPLED`]th stands for its neighbours. The count is
/// needed only where no usage is told.
const COUNTED: u64 = 64;
const SAMPLED: u64 = 8;

/// How nearly all chunks end: the last reason in them is null, and there is nothing to be searched for.
const UNFINISHED: [&[u8]; 3] = [
    b"\"finish_reason\":null}]}",
    b"\"finish_reason\":null}],\"usage\":null}",
    b"\"finish_reason\": null}]}",
];

/// What is known of one stream.
pub struct Meter {
    api: Api,
    /// Take the usage event out. Then an event is passed on when it is whole, otherwise at once.
    hide_usage: bool,
    framer: sse::Framer,
    /// The part of an event that came before this read.
    carry: Vec<u8>,
    /// Whole events that were carried, to be sent before what is forwarded of the read itself.
    ready: Vec<u8>,
    /// The event is longer than [`EVENT_BYTES_MAX`]; `carry` holds its latest part only.
    is_long: bool,
    /// The event before this one was hidden.
    was_hidden: bool,
    /// Joins the data of an event with several `data:` lines.
    joined: Vec<u8>,
    /// The bound of a stream that has one; boxed, as most have none.
    bound: Option<Box<Bound>>,
    /// A sample of the answer's text, for who counts its tokens; `None` unless [`Meter::keep_text`] was called. Boxed, as
    /// the bound is.
    text: Option<Box<Text>>,
    pub seen: Seen,
}

/// See [`Meter::text`].
#[derive(Default)]
struct Text(Vec<u8>);

/// How far a stream may go.
struct Bound {
    /// Output tokens that may be delivered.
    allowed: u64,
    /// Count events with text only, of which each is a token at least: where the upstream itself keeps to the client's
    /// limit, an estimate that is too high must not end the answer.
    surely: bool,
    /// What makes tokens of text.
    calibration: Arc<Calibration>,
    /// The stream has come to its end; what follows is not passed on.
    exhausted: bool,
    /// Of the first event's data what an end in the stream's own name needs.
    opening: Vec<u8>,
}

/// What is kept of the first event: a chunk's fields in front of its choices, where its model is among them (of all servers
/// known the last of those that tell who speaks); otherwise all of it.
fn opening_of(api: Api, data: &[u8]) -> Vec<u8> {
    static MODEL: LazyLock<Finder<'static>> = LazyLock::new(|| Finder::new(b"\"model\""));
    let names = || {
        let before = data[..memchr::memchr(b'[', data)?].trim_ascii_end();
        let before = before.strip_suffix(b":")?.trim_ascii_end();
        let fields = before.strip_suffix(b"\"choices\"")?.trim_ascii_end();
        let fields = fields.strip_suffix(b",")?;
        // All of them the event's own: none is an object.
        let is_flat = fields.first() == Some(&b'{') && memchr::memchr(b'{', &fields[1..]).is_none();
        (is_flat && MODEL.find(fields).is_some()).then_some(fields)
    };
    match names().filter(|_| api != Api::Responses) {
        Some(fields) => {
            let mut opening = Vec::with_capacity(fields.len() + 1);
            opening.extend_from_slice(fields);
            opening.push(b'}');
            opening
        }
        None => data.to_vec(),
    }
}

/// Longest first event that is kept, bytes; `response.created` repeats instructions and tools.
const OPENING_BYTES_MAX: usize = 16 * 1024;

/// Asked when a stream has delivered more tokens than it may: how many it may deliver then, or nothing.
pub type Extend<'a> = &'a mut dyn FnMut(u64) -> Option<u64>;

/// What a stream has told so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Seen {
    /// The last usage told.
    pub usage: Option<Usage>,
    /// Events of the answer itself: chunks, deltas. Comments, ends and errors are none.
    pub events: u64,
    /// Bytes of those events.
    pub event_bytes: u64,
    /// Why the answer ended.
    pub finish: Finish,
    /// The stream's proper last event came.
    pub done: bool,
    /// An error came as an event.
    pub failed: bool,
    /// What was looked at for its text.
    sample: Sample,
}

/// The text of some of a stream's events.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Sample {
    events: u64,
    event_bytes: u64,
    /// Events that carry text: one token each with most servers, more with some.
    texts: u64,
    /// Bytes of that text, as JSON has it.
    text_bytes: u64,
}

impl Seen {
    /// Events that carry text: exact for the first [`COUNTED`], then by a sample.
    pub fn texts(&self) -> u64 {
        scaled(self.sample.texts, self.events, self.sample.events)
    }

    /// Bytes of generated text, as JSON has it; by the same sample.
    pub fn text_bytes(&self) -> u64 {
        scaled(self.sample.text_bytes, self.event_bytes, self.sample.event_bytes)
    }

    /// Output tokens delivered, for a stream that never told its usage: one for each event with text, or what the
    /// text makes by its length, whichever is more.
    pub fn tokens_estimated(&self, calibration: &Calibration) -> u64 {
        self.texts().max(calibration.output_tokens(self.text_bytes()))
    }

    /// What the stream has told of its usage, or else an estimate, with so many input tokens; and whether it is one.
    /// `counted` counts the output's tokens, where that can be done; otherwise the calibration tells.
    ///
    /// Some servers tell a usage with the first chunk, or with all. Where the stream broke off behind one that is less
    /// than what was delivered, that is estimated all the same.
    pub fn used(
        &self,
        prompt: u64,
        calibration: &Calibration,
        counted: impl FnOnce() -> Option<u64>,
    ) -> (Usage, bool) {
        let has_ended = self.done || self.finish != Finish::Unknown;
        match self.usage {
            Some(usage) if has_ended || usage.completion >= self.texts() => (usage, false),
            told => {
                let told = told.unwrap_or(Usage {
                    prompt,
                    ..Usage::default()
                });
                let delivered = counted().map_or_else(
                    || self.tokens_estimated(calibration),
                    |tokens| tokens.max(self.texts()),
                );
                let completion = delivered.max(told.completion);
                (Usage { completion, ..told }, true)
            }
        }
    }
}

/// What a part of a sample stands for in the whole.
fn scaled(part: u64, whole: u64, sample: u64) -> u64 {
    let scaled = u128::from(part) * u128::from(whole) / u128::from(sample.max(1));
    u64::try_from(scaled).unwrap_or(u64::MAX)
}

impl Meter {
    /// A meter for a new stream.
    pub fn new(api: Api, hide_usage: bool) -> Meter {
        Meter {
            api,
            hide_usage,
            framer: sse::Framer::default(),
            carry: Vec::new(),
            ready: Vec::new(),
            is_long: false,
            was_hidden: false,
            joined: Vec::new(),
            bound: None,
            text: None,
            seen: Seen::default(),
        }
    }

    /// Bounds the stream to so many output tokens; `surely`: count no estimates. Then every event is counted, not a
    /// sample.
    pub fn bound(&mut self, allowed: u64, surely: bool, calibration: Arc<Calibration>) {
        self.bound = Some(Box::new(Bound {
            allowed,
            surely,
            calibration,
            exhausted: false,
            opening: Vec::new(),
        }));
    }

    /// Keeps a sample of the answer's text, at most [`TEXT_SAMPLE_BYTES`].
    pub fn keep_text(&mut self) {
        self.text = Some(Box::default());
    }

    /// The sample, as JSON has it.
    pub fn text(&self) -> &[u8] {
        self.text.as_ref().map_or(&[], |text| &text.0)
    }

    /// Whether the stream has come to its bound.
    pub fn is_exhausted(&self) -> bool {
        self.bound.as_ref().is_some_and(|bound| bound.exhausted)
    }

    /// The data of a bounded stream's first event; of a chunk that has its names in front of its choices only these.
    pub fn opening(&self) -> &[u8] {
        self.bound.as_ref().map_or(&[], |bound| &bound.opening)
    }

    /// After an event: whether the stream has gone too far and gets no more.
    fn ends_here(&mut self, extend: &mut dyn FnMut(u64) -> Option<u64>) -> bool {
        let Some(bound) = &mut self.bound else {
            return false;
        };
        let delivered = if bound.surely {
            self.seen.texts()
        } else {
            self.seen.tokens_estimated(&bound.calibration)
        };
        if delivered > bound.allowed {
            match extend(delivered) {
                Some(allowed) => bound.allowed = allowed,
                None => bound.exhausted = true,
            }
        }
        bound.exhausted
    }

    /// Reads what came. To be sent are first [`Meter::ready`], then the returned part of `payload`, from which
    /// hidden events have been cut.
    pub fn feed(&mut self, payload: &mut [u8]) -> Range<usize> {
        self.feed_within(payload, &mut |_| None)
    }

    /// As [`Meter::feed`], for a stream with a bound: where it has delivered more than it may, `extend` is asked. When
    /// that gives nothing the returned part ends behind the event that went too far ([`Meter::is_exhausted`]).
    pub fn feed_within(&mut self, payload: &mut [u8], extend: Extend<'_>) -> Range<usize> {
        self.ready.clear();
        if self.is_exhausted() {
            return 0..0;
        }
        if self.hide_usage {
            self.feed_holding(payload, extend)
        } else {
            self.feed_passing(payload, extend)
        }
    }

    /// Events that were carried over from earlier reads and are whole now.
    pub fn ready(&self) -> &[u8] {
        &self.ready
    }

    /// What was ready has been sent.
    pub fn clear_ready(&mut self) {
        self.ready.clear();
    }

    /// The stream has ended: what was held back of an event that lacks its empty line, to be sent last.
    pub fn finish(&mut self) -> Vec<u8> {
        let rest = std::mem::take(&mut self.carry);
        let shown = rest.is_empty() || self.look(&rest, true);
        if self.hide_usage && !self.is_long && shown {
            rest
        } else {
            Vec::new()
        }
    }

    /// Whether the client has been sent a part of an event whose rest has not come.
    pub fn is_mid_event(&self) -> bool {
        !self.carry.is_empty() && (!self.hide_usage || self.is_long)
    }

    fn feed_passing(&mut self, payload: &[u8], extend: Extend<'_>) -> Range<usize> {
        let (mut from, mut usage) = (0, None);
        while let Some(length) = self.framer.next_end(&payload[from..]) {
            let event = &payload[from..from + length];
            if self.carry.is_empty() {
                // One search for all events of the read.
                let usage = *usage.get_or_insert_with(|| usage::may_have_usage(&payload[from..]));
                self.look(event, usage);
            } else {
                self.look_carried(event);
                self.reset_carry();
            }
            from += length;
            if self.ends_here(extend) {
                return 0..from;
            }
        }
        self.carry_over(&payload[from..]);
        0..payload.len()
    }

    fn feed_holding(&mut self, payload: &mut [u8], extend: Extend<'_>) -> Range<usize> {
        let (mut from, mut kept, mut usage) = (0, 0..0, None);
        while let Some(length) = self.framer.next_end(&payload[from..]) {
            let mut event = from..from + length;
            from = event.end;
            if !self.carry.is_empty() {
                self.end_held(&payload[event]);
                if self.ends_here(extend) {
                    return 0..0;
                }
                continue;
            }
            let usage = *usage.get_or_insert_with(|| usage::may_have_usage(&payload[event.start..]));
            let shown = self.look(&payload[event.clone()], usage);
            let part = self.shown_part(&payload[event.clone()], shown);
            event = event.start + part.start..event.start + part.end;
            if kept.is_empty() {
                kept = event;
            } else {
                if kept.end != event.start {
                    payload.copy_within(event.clone(), kept.end);
                }
                kept.end += event.len();
            }
            if self.ends_here(extend) {
                return kept;
            }
        }
        if kept.is_empty() {
            self.hold_back(&payload[from..]);
        } else {
            // What goes through `ready` would overtake `kept`: hold this part whatever its length.
            self.carry.extend_from_slice(&payload[from..]);
        }
        kept
    }

    /// Ends an event whose beginning was held back: it goes to `ready`, unless it is hidden.
    fn end_held(&mut self, last: &[u8]) {
        let was_long = self.is_long;
        let shown = self.look_carried(last);
        if was_long {
            // Its beginning has been passed on already.
            self.ready.extend_from_slice(last);
            self.was_hidden = false;
        } else {
            let carry = std::mem::take(&mut self.carry);
            let part = self.shown_part(&carry, shown);
            self.ready.extend_from_slice(&carry[part]);
            self.carry = carry;
        }
        self.reset_carry();
    }

    /// The part of an event that the client gets. An LF at its beginning is the rest of the CRLF that ended the event
    /// before, and goes where that one went.
    fn shown_part(&mut self, event: &[u8], shown: bool) -> Range<usize> {
        let line_end = usize::from(event.first() == Some(&b'\n'));
        let start = if self.was_hidden { line_end } else { 0 };
        self.was_hidden = !shown;
        start..if shown { event.len() } else { line_end }
    }

    /// Keeps the beginning of an event until it is whole, or passes it on where it grows too long.
    fn hold_back(&mut self, part: &[u8]) {
        let was_long = self.is_long;
        let held = self.carry.len();
        if !was_long && held + part.len() > EVENT_BYTES_MAX {
            self.ready.extend_from_slice(&self.carry);
        }
        self.carry_over(part);
        if self.is_long {
            self.ready.extend_from_slice(part);
        }
    }

    fn carry_over(&mut self, part: &[u8]) {
        self.carry.extend_from_slice(part);
        if self.carry.len() > EVENT_BYTES_MAX {
            self.is_long = true;
        }
        if self.is_long && self.carry.len() > 2 * TAIL_BYTES {
            self.carry.drain(..self.carry.len() - TAIL_BYTES);
        }
    }

    fn reset_carry(&mut self) {
        self.is_long = false;
        self.carry.clear();
        if self.carry.capacity() > CARRY_KEPT_BYTES {
            self.carry = Vec::new();
        }
    }

    /// Looks at the event of which `last` is the end and `carry` the beginning. False: hide it.
    fn look_carried(&mut self, last: &[u8]) -> bool {
        self.carry.extend_from_slice(last);
        let carry = std::mem::take(&mut self.carry);
        let shown = if self.is_long {
            self.seen.usage = usage::find_in_tail(&carry).or(self.seen.usage);
            self.count(&carry);
            true
        } else {
            self.look(&carry, true)
        };
        self.carry = carry;
        shown
    }

    /// Looks at one whole event; `usage`: it may tell one. False: hide it.
    fn look(&mut self, event: &[u8], usage: bool) -> bool {
        // The LF of a CRLF may come only after its event was taken for ended.
        let event = event.trim_ascii_start();
        if let Some(bound) = &mut self.bound
            && bound.opening.is_empty()
            && event.len() <= OPENING_BYTES_MAX
            && let Some(data) = sse::data(event).payload(&mut self.joined)
        {
            bound.opening = opening_of(self.api, data);
        }
        if usage && usage::may_have_usage(event) && self.look_for_usage(event) {
            return false;
        }
        match self.api {
            Api::Responses => self.look_responses(event),
            _ => self.look_chat(event),
        }
        true
    }

    /// Takes the usage of an event; true when it tells nothing else and is to be hidden.
    fn look_for_usage(&mut self, event: &[u8]) -> bool {
        let Some(data) = sse::data(event).payload(&mut self.joined) else {
            return false;
        };
        if let Some(usage) = usage::find(self.api, data) {
            self.seen.usage = Some(usage);
        }
        self.hide_usage && usage::is_usage_only(data)
    }

    fn look_chat(&mut self, event: &[u8]) {
        const DONE_BYTES_MAX: usize = 24;
        let Some(data) = event.strip_prefix(b"data:").map(<[u8]>::trim_ascii_start) else {
            // A comment, a named event, or nothing: not a chunk, unless a server writes `event:` first.
            if memmem::find(event, b"\ndata:").is_some() {
                self.count(event);
            }
            return;
        };
        if event.len() <= DONE_BYTES_MAX && data.starts_with(b"[DONE]") {
            self.seen.done = true;
        } else if data.starts_with(b"{\"error\"") {
            self.seen.failed = true;
        } else {
            self.count(event);
            self.note_finish(event);
        }
    }

    /// Keeps the reason that a chunk tells; all but one tell null.
    fn note_finish(&mut self, event: &[u8]) {
        let told = event.trim_ascii_end();
        if UNFINISHED.iter().any(|end| told.ends_with(end)) {
            return;
        }
        let finish = finish_of(event);
        if finish != Finish::Unknown {
            self.seen.finish = finish;
        }
    }

    fn look_responses(&mut self, event: &[u8]) {
        let Some(name) = event.strip_prefix(b"event:").map(<[u8]>::trim_ascii_start) else {
            return;
        };
        let name = name
            .split(|b| matches!(b, b'\r' | b'\n'))
            .next()
            .unwrap_or_default();
        match name {
            b"response.completed" => (self.seen.done, self.seen.finish) = (true, Finish::Stop),
            b"response.incomplete" => (self.seen.done, self.seen.finish) = (true, Finish::Length),
            b"response.failed" | b"error" => {
                (self.seen.done, self.seen.failed) = (true, true);
                self.seen.finish = Finish::Error;
            }
            _ if name.ends_with(b".delta") => self.count(event),
            _ => {}
        }
    }

    /// Counts an event of the answer, and the text in it.
    fn count(&mut self, event: &[u8]) {
        let seen = &mut self.seen;
        seen.events += 1;
        seen.event_bytes += event.len() as u64;
        if self.bound.is_none() && seen.events > COUNTED && !seen.events.is_multiple_of(SAMPLED) {
            return;
        }
        let (mut bytes, text) = (0, &mut self.text);
        texts(self.api, event, &mut |part| {
            bytes += part.len();
            if let Some(Text(text)) = text.as_deref_mut()
                && text.len() < TEXT_SAMPLE_BYTES
            {
                // At once for all, so that no later event allocates.
                text.reserve_exact(TEXT_SAMPLE_BYTES - text.len());
                tokens::keep(text, part);
            }
        });
        seen.sample.events += 1;
        seen.sample.event_bytes += event.len() as u64;
        seen.sample.texts += u64::from(bytes > 0);
        seen.sample.text_bytes += bytes as u64;
    }
}

/// Why an answer of chat or completions ended: the last word behind `finish_reason`, which is null until then.
pub fn finish_of(json: &[u8]) -> Finish {
    let Some(at) = FINISH.find_iter(json).last() else {
        return Finish::Unknown;
    };
    let rest = &json[at + FINISH.needle().len()..];
    let value = rest.trim_ascii_start().strip_prefix(b":").unwrap_or_default();
    let Some(word) = value.trim_ascii_start().strip_prefix(b"\"") else {
        return Finish::Unknown;
    };
    match memchr::memchr(b'"', word) {
        Some(end) => Finish::of(&word[..end]),
        None => Finish::Unknown,
    }
}

/// Bytes of generated text in an event; see [`texts`].
pub fn text_bytes(api: Api, event: &[u8]) -> usize {
    let mut bytes = 0;
    texts(api, event, &mut |text| bytes += text.len());
    bytes
}

/// The generated text in an event, as JSON has it: what stands as a string behind the keys that carry it. `content` finds
/// `reasoning_content` too. Looked for as bytes, since in JSON the quote of a key is never escaped and that of
/// text within a string always is.
pub fn texts(api: Api, event: &[u8], take: &mut impl FnMut(&[u8])) {
    let keys: &[&Finder<'static>] = match api {
        Api::ChatCompletions => &[&CONTENT, &ARGUMENTS],
        Api::Completions => &[&TEXT],
        Api::Responses | Api::Embeddings => &[&DELTA],
    };
    for key in keys {
        for at in key.find_iter(event) {
            take(string(&event[at + key.needle().len()..]));
        }
    }
}

static FINISH: LazyLock<Finder<'static>> = LazyLock::new(|| Finder::new(b"\"finish_reason\""));
static CONTENT: LazyLock<Finder<'static>> = LazyLock::new(|| Finder::new(b"content\""));
static ARGUMENTS: LazyLock<Finder<'static>> = LazyLock::new(|| Finder::new(b"arguments\""));
static TEXT: LazyLock<Finder<'static>> = LazyLock::new(|| Finder::new(b"\"text\""));
static DELTA: LazyLock<Finder<'static>> = LazyLock::new(|| Finder::new(b"\"delta\""));

/// The JSON string that follows a key, behind its colon; empty where something else follows.
fn string(behind_key: &[u8]) -> &[u8] {
    let value = behind_key.trim_ascii_start();
    let Some(value) = value.strip_prefix(b":").map(<[u8]>::trim_ascii_start) else {
        return b"";
    };
    let Some(string) = value.strip_prefix(b"\"") else {
        return b"";
    };
    let mut at = 0;
    while let Some(found) = memchr::memchr2(b'"', b'\\', &string[at..]) {
        at += found;
        if string[at] == b'"' {
            return &string[..at];
        }
        at = (at + 2).min(string.len());
    }
    // Cut off: what is there counts.
    string
}

#[cfg(test)]
mod tests;
