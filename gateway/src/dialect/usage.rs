//! Finding the usage that a provider tells in an answer or in an event of a stream.

use std::sync::LazyLock;

use memchr::memmem::Finder;
use serde::Deserialize;

use super::{Api, Usage, json};
use crate::bounds::USAGE_TOKENS_MAX;

/// The needle. In JSON a quote inside a string is escaped, so unescaped `"usage"` is a whole string: a key, or a
/// value, which the colon tells apart.
static NEEDLE: LazyLock<Finder<'static>> = LazyLock::new(|| Finder::new(b"\"usage\""));

/// Usage as OpenAI-compatible servers write it: Chat Completions and embeddings name their tokens prompt and
/// completion, the Responses API input and output. Unknown fields are passed over.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Wire {
    prompt_tokens: Option<u64>,
    completion_tokens: Option<u64>,
    input_tokens: Option<u64>,
    output_tokens: Option<u64>,
    prompt_tokens_details: Option<InputDetails>,
    input_tokens_details: Option<InputDetails>,
    completion_tokens_details: Option<OutputDetails>,
    output_tokens_details: Option<OutputDetails>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct InputDetails {
    cached_tokens: Option<u64>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct OutputDetails {
    reasoning_tokens: Option<u64>,
}

/// Whether `json` may hold a usage object: a needle that is followed by a colon and a brace. Costs about as
/// much as reading the bytes once; `"usage":null`, which every chunk of a stream may carry, is a no.
pub fn may_have_usage(json: &[u8]) -> bool {
    NEEDLE.find_iter(json).any(|at| {
        let mut rest = json[at + NEEDLE.needle().len()..]
            .iter()
            .filter(|b| !b.is_ascii_whitespace());
        rest.next() == Some(&b':') && rest.next() == Some(&b'{')
    })
}

/// The usage that a whole answer, or the data of one event, tells: at the top, or in the Responses API's events
/// within `response`.
pub fn find(api: Api, json: &[u8]) -> Option<Usage> {
    if !may_have_usage(json) {
        return None;
    }
    let mut found = None;
    for member in json::members(json) {
        // What is malformed further on does not take back what stood before.
        let Ok(member) = member else { break };
        if member.kind != json::Kind::Object {
            continue;
        }
        match member.key.as_ref() {
            "usage" => found = parse(&json[member.value]).or(found),
            "response" if api == Api::Responses => found = find(api, &json[member.value]).or(found),
            _ => {}
        }
    }
    found
}

/// Whether the event tells nothing but the usage: Chat Completions' `"choices":[]` with a usage object, which is
/// what a stream has one more of when `include_usage` is set.
pub fn is_usage_only(json: &[u8]) -> bool {
    let mut no_choices = false;
    for member in json::members(json) {
        let Ok(member) = member else { return false };
        if member.key == "choices" {
            let inside = json[member.value].trim_ascii();
            no_choices = member.kind == json::Kind::Array
                && inside[1..inside.len() - 1].iter().all(u8::is_ascii_whitespace);
        }
    }
    no_choices
}

/// Looks for the usage in the last part of an answer that was too long to be kept: the last usage object
/// that is whole.
pub fn find_in_tail(tail: &[u8]) -> Option<Usage> {
    let starts: Vec<usize> = NEEDLE.find_iter(tail).collect();
    starts.into_iter().rev().find_map(|at| {
        let rest = &tail[at + NEEDLE.needle().len()..];
        let open = rest.iter().position(|b| !b.is_ascii_whitespace() && *b != b':')?;
        let rest = &rest[open..];
        // The object ends at the first brace up to which it is valid; usage objects nest two deep.
        let ends = memchr::memchr_iter(b'}', rest).take(8);
        ends.map(|end| &rest[..=end]).find_map(parse)
    })
}

/// Parses one usage object.
fn parse(object: &[u8]) -> Option<Usage> {
    // simd-json parses in place; a usage object is some hundred bytes, once per request.
    let mut copy = object.to_vec();
    let wire: Wire = simd_json::serde::from_slice(&mut copy).ok()?;
    let prompt = wire.prompt_tokens.or(wire.input_tokens);
    let completion = wire.completion_tokens.or(wire.output_tokens);
    if prompt.is_none() && completion.is_none() {
        return None;
    }
    let (prompt, completion) = (prompt.unwrap_or(0), completion.unwrap_or(0));
    if prompt.max(completion) > USAGE_TOKENS_MAX {
        return None;
    }
    let cached = wire
        .prompt_tokens_details
        .or(wire.input_tokens_details)
        .and_then(|d| d.cached_tokens);
    let reasoning = wire
        .completion_tokens_details
        .or(wire.output_tokens_details)
        .and_then(|d| d.reasoning_tokens);
    Some(Usage {
        prompt,
        cached: cached.unwrap_or(0).min(prompt),
        completion,
        reasoning: reasoning.unwrap_or(0).min(completion),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHAT: &str = r#"{"id":"c","choices":[],"usage":{"prompt_tokens":7,"completion_tokens":11,"total_tokens":18,
        "prompt_tokens_details":{"cached_tokens":3},"completion_tokens_details":{"reasoning_tokens":2}}}"#;
    const EXPECTED: Usage = Usage {
        prompt: 7,
        cached: 3,
        completion: 11,
        reasoning: 2,
    };

    #[test]
    fn finds_it_at_the_top_only() {
        assert_eq!(find(Api::ChatCompletions, CHAT.as_bytes()), Some(EXPECTED));
        assert_eq!(
            find(Api::ChatCompletions, br#"{"a":{"usage":{"prompt_tokens":1}}}"#),
            None
        );
        assert_eq!(
            find(Api::ChatCompletions, br#"{"a":"\"usage\":{","usage":null}"#),
            None
        );
        assert_eq!(find(Api::ChatCompletions, br#"{"usage":{}}"#), None);
        let embeddings = br#"{"data":[],"usage":{"prompt_tokens":8,"total_tokens":8}}"#;
        assert_eq!(
            find(Api::Embeddings, embeddings),
            Some(Usage {
                prompt: 8,
                ..Usage::default()
            })
        );
    }

    #[test]
    fn finds_it_in_responses() {
        let event = br#"{"type":"response.completed","response":{"tools":[{"usage":{"prompt_tokens":9}}],
            "usage":{"input_tokens":5,"input_tokens_details":{"cached_tokens":1},"output_tokens":6,
            "output_tokens_details":{"reasoning_tokens":4},"total_tokens":11}}}"#;
        let expected = Usage {
            prompt: 5,
            cached: 1,
            completion: 6,
            reasoning: 4,
        };
        assert_eq!(find(Api::Responses, event), Some(expected));
    }

    #[test]
    fn a_null_is_not_worth_parsing() {
        assert!(!may_have_usage(br#"{"choices":[{}],"usage":null}"#));
        assert!(!may_have_usage(br#"{"content":"say \"usage\": {"}"#));
        assert!(may_have_usage(br#"{"usage" : {"#));
    }

    #[test]
    fn the_invariants_hold_whatever_is_told() {
        let odd = br#"{"usage":{"prompt_tokens":2,"prompt_tokens_details":{"cached_tokens":9}}}"#;
        assert_eq!(find(Api::ChatCompletions, odd).expect("usage").cached, 2);
        let huge = br#"{"usage":{"prompt_tokens":1,"completion_tokens":18446744073709551615}}"#;
        assert_eq!(find(Api::ChatCompletions, huge), None);
    }

    #[test]
    fn the_tail_of_a_long_answer() {
        let tail = format!("…cut off\"usage\": {{\"broken\" {CHAT}");
        assert_eq!(find_in_tail(tail.as_bytes()), Some(EXPECTED));
        for cut in 0..CHAT.len() {
            find_in_tail(&CHAT.as_bytes()[..cut]);
            find(Api::ChatCompletions, &CHAT.as_bytes()[..cut]);
        }
    }

    #[test]
    fn tells_the_extra_event_from_others() {
        assert!(is_usage_only(CHAT.as_bytes()));
        assert!(is_usage_only(br#"{"choices": [ ],"usage":{}}"#));
        assert!(!is_usage_only(br#"{"choices":[{"delta":{}}],"usage":{}}"#));
        assert!(!is_usage_only(br#"{"usage":{}}"#));
    }
}
