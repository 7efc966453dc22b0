//! Hosts that are the control task and the levels alone, on a real Redis or Valkey.

#![allow(dead_code)] // each test file uses a part of it

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering::SeqCst},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use gateway::{
    config::{self, schema::Store},
    control::cluster::{Cluster, Node, Status},
    net::clock,
    quota::{lease::Kind, leases::Directory},
};
use ipnet::IpNet;
use tokio::sync::oneshot;

use crate::support::{eventually, redis::Redis};

/// What a gateway sees of other hosts' blocks.
#[derive(Default)]
pub struct Seen(pub Mutex<Vec<(IpNet, Option<Duration>)>>);

impl Node for Seen {
    fn block_from_peer(&self, client: IpNet, hold: Duration) {
        self.0
            .lock()
            .expect("no panic while locked")
            .push((client, Some(hold)));
    }
    fn unblock_from_peer(&self, client: IpNet) {
        self.0.lock().expect("no panic while locked").push((client, None));
    }
}

/// A host: its levels, and the control task on a thread of its own.
pub struct Host {
    pub cluster: Arc<Cluster>,
    pub seen: Arc<Seen>,
    stop: Option<oneshot::Sender<bool>>,
    thread: Option<JoinHandle<()>>,
}

impl Host {
    pub fn start(store: &Store) -> Host {
        gateway::net::tls::init();
        let cluster = Cluster::new(store, Arc::new(Directory::default())).expect("a host");
        let seen = Arc::new(Seen::default());
        let (stop, stopped) = oneshot::channel();
        let (task, node) = (cluster.clone(), seen.clone());
        let thread = thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            runtime.expect("a runtime").block_on(async move {
                let tasks = task.start(node, None);
                if stopped.await.unwrap_or(false) {
                    tasks.end(Duration::from_secs(5)).await;
                }
            });
        });
        Host {
            cluster,
            seen,
            stop: Some(stop),
            thread: Some(thread),
        }
    }

    pub fn connected(store: &Store) -> Host {
        let host = Host::start(store);
        host.await_status("a connection", Status::is_connected);
        host
    }

    pub fn await_status(&self, what: &str, check: impl Fn(&Status) -> bool) {
        eventually(&format!("{what}: {:?}", self.cluster.status()), || {
            check(&self.cluster.status()).then_some(())
        });
    }

    /// Uses units of a level; false: refused.
    pub fn uses(&self, id: u64, kind: Kind, amount: u64, units: u64) -> bool {
        let now_ns = clock::monotonic_ns();
        let level = self
            .cluster
            .directory()
            .level(id, kind, amount, now_ns)
            .expect("room");
        let Ok(standing) = level.reserve(units, now_ns) else {
            return false;
        };
        level.settle(units, units, standing.until_ns, now_ns);
        true
    }

    /// Ends the task; `gracefully`: after the leases were given back. Otherwise as a killed process would.
    pub fn end(mut self, gracefully: bool) {
        self.finish(gracefully);
    }

    fn finish(&mut self, gracefully: bool) {
        if let (Some(stop), Some(thread)) = (self.stop.take(), self.thread.take()) {
            let _ = stop.send(gracefully);
            thread.join().expect("the host's thread");
        }
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.finish(false);
    }
}

/// The section `store` with these lines.
pub fn store(lines: &str) -> Store {
    let text = format!(
        "listeners: [{{ address: 127.0.0.1:0 }}]\nproviders: {{ sim: {{ kind: openai }} }}\n\
         models: [{{ name: m, targets: [{{ provider: sim }}] }}]\nkeys: []\nstore:\n{lines}"
    );
    let config = config::parse(&text, "test", std::path::Path::new("/"), &|_| None);
    config.expect("a configuration").store.expect("a store")
}

pub fn at(redis: &Redis, more: &str) -> Store {
    store(&format!(
        "  redis: {}\n  lease: 1s\n  round: 20ms\n{more}",
        redis.url()
    ))
}

/// Lets hosts use one level until all are refused for a while; what they used.
pub fn exhaust(hosts: &[Host], id: u64, kind: Kind, amount: u64, units: u64) -> u64 {
    let used = AtomicU64::new(0);
    thread::scope(|scope| {
        for host in hosts {
            for _ in 0..4 {
                let used = &used;
                scope.spawn(move || {
                    let mut refused_since = Instant::now();
                    while refused_since.elapsed() < Duration::from_secs(2) {
                        if host.uses(id, kind, amount, units) {
                            used.fetch_add(units, SeqCst);
                            refused_since = Instant::now();
                        } else {
                            thread::sleep(Duration::from_millis(2));
                        }
                    }
                });
            }
        }
    });
    used.into_inner()
}
