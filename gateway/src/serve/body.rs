//! Receiving a request's body.

use std::{rc::Rc, time::Duration};

use super::{connection::Client, snapshot::Http};
use crate::{
    core::{Core, Share},
    error::{Error, Kind},
    http::{
        chunked::ChunkedDecoder,
        head::{Framing, Version},
    },
    net::{Either, race, sleep},
};

/// First capacity of a body. It then doubles as bytes come, so that a client that only claims a length does not
/// cost its length.
const FIRST_BYTES: usize = 16 * 1024;

/// Seconds after which a client that met a full gateway may try again.
const RETRY_AFTER_S: u64 = 1;

/// A request's body, and its share of the core's bound, which it gives back when it is dropped.
pub struct Body {
    bytes: Vec<u8>,
    share: Share,
    /// Its first capacity.
    first: usize,
}

impl Body {
    /// An empty body.
    pub fn empty(core: &Rc<Core>) -> Body {
        Body {
            bytes: Vec::new(),
            share: Share::new(core),
            first: FIRST_BYTES,
        }
    }

    /// What was received.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Makes room for `more` bytes within the bounds of body and core.
    fn reserve(&mut self, more: usize, body_max: usize, bodies_max: usize) -> Result<(), Error> {
        let wanted = self.bytes.len() + more;
        if wanted > body_max {
            let message = format!("the request body is larger than {body_max} bytes");
            return Err(Error::new(Kind::BodyTooLarge, message));
        }
        let counted = self.share.bytes();
        if wanted <= counted {
            return Ok(());
        }
        let target = wanted.max(counted * 2).max(self.first).min(body_max);
        if self.share.all_bytes() + (target - counted) > bodies_max {
            let full = "the gateway holds too many request bodies; try again";
            return Err(Error {
                retry_after_s: Some(RETRY_AFTER_S),
                ..Error::new(Kind::Overloaded, full)
            });
        }
        self.share.set(target);
        self.bytes.reserve_exact(target - self.bytes.len());
        Ok(())
    }
}

/// Why a body could not be received.
pub enum Failed {
    /// To be answered; where the next request begins is not known.
    Error(Error),
    /// The client is gone.
    Gone,
}

impl From<Error> for Failed {
    fn from(error: Error) -> Failed {
        Failed::Error(error)
    }
}

/// Receives the body of the client's current request. Afterwards `client.inbuf` is what came behind it, a
/// next request's beginning; the head is gone from it.
pub async fn receive(client: &mut Client, core: &Rc<Core>, http: Http) -> Result<Body, Failed> {
    let mut body = Body::empty(core);
    if let Framing::Length(length) = client.head.framing {
        let length = usize::try_from(length).unwrap_or(usize::MAX);
        // Says no before anything is received, also to a client that waits to be told so.
        if length > http.body_bytes_max {
            body.reserve(length, http.body_bytes_max, http.bodies_bytes_max)?;
        }
    }
    // From here on nobody may look for the head, or what it spans, in `inbuf`.
    client.inbuf.drain(..client.head.len);
    client.head.len = 0;
    client.body_is_open = client.head.framing != Framing::None;
    if client.head.expect_continue && client.head.version == Version::Http11 && client.inbuf.is_empty() {
        let interim = b"HTTP/1.1 100 Continue\r\n\r\n";
        client
            .conn
            .write_all(interim, client.stall)
            .await
            .map_err(|_| Failed::Gone)?;
    }
    let bounds = (http.body_bytes_max, http.bodies_bytes_max);
    match client.head.framing {
        Framing::None => {}
        Framing::Length(length) => {
            receive_length(
                client,
                core,
                &mut body,
                length as usize,
                bounds,
                http.body_timeout,
            )
            .await?;
        }
        Framing::Chunked => receive_chunked(client, core, &mut body, bounds, http.body_timeout).await?,
    }
    client.body_is_open = false;
    if client.inbuf.is_empty() {
        // The answer may be a stream of minutes, which is not to hold the room of what was received.
        client.inbuf = Vec::new();
    }
    core.telemetry
        .counters()
        .bytes_from_clients
        .add(body.bytes.len() as u64);
    Ok(body)
}

async fn receive_length(
    client: &mut Client,
    core: &Rc<Core>,
    body: &mut Body,
    length: usize,
    (body_max, bodies_max): (usize, usize),
    silence: Duration,
) -> Result<(), Failed> {
    body.first = length.min(FIRST_BYTES);
    let here = client.inbuf.len().min(length);
    body.reserve(here, body_max, bodies_max)?;
    body.bytes.extend(client.inbuf.drain(..here));
    while body.bytes.len() < length {
        let got = {
            let scratch = &mut *core.scratch();
            let room = scratch.len().min(length - body.bytes.len());
            let got = client
                .conn
                .try_read(&mut scratch[..room])
                .map_err(|_| Failed::Gone)?;
            if let Some(n) = got {
                body.reserve(n, body_max, bodies_max)?;
                body.bytes.extend_from_slice(&scratch[..n]);
            }
            got
        };
        match got {
            Some(0) => return Err(Failed::Gone),
            Some(_) => {}
            None => wait(client, silence).await?,
        }
    }
    Ok(())
}

async fn receive_chunked(
    client: &mut Client,
    core: &Rc<Core>,
    body: &mut Body,
    (body_max, bodies_max): (usize, usize),
    silence: Duration,
) -> Result<(), Failed> {
    let mut decoder = ChunkedDecoder::new();
    let malformed = |error: crate::http::chunked::ChunkError| {
        Failed::Error(Error::new(
            Kind::BadRequest,
            format!("malformed chunked body: {error}"),
        ))
    };
    loop {
        if !client.inbuf.is_empty() {
            let decoded = decoder.decode(&mut client.inbuf).map_err(malformed)?;
            body.reserve(decoded.payload.len(), body_max, bodies_max)?;
            body.bytes.extend_from_slice(&client.inbuf[decoded.payload]);
            client.inbuf.drain(..decoded.consumed);
            if decoded.done {
                return Ok(());
            }
        }
        let got = {
            let scratch = &mut *core.scratch();
            let got = client.conn.try_read(scratch).map_err(|_| Failed::Gone)?;
            client.inbuf.extend_from_slice(&scratch[..got.unwrap_or(0)]);
            got
        };
        match got {
            Some(0) => return Err(Failed::Gone),
            Some(_) => {}
            None => wait(client, silence).await?,
        }
    }
}

async fn wait(client: &Client, silence: Duration) -> Result<(), Failed> {
    match race(client.conn.readable(), sleep(silence)).await {
        Either::First(()) => Ok(()),
        Either::Second(()) => {
            let message = "the request body did not come in time";
            Err(Error::new(Kind::RequestTimeout, message).into())
        }
    }
}
