//! What the gateway tells about itself: counters and latencies of each core, Prometheus text, the
//! access log and the program's own log.
//!
//! A core writes only what is its own ([`CoreTelemetry`]), without locks and without read-modify-write
//! instructions. The control thread reads the counters where they are and asks for a copy of the
//! latencies, which the core makes in its next tick ([`CoreTelemetry::publish_if_asked`]).

pub mod access;
pub mod clients;
pub mod counters;
pub mod latency;
pub mod logging;
pub mod prometheus;
pub mod summary;

use std::{
    cell::RefCell,
    net::IpAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use arc_swap::ArcSwapOption;
use crossbeam::queue::ArrayQueue;

use crate::{bounds::ACCESS_LOG_QUEUE, net::clock};

pub use access::{AccessEntry, Text};
pub use counters::{Counter, Counters, Refusal, Totals};
pub use latency::{Latencies, Latency};

/// Longest time that a scrape waits for the cores' copies of their latencies. A core that is slower
/// is shown with its last copy.
pub const COPY_WAIT_MAX: Duration = Duration::from_millis(250);

/// The telemetry of one core, on that core's own thread.
pub struct CoreTelemetry {
    shared: Arc<CoreShared>,
    latencies: RefCell<Latencies>,
}

/// The part of a core's telemetry that the control thread sees too.
#[derive(Debug)]
pub struct CoreShared {
    core: usize,
    counters: Counters,
    clients: clients::Clients,
    /// When the core last showed that it is alive, milliseconds of the clock that the caller uses.
    heartbeat_ms: AtomicU64,
    /// Number of the copy that is wanted.
    copy_wanted: AtomicU64,
    copy: ArcSwapOption<Copy>,
    access_log_on: AtomicBool,
    access_log: ArrayQueue<AccessEntry>,
}

/// A core's latencies at one moment.
#[derive(Debug)]
struct Copy {
    number: u64,
    latencies: Latencies,
}

impl CoreTelemetry {
    /// The telemetry of core number `core`. Takes all its memory now: about 104 KiB of histograms
    /// and the access log's queue.
    pub fn new(core: usize) -> CoreTelemetry {
        CoreTelemetry::with_shared(Arc::new(CoreShared::new(core)))
    }

    /// The writing side of `shared`, for a shared part that was made before its thread. There must
    /// be only one.
    pub fn with_shared(shared: Arc<CoreShared>) -> CoreTelemetry {
        CoreTelemetry {
            shared,
            latencies: RefCell::default(),
        }
    }

    /// The part for the control thread.
    pub fn shared(&self) -> &Arc<CoreShared> {
        &self.shared
    }

    /// This core's counters.
    #[inline]
    pub fn counters(&self) -> &Counters {
        &self.shared.counters
    }

    /// Notes what a client did.
    pub fn client(&self, client: IpAddr, event: clients::Event) {
        let now_ms = clock::turn_ns() / 1_000_000;
        self.shared.clients.note(client, event, now_ms);
    }

    /// Records the time to the first token of an answer, microseconds.
    #[inline]
    pub fn record_ttft_us(&self, value_us: u64) {
        self.latencies.borrow_mut().ttft.record(value_us, 1);
    }

    /// Records the time between two reads of a stream that brought events, microseconds, for
    /// `events` of them: each is given the same share.
    #[inline]
    pub fn record_inter_token_us(&self, gap_us: u64, events: u64) {
        if let Some(share_us) = gap_us.checked_div(events) {
            self.latencies.borrow_mut().inter_token.record(share_us, events);
        }
    }

    /// Records the time of a whole request, microseconds.
    #[inline]
    pub fn record_total_us(&self, value_us: u64) {
        self.latencies.borrow_mut().total.record(value_us, 1);
    }

    /// Records the time that the gateway itself took for a request, microseconds.
    #[inline]
    pub fn record_overhead_us(&self, value_us: u64) {
        self.latencies.borrow_mut().overhead.record(value_us, 1);
    }

    /// Hands an entry to the access log. When the queue is full the entry is dropped and counted;
    /// a request never waits for its log line.
    #[inline]
    pub fn log_access(&self, entry: AccessEntry) {
        if !self.access_log_on() {
            return;
        }
        if self.shared.access_log.push(entry).is_err() {
            self.counters().access_log_dropped.inc();
        }
    }

    /// Whether anybody reads the access log: lets the caller save itself making the entry.
    #[inline]
    pub fn access_log_on(&self) -> bool {
        self.shared.access_log_on.load(Ordering::Relaxed)
    }

    /// Shows that the core is alive. `now_ms` is of a clock that never goes back and that the reader
    /// of [`CoreShared::heartbeat_age_ms`] uses too.
    #[inline]
    pub fn beat(&self, now_ms: u64) {
        self.shared.heartbeat_ms.store(now_ms, Ordering::Relaxed);
    }

    /// Copies the latencies if the control thread asked for them. The core calls this in its tick,
    /// at least ten times a second; when nobody asked it costs two loads.
    #[inline]
    pub fn publish_if_asked(&self) {
        let wanted = self.shared.copy_wanted.load(Ordering::Acquire);
        if wanted != self.shared.copy_number() {
            self.publish(wanted);
        }
    }

    #[cold]
    fn publish(&self, number: u64) {
        let latencies = self.latencies.borrow().clone();
        self.shared.copy.store(Some(Arc::new(Copy { number, latencies })));
    }
}

impl CoreShared {
    /// The shared part of core number `core`; give it to [`CoreTelemetry::with_shared`].
    pub fn new(core: usize) -> CoreShared {
        CoreShared {
            core,
            counters: Counters::default(),
            clients: clients::Clients::default(),
            heartbeat_ms: AtomicU64::new(0),
            copy_wanted: AtomicU64::new(0),
            copy: ArcSwapOption::empty(),
            access_log_on: AtomicBool::new(false),
            access_log: ArrayQueue::new(ACCESS_LOG_QUEUE),
        }
    }

    /// The core's number.
    pub fn core(&self) -> usize {
        self.core
    }

    /// The core's clients, to be read.
    pub fn clients(&self) -> &clients::Clients {
        &self.clients
    }

    /// The core's counters, to be read.
    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    /// Milliseconds since the core's last beat, at `now_ms`.
    pub fn heartbeat_age_ms(&self, now_ms: u64) -> u64 {
        now_ms.saturating_sub(self.heartbeat_ms.load(Ordering::Relaxed))
    }

    /// Asks the core for a copy of its latencies, to be made in its next tick. Returns the number
    /// from which on [`CoreShared::copied`] says that it is there.
    pub fn request_copy(&self) -> u64 {
        self.copy_wanted.fetch_add(1, Ordering::AcqRel) + 1
    }

    /// Whether the copy with this number, or a later one, is there.
    pub fn copied(&self, number: u64) -> bool {
        self.copy_number() >= number
    }

    /// Turns the access log's queue on or off.
    pub fn set_access_log(&self, on: bool) {
        self.access_log_on.store(on, Ordering::Relaxed);
    }

    /// Takes the oldest entry off the access log's queue.
    pub fn next_access(&self) -> Option<AccessEntry> {
        self.access_log.pop()
    }

    fn copy_number(&self) -> u64 {
        self.copy.load().as_ref().map_or(0, |copy| copy.number)
    }
}

/// All cores' counters summed up.
pub fn totals(cores: &[Arc<CoreShared>]) -> Totals {
    let mut totals = Totals::default();
    for core in cores {
        totals.add(&core.counters);
    }
    totals
}

/// All cores' latencies in one, from copies that are made now, or from the last ones of cores that
/// take longer than [`COPY_WAIT_MAX`]. For the control thread.
pub async fn latencies(cores: &[Arc<CoreShared>]) -> Latencies {
    const POLL: Duration = Duration::from_millis(5);
    let wanted: Vec<u64> = cores.iter().map(|core| core.request_copy()).collect();
    let deadline = tokio::time::Instant::now() + COPY_WAIT_MAX;
    let all_there = || {
        cores
            .iter()
            .zip(&wanted)
            .all(|(core, number)| core.copied(*number))
    };
    while !all_there() && tokio::time::Instant::now() < deadline {
        tokio::time::sleep(POLL).await;
    }
    let mut merged = Latencies::default();
    for core in cores {
        if let Some(copy) = core.copy.load_full() {
            merged.merge(&copy.latencies);
        }
    }
    merged
}

#[cfg(test)]
mod tests {
    use super::*;

    fn runtime() -> tokio::runtime::Runtime {
        tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .build()
            .expect("runtime")
    }

    #[test]
    fn a_copy_is_made_only_when_asked() {
        let core = CoreTelemetry::new(0);
        core.record_ttft_us(10);
        core.publish_if_asked();
        assert!(core.shared().copy.load().is_none());
        let number = core.shared().request_copy();
        assert!(!core.shared().copied(number));
        core.publish_if_asked();
        assert!(core.shared().copied(number));
    }

    #[test]
    fn a_core_that_does_not_answer_is_shown_as_it_was() {
        let (live, stuck) = (CoreTelemetry::new(0), CoreTelemetry::new(1));
        stuck.record_ttft_us(10);
        stuck.shared().request_copy();
        stuck.publish_if_asked();
        stuck.record_ttft_us(10);
        live.record_ttft_us(20);
        let cores = [live.shared().clone(), stuck.shared().clone()];
        let merged = runtime().block_on(async {
            let collect = latencies(&cores);
            let tick = async {
                tokio::task::yield_now().await;
                live.publish_if_asked();
            };
            tokio::join!(collect, tick).0
        });
        assert_eq!((merged.ttft.count(), merged.ttft.sum_us()), (2, 30));
    }

    #[test]
    fn a_gap_is_shared_by_its_events() {
        let core = CoreTelemetry::new(0);
        core.record_inter_token_us(30, 3);
        core.record_inter_token_us(30, 0);
        let latencies = core.latencies.borrow();
        assert_eq!(
            (latencies.inter_token.count(), latencies.inter_token.sum_us()),
            (3, 30)
        );
    }

    #[test]
    fn a_heartbeat_ages() {
        let core = CoreTelemetry::new(0);
        core.beat(1_000);
        assert_eq!(core.shared().heartbeat_age_ms(1_250), 250);
        assert_eq!(core.shared().heartbeat_age_ms(900), 0);
    }

    #[test]
    fn a_full_access_log_drops_and_counts() {
        let core = CoreTelemetry::new(0);
        core.log_access(AccessEntry::default());
        assert!(
            core.shared().next_access().is_none(),
            "off until someone reads it"
        );
        core.shared().set_access_log(true);
        for _ in 0..ACCESS_LOG_QUEUE + 2 {
            core.log_access(AccessEntry::default());
        }
        assert_eq!(core.counters().access_log_dropped.get(), 2);
        assert_eq!(
            std::iter::from_fn(|| core.shared().next_access()).count(),
            ACCESS_LOG_QUEUE
        );
    }
}
