//! The rounds: looks at all shared levels, reports, leases, and goes on without the store where it is gone.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::Duration,
};

use tokio::{
    sync::watch,
    task::JoinHandle,
    time::{Instant, MissedTickBehavior, interval},
};

use super::{
    Cluster,
    calls::{Call, Calls, Done},
    level::{Report, Times},
    link::{Address, Link, SHARDS},
    tracker::{Now, Tracker},
};
use crate::{config::schema::OnStoreLoss, net::clock, quota::lease::Leased};

/// Reports of one round at most: some 20 ms of work for a Redis. The others come with the next rounds.
const REPORTS_PER_ROUND_MAX: usize = 2_048;

/// Levels that may all be reported in every round: some 5,000 reports a second, a fifteenth of a Redis. Of more each waits
/// for its turn, a sixth of a lease at most, while it has units left.
const LEVELS_EVERY_ROUND: usize = 256;

/// Times between attempts to connect: from the first to the longest.
const RETRY_FIRST: Duration = Duration::from_millis(100);
const RETRY_LONGEST: Duration = Duration::from_secs(2);

/// How long the store remembers what a silent host reported: longer than a lost connection takes to come back.
const RECORDS_KEPT: Duration = Duration::from_secs(3600);

/// How often it is looked whether a request was refused for want of a lease: then a round comes at once.
const HURRY_EVERY: Duration = Duration::from_millis(5);

/// How long the end of a host waits for the store to have heard all of its use; a half of what the whole leave may take.
const FAREWELL_TIME: Duration = Duration::from_millis(500);

/// How often this host says that it is there, and reads the store's clock.
const PRESENCE_EVERY: Duration = Duration::from_secs(1);

struct Rounds {
    cluster: Arc<Cluster>,
    address: Address,
    link: Option<Link>,
    connecting: Option<JoinHandle<anyhow::Result<Link>>>,
    retry_after: Duration,
    retry_at: Instant,
    present_at: Instant,
    calls: Calls,
    /// Keyed by the address of the level, which its tracker keeps alive.
    trackers: HashMap<usize, Tracker>,
    instances: u64,
    /// Hosts that are there, as the store last said.
    hosts: u64,
    /// The last round gave the hungry something: who keeps asking for what is used up makes no rounds of its own.
    eager: bool,
}

/// What the answers of one round come to.
#[derive(Default)]
struct Sum {
    reports: u64,
    granted: u64,
    silent: u64,
    /// Reports that tell whether asking again at once makes sense: those of a part that hangs do not.
    telling: u64,
    /// One of them said that a request could not run without more.
    needed: bool,
}

/// Runs until it is told to stop; then gives the leases back.
pub(super) async fn run(cluster: Arc<Cluster>, mut stopped: watch::Receiver<bool>) {
    let mut ticks = interval(HURRY_EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let now = Instant::now();
    let mut rounds = Rounds {
        address: Address::new(&cluster.settings),
        cluster,
        link: None,
        connecting: None,
        retry_after: RETRY_FIRST,
        retry_at: now,
        present_at: now,
        calls: Calls::default(),
        trackers: HashMap::new(),
        instances: 0,
        hosts: 1,
        eager: true,
    };
    let mut due = now;
    loop {
        tokio::select! {
            _ = ticks.tick() => {
                let hungry = rounds.cluster.directory.take_hurry() | rounds.calls.take_hurry();
                if hungry && rounds.eager || Instant::now() >= due {
                    due = Instant::now() + rounds.cluster.settings.round.0;
                    rounds.round().await;
                }
            }
            _ = stopped.changed() => return rounds.farewell().await,
        }
    }
}

impl Rounds {
    fn now(&self) -> Now {
        let lease_ns = self.cluster.settings.lease.0.as_nanos() as u64;
        let round_ns = self.cluster.settings.round.0.as_nanos() as u64;
        let turns = (self.trackers.len() / LEVELS_EVERY_ROUND) as u64;
        Now {
            ns: clock::monotonic_ns(),
            unix_ms: self.cluster.unix_ms(),
            lease_ns,
            defer_ns: (round_ns * turns).min(lease_ns / 6),
        }
    }

    fn times(&self) -> Times {
        let lease_us = self.cluster.settings.lease.0.as_micros() as u64;
        Times {
            lease_us,
            keep_us: RECORDS_KEPT.as_micros() as u64,
        }
    }

    async fn round(&mut self) {
        self.find_levels();
        self.connect().await;
        if let Some(link) = self.link.clone() {
            self.ask(&link);
            if let Err(error) = self.listen(&link).await {
                self.lose(&error);
            }
        }
        self.grant_locally();
        self.clean_up();
        self.note_status();
    }

    /// Begins to look after levels that came into use.
    fn find_levels(&mut self) {
        let now = self.now();
        let (trackers, instances, host) = (&mut self.trackers, &mut self.instances, &self.cluster.host);
        self.cluster.directory.each(|level| {
            trackers.entry(address(level)).or_insert_with(|| {
                *instances += 1;
                Tracker::new(level.clone(), format!("{host}.{instances}"), now)
            });
        });
    }

    async fn connect(&mut self) {
        if self.link.is_some() {
            return;
        }
        let done = match self.connecting.take() {
            Some(connecting) if connecting.is_finished() => connecting.await,
            Some(connecting) => {
                self.connecting = Some(connecting);
                return;
            }
            None if Instant::now() >= self.retry_at => {
                let (address, host) = (self.address.clone(), self.cluster.host.clone());
                let lease_ms = self.cluster.settings.lease.0.as_millis() as u64;
                self.connecting = Some(tokio::spawn(async move {
                    let mut link = address.connect().await?;
                    // A store that is loading or may not run scripts is no store.
                    link.present(&host, lease_ms).await?;
                    Ok(link)
                }));
                return;
            }
            None => return,
        };
        match done {
            Ok(Ok(link)) => self.found(link),
            Ok(Err(error)) => self.lose(&error),
            Err(panic) => self.lose(&panic.into()),
        }
    }

    fn found(&mut self, link: Link) {
        tracing::info!(host = %self.cluster.host, "connected to the store: limits are shared");
        self.retry_after = RETRY_FIRST;
        self.present_at = Instant::now();
        for tracker in self.trackers.values_mut() {
            tracker.tell_again();
        }
        self.cluster.link.send_replace(Some(link.clone()));
        self.link = Some(link);
        let settings = &self.cluster.settings;
        let lasts_ns = settings.lease.0.as_nanos() as u64;
        self.cluster.directory.set_opening(settings.first_share, lasts_ns);
        self.cluster.directory.set_closed(false);
        self.cluster.lock().found();
    }

    fn lose(&mut self, error: &anyhow::Error) {
        let refuses = self.cluster.settings.on_store_loss == OnStoreLoss::Refuse;
        let first = self.cluster.lock().lost(format!("{error:#}"));
        if first {
            let then = match refuses {
                true => "requests that shared limits count are refused when the leases have run out",
                false => "this host goes on with its share of shared limits",
            };
            tracing::warn!(error = format!("{error:#}"), "the store is out of reach: {then}");
        }
        if refuses {
            self.cluster.directory.set_opening(0, 0);
            self.cluster.directory.set_closed(true);
        }
        self.link = None;
        self.calls.clear();
        self.cluster.link.send_replace(None);
        self.retry_at = Instant::now() + self.retry_after;
        self.retry_after = (self.retry_after * 2).min(RETRY_LONGEST);
    }

    /// Asks the parts of the store that owe no answer.
    fn ask(&mut self, link: &Link) {
        let looks = Instant::now() >= self.present_at;
        if looks {
            self.present_at = Instant::now() + PRESENCE_EVERY;
            let lease_ms = self.cluster.settings.lease.0.as_millis() as u64;
            self.calls
                .say_present(link.clone(), self.cluster.host.clone(), lease_ms);
        }
        if !link.has_parts() && self.calls.is_busy(link.part(0)) {
            return;
        }
        let now = self.now();
        let mut parts: BTreeMap<u64, Vec<(usize, Report)>> = BTreeMap::new();
        if !link.has_parts() && looks {
            parts.insert(link.part(0), Vec::new());
        }
        let mut hungry_first: Vec<(&usize, &mut Tracker)> = self.trackers.iter_mut().collect();
        if hungry_first.len() > REPORTS_PER_ROUND_MAX {
            hungry_first.sort_by_cached_key(|(_, tracker)| tracker.urgency());
        }
        let mut reports = 0;
        for (place, tracker) in hungry_first {
            if reports >= REPORTS_PER_ROUND_MAX {
                break;
            }
            let part = link.part(tracker.level.id());
            if self.calls.is_busy(part) {
                if tracker.level.is_hungry() {
                    self.calls.wait_for(part);
                }
                continue;
            }
            let report = tracker.report(now);
            reports += usize::from(report.is_some());
            if looks || report.is_some() {
                let levels = parts.entry(part).or_default();
                levels.extend(report.map(|report| (*place, report)));
            }
        }
        if looks {
            let busy: Vec<u64> = (0..SHARDS).filter(|part| self.calls.is_busy(*part)).collect();
            let is_asked = |part: u64| parts.contains_key(&part) || busy.contains(&part);
            self.calls.forget_all_but(is_asked);
        }
        let times = self.times();
        for (part, levels) in parts {
            self.calls.report(link, part, levels, times);
        }
    }

    /// Takes what the store answers within a round; what takes longer is taken by a later one. Only while a part is slow and a
    /// level of another is hungry the next round comes before.
    ///
    /// # Errors
    /// The store does not answer.
    async fn listen(&mut self, link: &Link) -> anyhow::Result<()> {
        let until = Instant::now() + self.cluster.settings.round.0;
        let mut sum = Sum::default();
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let Some(done) = self.calls.ended(left.min(HURRY_EVERY)).await else {
                if left.is_zero() || !self.calls.is_any_running() || self.may_ask_others(link) {
                    break;
                }
                continue;
            };
            let result = match done {
                Done::Presence(Ok(presence)) => {
                    self.hosts = presence.hosts;
                    self.cluster.directory.set_offset_ms(presence.offset_ms);
                    Ok(())
                }
                Done::Presence(Err(error)) => Err(error),
                Done::Levels(call) => self.take(link, call, &mut sum),
            };
            if let Err(error) = result
                && (!link.has_parts() || self.calls.all_ill())
            {
                return Err(error);
            }
            if sum.telling > 0 {
                self.eager = sum.granted > 0 || !sum.needed;
            }
        }
        self.cluster.lock().reported(sum.reports, sum.granted, sum.silent);
        Ok(())
    }

    /// Whether a level is hungry whose part owes no answer, while others do. It looks at all levels, at most every
    /// [`HURRY_EVERY`]: about a millisecond where there are as many as there may be.
    fn may_ask_others(&self, link: &Link) -> bool {
        let directory = &self.cluster.directory;
        if !link.has_parts() || !self.eager || !directory.is_hurried() {
            return false;
        }
        let mut found = false;
        directory.each(|level| {
            found = found || level.is_hungry() && !self.calls.is_busy(link.part(level.id()));
        });
        found
    }

    /// Takes one call's answers.
    fn take(&mut self, link: &Link, call: Call, sum: &mut Sum) -> anyhow::Result<()> {
        let now = self.now();
        let reports = call.reports.len() as u64;
        sum.reports += reports;
        let round_ns = self.cluster.settings.round.0.as_nanos() as u64;
        if call.heard.is_ok() || now.ns.saturating_sub(call.sent_ns) < round_ns {
            sum.telling += reports;
            sum.needed |= call.reports.iter().any(|report| report.needed > 0);
        }
        let heard = match call.heard {
            Ok(heard) => heard,
            Err(error) => {
                sum.silent += reports;
                return Err(error);
            }
        };
        let (mut silent, local) = (0, self.goes_on_locally());
        for ((place, report), answer) in call.places.iter().zip(&call.reports).zip(&heard.answers) {
            let Some(tracker) = self.trackers.get_mut(place) else {
                continue;
            };
            // Another level may have come to the place of one that has gone.
            if tracker.host() != report.host {
                continue;
            }
            match answer {
                Some(answer) => {
                    sum.granted += answer.out.saturating_sub(report.kept);
                    tracker.answered(report, answer, call.sent_ns, now);
                }
                None => {
                    silent += 1;
                    if local {
                        tracker.grant_locally(self.hosts, now);
                    }
                }
            }
        }
        sum.silent += silent;
        if let Some(trouble) = heard.trouble
            && self.cluster.lock().is_spoilt(&trouble)
        {
            tracing::warn!(
                trouble,
                "the store cannot count a level; others are not logged for a minute"
            );
        }
        if self.calls.is_new(call.part, heard.mark) {
            tracing::warn!("the store has lost its data: it is told again what was used");
            for tracker in self.trackers.values_mut() {
                if link.part(tracker.level.id()) == call.part {
                    tracker.tell_again();
                }
            }
        }
        Ok(())
    }

    fn goes_on_locally(&self) -> bool {
        self.cluster.settings.on_store_loss == OnStoreLoss::Local
    }

    /// Grants where the store does not answer, or a part of it.
    fn grant_locally(&mut self) {
        if !self.goes_on_locally() {
            return;
        }
        let now = self.now();
        let is_gone = |tracker: &Tracker| match &self.link {
            Some(link) => self.calls.is_ill(link.part(tracker.level.id())),
            None => true,
        };
        for tracker in self.trackers.values_mut() {
            if is_gone(tracker) {
                tracker.grant_locally(self.hosts, now);
            }
        }
    }

    /// Lets levels go that nothing was asked of for long.
    fn clean_up(&mut self) {
        let now = self.now();
        let directory = &self.cluster.directory;
        self.trackers.retain(|_, tracker| {
            if tracker.retire(now) {
                directory.remove(&tracker.level);
            }
            !tracker.is_done()
        });
    }

    fn note_status(&self) {
        let local = self
            .trackers
            .values()
            .filter(|tracker| tracker.is_local())
            .count();
        self.cluster
            .lock()
            .counted(self.trackers.len(), local, self.hosts, self.calls.ill());
    }

    /// Hands back what is not held: the other hosts need not wait until the leases run out.
    async fn farewell(&mut self) {
        let Some(mut link) = self.link.take() else { return };
        // Nothing waits its turn any more: what is not told now is never told.
        let now = Now {
            defer_ns: 0,
            ..self.now()
        };
        self.calls.clear();
        let mut parts: BTreeMap<u64, Vec<(usize, Report)>> = BTreeMap::new();
        for (place, tracker) in &mut self.trackers {
            tracker.level.lower(0);
            if let Some(report) = tracker.report(now) {
                let report = Report {
                    wanted: 0,
                    needed: 0,
                    ..report
                };
                parts
                    .entry(link.part(report.id))
                    .or_default()
                    .push((*place, report));
            }
        }
        // All at once, so that a part that hangs keeps none of the others from hearing it. What such a part is owed comes back
        // with the lease.
        let times = self.times();
        for (part, levels) in parts {
            self.calls.report(&link, part, levels, times);
        }
        let until = Instant::now() + FAREWELL_TIME;
        while self
            .calls
            .ended(until.saturating_duration_since(Instant::now()))
            .await
            .is_some()
        {}
        let _ = link.present(&self.cluster.host, 0).await;
    }
}

fn address(level: &Arc<Leased>) -> usize {
    Arc::as_ptr(level) as usize
}
