//! One data-plane thread: what it owns, how it starts, accepts, ticks and ends.

pub mod seats;
mod thread;

use std::{
    cell::{Cell, RefCell, RefMut},
    rc::Rc,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use arc_swap::ArcSwap;

use crate::{
    bounds::{SCRATCH_BYTES, TOKENIZED_BYTES_PER_TICK},
    error::{Error, Kind, Source},
    fleet::Pool,
    ledger::{
        Journal,
        record::{Record, RequestId},
    },
    net::{clock, signal::Signal, sleep},
    quota::refusals::{Blocks, Origin, Refusals},
    serve::{keys::Keys, snapshot::Snapshot},
    telemetry::{CoreShared, CoreTelemetry, Refusal, clients::Event},
};

use seats::Seats;
pub use thread::{Listening, Threads, start};

/// Drain level: no new connections, idle ones are closed, running requests go on.
pub const DRAIN: u64 = 1;
/// Drain level: everything ends now, with a record of what was delivered.
pub const STOP: u64 = 2;

/// What all cores and the control thread share. Everything in it is atomic or swapped as a whole.
pub struct Shared {
    /// The configuration in force.
    pub snapshot: ArcSwap<Snapshot>,
    /// Keys that were made at run time.
    pub keys: Keys,
    /// Evidence for early drops.
    pub refusals: Refusals,
    /// Clients that are turned away now.
    pub blocks: Blocks,
    /// 0, [`DRAIN`] or [`STOP`]; cores follow within a tick.
    level: AtomicU64,
    /// Each core's counters and access log.
    pub cores: Vec<Arc<CoreShared>>,
}

impl Shared {
    /// The state of a gateway that starts with this configuration.
    pub fn new(snapshot: Snapshot, cores: usize) -> Shared {
        Shared {
            snapshot: ArcSwap::from_pointee(snapshot),
            keys: Keys::default(),
            refusals: Refusals::default(),
            blocks: Blocks::default(),
            level: AtomicU64::new(0),
            cores: (0..cores).map(|core| Arc::new(CoreShared::new(core))).collect(),
        }
    }

    /// Raises the drain level.
    pub fn raise(&self, level: u64) {
        self.level.fetch_max(level, Ordering::Relaxed);
    }

    /// The drain level.
    pub fn level(&self) -> u64 {
        self.level.load(Ordering::Relaxed)
    }
}

/// One core's world. Not `Send`: everything in it belongs to one thread.
pub struct Core {
    pub shared: Arc<Shared>,
    pub telemetry: CoreTelemetry,
    /// Connections to upstreams.
    pub pool: RefCell<Pool>,
    /// Follows [`Shared::level`].
    pub drain: Signal,
    /// Rises with each tick of the core.
    pub ticks: Signal,
    /// Follows [`Keys::revocations`]: what runs looks whether its key has ended.
    pub revocations: Signal,
    /// Bytes of requests' and answers' bodies held now; see [`Share`].
    bodies_bytes: Cell<usize>,
    /// Open connections, by whom they serve.
    pub seats: Seats,
    /// How far [`Blocks::generation`] has been followed.
    blocks_seen: Cell<u64>,
    /// Connections of clients open now.
    pub connections: Cell<usize>,
    /// Requests accepted and not ended: records to be written.
    pub accounts_open: Cell<usize>,
    /// Bytes that their records take at most.
    pub accounts_bytes: Cell<usize>,
    /// Bytes of text whose tokens were counted, and in which tick.
    tokenized: Cell<(u64, usize)>,
    /// The empty name, so that a record without one costs no allocation.
    pub empty: Arc<str>,
    journal: RefCell<Journal>,
    scratch: RefCell<Box<[u8]>>,
    random: Random,
    turn: Cell<u64>,
    log_due_ns: Cell<u64>,
}

impl Core {
    fn new(shared: Arc<Shared>, index: usize, journal: Journal) -> Rc<Core> {
        Rc::new(Core {
            telemetry: CoreTelemetry::with_shared(shared.cores[index].clone()),
            shared,
            pool: RefCell::default(),
            drain: Signal::default(),
            ticks: Signal::default(),
            revocations: Signal::default(),
            bodies_bytes: Cell::new(0),
            seats: Seats::default(),
            blocks_seen: Cell::new(0),
            connections: Cell::new(0),
            accounts_open: Cell::new(0),
            accounts_bytes: Cell::new(0),
            tokenized: Cell::new((0, 0)),
            empty: Arc::from(""),
            journal: RefCell::new(journal),
            scratch: RefCell::new(vec![0; SCRATCH_BYTES].into()),
            random: Random::seeded(),
            turn: Cell::new(0),
            log_due_ns: Cell::new(0),
        })
    }

    /// Waits `time`, give or take a tick. What is over before the next tick, as most requests are, never gets to
    /// set a timer.
    pub async fn late(&self, time: Duration) {
        let began_ns = clock::turn_ns();
        self.ticks.next().await;
        let waited = Duration::from_nanos(clock::turn_ns() - began_ns);
        sleep(time.saturating_sub(waited)).await;
    }

    /// The configuration in force now.
    pub fn snapshot(&self) -> Arc<Snapshot> {
        self.shared.snapshot.load_full()
    }

    /// The core's buffer for receives, [`SCRATCH_BYTES`] long. Never to be held over a wait: the next task
    /// wants it too, and would panic.
    pub fn scratch(&self) -> RefMut<'_, [u8]> {
        RefMut::map(self.scratch.borrow_mut(), |scratch| &mut scratch[..])
    }

    /// A new request's id.
    pub fn next_id(&self) -> RequestId {
        let mut random = [0; 10];
        random[..8].copy_from_slice(&self.random.next().to_le_bytes());
        random[8..].copy_from_slice(&self.random.next().to_le_bytes()[..2]);
        RequestId::new(clock::unix_ms(), random)
    }

    /// A number below `below`, for weighted choices; 0 where `below` is 0.
    pub fn chance(&self, below: u64) -> u64 {
        self.random.next() % below.max(1)
    }

    /// Whether a line about something that may happen at every request is due: at most one a second and core, because
    /// writing it may wait for whoever reads the log.
    pub fn may_log(&self) -> bool {
        const PAUSE_NS: u64 = 1_000_000_000;
        let now_ns = clock::monotonic_ns();
        let due = now_ns >= self.log_due_ns.get();
        if due {
            self.log_due_ns.set(now_ns + PAUSE_NS);
        }
        due
    }

    /// A number that is one higher each time, to begin rotations with.
    pub fn turn(&self) -> u64 {
        self.turn.replace(self.turn.get().wrapping_add(1))
    }

    /// Whether there is time now to count the tokens of so many bytes of text: at most [`TOKENIZED_BYTES_PER_TICK`], so
    /// that many requests that end at once do not hold up the others.
    pub fn may_tokenize(&self, bytes: usize) -> bool {
        let now = self.ticks.level();
        let (tick, before) = self.tokenized.get();
        let all = if tick == now { before } else { 0 } + bytes;
        let may = all <= TOKENIZED_BYTES_PER_TICK;
        if may {
            self.tokenized.set((now, all));
        }
        may
    }

    /// Whether a record of at most so many bytes can be written besides those of the open requests. Work is not begun
    /// that could not be recorded.
    pub fn books_are_open(&self, record_bytes_max: usize) -> bool {
        self.journal.borrow().room_bytes() >= self.accounts_bytes.get() + record_bytes_max
            || self.shared.snapshot.load().serves_unrecorded
    }

    /// Writes a record. Where requests are refused that could not be recorded, admission has kept room for it; a record
    /// that does not fit is lost, and counted.
    pub fn append(&self, record: &Record) {
        if self.journal.borrow_mut().append(record).is_err() {
            self.telemetry.counters().ledger_unrecorded.inc();
            if self.may_log() {
                tracing::error!(request = %record.id, "the journal is full: a request is not in the books");
            }
        }
    }

    /// Leaves a journal segment whose file failed, where the ledger's thread asks for it.
    pub fn turn_journal(&self) {
        self.journal.borrow_mut().turn();
    }

    /// Notes that a client was refused; a client's fault counts against its address.
    pub fn note_refusal(&self, client: Origin, error: &Error) {
        let reason = match error.kind {
            Kind::Unauthenticated => Refusal::Unauthenticated,
            Kind::Forbidden => Refusal::Forbidden,
            Kind::RateLimited => Refusal::RateLimited,
            Kind::BodyTooLarge => Refusal::TooLarge,
            Kind::NotFound => Refusal::NotFound,
            _ if error.kind.source() == Source::Client => Refusal::BadRequest,
            _ => Refusal::Overloaded,
        };
        self.telemetry.counters().refuse(reason);
        self.telemetry.client(client.ip, Event::Refused);
        if error.kind.source() == Source::Client {
            let rule = self.shared.snapshot.load().refusals;
            self.shared.refusals.refused(client, &rule, clock::monotonic_ns());
        }
    }

    /// Notes that a client's request was accepted: earlier refusals are forgiven.
    pub fn note_accepted(&self, client: Origin) {
        let prefixes = self.shared.snapshot.load().refusals.prefixes;
        self.shared.refusals.accepted(client, prefixes);
        self.telemetry.client(client.ip, Event::Accepted);
    }

    /// For how long a client is turned away; None when it is let in. In the mode `observe` it is counted and let in.
    pub fn turned_away(&self, client: Origin) -> Option<Duration> {
        let now_ns = clock::turn_ns();
        let until_ns = self.blocked_until(client, now_ns)?;
        if self.shared.blocks.observes() {
            self.telemetry.counters().clients_would_turn_away.inc();
            return None;
        }
        Some(Duration::from_nanos(until_ns - now_ns))
    }

    fn blocked_until(&self, client: Origin, now_ns: u64) -> Option<u64> {
        let prefixes = self.shared.snapshot.load().refusals.prefixes;
        self.shared.blocks.until(client, prefixes, now_ns)
    }

    /// Tells the open connections of clients that have been blocked since the last time.
    fn follow_blocks(&self, now_ns: u64) {
        let generation = self.shared.blocks.generation();
        if self.blocks_seen.replace(generation) == generation || self.shared.blocks.observes() {
            return;
        }
        self.seats
            .tell(|client| self.blocked_until(client, now_ns).is_some());
    }
}

/// Bytes of bodies that somebody holds, counted against the core's bound until it is dropped.
pub struct Share {
    core: Rc<Core>,
    bytes: usize,
}

impl Share {
    /// Nothing yet.
    pub fn new(core: &Rc<Core>) -> Share {
        Share {
            core: core.clone(),
            bytes: 0,
        }
    }

    /// Bytes counted now.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Bytes that all shares of the core count now.
    pub fn all_bytes(&self) -> usize {
        self.core.bodies_bytes.get()
    }

    /// Counts `bytes` from now on.
    pub fn set(&mut self, bytes: usize) {
        let others = self.core.bodies_bytes.get() - self.bytes;
        self.core.bodies_bytes.set(others + bytes);
        self.bytes = bytes;
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.set(0);
    }
}

/// A small fast generator for ids and weighted choices: SplitMix64 (Steele, Lea, Flood 2014), seeded by the
/// kernel. Not for secrets.
struct Random(Cell<u64>);

impl Random {
    fn seeded() -> Random {
        let mut seed = [0; 8];
        // Without entropy the clock must do: ids stay unique by their time and by chance.
        if getrandom::fill(&mut seed).is_err() {
            seed = clock::monotonic_ns().to_le_bytes();
        }
        Random(Cell::new(u64::from_le_bytes(seed)))
    }

    fn next(&self) -> u64 {
        let state = self.0.get().wrapping_add(0x9e37_79b9_7f4a_7c15);
        self.0.set(state);
        let mixed = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }
}
