//! The parts of a mix: what each sends, and the bytes of its requests.

use std::io;
use std::sync::Arc;

use serde_json::{Value, json};

use super::check::{Api, Needles};
use super::{HangUp, Options, Url, invalid};
use crate::prompt;
use crate::random::Random;

/// Reads a slow reader does per second, as long as each is a byte or more.
const SLOW_READS_PER_S: u64 = 50;
/// Bytes of all prompts of a run that are kept ready.
const PROMPTS_BYTES_MAX: usize = 256 * 1024 * 1024;

/// What is believed of an answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Check {
    /// The simulator's tokens, each once and in order, and everything under `Shape`.
    #[default]
    Tokens,
    /// For real models: well-formed events with their borders, a finish reason, an end, and nothing behind it.
    Shape,
}

/// One sort of request in a mix.
#[derive(Clone, Debug)]
pub struct Part {
    pub name: String,
    /// How often it is chosen against the other parts that have no connections of their own.
    pub weight: u32,
    /// Connections that belong to this part: so many of its requests are always under way.
    pub connections: Option<usize>,
    /// Its streams are opened before anything is measured and held to the end.
    pub hold: bool,
    /// Path of the target, where it is not the URL's; its end tells the API.
    pub path: Option<String>,
    pub model: String,
    pub stream: bool,
    /// Bytes of text in the prompt.
    pub prompt_bytes: usize,
    /// Of these, so many at the start are the same in all prompts of the part: a system prompt, a shared document.
    pub shared_bytes: usize,
    /// Different prompts, sent in turn.
    pub prompts: u32,
    pub max_tokens: Option<u32>,
    pub include_usage: bool,
    /// Tokens that each answer must have.
    pub expect_tokens: Option<u64>,
    /// The status that each answer must have; any will do where it is not set.
    pub expect_status: Option<u16>,
    pub hang_up: Option<HangUp>,
    /// Read no faster than this, in bytes per second.
    pub slow_reader: Option<u64>,
    /// Sent instead of the run's keys.
    pub key: Option<String>,
    /// Declare so many tools in the request.
    pub tools: u32,
    pub check: Check,
}

impl Default for Part {
    fn default() -> Self {
        Self {
            name: "all".to_owned(),
            weight: 1,
            connections: None,
            hold: false,
            path: None,
            model: "sim".to_owned(),
            stream: true,
            prompt_bytes: 256,
            shared_bytes: 0,
            prompts: 1,
            max_tokens: None,
            include_usage: false,
            expect_tokens: None,
            expect_status: None,
            hang_up: None,
            slow_reader: None,
            key: None,
            tools: 0,
            check: Check::Tokens,
        }
    }
}

impl Part {
    /// Asks for no more than `most` tokens.
    pub fn limit_tokens(&mut self, most: u32) {
        self.max_tokens = Some(self.max_tokens.map_or(most, |own| own.min(most)));
        self.expect_tokens = self.expect_tokens.map(|tokens| tokens.min(most.into()));
    }
}

/// The bytes of one request: what depends on the key, and what depends on the prompt.
#[derive(Clone, Debug)]
pub(super) struct Request {
    pub head: Arc<[u8]>,
    pub tail: Arc<[u8]>,
}

impl Request {
    pub fn len(&self) -> usize {
        self.head.len() + self.tail.len()
    }
}

/// What all clients of a part share.
pub(super) struct Plan {
    pub part: Part,
    pub api: Api,
    pub needles: Needles,
    pub stream: bool,
    /// Bytes of one read of a slow reader.
    pub slow_read_bytes: Option<usize>,
    /// One for each key.
    heads: Vec<Arc<[u8]>>,
    /// One for each prompt: the head's end and the body.
    tails: Vec<Arc<[u8]>>,
}

impl Plan {
    pub fn new(part: &Part, url: &Url, options: &Options) -> io::Result<Self> {
        let path = part.path.as_ref().unwrap_or(&url.path);
        let path = &path.replace("{model}", &part.model);
        let api = Api::of(path);
        let prompts = part.prompts.max(1);
        if part.prompt_bytes.saturating_mul(prompts as usize) > PROMPTS_BYTES_MAX {
            return Err(invalid(
                "the prompts of one part are larger than 256 MiB together",
            ));
        }
        let keys: Vec<&String> = match &part.key {
            Some(key) => vec![key],
            None if options.keys.is_empty() => options.key.iter().collect(),
            None => options.keys.iter().collect(),
        };
        let heads = if keys.is_empty() {
            vec![head(url, path, api, None, options)]
        } else {
            keys.iter()
                .map(|key| head(url, path, api, Some(key), options))
                .collect()
        };
        let shared = part.shared_bytes.min(part.prompt_bytes);
        let tails = (0..u64::from(prompts)).map(|index| {
            let mut text = prompt::text(shared, options.seed);
            text.push_str(&prompt::text(
                part.prompt_bytes - shared,
                options.seed ^ (index + 1),
            ));
            tail(&body(part, api, &text, part.max_tokens))
        });
        Ok(Self {
            tails: tails.collect(),
            heads,
            needles: Needles::new(api),
            // Gemini's path says whether the answer is a stream.
            stream: part.stream && api != Api::Embeddings && !path.contains(":generateContent"),
            slow_read_bytes: part
                .slow_reader
                .map(|rate| (rate / SLOW_READS_PER_S).max(1) as usize),
            api,
            part: part.clone(),
        })
    }

    /// Request number `index` of this part: keys and prompts in turn.
    pub fn request(&self, index: u64) -> Request {
        let pick = |count: usize| (index % count as u64) as usize;
        Request {
            head: self.heads[pick(self.heads.len())].clone(),
            // Prompts turn slower than keys, so that each key sends each prompt.
            tail: self.tails[(index / self.heads.len() as u64 % self.tails.len() as u64) as usize].clone(),
        }
    }

    /// A request as a trace says: its own prompt and its own length of the answer.
    pub fn traced(&self, index: u64, text: &str, max_tokens: Option<u32>) -> Request {
        Request {
            head: self.heads[(index % self.heads.len() as u64) as usize].clone(),
            tail: tail(&body(
                &self.part,
                self.api,
                text,
                max_tokens.or(self.part.max_tokens),
            )),
        }
    }

    /// Whether request number `index` is to be left, spread evenly: 61 and 100 have no common factor.
    pub fn leave_after(&self, index: u64) -> Option<u64> {
        let hang_up = self.part.hang_up?;
        (index * 61 % 100 < u64::from(hang_up.share_percent)).then_some(hang_up.after_tokens)
    }
}

/// Chooses the parts without connections of their own, by their weights.
pub(super) struct Chooser {
    /// Index of a part and the sum of the weights up to it.
    sums: Vec<(usize, u64)>,
    random: Random,
}

impl Chooser {
    pub fn new(parts: &[Part], seed: u64) -> Self {
        let mut sum = 0;
        let mut sums = Vec::new();
        for (index, part) in parts.iter().enumerate() {
            if part.connections.is_none() && part.weight > 0 {
                sum += u64::from(part.weight);
                sums.push((index, sum));
            }
        }
        Self {
            sums,
            random: Random::new(seed),
        }
    }

    /// The next part; `None` where all have connections of their own.
    pub fn next(&mut self) -> Option<usize> {
        let (last, sum) = *self.sums.last()?;
        if self.sums.len() == 1 {
            return Some(last);
        }
        let drawn = self.random.below(sum);
        self.sums
            .iter()
            .find(|(_, upto)| drawn < *upto)
            .map(|(index, _)| *index)
    }
}

fn head(url: &Url, path: &str, api: Api, key: Option<&String>, options: &Options) -> Arc<[u8]> {
    let host = if url.host.contains(':') {
        format!("[{}]", url.host)
    } else {
        url.host.clone()
    };
    let key = match (api, key) {
        (_, None) => String::new(),
        (Api::Messages, Some(key)) => format!("x-api-key: {key}\r\n"),
        (Api::Gemini | Api::GeminiArray, Some(key)) => format!("x-goog-api-key: {key}\r\n"),
        (_, Some(key)) => format!("authorization: Bearer {key}\r\n"),
    };
    let version = if api == Api::Messages {
        "anthropic-version: 2023-06-01\r\n"
    } else {
        ""
    };
    let further: String = options
        .headers
        .iter()
        .map(|(name, value)| format!("{name}: {value}\r\n"))
        .collect();
    let close = if options.keep_alive {
        ""
    } else {
        "connection: close\r\n"
    };
    format!(
        "POST {path} HTTP/1.1\r\nhost: {host}:{}\r\nuser-agent: gateway-bench/{}\r\naccept: */*\r\n{key}{version}{close}{further}\
         content-type: application/json\r\n",
        url.port,
        env!("CARGO_PKG_VERSION"),
    )
    .into_bytes()
    .into()
}

fn tail(body: &Value) -> Arc<[u8]> {
    let body = body.to_string();
    format!("content-length: {}\r\n\r\n{body}", body.len())
        .into_bytes()
        .into()
}

/// Most tokens where the part does not say it: Anthropic's API wants a figure.
const MESSAGES_TOKENS: u32 = 4096;

fn body(part: &Part, api: Api, text: &str, max_tokens: Option<u32>) -> Value {
    let stream = part.stream && api != Api::Embeddings;
    let mut body = match api {
        Api::Chat | Api::Messages => json!({ "messages": messages(text, api) }),
        Api::Completions => json!({ "prompt": text }),
        Api::Embeddings | Api::Responses => json!({ "input": text }),
        // The model is in the path.
        Api::Gemini | Api::GeminiArray => {
            let mut body = json!({ "contents": [{ "role": "user", "parts": [{ "text": text }] }] });
            if let Some(tokens) = max_tokens {
                body["generationConfig"] = json!({ "maxOutputTokens": tokens });
            }
            if part.tools > 0 {
                let tools: Value = (0..part.tools).map(|index| tool(index, api)).collect();
                body["tools"] = json!([{ "functionDeclarations": tools }]);
            }
            return body;
        }
    };
    body["model"] = part.model.as_str().into();
    if api == Api::Messages {
        body["max_tokens"] = max_tokens.unwrap_or(MESSAGES_TOKENS).into();
    } else if let Some(tokens) = max_tokens.filter(|_| api != Api::Embeddings) {
        let name = if api == Api::Responses {
            "max_output_tokens"
        } else {
            "max_tokens"
        };
        body[name] = tokens.into();
    }
    if stream {
        body["stream"] = true.into();
        if part.include_usage && matches!(api, Api::Chat | Api::Completions) {
            body["stream_options"] = json!({ "include_usage": true });
        }
    }
    if part.tools > 0 {
        body["tools"] = (0..part.tools).map(|index| tool(index, api)).collect();
    }
    body
}

/// A conversation in turns; a short text is one turn.
fn messages(text: &str, api: Api) -> Value {
    const ONE_TURN_BYTES: usize = 4096;
    // Anthropic's messages have no system turn.
    let roles: &[&str] = match api {
        _ if text.len() < ONE_TURN_BYTES => &["user"],
        Api::Chat => &["system", "user", "assistant", "user"],
        _ => &["user", "assistant", "user"],
    };
    let mut messages = Vec::new();
    let mut start = 0;
    for (turn, role) in roles.iter().enumerate() {
        let mut end = text.len() * (turn + 1) / roles.len();
        while !text.is_char_boundary(end) {
            end += 1;
        }
        messages.push(json!({ "role": role, "content": text[start..end] }));
        start = end;
    }
    messages.into()
}

fn tool(index: u32, api: Api) -> Value {
    let name = format!("look_up_{index}");
    let schema = json!({
        "type": "object",
        "properties": { "query": { "type": "string" }, "limit": { "type": "integer" } },
        "required": ["query"],
    });
    let about = "Looks something up and says where it was found";
    match api {
        Api::Messages => json!({ "name": name, "description": about, "input_schema": schema }),
        Api::Gemini | Api::GeminiArray => {
            json!({ "name": name, "description": about, "parameters": schema })
        }
        Api::Responses => {
            json!({ "type": "function", "name": name, "description": about, "parameters": schema })
        }
        _ => {
            json!({ "type": "function", "function": { "name": name, "description": about, "parameters": schema } })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(part: &Part, url: &str, keys: &[&str]) -> Plan {
        let url = Url::parse(url).unwrap();
        let options = Options {
            keys: keys.iter().map(|key| (*key).to_owned()).collect(),
            ..Options::default()
        };
        Plan::new(part, &url, &options).unwrap()
    }

    fn parsed(request: &Request) -> (String, Value) {
        let whole = [&request.head[..], &request.tail[..]].concat();
        let end = crate::http::head_end(&whole).unwrap();
        let head = String::from_utf8(whole[..end].to_vec()).unwrap();
        assert!(head.contains(&format!("content-length: {}\r\n", whole.len() - end)));
        (head, serde_json::from_slice(&whole[end..]).unwrap())
    }

    #[test]
    fn a_request_says_its_length() {
        let part = Part {
            prompt_bytes: 100,
            max_tokens: Some(7),
            tools: 2,
            ..Part::default()
        };
        let (head, body) = parsed(&plan(&part, "http://localhost:1/v1/chat/completions", &["k"]).request(0));
        assert!(head.contains("authorization: Bearer k\r\n"));
        assert_eq!(body["messages"][0]["content"].as_str().unwrap().len(), 100);
        assert_eq!((&body["max_tokens"], &body["stream"]), (&7.into(), &true.into()));
        assert_eq!(body["tools"].as_array().unwrap().len(), 2);
    }

    #[test]
    fn each_api_has_its_own_head_and_body() {
        let (head, body) = parsed(&plan(&Part::default(), "http://h/v1/messages", &["k"]).request(0));
        assert!(head.contains("x-api-key: k\r\n") && head.contains("anthropic-version: "));
        assert_eq!(body["max_tokens"], MESSAGES_TOKENS);
        let url = "http://h/v1beta/models/sim:streamGenerateContent?alt=sse";
        let (head, body) = parsed(&plan(&Part::default(), url, &["k"]).request(0));
        assert!(head.contains("x-goog-api-key: k\r\n"));
        let part = Part {
            model: "m".to_owned(),
            tools: 2,
            ..Part::default()
        };
        let plan = plan(&part, "http://h/v1beta/models/{model}:generateContent", &["k"]);
        let (head, tooled) = parsed(&plan.request(0));
        assert!(head.starts_with("POST /v1beta/models/m:generateContent ") && !plan.stream);
        assert_eq!(tooled["tools"][0]["functionDeclarations"][1]["name"], "look_up_1");
        assert_eq!(
            body["contents"][0]["parts"][0]["text"].as_str().unwrap().len(),
            256
        );
    }

    #[test]
    fn long_prompts_are_conversations_of_the_same_text() {
        let part = Part {
            prompt_bytes: 50_000,
            ..Part::default()
        };
        for (path, first) in [("chat/completions", "system"), ("messages", "user")] {
            let (_, body) = parsed(&plan(&part, &format!("http://h/v1/{path}"), &[]).request(0));
            let messages = body["messages"].as_array().unwrap();
            let bytes: usize = messages
                .iter()
                .map(|message| message["content"].as_str().unwrap().len())
                .sum();
            assert_eq!((bytes, messages[0]["role"].as_str()), (50_000, Some(first)));
            assert_eq!(messages.last().unwrap()["role"], "user");
        }
    }

    #[test]
    fn keys_and_prompts_take_turns() {
        let part = Part {
            prompts: 3,
            prompt_bytes: 300,
            shared_bytes: 200,
            ..Part::default()
        };
        let plan = plan(&part, "http://h/v1/chat/completions", &["a", "b"]);
        let seen: std::collections::BTreeSet<String> = (0..6)
            .map(|index| {
                let (head, body) = parsed(&plan.request(index));
                let text = body["messages"][0]["content"].as_str().unwrap().to_owned();
                assert_eq!(text[..200], prompt::text(200, 1)[..]);
                format!("{head}{text}")
            })
            .collect();
        assert_eq!(seen.len(), 6);
    }

    #[test]
    fn weights_are_kept() {
        let part = |weight, connections| Part {
            weight,
            connections,
            ..Part::default()
        };
        let parts = [part(1, None), part(9, Some(4)), part(3, None)];
        let mut chooser = Chooser::new(&parts, 5);
        let mut counts = [0; 3];
        for _ in 0..8000 {
            counts[chooser.next().unwrap()] += 1;
        }
        assert_eq!(counts[1], 0);
        assert!((1800..2200).contains(&counts[0]), "{counts:?}");
        assert_eq!(Chooser::new(&parts[1..2], 5).next(), None);
    }
}
