//! Finding the usage that a provider tells in an answer or in an event of a stream.

use std::{cell::RefCell, sync::LazyLock};

use memchr::memmem::Finder;
use serde::Deserialize;

use super::{Api, Tier, Usage, json};
use crate::bounds::USAGE_TOKENS_MAX;

/// The needle. In JSON a quote inside a string is escaped, so unescaped `"usage"` is a whole string: a key, or a
/// value, which the colon tells apart.
static NEEDLE: LazyLock<Finder<'static>> = LazyLock::new(|| Finder::new(b"\"usage\""));

/// What the tier stands behind.
static TIER: LazyLock<Finder<'static>> = LazyLock::new(|| Finder::new(b"\"service_tier\""));

/// Usage objects are some hundred bytes; for a larger one no room is kept.
const PARSED_BYTES_KEPT: usize = 4096;

/// Usage as OpenAI-compatible servers write it: Chat Completions and embeddings name their tokens prompt and
/// completion, the Responses API input and output. Unknown fields are passed over.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Wire {
    prompt_tokens: Option<u64>,
    completion_tokens: Option<u64>,
    input_tokens: Option<u64>,
    output_tokens: Option<u64>,
    total_tokens: Option<u64>,
    /// DeepSeek's name for what it read from its cache (api-docs.deepseek.com/guides/kv_cache), and Moonshot's.
    prompt_cache_hit_tokens: Option<u64>,
    cached_tokens: Option<u64>,
    prompt_tokens_details: Option<InputDetails>,
    input_tokens_details: Option<InputDetails>,
    completion_tokens_details: Option<OutputDetails>,
    output_tokens_details: Option<OutputDetails>,
    /// Compatible servers in front of Anthropic's API tell cache writes as it does.
    cache_creation_input_tokens: Option<u64>,
    cache_creation: Option<CacheCreation>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct InputDetails {
    cached_tokens: Option<u64>,
    cache_write_tokens: Option<u64>,
    cache_creation_tokens: Option<u64>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct CacheCreation {
    ephemeral_5m_input_tokens: Option<u64>,
    ephemeral_1h_input_tokens: Option<u64>,
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
    find_at_end(json).or_else(|| find_by_walk(api, json))
}

/// As [`find`], where the usage stands at the top and only a few members follow it, as all known servers have it: what stands
/// before it, the answer's text, need not be walked. `None`: it is to be looked for.
///
/// A needle is at the top if what follows it is the rest of an object and then nothing: then one brace is open before
/// it.
fn find_at_end(json: &[u8]) -> Option<Usage> {
    let at = NEEDLE.find_iter(json).last()?;
    let mut found = None;
    let mut tier = None;
    for member in json::rest_of_members(&json[at..]) {
        let member = member.ok()?;
        match (member.key.as_ref(), member.kind) {
            ("usage", json::Kind::Object) => found = Some(parse(member.raw())?),
            ("service_tier", json::Kind::String) => tier = member.as_str().map(|word| Tier::of(&word)),
            _ => {}
        }
    }
    let mut usage = found?;
    match tier {
        Some(tier) => usage.tier = tier,
        // It may stand before.
        None if TIER.find(&json[..at]).is_some() => return None,
        None => {}
    }
    Some(usage)
}

fn find_by_walk(api: Api, json: &[u8]) -> Option<Usage> {
    let mut found = None;
    let mut tier = None;
    for member in json::members(json) {
        // What is malformed further on does not take back what stood before.
        let Ok(member) = member else { break };
        match (member.key.as_ref(), member.kind) {
            ("usage", json::Kind::Object) => found = parse(&json[member.value]).or(found),
            ("response", json::Kind::Object) if api == Api::Responses => {
                found = find(api, &json[member.value]).or(found);
            }
            ("service_tier", json::Kind::String) => tier = member.as_str().map(|word| Tier::of(&word)),
            _ => {}
        }
    }
    if let (Some(usage), Some(tier)) = (&mut found, tier) {
        usage.tier = tier;
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
/// that is whole, and the last tier.
pub fn find_in_tail(tail: &[u8]) -> Option<Usage> {
    let starts: Vec<usize> = NEEDLE.find_iter(tail).collect();
    let mut usage = starts.into_iter().rev().find_map(|at| {
        let rest = &tail[at + NEEDLE.needle().len()..];
        let open = rest.iter().position(|b| !b.is_ascii_whitespace() && *b != b':')?;
        let rest = &rest[open..];
        // The object ends at the first brace up to which it is valid; usage objects nest two deep.
        let ends = memchr::memchr_iter(b'}', rest).take(8);
        ends.map(|end| &rest[..=end]).find_map(parse)
    })?;
    if let Some(tier) = tier_in_tail(tail) {
        usage.tier = tier;
    }
    Some(usage)
}

fn tier_in_tail(tail: &[u8]) -> Option<Tier> {
    let mut tier = None;
    for at in TIER.find_iter(tail) {
        let rest = tail[at + TIER.needle().len()..].trim_ascii_start();
        let word = rest
            .strip_prefix(b":")
            .map(<[u8]>::trim_ascii_start)
            .and_then(|rest| rest.strip_prefix(b"\""));
        if let Some((word, end)) = word.and_then(|word| Some((word, memchr::memchr(b'"', word)?))) {
            tier = std::str::from_utf8(&word[..end]).ok().map(Tier::of).or(tier);
        }
    }
    tier
}

/// Parses one usage object.
fn parse(object: &[u8]) -> Option<Usage> {
    thread_local! {
        /// What simd-json parses in place, and its room for what it finds.
        static PARSER: RefCell<(Vec<u8>, simd_json::Buffers)> = RefCell::default();
    }
    let wire: Wire = PARSER
        .with_borrow_mut(|(copy, buffers)| {
            if object.len() > PARSED_BYTES_KEPT {
                return simd_json::serde::from_slice(&mut object.to_vec());
            }
            copy.clear();
            copy.extend_from_slice(object);
            simd_json::serde::from_slice_with_buffers(copy, buffers)
        })
        .ok()?;
    let prompt = wire.prompt_tokens.or(wire.input_tokens);
    let completion = wire.completion_tokens.or(wire.output_tokens);
    if prompt.is_none() && completion.is_none() {
        return None;
    }
    let (prompt, mut completion) = (prompt.unwrap_or(0), completion.unwrap_or(0));
    if prompt.max(completion) > USAGE_TOKENS_MAX {
        return None;
    }
    let input = wire
        .prompt_tokens_details
        .or(wire.input_tokens_details)
        .unwrap_or_default();
    let output = wire
        .completion_tokens_details
        .or(wire.output_tokens_details)
        .unwrap_or_default();
    // xAI counts reasoning beside the completion, and bills it as output; its total tells
    // (docs.x.ai, "Consumption and Rate Limits").
    let reasoning = output.reasoning_tokens.unwrap_or(0).min(USAGE_TOKENS_MAX);
    if reasoning > 0 && wire.total_tokens == Some(prompt + completion + reasoning) {
        completion += reasoning;
    }
    let cached = input
        .cached_tokens
        .or(wire.prompt_cache_hit_tokens)
        .or(wire.cached_tokens);
    let write_1h = wire
        .cache_creation
        .as_ref()
        .and_then(|c| c.ephemeral_1h_input_tokens)
        .unwrap_or(0);
    // The sum of both, where it is told, goes before the parts; what is not said to last an hour lasts five minutes.
    let writes = wire
        .cache_creation_input_tokens
        .or(input.cache_write_tokens)
        .or(input.cache_creation_tokens)
        .map(|sum| sum.saturating_sub(write_1h));
    let write_5m = writes.or(wire.cache_creation.and_then(|c| c.ephemeral_5m_input_tokens));
    let usage = Usage {
        prompt,
        cached: cached.unwrap_or(0),
        cache_write_5m: write_5m.unwrap_or(0),
        cache_write_1h: write_1h,
        completion,
        reasoning: output.reasoning_tokens.unwrap_or(0),
        ..Usage::default()
    };
    Some(usage.clamp())
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
        cache_write_5m: 0,
        cache_write_1h: 0,
        tier: Tier::Default,
        clamped: false,
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
            ..Usage::default()
        };
        assert_eq!(find(Api::Responses, event), Some(expected));
    }

    #[test]
    fn tiers_and_cache_writes_are_told_apart() {
        let told = |json: &str| find(Api::ChatCompletions, json.as_bytes()).expect("usage");
        let tier = told(r#"{"service_tier":"flex","usage":{"prompt_tokens":1},"x":1}"#).tier;
        assert_eq!(tier, Tier::Flex);
        assert_eq!(
            told(r#"{"service_tier":null,"usage":{"prompt_tokens":1}}"#).tier,
            Tier::Default
        );
        let usage = told(
            r#"{"usage":{"prompt_tokens":100,"cache_creation_input_tokens":30,
            "cache_creation":{"ephemeral_5m_input_tokens":20,"ephemeral_1h_input_tokens":10}}}"#,
        );
        assert_eq!(
            (usage.cache_write_5m, usage.cache_write_1h, usage.clamped),
            (20, 10, false)
        );
        let usage = told(
            r#"{"usage":{"prompt_tokens":100,"prompt_tokens_details":{"cached_tokens":90,"cache_write_tokens":30}}}"#,
        );
        assert_eq!(
            (usage.cached, usage.cache_write_5m, usage.clamped),
            (90, 10, true)
        );
        let event = br#"{"type":"response.completed","response":{"service_tier":"priority","usage":{"input_tokens":5}}}"#;
        assert_eq!(find(Api::Responses, event).expect("usage").tier, Tier::Priority);
    }

    #[test]
    fn reasoning_beside_the_completion_is_output() {
        let told = |json: &str| find(Api::ChatCompletions, json.as_bytes()).expect("usage");
        // As xAI tells it: 32 + 9 + 94 = 135.
        let usage = told(
            r#"{"usage":{"prompt_tokens":32,"completion_tokens":9,"total_tokens":135,
            "completion_tokens_details":{"reasoning_tokens":94}}}"#,
        );
        assert_eq!(
            (usage.completion, usage.reasoning, usage.clamped),
            (103, 94, false)
        );
        // As OpenAI does: 32 + 100 = 132.
        let usage = told(
            r#"{"usage":{"prompt_tokens":32,"completion_tokens":100,"total_tokens":132,
            "completion_tokens_details":{"reasoning_tokens":94}}}"#,
        );
        assert_eq!(
            (usage.completion, usage.reasoning, usage.clamped),
            (100, 94, false)
        );
    }

    #[test]
    fn cached_input_is_known_by_its_other_names() {
        let told = |json: &str| find(Api::ChatCompletions, json.as_bytes()).expect("usage").cached;
        for more in [
            r#""prompt_cache_hit_tokens":30,"prompt_cache_miss_tokens":70"#,
            r#""cached_tokens":30"#,
            r#""prompt_tokens_details":{"cached_tokens":30},"prompt_cache_hit_tokens":31"#,
        ] {
            assert_eq!(
                told(&format!(r#"{{"usage":{{"prompt_tokens":100,{more}}}}}"#)),
                30,
                "{more}"
            );
        }
    }

    #[test]
    fn the_end_is_enough_and_tells_the_same() {
        let usage = r#""usage":{"prompt_tokens":7,"completion_tokens":11}"#;
        let text = r#""choices":[{"message":{"content":"say \"usage\":{\"prompt_tokens\":1}}"}}]"#;
        let parts = [
            usage,
            text,
            r#""service_tier":"flex""#,
            r#""a":{"usage":{"prompt_tokens":1},"b":[1,"}"]}"#,
            r#""usage":{"odd":"x"}"#,
            r#""usage":null"#,
            r#""usage":{"prompt_tokens":2}"#,
        ];
        let mut told_at_end = 0;
        // Every sequence of up to four of them.
        for count in 1..=4_u32 {
            for choice in 0..parts.len().pow(count) {
                let pick = |place| parts[choice / parts.len().pow(place) % parts.len()];
                let json = format!("{{{}}}", (0..count).map(pick).collect::<Vec<_>>().join(","));
                let at_end = find_at_end(json.as_bytes());
                let by_walk = find_by_walk(Api::ChatCompletions, json.as_bytes());
                assert_eq!(find(Api::ChatCompletions, json.as_bytes()), by_walk, "{json}");
                if at_end.is_some() {
                    assert_eq!(at_end, by_walk, "{json}");
                    told_at_end += 1;
                }
            }
        }
        assert!(told_at_end > 500, "{told_at_end}");
        let common = format!(r#"{{"id":"x",{text},{usage},"service_tier":"default"}}"#);
        assert!(find_at_end(common.as_bytes()).is_some());
        for cut in 0..common.len() {
            assert_eq!(find_at_end(&common.as_bytes()[..cut]), None, "{cut}");
        }
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
        let usage = find(Api::ChatCompletions, odd).expect("usage");
        assert_eq!((usage.cached, usage.clamped), (2, true));
        let odd = br#"{"usage":{"completion_tokens":2,"completion_tokens_details":{"reasoning_tokens":9}}}"#;
        let usage = find(Api::ChatCompletions, odd).expect("usage");
        assert_eq!((usage.reasoning, usage.clamped), (2, true));
        let huge = br#"{"usage":{"prompt_tokens":1,"completion_tokens":18446744073709551615}}"#;
        assert_eq!(find(Api::ChatCompletions, huge), None);
    }

    #[test]
    fn the_tail_of_a_long_answer() {
        let tail = format!("…cut off\"usage\": {{\"broken\" {CHAT}");
        assert_eq!(find_in_tail(tail.as_bytes()), Some(EXPECTED));
        let tier = |tail: &str| find_in_tail(tail.as_bytes()).expect("usage").tier;
        assert_eq!(tier(&format!(r#"{tail},"service_tier": "flex"}}"#)), Tier::Flex);
        assert_eq!(
            tier(&format!(r#""service_tier":"priority",{CHAT}"#)),
            Tier::Priority
        );
        assert_eq!(
            tier(&format!(r#""x":"\"service_tier\":\"flex\"",{CHAT}"#)),
            Tier::Default
        );
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
