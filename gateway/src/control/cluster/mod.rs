//! Several hosts through one store (Redis or Valkey): shared limits, keys,
//! budgets and blocks. docs/cluster.md says what it means.
//!
//! A task of the control thread makes a round every `store.round`: it looks at all shared levels of this host
//! ([`tracker`]), reports what was used and leases what will be ([`link`], `lease.lua`). Another one exchanges
//! blocks and what administrators changed ([`feed`]). No request waits for either.

mod calls;
mod documents;
pub mod feed;
pub mod level;
pub mod link;
mod node;
mod peers;
mod rounds;
mod script;
mod status;
#[cfg(test)]
mod tests;
pub mod tracker;
mod wire;

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use crossbeam::queue::ArrayQueue;
use ipnet::IpNet;
use tokio::sync::watch;

use crate::{
    config::{Config, schema::Store},
    control::store,
    net::clock,
    quota::leases::Directory,
};
use link::Link;
pub use status::{Status, write_metrics};

/// Blocks that wait to be published. While the store is gone the oldest are forgotten: they are over first.
const BLOCKS_WAITING_MAX: usize = 4096;

/// What the cluster does on this host.
pub trait Node: Send + Sync + 'static {
    /// Another host blocked a client. What may not be blocked here is not.
    fn block_from_peer(&self, client: IpNet, hold: Duration);
    /// Another host lifted a block.
    fn unblock_from_peer(&self, client: IpNet);
}

/// This host's part in the cluster.
pub struct Cluster {
    settings: Store,
    /// This host's name, and a part that is another for each process.
    host: String,
    directory: Arc<Directory>,
    status: Mutex<Status>,
    blocks: ArrayQueue<(IpNet, Option<Duration>, u64)>,
    link: watch::Sender<Option<Link>>,
}

/// The two tasks. Dropping it does not end them.
pub struct Tasks {
    stop: watch::Sender<bool>,
    rounds: tokio::task::JoinHandle<()>,
    peers: tokio::task::JoinHandle<()>,
}

/// This host's part in the cluster, where the configuration has one.
///
/// # Errors
/// See [`Cluster::new`].
pub fn join(config: &Config) -> anyhow::Result<Option<Arc<Cluster>>> {
    let store = config.store.as_ref();
    store.map(|store| Cluster::new(store, Arc::default())).transpose()
}

impl Cluster {
    /// This host's part, not yet at work.
    ///
    /// # Errors
    /// The system has no random numbers.
    pub fn new(settings: &Store, directory: Arc<Directory>) -> anyhow::Result<Arc<Cluster>> {
        let mut epoch = [0; 8];
        getrandom::fill(&mut epoch)?;
        let name = settings.host.clone().unwrap_or_else(host_name);
        let lasts_ns = settings.lease.0.as_nanos() as u64;
        directory.set_opening(settings.first_share, lasts_ns);
        Ok(Arc::new(Cluster {
            settings: settings.clone(),
            host: format!("{}-{:016x}", proper(&name), u64::from_le_bytes(epoch)),
            directory,
            status: Mutex::new(Status::default()),
            blocks: ArrayQueue::new(BLOCKS_WAITING_MAX),
            link: watch::Sender::new(None),
        }))
    }

    /// Sets the two tasks to work, on the runtime of the control thread.
    ///
    /// `store` is what administrators changed here, to be shared too.
    pub fn start(self: &Arc<Self>, node: Arc<dyn Node>, store: Option<store::Store>) -> Tasks {
        let (stop, stopped) = watch::channel(false);
        Tasks {
            rounds: tokio::spawn(rounds::run(self.clone(), stopped)),
            peers: tokio::spawn(peers::run(self.clone(), node, store)),
            stop,
        }
    }

    /// The shared levels of this host.
    pub fn directory(&self) -> &Arc<Directory> {
        &self.directory
    }

    /// How it goes.
    pub fn status(&self) -> Status {
        self.lock().clone()
    }

    fn lock(&self) -> MutexGuard<'_, Status> {
        self.status.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells the other hosts of a block; `None`: that it was lifted.
    pub fn tell_block(&self, client: IpNet, hold: Option<Duration>) {
        // Of the oldest one the time is over first.
        self.blocks.force_push((client, hold, clock::monotonic_ns()));
    }

    /// The wall clock as the store has it, milliseconds.
    fn unix_ms(&self) -> u64 {
        clock::unix_ms().saturating_add_signed(self.directory.offset_ms())
    }
}

impl Tasks {
    /// Gives all leases back, as far as the store can be told within `patience`, and ends the tasks.
    pub async fn end(self, patience: Duration) {
        self.peers.abort();
        let _ = self.stop.send(true);
        let _ = tokio::time::timeout(patience, self.rounds).await;
    }
}

fn host_name() -> String {
    std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_else(|_| "host".into())
}

/// A name without what separates fields in the store.
fn proper(name: &str) -> String {
    let allowed = |c: &char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    name.chars().filter(allowed).take(64).collect()
}
