//! One core's connections to upstreams, kept for reuse, and what the core knows of each endpoint.

use std::{
    collections::HashMap,
    hash::{BuildHasherDefault, Hasher},
    time::Duration,
};

use super::Endpoint;
use crate::{
    bounds::POOL_IDLE_MAX,
    net::{Conn, clock},
};

/// How long an unused connection is kept. Servers commonly keep theirs from 5 s (uvicorn) to 75 s; one that was
/// closed meanwhile is found out when it is taken.
const IDLE_MAX: Duration = Duration::from_secs(60);

/// How long an endpoint that could not be reached is passed over: doubled at each failure in a row.
const DOWN_FIRST: Duration = Duration::from_millis(500);
const DOWN_MAX: Duration = Duration::from_secs(30);

/// Connections and health of all endpoints, as one core sees them.
#[derive(Default)]
pub struct Pool {
    endpoints: HashMap<u64, State, BuildHasherDefault<ById>>,
}

/// Hashes an endpoint's number, which nobody outside chooses: by the golden ratio (Knuth, vol. 3, 6.4).
#[derive(Default)]
struct ById(u64);

impl Hasher for ById {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.write_u64(u64::from(byte));
        }
    }

    fn write_u64(&mut self, id: u64) {
        let mixed = (self.0 ^ id).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        // The table takes the low bits for the place and the high ones to compare.
        self.0 = mixed ^ (mixed >> 32);
    }
}

#[derive(Default)]
struct State {
    idle: Vec<Idle>,
    /// Requests that run now.
    active: u32,
    failures: u32,
    down_until_ns: u64,
}

struct Idle {
    conn: Conn,
    since_ns: u64,
}

impl Pool {
    /// A kept connection that is still alive, the most recently used one.
    pub fn take(&mut self, endpoint: &Endpoint) -> Option<Conn> {
        let state = self.endpoints.get_mut(&endpoint.id)?;
        while let Some(idle) = state.idle.pop() {
            // Anything to read on an idle connection is its end, or an answer to nothing. A TLS
            // peer may send tickets late; to drop such a connection costs a handshake and no correctness.
            if idle.conn.sock().peek().is_none() {
                return Some(idle.conn);
            }
        }
        None
    }

    /// Keeps a connection whose answer was read to its end.
    pub fn keep(&mut self, endpoint: &Endpoint, conn: Conn) {
        let state = self.endpoints.entry(endpoint.id).or_default();
        if state.idle.len() >= POOL_IDLE_MAX {
            state.idle.remove(0);
        }
        state.idle.push(Idle {
            conn,
            since_ns: clock::turn_ns(),
        });
    }

    /// Notes that a request begins at an endpoint.
    pub fn begin(&mut self, id: u64) {
        self.endpoints.entry(id).or_default().active += 1;
    }

    /// Notes that a request has ended.
    pub fn end(&mut self, id: u64) {
        if let Some(state) = self.endpoints.get_mut(&id) {
            state.active = state.active.saturating_sub(1);
        }
    }

    /// Requests that run at the endpoint now.
    pub fn active(&self, id: u64) -> u32 {
        self.endpoints.get(&id).map_or(0, |state| state.active)
    }

    /// Notes that the endpoint answered.
    pub fn reached(&mut self, id: u64) {
        if let Some(state) = self.endpoints.get_mut(&id) {
            state.failures = 0;
            state.down_until_ns = 0;
        }
    }

    /// Notes that the endpoint could not be reached; it is passed over for a while.
    pub fn unreachable(&mut self, id: u64, now_ns: u64) {
        let state = self.endpoints.entry(id).or_default();
        let down = DOWN_FIRST
            .saturating_mul(1 << state.failures.min(6))
            .min(DOWN_MAX);
        state.failures = state.failures.saturating_add(1);
        state.down_until_ns = now_ns + down.as_nanos() as u64;
        state.idle.clear();
    }

    /// Whether the endpoint is passed over now.
    pub fn is_down(&self, id: u64, now_ns: u64) -> bool {
        self.endpoints
            .get(&id)
            .is_some_and(|state| state.down_until_ns > now_ns)
    }

    /// Closes what was idle for too long and forgets endpoints of which nothing is left.
    pub fn sweep(&mut self, now_ns: u64) {
        let oldest_ns = now_ns.saturating_sub(IDLE_MAX.as_nanos() as u64);
        self.endpoints.retain(|_, state| {
            state.idle.retain(|idle| idle.since_ns > oldest_ns);
            // Kept for a while after it may be tried again, so that the next failure in a row waits longer.
            let may_fail_again = state.down_until_ns + DOWN_MAX.as_nanos() as u64 > now_ns;
            !state.idle.is_empty() || state.active > 0 || may_fail_again
        });
    }
}
