//! OpenAI's Responses API: https://platform.openai.com/docs/api-reference/responses-streaming.

use super::super::request::Api;
use super::Answer;

/// Bytes of text that the closing events of a Responses stream repeat.
const REPEATED_TEXT_BYTES_MAX: usize = 1024 * 1024;

impl Answer {
    /// The `response` object of the Responses API; without text it is one in progress.
    pub(super) fn response_object(&self, text: Option<&str>, said: u32) -> String {
        let (status, details) = match (text.is_some(), self.cut_by_limit) {
            (false, _) => ("in_progress", "null"),
            (true, true) => ("incomplete", "{\"reason\":\"max_output_tokens\"}"),
            (true, false) => ("completed", "null"),
        };
        let output = text
            .map(|text| self.message_item(status, Some(text)))
            .unwrap_or_default();
        let usage = if text.is_some() && self.with_usage {
            self.usage(said)
        } else {
            "null".to_owned()
        };
        format!(
            "{{\"id\":\"resp_sim{}\",\"object\":\"response\",\"created_at\":{},\"status\":\"{status}\",\"error\":null,\
             \"incomplete_details\":{details},\"model\":{},\"output\":[{output}],\"usage\":{usage}}}",
            self.id, self.created_s, self.model
        )
    }

    pub(super) fn message_item(&self, status: &str, text: Option<&str>) -> String {
        let content = text.map(output_text).unwrap_or_default();
        format!(
            "{{\"id\":\"msg_sim{}\",\"type\":\"message\",\"status\":\"{status}\",\"role\":\"assistant\",\
             \"content\":[{content}]}}",
            self.id
        )
    }

    pub(super) fn put_responses_tail(&mut self, event: &mut Vec<u8>, out: &mut Vec<u8>) {
        let mut text = Vec::new();
        for index in 0..self.said {
            self.put_text(index, &mut text);
            if text.len() > REPEATED_TEXT_BYTES_MAX {
                break;
            }
        }
        let text = String::from_utf8_lossy(&text);
        let json = format!("{},\"text\":\"{text}\",\"logprobs\":[]}}", self.place());
        self.put_named("response.output_text.done", &json, event, out);
        let json = format!("{},\"part\":{}}}", self.place(), output_text(&text));
        self.put_named("response.content_part.done", &json, event, out);
        let json = format!(
            "\"output_index\":0,\"item\":{}}}",
            self.message_item("completed", Some(&text))
        );
        self.put_named("response.output_item.done", &json, event, out);
        let name = if self.cut_by_limit {
            "response.incomplete"
        } else {
            "response.completed"
        };
        let json = format!("\"response\":{}}}", self.response_object(Some(&text), self.said));
        self.put_named(name, &json, event, out);
    }

    /// Where in a response the text stands.
    pub(super) fn place(&self) -> String {
        format!(
            "\"item_id\":\"msg_sim{}\",\"output_index\":0,\"content_index\":0",
            self.id
        )
    }

    /// Appends an event of the Responses API, which repeats its name and is numbered. Elsewhere the name is left out.
    pub(super) fn put_named(&mut self, name: &str, rest: &str, event: &mut Vec<u8>, out: &mut Vec<u8>) {
        if self.api != Api::Responses {
            return self.put_event(None, rest, event, out);
        }
        let json = format!(
            "{{\"type\":\"{name}\",\"sequence_number\":{},{rest}",
            self.event_number
        );
        self.event_number += 1;
        self.put_event(Some(name), &json, event, out);
    }
}

pub(super) fn output_text(text: &str) -> String {
    format!("{{\"type\":\"output_text\",\"annotations\":[],\"logprobs\":[],\"text\":\"{text}\"}}")
}
