//! The events that are parsed: all but the common one, and plain answers.

use serde_json::Value;

use super::{Api, Checker, Flaw, TOOL_CALLS_MAX};

impl Checker {
    pub(super) fn other_event(&mut self, data: &[u8]) {
        if data == b"[DONE]" {
            self.done = true;
            return;
        }
        let Ok(event) = serde_json::from_slice::<Value>(data) else {
            self.mismatch = true;
            return;
        };
        self.failed |= event.get("error").is_some_and(|error| !error.is_null());
        if self.api.names_events() && self.name != event["type"].as_str().unwrap_or_default().as_bytes() {
            self.border = true;
        }
        match self.api {
            Api::Responses => self.responses_event(&event),
            Api::Messages => self.messages_event(&event),
            Api::Gemini | Api::GeminiArray => self.gemini_event(&event),
            Api::Chat | Api::Completions | Api::Embeddings => self.chunk(&event),
        }
    }

    fn chunk(&mut self, event: &Value) {
        if let Some(choice) = event["choices"].get(0) {
            let text = if self.api == Api::Completions {
                &choice["text"]
            } else {
                &choice["delta"]["content"]
            };
            self.text(bytes(text));
            for call in choice["delta"]["tool_calls"].as_array().into_iter().flatten() {
                let index = call["index"].as_u64().unwrap_or(0);
                self.arguments(index, &call["function"]["arguments"]);
            }
            self.finished |= choice["finish_reason"].is_string();
        }
        self.usage(&event["usage"], "completion_tokens", "completion_tokens_details");
    }

    fn responses_event(&mut self, event: &Value) {
        match event["type"].as_str().unwrap_or_default() {
            "response.output_text.delta" => self.text(bytes(&event["delta"])),
            "response.function_call_arguments.delta" => {
                self.arguments(event["output_index"].as_u64().unwrap_or(0), &event["delta"]);
            }
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
            _ => {}
        }
    }

    fn messages_event(&mut self, event: &Value) {
        match event["type"].as_str().unwrap_or_default() {
            "content_block_delta" => {
                let delta = &event["delta"];
                match delta["type"].as_str().unwrap_or_default() {
                    "text_delta" => self.text(bytes(&delta["text"])),
                    "input_json_delta" => {
                        self.arguments(event["index"].as_u64().unwrap_or(0), &delta["partial_json"]);
                    }
                    _ => {}
                }
            }
            "message_delta" => {
                self.finished |= event["delta"]["stop_reason"].is_string();
                self.messages_usage(&event["usage"]);
            }
            "message_stop" => self.done = true,
            "error" => self.failed = true,
            _ => {}
        }
    }

    /// Anthropic counts thinking among the output; the simulator says how much of it there was.
    fn messages_usage(&mut self, usage: &Value) {
        if let Some(tokens) = usage["output_tokens"].as_u64() {
            let thinking = usage["output_tokens_details"]["thinking_tokens"]
                .as_u64()
                .unwrap_or(0);
            self.usage_tokens = Some(tokens.saturating_sub(thinking));
        }
    }

    fn gemini_event(&mut self, event: &Value) {
        let candidate = &event["candidates"][0];
        for part in candidate["content"]["parts"].as_array().into_iter().flatten() {
            if part["thought"] != true {
                self.text(bytes(&part["text"]));
            }
        }
        if candidate["finishReason"].is_string() {
            self.finished = true;
            // Nothing else ends a stream of this API; an array has its bracket.
            self.done |= self.api == Api::Gemini;
        }
        if let Some(tokens) = event["usageMetadata"]["candidatesTokenCount"].as_u64() {
            self.usage_tokens = Some(tokens);
        }
    }

    fn usage(&mut self, usage: &Value, tokens: &str, details: &str) {
        if let Some(tokens) = usage[tokens].as_u64() {
            let reasoning = usage[details]["reasoning_tokens"].as_u64().unwrap_or(0);
            self.usage_tokens = Some(tokens.saturating_sub(reasoning));
        }
    }

    /// Goes on in the arguments of a tool call.
    fn arguments(&mut self, index: u64, piece: &Value) {
        let piece = piece.as_str().unwrap_or_default();
        let known = self.tool_calls.iter().position(|(known, _)| *known == index);
        match known {
            Some(at) => self.tool_calls[at].1.push_str(piece),
            None if self.tool_calls.len() < TOOL_CALLS_MAX => self.tool_calls.push((index, piece.to_owned())),
            None => self.mismatch = true,
        }
    }

    /// What is wrong with a plain answer that has ended, if anything.
    pub fn plain_flaw(&mut self, expected_tokens: Option<u64>) -> Option<Flaw> {
        let mut body = std::mem::take(&mut self.carry);
        let answer = serde_json::from_slice::<Value>(&body);
        body.clear();
        self.carry = body;
        let Ok(answer) = answer else {
            return Some(Flaw::Mismatch);
        };
        if answer.get("error").is_some_and(|error| !error.is_null()) {
            return Some(Flaw::ErrorEvent);
        }
        let finished = match self.api {
            Api::Embeddings => {
                let numbers = answer["data"][0]["embedding"].as_array();
                return numbers.is_none_or(Vec::is_empty).then_some(Flaw::Mismatch);
            }
            Api::Chat | Api::Completions => self.plain_choice(&answer),
            Api::Responses => {
                for item in answer["output"].as_array().into_iter().flatten() {
                    self.text(bytes(&item["content"][0]["text"]));
                }
                self.usage(&answer["usage"], "output_tokens", "output_tokens_details");
                answer["status"].is_string()
            }
            Api::Messages => {
                for block in answer["content"].as_array().into_iter().flatten() {
                    self.text(bytes(&block["text"]));
                }
                self.messages_usage(&answer["usage"]);
                answer["stop_reason"].is_string()
            }
            Api::Gemini | Api::GeminiArray => {
                self.gemini_event(&answer);
                self.finished
            }
        };
        match finished {
            _ if self.mismatch || self.miscounted(expected_tokens) => Some(Flaw::Mismatch),
            false => Some(Flaw::NoFinish),
            true => None,
        }
    }

    fn plain_choice(&mut self, answer: &Value) -> bool {
        let choice = &answer["choices"][0];
        let text = if self.api == Api::Chat {
            &choice["message"]["content"]
        } else {
            &choice["text"]
        };
        self.text(bytes(text));
        self.usage(&answer["usage"], "completion_tokens", "completion_tokens_details");
        choice["finish_reason"].is_string()
    }
}

fn bytes(text: &Value) -> &[u8] {
    text.as_str().unwrap_or_default().as_bytes()
}
