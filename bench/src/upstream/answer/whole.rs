//! Answers that are written in one go: plain ones, errors and the simulator's own.

use std::borrow::Cow;

use super::super::behaviour::Usage;
use super::super::request::Api;
use super::{Answer, put};

impl Answer {
    /// The body of a plain answer.
    pub fn plain_body(&self) -> Vec<u8> {
        let mut text = Vec::new();
        (0..self.tokens).for_each(|index| self.put_text(index, &mut text));
        let text = String::from_utf8_lossy(&text);
        let usage = if self.with_usage {
            format!(",\"usage\":{}", self.usage(self.tokens))
        } else {
            String::new()
        };
        let (id, created, model) = (self.id, self.created_s, &self.model);
        let finish = self.finish_reason();
        let calls = self.plain_tool_calls();
        let body = match self.api {
            Api::Chat => format!(
                "{{\"id\":\"chatcmpl-sim{id}\",\"object\":\"chat.completion\",\"created\":{created},\"model\":{model},\
                 \"choices\":[{{\"index\":0,\"message\":{{\"role\":\"assistant\",\"content\":\"{text}\",\
                 \"refusal\":null{calls}}},\"logprobs\":null,\"finish_reason\":\"{finish}\"}}]{usage},\
                 \"system_fingerprint\":\"fp_sim\"}}"
            ),
            Api::Completions => format!(
                "{{\"id\":\"cmpl-sim{id}\",\"object\":\"text_completion\",\"created\":{created},\"model\":{model},\
                 \"choices\":[{{\"text\":\"{text}\",\"index\":0,\"logprobs\":null,\
                 \"finish_reason\":\"{finish}\"}}]{usage}}}"
            ),
            Api::Embeddings => self.embedding(),
            Api::Responses => self.response_object(Some(&text), self.tokens),
            Api::Messages => self.messages_body(&text),
            Api::Gemini | Api::GeminiArray => self.gemini_body(&text),
        };
        body.into_bytes()
    }

    fn embedding(&self) -> String {
        let numbers: Vec<String> = (0..self.behaviour.dimensions)
            .map(|index| format!("{:.4}", f64::from(index % 97) / 97.0 - 0.5))
            .collect();
        let usage = match self.behaviour.usage {
            Usage::Never => String::new(),
            _ => format!(
                ",\"usage\":{{\"prompt_tokens\":{0},\"total_tokens\":{0}}}",
                self.prompt_tokens
            ),
        };
        format!(
            "{{\"object\":\"list\",\"data\":[{{\"object\":\"embedding\",\"index\":0,\"embedding\":[{}]}}],\
             \"model\":{}{usage}}}",
            numbers.join(","),
            self.model
        )
    }
}

/// OpenAI's error object. The arguments are JSON-escaped here.
pub(super) fn error_object(message: &str, kind: &str, code: &str) -> String {
    let message = serde_json::Value::from(message);
    format!("{{\"error\":{{\"message\":{message},\"type\":\"{kind}\",\"param\":null,\"code\":\"{code}\"}}}}")
}

/// OpenAI's error object of a status.
pub(super) fn error_of_status(status: u16, message: &str) -> String {
    let (kind, code) = match status {
        400..=499 if status != 429 => ("invalid_request_error", "simulated_error"),
        429 => ("rate_limit_error", "rate_limit_exceeded"),
        _ => ("server_error", "simulated_error"),
    };
    error_object(message, kind, code)
}

/// Appends a whole answer with OpenAI's error object.
pub fn put_error(out: &mut Vec<u8>, status: u16, message: &str, retry_after_s: u32, close: bool) {
    put_error_object(
        out,
        status,
        &error_of_status(status, message),
        "",
        retry_after_s,
        close,
    );
}

/// Appends a whole answer with an error object; `fields` are further header lines, each with its line end.
pub fn put_error_object(
    out: &mut Vec<u8>,
    status: u16,
    object: &str,
    fields: &str,
    retry_after_s: u32,
    close: bool,
) {
    let retry: Cow<'_, str> = match status {
        429 | 503 | 529 => format!("retry-after: {retry_after_s}\r\n{fields}").into(),
        _ => fields.into(),
    };
    put_json(out, status, &retry, object, close);
}

/// Appends a whole answer with a JSON body; `fields` are further header lines, each with its line end.
pub fn put_json(out: &mut Vec<u8>, status: u16, fields: &str, body: &str, close: bool) {
    let close = if close { "connection: close\r\n" } else { "" };
    put(
        out,
        format_args!(
            "HTTP/1.1 {status} {}\r\ncontent-type: application/json\r\n{fields}{close}content-length: {}\r\n\r\n{body}",
            reason(status),
            body.len()
        ),
    );
}

fn reason(status: u16) -> &'static str {
    match status {
        200 => "OK",
        400 => "Bad Request",
        401 => "Unauthorized",
        404 => "Not Found",
        429 => "Too Many Requests",
        500 => "Internal Server Error",
        502 => "Bad Gateway",
        503 => "Service Unavailable",
        529 => "Overloaded",
        _ => "Simulated",
    }
}
