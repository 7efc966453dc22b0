//! Resolves endpoints' host names away from the data plane.

use std::{
    net::{SocketAddr, ToSocketAddrs},
    sync::{Arc, Weak, mpsc},
    thread,
    time::Duration,
};

use super::Endpoint;

/// How long an answer is used before the name is asked for again. The system's resolver does not tell the
/// records' own time to live.
const REFRESH: Duration = Duration::from_secs(30);

/// How soon a name that has no address yet is asked for again.
const RETRY: Duration = Duration::from_secs(1);

/// The thread that keeps endpoints' addresses fresh.
pub struct Resolver {
    endpoints: mpsc::Sender<Vec<Weak<Endpoint>>>,
}

impl Resolver {
    /// Starts the thread; it ends when the resolver is dropped.
    pub fn start() -> std::io::Result<Resolver> {
        let (endpoints, inbox) = mpsc::channel();
        thread::Builder::new()
            .name("resolver".into())
            .spawn(move || run(&inbox))?;
        Ok(Resolver { endpoints })
    }

    /// From now on these endpoints are kept fresh, beginning at once.
    pub fn watch(&self, endpoints: &[Arc<Endpoint>]) {
        let _ = self
            .endpoints
            .send(endpoints.iter().map(Arc::downgrade).collect());
    }
}

fn run(inbox: &mpsc::Receiver<Vec<Weak<Endpoint>>>) {
    let mut watched: Vec<Weak<Endpoint>> = Vec::new();
    loop {
        let waiting = watched
            .iter()
            .filter_map(Weak::upgrade)
            .any(|endpoint| endpoint.addresses.load().is_empty());
        match inbox.recv_timeout(if waiting { RETRY } else { REFRESH }) {
            Ok(endpoints) => watched = endpoints,
            Err(mpsc::RecvTimeoutError::Timeout) => {}
            Err(mpsc::RecvTimeoutError::Disconnected) => return,
        }
        for endpoint in watched.iter().filter_map(Weak::upgrade) {
            refresh(&endpoint);
        }
    }
}

/// Asks once. A name that fails to resolve keeps its last addresses.
fn refresh(endpoint: &Endpoint) {
    let host = (endpoint.url.host.as_str(), endpoint.url.port);
    match host.to_socket_addrs() {
        Ok(found) => {
            let found: Vec<SocketAddr> = found.collect();
            if !found.is_empty() && **endpoint.addresses.load() != found {
                tracing::debug!(host = host.0, addresses = found.len(), "resolved");
                endpoint.addresses.store(Arc::new(found));
            }
        }
        Err(error) => tracing::warn!(host = host.0, %error, "cannot resolve an endpoint's name"),
    }
}
