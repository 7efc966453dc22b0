//! The rounds: looks at all shared levels, reports, leases, and goes on without the store where it is gone.

use std::{collections::HashMap, sync::Arc, time::Duration};

use tokio::{
    sync::watch,
    task::JoinHandle,
    time::{Instant, MissedTickBehavior, interval},
};

use super::{
    Cluster,
    level::{Report, Times},
    link::{Address, Link},
    tracker::{Now, Tracker},
};
use crate::{config::schema::OnStoreLoss, net::clock, quota::lease::Leased};

/// Reports of one round at most: some 20 ms of work for a Redis. The others come with the next rounds.
const REPORTS_PER_ROUND_MAX: usize = 2_048;

/// Times between attempts to connect: from the first to the longest.
const RETRY_FIRST: Duration = Duration::from_millis(100);
const RETRY_LONGEST: Duration = Duration::from_secs(2);

/// How long the store remembers what a silent host reported: longer than a lost connection takes to come back.
const RECORDS_KEPT: Duration = Duration::from_secs(3600);

/// How often it is looked whether a request was refused for want of a lease: then a round comes at once.
const HURRY_EVERY: Duration = Duration::from_millis(5);

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
    /// Keyed by the address of the level, which its tracker keeps alive.
    trackers: HashMap<usize, Tracker>,
    instances: u64,
    /// Hosts that are there, as the store last said.
    hosts: u64,
    /// The last round gave the hungry something: who keeps asking for what is used up makes no rounds of its own.
    eager: bool,
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
        trackers: HashMap::new(),
        instances: 0,
        hosts: 1,
        eager: true,
    };
    let mut due = now;
    loop {
        tokio::select! {
            _ = ticks.tick() => {
                let hungry = rounds.cluster.directory.take_hurry();
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
        Now {
            ns: clock::monotonic_ns(),
            unix_ms: self.cluster.unix_ms(),
            lease_ns: self.cluster.settings.lease.0.as_nanos() as u64,
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
        let answered = match self.link.clone() {
            Some(link) => self.report(link).await,
            None => Err(None),
        };
        if let Err(Some(error)) = answered {
            self.lose(&error);
        }
        if self.link.is_none() && self.cluster.settings.on_store_loss == OnStoreLoss::Local {
            let now = self.now();
            for tracker in self.trackers.values_mut() {
                tracker.grant_locally(self.hosts, now);
            }
        }
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
        self.cluster.link.send_replace(None);
        self.retry_at = Instant::now() + self.retry_after;
        self.retry_after = (self.retry_after * 2).min(RETRY_LONGEST);
    }

    /// Tells the store and takes its answers.
    async fn report(&mut self, mut link: Link) -> Result<(), Option<anyhow::Error>> {
        if Instant::now() >= self.present_at {
            self.present_at = Instant::now() + PRESENCE_EVERY;
            let lease_ms = self.cluster.settings.lease.0.as_millis() as u64;
            let before_ms = clock::unix_ms();
            let (store_ms, hosts) = link.present(&self.cluster.host, lease_ms).await.map_err(Some)?;
            // Half of the way there and back is within a round's accuracy.
            let here_ms = before_ms + clock::unix_ms().saturating_sub(before_ms) / 2;
            self.cluster
                .directory
                .set_offset_ms(store_ms as i64 - here_ms as i64);
            self.hosts = hosts.max(1);
        }
        let now = self.now();
        let mut hungry_first: Vec<(&usize, &mut Tracker)> = self.trackers.iter_mut().collect();
        if hungry_first.len() > REPORTS_PER_ROUND_MAX {
            hungry_first.sort_by_key(|(_, tracker)| tracker.urgency());
        }
        let mut places = Vec::new();
        let mut reports: Vec<Report> = Vec::new();
        for (place, tracker) in hungry_first {
            if reports.len() >= REPORTS_PER_ROUND_MAX {
                break;
            }
            if let Some(report) = tracker.report(now) {
                places.push(*place);
                reports.push(report);
            }
        }
        let sent_ns = clock::monotonic_ns();
        let answers = link.exchange(&reports, self.times()).await.map_err(Some)?;
        let now = self.now();
        let (mut granted, mut silent) = (0, 0);
        for ((place, report), answer) in places.iter().zip(&reports).zip(&answers) {
            let Some(tracker) = self.trackers.get_mut(place) else {
                continue;
            };
            match answer {
                Some(answer) => {
                    granted += answer.out.saturating_sub(report.kept);
                    tracker.answered(report, answer, sent_ns, now);
                }
                None => {
                    silent += 1;
                    if self.cluster.settings.on_store_loss == OnStoreLoss::Local {
                        tracker.grant_locally(self.hosts, now);
                    }
                }
            }
        }
        self.eager = granted > 0 || reports.iter().all(|report| report.needed == 0);
        self.cluster
            .lock()
            .reported(reports.len() as u64, granted, silent);
        Ok(())
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
            .counted(self.trackers.len(), local, self.hosts);
    }

    /// Hands back what is not held: the other hosts need not wait until the leases run out.
    async fn farewell(&mut self) {
        let Some(mut link) = self.link.take() else { return };
        let now = self.now();
        let mut reports = Vec::new();
        for tracker in self.trackers.values_mut() {
            tracker.level.lower(0);
            reports.extend(tracker.report(now));
        }
        for report in &mut reports {
            (report.wanted, report.needed) = (0, 0);
        }
        for part in reports.chunks(REPORTS_PER_ROUND_MAX) {
            if link.exchange(part, self.times()).await.is_err() {
                return;
            }
        }
        let _ = link.present(&self.cluster.host, 0).await;
    }
}

fn address(level: &Arc<Leased>) -> usize {
    Arc::as_ptr(level) as usize
}
