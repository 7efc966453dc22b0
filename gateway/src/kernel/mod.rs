//! The kernel plane: loads the eBPF programs and speaks to them. The only module that names aya.
//!
//! Two programs (`gateway-ebpf/`), one object for every kernel from 5.15 and both architectures:
//! - `listener` (sk_reuseport) runs on each connection attempt: drops blocked clients, steers the others to a core.
//! - `connections` (sock_ops) counts each client's connections as TCP saw them.
//!
//! User space decides who is blocked and for how long; the kernel only does it, early and cheaply. Nothing is pinned:
//! the programs end with the process, its listeners and its link. Without rights or support [`Kernel::load`] says why,
//! and the gateway runs on without it.
//!
//! For the control thread: calls may take some microseconds (a system call), listing clients some milliseconds. `Kernel` is
//! `Send` and `Sync`.

mod cgroup;
mod clock;
mod lines;
mod load;
mod off;
mod policy;

use std::{
    net::IpAddr,
    os::fd::BorrowedFd,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use aya::{
    Ebpf,
    maps::{Array, HashMap, MapData, MapError, PerCpuArray, ReusePortSockArray},
    programs::SkReuseport,
};
use aya_log::EbpfLogger;
use gateway_common::{
    BLOCKS_MAX, Block, CLIENTS_MAX, CORES_MAX, Client, ClientKey, GROUPS_MAX, Listeners, Settings, Totals,
    names,
};
use ipnet::IpNet;
use socket2::SockRef;

use crate::config::schema;
use policy::Policy;

pub use off::Off;

/// What to load.
#[derive(Debug, Clone, Copy)]
pub struct Plan<'a> {
    pub config: &'a schema::Kernel,
    /// Data-plane threads, and so listeners in each group; at most [`CORES_MAX`].
    pub cores: usize,
    /// Ports whose connections are counted from the start; [`Kernel::guard`] adds its listeners' own.
    pub ports: &'a [u16],
}

/// The loaded programs. They end when it is dropped, except that `listener` stays on listeners that live on, where it then
/// lets everything through.
pub struct Kernel {
    /// Holds the programs and the cgroup link; dropping it detaches.
    ebpf: Ebpf,
    settings: Mutex<SettingsMap>,
    loads: Mutex<Loads>,
    blocks: Mutex<HashMap<MapData, ClientKey, Block>>,
    clients: HashMap<MapData, ClientKey, Client>,
    totals: PerCpuArray<MapData, Totals>,
    groups: HashMap<MapData, u64, Listeners>,
    sockets: ReusePortSockArray<MapData>,
    ports: HashMap<MapData, u32, u32>,
    cpu_cores: Array<MapData, u32>,
    lines: Mutex<EbpfLogger<lines::ToTracing>>,
    /// The socket cookies in each slot of the socket array; empty when free.
    taken: [Vec<u64>; GROUPS_MAX as usize],
    policy: Policy,
    degraded: Vec<String>,
}

/// The settings as they stand in the map.
struct SettingsMap {
    map: Array<MapData, Settings>,
    now: Settings,
}

/// The cores' loads as last published.
struct Loads {
    map: Array<MapData, u64>,
    published: Vec<u64>,
}

/// A client that the kernel refuses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Blocked {
    /// A client as `kernel.drop.prefix_v4` and `prefix_v6` cut it, or a network blocked by hand.
    pub net: IpNet,
    /// Time until the block ends.
    pub remaining: Duration,
    /// Connection attempts refused since it began.
    pub dropped: u64,
    /// Attempts that would have been refused, were the mode not observe.
    pub would_drop: u64,
}

/// Totals since [`Kernel::load`]. All only grow.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Stats {
    /// Connection attempts of blocked clients refused.
    pub dropped: u64,
    /// Connection attempts of blocked clients let in, because the mode is observe.
    pub would_drop: u64,
    /// Attempts steered to a core, whichever.
    pub steered: u64,
    /// Of those, the ones moved off an overloaded core.
    pub steered_away: u64,
    /// Attempts that the kernel's hash placed.
    pub fallback: u64,
    /// Packets on a listener that were no attempts (SYN cookies, strays).
    pub stray: u64,
    /// Packets whose client could not be read.
    pub unreadable: u64,
    /// Client connections established.
    pub opened: u64,
    /// Of those, ended.
    pub closed: u64,
    /// Payload bytes from clients on ended connections.
    pub bytes_in: u64,
    /// Payload bytes to clients on ended connections, acknowledged.
    pub bytes_out: u64,
    /// Segments sent again on ended connections.
    pub retransmits: u64,
    /// Connections that no client's entry counts.
    pub untracked: u64,
}

/// One client's connections, since it was first seen or last fell out of the bounded map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ClientStats {
    /// The IPv4 address, or the first address of the IPv6 /64.
    pub client: IpAddr,
    pub opened: u64,
    pub closed: u64,
    /// Payload bytes received on its ended connections.
    pub bytes_in: u64,
    /// Payload bytes sent on its ended connections, acknowledged.
    pub bytes_out: u64,
    /// Segments sent again on its ended connections.
    pub retransmits: u64,
    /// Smoothed round trip time of the connection that ended last.
    pub srtt: Duration,
    /// Time since a connection of it last opened or closed.
    pub idle: Duration,
}

/// Why a client was not blocked.
#[derive(Debug, thiserror::Error)]
pub enum BlockError {
    /// The policy protects it; the text says by what.
    #[error("{0}")]
    Exempt(String),
    /// The kernel refused the map's update.
    #[error("cannot write the block: {0}")]
    Map(#[from] MapError),
}

impl Kernel {
    /// Puts `listener` before a group of listeners.
    ///
    /// `sockets` are one `SO_REUSEPORT` group (one address), already listening, in the order of the cores. Guarding a group
    /// again replaces its sockets.
    ///
    /// # Errors
    /// Says what the kernel did not take: sockets without `SO_REUSEPORT`, more than [`CORES_MAX`] of them, or more than
    /// [`GROUPS_MAX`] groups. The listeners then work as without the kernel plane.
    pub fn guard(&mut self, sockets: &[BorrowedFd]) -> Result<(), Off> {
        let Some(first) = sockets.first() else {
            return Err(Off::new("a listener group without sockets"));
        };
        if sockets.len() > CORES_MAX as usize {
            return Err(Off::new(format!(
                "{} sockets in a listener group, the bound is {CORES_MAX}",
                sockets.len()
            )));
        }
        let cookies = cookies(sockets)?;
        let group = self.slot(&cookies)?;
        self.fill(group, sockets, &cookies)?;
        if let Some(port) = port(first) {
            let counted = self.ports.insert(u32::from(port), 0, 0);
            counted.map_err(|e| Off::failed("counting one more port", &e))?;
        }
        let program = self
            .ebpf
            .program(names::LISTENER)
            .ok_or_else(|| Off::new("the object has no listener program"))?;
        let program: &SkReuseport = program
            .try_into()
            .map_err(|e| Off::failed("finding the listener program", &e))?;
        program
            .attach(first)
            .map_err(|e| Off::failed("attaching to the listeners", &e))
    }

    /// Takes the program off a group again, before its sockets are closed or handed on. Its slot becomes free.
    pub fn release(&mut self, sockets: &[BorrowedFd]) -> Result<(), Off> {
        let cookies = cookies(sockets)?;
        for group in 0..self.taken.len() {
            if self.taken[group].iter().any(|taken| cookies.contains(taken)) {
                self.clear(group);
            }
        }
        match sockets.first() {
            Some(first) => {
                SkReuseport::detach(first).map_err(|e| Off::failed("detaching from the listeners", &e))
            }
            None => Ok(()),
        }
    }

    /// The group's place in the socket array: the one it has, or a free one.
    fn slot(&self, cookies: &[u64]) -> Result<usize, Off> {
        let known = self
            .taken
            .iter()
            .position(|taken| taken.iter().any(|cookie| cookies.contains(cookie)));
        known
            .or_else(|| self.taken.iter().position(Vec::is_empty))
            .ok_or_else(|| Off::new(format!("more than {GROUPS_MAX} listener groups")))
    }

    fn fill(&mut self, group: usize, sockets: &[BorrowedFd], cookies: &[u64]) -> Result<(), Off> {
        self.clear(group);
        let base = group as u32 * CORES_MAX;
        for (core, socket) in sockets.iter().enumerate() {
            let stored = self.sockets.set(base + core as u32, socket, 0);
            stored.map_err(|e| Off::failed("handing the listeners to the kernel", &e))?;
        }
        let listeners = Listeners {
            base,
            count: sockets.len() as u32,
        };
        self.taken[group] = cookies.to_vec();
        for cookie in cookies {
            let stored = self.groups.insert(cookie, listeners, 0);
            stored.map_err(|e| Off::failed("handing the listener group to the kernel", &e))?;
        }
        Ok(())
    }

    /// Empties a group's slots. Those of closed sockets the kernel has emptied itself, so absence is no error.
    fn clear(&mut self, group: usize) {
        let base = group as u32 * CORES_MAX;
        for (core, cookie) in std::mem::take(&mut self.taken[group]).iter().enumerate() {
            let _ = self.sockets.clear_index(&(base + core as u32));
            let _ = self.groups.remove(cookie);
        }
    }

    /// Says which CPU a core is pinned to, where that is not the CPU of the same rank among those the process may use.
    pub fn place(&mut self, core: usize, cpu: usize) -> Result<(), Off> {
        let (cpu, core) = (cpu as u32, core as u32);
        self.cpu_cores
            .set(cpu, core, 0)
            .map_err(|e| Off::failed("placing a core", &e))
    }

    /// The network that `client` counts as: the address itself, or its prefix by `kernel.drop.prefix_v4` and `prefix_v6`.
    /// What [`Kernel::block`] takes for one client.
    pub fn net_of(&self, client: IpAddr) -> IpNet {
        match ClientKey::new(client).address() {
            IpAddr::V4(v4) => IpNet::from(IpAddr::V4(v4)),
            IpAddr::V6(v6) => IpNet::from(ipnet::Ipv6Net::new_assert(v6, 64)),
        }
    }

    /// Whether policy lets `client` be blocked: not exempt, not this host itself.
    pub fn may_block(&self, client: IpAddr) -> bool {
        self.policy.refusal(client).is_none()
    }

    /// Replaces the exempt networks after a reload, and lifts the blocks that they now forbid.
    pub fn set_exempt(&mut self, exempt: &[ipnet::IpNet]) {
        self.policy = Policy::new(exempt);
        for blocked in self.blocked() {
            if !self.may_block(blocked.net.addr()) {
                let _ = self.unblock(blocked.net);
            }
        }
    }

    /// Refuses new connections of `client` (IPv6: of its /64) from now on for `hold`. A longer or shorter hold replaces the
    /// one at work and keeps its counts. Open connections are not touched.
    pub fn block(&self, net: IpNet, hold: Duration) -> Result<(), BlockError> {
        let client = net.addr();
        if let Some(reason) = self.policy.refusal(client) {
            return Err(BlockError::Exempt(reason));
        }
        let key = ClientKey::new(client);
        let now_ns = clock::now_ns();
        let until_ns = now_ns.saturating_add(u64::try_from(hold.as_nanos()).unwrap_or(u64::MAX));
        let mut blocks = locked(&self.blocks);
        // What the program counts between this read and the write is lost: a few of many, and only in a counter for people.
        let before = blocks
            .get(&key, 0)
            .ok()
            .filter(|block| block.until_ns > now_ns)
            .unwrap_or_default();
        Ok(blocks.insert(key, Block { until_ns, ..before }, 0)?)
    }

    /// Lets `client` in again. False: it was not blocked.
    pub fn unblock(&self, net: IpNet) -> Result<bool, BlockError> {
        let key = ClientKey::new(net.addr());
        let mut blocks = locked(&self.blocks);
        let held = match blocks.get(&key, 0) {
            Ok(block) => block.until_ns > clock::now_ns(),
            Err(MapError::KeyNotFound) => return Ok(false),
            Err(error) => return Err(error.into()),
        };
        match blocks.remove(&key) {
            // The kernel may have evicted the entry since.
            Ok(()) | Err(MapError::KeyNotFound) => Ok(held),
            Err(MapError::SyscallError(error)) if error.io_error.raw_os_error() == Some(libc::ENOENT) => {
                Ok(held)
            }
            Err(error) => Err(error.into()),
        }
    }

    /// The clients blocked now, the one with the most refusals first.
    pub fn blocked(&self) -> Vec<Blocked> {
        let now_ns = clock::now_ns();
        let blocks = locked(&self.blocks);
        // Bounded, because a walk over a map that changes underneath may start over (`bpf_map_get_next_key`).
        let entries = blocks.iter().take(BLOCKS_MAX as usize).filter_map(Result::ok);
        let mut blocked: Vec<Blocked> = entries
            .filter(|(_, block)| block.until_ns > now_ns)
            .map(|(key, block)| Blocked {
                net: IpNet::from(key.address()),
                remaining: Duration::from_nanos(block.until_ns - now_ns),
                dropped: block.dropped,
                would_drop: block.would_drop,
            })
            .collect();
        blocked.sort_unstable_by_key(|entry| {
            (std::cmp::Reverse(entry.dropped.max(entry.would_drop)), entry.net)
        });
        blocked.dedup_by_key(|entry| entry.net);
        blocked
    }

    /// The totals, summed over the CPUs. Zero when the map cannot be read, which does not happen while it is open.
    pub fn stats(&self) -> Stats {
        let mut stats = Stats::default();
        let Ok(cpus) = self.totals.get(&0, 0) else {
            return stats;
        };
        for cpu in cpus.iter() {
            stats.dropped += cpu.dropped;
            stats.would_drop += cpu.would_drop;
            stats.steered += cpu.steered_own + cpu.steered_away;
            stats.steered_away += cpu.steered_away;
            stats.fallback += cpu.fallback;
            stats.stray += cpu.stray;
            stats.unreadable += cpu.unreadable;
            stats.opened += cpu.opened;
            stats.closed += cpu.closed;
            stats.bytes_in += cpu.bytes_in;
            stats.bytes_out += cpu.bytes_out;
            stats.retransmits += cpu.retransmits;
            stats.untracked += cpu.untracked;
        }
        stats
    }

    /// At most `max` clients, those with the most open connections first, then the most lately seen. Walks the whole map:
    /// up to some 100 ms when it is full, so not for a tick.
    pub fn clients(&self, max: usize) -> Vec<ClientStats> {
        let now_ns = clock::now_ns();
        let entries = self
            .clients
            .iter()
            .take(CLIENTS_MAX as usize)
            .filter_map(Result::ok);
        let mut clients: Vec<ClientStats> = entries
            .map(|(key, client)| ClientStats {
                client: key.address(),
                opened: client.opened,
                closed: client.closed,
                bytes_in: client.bytes_in,
                bytes_out: client.bytes_out,
                retransmits: client.retransmits,
                srtt: Duration::from_micros(client.srtt_us),
                idle: Duration::from_nanos(now_ns.saturating_sub(client.seen_ns)),
            })
            .collect();
        let open = |client: &ClientStats| client.opened.saturating_sub(client.closed);
        clients.sort_unstable_by_key(|client| (std::cmp::Reverse(open(client)), client.idle));
        clients.truncate(max);
        clients
    }

    /// Tells the steering how many streams a core has open. Call it for each core a few times a second; in between, the
    /// program counts what it steers. A core above [`CORES_MAX`] or the plan's is ignored.
    pub fn publish_load(&self, core: usize, open_streams: u32) {
        let mut loads = locked(&self.loads);
        let Some(slot) = loads.published.get_mut(core) else {
            return;
        };
        *slot = u64::from(open_streams);
        if let Err(error) = loads.map.set(core as u32, u64::from(open_streams), 0) {
            tracing::warn!(core, %error, "cannot publish the core's load");
        }
        let least = (0..loads.published.len())
            .min_by_key(|core| loads.published[*core])
            .unwrap_or(0) as u32;
        drop(loads);
        self.set(|settings| settings.least_core = least);
    }

    /// True: blocked clients are only counted. False: they are refused.
    pub fn set_observe(&self, observe: bool) {
        self.set(|settings| settings.enforce = u32::from(!observe));
    }

    /// Switches steering; without it the kernel's hash spreads connections over the cores.
    pub fn set_steering(&self, steering: bool) {
        self.set(|settings| settings.steering = u32::from(steering));
    }

    /// Changes the settings, in the map only when they are not so already.
    fn set(&self, change: impl FnOnce(&mut Settings)) {
        let mut settings = locked(&self.settings);
        let mut wanted = settings.now;
        change(&mut wanted);
        if wanted == settings.now {
            return;
        }
        match settings.map.set(0, wanted, 0) {
            Ok(()) => settings.now = wanted,
            Err(error) => tracing::warn!(%error, "cannot change the kernel programs' settings"),
        }
    }

    /// What is off though the rest works, each with its reason.
    pub fn degraded(&self) -> Vec<String> {
        self.degraded.clone()
    }

    /// Passes the programs' log lines on to `tracing`. Does not block: for a tick, at least once a second (the kernel keeps
    /// 128 KiB of lines and drops more).
    pub fn tick(&self) {
        locked(&self.lines).flush();
    }
}

impl Drop for Kernel {
    /// The program outlives this on listeners that are still open: it must then neither drop nor steer by stale facts.
    fn drop(&mut self) {
        self.set(|settings| {
            settings.enforce = 0;
            settings.steering = 0;
        });
        self.tick();
    }
}

impl std::fmt::Debug for Kernel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let settings = locked(&self.settings).now;
        f.debug_struct("Kernel")
            .field("settings", &settings)
            .field("degraded", &self.degraded)
            .finish_non_exhaustive()
    }
}

/// Locks. A panic elsewhere leaves each of these maps whole: every change to them is one system call.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The sockets' cookies (SO_COOKIE), by which the program knows them.
fn cookies(sockets: &[BorrowedFd]) -> Result<Vec<u64>, Off> {
    let cookies: Result<Vec<u64>, _> = sockets
        .iter()
        .map(|socket| SockRef::from(socket).cookie())
        .collect();
    cookies.map_err(|e| Off::failed("reading a listener's cookie", &e))
}

fn port(socket: &BorrowedFd) -> Option<u16> {
    SockRef::from(socket)
        .local_addr()
        .ok()?
        .as_socket()
        .map(|address| address.port())
}
