//! A client's connection: one request after the other, and its end.

use std::{io, net::IpAddr, rc::Rc, sync::Arc, time::Duration};

use rustls::ServerConfig;

use super::{answer, ends::End, preface, relay::Stream, request, snapshot::Http, trust::Trust};
use crate::{
    core::{Core, DRAIN, STOP, seats::Seat},
    error::{Dialect, Error, Kind},
    http::head::{HeadError, RequestHead},
    net::{Conn, Either, clock, race, runtime::yield_now, sleep, tcp::Sock, tls},
    quota::refusals::{Origin, Via},
    telemetry::clients::Event,
};

/// How long a connection that is closed after an error is read on, so that the client gets to see the error
/// instead of a reset (RFC 9112, section 9.6), and how much of what it still sends.
const LINGER_TIME: Duration = Duration::from_secs(2);
const LINGER_BYTES_MAX: usize = 1024 * 1024;

/// Bytes of a next request that are taken in while an answer is streamed. What a client sends beyond
/// waits in the kernel, and its hang-up is then noticed by writing only.
const AHEAD_BYTES_MAX: usize = 64 * 1024;

/// Requests in a row that a client may have sent before the answer to the one before; then others have their turn: it
/// would otherwise have the core for itself, ticks and all.
const HEADS_IN_A_ROW: u32 = 64;

/// What a request leaves its connection as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// Ready for the next request.
    KeepAlive,
    /// To be closed, after the client has had time to read.
    Close,
    /// Broken: nothing more can be said on it.
    Gone,
}

/// What became of a request.
pub enum Served {
    Done(Next),
    /// The answer is a stream, still to be run.
    Stream(Box<Stream>),
}

/// A connected client.
pub struct Client {
    /// The stream itself.
    pub conn: Conn,
    /// Whom limits and blocks apply to: the client of the current request, or who is next to us before one has come.
    pub origin: Origin,
    /// Tells when that client is turned away.
    pub seat: Rc<Seat>,
    /// Who is at the other end, as the connection or its PROXY header says.
    hop: Origin,
    /// What proxies are believed; none where no proxy stands before the listener.
    trust: Option<Arc<Trust>>,
    /// Bytes received and not consumed. While a request runs it begins with the request's head.
    pub inbuf: Vec<u8>,
    /// The head of the current request; its length is 0 when it has been consumed.
    pub head: RequestHead,
    /// The current request's body has not been received to its end: where the next request begins is not known.
    pub body_is_open: bool,
    /// The longest time that the client may take nothing of an answer.
    pub stall: Duration,
    /// Requests since the last that the client sent behind an answer.
    heads_in_a_row: u32,
}

/// What a client did while it was being answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ahead {
    /// It has hung up.
    Gone,
    /// It is there; there may be more to learn.
    More,
    /// It has sent so much ahead that it is not read any more: only writing finds its end.
    Full,
}

/// How waiting for a head ended.
enum Awaited {
    Head,
    /// The client has nothing more to ask, or is gone, or was idle for too long.
    End,
    /// A head began and did not end in time.
    TooSlow,
    /// The client is turned away, and has begun a request.
    TurnedAway,
    Bad(HeadError),
}

/// Serves a connection from its beginning to its end.
pub async fn run(
    core: Rc<Core>,
    sock: Rc<Sock>,
    peer: Origin,
    tls: Option<Arc<ServerConfig>>,
    trust: Option<Arc<Trust>>,
) {
    let Http {
        head_timeout,
        idle_timeout,
        write_timeout,
        ..
    } = core.snapshot().http;
    let hop = match &trust {
        None => peer,
        Some(trust) => match preface::hop(&core, &sock, peer, trust, head_timeout).await {
            Some(hop) => hop,
            None => return,
        },
    };
    let sitting = core.seats.take();
    let _open = Open::new(&core, hop.ip);
    sitting.seat.serve((hop.via != Via::Proxy).then_some(hop));
    let conn = match tls {
        None => Conn::plain(sock),
        // Boxed, as all that a connection does once: while it waits it has no room for it.
        Some(config) => match Box::pin(handshake(&core, sock, &config, head_timeout)).await {
            Some(conn) => conn,
            None => return,
        },
    };
    let mut client = Client {
        conn,
        origin: hop,
        seat: sitting.seat.clone(),
        hop,
        trust,
        inbuf: Vec::new(),
        head: RequestHead::new(),
        body_is_open: false,
        stall: write_timeout,
        heads_in_a_row: 0,
    };
    let mut idle = head_timeout;
    let mut is_new = true;
    loop {
        match client.await_head(&core, idle, head_timeout, is_new).await {
            Awaited::Head => client.identify(),
            Awaited::End => return client.conn.shutdown(),
            Awaited::TooSlow => {
                let error = Error::new(Kind::RequestTimeout, "the request head did not come in time");
                return Box::pin(client.refuse_head(&core, &error)).await;
            }
            Awaited::TurnedAway => {
                core.telemetry.counters().clients_turned_away.inc();
                return Box::pin(client.refuse_head(&core, &End::Blocked.error())).await;
            }
            Awaited::Bad(error) => {
                let mut answer = Error::new(Kind::BadRequest, error.to_string());
                answer.status = Some(error.status());
                return Box::pin(client.refuse_head(&core, &answer)).await;
            }
        }
        // Boxed: an idle connection holds no room for a request's state, and a stream, which may run for minutes, none
        // for what came before it.
        let next = match Box::pin(request::serve(&mut client, &core)).await {
            Served::Done(next) => next,
            Served::Stream(stream) => Box::pin(stream.run(&mut client)).await,
        };
        match next {
            Next::KeepAlive if core.drain.level() < DRAIN => {}
            Next::KeepAlive => return client.conn.shutdown(),
            Next::Close => return Box::pin(client.linger(&core)).await,
            Next::Gone => return,
        }
        client.forget_request();
        idle = idle_timeout;
        is_new = false;
    }
}

/// Counts a client's connection for as long as it is open.
struct Open<'c> {
    core: &'c Core,
    client: IpAddr,
}

impl Open<'_> {
    fn new(core: &Core, client: IpAddr) -> Open<'_> {
        core.telemetry.client(client, Event::Opened);
        Open { core, client }
    }
}

impl Drop for Open<'_> {
    fn drop(&mut self) {
        self.core.telemetry.client(self.client, Event::Closed);
    }
}

async fn handshake(
    core: &Rc<Core>,
    sock: Rc<Sock>,
    config: &Arc<ServerConfig>,
    time: Duration,
) -> Option<Conn> {
    let session = tls::server_session(config).ok()?;
    match Conn::tls(sock, session, time).await {
        Ok(conn) => {
            core.telemetry.counters().tls_handshakes.inc();
            Some(conn)
        }
        Err(error) => {
            core.telemetry.counters().tls_failures.inc();
            tracing::debug!(%error, "TLS handshake failed");
            None
        }
    }
}

impl Client {
    /// Finds out whose request the head is.
    fn identify(&mut self) {
        let Some(trust) = &self.trust else { return };
        self.origin = trust.client(self.hop, &self.head, &self.inbuf);
        self.seat
            .serve((self.origin.via != Via::Proxy).then_some(self.origin));
    }

    /// Between two requests of a proxy's connection it serves nobody who could be turned away.
    fn forget_request(&mut self) {
        if self.hop.via == Via::Proxy {
            self.origin = self.hop;
            self.seat.serve(None);
        }
    }

    /// Waits for a whole head: at most `idle` for its first byte, `whole` for the rest.
    /// `look`: read before the first wait.
    async fn await_head(
        &mut self,
        core: &Rc<Core>,
        idle: Duration,
        whole: Duration,
        mut look: bool,
    ) -> Awaited {
        // A byte that is none of a head (a part of a TLS record) does not make the connection less idle.
        let idle_until_ns = clock::turn_ns() + idle.as_nanos() as u64;
        let mut deadline_ns = None;
        self.heads_in_a_row = if self.inbuf.is_empty() {
            0
        } else {
            self.heads_in_a_row + 1
        };
        if self.heads_in_a_row >= HEADS_IN_A_ROW {
            self.heads_in_a_row = 0;
            yield_now().await;
        }
        loop {
            if !self.inbuf.is_empty() {
                match self.head.parse(&self.inbuf) {
                    Ok(true) => return Awaited::Head,
                    Ok(false) => {}
                    Err(error) => return Awaited::Bad(error),
                }
            }
            // On a new connection the request is mostly there already; behind an answer it is not, and to look would
            // cost a system call for nothing.
            if std::mem::replace(&mut look, true) {
                match self.receive(core) {
                    Ok(Some(0)) | Err(_) => return Awaited::End,
                    Ok(Some(_)) => continue,
                    Ok(None) => {}
                }
            }
            if self.inbuf.is_empty() {
                // An idle connection owns no buffer.
                self.inbuf = Vec::new();
                let left = idle_until_ns.saturating_sub(clock::turn_ns());
                let ends = race(core.drain.reached(DRAIN), self.seat.blocked());
                let quiet = race(core.late(Duration::from_nanos(left)), ends);
                match race(self.conn.readable(), quiet).await {
                    Either::First(()) => {}
                    Either::Second(_) => return Awaited::End,
                }
                continue;
            }
            let now_ns = clock::turn_ns();
            let deadline_ns = *deadline_ns.get_or_insert(now_ns + whole.as_nanos() as u64);
            let left = Duration::from_nanos(deadline_ns.saturating_sub(now_ns));
            let ends = race(core.late(left), core.drain.reached(STOP));
            match race(self.conn.readable(), race(ends, self.seat.blocked())).await {
                Either::First(()) => {}
                Either::Second(Either::First(_)) => return Awaited::TooSlow,
                Either::Second(Either::Second(())) => return Awaited::TurnedAway,
            }
        }
    }

    /// Takes in what has arrived.
    fn receive(&mut self, core: &Rc<Core>) -> io::Result<Option<usize>> {
        let scratch = &mut *core.scratch();
        let got = self.conn.try_read(scratch)?;
        if let Some(n) = got {
            self.inbuf.extend_from_slice(&scratch[..n]);
            core.telemetry.counters().bytes_from_clients.add(n as u64);
        }
        Ok(got)
    }

    /// Comes back when the client has hung up. What it sends meanwhile (a next request) is taken in, within
    /// bounds. Can be dropped and begun again without losing anything.
    ///
    /// Looks first at the core's next tick: most requests are over by then and never ask the kernel to watch.
    pub async fn gone(&mut self, core: &Rc<Core>) {
        core.ticks.next().await;
        loop {
            self.conn.readable().await;
            match self.look_ahead(core) {
                Ahead::Gone => return,
                Ahead::More => {}
                Ahead::Full => std::future::pending().await,
            }
        }
    }

    /// Takes in what a client sent before it was its turn, or learns that it has hung up. Never waits.
    pub fn look_ahead(&mut self, core: &Rc<Core>) -> Ahead {
        // Every request looks ahead anew, and may be shorter than what a look takes in.
        if self.inbuf.len() >= AHEAD_BYTES_MAX {
            return Ahead::Full;
        }
        match self.receive(core) {
            Ok(Some(0)) | Err(_) => Ahead::Gone,
            Ok(_) if self.inbuf.len() < AHEAD_BYTES_MAX => Ahead::More,
            Ok(_) => Ahead::Full,
        }
    }

    /// Answers a head that is no request, and closes.
    async fn refuse_head(&mut self, core: &Rc<Core>, error: &Error) {
        let head = answer::Head {
            keep_alive: false,
            ..answer::Head::default()
        };
        let bytes = answer::error(error, Dialect::OpenAi, head);
        if !self.seat.is_blocked() {
            core.note_refusal(self.origin, error);
        }
        if self.conn.write_all(&bytes, self.stall).await.is_ok() {
            self.linger(core).await;
        }
    }

    /// Closes so that the client can still read what was sent: ends this side, then reads on for a while.
    async fn linger(&mut self, core: &Rc<Core>) {
        self.conn.shutdown();
        self.inbuf = Vec::new();
        let drain = async {
            let mut left = LINGER_BYTES_MAX;
            while left > 0 {
                self.conn.readable().await;
                let got = self.conn.try_read(&mut core.scratch());
                match got {
                    Ok(Some(0)) | Err(_) => return,
                    Ok(Some(n)) => left = left.saturating_sub(n),
                    Ok(None) => {}
                }
            }
        };
        race(drain, race(sleep(LINGER_TIME), core.drain.reached(STOP))).await;
    }
}
