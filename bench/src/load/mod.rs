//! A load generator that believes nothing: it checks every token of every answer while it measures.
//!
//! Each thread drives its connections over `epoll`. In the closed loop each connection sends its next request when its
//! last has ended. In the open loop requests are due at a rate or as a trace says, and latencies count from the time a
//! request was due, so that a stalled server cannot hide its stall (no "coordinated omission").

mod check;
mod client;
mod engine;
mod link;
mod part;
mod report;
mod schedule;
mod start;
mod tally;
mod text;
mod trace;

use std::io;
use std::net::{SocketAddr, ToSocketAddrs};
use std::sync::Arc;
use std::time::Duration;

pub use link::{Sources, Trust};
pub use part::{Check, Part};
pub use report::{Curves, Failures, Latency, PartReport, Point, Report};
pub use schedule::{Arrivals, Stage};
pub use tally::Progress;
pub use trace::{Row, Trace};

use part::Plan;
use tally::Tally;

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
    /// Sent as the API wants it: as a bearer token, in `x-api-key` or in `x-goog-api-key`.
    pub key: Option<String>,
    /// Several of them, in turn, instead of `key`.
    pub keys: Vec<String>,
    /// Further fields of every request's head.
    pub headers: Vec<(String, String)>,
    /// What is sent, by weight. Where it is empty the fields from `model` to `slow_reader` say it.
    pub parts: Vec<Part>,
    pub model: String,
    pub stream: bool,
    /// Connections at most; in the closed loop also requests at once.
    pub connections: usize,
    /// Send all requests of a connection over it; otherwise each has its own.
    pub keep_alive: bool,
    /// Open loop: requests per second.
    pub rate: Option<f64>,
    /// Open loop: a rate that changes, instead of `rate`.
    pub stages: Vec<Stage>,
    /// Open loop: how requests are spread over time.
    pub arrivals: Arrivals,
    /// Open loop: as recorded, instead of `rate`.
    pub trace: Option<Trace>,
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
    /// For `https`: resume sessions where the server hands tickets out. Otherwise each connection has a whole handshake.
    pub tls_resume: bool,
    /// Processes whose cost is measured; their costs are added up.
    pub pids: Vec<u32>,
    /// For so long after the window, with the load still on, the processes' system calls are counted.
    pub count_system_calls: Option<Duration>,
    /// Threads that share connections, rate and number of requests. At least 1.
    pub threads: usize,
    /// Where random choices start, so that a run can be had again.
    pub seed: u64,
    /// Told how it goes, some times a second.
    pub progress: Option<Arc<Progress>>,
    /// Open one stream per connection, wait until each has had a token, and read the processes' memory `duration`
    /// after that.
    pub idle: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            url: String::new(),
            key: None,
            keys: Vec::new(),
            headers: Vec::new(),
            parts: Vec::new(),
            model: "sim".to_owned(),
            stream: true,
            connections: 1,
            keep_alive: true,
            rate: None,
            stages: Vec::new(),
            arrivals: Arrivals::Even,
            trace: None,
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
            tls_resume: false,
            pids: Vec::new(),
            count_system_calls: None,
            threads: 1,
            seed: 1,
            progress: None,
            idle: false,
        }
    }
}

impl Options {
    /// The parts of the mix: those given, or the one that the other fields describe.
    fn mix(&self) -> Vec<Part> {
        if !self.parts.is_empty() {
            return self.parts.clone();
        }
        vec![Part {
            hold: self.idle,
            model: self.model.clone(),
            stream: self.stream,
            prompt_bytes: self.prompt_bytes,
            max_tokens: self.max_tokens,
            include_usage: self.include_usage,
            expect_tokens: self.expect_tokens,
            hang_up: self.hang_up,
            slow_reader: self.slow_reader,
            ..Part::default()
        }]
    }

    /// What thread `index` does of it. The first threads take what cannot be shared out evenly.
    fn share(&self, index: usize) -> Self {
        let threads = self.threads.max(1);
        let part_of = |all: u64| all / threads as u64 + u64::from(all % threads as u64 > index as u64);
        let mut share = self.clone();
        share.connections = (part_of(self.connections as u64) as usize).max(1);
        share.requests = self.requests.map(part_of);
        share.rate = self.rate.map(|rate| rate / threads as f64);
        for stage in &mut share.stages {
            stage.from /= threads as f64;
            stage.to /= threads as f64;
        }
        share.parts = self.mix();
        for part in &mut share.parts {
            part.connections = part.connections.map(|own| part_of(own as u64) as usize);
        }
        share
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
    validate(options)?;
    let threads = options.threads.max(1);
    let shares: Vec<Options> = (0..threads).map(|index| options.share(index)).collect();
    let mut tallies = Vec::new();
    std::thread::scope(|scope| {
        let url = &url;
        let others: Vec<_> = (1..threads)
            .map(|index| (index, &shares[index]))
            .map(|(index, share)| scope.spawn(move || run_thread(share, url, index)))
            .collect();
        tallies.push(run_thread(&shares[0], url, 0));
        for other in others {
            tallies.push(
                other
                    .join()
                    .unwrap_or_else(|_| Err(io::Error::other("a load thread panicked"))),
            );
        }
    });
    let mut tallies = tallies.into_iter();
    let mut whole = tallies.next().unwrap_or_else(|| Err(invalid("no thread")))?;
    for tally in tallies {
        whole.merge(tally?);
    }
    Ok(whole.into_report())
}

fn run_thread(share: &Options, url: &Url, index: usize) -> io::Result<Tally> {
    let seed = share.seed.wrapping_add((index as u64) << 32);
    let plans: io::Result<Vec<Plan>> = share
        .parts
        .iter()
        .map(|part| Plan::new(part, url, share))
        .collect();
    let tally = Tally::new(share, index).map_err(io::Error::other)?;
    engine::Engine::new(share, &plans?, url, tally, seed)?.run()
}

fn validate(options: &Options) -> io::Result<()> {
    let is_rate = |rate: f64| rate.is_finite() && rate >= 0.0;
    if options.rate.is_some_and(|rate| !is_rate(rate) || rate == 0.0) {
        return Err(invalid("the rate must be positive"));
    }
    if options
        .stages
        .iter()
        .any(|stage| !is_rate(stage.from) || !is_rate(stage.to))
    {
        return Err(invalid("the rates of stages must not be negative"));
    }
    if options.connections == 0 {
        return Err(invalid("at least one connection is needed"));
    }
    if options.trace.is_some() && options.threads > 1 {
        return Err(invalid("a trace is sent by one thread"));
    }
    Ok(())
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
}
