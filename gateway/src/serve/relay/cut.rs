//! The end of a stream that a limit has ended: what the client gets instead of the rest, in the stream's own dialect.

use serde_json::{Map, Value, json};

use crate::{
    dialect::{Api, Usage},
    quota::reservation::Exhausted,
};

/// Choices of a stream that are ended one by one; more cannot be asked for (OpenAI: 128).
pub const CHOICES_MAX: u64 = 128;

/// A stream as far as its end must speak in its name.
pub struct Cut<'a> {
    pub api: Api,
    pub exhausted: &'a Exhausted,
    /// Data of the stream's first event, and the bytes that are sent before the end.
    pub opening: &'a [u8],
    pub sent: &'a [u8],
    /// What was delivered.
    pub usage: Usage,
    /// The client asked for the usage event.
    pub tell_usage: bool,
    pub choices: u64,
    /// For a stream that did not say: the request's id and the virtual model.
    pub id: &'a str,
    pub model: &'a str,
    pub unix_s: u64,
}

impl Cut<'_> {
    /// The events that end the stream as though the model had come to its output limit.
    pub fn finish(&self) -> Vec<u8> {
        match self.api {
            Api::Responses => self.finish_responses(),
            _ => self.finish_chat(),
        }
    }

    /// For programs: why the answer ends here.
    fn reason(&self) -> Value {
        json!({ "cut": "limit", "policy": self.exhausted.name })
    }

    /// A field of the stream's events: of the last one sent, or else of the first.
    fn told(&self, field: &str) -> Option<Value> {
        let is_told = |value: &Value| !matches!(value.as_str(), Some("")) && !value.is_null();
        [last_data(self.sent), Some(self.opening)]
            .into_iter()
            .flatten()
            .filter_map(|data| serde_json::from_slice::<Map<String, Value>>(data).ok())
            .find_map(|mut event| event.remove(field).filter(is_told))
    }

    fn finish_chat(&self) -> Vec<u8> {
        let (object, kind) = match self.api {
            Api::Completions => ("text_completion", "cmpl"),
            _ => ("chat.completion.chunk", "chatcmpl"),
        };
        let id = self
            .told("id")
            .unwrap_or_else(|| format!("{kind}-{}", self.id).into());
        let created = self.told("created").unwrap_or_else(|| self.unix_s.into());
        let model = self.told("model").unwrap_or_else(|| self.model.into());
        let chunk = |choices: Vec<Value>| json!({ "id": id, "object": object, "created": created, "model": model, "choices": choices });
        let choice = |index: u64| match self.api {
            Api::Completions => {
                json!({ "index": index, "text": "", "logprobs": null, "finish_reason": "length" })
            }
            _ => json!({ "index": index, "delta": {}, "logprobs": null, "finish_reason": "length" }),
        };
        let mut last = chunk((0..self.choices.clamp(1, CHOICES_MAX)).map(choice).collect());
        last["gateway"] = self.reason();
        let mut out = Vec::with_capacity(1024);
        put_data(&mut out, &last);
        if self.tell_usage {
            let mut usage = chunk(Vec::new());
            usage["usage"] = json!({
                "prompt_tokens": self.usage.prompt,
                "completion_tokens": self.usage.completion,
                "total_tokens": self.usage.total(),
            });
            put_data(&mut out, &usage);
        }
        out.extend_from_slice(b"data: [DONE]\n\n");
        out
    }

    /// platform.openai.com/docs/api-reference/responses-streaming/response/incomplete
    fn finish_responses(&self) -> Vec<u8> {
        let opening: Option<Map<String, Value>> = serde_json::from_slice(self.opening).ok();
        let begun = opening.and_then(|mut event| event.remove("response"));
        let mut response = begun.filter(Value::is_object).unwrap_or_else(|| {
            json!({
                "id": format!("resp_{}", self.id), "object": "response", "created_at": self.unix_s,
                "model": self.model, "output": [], "parallel_tool_calls": true, "tool_choice": "auto", "tools": [],
            })
        });
        response["status"] = "incomplete".into();
        response["incomplete_details"] = json!({ "reason": "max_output_tokens" });
        response["usage"] = json!({
            "input_tokens": self.usage.prompt,
            "input_tokens_details": { "cached_tokens": 0 },
            "output_tokens": self.usage.completion,
            "output_tokens_details": { "reasoning_tokens": 0 },
            "total_tokens": self.usage.total(),
        });
        response["gateway"] = self.reason();
        let number = self.told("sequence_number").and_then(|number| number.as_u64());
        let event = json!({
            "type": "response.incomplete",
            "sequence_number": number.unwrap_or(0) + 1,
            "response": response,
            "gateway": self.reason(),
        });
        let mut out = b"event: response.incomplete\n".to_vec();
        put_data(&mut out, &event);
        out
    }
}

fn put_data(out: &mut Vec<u8>, event: &Value) {
    out.extend_from_slice(b"data: ");
    out.extend_from_slice(event.to_string().as_bytes());
    out.extend_from_slice(b"\n\n");
}

/// The data of the last event in some bytes of a stream that end with a whole one.
fn last_data(sent: &[u8]) -> Option<&[u8]> {
    const DATA: &[u8] = b"data:";
    let at = memchr::memmem::rfind(sent, DATA)?;
    let is_line = at == 0 || matches!(sent[at - 1], b'\n' | b'\r');
    is_line.then(|| sent[at + DATA.len()..].trim_ascii())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cut<'a>(api: Api, exhausted: &'a Exhausted, opening: &'a [u8], sent: &'a [u8]) -> Cut<'a> {
        Cut {
            api,
            exhausted,
            opening,
            sent,
            usage: Usage {
                prompt: 3,
                completion: 4,
                ..Usage::default()
            },
            tell_usage: true,
            choices: 2,
            id: "7",
            model: "virtual",
            unix_s: 9,
        }
    }

    fn events(bytes: &[u8]) -> Vec<Value> {
        let text = std::str::from_utf8(bytes).expect("text");
        let data = text
            .split("\n\n")
            .filter_map(|event| event.split("data: ").nth(1));
        data.filter(|data| *data != "[DONE]")
            .map(|data| serde_json::from_str(data).expect("json"))
            .collect()
    }

    #[test]
    fn ends_in_the_name_of_the_stream() {
        let exhausted = Exhausted {
            name: "tight".into(),
            on_exhausted: Default::default(),
        };
        let sent = b"data: {\"id\":\"c1\",\"created\":5,\"model\":\"\",\"choices\":[]}\n\n";
        let opening = br#"{"id":"","model":"up","created":1}"#;
        let bytes = cut(Api::ChatCompletions, &exhausted, opening, sent).finish();
        assert!(bytes.ends_with(b"data: [DONE]\n\n"));
        let told = events(&bytes);
        assert_eq!(
            (&told[0]["id"], &told[0]["created"], &told[0]["model"]),
            (&json!("c1"), &json!(5), &json!("up"))
        );
        assert_eq!(told[0]["choices"][1]["finish_reason"], "length");
        assert_eq!(told[0]["gateway"], json!({ "cut": "limit", "policy": "tight" }));
        assert_eq!(
            (&told[1]["choices"], &told[1]["usage"]["total_tokens"]),
            (&json!([]), &json!(7))
        );
        let bare = events(&cut(Api::Completions, &exhausted, b"", b"\xff").finish());
        assert_eq!(
            (&bare[0]["id"], &bare[0]["model"]),
            (&json!("cmpl-7"), &json!("virtual"))
        );
        assert_eq!(bare[0]["choices"][0]["text"], "");
    }

    #[test]
    fn a_response_becomes_incomplete() {
        let exhausted = Exhausted {
            name: "tight".into(),
            on_exhausted: Default::default(),
        };
        let opening = br#"{"type":"response.created","sequence_number":0,"response":{"id":"r1","status":"in_progress","x":1}}"#;
        let sent = b"event: response.output_text.delta\ndata: {\"sequence_number\":41,\"delta\":\"a\"}\n\n";
        let bytes = cut(Api::Responses, &exhausted, opening, sent).finish();
        assert!(bytes.starts_with(b"event: response.incomplete\ndata: "));
        let event = &events(&bytes)[0];
        assert_eq!(
            (&event["type"], &event["sequence_number"]),
            (&json!("response.incomplete"), &json!(42))
        );
        let response = &event["response"];
        assert_eq!(
            (&response["id"], &response["x"], &response["status"]),
            (&json!("r1"), &json!(1), &json!("incomplete"))
        );
        assert_eq!(response["incomplete_details"]["reason"], "max_output_tokens");
        assert_eq!(response["usage"]["output_tokens"], 4);
    }
}
