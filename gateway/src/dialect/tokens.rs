//! Tokens of a text, counted with the vocabulary of its model's family, from a sample of bounded size.
//!
//! OpenAI's vocabularies are public; which model has which is told by openai/tiktoken, `tiktoken/model.py`. A vocabulary takes
//! tens of milliseconds and tens of megabytes to load: a thread of its own does it when a configuration names a model of
//! the family, and until then nothing is counted. Counting is linear in the text, whatever stands in it, which is why
//! text from outside can be counted at all.

use std::{sync::OnceLock, thread};

use bpe_openai::Tokenizer;
use memchr::memmem;

use super::{Api, meter::texts};
use crate::config::schema;

/// What is kept of a request's body, bytes: all of most prompts.
pub const PROMPT_SAMPLE_BYTES: usize = 4096;

/// Parts of the sample of a longer body, spread over it.
const PARTS: usize = 4;

/// What is kept of an answer's text, bytes as JSON has it: some 500 tokens.
pub const TEXT_SAMPLE_BYTES: usize = 2048;

/// Tokens that frame each message, and those that begin the answer (OpenAI Cookbook, "How to count tokens with tiktoken").
const MESSAGE_TOKENS: u64 = 4;
const ANSWER_TOKENS: u64 = 3;

/// Members whose values a model is not shown, or not as text.
const UNSEEN: [&[u8]; 7] = [
    b"model",
    b"role",
    b"type",
    b"id",
    b"tool_call_id",
    b"user",
    b"detail",
];

/// Keys that belong to the API. Others stand in a tool's schema, which a model is shown.
const API_KEYS: [&[u8]; 24] = [
    b"model",
    b"messages",
    b"role",
    b"content",
    b"type",
    b"text",
    b"id",
    b"input",
    b"instructions",
    b"prompt",
    b"stream",
    b"stream_options",
    b"include_usage",
    b"max_tokens",
    b"max_completion_tokens",
    b"max_output_tokens",
    b"temperature",
    b"top_p",
    b"user",
    b"tools",
    b"function",
    b"tool_calls",
    b"tool_call_id",
    b"n",
];

/// A family's vocabulary.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Vocabulary {
    O200k,
    Cl100k,
}

static O200K: OnceLock<&'static Tokenizer> = OnceLock::new();
static CL100K: OnceLock<&'static Tokenizer> = OnceLock::new();

impl Vocabulary {
    /// What a target's model is counted with: as configured, else by its name.
    pub fn of(configured: Option<schema::Tokenizer>, model: &str) -> Option<Vocabulary> {
        match configured {
            Some(schema::Tokenizer::O200kBase) => Some(Vocabulary::O200k),
            Some(schema::Tokenizer::Cl100kBase) => Some(Vocabulary::Cl100k),
            Some(schema::Tokenizer::None) => None,
            None => Vocabulary::of_model(model),
        }
    }

    /// The vocabulary of an OpenAI model, whatever stands before its name (`openai/gpt-5`, `ft:gpt-4o:…`).
    fn of_model(model: &str) -> Option<Vocabulary> {
        const O200K: [&str; 6] = ["gpt-4o", "gpt-4.1", "gpt-4.5", "gpt-5", "chatgpt-4o", "gpt-oss"];
        const REASONING: [&str; 3] = ["o1", "o3", "o4"];
        const CL100K: [&str; 5] = [
            "gpt-4",
            "gpt-3.5",
            "gpt-35",
            "text-embedding-3",
            "text-embedding-ada-002",
        ];
        let name = model.rsplit('/').next().unwrap_or(model);
        let name = name.strip_prefix("ft:").unwrap_or(name);
        let is = |prefix: &&str| {
            let rest = name.strip_prefix(*prefix);
            rest.is_some_and(|rest| !rest.starts_with(|c: char| c.is_ascii_alphanumeric()))
        };
        if O200K.iter().any(|prefix| name.starts_with(prefix)) || REASONING.iter().any(&is) {
            return Some(Vocabulary::O200k);
        }
        CL100K.iter().any(is).then_some(Vocabulary::Cl100k)
    }

    /// Loads the vocabulary in a thread of its own, unless somebody has.
    pub fn load(self) {
        if self.tokenizer().is_some() {
            return;
        }
        let load = move || {
            let _ = match self {
                Vocabulary::O200k => O200K.set(bpe_openai::o200k_base()),
                Vocabulary::Cl100k => CL100K.set(bpe_openai::cl100k_base()),
            };
        };
        if let Err(error) = thread::Builder::new().name("vocabulary".into()).spawn(load) {
            tracing::warn!(%error, "no thread for a vocabulary: tokens are estimated by bytes");
        }
    }

    /// The tokenizer, where it is loaded.
    pub fn tokenizer(self) -> Option<&'static Tokenizer> {
        match self {
            Vocabulary::O200k => O200K.get().copied(),
            Vocabulary::Cl100k => CL100K.get().copied(),
        }
    }
}

/// What is kept of a request to count its tokens when that turns out to be needed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prompt {
    sample: Box<[u8]>,
    body_bytes: usize,
}

impl Prompt {
    /// A sample of a body. `None` where its length says little of its tokens: pictures and sound stand in it.
    pub fn of(body: &[u8]) -> Option<Prompt> {
        let sample = if body.len() <= PROMPT_SAMPLE_BYTES {
            body.into()
        } else {
            let part = PROMPT_SAMPLE_BYTES / PARTS;
            let step = (body.len() - part) / (PARTS - 1);
            (0..PARTS)
                .flat_map(|n| &body[n * step..n * step + part])
                .copied()
                .collect()
        };
        let has_data =
            memmem::find(body, b";base64,").is_some() || memmem::find(body, b"\"input_audio\"").is_some();
        (!has_data).then_some(Prompt {
            sample,
            body_bytes: body.len(),
        })
    }

    /// Bytes that [`Prompt::tokens`] looks at.
    pub fn sample_bytes(&self) -> usize {
        self.sample.len()
    }

    /// The request's input tokens; 0 where it has no text (an embedding's input may be numbers).
    pub fn tokens(&self, tokenizer: &Tokenizer) -> u64 {
        if self.sample.len() == self.body_bytes {
            return document_tokens(tokenizer, &self.sample);
        }
        // The parts begin and end anywhere: all of them counts as text, and their JSON is a small part of it.
        let part = PROMPT_SAMPLE_BYTES / PARTS;
        let counted: u64 = self
            .sample
            .chunks(part)
            .map(|raw| raw_tokens(tokenizer, raw))
            .sum();
        counted * self.body_bytes as u64 / self.sample.len() as u64
    }
}

/// Tokens of a text of which a part was kept; both as JSON has them.
pub fn text_tokens(tokenizer: &Tokenizer, sample: &[u8], text_bytes: u64) -> u64 {
    if sample.is_empty() {
        return 0;
    }
    let counted = u128::from(raw_tokens(tokenizer, sample));
    let tokens = counted * u128::from(text_bytes) / sample.len() as u128;
    u64::try_from(tokens).unwrap_or(u64::MAX)
}

/// The generated text of a whole answer: its first bytes, and the length of all of it.
pub fn answer_text(api: Api, answer: &[u8]) -> (Vec<u8>, u64) {
    let (mut sample, mut bytes) = (Vec::new(), 0);
    texts(api, answer, &mut |text| {
        bytes += text.len() as u64;
        keep(&mut sample, text);
    });
    (sample, bytes)
}

/// Adds text to a sample until that is full.
pub fn keep(sample: &mut Vec<u8>, text: &[u8]) {
    let room = TEXT_SAMPLE_BYTES.saturating_sub(sample.len());
    sample.extend_from_slice(&text[..text.len().min(room)]);
}

fn raw_tokens(tokenizer: &Tokenizer, raw: &[u8]) -> u64 {
    tokenizer.count(unescaped(raw).as_str()) as u64
}

/// Tokens of the strings in a request's whole body, and of what frames its messages.
fn document_tokens(tokenizer: &Tokenizer, body: &[u8]) -> u64 {
    let (mut tokens, mut messages) = (0, 0);
    let mut key: &[u8] = b"";
    let mut at = 0;
    while let Some(found) = memchr::memchr(b'"', &body[at..]) {
        let start = at + found + 1;
        let end = string_end(body, start);
        let string = &body[start..end];
        at = (end + 1).min(body.len());
        let is_key = body[at..].trim_ascii_start().first() == Some(&b':');
        if is_key {
            key = string;
            messages += u64::from(string == b"role");
        }
        let seen = if is_key {
            !API_KEYS.contains(&string)
        } else {
            !UNSEEN.contains(&key)
        };
        if seen {
            tokens += raw_tokens(tokenizer, string);
        }
    }
    match messages {
        0 => tokens,
        _ => tokens + messages * MESSAGE_TOKENS + ANSWER_TOKENS,
    }
}

/// Where a JSON string ends that began before `at`.
fn string_end(json: &[u8], mut at: usize) -> usize {
    while let Some(found) = memchr::memchr2(b'"', b'\\', json.get(at..).unwrap_or_default()) {
        at += found;
        if json[at] == b'"' {
            return at;
        }
        at += 2;
    }
    json.len()
}

/// The text that a part of a JSON string stands for. What a cut has broken is replaced.
fn unescaped(raw: &[u8]) -> String {
    let mut text = String::with_capacity(raw.len());
    let mut rest = raw;
    while let Some(found) = memchr::memchr(b'\\', rest) {
        text.push_str(&String::from_utf8_lossy(&rest[..found]));
        let escape = &rest[found + 1..];
        let (character, bytes) = match escape.first() {
            Some(b'n') => ('\n', 1),
            Some(b't') => ('\t', 1),
            Some(b'r') => ('\r', 1),
            Some(b'b') => ('\u{8}', 1),
            Some(b'f') => ('\u{c}', 1),
            Some(b'u') => unicode_escape(escape),
            Some(&other) if other.is_ascii() => (char::from(other), 1),
            _ => (char::REPLACEMENT_CHARACTER, 0),
        };
        text.push(character);
        rest = &escape[bytes..];
    }
    text.push_str(&String::from_utf8_lossy(rest));
    text
}

/// The character of `uXXXX`, or of a pair of surrogates, and the length of what told it.
fn unicode_escape(escape: &[u8]) -> (char, usize) {
    let unit = |at: usize| {
        let digits = std::str::from_utf8(escape.get(at..at + 4)?).ok()?;
        u32::from_str_radix(digits, 16).ok()
    };
    let Some(first) = unit(1) else {
        return (char::REPLACEMENT_CHARACTER, 1);
    };
    if let (0xd800..0xdc00, Some(b"\\u"), Some(second @ 0xdc00..0xe000)) = (first, escape.get(5..7), unit(7))
    {
        let code = 0x10000 + ((first - 0xd800) << 10) + (second - 0xdc00);
        return (char::from_u32(code).unwrap_or(char::REPLACEMENT_CHARACTER), 11);
    }
    (char::from_u32(first).unwrap_or(char::REPLACEMENT_CHARACTER), 5)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn families_are_known_by_their_names() {
        use Vocabulary::{Cl100k, O200k};
        for (model, vocabulary) in [
            ("gpt-4o", Some(O200k)),
            ("gpt-4o-mini-2024-07-18", Some(O200k)),
            ("openai/gpt-5-mini", Some(O200k)),
            ("gpt-4.1-nano", Some(O200k)),
            ("ft:gpt-4o:acme::7", Some(O200k)),
            ("o3", Some(O200k)),
            ("o4-mini", Some(O200k)),
            ("gpt-4", Some(Cl100k)),
            ("gpt-4-turbo", Some(Cl100k)),
            ("gpt-3.5-turbo", Some(Cl100k)),
            ("text-embedding-3-small", Some(Cl100k)),
            ("gpt-40b", None),
            ("o300", None),
            ("llama-3.3-70b", None),
            ("claude-sonnet-4-5", None),
        ] {
            assert_eq!(Vocabulary::of(None, model), vocabulary, "{model}");
        }
        assert_eq!(Vocabulary::of(Some(schema::Tokenizer::None), "gpt-4o"), None);
        assert_eq!(
            Vocabulary::of(Some(schema::Tokenizer::O200kBase), "fast"),
            Some(O200k)
        );
    }

    #[test]
    fn a_prompt_is_counted_as_the_api_counts_it() {
        let tokenizer = bpe_openai::cl100k_base();
        // "hello world" is 2 tokens; 4 frame the message and 3 begin the answer.
        let body = br#"{"model":"gpt-4","messages":[{"role":"user","content":"hello world"}],"stream":true}"#;
        let prompt = Prompt::of(body).expect("text");
        assert_eq!(prompt.tokens(tokenizer), 9);
        let numbers = Prompt::of(br#"{"model":"text-embedding-3-small","input":[1,2,3]}"#).expect("a sample");
        assert_eq!(numbers.tokens(tokenizer), 0);
        let picture = br#"{"messages":[{"content":[{"image_url":{"url":"data:image/png;base64,AAAA"}}]}]}"#;
        assert_eq!(Prompt::of(picture), None);
    }

    #[test]
    fn a_long_prompt_is_counted_by_parts_of_it() {
        let tokenizer = bpe_openai::o200k_base();
        let text =
            "The quick brown fox jumps over the lazy dog, and \\\"says\\\": f\u{fc}r alle.\\n".repeat(2000);
        let body = format!(r#"{{"messages":[{{"role":"user","content":"{text}"}}]}}"#);
        let prompt = Prompt::of(body.as_bytes()).expect("text");
        assert_eq!(prompt.sample_bytes(), PROMPT_SAMPLE_BYTES);
        let exact = document_tokens(tokenizer, body.as_bytes());
        let error = prompt.tokens(tokenizer).abs_diff(exact);
        assert!(error * 33 < exact, "{error} of {exact}");
    }

    #[test]
    fn the_text_of_an_answer_is_counted_from_its_beginning() {
        let tokenizer = bpe_openai::cl100k_base();
        let answer = br#"{"choices":[{"message":{"role":"assistant","content":"hello\u0020world"}}]}"#;
        let (sample, bytes) = answer_text(Api::ChatCompletions, answer);
        assert_eq!((sample.as_slice(), bytes), (&br"hello\u0020world"[..], 16));
        assert_eq!(text_tokens(tokenizer, &sample, bytes), 2);
        assert_eq!(text_tokens(tokenizer, &sample, 10 * bytes), 20);
        assert_eq!(text_tokens(tokenizer, b"", 100), 0);
    }

    proptest! {
        #[test]
        fn escapes_are_those_of_json(text: String) {
            let json = serde_json::to_string(&text).expect("JSON");
            prop_assert_eq!(unescaped(&json.as_bytes()[1..json.len() - 1]), text);
        }

        #[test]
        fn foreign_bytes_never_panic(bytes in prop::collection::vec(prop::sample::select(
            b"\\u\"d8{}:0c,\xc3\xff role".to_vec()), 0..200)) {
            let _ = unescaped(&bytes);
            let tokenizer = bpe_openai::cl100k_base();
            if let Some(prompt) = Prompt::of(&bytes) {
                let _ = prompt.tokens(tokenizer);
            }
        }
    }

    #[test]
    fn pairs_of_surrogates_are_one_character() {
        assert_eq!(
            unescaped(br"\ud83d\ude00 \ud83d x \u00e"),
            "\u{1f600} \u{fffd} x \u{fffd}00e"
        );
    }
}
