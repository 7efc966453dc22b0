//! Anthropic's and Google's answers: https://docs.anthropic.com/en/api/messages-streaming and
//! https://ai.google.dev/api/generate-content.

use super::super::behaviour::Usage;
use super::super::request::Api;
use super::Answer;

impl Answer {
    /// Index of the text's block: thinking comes before it.
    pub(super) fn text_block(&self) -> u32 {
        u32::from(self.behaviour.reasoning_tokens > 0)
    }

    fn messages_stop(&self) -> &'static str {
        match self.finish_reason() {
            "length" => "max_tokens",
            "tool_calls" => "tool_use",
            _ => "end_turn",
        }
    }

    /// Prompt tokens of which none came from the cache are the input; the cached ones are told apart.
    fn messages_input(&self) -> String {
        let cached = self.cached_tokens();
        format!(
            "\"input_tokens\":{},\"cache_creation_input_tokens\":0,\"cache_read_input_tokens\":{cached}",
            self.prompt_tokens - cached
        )
    }

    fn messages_output(&self, said: u32) -> String {
        let thinking = self.behaviour.reasoning_tokens;
        format!(
            "\"output_tokens\":{},\"output_tokens_details\":{{\"thinking_tokens\":{thinking}}}",
            u64::from(said) + u64::from(thinking)
        )
    }

    pub(super) fn put_messages_opening(&mut self, event: &mut Vec<u8>, out: &mut Vec<u8>) {
        let json = format!(
            "{{\"type\":\"message_start\",\"message\":{{\"id\":\"msg_sim{}\",\"type\":\"message\",\"role\":\"assistant\",\
             \"model\":{},\"content\":[],\"stop_reason\":null,\"stop_sequence\":null,\"usage\":{{{},\"output_tokens\":1}}}}}}",
            self.id,
            self.model,
            self.messages_input()
        );
        self.put_event(Some("message_start"), &json, event, out);
        if self.behaviour.reasoning_tokens > 0 {
            let json = "{\"type\":\"content_block_start\",\"index\":0,\"content_block\":{\"type\":\"thinking\",\
                        \"thinking\":\"\",\"signature\":\"\"}}";
            self.put_event(Some("content_block_start"), json, event, out);
        }
        self.put_event(Some("ping"), "{\"type\":\"ping\"}", event, out);
    }

    /// The text's block begins when the first token comes.
    pub(super) fn put_messages_text_start(&mut self, event: &mut Vec<u8>, out: &mut Vec<u8>) {
        if self.behaviour.reasoning_tokens > 0 {
            let json = "{\"type\":\"content_block_delta\",\"index\":0,\"delta\":{\"type\":\"signature_delta\",\
                        \"signature\":\"c2lt\"}}";
            self.put_event(Some("content_block_delta"), json, event, out);
            self.put_event(
                Some("content_block_stop"),
                "{\"type\":\"content_block_stop\",\"index\":0}",
                event,
                out,
            );
        }
        let json = format!(
            "{{\"type\":\"content_block_start\",\"index\":{},\"content_block\":{{\"type\":\"text\",\"text\":\"\"}}}}",
            self.text_block()
        );
        self.put_event(Some("content_block_start"), &json, event, out);
    }

    pub(super) fn put_messages_tail(&mut self, event: &mut Vec<u8>, out: &mut Vec<u8>) {
        if self.said == 0 {
            self.put_messages_text_start(event, out);
        }
        let block = self.text_block();
        let stop = |index: u32| format!("{{\"type\":\"content_block_stop\",\"index\":{index}}}");
        self.put_event(Some("content_block_stop"), &stop(block), event, out);
        for call in 0..self.behaviour.tool_calls {
            let index = block + 1 + call;
            let json = format!(
                "{{\"type\":\"content_block_start\",\"index\":{index},\"content_block\":{{\"type\":\"tool_use\",\
                 \"id\":\"toolu_sim{call}\",\"name\":\"look_up_{call}\",\"input\":{{}}}}}}"
            );
            self.put_event(Some("content_block_start"), &json, event, out);
            for piece in tool_pieces(call) {
                let piece = serde_json::Value::from(piece);
                let json = format!(
                    "{{\"type\":\"content_block_delta\",\"index\":{index},\"delta\":{{\"type\":\"input_json_delta\",\
                     \"partial_json\":{piece}}}}}"
                );
                self.put_event(Some("content_block_delta"), &json, event, out);
            }
            self.put_event(Some("content_block_stop"), &stop(index), event, out);
        }
        let usage = match self.behaviour.usage {
            Usage::Never => String::new(),
            _ => format!(",\"usage\":{{{}}}", self.messages_output(self.said)),
        };
        let json = format!(
            "{{\"type\":\"message_delta\",\"delta\":{{\"stop_reason\":\"{}\",\"stop_sequence\":null}}{usage}}}",
            self.messages_stop()
        );
        self.put_event(Some("message_delta"), &json, event, out);
        if self.behaviour.done {
            self.put_event(Some("message_stop"), "{\"type\":\"message_stop\"}", event, out);
        }
    }

    pub(super) fn messages_body(&self, text: &str) -> String {
        let calls: String = (0..self.behaviour.tool_calls)
            .map(|call| {
                format!(
                    ",{{\"type\":\"tool_use\",\"id\":\"toolu_sim{call}\",\"name\":\"look_up_{call}\",\"input\":{}}}",
                    tool_pieces(call).concat()
                )
            })
            .collect();
        let usage = match self.behaviour.usage {
            Usage::Never => String::new(),
            _ => format!(
                ",\"usage\":{{{},{}}}",
                self.messages_input(),
                self.messages_output(self.tokens)
            ),
        };
        format!(
            "{{\"id\":\"msg_sim{}\",\"type\":\"message\",\"role\":\"assistant\",\"model\":{},\
             \"content\":[{{\"type\":\"text\",\"text\":\"{text}\"}}{calls}],\"stop_reason\":\"{}\",\"stop_sequence\":null{usage}}}",
            self.id,
            self.model,
            self.messages_stop()
        )
    }

    /// One of Google's answers or pieces of an answer; `finish` is the reason of the last one.
    pub(super) fn gemini(&self, parts: &str, finish: Option<&str>, said: u32) -> String {
        let finish = finish
            .map(|reason| format!(",\"finishReason\":\"{reason}\""))
            .unwrap_or_default();
        let usage = match self.behaviour.usage {
            Usage::Never => String::new(),
            _ => {
                let (prompt, thoughts) = (self.prompt_tokens, u64::from(self.reasoned));
                format!(
                    ",\"usageMetadata\":{{\"promptTokenCount\":{prompt},\"cachedContentTokenCount\":{},\
                     \"candidatesTokenCount\":{said},\"thoughtsTokenCount\":{thoughts},\"totalTokenCount\":{}}}",
                    self.cached_tokens(),
                    prompt + u64::from(said) + thoughts
                )
            }
        };
        format!(
            "{{\"candidates\":[{{\"content\":{{\"parts\":[{parts}],\"role\":\"model\"}}{finish},\"index\":0}}]{usage},\
             \"modelVersion\":{},\"responseId\":\"sim{}\"}}",
            self.model, self.id
        )
    }

    fn gemini_finish(&self) -> &'static str {
        if self.cut_by_limit { "MAX_TOKENS" } else { "STOP" }
    }

    /// What stands before and behind a token. No usage here: it is in the last piece, as some of Google's models have it.
    pub(super) fn gemini_template(&self) -> (String, String) {
        (
            "{\"candidates\":[{\"content\":{\"parts\":[{\"text\":\"".to_owned(),
            format!(
                "\"}}],\"role\":\"model\"}},\"index\":0}}],\"modelVersion\":{},\"responseId\":\"sim{}\"}}",
                self.model, self.id
            ),
        )
    }

    pub(super) fn put_gemini_tail(&mut self, event: &mut Vec<u8>, out: &mut Vec<u8>) {
        let json = self.gemini(
            &format!("{{\"text\":\"\"}}{}", self.gemini_calls()),
            Some(self.gemini_finish()),
            self.said,
        );
        self.put_event(None, &json, event, out);
    }

    fn gemini_calls(&self) -> String {
        (0..self.behaviour.tool_calls)
            .map(|call| {
                format!(
                    ",{{\"functionCall\":{{\"name\":\"look_up_{call}\",\"args\":{}}}}}",
                    tool_pieces(call).concat()
                )
            })
            .collect()
    }

    pub(super) fn gemini_body(&self, text: &str) -> String {
        let parts = format!("{{\"text\":\"{text}\"}}{}", self.gemini_calls());
        self.gemini(&parts, Some(self.gemini_finish()), self.tokens)
    }

    /// The deltas of OpenAI's tool calls, each with its event.
    pub(super) fn put_tool_calls(&mut self, event: &mut Vec<u8>, out: &mut Vec<u8>) {
        let (open, close) = self.envelope();
        for call in 0..self.behaviour.tool_calls {
            let first = format!("\"id\":\"call_sim{call}\",\"type\":\"function\",");
            let pieces = tool_pieces(call);
            for (number, piece) in std::iter::once("")
                .chain(pieces.iter().map(String::as_str))
                .enumerate()
            {
                let (head, name) = match (number, self.api) {
                    (0, _) => (first.as_str(), format!("\"name\":\"look_up_{call}\",")),
                    _ => ("", String::new()),
                };
                let piece = serde_json::Value::from(piece);
                let json = format!(
                    "{open}{{\"index\":0,\"delta\":{{\"tool_calls\":[{{\"index\":{call},{head}\"function\":{{{name}\
                     \"arguments\":{piece}}}}}]}},\"logprobs\":null,\"finish_reason\":null}}{close}"
                );
                self.put_event(None, &json, event, out);
            }
        }
    }

    /// OpenAI's tool calls in a plain answer.
    pub(super) fn plain_tool_calls(&self) -> String {
        if self.behaviour.tool_calls == 0 {
            return String::new();
        }
        let calls: Vec<String> = (0..self.behaviour.tool_calls)
            .map(|call| {
                let arguments = serde_json::Value::from(tool_pieces(call).concat());
                format!(
                    "{{\"id\":\"call_sim{call}\",\"type\":\"function\",\"function\":{{\"name\":\"look_up_{call}\",\
                     \"arguments\":{arguments}}}}}"
                )
            })
            .collect();
        format!(",\"tool_calls\":[{}]", calls.join(","))
    }
}

/// The arguments of tool call `call` as JSON, in the pieces in which they are streamed: cut inside texts and escapes.
fn tool_pieces(call: u32) -> [String; 4] {
    [
        "{\"query\":\"what is \\".to_owned(),
        format!("\"a{call}\\\" and "),
        "b\",\"limit\"".to_owned(),
        format!(":{}}}", call + 5),
    ]
}

/// The error object of an API. `message` is JSON-escaped here; `retry_s` stands in Google's 429 (google.rpc.RetryInfo).
pub(super) fn error_of(api: Api, status: u16, message: &str, retry_s: u32) -> Option<String> {
    let message = serde_json::Value::from(message);
    match api {
        Api::Messages => {
            let kind = match status {
                400 => "invalid_request_error",
                401 => "authentication_error",
                404 => "not_found_error",
                429 => "rate_limit_error",
                503 | 529 => "overloaded_error",
                _ => "api_error",
            };
            Some(format!(
                "{{\"type\":\"error\",\"error\":{{\"type\":\"{kind}\",\"message\":{message}}}}}"
            ))
        }
        Api::Gemini | Api::GeminiArray => {
            let kind = match status {
                400 => "INVALID_ARGUMENT",
                401 => "UNAUTHENTICATED",
                404 => "NOT_FOUND",
                429 => "RESOURCE_EXHAUSTED",
                503 => "UNAVAILABLE",
                _ => "INTERNAL",
            };
            let details = if status == 429 {
                format!(
                    ",\"details\":[{{\"@type\":\"type.googleapis.com/google.rpc.RetryInfo\",\"retryDelay\":\"{retry_s}s\"}}]"
                )
            } else {
                String::new()
            };
            Some(format!(
                "{{\"error\":{{\"code\":{status},\"message\":{message},\"status\":\"{kind}\"{details}}}}}"
            ))
        }
        _ => None,
    }
}
