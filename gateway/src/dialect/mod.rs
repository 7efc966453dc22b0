//! What each provider's API says: parse, build, per-event streams, usage fields.

pub mod estimate;
pub mod json;
pub mod meter;
pub mod request;
pub mod tokens;
pub mod usage;

/// What a request asks for; told by its path.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Api {
    /// `POST /v1/chat/completions`
    ChatCompletions = 1,
    /// `POST /v1/completions`
    Completions = 2,
    /// `POST /v1/embeddings`
    Embeddings = 3,
    /// `POST /v1/responses`
    Responses = 4,
}

impl Api {
    /// The name used in the ledger, in logs and in metrics.
    pub fn name(self) -> &'static str {
        match self {
            Api::ChatCompletions => "chat_completions",
            Api::Completions => "completions",
            Api::Embeddings => "embeddings",
            Api::Responses => "responses",
        }
    }

    /// Its path at the gateway and at upstreams.
    pub fn path(self) -> &'static str {
        match self {
            Api::ChatCompletions => "/v1/chat/completions",
            Api::Completions => "/v1/completions",
            Api::Embeddings => "/v1/embeddings",
            Api::Responses => "/v1/responses",
        }
    }

    /// The API at a path.
    pub fn of_path(path: &[u8]) -> Option<Api> {
        [
            Api::ChatCompletions,
            Api::Completions,
            Api::Embeddings,
            Api::Responses,
        ]
        .into_iter()
        .find(|api| api.path().as_bytes() == path)
    }

    /// The inverse of `self as u8`.
    pub fn from_u8(value: u8) -> Option<Api> {
        Some(match value {
            1 => Api::ChatCompletions,
            2 => Api::Completions,
            3 => Api::Embeddings,
            4 => Api::Responses,
            _ => return None,
        })
    }
}

/// Why the model stopped, in OpenAI's words; `u8` on disk.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[repr(u8)]
pub enum Finish {
    /// It was not told.
    #[default]
    Unknown = 0,
    Stop = 1,
    Length = 2,
    ToolCalls = 3,
    ContentFilter = 4,
    /// The answer failed.
    Error = 5,
    /// In a word that is none of these.
    Other = 6,
}

impl Finish {
    /// The reason behind a provider's word.
    pub fn of(word: &[u8]) -> Finish {
        match word {
            b"stop" => Finish::Stop,
            b"length" => Finish::Length,
            b"tool_calls" | b"function_call" => Finish::ToolCalls,
            b"content_filter" => Finish::ContentFilter,
            b"error" => Finish::Error,
            _ => Finish::Other,
        }
    }

    /// The word in the ledger's output; empty where it was not told.
    pub fn name(self) -> &'static str {
        match self {
            Finish::Unknown => "",
            Finish::Stop => "stop",
            Finish::Length => "length",
            Finish::ToolCalls => "tool_calls",
            Finish::ContentFilter => "content_filter",
            Finish::Error => "error",
            Finish::Other => "other",
        }
    }

    /// The inverse of `self as u8`.
    pub fn from_u8(value: u8) -> Option<Finish> {
        Some(match value {
            0 => Finish::Unknown,
            1 => Finish::Stop,
            2 => Finish::Length,
            3 => Finish::ToolCalls,
            4 => Finish::ContentFilter,
            5 => Finish::Error,
            6 => Finish::Other,
            _ => return None,
        })
    }
}

/// The service tier in which a provider served a request; `u8` on disk.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[repr(u8)]
pub enum Tier {
    #[default]
    Default = 0,
    Priority = 1,
    Flex = 2,
    Batch = 3,
}

impl Tier {
    /// The tier of a provider's word; words for the usual service, and unknown ones, are the default tier.
    pub fn of(word: &str) -> Tier {
        match word {
            "priority" => Tier::Priority,
            "flex" => Tier::Flex,
            "batch" => Tier::Batch,
            _ => Tier::Default,
        }
    }

    /// The word in the ledger's output.
    pub fn name(self) -> &'static str {
        match self {
            Tier::Default => "default",
            Tier::Priority => "priority",
            Tier::Flex => "flex",
            Tier::Batch => "batch",
        }
    }

    /// The inverse of `self as u8`.
    pub fn from_u8(value: u8) -> Option<Tier> {
        Some(match value {
            0 => Tier::Default,
            1 => Tier::Priority,
            2 => Tier::Flex,
            3 => Tier::Batch,
            _ => return None,
        })
    }
}

/// Tokens of one request, in OpenAI's sense: `prompt` includes `cached` and what was written to the cache, `completion`
/// includes `reasoning`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// All input tokens.
    pub prompt: u64,
    /// Input tokens read from the provider's cache; at most `prompt`.
    pub cached: u64,
    /// Input tokens written to the provider's cache for five minutes, and for an hour; with `cached` at most `prompt`.
    pub cache_write_5m: u64,
    pub cache_write_1h: u64,
    /// All output tokens.
    pub completion: u64,
    /// Output tokens spent on reasoning; at most `completion`.
    pub reasoning: u64,
    /// The tier that the provider told.
    pub tier: Tier,
    /// The provider's figures contradicted themselves and were brought within their bounds.
    pub clamped: bool,
}

impl Usage {
    /// Brings parts within their wholes: more cached than there was input, more reasoning than output.
    pub fn clamp(mut self) -> Usage {
        let told = self;
        self.cached = self.cached.min(self.prompt);
        let left = self.prompt - self.cached;
        self.cache_write_1h = self.cache_write_1h.min(left);
        self.cache_write_5m = self.cache_write_5m.min(left - self.cache_write_1h);
        self.reasoning = self.reasoning.min(self.completion);
        self.clamped |= self != told;
        self
    }

    /// Input and output together.
    pub fn total(&self) -> u64 {
        self.prompt.saturating_add(self.completion)
    }
}
