//! The event loop of one thread of the simulator.

use std::io::{self, ErrorKind};
use std::sync::Arc;
use std::sync::atomic::{
    AtomicBool,
    Ordering::{Acquire, Relaxed},
};
use std::time::{Duration, Instant};

use mio::net::TcpListener;
use mio::{Events, Interest, Poll, Token, Waker};

use super::conn::{Connection, Context, Shared, Wait};
use super::socket::Socket;
use super::stats::count;
use crate::random::Random;
use crate::slab::Slab;
use crate::sys;
use crate::wheel::{Fired, Wheel};

/// Events that one call of `epoll_wait` may return.
const EVENTS_MAX: usize = 1024;
/// Bytes of one read.
const READ_BYTES: usize = 64 * 1024;
/// How long a listener rests that has run out of descriptors.
const ACCEPT_REST: Duration = Duration::from_millis(20);
/// Connections have their index as token; listeners count down from below the waker's.
const WAKER: Token = Token(usize::MAX);

pub struct Reactor {
    poll: Poll,
    listeners: Vec<TcpListener>,
    /// Whether some listener may have more to accept than its last event told.
    accept_again: bool,
    connections: Slab<Connection>,
    wheel: Wheel,
    epoch: Instant,
    /// Connections that gave up their turn with work left.
    turns: Vec<usize>,
    shared: Arc<Shared>,
    stop: Arc<AtomicBool>,
    input: Vec<u8>,
    event: Vec<u8>,
    next_id: u64,
    random: Random,
}

impl Reactor {
    pub fn new(
        mut listeners: Vec<TcpListener>,
        shared: Arc<Shared>,
        stop: Arc<AtomicBool>,
    ) -> io::Result<(Self, Waker)> {
        let poll = Poll::new()?;
        let waker = Waker::new(poll.registry(), WAKER)?;
        for (endpoint, listener) in listeners.iter_mut().enumerate() {
            poll.registry()
                .register(listener, listener_token(endpoint), Interest::READABLE)?;
        }
        let reactor = Self {
            poll,
            listeners,
            accept_again: false,
            connections: Slab::default(),
            wheel: Wheel::new(),
            epoch: Instant::now(),
            turns: Vec::new(),
            shared,
            stop,
            input: vec![0; READ_BYTES],
            event: Vec::new(),
            next_id: 0,
            random: Random::new(1),
        };
        Ok((reactor, waker))
    }

    pub fn run(mut self) -> io::Result<()> {
        let mut events = Events::with_capacity(EVENTS_MAX);
        let mut fired: Vec<Fired> = Vec::new();
        let mut turns: Vec<usize> = Vec::new();
        while !self.stop.load(Acquire) {
            let wait = self.timeout();
            let timed = wait.filter(|time| !time.is_zero());
            if timed.is_some_and(|time| !sys::wait_readable(&self.poll, time)) {
                // Mostly only timers have come due.
                events.clear();
            } else {
                match self
                    .poll
                    .poll(&mut events, timed.map_or(wait, |_| Some(Duration::ZERO)))
                {
                    Ok(()) => {}
                    Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                    Err(error) => return Err(error),
                }
            }
            std::mem::swap(&mut turns, &mut self.turns);
            for index in turns.drain(..) {
                self.drive(index, Connection::go_on);
            }
            for event in &events {
                match self.endpoint_of(event.token()) {
                    Some(endpoint) => self.accept(endpoint),
                    None if event.is_read_closed() || event.is_error() => {
                        self.drive(event.token().0, Connection::on_closing);
                    }
                    None if event.is_readable() => self.drive(event.token().0, Connection::on_readable),
                    None => self.drive(event.token().0, Connection::go_on),
                }
            }
            if std::mem::take(&mut self.accept_again) {
                (0..self.listeners.len()).for_each(|endpoint| self.accept(endpoint));
            }
            let now_ns = self.now_ns();
            self.wheel.expire(now_ns, &mut fired);
            for timer in fired.drain(..) {
                let Some(connection) = self.connections.get_mut(timer.owner) else {
                    continue;
                };
                if connection.timer == timer.sequence {
                    connection.timer = 0;
                    self.drive(timer.owner, Connection::go_on);
                }
            }
        }
        Ok(())
    }

    fn now_ns(&self) -> u64 {
        self.epoch.elapsed().as_nanos() as u64
    }

    fn timeout(&self) -> Option<Duration> {
        if !self.turns.is_empty() {
            return Some(Duration::ZERO);
        }
        let next = self.wheel.next_in_ns(self.now_ns()).map(Duration::from_nanos);
        match (next, self.accept_again) {
            (Some(next), true) => Some(next.min(ACCEPT_REST)),
            (None, true) => Some(ACCEPT_REST),
            (next, false) => next,
        }
    }

    fn endpoint_of(&self, token: Token) -> Option<usize> {
        (0..self.listeners.len()).find(|endpoint| listener_token(*endpoint) == token)
    }

    fn accept(&mut self, endpoint: usize) {
        loop {
            match self.listeners[endpoint].accept() {
                Ok((mut socket, _)) => {
                    // Only a socket that died already refuses the option.
                    let _ = socket.set_nodelay(true);
                    let index = self.connections.vacant();
                    let interest = Interest::READABLE | Interest::WRITABLE;
                    if self
                        .poll
                        .registry()
                        .register(&mut socket, Token(index), interest)
                        .is_err()
                    {
                        count(&self.shared.counters.accept_errors);
                        continue;
                    }
                    let Ok(socket) = Socket::new(socket, self.shared.tls.as_ref()) else {
                        count(&self.shared.counters.accept_errors);
                        continue;
                    };
                    self.connections.insert(Connection::new(socket, endpoint));
                    count(&self.shared.counters.connections_total);
                    count(&self.shared.counters.connections_open);
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => {
                    // Out of descriptors, or a peer that left in the queue: the edge is used up, so ask again.
                    count(&self.shared.counters.accept_errors);
                    self.accept_again = true;
                    return;
                }
            }
        }
    }

    /// Lets a connection do `work` and then waits for what it says.
    fn drive(&mut self, index: usize, work: fn(&mut Connection, &mut Context<'_>) -> Wait) {
        let now_ns = self.now_ns();
        let Some(connection) = self.connections.get_mut(index) else {
            return;
        };
        let mut context = Context {
            shared: &self.shared,
            now_ns,
            input: &mut self.input,
            event: &mut self.event,
            next_id: &mut self.next_id,
            random: &mut self.random,
        };
        let wait = work(connection, &mut context);
        match wait {
            Wait::Socket => connection.timer = 0,
            Wait::Until(at_ns) => connection.wait_until(at_ns, index, &mut self.wheel),
            Wait::Turn => {
                connection.timer = 0;
                self.turns.push(index);
            }
            Wait::Close => self.close(index),
        }
    }

    fn close(&mut self, index: usize) {
        let Some(mut connection) = self.connections.remove(index) else {
            return;
        };
        // The descriptor is closed next, which ends its registration in any case.
        let _ = self.poll.registry().deregister(connection.socket());
        let counters = &self.shared.counters;
        counters.connections_open.fetch_sub(1, Relaxed);
        if connection.has_stream() {
            counters.streams_open.fetch_sub(1, Relaxed);
        }
    }
}

fn listener_token(endpoint: usize) -> Token {
    Token(usize::MAX - 1 - endpoint)
}
