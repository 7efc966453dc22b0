//! One exchange with an upstream: the request's head, the connection, the answer's framing.

use std::{io, rc::Rc, sync::Arc, time::Duration};

use crate::{
    bounds::HEAD_BYTES_MAX,
    config::units::Secret,
    core::Core,
    dialect::Api,
    fleet::Endpoint,
    http::{
        chunked::{ChunkedDecoder, Decoded},
        head::{RequestHead, ResponseFraming, ResponseHead},
    },
    ledger::record::RequestId,
    net::Conn,
};

/// The client's fields that go on to the upstream, as lines ready to send. Credentials, what concerns the
/// client's own connection, and what tells about its network stay here; unknown fields go on.
pub fn forwarded(head: &RequestHead, bytes: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(512);
    for field in &head.fields {
        let name = field.name.of(bytes);
        if !head.is_end_to_end(bytes, field) || is_kept_back(name) {
            continue;
        }
        out.extend_from_slice(name);
        out.extend_from_slice(b": ");
        out.extend_from_slice(field.value.of(bytes));
        out.extend_from_slice(b"\r\n");
    }
    out
}

fn is_kept_back(name: &[u8]) -> bool {
    const KEPT_BACK: [&str; 17] = [
        "host",
        "authorization",
        "x-api-key",
        "x-goog-api-key",
        "api-key",
        "cookie",
        "content-length",
        "expect",
        // Answers must come as they are, to be read along.
        "accept-encoding",
        "forwarded",
        "x-real-ip",
        "x-request-id",
        // Which of the operator's accounts is used is not the client's choice.
        "openai-organization",
        "openai-project",
        "origin",
        "referer",
        "via",
    ];
    let starts =
        |prefix: &[u8]| name.len() >= prefix.len() && name[..prefix.len()].eq_ignore_ascii_case(prefix);
    KEPT_BACK
        .into_iter()
        .any(|other| name.eq_ignore_ascii_case(other.as_bytes()))
        || starts(b"x-forwarded-")
        || starts(b"x-gateway-")
}

/// The head of the request to an endpoint.
pub fn request_head(
    endpoint: &Endpoint,
    api: Api,
    authorization: Option<&Secret>,
    id: RequestId,
    fields: &[u8],
    body_bytes: usize,
) -> Vec<u8> {
    let mut out = Vec::with_capacity(fields.len() + 384);
    out.extend_from_slice(b"POST ");
    // A base URL may be written with its /v1, as OpenAI's clients want it.
    let prefix = endpoint.url.prefix.trim_end_matches('/');
    out.extend_from_slice(prefix.strip_suffix("/v1").unwrap_or(prefix).as_bytes());
    out.extend_from_slice(api.path().as_bytes());
    out.extend_from_slice(b" HTTP/1.1\r\nhost: ");
    out.extend_from_slice(endpoint.authority.as_bytes());
    if let Some(authorization) = authorization {
        out.extend_from_slice(b"\r\nauthorization: ");
        out.extend_from_slice(authorization.expose().as_bytes());
    }
    out.extend_from_slice(b"\r\nx-request-id: ");
    out.extend_from_slice(&id.hex());
    out.extend_from_slice(b"\r\ncontent-length: ");
    out.extend_from_slice(itoa::Buffer::new().format(body_bytes).as_bytes());
    out.extend_from_slice(b"\r\n");
    out.extend_from_slice(fields);
    out.extend_from_slice(b"\r\n");
    out
}

/// An upstream that has answered, or is about to. Dropped before its answer's end, it closes the connection: that
/// is how a running generation is cancelled.
pub struct Upstream {
    pub endpoint: Arc<Endpoint>,
    /// Taken out when it goes back to the pool.
    conn: Option<Conn>,
    /// The answer's head and where it stands.
    pub head: ResponseHead,
    /// What has been received and not consumed; begins with the head until that is dropped.
    pub received: Vec<u8>,
    body: BodyEnd,
    core: Rc<Core>,
}

/// How the end of the answer's body is found, and how far it is.
enum BodyEnd {
    Length(u64),
    Chunked(ChunkedDecoder),
    UntilClose,
}

/// Why an upstream's bytes cannot be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Broken {
    /// The connection failed or ended too early.
    Cut,
    /// What came is not HTTP/1.1.
    Malformed,
}

impl Upstream {
    /// Begins an exchange on a connection.
    pub fn new(core: &Rc<Core>, endpoint: &Arc<Endpoint>, conn: Conn) -> Upstream {
        core.pool.borrow_mut().begin(endpoint.id);
        Upstream {
            endpoint: endpoint.clone(),
            conn: Some(conn),
            head: ResponseHead::default(),
            received: Vec::new(),
            body: BodyEnd::Length(0),
            core: core.clone(),
        }
    }

    /// The core that it belongs to.
    pub fn core(&self) -> &Rc<Core> {
        &self.core
    }

    /// The connection.
    pub fn conn(&mut self) -> io::Result<&mut Conn> {
        self.conn
            .as_mut()
            .ok_or_else(|| io::ErrorKind::NotConnected.into())
    }

    /// Receives the head of the answer; interim answers (1xx) are passed over.
    pub async fn receive_head(&mut self) -> Result<(), Broken> {
        // No upstream has answered already; to look would cost a system call for nothing.
        self.conn.as_ref().ok_or(Broken::Cut)?.readable().await;
        loop {
            let method = crate::http::head::Method::Post;
            match self.head.parse(&self.received, method) {
                // Nobody asked to switch protocols.
                Ok(true) if self.head.status == 101 => return Err(Broken::Malformed),
                Ok(true) if (100..200).contains(&self.head.status) => {
                    self.received.drain(..self.head.len);
                    continue;
                }
                Ok(true) => break,
                Ok(false) => {}
                Err(_) => return Err(Broken::Malformed),
            }
            let conn = self.conn.as_mut().ok_or(Broken::Cut)?;
            let got = {
                let scratch = &mut *self.core.scratch();
                // A read beyond the head's bound would be the body's business.
                let room = scratch.len().min(HEAD_BYTES_MAX);
                let got = conn.try_read(&mut scratch[..room]).map_err(|_| Broken::Cut)?;
                self.received.extend_from_slice(&scratch[..got.unwrap_or(0)]);
                got
            };
            match got {
                Some(0) => return Err(Broken::Cut),
                Some(_) => {}
                None => conn.readable().await,
            }
        }
        self.body = match self.head.framing {
            ResponseFraming::None => BodyEnd::Length(0),
            ResponseFraming::Length(length) => BodyEnd::Length(length),
            ResponseFraming::Chunked => BodyEnd::Chunked(ChunkedDecoder::new()),
            ResponseFraming::UntilClose => BodyEnd::UntilClose,
        };
        Ok(())
    }

    /// Takes the framing off bytes of the body, in place.
    pub fn deframe(&mut self, bytes: &mut [u8]) -> Result<Decoded, Broken> {
        match &mut self.body {
            BodyEnd::Length(left) => {
                let take = usize::try_from(*left).unwrap_or(usize::MAX).min(bytes.len());
                *left -= take as u64;
                Ok(Decoded {
                    payload: 0..take,
                    consumed: take,
                    done: *left == 0,
                })
            }
            BodyEnd::Chunked(decoder) => decoder.decode(bytes).map_err(|_| Broken::Malformed),
            BodyEnd::UntilClose => Ok(Decoded {
                payload: 0..bytes.len(),
                consumed: bytes.len(),
                done: false,
            }),
        }
    }

    /// Whether the end of the connection is the proper end of the body.
    pub fn ends_by_close(&self) -> bool {
        matches!(self.body, BodyEnd::UntilClose)
    }

    /// The length of the body, where it is told.
    pub fn length(&self) -> Option<u64> {
        match self.head.framing {
            ResponseFraming::None => Some(0),
            ResponseFraming::Length(length) => Some(length),
            _ => None,
        }
    }

    /// Waits at most `time` for the rest of a request to be written.
    pub async fn send(&mut self, pieces: &[&[u8]], stall: Duration) -> io::Result<()> {
        self.conn()?.write_slices(pieces, stall).await
    }

    /// Gives the connection back to the pool: the answer has been read to its end, and nothing follows it.
    pub fn finish(mut self, left_over: bool) {
        let reusable = self.head.keep_alive && !left_over && !self.ends_by_close();
        if let Some(conn) = self.conn.take().filter(|_| reusable) {
            self.core.pool.borrow_mut().keep(&self.endpoint, conn);
        }
    }
}

impl Drop for Upstream {
    fn drop(&mut self) {
        self.core.pool.borrow_mut().end(self.endpoint.id);
    }
}
