//! What the simulator reads from a request: its target, and from its body the model, the limits and the prompt's size.

use std::borrow::Cow;

use serde::Deserialize;
use serde::de::{Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::value::RawValue;

/// The calls that the simulator answers with tokens.
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
    /// Google's, streamed as one JSON array.
    GeminiArray,
}

/// Before the name of a model whose behaviour is set.
pub const MODELS: &str = "/sim/models/";

/// Where a request goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Route {
    Call(Api),
    Models,
    Stats,
    Last,
    /// `PUT /sim/models/NAME`: the body's words say what calls of that model get.
    SetModel,
    Unknown,
}

impl Route {
    pub fn of(method: &str, target: &str) -> Self {
        let path = target.split('?').next().unwrap_or_default();
        match (method, path) {
            ("POST", "/v1/chat/completions") => Self::Call(Api::Chat),
            ("POST", "/v1/completions") => Self::Call(Api::Completions),
            ("POST", "/v1/embeddings") => Self::Call(Api::Embeddings),
            ("POST", "/v1/responses") => Self::Call(Api::Responses),
            ("POST", "/v1/messages") => Self::Call(Api::Messages),
            ("POST", path) if path.ends_with(":generateContent") => Self::Call(Api::Gemini),
            ("POST", path) if path.ends_with(":streamGenerateContent") => {
                let query = target.split_once('?').map_or("", |(_, query)| query);
                if query.split('&').any(|word| word == "alt=sse") {
                    Self::Call(Api::Gemini)
                } else {
                    Self::Call(Api::GeminiArray)
                }
            }
            ("GET", "/v1/models") => Self::Models,
            ("GET", "/sim/stats") => Self::Stats,
            ("GET", "/sim/last") => Self::Last,
            ("PUT", path) if path.starts_with(MODELS) => Self::SetModel,
            _ => Self::Unknown,
        }
    }
}

/// Google's calls say in their path what others say in their body: model and stream.
pub fn of_path(target: &str) -> Option<(String, bool)> {
    let path = target.split('?').next()?;
    let (model, verb) = path.rsplit('/').next()?.rsplit_once(':')?;
    match verb {
        "generateContent" => Some((decoded(model), false)),
        "streamGenerateContent" => Some((decoded(model), true)),
        _ => None,
    }
}

/// Takes percent-encoding off (RFC 3986, section 2.1); what is no encoding stays.
fn decoded(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut plain = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let code = bytes.get(at + 1..at + 3).filter(|_| bytes[at] == b'%');
        let code = code.and_then(|digits| std::str::from_utf8(digits).ok());
        match code.and_then(|digits| u8::from_str_radix(digits, 16).ok()) {
            Some(byte) => {
                plain.push(byte);
                at += 3;
            }
            None => {
                plain.push(bytes[at]);
                at += 1;
            }
        }
    }
    String::from_utf8_lossy(&plain).into_owned()
}

#[derive(Debug, Default, Deserialize)]
struct GenerationConfig {
    #[serde(rename = "maxOutputTokens")]
    max_output_tokens: Option<u32>,
}

/// The prompt as it stands in the body.
#[derive(Debug, Default, Deserialize)]
struct RawPrompt<'a> {
    #[serde(borrow)]
    system: Option<&'a RawValue>,
    #[serde(borrow, alias = "contents", alias = "prompt", alias = "input")]
    messages: Option<&'a RawValue>,
}

/// The bytes of the prompt for a cache of prefixes: a conversation that goes on begins with what it was.
pub fn prompt_bytes(body: &[u8]) -> Vec<u8> {
    let Ok(raw) = serde_json::from_slice::<RawPrompt<'_>>(body) else {
        return Vec::new();
    };
    [raw.system, raw.messages]
        .into_iter()
        .flatten()
        .flat_map(|value| value.get().bytes())
        .collect()
}

#[derive(Debug, Default, Deserialize)]
struct StreamOptions {
    include_usage: Option<bool>,
}

#[derive(Debug, Deserialize)]
struct Wire<'a> {
    #[serde(borrow, default)]
    model: Cow<'a, str>,
    stream: Option<bool>,
    stream_options: Option<StreamOptions>,
    max_tokens: Option<u32>,
    max_completion_tokens: Option<u32>,
    max_output_tokens: Option<u32>,
    #[serde(default)]
    messages: Text,
    #[serde(default)]
    prompt: Text,
    #[serde(default)]
    input: Text,
    #[serde(default)]
    instructions: Text,
    #[serde(default)]
    system: Text,
    #[serde(default)]
    contents: Text,
    #[serde(default, rename = "generationConfig")]
    generation_config: GenerationConfig,
}

/// What a body asks for.
#[derive(Debug, PartialEq, Eq)]
pub struct Call<'a> {
    pub model: Cow<'a, str>,
    pub stream: bool,
    pub include_usage: bool,
    pub tokens_max: Option<u32>,
    /// A quarter of the prompt's bytes, at least 1.
    pub prompt_tokens: u64,
}

/// Reads a body; the error is what `serde_json` says of it.
pub fn parse(body: &[u8]) -> Result<Call<'_>, serde_json::Error> {
    let wire: Wire<'_> = serde_json::from_slice(body)?;
    let text_bytes = wire.messages.0
        + wire.prompt.0
        + wire.input.0
        + wire.instructions.0
        + wire.system.0
        + wire.contents.0;
    Ok(Call {
        model: wire.model,
        stream: wire.stream.unwrap_or(false),
        include_usage: wire
            .stream_options
            .and_then(|options| options.include_usage)
            .unwrap_or(false),
        tokens_max: wire
            .max_completion_tokens
            .or(wire.max_output_tokens)
            .or(wire.max_tokens)
            .or(wire.generation_config.max_output_tokens),
        prompt_tokens: (text_bytes / 4).max(1),
    })
}

/// Bytes of the text in a prompt of any shape: a string, token numbers (four bytes each), parts or messages.
#[derive(Debug, Default)]
struct Text(u64);

impl<'de> Deserialize<'de> for Text {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(TextVisitor).map(Text)
    }
}

struct TextVisitor;

impl<'de> Visitor<'de> for TextVisitor {
    type Value = u64;

    fn expecting(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.write_str("text, parts or messages")
    }

    fn visit_str<E>(self, text: &str) -> Result<u64, E> {
        Ok(text.len() as u64)
    }

    fn visit_u64<E>(self, _: u64) -> Result<u64, E> {
        Ok(4)
    }

    fn visit_i64<E>(self, _: i64) -> Result<u64, E> {
        Ok(4)
    }

    fn visit_f64<E>(self, _: f64) -> Result<u64, E> {
        Ok(0)
    }

    fn visit_bool<E>(self, _: bool) -> Result<u64, E> {
        Ok(0)
    }

    fn visit_unit<E>(self) -> Result<u64, E> {
        Ok(0)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<u64, A::Error> {
        let mut bytes = 0;
        while let Some(item) = items.next_element::<Text>()? {
            bytes += item.0;
        }
        Ok(bytes)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut fields: A) -> Result<u64, A::Error> {
        let mut bytes = 0;
        while let Some(key) = fields.next_key::<Cow<'de, str>>()? {
            if matches!(&*key, "content" | "text" | "parts") {
                bytes += fields.next_value::<Text>()?.0;
            } else {
                fields.next_value::<IgnoredAny>()?;
            }
        }
        Ok(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chat_body_is_read() {
        let body = br#"{"model":"sim:tokens=3","messages":[{"role":"user","content":"12345678"},
            {"role":"user","content":[{"type":"text","text":"1234"},{"type":"image_url","image_url":{"url":"x"}}]}],
            "stream":true,"stream_options":{"include_usage":true},"max_tokens":9,"max_completion_tokens":7,"x":[1]}"#;
        let call = parse(body).unwrap();
        let expected = Call {
            model: "sim:tokens=3".into(),
            stream: true,
            include_usage: true,
            tokens_max: Some(7),
            prompt_tokens: 3,
        };
        assert_eq!(call, expected);
    }

    #[test]
    fn other_prompts_are_counted_too() {
        assert_eq!(
            parse(br#"{"model":"m","prompt":"12345678"}"#)
                .unwrap()
                .prompt_tokens,
            2
        );
        assert_eq!(
            parse(br#"{"model":"m","input":["1234","5678"]}"#)
                .unwrap()
                .prompt_tokens,
            2
        );
        assert_eq!(
            parse(br#"{"model":"m","input":[11,12,13]}"#)
                .unwrap()
                .prompt_tokens,
            3
        );
        assert_eq!(
            parse(br#"{"model":"a\"b","stream":null,"messages":null}"#)
                .unwrap()
                .prompt_tokens,
            1
        );
        assert!(parse(b"{").is_err());
        assert!(parse(b"[1]").is_err());
    }

    #[test]
    fn googles_calls_are_read() {
        let target = "/v1beta/models/sim%3Atokens=3:streamGenerateContent?alt=sse";
        assert_eq!(Route::of("POST", target), Route::Call(Api::Gemini));
        assert_eq!(
            Route::of("POST", target.split('?').next().unwrap()),
            Route::Call(Api::GeminiArray)
        );
        assert_eq!(of_path(target), Some(("sim:tokens=3".to_owned(), true)));
        assert_eq!(
            of_path("/v1/models/a%zz:generateContent"),
            Some(("a%zz".to_owned(), false))
        );
        assert_eq!(of_path("/v1/messages"), None);
        let body =
            br#"{"contents":[{"parts":[{"text":"12345678"}]}],"generationConfig":{"maxOutputTokens":4}}"#;
        let call = parse(body).unwrap();
        assert_eq!((call.prompt_tokens, call.tokens_max), (2, Some(4)));
        assert!(prompt_bytes(body).starts_with(b"[{\"parts\""));
    }

    #[test]
    fn routes_ignore_the_query() {
        assert_eq!(
            Route::of("POST", "/v1/chat/completions?a=b"),
            Route::Call(Api::Chat)
        );
        assert_eq!(Route::of("GET", "/v1/chat/completions"), Route::Unknown);
        assert_eq!(Route::of("GET", "/v1/models"), Route::Models);
    }
}
