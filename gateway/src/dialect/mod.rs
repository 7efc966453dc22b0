//! What each provider's API says: parse, build, per-event streams, usage fields.

pub mod json;
pub mod meter;
pub mod request;
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

/// Tokens of one request, in OpenAI's sense: `prompt` includes `cached`, `completion` includes
/// `reasoning`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// All input tokens.
    pub prompt: u64,
    /// Input tokens read from the provider's cache; at most `prompt`.
    pub cached: u64,
    /// All output tokens.
    pub completion: u64,
    /// Output tokens spent on reasoning; at most `completion`.
    pub reasoning: u64,
}

impl Usage {
    /// Input and output together.
    pub fn total(&self) -> u64 {
        self.prompt.saturating_add(self.completion)
    }
}
