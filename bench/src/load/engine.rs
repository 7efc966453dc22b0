//! The event loop of the load generator.

use std::io::{self, ErrorKind};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mio::{Events, Interest, Poll, Token};
use rustls::ClientConfig;
use rustls::pki_types::ServerName;

use super::client::{Client, Outcome, Plan, Progress};
use super::link::{Link, Trust};
use super::tally::Tally;
use super::{Options, Url};
use crate::slab::Slab;
use crate::wheel::{Fired, TICK_NS, Wheel};

/// Events that one call of `epoll_wait` may return.
const EVENTS_MAX: usize = 1024;
/// Bytes of one read.
const READ_BYTES: usize = 64 * 1024;
/// Reads that one connection may do before the others have their turn.
const READS_A_TURN: usize = 16;
/// Connections opened in one turn of the loop: a backlog must not overflow.
const OPENS_A_TURN: usize = 64;
/// How long nothing is started after a connection has failed.
const CONNECT_REST_NS: u64 = 10_000_000;

pub(super) struct Engine<'a> {
    options: &'a Options,
    plan: Plan,
    peer: SocketAddr,
    tls: Option<(Arc<ClientConfig>, ServerName<'static>)>,
    poll: Poll,
    epoch: Instant,
    wheel: Wheel,
    clients: Slab<Client>,
    /// Connections without a request, the warmest last.
    free: Vec<usize>,
    /// Connections with input left when their turn ended.
    turns: Vec<usize>,
    input: Vec<u8>,
    tally: Tally,
    /// Requests started.
    started: u64,
    /// Requests under way.
    active: usize,
    /// Nothing is started before this time.
    rest_until_ns: u64,
    /// The start that is due has been counted as late.
    late: bool,
    timeout_ns: u64,
}

impl<'a> Engine<'a> {
    pub fn new(options: &'a Options, plan: Plan, url: &Url) -> io::Result<Self> {
        let tls = if url.tls {
            let trust = options.trust.as_ref().unwrap_or(&Trust::Anything);
            let name = ServerName::try_from(url.host.clone()).map_err(io::Error::other)?;
            Some((trust.config()?, name))
        } else {
            None
        };
        Ok(Self {
            options,
            plan,
            peer: url.resolve()?,
            tls,
            poll: Poll::new()?,
            epoch: Instant::now(),
            wheel: Wheel::new(),
            clients: Slab::default(),
            free: Vec::new(),
            turns: Vec::new(),
            input: vec![0; READ_BYTES],
            tally: Tally::new(&options.pids).map_err(io::Error::other)?,
            started: 0,
            active: 0,
            rest_until_ns: 0,
            late: false,
            timeout_ns: nanoseconds(options.timeout),
        })
    }

    pub fn run(mut self) -> io::Result<super::Report> {
        let mut end_ns = self.first_end_ns();
        let mut holding = false;
        let mut events = Events::with_capacity(EVENTS_MAX);
        loop {
            let now_ns = self.now_ns();
            if !self.options.idle && now_ns >= nanoseconds(self.options.warm_up) {
                self.tally.open_window(now_ns);
            }
            if self.options.idle && !holding && self.all_stream() {
                // What the streams cost from here on is what idle streams cost.
                holding = true;
                self.tally.open_window(now_ns);
                end_ns = now_ns + nanoseconds(self.options.duration.unwrap_or(Duration::from_secs(1)));
            }
            let over = now_ns >= end_ns;
            if over {
                self.tally.report.open_streams = if self.options.idle { self.open_streams() } else { 0 };
                self.tally.close_window(now_ns);
            }
            if (over && self.options.idle) || (self.active == 0 && (over || !self.may_start())) {
                break;
            }
            let starts_in_ns = if over { None } else { self.start_due(now_ns) };
            self.wait(&mut events, starts_in_ns, if over { None } else { Some(end_ns) })?;
            self.serve(&events);
        }
        let now_ns = self.now_ns();
        Ok(self.tally.into_report(now_ns))
    }

    fn now_ns(&self) -> u64 {
        self.epoch.elapsed().as_nanos() as u64
    }

    /// When nothing more is started. Streams to be held have the time of one request to come about.
    fn first_end_ns(&self) -> u64 {
        match (self.options.idle, self.options.duration, self.options.requests) {
            (true, ..) => self.timeout_ns,
            (false, Some(duration), _) => nanoseconds(duration),
            (false, None, Some(_)) => u64::MAX,
            (false, None, None) => nanoseconds(self.options.warm_up + Duration::from_secs(1)),
        }
    }

    fn may_start(&self) -> bool {
        let most = if self.options.idle {
            Some(self.options.connections as u64)
        } else {
            self.options.requests
        };
        most.is_none_or(|most| self.started < most)
    }

    fn open_streams(&mut self) -> u64 {
        self.clients
            .iter_mut()
            .filter(|client| client.is_streaming() && client.tokens() > 0)
            .count() as u64
    }

    /// Whether all streams that are to be held have had a token. Cheap until all are started.
    fn all_stream(&mut self) -> bool {
        !self.may_start() && self.open_streams() == self.active as u64
    }

    /// Starts what is due; returns how long until more may be, if that is known.
    fn start_due(&mut self, now_ns: u64) -> Option<u64> {
        match self.options.rate {
            Some(rate) => self.start_open_loop(now_ns, rate),
            None => self.start_closed_loop(now_ns),
        }
    }

    fn start_closed_loop(&mut self, now_ns: u64) -> Option<u64> {
        let (all, ramp_ns) = (self.options.connections, nanoseconds(self.options.ramp));
        let allowed = if now_ns >= ramp_ns {
            all
        } else {
            1 + (all as u64 * now_ns / ramp_ns) as usize
        };
        for _ in 0..OPENS_A_TURN {
            if self.rest_until_ns > now_ns {
                // Who connects as fast as it is refused measures nothing. In the open loop the rate sees to that.
                return Some(self.rest_until_ns - now_ns);
            }
            if self.active >= allowed || !self.may_start() {
                return (allowed < all).then_some(TICK_NS);
            }
            self.launch(now_ns);
        }
        Some(0)
    }

    fn start_open_loop(&mut self, now_ns: u64, rate: f64) -> Option<u64> {
        for _ in 0..OPENS_A_TURN {
            if !self.may_start() {
                return None;
            }
            let due_ns = (self.started as f64 * 1e9 / rate) as u64;
            if due_ns > now_ns {
                return Some(due_ns - now_ns);
            }
            if self.active >= self.options.connections {
                // It starts when a connection gets free, and its latency counts from when it was due.
                self.tally.report.late_starts += u64::from(!self.late);
                self.late = true;
                return None;
            }
            self.late = false;
            self.launch(due_ns);
        }
        Some(0)
    }

    /// Starts a request on a free connection or a new one.
    fn launch(&mut self, due_ns: u64) {
        let index = match self.free.pop() {
            Some(index) => index,
            None => match self.open() {
                Ok(index) => index,
                Err(error) => {
                    self.tally
                        .report
                        .first_error
                        .get_or_insert_with(|| error.to_string());
                    self.started += 1;
                    let now_ns = self.now_ns();
                    self.rest_until_ns = now_ns + CONNECT_REST_NS;
                    self.tally.ended(Outcome::Connect, now_ns, due_ns);
                    return;
                }
            },
        };
        let leave_after = self.leave_after();
        self.started += 1;
        self.active += 1;
        let now_ns = self.now_ns();
        let Some(client) = self.clients.get_mut(index) else {
            return;
        };
        if client.deadline_timer == 0 {
            client.deadline_timer = self.wheel.arm(now_ns + self.timeout_ns, index);
        }
        let progress = client.start(&self.plan, due_ns, leave_after);
        self.settle(index, progress);
    }

    /// Whether the next request is to be left, spread evenly: 61 and 100 have no common factor.
    fn leave_after(&self) -> Option<u64> {
        let hang_up = self.options.hang_up?;
        (self.started * 61 % 100 < u64::from(hang_up.share_percent)).then_some(hang_up.after_tokens)
    }

    fn open(&mut self) -> io::Result<usize> {
        let opened = self.tally.report.connections_opened;
        let source = self.options.sources.map(|sources| sources.address(opened));
        let tls = self.tls.as_ref().map(|(config, name)| (config, name));
        let mut link = Link::open(self.peer, source, self.options.slow_reader.is_some(), tls)?;
        let index = self.clients.vacant();
        self.poll.registry().register(
            link.socket(),
            Token(index),
            Interest::READABLE | Interest::WRITABLE,
        )?;
        self.tally.report.connections_opened += 1;
        Ok(self.clients.insert(Client::new(link, self.plan.api)))
    }

    fn wait(
        &mut self,
        events: &mut Events,
        starts_in_ns: Option<u64>,
        end_ns: Option<u64>,
    ) -> io::Result<()> {
        let now_ns = self.now_ns();
        let ends_in_ns = end_ns.map(|end_ns| end_ns.saturating_sub(now_ns));
        let waits = [self.wheel.next_in_ns(now_ns), starts_in_ns, ends_in_ns];
        let mut wait = waits.into_iter().flatten().min().map(Duration::from_nanos);
        if !self.turns.is_empty() {
            wait = Some(Duration::ZERO);
        }
        // `epoll_wait` counts in milliseconds: a start that is due sooner is waited for awake, but politely.
        if self.options.rate.is_some() && starts_in_ns.is_some_and(|starts_in_ns| starts_in_ns < TICK_NS) {
            wait = Some(Duration::ZERO);
            std::thread::yield_now();
        }
        match self.poll.poll(events, wait) {
            Err(error) if error.kind() == ErrorKind::Interrupted => {
                events.clear();
                Ok(())
            }
            result => result,
        }
    }

    fn serve(&mut self, events: &Events) {
        for index in std::mem::take(&mut self.turns) {
            self.read(index, false);
        }
        for event in events {
            let index = event.token().0;
            if event.is_writable() {
                let Some(client) = self.clients.get_mut(index) else {
                    continue;
                };
                let progress = client.on_writable(&self.plan);
                self.settle(index, progress);
            }
            let closing = event.is_read_closed() || event.is_error();
            if event.is_readable() || closing {
                self.read(index, closing);
            }
        }
        let mut fired = Vec::new();
        self.wheel.expire(self.now_ns(), &mut fired);
        for timer in fired {
            self.on_timer(timer);
        }
    }

    /// Reads what a connection has. At a `closing` edge it reads up to the end, for no other edge will come.
    fn read(&mut self, index: usize, closing: bool) {
        for _ in 0..READS_A_TURN {
            let now_ns = self.now_ns();
            let Some(client) = self.clients.get_mut(index) else {
                return;
            };
            if client.pause_timer != 0 {
                return;
            }
            let started_ns = client.started_ns;
            let (progress, more, arrivals) = client.read(&self.plan, &mut self.input);
            if self.plan.stream {
                self.tally.arrived(
                    &arrivals,
                    now_ns,
                    started_ns.unwrap_or(now_ns),
                    client.last_token_ns,
                );
                if arrivals.after > arrivals.before {
                    client.last_token_ns = now_ns;
                }
            } else {
                self.tally.report.bytes += arrivals.bytes;
                self.tally.report.tokens += arrivals.after.saturating_sub(arrivals.before);
            }
            if let (Some(rate), true) = (self.options.slow_reader, arrivals.bytes > 0) {
                let pause_ns = arrivals.bytes.saturating_mul(1_000_000_000) / rate.max(1);
                client.pause_timer = self.wheel.arm(now_ns + pause_ns, index);
            }
            let going = matches!(progress, Progress::Going);
            self.settle(index, progress);
            if !(more || (closing && going && arrivals.bytes > 0)) {
                return;
            }
        }
        self.turns.push(index);
    }

    fn on_timer(&mut self, timer: Fired) {
        let now_ns = self.now_ns();
        let Some(client) = self.clients.get_mut(timer.owner) else {
            return;
        };
        if client.pause_timer == timer.sequence {
            client.pause_timer = 0;
            return self.read(timer.owner, false);
        }
        if client.deadline_timer != timer.sequence {
            return;
        }
        // The timer is armed once and looks again, so that a request need not arm one.
        client.deadline_timer = 0;
        let Some(started_ns) = client.started_ns else {
            return;
        };
        let deadline_ns = started_ns + self.timeout_ns;
        if deadline_ns > now_ns {
            client.deadline_timer = self.wheel.arm(deadline_ns, timer.owner);
            return;
        }
        client.reusable = false;
        self.settle(timer.owner, Progress::Ended(Outcome::Timeout));
    }

    /// Draws the conclusions from what a connection did.
    fn settle(&mut self, index: usize, progress: Progress) {
        let now_ns = self.now_ns();
        match progress {
            Progress::Going => {}
            Progress::Gone => {
                self.free.retain(|free| *free != index);
                self.close(index);
            }
            Progress::Ended(outcome) => {
                let Some(client) = self.clients.get_mut(index) else {
                    return;
                };
                let started_ns = client.started_ns.take().unwrap_or(now_ns);
                let reusable = client.reusable && self.options.keep_alive;
                if let (Some(error), None) = (client.error.take(), &self.tally.report.first_error) {
                    self.tally.report.first_error = Some(error.to_string());
                }
                self.active -= 1;
                self.tally.ended(outcome, now_ns, started_ns);
                if outcome == Outcome::Connect {
                    self.rest_until_ns = now_ns + CONNECT_REST_NS;
                }
                if reusable {
                    self.free.push(index);
                } else {
                    self.close(index);
                }
            }
        }
    }

    fn close(&mut self, index: usize) {
        if let Some(mut client) = self.clients.remove(index) {
            // The descriptor is closed next, which ends its registration in any case.
            let _ = self.poll.registry().deregister(client.link.socket());
        }
    }
}

fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}
