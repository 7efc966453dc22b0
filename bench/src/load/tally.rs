//! Counts and histograms of a run, the window in which its rates and costs are measured, and its course over time.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use hdrhistogram::Histogram;

use super::Options;
use super::check::Flaw;
use super::client::{Arrivals, Outcome};
use super::report::{Curves, Failures, Latency, PartReport, Point, Report};
use crate::process::{Cost, Snapshot};
use crate::sys::SyscallCounter;

/// Longest latency that is told apart, in microseconds: an hour.
const LATENCY_US_MAX: u64 = 3_600_000_000;
/// Significant digits of a latency.
const DIGITS: u8 = 3;
/// Points of a run's course, about.
const POINTS: u64 = 200;
/// Time between two points in nanoseconds, at least and where the run's length is not known.
const POINT_NS_MIN: u64 = 250_000_000;
/// Points that are kept of a run whose length is not known.
const POINTS_MAX: usize = 20_000;

/// How a run goes, for who looks on. The threads of the run add to it some times a second.
#[derive(Debug, Default)]
pub struct Progress {
    pub requests: AtomicU64,
    pub events: AtomicU64,
    pub failures: AtomicU64,
    /// Requests under way.
    pub active: AtomicU64,
    /// Of the last interval, in microseconds: time to first token, or total where nothing is streamed.
    pub p50_us: AtomicU64,
    pub p99_us: AtomicU64,
}

/// One edge of the window.
#[derive(Clone, Debug, Default)]
struct Mark {
    at_ns: u64,
    requests: u64,
    events: u64,
    processes: Vec<Option<Snapshot>>,
}

/// Histograms and counts of one part.
struct Lane {
    report: PartReport,
    ttft: Histogram<u64>,
    inter_token: Histogram<u64>,
    total: Histogram<u64>,
    delay: Histogram<u64>,
}

/// What happened since the last point.
struct Interval {
    started_ns: u64,
    requests: u64,
    events: u64,
    failures: u64,
    active: u64,
    first: Histogram<u64>,
    delay: Histogram<u64>,
    processes: Vec<Option<Snapshot>>,
}

pub(super) struct Tally {
    pub report: Report,
    /// The first thread of a run measures the processes.
    pids: Vec<u32>,
    lanes: Vec<Lane>,
    opened: Option<Mark>,
    closed: Option<Mark>,
    /// Before the first connection: memory is compared with this.
    first: Vec<Option<Snapshot>>,
    interval: Interval,
    point_ns: u64,
    points: Vec<Point>,
    progress: Option<Arc<Progress>>,
    progress_active: u64,
    count_system_calls: bool,
    counters: Vec<SyscallCounter>,
    slice: Option<Mark>,
    slice_counts: (u64, u64),
    slice_done: bool,
}

fn histogram() -> Result<Histogram<u64>, hdrhistogram::CreationError> {
    Histogram::new_with_bounds(1, LATENCY_US_MAX, DIGITS)
}

impl Tally {
    pub fn new(options: &Options, thread: usize) -> Result<Self, hdrhistogram::CreationError> {
        let pids = if thread == 0 {
            options.pids.clone()
        } else {
            Vec::new()
        };
        let lanes: Result<Vec<Lane>, _> = options.parts.iter().map(|part| Lane::new(&part.name)).collect();
        let length_ns = options.duration.map_or(0, |time| time.as_nanos() as u64);
        Ok(Self {
            report: Report::default(),
            lanes: lanes?,
            opened: None,
            closed: None,
            interval: Interval {
                started_ns: 0,
                requests: 0,
                events: 0,
                failures: 0,
                active: 0,
                first: histogram()?,
                delay: histogram()?,
                processes: snapshots(&pids),
            },
            first: snapshots(&pids),
            pids,
            point_ns: POINT_NS_MIN.max(length_ns / POINTS),
            points: Vec::new(),
            progress: options.progress.clone(),
            progress_active: 0,
            count_system_calls: options.count_system_calls.is_some(),
            counters: Vec::new(),
            slice: None,
            slice_counts: (0, 0),
            slice_done: false,
        })
    }

    fn mark(&self, now_ns: u64) -> Mark {
        Mark {
            at_ns: now_ns,
            requests: self.report.requests,
            events: self.report.events,
            processes: snapshots(&self.pids),
        }
    }

    /// The warm-up is over: latencies begin anew. Only the first call counts.
    pub fn open_window(&mut self, now_ns: u64) {
        if self.opened.is_none() {
            self.opened = Some(self.mark(now_ns));
            self.lanes.iter_mut().for_each(Lane::reset);
            self.report.not_timed = 0;
        }
    }

    /// Ends the window. Only the first call counts.
    pub fn close_window(&mut self, now_ns: u64) {
        if self.closed.is_some() {
            return;
        }
        self.closed = Some(self.mark(now_ns));
        if self.count_system_calls {
            for pid in &self.pids {
                match SyscallCounter::open(*pid) {
                    Ok(counter) => self.counters.push(counter),
                    Err(reason) => self.report.system_calls_missing = Some(reason),
                }
            }
            self.slice = Some(self.mark(now_ns));
        }
    }

    /// Ends the time in which system calls are counted. Only the first call counts.
    pub fn close_slice(&mut self, _now_ns: u64) {
        if let (Some(slice), false) = (&self.slice, self.slice_done) {
            self.slice_done = true;
            self.slice_counts = (
                self.report.requests - slice.requests,
                self.report.events - slice.events,
            );
            self.report.system_calls = self.counters.drain(..).map(|counter| counter.read()).sum();
        }
    }

    /// Counts what one read brought; `last_token_ns` is the time of the token before.
    pub fn arrived(
        &mut self,
        part: usize,
        arrivals: &Arrivals,
        now_ns: u64,
        started_ns: u64,
        last_token_ns: u64,
    ) {
        self.report.bytes += arrivals.bytes;
        self.report.events += arrivals.events;
        let lane = &mut self.lanes[part];
        lane.report.events += arrivals.events;
        let tokens = arrivals.after.saturating_sub(arrivals.before);
        self.report.tokens += tokens;
        if tokens == 0 {
            return;
        }
        if arrivals.before == 0 {
            let micros = micros(now_ns, started_ns);
            lane.ttft.saturating_record(micros);
            self.interval.first.saturating_record(micros);
        } else {
            lane.inter_token.saturating_record(micros(now_ns, last_token_ns));
        }
        // Tokens that came in one read have no time between them.
        lane.inter_token.saturating_record_n(0, tokens - 1);
    }

    /// A token sent at `sent_us` was read at `now_us`, both of `CLOCK_MONOTONIC`. A stamp of another host's clock would
    /// be far off and is left out.
    pub fn delayed(&mut self, part: usize, now_us: u64, sent_us: u64) {
        if let Some(delay_us) = now_us
            .checked_sub(sent_us)
            .filter(|delay_us| *delay_us < LATENCY_US_MAX)
        {
            self.lanes[part].delay.saturating_record(delay_us);
            self.interval.delay.saturating_record(delay_us);
        }
    }

    pub fn ended(
        &mut self,
        part: usize,
        outcome: Outcome,
        expected: Option<u16>,
        now_ns: u64,
        started_ns: u64,
    ) {
        let report = &mut self.report;
        let lane = &mut self.lanes[part];
        report.requests += 1;
        lane.report.requests += 1;
        let failures_before = report.failures.total();
        let failures = &mut report.failures;
        // Who refuses at once must not look fast, and who never answers must not be left out.
        let timed = match outcome {
            Outcome::Whole(status) => status == 200 || expected == Some(status),
            Outcome::Timeout => true,
            _ => false,
        };
        if timed {
            let micros = micros(now_ns, started_ns);
            lane.total.saturating_record(micros);
            if lane.report.events == 0 {
                self.interval.first.saturating_record(micros);
            }
        } else if outcome != Outcome::HungUp {
            report.not_timed += 1;
        }
        match outcome {
            Outcome::Whole(status) => {
                *report.status.entry(status).or_default() += 1;
                report.ok += u64::from(status == 200);
                lane.report.ok += u64::from(status == 200);
                failures.status += u64::from(expected.is_some_and(|expected| expected != status));
            }
            Outcome::Flawed(flaw) => {
                *report.status.entry(200).or_default() += 1;
                match flaw {
                    Flaw::Mismatch => failures.mismatch += 1,
                    Flaw::Border => failures.border += 1,
                    Flaw::NoFinish => failures.no_finish += 1,
                    Flaw::NoDone => failures.no_done += 1,
                    Flaw::ErrorEvent => failures.error_event += 1,
                }
            }
            Outcome::HungUp => report.hung_up += 1,
            Outcome::Connect => failures.connect += 1,
            Outcome::Cut => failures.cut += 1,
            Outcome::Malformed => failures.malformed += 1,
            Outcome::Timeout => failures.timeout += 1,
        }
        lane.report.failures += failures.total() - failures_before;
    }

    /// Nanoseconds until the next point of the run's course.
    pub fn next_tick_in_ns(&self, now_ns: u64) -> u64 {
        (self.interval.started_ns + self.point_ns).saturating_sub(now_ns)
    }

    /// Makes a point where one is due.
    pub fn tick(&mut self, now_ns: u64, active: usize) {
        self.interval.active = active as u64;
        if self.next_tick_in_ns(now_ns) == 0 {
            self.make_point(now_ns);
        }
    }

    fn make_point(&mut self, now_ns: u64) {
        let seconds = now_ns.saturating_sub(self.interval.started_ns) as f64 / 1e9;
        let failures = self.report.failures.total();
        let interval = &mut self.interval;
        let rate = |count: u64| {
            if seconds > 0.0 {
                count as f64 / seconds
            } else {
                0.0
            }
        };
        let processes = snapshots(&self.pids);
        let costs: Vec<Cost> = pairs(&self.pids, &interval.processes, &processes)
            .map(|(pid, before, after)| Cost::between(pid, before, after, seconds))
            .collect();
        let point = Point {
            at_s: now_ns as f64 / 1e9,
            requests_per_s: rate(self.report.requests - interval.requests),
            events_per_s: rate(self.report.events - interval.events),
            active: interval.active,
            failures: failures - interval.failures,
            first_p50_us: quantile(&interval.first, 0.5),
            first_p99_us: quantile(&interval.first, 0.99),
            delay_p50_us: quantile(&interval.delay, 0.5),
            delay_p99_us: quantile(&interval.delay, 0.99),
            cores: costs.iter().map(|cost| cost.cores).sum(),
            resident_bytes: costs.iter().map(|cost| cost.resident_after_bytes).sum(),
        };
        if let Some(progress) = &self.progress {
            progress
                .requests
                .fetch_add(self.report.requests - interval.requests, Relaxed);
            progress
                .events
                .fetch_add(self.report.events - interval.events, Relaxed);
            progress.failures.fetch_add(point.failures, Relaxed);
            progress
                .active
                .fetch_add(interval.active.wrapping_sub(self.progress_active), Relaxed);
            self.progress_active = interval.active;
            if let (Some(p50_us), Some(p99_us)) = (point.first_p50_us, point.first_p99_us) {
                progress.p50_us.store(p50_us, Relaxed);
                progress.p99_us.store(p99_us, Relaxed);
            }
        }
        if self.points.len() < POINTS_MAX {
            self.points.push(point);
        }
        interval.started_ns = now_ns;
        interval.requests = self.report.requests;
        interval.events = self.report.events;
        interval.failures = failures;
        interval.first.reset();
        interval.delay.reset();
        interval.processes = processes;
    }

    /// Ends what is still open. What [`Self::into_report`] tells of processes, it is told here.
    pub fn finish(&mut self, now_ns: u64) {
        self.open_window(now_ns);
        self.close_window(now_ns);
        self.close_slice(now_ns);
        self.interval.active = 0;
        self.make_point(now_ns);
        let (Some(opened), Some(closed)) = (&self.opened, &self.closed) else {
            return;
        };
        let report = &mut self.report;
        report.elapsed_s = closed.at_ns.saturating_sub(opened.at_ns) as f64 / 1e9;
        report.requests_in_window = closed.requests.saturating_sub(opened.requests);
        report.events_in_window = closed.events.saturating_sub(opened.events);
        // A process that is not there at both ends has no cost to tell.
        let at_ends = self
            .pids
            .iter()
            .zip(opened.processes.iter().zip(&closed.processes));
        report.processes_gone = at_ends
            .filter(|(_, (opened, closed))| opened.is_none() || closed.is_none())
            .map(|(pid, _)| *pid)
            .collect();
        report.processes = pairs(&self.pids, &opened.processes, &closed.processes)
            .map(|(pid, before, after)| Cost::between(pid, before, after, report.elapsed_s))
            .collect();
    }

    /// Adds what another thread of the same run has found out. Its window is taken to be the same.
    pub fn merge(&mut self, other: Self) {
        let report = &mut self.report;
        report.add(&other.report);
        self.slice_counts.0 += other.slice_counts.0;
        self.slice_counts.1 += other.slice_counts.1;
        for (lane, theirs) in self.lanes.iter_mut().zip(&other.lanes) {
            lane.report.add(&theirs.report);
            // All histograms have the same bounds, so that adding cannot fail.
            let _ = lane.ttft.add(&theirs.ttft);
            let _ = lane.inter_token.add(&theirs.inter_token);
            let _ = lane.total.add(&theirs.total);
            let _ = lane.delay.add(&theirs.delay);
        }
        for (point, theirs) in self.points.iter_mut().zip(&other.points) {
            point.add(theirs);
        }
    }

    /// The whole report, after [`Self::finish`] and every [`Self::merge`].
    pub fn into_report(mut self) -> Report {
        let mut report = std::mem::take(&mut self.report);
        let per_second = |count: u64| {
            if report.elapsed_s > 0.0 {
                count as f64 / report.elapsed_s
            } else {
                0.0
            }
        };
        report.requests_per_s = per_second(report.requests_in_window);
        report.events_per_s = per_second(report.events_in_window);
        for cost in &mut report.processes {
            cost.share(report.requests_in_window, report.events_in_window);
            let first = self
                .pids
                .iter()
                .position(|pid| *pid == cost.pid)
                .and_then(|index| self.first[index]);
            if let (Some(first), streams @ 1..) = (first, report.open_streams) {
                cost.resident_before_bytes = first.resident_bytes;
                let grown = cost.resident_after_bytes as f64 - first.resident_bytes as f64;
                cost.bytes_per_open_stream = Some(grown / streams as f64);
            }
        }
        let (requests, events) = self.slice_counts;
        let per = |count: u64| {
            (count > 0 && report.system_calls > 0).then(|| report.system_calls as f64 / count as f64)
        };
        report.system_calls_per_request = per(requests);
        report.system_calls_per_event = per(events);
        report.series = self.points;
        let mut lanes = self.lanes.into_iter();
        let Some(mut all) = lanes.next() else {
            return report;
        };
        report.parts.push(all.finished());
        for lane in lanes {
            report.parts.push(lane.finished());
            let _ = all.ttft.add(&lane.ttft);
            let _ = all.inter_token.add(&lane.inter_token);
            let _ = all.total.add(&lane.total);
            let _ = all.delay.add(&lane.delay);
        }
        all.report = all.finished();
        (report.ttft, report.inter_token) = (all.report.ttft.clone(), all.report.inter_token.clone());
        (report.total, report.delay) = (all.report.total.clone(), all.report.delay.clone());
        report.curves = all.report.curves.take().unwrap_or_default();
        if let [_] = &report.parts[..] {
            // One part is the whole: its curves need not be told twice.
            report.parts[0].curves = None;
        }
        report
    }
}

impl Lane {
    fn new(name: &str) -> Result<Self, hdrhistogram::CreationError> {
        Ok(Self {
            report: PartReport {
                name: name.to_owned(),
                ..PartReport::default()
            },
            ttft: histogram()?,
            inter_token: histogram()?,
            total: histogram()?,
            delay: histogram()?,
        })
    }

    fn reset(&mut self) {
        self.ttft.reset();
        self.inter_token.reset();
        self.total.reset();
        self.delay.reset();
    }

    fn finished(&self) -> PartReport {
        PartReport {
            ttft: Latency::of(&self.ttft),
            inter_token: Latency::of(&self.inter_token),
            total: Latency::of(&self.total),
            delay: Latency::of(&self.delay),
            curves: Some(Curves {
                ttft: Curves::of(&self.ttft),
                inter_token: Curves::of(&self.inter_token),
                total: Curves::of(&self.total),
                delay: Curves::of(&self.delay),
            }),
            ..self.report.clone()
        }
    }
}

fn quantile(histogram: &Histogram<u64>, quantile: f64) -> Option<u64> {
    (!histogram.is_empty()).then(|| histogram.value_at_quantile(quantile))
}

fn snapshots(pids: &[u32]) -> Vec<Option<Snapshot>> {
    pids.iter().map(|pid| Snapshot::read(*pid)).collect()
}

/// The processes that are in both lists.
fn pairs<'a>(
    pids: &'a [u32],
    before: &'a [Option<Snapshot>],
    after: &'a [Option<Snapshot>],
) -> impl Iterator<Item = (u32, &'a Snapshot, &'a Snapshot)> {
    pids.iter()
        .zip(before.iter().zip(after))
        .filter_map(|(pid, (before, after))| Some((*pid, before.as_ref()?, after.as_ref()?)))
}

fn micros(now_ns: u64, then_ns: u64) -> u64 {
    now_ns.saturating_sub(then_ns) / 1000
}

impl Failures {
    /// Adds another thread's.
    pub(super) fn add(&mut self, other: &Self) {
        self.connect += other.connect;
        self.cut += other.cut;
        self.malformed += other.malformed;
        self.timeout += other.timeout;
        self.mismatch += other.mismatch;
        self.border += other.border;
        self.no_finish += other.no_finish;
        self.no_done += other.no_done;
        self.error_event += other.error_event;
        self.status += other.status;
    }
}
