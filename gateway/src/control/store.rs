//! What administrators change at run time: keys, teams, budgets, credit. SQLite on a thread of its own.
//!
//! A change is in the database, forced to disk, and in force on all cores before it is answered. Changes that wait
//! together are committed together, so that a burst costs few syncs. Nobody on the data plane knows of this thread: it
//! swaps parts of what they read ([`crate::serve::keys::Keys`]).
//!
//! Every document carries a stamp of time and host, and every host numbers its changes: with
//! [`Store::changes_since`] and [`Store::apply`] several hosts come to the same state, in whatever order and how often
//! they hear of a change; of two changes of one document the one with the greater stamp stands.

mod budgets;
mod db;
mod keys;
mod limits;
mod model;
mod teams;
#[cfg(test)]
mod tests;

use std::{
    fmt,
    path::Path,
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};

use crossbeam::channel::{Receiver, RecvTimeoutError, Sender, TrySendError, bounded};
use tokio::sync::{oneshot, watch};

use crate::net::clock;

pub use budgets::{BudgetSettings, NewTopUp, Standing, usd};
pub use db::{Db, Entry, FILE, Row};
pub use keys::{KEYS_MAX, KeyPatch, NewKey, Revocation, Rotation};
pub use limits::{KeyLimit, LIMITS_MAX};
pub use model::{
    Budget, Change, Changed, Doc, Key, Kind, Revoked, Running, Scope, Secret, Stamp, Team, TopUp,
};
pub use teams::{NewTeam, TeamPatch};

/// How far the stamp of another host's change may be ahead of this host's clock before that is logged, milliseconds: ten
/// minutes. Hosts with NTP agree to some milliseconds.
pub const AHEAD_MS_MAX: u64 = 600_000;

/// Changes that wait for the thread. More are refused: who sends so many may come back.
const WAITING_MAX: usize = 1024;

/// Changes in one transaction: a bound for how long the first waits for the last.
const TOGETHER_MAX: usize = 128;

/// How often times of last use are written down.
const USED_EVERY: Duration = Duration::from_secs(60);

/// Who changes something: the name of the admin token.
pub type Actor = str;

/// What became of a change that was not made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cause {
    /// What was asked for has a wrong form or names something unknown.
    Invalid,
    NotFound,
    /// It does not go with what is there.
    Conflict,
    /// It has changed since the caller looked.
    Stale,
    /// Too many changes at once.
    Busy,
    /// The database cannot be read or written.
    Broken,
}

/// Why a change was not made.
#[derive(Debug, Clone)]
pub struct Failure {
    pub cause: Cause,
    pub message: String,
}

impl Failure {
    pub fn new(cause: Cause, message: impl Into<String>) -> Failure {
        Failure {
            cause,
            message: message.into(),
        }
    }

    pub fn invalid(message: impl Into<String>) -> Failure {
        Failure::new(Cause::Invalid, message)
    }

    pub fn conflict(message: impl Into<String>) -> Failure {
        Failure::new(Cause::Conflict, message)
    }

    pub fn not_found(what: &str) -> Failure {
        Failure::new(Cause::NotFound, format!("there is no such {what}"))
    }

    pub fn broken(message: impl Into<String>) -> Failure {
        Failure::new(Cause::Broken, message)
    }
}

impl From<rusqlite::Error> for Failure {
    fn from(error: rusqlite::Error) -> Failure {
        Failure::broken(format!("{FILE}: {error}"))
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Failure {}

/// Who puts committed changes in force. Runs on the store's thread, before the caller has an answer.
pub trait Follow: Send + 'static {
    /// Follows changes in their order.
    fn follow(&mut self, changed: &[Changed]);
    /// Names of keys that were used since this time, and when, milliseconds since 1970.
    fn used_since(&self, unix_ms: u64) -> Vec<(String, u64)>;
    /// The same of keys that went out of force since it was last asked.
    fn used_of_ended(&mut self) -> Vec<(String, u64)>;
}

/// Tells the caller what became of its change, when that is known.
type Finish = Box<dyn FnOnce(Result<(), Failure>) + Send>;

/// A change to try in the running transaction.
type Job = Box<dyn FnOnce(&mut Db) -> Finish + Send>;

/// The store, from any thread.
#[derive(Clone)]
pub struct Store {
    jobs: Sender<Job>,
    host: Arc<str>,
    version: watch::Receiver<u64>,
    trouble: Arc<Mutex<Option<String>>>,
}

impl Store {
    /// Starts the thread over an open database.
    ///
    /// # Errors
    /// The thread cannot be started, or the database not be read.
    pub fn start(db: Db, follower: impl Follow) -> anyhow::Result<Store> {
        let (jobs, waiting) = bounded(WAITING_MAX);
        let (tell_version, version) = watch::channel(db.version()?);
        let trouble = Arc::new(Mutex::new(None));
        let store = Store {
            jobs,
            host: db.host().into(),
            version,
            trouble: trouble.clone(),
        };
        let worker = Worker {
            db,
            follower,
            waiting,
            tell_version,
            trouble,
            used_from_ms: clock::unix_ms(),
        };
        thread::Builder::new()
            .name("control-store".into())
            .spawn(move || worker.run())?;
        Ok(store)
    }

    /// Runs a change: all of it is made, forced to disk and in force, or nothing.
    ///
    /// # Errors
    /// The change's own, or the database's.
    pub async fn change<T: Send + 'static>(
        &self,
        change: impl FnOnce(&mut Db) -> Result<T, Failure> + Send + 'static,
    ) -> Result<T, Failure> {
        let answer = self.send(change)?;
        let gone = || Failure::broken("the store's thread has ended");
        answer.await.map_err(|_| gone())?
    }

    /// As [`Store::change`], for a thread that may wait.
    ///
    /// # Errors
    /// As [`Store::change`].
    pub fn change_blocking<T: Send + 'static>(
        &self,
        change: impl FnOnce(&mut Db) -> Result<T, Failure> + Send + 'static,
    ) -> Result<T, Failure> {
        let answer = self.send(change)?;
        let gone = || Failure::broken("the store's thread has ended");
        answer.blocking_recv().map_err(|_| gone())?
    }

    fn send<T: Send + 'static>(
        &self,
        change: impl FnOnce(&mut Db) -> Result<T, Failure> + Send + 'static,
    ) -> Result<oneshot::Receiver<Result<T, Failure>>, Failure> {
        let (tell, answer) = oneshot::channel();
        let job: Job = Box::new(move |db| {
            let result = db.attempt(change);
            // A caller that has gone does not undo its change.
            Box::new(move |committed| drop(tell.send(committed.and(result))))
        });
        match self.jobs.try_send(job) {
            Ok(()) => Ok(answer),
            Err(TrySendError::Full(_)) => {
                let message = "too many changes at once; try again";
                Err(Failure::new(Cause::Busy, message))
            }
            Err(TrySendError::Disconnected(_)) => Err(Failure::broken("the store's thread has ended")),
        }
    }

    /// This host's id in stamps, 16 hex digits.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// The version of the last change; changes with it.
    pub fn version(&self) -> watch::Receiver<u64> {
        self.version.clone()
    }

    /// Up to `max` documents that changed behind `version`, own changes and those applied, in their order.
    ///
    /// # Errors
    /// The database's.
    pub async fn changes_since(&self, version: u64, max: usize) -> Result<Vec<Change>, Failure> {
        self.change(move |db| db.changes_since(version, max)).await
    }

    /// Takes over changes of other hosts. Again, late or out of order they change nothing that is newer. One whose stamp
    /// is further ahead than [`AHEAD_MS_MAX`] is taken too, and said so: a key that a host with a wrong clock revoked is
    /// revoked. It does not stand against later changes, whose stamps are above those that they find; only against those of
    /// hosts that had not heard of it. Returns how many were news.
    ///
    /// # Errors
    /// The database's, or a document is not understood; then none was taken over.
    pub async fn apply(&self, changes: Vec<Change>) -> Result<usize, Failure> {
        self.change(move |db| {
            let latest_ms = clock::unix_ms() + AHEAD_MS_MAX;
            let (mut news, mut ahead) = (0, 0u64);
            for change in &changes {
                if !db.apply(change)? {
                    continue;
                }
                news += 1;
                ahead += u64::from(change.stamp.unix_ms > latest_ms);
            }
            if ahead > 0 {
                tracing::error!(
                    ahead,
                    "changes by clocks that are over ten minutes ahead of this host's: one of them is wrong, and what hosts \
                     change at the same time may not end as the latest"
                );
            }
            Ok(news)
        })
        .await
    }

    /// What is wrong with the database, if anything.
    pub fn trouble(&self) -> Option<String> {
        self.trouble
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}

struct Worker<F> {
    db: Db,
    follower: F,
    waiting: Receiver<Job>,
    tell_version: watch::Sender<u64>,
    trouble: Arc<Mutex<Option<String>>>,
    /// Uses up to here are written down.
    used_from_ms: u64,
}

impl<F: Follow> Worker<F> {
    fn run(mut self) {
        let mut used_due = Instant::now() + USED_EVERY;
        loop {
            let patience = used_due.saturating_duration_since(Instant::now());
            match self.waiting.recv_timeout(patience) {
                Ok(first) => {
                    let mut jobs = vec![first];
                    jobs.extend(self.waiting.try_iter().take(TOGETHER_MAX - 1));
                    self.together(jobs);
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => break,
            }
            if used_due <= Instant::now() {
                self.write_used();
                used_due = Instant::now() + USED_EVERY;
            }
        }
        self.write_used();
    }

    /// Runs changes in one transaction, puts them in force, then tells their callers.
    fn together(&mut self, jobs: Vec<Job>) {
        if let Err(failure) = self.db.begin() {
            self.note(Some(&failure));
            for job in jobs {
                // Without a transaction it changes nothing.
                job(&mut self.db)(Err(failure.clone()));
            }
            return;
        }
        let finishes: Vec<Finish> = jobs.into_iter().map(|job| job(&mut self.db)).collect();
        let committed = match self.db.commit() {
            Ok(changed) => {
                if !changed.is_empty() {
                    self.follower.follow(&changed);
                    let used = self.follower.used_of_ended();
                    self.keep_used(&used);
                    let version = self.db.version().unwrap_or_default();
                    self.tell_version.send_replace(version);
                }
                self.note(None);
                Ok(())
            }
            Err(failure) => {
                self.note(Some(&failure));
                Err(failure)
            }
        };
        finishes.into_iter().for_each(|finish| finish(committed.clone()));
    }

    fn note(&self, failure: Option<&Failure>) {
        let mut trouble = self.trouble.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(failure) = failure.filter(|_| trouble.is_none()) {
            tracing::error!("changes by administrators cannot be kept: {failure}");
        }
        *trouble = failure.map(|failure| failure.message.clone());
    }

    fn write_used(&mut self) {
        let now_ms = clock::unix_ms();
        // Uses may be noted up to a second late.
        let used = self.follower.used_since(self.used_from_ms.saturating_sub(2000));
        self.used_from_ms = now_ms;
        self.keep_used(&used);
    }

    fn keep_used(&mut self, used: &[(String, u64)]) {
        if used.is_empty() {
            return;
        }
        if let Err(error) = self.db.write_used(used) {
            tracing::warn!(%error, "the times of last use cannot be kept");
        }
    }
}

/// Opens the database of a state directory.
///
/// # Errors
/// As [`Db::open`].
pub fn open(state: &Path) -> anyhow::Result<Db> {
    Db::open(state)
}
