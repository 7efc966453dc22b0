//! A load generator that believes nothing: it checks every token of every answer while it measures.
//!
//! One thread drives all connections over `epoll`. In the closed loop each connection sends its next request when its
//! last has ended. In the open loop requests are due at a fixed rate, and latencies count from the time a request was
//! due, so that a stalled server cannot hide its stall (no "coordinated omission").

mod check;
mod client;
mod engine;
mod link;
mod report;
mod tally;

use std::io;
use std::net::{SocketAddr, ToSocketAddrs};
use std::time::Duration;

pub use link::{Sources, Trust};
pub use report::{Failures, Latency, Report};

use check::{Api, Needles};
use client::Plan;

/// Reads a slow reader does per second, as long as each is a byte or more.
const SLOW_READS_PER_S: u64 = 50;

/// Streams that are left on purpose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HangUp {
    /// Leave when so many tokens have come.
    pub after_tokens: u64,
    /// Of a hundred requests, so many leave. 0 to 100.
    pub share_percent: u8,
}

/// What to send, how much of it, and how.
#[derive(Clone, Debug)]
pub struct Options {
    /// `http://HOST[:PORT]/PATH` or `https://…`. The path's end tells the API.
    pub url: String,
    /// Sent as a bearer token.
    pub key: Option<String>,
    pub model: String,
    pub stream: bool,
    /// Connections at most; in the closed loop also requests at once.
    pub connections: usize,
    /// Send all requests of a connection over it; otherwise each has its own.
    pub keep_alive: bool,
    /// Open loop: requests per second.
    pub rate: Option<f64>,
    /// Stop after so many requests.
    pub requests: Option<u64>,
    /// Stop to start requests after this time, warm-up included. One second where neither this nor `requests` is set.
    pub duration: Option<Duration>,
    /// What comes before is checked but not measured.
    pub warm_up: Duration,
    /// Closed loop: time over which the first requests are spread, so that streams do not beat in step.
    pub ramp: Duration,
    /// Time that one request may take.
    pub timeout: Duration,
    pub prompt_bytes: usize,
    pub max_tokens: Option<u32>,
    pub include_usage: bool,
    /// Tokens that each answer must have.
    pub expect_tokens: Option<u64>,
    pub hang_up: Option<HangUp>,
    /// Read no faster than this, in bytes per second.
    pub slow_reader: Option<u64>,
    pub sources: Option<Sources>,
    /// For `https`; [`Trust::Anything`] where it is not set.
    pub trust: Option<Trust>,
    /// Processes whose cost is measured.
    pub pids: Vec<u32>,
    /// Open one stream per connection, wait until each has had a token, and read the processes' memory `duration`
    /// after that.
    pub idle: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            url: String::new(),
            key: None,
            model: "sim".to_owned(),
            stream: true,
            connections: 1,
            keep_alive: true,
            rate: None,
            requests: None,
            duration: None,
            warm_up: Duration::ZERO,
            ramp: Duration::ZERO,
            timeout: Duration::from_secs(120),
            prompt_bytes: 256,
            max_tokens: None,
            include_usage: false,
            expect_tokens: None,
            hang_up: None,
            slow_reader: None,
            sources: None,
            trust: None,
            pids: Vec::new(),
            idle: false,
        }
    }
}

/// Runs to the end and reports. Blocks the calling thread.
///
/// # Errors
/// An URL that is none, a name that does not resolve, a rate that is not positive, certificates that cannot be read,
/// and failures of `epoll`. Failing requests are not errors: the report has them.
pub fn run(options: &Options) -> io::Result<Report> {
    let url = Url::parse(&options.url)
        .ok_or_else(|| invalid(&format!("`{}` is not an http(s) URL", options.url)))?;
    if options.rate.is_some_and(|rate| !rate.is_finite() || rate <= 0.0) {
        return Err(invalid("the rate must be positive"));
    }
    if options.connections == 0 {
        return Err(invalid("at least one connection is needed"));
    }
    let api = Api::of(&url.path);
    let plan = Plan {
        request: request(options, &url, api),
        api,
        needles: Needles::new(api),
        stream: options.stream && api != Api::Embeddings,
        expected_tokens: options.expect_tokens,
        slow_read_bytes: options
            .slow_reader
            .map(|rate| (rate / SLOW_READS_PER_S).max(1) as usize),
    };
    engine::Engine::new(options, plan, &url)?.run()
}

fn invalid(message: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, message)
}

/// The parts of an URL that a request needs.
pub(crate) struct Url {
    pub tls: bool,
    pub host: String,
    pub port: u16,
    pub path: String,
}

impl Url {
    fn parse(text: &str) -> Option<Self> {
        let (scheme, rest) = text.split_once("://")?;
        let tls = match scheme {
            "http" => false,
            "https" => true,
            _ => return None,
        };
        let (authority, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
        let (host, port) = match authority.rsplit_once(':') {
            Some((host, port)) if !port.ends_with(']') => (host, port.parse().ok()?),
            _ => (authority, if tls { 443 } else { 80 }),
        };
        let host = host.trim_start_matches('[').trim_end_matches(']').to_owned();
        let path = if path.is_empty() {
            "/v1/chat/completions"
        } else {
            path
        }
        .to_owned();
        (!host.is_empty()).then_some(Self {
            tls,
            host,
            port,
            path,
        })
    }

    fn resolve(&self) -> io::Result<SocketAddr> {
        let mut addrs = (self.host.as_str(), self.port).to_socket_addrs()?;
        addrs
            .next()
            .ok_or_else(|| invalid(&format!("`{}` has no address", self.host)))
    }
}

/// The bytes of every request.
fn request(options: &Options, url: &Url, api: Api) -> Vec<u8> {
    let body = request_body(options, api).to_string();
    let host = if url.host.contains(':') {
        format!("[{}]", url.host)
    } else {
        url.host.clone()
    };
    let key = options
        .key
        .as_ref()
        .map(|key| format!("authorization: Bearer {key}\r\n"))
        .unwrap_or_default();
    let close = if options.keep_alive {
        ""
    } else {
        "connection: close\r\n"
    };
    format!(
        "POST {} HTTP/1.1\r\nhost: {host}:{}\r\nuser-agent: gateway-bench/{}\r\naccept: */*\r\n{key}{close}\
         content-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        url.path,
        url.port,
        env!("CARGO_PKG_VERSION"),
        body.len()
    )
    .into_bytes()
}

fn request_body(options: &Options, api: Api) -> serde_json::Value {
    let prompt: String = "the quick brown fox jumps over the lazy dog "
        .chars()
        .cycle()
        .take(options.prompt_bytes)
        .collect();
    let mut body = match api {
        Api::Chat => serde_json::json!({ "messages": [{ "role": "user", "content": prompt }] }),
        Api::Completions => serde_json::json!({ "prompt": prompt }),
        Api::Embeddings | Api::Responses => serde_json::json!({ "input": prompt }),
    };
    body["model"] = options.model.as_str().into();
    if let Some(tokens) = options.max_tokens {
        let name = if api == Api::Responses {
            "max_output_tokens"
        } else {
            "max_tokens"
        };
        body[name] = tokens.into();
    }
    if options.stream && api != Api::Embeddings {
        body["stream"] = true.into();
        if options.include_usage && api != Api::Responses {
            body["stream_options"] = serde_json::json!({ "include_usage": true });
        }
    }
    body
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_are_taken_apart() {
        let url = Url::parse("http://127.0.0.1:8080/v1/embeddings?x=1").unwrap();
        assert_eq!(
            (url.tls, &*url.host, url.port, &*url.path),
            (false, "127.0.0.1", 8080, "/v1/embeddings?x=1")
        );
        let url = Url::parse("https://[::1]").unwrap();
        assert_eq!(
            (url.tls, &*url.host, url.port, &*url.path),
            (true, "::1", 443, "/v1/chat/completions")
        );
        for text in ["127.0.0.1:80", "ftp://x", "http://", "http://a:b/"] {
            assert!(Url::parse(text).is_none(), "{text}");
        }
    }

    #[test]
    fn a_request_says_its_length() {
        let options = Options {
            prompt_bytes: 100,
            max_tokens: Some(7),
            key: Some("k".to_owned()),
            ..Options::default()
        };
        let url = Url::parse("http://localhost:1/v1/chat/completions").unwrap();
        let bytes = request(&options, &url, Api::Chat);
        let end = crate::http::head_end(&bytes).unwrap();
        let head = std::str::from_utf8(&bytes[..end]).unwrap();
        assert!(head.contains(&format!("content-length: {}\r\n", bytes.len() - end)));
        assert!(head.contains("authorization: Bearer k\r\n"));
        let body: serde_json::Value = serde_json::from_slice(&bytes[end..]).unwrap();
        assert_eq!(body["messages"][0]["content"].as_str().unwrap().len(), 100);
        assert_eq!((&body["max_tokens"], &body["stream"]), (&7.into(), &true.into()));
    }
}
