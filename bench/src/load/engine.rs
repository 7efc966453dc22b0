//! The event loop of one thread of the load generator.

use std::io::{self, ErrorKind};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mio::{Events, Interest, Poll, Token};
use rustls::ClientConfig;
use rustls::pki_types::ServerName;

use super::client::{Client, Order, Outcome, Progress};
use super::link::{Link, Trust};
use super::part::Plan;
use super::start::Starter;
use super::tally::Tally;
use super::{Options, Url};
use crate::slab::Slab;
use crate::sys;
use crate::wheel::{Fired, Wheel};

/// Events that one call of `epoll_wait` may return.
const EVENTS_MAX: usize = 1024;
/// What `epoll_wait` counts in.
pub(super) const WAIT_STEP_NS: u64 = 1_000_000;
/// Bytes of one read.
const READ_BYTES: usize = 64 * 1024;
/// Reads that one connection may do before the others have their turn.
const READS_A_TURN: usize = 16;
/// Longest time between two looks whether the run is to end early: a signal wakes one thread only.
const LOOK_NS: u64 = 250_000_000;
/// How long nothing is started after a connection has failed.
const CONNECT_REST_NS: u64 = 10_000_000;

pub(super) struct Engine<'a> {
    options: &'a Options,
    pub(super) plans: &'a [Plan],
    peer: SocketAddr,
    tls: Option<(Arc<ClientConfig>, ServerName<'static>)>,
    poll: Poll,
    epoch: Instant,
    wheel: Wheel,
    clients: Slab<Client>,
    /// Connections without a request by part, the warmest last.
    free: Vec<Vec<usize>>,
    /// Connections with input left when their turn ended.
    turns: Vec<usize>,
    input: Vec<u8>,
    fired: Vec<Fired>,
    pub(super) tally: Tally,
    /// What is to be started, and what is under way.
    pub(super) starter: Starter,
    /// Nothing is started before this time.
    pub(super) rest_until_ns: u64,
    timeout_ns: u64,
    /// When held streams stood and everything else began.
    pub(super) base_ns: Option<u64>,
}

/// The edges of a run in nanoseconds since the engine's epoch.
struct Edges {
    /// The window opens.
    open_ns: u64,
    /// It closes.
    close_ns: u64,
    /// Nothing more is started; system calls are counted from `close_ns` to here.
    end_ns: u64,
}

impl<'a> Engine<'a> {
    pub fn new(
        options: &'a Options,
        plans: &'a [Plan],
        url: &Url,
        tally: Tally,
        seed: u64,
    ) -> io::Result<Self> {
        let tls = if url.tls {
            let trust = options.trust.as_ref().unwrap_or(&Trust::Anything);
            let name = ServerName::try_from(url.host.clone()).map_err(io::Error::other)?;
            Some((trust.config(options.tls_resume)?, name))
        } else {
            None
        };
        Ok(Self {
            options,
            plans,
            peer: url.resolve()?,
            tls,
            poll: Poll::new()?,
            epoch: Instant::now(),
            wheel: Wheel::new(),
            clients: Slab::default(),
            free: plans.iter().map(|_| Vec::new()).collect(),
            turns: Vec::new(),
            input: vec![0; READ_BYTES],
            fired: Vec::new(),
            tally,
            starter: Starter::new(options, plans, seed),
            rest_until_ns: 0,
            timeout_ns: nanoseconds(options.timeout),
            base_ns: None,
        })
    }

    pub fn run(mut self) -> io::Result<Tally> {
        let mut events = Events::with_capacity(EVENTS_MAX);
        loop {
            let now_ns = self.now_ns();
            if self.base_ns.is_none() && (self.starter.all_held() || now_ns >= self.timeout_ns) {
                self.base_ns = Some(now_ns);
            }
            let edges = self.edges();
            self.tally.tick(now_ns, self.starter.active);
            if self.base_ns.is_some() && now_ns >= edges.open_ns {
                self.tally.open_window(now_ns);
            }
            if now_ns >= edges.close_ns {
                self.tally.report.open_streams = self.starter.held_streaming as u64;
                self.tally.close_window(now_ns);
            }
            let over = now_ns >= edges.end_ns;
            if over {
                self.close_open_loop(edges.end_ns);
                self.tally.close_slice(now_ns);
            }
            if sys::interrupted() {
                // Whoever asked does not want to wait for what is under way: it is counted and left.
                self.tally.report.interrupted = true;
                self.tally.report.left = (self.starter.active - self.starter.held) as u64;
                self.tally.report.open_streams = self.starter.held_streaming as u64;
                self.count_not_started(now_ns);
                break;
            }
            let more =
                !over && (self.base_ns.is_none() || self.starter.may_start() || self.starter.only_holds());
            if !more && self.starter.active == self.starter.held {
                break;
            }
            let starts_in_ns = if over { None } else { self.start_due(now_ns) };
            let next_edge = [edges.open_ns, edges.close_ns, edges.end_ns]
                .into_iter()
                .find(|edge| *edge > now_ns);
            self.wait(&mut events, starts_in_ns, next_edge)?;
            self.serve(&events);
        }
        let now_ns = self.now_ns();
        self.tally.finish(now_ns);
        Ok(self.tally)
    }

    pub(super) fn now_ns(&self) -> u64 {
        self.epoch.elapsed().as_nanos() as u64
    }

    fn edges(&self) -> Edges {
        let Some(base_ns) = self.base_ns else {
            return Edges {
                open_ns: u64::MAX,
                close_ns: u64::MAX,
                end_ns: u64::MAX,
            };
        };
        let warm_up = self.options.warm_up;
        let open_ns = base_ns + nanoseconds(warm_up);
        let close_ns = match (self.options.duration, self.options.requests) {
            (Some(duration), _) => base_ns.saturating_add(nanoseconds(duration)),
            (None, Some(_)) => u64::MAX,
            (None, None) => base_ns + nanoseconds(warm_up + Duration::from_secs(1)),
        };
        Edges {
            open_ns,
            close_ns,
            end_ns: close_ns.saturating_add(nanoseconds(self.options.count_system_calls.unwrap_or_default())),
        }
    }

    /// Starts a request of `part` on a free connection or a new one.
    pub(super) fn launch(&mut self, part: usize, order: Order) {
        let due_ns = order.due_ns;
        let index = match self.free[part].pop() {
            Some(index) => index,
            None => match self.open(part) {
                Ok(index) => index,
                Err(error) => {
                    self.tally
                        .report
                        .first_error
                        .get_or_insert_with(|| error.to_string());
                    let now_ns = self.now_ns();
                    self.rest_until_ns = now_ns + CONNECT_REST_NS;
                    self.starter.ended(part, false);
                    self.tally.ended(part, Outcome::Connect, None, now_ns, due_ns);
                    return;
                }
            },
        };
        let now_ns = self.now_ns();
        let Some(client) = self.clients.get_mut(index) else {
            return;
        };
        if client.deadline_timer == 0 {
            client.deadline_timer = self.wheel.arm(now_ns + self.timeout_ns, index);
        }
        let progress = client.start(self.plans[part].part.check, order);
        self.settle(index, progress);
    }

    fn open(&mut self, part: usize) -> io::Result<usize> {
        let opened = self.tally.report.connections_opened;
        let source = self.options.sources.map(|sources| sources.address(opened));
        let tls = self.tls.as_ref().map(|(config, name)| (config, name));
        let plan = &self.plans[part];
        let mut link = Link::open(self.peer, source, plan.slow_read_bytes.is_some(), tls)?;
        let index = self.clients.vacant();
        self.poll.registry().register(
            link.socket(),
            Token(index),
            Interest::READABLE | Interest::WRITABLE,
        )?;
        self.tally.report.connections_opened += 1;
        Ok(self.clients.insert(Client::new(link, plan.api, part)))
    }

    fn wait(
        &mut self,
        events: &mut Events,
        starts_in_ns: Option<u64>,
        edge_ns: Option<u64>,
    ) -> io::Result<()> {
        let now_ns = self.now_ns();
        let edge_in_ns = edge_ns.map(|edge_ns| edge_ns.saturating_sub(now_ns));
        let tick_in_ns = Some(self.tally.next_tick_in_ns(now_ns));
        let waits = [
            Some(LOOK_NS),
            self.wheel.next_in_ns(now_ns),
            starts_in_ns,
            edge_in_ns,
            tick_in_ns,
        ];
        let mut wait = waits.into_iter().flatten().min().map(Duration::from_nanos);
        if !self.turns.is_empty() {
            wait = Some(Duration::ZERO);
        }
        // `epoll_wait` counts in milliseconds: a start that is due sooner is waited for awake, but politely.
        if self.starter.is_open_loop() && starts_in_ns.is_some_and(|starts_in_ns| starts_in_ns < WAIT_STEP_NS)
        {
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
                let progress = client.on_writable();
                self.settle(index, progress);
            }
            let closing = event.is_read_closed() || event.is_error();
            if event.is_readable() || closing {
                self.read(index, closing);
            }
        }
        let mut fired = std::mem::take(&mut self.fired);
        self.wheel.expire(self.now_ns(), &mut fired);
        for timer in fired.drain(..) {
            self.on_timer(timer);
        }
        self.fired = fired;
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
            let part = client.part;
            let plan = &self.plans[part];
            let started_ns = client.started_ns.unwrap_or(now_ns);
            let (progress, more, arrivals) = client.read(plan, &mut self.input);
            if plan.stream {
                self.tally
                    .arrived(part, &arrivals, now_ns, started_ns, client.last_token_ns);
                if arrivals.after > arrivals.before {
                    client.last_token_ns = now_ns;
                    self.starter.held_streaming += usize::from(plan.part.hold && arrivals.before == 0);
                }
                if !client.stamps().is_empty() {
                    let now_us = sys::monotonic_us();
                    for sent_us in client.stamps().drain(..) {
                        self.tally.delayed(part, now_us, sent_us);
                    }
                }
            } else {
                self.tally.report.bytes += arrivals.bytes;
                self.tally.report.tokens += arrivals.after.saturating_sub(arrivals.before);
            }
            if let (Some(rate), true) = (plan.part.slow_reader, arrivals.bytes > 0) {
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
        if self.plans[client.part].part.hold && client.tokens() > 0 {
            return;
        }
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
                if let Some(client) = self.clients.get_mut(index) {
                    let part = client.part;
                    self.free[part].retain(|free| *free != index);
                }
                self.close(index);
            }
            Progress::Ended(outcome) => {
                let Some(client) = self.clients.get_mut(index) else {
                    return;
                };
                let part = client.part;
                let started_ns = client.started_ns.take().unwrap_or(now_ns);
                let reusable = client.reusable && self.options.keep_alive;
                if let (Some(error), None) = (client.error.take(), &self.tally.report.first_error) {
                    self.tally.report.first_error = Some(error.to_string());
                }
                self.starter.ended(part, client.tokens() > 0);
                let expected = self.plans[part].part.expect_status;
                if let (Outcome::Whole(status), None) = (outcome, &self.tally.report.first_refusal)
                    && status != expected.unwrap_or(200)
                {
                    self.tally.report.first_refusal = Some(format!("{status} {}", client.refusal()));
                }
                self.tally.ended(part, outcome, expected, now_ns, started_ns);
                if outcome == Outcome::Connect {
                    self.rest_until_ns = now_ns + CONNECT_REST_NS;
                }
                if reusable {
                    self.free[part].push(index);
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

pub(super) fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}
