//! Counters of a simulated fleet and the last request that it saw.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};

use serde::Serialize;
use sha2::{Digest, Sha256};

/// Bytes of a body that `GET /sim/last` echoes; its length and hash are of the whole body.
const ECHO_BYTES_MAX: usize = 64 * 1024;

/// Counters of a [`super::Server`], all endpoints and threads together.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Stats {
    pub connections_open: u64,
    pub connections_total: u64,
    /// Calls whose body arrived whole; `/sim/` requests are not counted.
    pub requests: u64,
    /// The same, by endpoint.
    pub requests_by_endpoint: Vec<u64>,
    /// Streams whose head may have been sent and whose end has not.
    pub streams_open: u64,
    pub streams_total: u64,
    /// Streams sent to their end, an `error` event included.
    pub streams_completed: u64,
    /// Streams that the peer left before their end.
    pub streams_aborted: u64,
    /// Plain answers that the peer did not wait for.
    pub plain_aborted: u64,
    /// Content tokens given to the socket, in streams only.
    pub tokens_sent: u64,
    /// Answers that a fault was ordered for and that died of it.
    pub deaths: u64,
    /// Requests that are not HTTP, or calls whose body is not JSON.
    pub bad_requests: u64,
    pub accept_errors: u64,
}

/// The same counters while threads count.
#[derive(Debug, Default)]
pub(super) struct Counters {
    pub connections_open: AtomicU64,
    pub connections_total: AtomicU64,
    pub requests_by_endpoint: Vec<AtomicU64>,
    pub streams_open: AtomicU64,
    pub streams_total: AtomicU64,
    pub streams_completed: AtomicU64,
    pub streams_aborted: AtomicU64,
    pub plain_aborted: AtomicU64,
    pub tokens_sent: AtomicU64,
    pub deaths: AtomicU64,
    pub bad_requests: AtomicU64,
    pub accept_errors: AtomicU64,
}

/// Adds one. The order of counters among each other does not matter to anyone.
pub(super) fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Relaxed);
}

impl Counters {
    pub fn new(endpoints: usize) -> Self {
        Self {
            requests_by_endpoint: (0..endpoints).map(|_| AtomicU64::new(0)).collect(),
            ..Self::default()
        }
    }

    pub fn read(&self) -> Stats {
        let requests_by_endpoint: Vec<u64> = self
            .requests_by_endpoint
            .iter()
            .map(|counter| counter.load(Relaxed))
            .collect();
        Stats {
            connections_open: self.connections_open.load(Relaxed),
            connections_total: self.connections_total.load(Relaxed),
            requests: requests_by_endpoint.iter().sum(),
            requests_by_endpoint,
            streams_open: self.streams_open.load(Relaxed),
            streams_total: self.streams_total.load(Relaxed),
            streams_completed: self.streams_completed.load(Relaxed),
            streams_aborted: self.streams_aborted.load(Relaxed),
            plain_aborted: self.plain_aborted.load(Relaxed),
            tokens_sent: self.tokens_sent.load(Relaxed),
            deaths: self.deaths.load(Relaxed),
            bad_requests: self.bad_requests.load(Relaxed),
            accept_errors: self.accept_errors.load(Relaxed),
        }
    }
}

/// A request as it came over the wire.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LastRequest {
    /// The head with its request line and its empty line.
    pub head: Vec<u8>,
    /// The body without its transfer coding.
    pub body: Vec<u8>,
}

impl LastRequest {
    /// The value of the first field called `name`, in any case.
    pub fn header(&self, name: &str) -> Option<String> {
        self.fields()
            .into_iter()
            .find(|(key, _)| key.eq_ignore_ascii_case(name))
            .map(|(_, value)| value)
    }

    /// Method and target.
    pub fn target(&self) -> (String, String) {
        let line = String::from_utf8_lossy(self.head.split(|byte| *byte == b'\r').next().unwrap_or_default());
        let mut words = line.split(' ').map(str::to_owned);
        (words.next().unwrap_or_default(), words.next().unwrap_or_default())
    }

    /// All fields in their order.
    pub fn fields(&self) -> Vec<(String, String)> {
        String::from_utf8_lossy(&self.head)
            .lines()
            .skip(1)
            .filter_map(|line| line.split_once(':'))
            .map(|(key, value)| (key.to_owned(), value.trim().to_owned()))
            .collect()
    }

    /// SHA-256 of the body in hex.
    pub fn body_sha256(&self) -> String {
        Sha256::digest(&self.body)
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect()
    }

    /// What `GET /sim/last` answers.
    pub(super) fn to_json(&self) -> serde_json::Value {
        let (method, target) = self.target();
        let echo = &self.body[..self.body.len().min(ECHO_BYTES_MAX)];
        serde_json::json!({
            "method": method,
            "target": target,
            "headers": self.fields(),
            "body_bytes": self.body.len(),
            "body_sha256": self.body_sha256(),
            "body": String::from_utf8_lossy(echo),
            "body_cut": echo.len() < self.body.len(),
        })
    }
}

/// The place where the last request lies. Requests are swapped in, so that keeping one copies nothing.
#[derive(Debug, Default)]
pub(super) struct Last(Mutex<LastRequest>);

impl Last {
    pub fn swap(&self, head: &mut Vec<u8>, body: &mut Vec<u8>) {
        let mut last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::swap(&mut last.head, head);
        std::mem::swap(&mut last.body, body);
    }

    pub fn read(&self) -> LastRequest {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_taken_apart() {
        let last = LastRequest {
            head: b"POST /v1/x HTTP/1.1\r\nHost: a:1\r\nAuthorization: Bearer k\r\n\r\n".to_vec(),
            body: b"abc".to_vec(),
        };
        assert_eq!(last.target(), ("POST".to_owned(), "/v1/x".to_owned()));
        assert_eq!(last.header("authorization").as_deref(), Some("Bearer k"));
        assert_eq!(last.fields().len(), 2);
        // The test vector of FIPS 180-2, appendix B.1.
        assert_eq!(
            last.body_sha256(),
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        );
    }
}
