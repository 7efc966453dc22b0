//! The bytes of answers: heads, OpenAI's objects and stream events, one step at a time.

mod dialects;
mod responses;
mod whole;

use std::io::Write as _;

use super::behaviour::{Behaviour, Death, Usage};
use super::limits::Permit;
use super::request::{Api, Call};
use crate::http::put_chunk;
use crate::random::{Random, seconds};
use crate::sys::monotonic_us;

use whole::error_object;
pub use whole::{put_error, put_error_object, put_json};

/// What a step of a stream came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// A token's event was appended; the next is due a pace later. Says whether it was content (else reasoning).
    Token { content: bool },
    /// The end was appended, the last chunk included.
    End,
    /// The answer ends here, broken.
    Broken(Death),
}

/// What the answers to one call have in common.
pub struct Answer {
    pub api: Api,
    pub behaviour: Behaviour,
    pub stream: bool,
    id: u64,
    created_s: u64,
    /// The model's name as a JSON string, quotes included.
    model: String,
    prompt_tokens: u64,
    /// Content tokens of the whole answer.
    tokens: u32,
    cut_by_limit: bool,
    with_usage: bool,
    opened: bool,
    /// The bracket that begins an array has been sent.
    in_array: bool,
    reasoned: u32,
    said: u32,
    /// Number of the next event of a Responses stream.
    event_number: u32,
    /// Draws the paces between tokens.
    random: Random,
    /// Header lines about the provider's limits.
    pub limit_fields: String,
    /// Its place among the calls that the provider answers at once.
    pub permit: Option<Permit>,
    /// JSON of a content event, before and behind its text.
    before: Vec<u8>,
    behind: Vec<u8>,
}

impl Answer {
    /// `id` numbers the call and `created_s` is its time as a Unix time in seconds.
    pub fn new(api: Api, call: &Call<'_>, behaviour: Behaviour, id: u64, created_s: u64) -> Self {
        let limit = call.tokens_max.unwrap_or(u32::MAX);
        let with_usage = match behaviour.usage {
            Usage::Asked => call.include_usage || !call.stream || api == Api::Responses,
            Usage::Never => false,
            Usage::Always => true,
        };
        let mut answer = Self {
            api,
            stream: call.stream && api != Api::Embeddings,
            id,
            created_s,
            model: serde_json::Value::from(&*call.model).to_string(),
            prompt_tokens: call.prompt_tokens,
            tokens: behaviour.tokens.min(limit),
            cut_by_limit: limit < behaviour.tokens,
            with_usage,
            opened: false,
            in_array: false,
            reasoned: 0,
            said: 0,
            event_number: 0,
            random: Random::new(id ^ 0xA115),
            limit_fields: String::new(),
            permit: None,
            before: Vec::new(),
            behind: Vec::new(),
            behaviour,
        };
        if answer.stream {
            answer.prepare_content();
        }
        answer
    }

    /// Appends the head of the answer.
    pub fn put_head(&self, out: &mut Vec<u8>, plain_body_bytes: usize) {
        let own_type = if self.stream && self.api != Api::GeminiArray {
            "text/event-stream; charset=utf-8"
        } else {
            "application/json"
        };
        let content_type = self.behaviour.content_type.as_deref().unwrap_or(own_type);
        let framing = match (self.behaviour.unframed, self.stream) {
            (true, _) => String::new(),
            (false, true) => "transfer-encoding: chunked\r\n".to_owned(),
            (false, false) => format!("content-length: {plain_body_bytes}\r\n"),
        };
        let close = if self.closes() {
            "connection: close\r\n"
        } else {
            ""
        };
        let cache = if self.stream {
            "cache-control: no-cache\r\n"
        } else {
            ""
        };
        put(
            out,
            format_args!(
                "HTTP/1.1 200 OK\r\ncontent-type: {content_type}\r\n{cache}x-request-id: sim-{}\r\n{}{close}{framing}\r\n",
                self.id, self.limit_fields
            ),
        );
    }

    /// Whether the connection ends with this answer, as its head says.
    pub fn closes(&self) -> bool {
        self.behaviour.close || self.behaviour.unframed
    }

    /// Appends what comes next in the stream. `event` is scratch space.
    pub fn step(&mut self, event: &mut Vec<u8>, out: &mut Vec<u8>) -> Step {
        if !self.opened && self.behaviour.error_after != Some(0) {
            self.opened = true;
            self.put_opening(event, out);
        }
        if self.reasoned < self.behaviour.reasoning_tokens {
            self.put_reasoning(event, out);
            return Step::Token { content: false };
        }
        if let Some(step) = self.fault(event, out) {
            return step;
        }
        if self.said < self.tokens {
            self.put_token(event, out);
            return Step::Token { content: true };
        }
        self.put_tail(event, out);
        self.put_end(out);
        Step::End
    }

    /// Time to the next token in nanoseconds.
    pub fn next_pace_ns(&mut self) -> u64 {
        let pace = match &self.behaviour.spreads.pace {
            Some(spread) => seconds(spread.sample(&mut self.random)),
            None => self.behaviour.pace,
        };
        pace.as_nanos() as u64
    }

    /// Whether tokens are sent as fast as the socket takes them.
    pub fn is_flood(&self) -> bool {
        self.behaviour.pace.is_zero() && self.behaviour.spreads.pace.is_none()
    }

    fn cached_tokens(&self) -> u64 {
        self.behaviour.cached_tokens.min(self.prompt_tokens)
    }

    /// The error object of this API.
    pub fn error(&self, status: u16, message: &str) -> String {
        dialects::error_of(self.api, status, message, self.behaviour.retry_after_s)
            .unwrap_or_else(|| whole::error_of_status(status, message))
    }

    /// The fault that is due before the next token, if any.
    fn fault(&mut self, event: &mut Vec<u8>, out: &mut Vec<u8>) -> Option<Step> {
        let due = |after: Option<u32>| after.is_some_and(|count| count.min(self.tokens) == self.said);
        if due(self.behaviour.error_after) {
            let message = "simulated failure inside the stream";
            let json = match dialects::error_of(self.api, 503, message, 0) {
                Some(json) => json,
                None => error_object(message, "server_error", "simulated_failure"),
            };
            self.put_event(Some("error"), &json, event, out);
            self.put_end(out);
            return Some(Step::End);
        }
        if !due(self.behaviour.after.or(Some(0))) {
            return None;
        }
        if self.behaviour.bad_chunk {
            out.extend_from_slice(b"zz\r\nnot a chunk\r\n");
            return Some(Step::Broken(Death::Close));
        }
        self.behaviour.death.map(Step::Broken)
    }

    fn finish_reason(&self) -> &'static str {
        match self.behaviour.tool_calls {
            _ if self.cut_by_limit => "length",
            0 => "stop",
            _ => "tool_calls",
        }
    }

    /// Appends token `index`: `t{index}`, dots up to the size that is wanted, and a space.
    fn put_text(&self, index: u32, out: &mut Vec<u8>) {
        let start = out.len();
        out.push(b't');
        out.extend_from_slice(itoa::Buffer::new().format(index).as_bytes());
        // What repeats the text at the end, or sends it whole, has no time to tell.
        if self.behaviour.stamp && self.stream && self.said == index && self.said < self.tokens {
            out.push(b'~');
            out.extend_from_slice(itoa::Buffer::new().format(monotonic_us()).as_bytes());
        }
        let size = match (index, self.behaviour.huge_bytes) {
            (0, huge @ 1..) => huge,
            _ => self.behaviour.token_bytes,
        };
        let dotted = (start + size.saturating_sub(1)).max(out.len());
        out.resize(dotted, b'.');
        out.push(b' ');
    }

    fn usage(&self, said: u32) -> String {
        let reasoning = u64::from(self.behaviour.reasoning_tokens);
        let completion = u64::from(said) + reasoning;
        let (prompt, cached) = (self.prompt_tokens, self.cached_tokens());
        let total = prompt + completion;
        if self.api == Api::Responses {
            return format!(
                "{{\"input_tokens\":{prompt},\"input_tokens_details\":{{\"cached_tokens\":{cached}}},\
                 \"output_tokens\":{completion},\"output_tokens_details\":{{\"reasoning_tokens\":{reasoning}}},\
                 \"total_tokens\":{total}}}"
            );
        }
        format!(
            "{{\"prompt_tokens\":{prompt},\"completion_tokens\":{completion},\"total_tokens\":{total},\
             \"prompt_tokens_details\":{{\"cached_tokens\":{cached}}},\
             \"completion_tokens_details\":{{\"reasoning_tokens\":{reasoning}}}}}"
        )
    }

    /// What stands before and behind the `choices` of a chunk.
    fn envelope(&self) -> (String, &'static str) {
        let (prefix, object) = match self.api {
            Api::Completions => ("cmpl", "text_completion"),
            _ => ("chatcmpl", "chat.completion.chunk"),
        };
        let before = format!(
            "{{\"id\":\"{prefix}-sim{}\",\"object\":\"{object}\",\"created\":{},\"model\":{},\
             \"system_fingerprint\":\"fp_sim\",\"choices\":[",
            self.id, self.created_s, self.model
        );
        (
            before,
            if self.with_usage {
                "],\"usage\":null}"
            } else {
                "]}"
            },
        )
    }

    fn prepare_content(&mut self) {
        let (open, close) = self.envelope();
        let (before, behind) = match self.api {
            Api::Completions => (
                format!("{open}{{\"index\":0,\"text\":\""),
                format!("\",\"logprobs\":null,\"finish_reason\":null}}{close}"),
            ),
            Api::Responses => (
                format!(
                    ",\"item_id\":\"msg_sim{}\",\"output_index\":0,\"content_index\":0,\"delta\":\"",
                    self.id
                ),
                "\",\"logprobs\":[]}".to_owned(),
            ),
            Api::Messages => (
                format!(
                    "{{\"type\":\"content_block_delta\",\"index\":{},\"delta\":{{\"type\":\"text_delta\",\"text\":\"",
                    self.text_block()
                ),
                "\"}}".to_owned(),
            ),
            Api::Gemini | Api::GeminiArray => self.gemini_template(),
            Api::Chat | Api::Embeddings => (
                format!("{open}{{\"index\":0,\"delta\":{{\"content\":\""),
                format!("\"}},\"logprobs\":null,\"finish_reason\":null}}{close}"),
            ),
        };
        (self.before, self.behind) = (before.into_bytes(), behind.into_bytes());
    }

    fn put_token(&mut self, event: &mut Vec<u8>, out: &mut Vec<u8>) {
        let every = self.behaviour.comment_every;
        if every > 0 && self.said.is_multiple_of(every) && self.api != Api::GeminiArray {
            event.clear();
            event.extend_from_slice(b": keep-alive");
            self.put_raw_event(event, out);
        }
        if self.api == Api::Messages && self.said == 0 {
            self.put_messages_text_start(event, out);
        }
        let name = match self.api {
            Api::Responses => Some("response.output_text.delta"),
            Api::Messages => Some("content_block_delta"),
            _ => None,
        };
        self.start_event(name, event);
        if self.api == Api::Responses {
            event.extend_from_slice(b"{\"type\":\"response.output_text.delta\",\"sequence_number\":");
            event.extend_from_slice(itoa::Buffer::new().format(self.event_number).as_bytes());
            self.event_number += 1;
        }
        event.extend_from_slice(&self.before);
        self.put_text(self.said, event);
        event.extend_from_slice(&self.behind);
        self.said += 1;
        self.put_raw_event(event, out);
    }

    fn put_reasoning(&mut self, event: &mut Vec<u8>, out: &mut Vec<u8>) {
        let index = self.reasoned;
        self.reasoned += 1;
        let (open, close) = self.envelope();
        let json = match self.api {
            Api::Responses => format!(
                "\"item_id\":\"rs_sim{}\",\"output_index\":0,\"summary_index\":0,\"delta\":\"r{index} \"}}",
                self.id
            ),
            Api::Completions => return,
            Api::Messages => {
                let json = format!(
                    "{{\"type\":\"content_block_delta\",\"index\":0,\"delta\":{{\"type\":\"thinking_delta\",\
                     \"thinking\":\"r{index} \"}}}}"
                );
                return self.put_event(Some("content_block_delta"), &json, event, out);
            }
            Api::Gemini | Api::GeminiArray => {
                let part = format!("{{\"text\":\"r{index} \",\"thought\":true}}");
                self.gemini(&part, None, 0)
            }
            Api::Chat | Api::Embeddings => format!(
                "{open}{{\"index\":0,\"delta\":{{\"reasoning_content\":\"r{index} \"}},\
                 \"logprobs\":null,\"finish_reason\":null}}{close}"
            ),
        };
        self.put_named("response.reasoning_summary_text.delta", &json, event, out);
    }

    /// The events before the first token.
    fn put_opening(&mut self, event: &mut Vec<u8>, out: &mut Vec<u8>) {
        let (open, close) = self.envelope();
        match self.api {
            Api::Completions | Api::Embeddings | Api::Gemini | Api::GeminiArray => {}
            Api::Messages => self.put_messages_opening(event, out),
            Api::Chat => {
                if self.behaviour.azure {
                    let json = "{\"id\":\"\",\"object\":\"\",\"created\":0,\"model\":\"\",\"choices\":[],\
                        \"prompt_filter_results\":[{\"prompt_index\":0,\"content_filter_results\":{}}]}";
                    self.put_event(None, json, event, out);
                }
                let json = format!(
                    "{open}{{\"index\":0,\"delta\":{{\"role\":\"assistant\",\"content\":\"\",\"refusal\":null}},\
                     \"logprobs\":null,\"finish_reason\":null}}{close}"
                );
                self.put_event(None, &json, event, out);
            }
            Api::Responses => {
                for name in ["response.created", "response.in_progress"] {
                    let json = format!("\"response\":{}}}", self.response_object(None, 0));
                    self.put_named(name, &json, event, out);
                }
                let item = self.message_item("in_progress", None);
                let json = format!("\"output_index\":0,\"item\":{item}}}");
                self.put_named("response.output_item.added", &json, event, out);
                let json = format!("{},\"part\":{}}}", self.place(), responses::output_text(""));
                self.put_named("response.content_part.added", &json, event, out);
            }
        }
    }

    /// The events behind the last token.
    fn put_tail(&mut self, event: &mut Vec<u8>, out: &mut Vec<u8>) {
        match self.api {
            Api::Responses => return self.put_responses_tail(event, out),
            Api::Messages => return self.put_messages_tail(event, out),
            Api::Gemini | Api::GeminiArray => return self.put_gemini_tail(event, out),
            Api::Chat => self.put_tool_calls(event, out),
            Api::Completions | Api::Embeddings => {}
        }
        let (open, close) = self.envelope();
        let (delta, finish) = match self.api {
            Api::Completions => ("\"text\":\"\"", self.finish_reason()),
            _ => ("\"delta\":{}", self.finish_reason()),
        };
        let json =
            format!("{open}{{\"index\":0,{delta},\"logprobs\":null,\"finish_reason\":\"{finish}\"}}{close}");
        self.put_event(None, &json, event, out);
        if self.with_usage {
            let json = format!("{open}],\"usage\":{}}}", self.usage(self.said));
            self.put_event(None, &json, event, out);
        }
        if self.behaviour.done {
            self.put_event(None, "[DONE]", event, out);
        }
    }

    fn put_event(&mut self, name: Option<&str>, json: &str, event: &mut Vec<u8>, out: &mut Vec<u8>) {
        self.start_event(name, event);
        event.extend_from_slice(json.as_bytes());
        self.put_raw_event(event, out);
    }

    /// Puts what stands before an event's data into `event`. Only some APIs name their events.
    fn start_event(&mut self, name: Option<&str>, event: &mut Vec<u8>) {
        event.clear();
        if self.api == Api::GeminiArray {
            event.push(if self.in_array { b',' } else { b'[' });
            self.in_array = true;
            return;
        }
        if let Some(name) = name.filter(|_| matches!(self.api, Api::Responses | Api::Messages)) {
            event.extend_from_slice(b"event: ");
            event.extend_from_slice(name.as_bytes());
            self.put_line_end(event);
        }
        event.extend_from_slice(b"data: ");
    }

    /// Ends the event in `event` and appends it to `out` in its framing.
    fn put_raw_event(&self, event: &mut Vec<u8>, out: &mut Vec<u8>) {
        self.put_line_end(event);
        if self.api != Api::GeminiArray {
            self.put_line_end(event);
        }
        self.put_framed(event, out);
    }

    fn put_framed(&self, bytes: &[u8], out: &mut Vec<u8>) {
        if self.behaviour.unframed {
            out.extend_from_slice(bytes);
        } else {
            put_chunk(out, bytes);
        }
    }

    /// Appends the end of the body.
    fn put_end(&self, out: &mut Vec<u8>) {
        if self.in_array {
            self.put_framed(b"]", out);
        }
        self.put_last_chunk(out);
    }

    fn put_line_end(&self, event: &mut Vec<u8>) {
        event.extend_from_slice(if self.behaviour.crlf { b"\r\n" } else { b"\n" });
    }

    fn put_last_chunk(&self, out: &mut Vec<u8>) {
        if !self.behaviour.unframed {
            out.extend_from_slice(b"0\r\n\r\n");
        }
    }
}

fn put(out: &mut Vec<u8>, text: std::fmt::Arguments<'_>) {
    // Writing to a vector cannot fail.
    let _ = out.write_fmt(text);
}

#[cfg(test)]
mod tests;
