//! What can go wrong with a request, whose fault it is, and the one mapping to HTTP answers.

use std::borrow::Cow;

/// Whose fault an error is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// The client sent something wrong, or more than it may.
    Client,
    /// The provider failed.
    Upstream,
    /// The gateway is out of something, or wrong.
    Gateway,
}

/// What went wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Malformed HTTP or JSON, or a field of a wrong kind.
    BadRequest,
    /// No key, or one that nobody has.
    Unauthenticated,
    /// The key may not use this model.
    Forbidden,
    /// No such path or model.
    NotFound,
    /// The path exists, with other methods.
    MethodNotAllowed,
    /// The body is over the bound.
    BodyTooLarge,
    /// The client was too slow to send its request.
    RequestTimeout,
    /// A limit is used up.
    RateLimited,
    /// The gateway has no room now: connections, bodies, or the ledger.
    Overloaded,
    /// No endpoint of the model could be reached.
    UpstreamUnreachable,
    /// The upstream did not answer in time.
    UpstreamTimeout,
    /// The upstream answered something that is not HTTP, or broke off.
    UpstreamBroken,
    /// The gateway is being stopped.
    Stopping,
    /// A bug of ours.
    Internal,
}

/// An error that becomes an answer.
#[derive(Debug, Clone)]
pub struct Error {
    /// What went wrong.
    pub kind: Kind,
    /// For people: what is wrong and what to do. Never holds a secret or an upstream's address.
    pub message: Cow<'static, str>,
    /// For programs, where the kind alone does not say it: a stable word.
    pub code: Option<&'static str>,
    /// The field of the request that is wrong.
    pub param: Option<&'static str>,
    /// When trying again makes sense, seconds.
    pub retry_after_s: Option<u64>,
    /// A status that HTTP asks for instead of the kind's own (431, 505, …).
    pub status: Option<u16>,
}

/// The dialect in which a client wants its errors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Dialect {
    /// `{"error": {"message", "type", "param", "code"}}`
    #[default]
    OpenAi,
    /// `{"type": "error", "error": {"type", "message"}}`
    Anthropic,
}

/// One row of the mapping from kinds to answers.
struct Answer {
    status: u16,
    source: Source,
    code: &'static str,
    openai: &'static str,
    anthropic: &'static str,
    retry: bool,
}

impl Kind {
    /// The mapping. OpenAI's types: platform.openai.com/docs/guides/error-codes; Anthropic's:
    /// docs.anthropic.com/en/api/errors.
    #[rustfmt::skip]
    fn answer(self) -> Answer {
        use Source::{Client, Gateway, Upstream};
        let row = |status, source, code, openai, anthropic, retry| Answer { status, source, code, openai, anthropic, retry };
        match self {
            Kind::BadRequest          => row(400, Client,   "invalid_request",      "invalid_request_error", "invalid_request_error", false),
            Kind::Unauthenticated     => row(401, Client,   "invalid_api_key",      "invalid_request_error", "authentication_error",  false),
            Kind::Forbidden           => row(403, Client,   "model_not_allowed",    "invalid_request_error", "permission_error",      false),
            Kind::NotFound            => row(404, Client,   "not_found",            "invalid_request_error", "not_found_error",       false),
            Kind::MethodNotAllowed    => row(405, Client,   "method_not_allowed",   "invalid_request_error", "invalid_request_error", false),
            Kind::BodyTooLarge        => row(413, Client,   "request_too_large",    "invalid_request_error", "request_too_large",     false),
            Kind::RequestTimeout      => row(408, Client,   "request_timeout",      "invalid_request_error", "invalid_request_error", true),
            Kind::RateLimited         => row(429, Client,   "rate_limit_exceeded",  "rate_limit_error",      "rate_limit_error",      true),
            Kind::Overloaded          => row(503, Gateway,  "overloaded",           "server_error",          "overloaded_error",      true),
            Kind::UpstreamUnreachable => row(502, Upstream, "upstream_unreachable", "server_error",          "api_error",             true),
            Kind::UpstreamTimeout     => row(504, Upstream, "upstream_timeout",     "server_error",          "timeout_error",         true),
            Kind::UpstreamBroken      => row(502, Upstream, "upstream_broken",      "server_error",          "api_error",             true),
            Kind::Stopping            => row(503, Gateway,  "stopping",             "server_error",          "overloaded_error",      true),
            Kind::Internal            => row(500, Gateway,  "internal",             "server_error",          "api_error",             false),
        }
    }

    /// Whose fault it is.
    pub fn source(self) -> Source {
        self.answer().source
    }

    /// Whether the same request may succeed when it is sent again.
    pub fn retry(self) -> bool {
        self.answer().retry
    }
}

impl Error {
    /// An error with nothing but its kind and its text.
    pub fn new(kind: Kind, message: impl Into<Cow<'static, str>>) -> Error {
        Error {
            kind,
            message: message.into(),
            code: None,
            param: None,
            retry_after_s: None,
            status: None,
        }
    }

    /// A malformed request, with the field that is wrong.
    pub fn bad_field(param: &'static str, message: impl Into<Cow<'static, str>>) -> Error {
        Error {
            param: Some(param),
            ..Error::new(Kind::BadRequest, message)
        }
    }

    /// The status of the answer.
    pub fn status(&self) -> u16 {
        self.status.unwrap_or(self.kind.answer().status)
    }

    /// The stable word for programs, logs and metrics.
    pub fn code(&self) -> &'static str {
        self.code.unwrap_or(self.kind.answer().code)
    }

    /// The answer's body in the client's dialect; also the data of an error event within a stream.
    pub fn body(&self, dialect: Dialect) -> Vec<u8> {
        let answer = self.kind.answer();
        let value = match dialect {
            Dialect::OpenAi => serde_json::json!({ "error": {
                "message": self.message,
                "type": answer.openai,
                "param": self.param,
                "code": self.code(),
            }}),
            Dialect::Anthropic => serde_json::json!({ "type": "error", "error": {
                "type": answer.anthropic,
                "message": self.message,
            }}),
        };
        value.to_string().into_bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn speaks_both_dialects() {
        let error = Error::bad_field("model", "`model` must be a \"string\"");
        let openai: serde_json::Value = serde_json::from_slice(&error.body(Dialect::OpenAi)).expect("json");
        assert_eq!(openai["error"]["param"], "model");
        assert_eq!(openai["error"]["type"], "invalid_request_error");
        assert_eq!(openai["error"]["message"], "`model` must be a \"string\"");
        let anthropic: serde_json::Value =
            serde_json::from_slice(&error.body(Dialect::Anthropic)).expect("json");
        assert_eq!(anthropic["type"], "error");
        assert_eq!(anthropic["error"]["type"], "invalid_request_error");
        assert_eq!(error.status(), 400);
    }
}
