//! One client: a connection that sends a request, reads its answer and judges it.

use std::io::{self, ErrorKind, IoSlice, Read, Write};

use super::check::{Api, Checker, Flaw};
use super::link::Link;
use super::part::{Check, Plan, Request};
use crate::http::{Dechunker, Fields, HEAD_BYTES_MAX, HEADERS_MAX, head_end};

/// How a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// Whole, with this status.
    Whole(u16),
    /// A 200 answer with a flaw.
    Flawed(Flaw),
    /// Left on purpose.
    HungUp,
    Connect,
    Cut,
    Malformed,
    Timeout,
}

/// What a client tells of its work.
pub(super) enum Progress {
    /// Nothing has ended.
    Going,
    /// The request has ended; the connection is kept if it can be.
    Ended(Outcome),
    /// The connection ended while nothing was under way.
    Gone,
}

/// What a client is told to send.
pub(super) struct Order {
    pub request: Request,
    /// When it is, or was, due.
    pub due_ns: u64,
    /// Leave after so many tokens.
    pub leave_after: Option<u64>,
    /// Tokens that the answer must have.
    pub expected_tokens: Option<u64>,
}

enum Framing {
    Length(u64),
    Chunked(Dechunker),
    Close,
}

enum Phase {
    Connecting,
    Idle,
    Head,
    Body {
        status: u16,
        framing: Framing,
        close: bool,
    },
}

/// Times at which tokens came, for the engine to record.
pub(super) struct Arrivals {
    /// Tokens before this read and after it.
    pub before: u64,
    pub after: u64,
    pub events: u64,
    pub bytes: u64,
}

pub(super) struct Client {
    pub link: Link,
    phase: Phase,
    /// The part of the mix that this connection belongs to.
    pub part: usize,
    /// The request that is being written.
    request: Option<Request>,
    /// Bytes of it written.
    sent: usize,
    /// Tokens that the answer must have.
    expected_tokens: Option<u64>,
    /// A head cut by a read.
    head: Vec<u8>,
    checker: Checker,
    /// When the request was started, or should have been; `None` where none is under way.
    pub started_ns: Option<u64>,
    pub last_token_ns: u64,
    /// Leave after so many tokens.
    pub leave_after: Option<u64>,
    /// Number of the timer that ends the request; 0 for none.
    pub deadline_timer: u64,
    /// Number of the timer that lets a slow reader read on; 0 for none.
    pub pause_timer: u64,
    /// Whether the answer's end leaves the connection open.
    pub reusable: bool,
    /// The error that ended the connection, if it was one.
    pub error: Option<io::Error>,
    /// The beginning of an answer with a status that was not wanted: it says why.
    refusal: Vec<u8>,
}

/// Bytes of such an answer that are kept.
const REFUSAL_BYTES: usize = 200;

impl Client {
    pub fn new(link: Link, api: Api, part: usize) -> Self {
        Self {
            link,
            part,
            phase: Phase::Connecting,
            request: None,
            sent: 0,
            expected_tokens: None,
            head: Vec::new(),
            checker: Checker::new(api),
            started_ns: None,
            last_token_ns: 0,
            leave_after: None,
            deadline_timer: 0,
            pause_timer: 0,
            reusable: true,
            error: None,
            refusal: Vec::new(),
        }
    }

    /// The beginning of the present answer where its status was not wanted, on one line.
    pub fn refusal(&self) -> String {
        let text = String::from_utf8_lossy(&self.refusal);
        text.replace(char::is_control, " ").trim().to_owned()
    }

    /// Tokens of the present answer.
    pub fn tokens(&self) -> u64 {
        self.checker.tokens
    }

    /// When the tokens of the last read were sent, by the simulator's stamps, in microseconds of `CLOCK_MONOTONIC`.
    pub fn stamps(&mut self) -> &mut Vec<u64> {
        &mut self.checker.stamps
    }

    /// Starts a request, at once where the connection stands.
    pub fn start(&mut self, check: Check, order: Order) -> Progress {
        self.started_ns = Some(order.due_ns);
        self.leave_after = order.leave_after;
        self.expected_tokens = order.expected_tokens;
        self.request = Some(order.request);
        self.sent = 0;
        self.reusable = true;
        self.checker.reset(check);
        self.refusal.clear();
        if matches!(self.phase, Phase::Idle) {
            self.phase = Phase::Head;
        }
        self.on_writable()
    }

    /// Connects on, or writes on.
    pub fn on_writable(&mut self) -> Progress {
        if matches!(self.phase, Phase::Connecting) {
            match self.link.is_connected() {
                Ok(false) => return Progress::Going,
                Ok(true) if self.started_ns.is_some() => self.phase = Phase::Head,
                Ok(true) => self.phase = Phase::Idle,
                Err(error) => return self.broken(Outcome::Connect, error),
            }
        }
        while let Some(request) = self.request.as_ref().filter(|request| self.sent < request.len()) {
            match write_from(&mut self.link, request, self.sent) {
                Ok(written) => self.sent += written,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Progress::Going,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                // The answer may have come before the whole request was taken: reading tells.
                Err(_) => return Progress::Going,
            }
        }
        match self.link.flush() {
            Err(error) if error.kind() != ErrorKind::WouldBlock => self.broken(Outcome::Cut, error),
            _ => Progress::Going,
        }
    }

    /// Reads once. The bool says whether the socket may hold more.
    pub fn read(&mut self, plan: &Plan, input: &mut [u8]) -> (Progress, bool, Arrivals) {
        let mut arrivals = Arrivals {
            before: self.tokens(),
            after: 0,
            events: 0,
            bytes: 0,
        };
        let limit = plan.slow_read_bytes.unwrap_or(usize::MAX).min(input.len());
        let events_before = self.checker.events;
        let (progress, more) = match self.link.read(&mut input[..limit]) {
            Ok(0) => (self.on_end(plan), false),
            Ok(received) => {
                arrivals.bytes = received as u64;
                let more = received == limit || !self.link.short_read_is_empty();
                (self.take(plan, &input[..received]), more)
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => (Progress::Going, false),
            Err(error) if error.kind() == ErrorKind::Interrupted => (Progress::Going, true),
            Err(error) if matches!(self.phase, Phase::Connecting) => {
                (self.broken(Outcome::Connect, error), false)
            }
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => (self.on_end(plan), false),
            Err(error) => (self.broken(Outcome::Cut, error), false),
        };
        arrivals.after = self.tokens();
        arrivals.events = self.checker.events - events_before;
        (progress, more, arrivals)
    }

    /// The peer has closed.
    fn on_end(&mut self, plan: &Plan) -> Progress {
        match &self.phase {
            Phase::Body {
                status,
                framing: Framing::Close,
                ..
            } => {
                let status = *status;
                self.finish(plan, status)
            }
            _ => self.over(Outcome::Cut),
        }
    }

    /// An error ended the connection.
    fn broken(&mut self, outcome: Outcome, error: io::Error) -> Progress {
        self.error = Some(error);
        self.over(outcome)
    }

    /// The connection cannot go on.
    fn over(&mut self, outcome: Outcome) -> Progress {
        self.reusable = false;
        // Before the handshake is over there is no connection yet.
        let outcome = match outcome {
            Outcome::Cut if self.link.is_handshaking() => Outcome::Connect,
            other => other,
        };
        match self.started_ns {
            Some(_) => Progress::Ended(outcome),
            None => Progress::Gone,
        }
    }

    fn take(&mut self, plan: &Plan, input: &[u8]) -> Progress {
        match self.phase {
            // Bytes that nobody asked for.
            Phase::Connecting | Phase::Idle => self.over(Outcome::Malformed),
            Phase::Head if self.head.is_empty() && head_end(input).is_some() => self.take_head(plan, input),
            Phase::Head => {
                self.head.extend_from_slice(input);
                if head_end(&self.head).is_none() && self.head.len() <= HEAD_BYTES_MAX {
                    return Progress::Going;
                }
                let head = std::mem::take(&mut self.head);
                self.take_head(plan, &head)
            }
            Phase::Body { .. } => self.take_body(plan, input),
        }
    }

    fn take_head(&mut self, plan: &Plan, input: &[u8]) -> Progress {
        let Some(head_bytes) = head_end(input) else {
            return self.over(Outcome::Malformed);
        };
        let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
        let mut response = httparse::Response::new(&mut headers);
        let Ok(httparse::Status::Complete(_)) = response.parse(&input[..head_bytes]) else {
            return self.over(Outcome::Malformed);
        };
        let (Some(status), Some(fields)) = (response.code, Fields::read(response.headers)) else {
            return self.over(Outcome::Malformed);
        };
        if (100..200).contains(&status) {
            return if input.len() > head_bytes {
                self.take(plan, &input[head_bytes..])
            } else {
                Progress::Going
            };
        }
        let framing = match fields {
            Fields { chunked: true, .. } => Framing::Chunked(Dechunker::default()),
            Fields {
                content_length: Some(length),
                ..
            } => Framing::Length(length),
            _ => Framing::Close,
        };
        self.phase = Phase::Body {
            status,
            framing,
            close: fields.close,
        };
        self.take_body(plan, &input[head_bytes..])
    }

    fn take_body(&mut self, plan: &Plan, input: &[u8]) -> Progress {
        let Phase::Body {
            status,
            framing,
            close,
        } = &mut self.phase
        else {
            return Progress::Going;
        };
        let (status, close) = (*status, *close);
        let checker = &mut self.checker;
        let refusal = &mut self.refusal;
        let wanted = plan.part.expect_status == Some(status);
        let mut feed = |data: &[u8]| match (status, plan.stream) {
            (200, true) => checker.feed_stream(&plan.needles, data),
            (200, false) => checker.feed_plain(data),
            _ if wanted => {}
            _ => {
                let room = REFUSAL_BYTES - refusal.len();
                refusal.extend_from_slice(&data[..data.len().min(room)]);
            }
        };
        let mut eaten = 0;
        let done = match framing {
            Framing::Length(left) => {
                eaten = input.len().min(usize::try_from(*left).unwrap_or(usize::MAX));
                feed(&input[..eaten]);
                *left -= eaten as u64;
                *left == 0
            }
            Framing::Chunked(dechunker) => {
                while eaten < input.len() && !dechunker.is_done() {
                    let Ok((step, data)) = dechunker.step(&input[eaten..]) else {
                        return self.over(Outcome::Malformed);
                    };
                    feed(data.unwrap_or_default());
                    eaten += step;
                }
                dechunker.is_done()
            }
            Framing::Close => {
                feed(input);
                eaten = input.len();
                false
            }
        };
        if done {
            // Bytes behind the answer belong to no request.
            self.reusable = !close && eaten == input.len();
            return self.finish(plan, status);
        }
        match self.leave_after {
            Some(tokens) if self.checker.tokens >= tokens => self.over(Outcome::HungUp),
            _ => Progress::Going,
        }
    }

    fn finish(&mut self, plan: &Plan, status: u16) -> Progress {
        self.reusable &= !matches!(
            self.phase,
            Phase::Body {
                framing: Framing::Close,
                ..
            }
        );
        // An answer that came before the whole request was taken leaves the rest of it in the way.
        self.reusable &= self
            .request
            .take()
            .is_none_or(|request| self.sent == request.len());
        self.phase = Phase::Idle;
        let flaw = match (status, plan.stream) {
            (200, true) => self.checker.stream_flaw(self.expected_tokens),
            (200, false) => self.checker.plain_flaw(self.expected_tokens),
            _ => None,
        };
        Progress::Ended(flaw.map_or(Outcome::Whole(status), Outcome::Flawed))
    }
}

/// Writes what is left of `request` behind its first `sent` bytes.
fn write_from(link: &mut Link, request: &Request, sent: usize) -> io::Result<usize> {
    match request.head.get(sent..) {
        Some(head) if !head.is_empty() => {
            link.write_vectored(&[IoSlice::new(head), IoSlice::new(&request.tail)])
        }
        _ => link.write(&request.tail[sent - request.head.len()..]),
    }
}
