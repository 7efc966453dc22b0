//! The kernel plane: loads the eBPF programs and speaks to them. The only module that names aya.
//!
//! Three programs (`gateway-ebpf/`), one object for every kernel from 5.15 and both architectures:
//! - `listener` (sk_reuseport) runs on each connection attempt: refuses blocked clients and those over a bound, steers the
//!   others to a core.
//! - `connections` (sock_ops) counts each client's connections as TCP saw them.
//! - `driver` (xdp), where it is configured, drops blocked clients before the network stack sees them.
//!
//! User space decides who is blocked and for how long; the kernel only does it, early and cheaply. The programs end with
//! the process, its listeners and its links, also after `kill -9`; blocks and counts are pinned and outlive it
//! (`pins.rs`). Without rights or support [`Kernel::load`] says why, and the gateway runs on without it.
//!
//! For the control thread: calls may take some microseconds (a system call), listing clients some milliseconds. `Kernel` is
//! `Send` and `Sync`. What operators need to know is in docs/kernel.md.

mod blocks;
mod cgroup;
mod clock;
mod ends;
mod lines;
mod load;
mod loads;
mod near;
mod off;
mod pins;
mod policy;
mod ports;
mod rights;
mod stats;

use std::{
    net::IpAddr,
    os::fd::BorrowedFd,
    path::Path,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use aya::{
    Ebpf,
    maps::{Array, HashMap, MapData, PerCpuArray, ReusePortSockArray},
    programs::{SkReuseport, TestRun, TestRunOptions, Xdp},
};
use aya_log::EbpfLogger;
use gateway_common::{
    CLIENTS_MAX, CORES_MAX, Client, ClientKey, GROUPS_MAX, Listeners, Near, PORTS_MAX, Settings, Totals,
    names,
};
use ipnet::IpNet;
use socket2::SockRef;

use crate::config::schema;
use blocks::Blocks;
use loads::Loads;
use policy::Policy;

pub use blocks::BlockError;
pub use load::remove_pins;
pub use off::Off;
pub use rights::shed as shed_rights;
pub use stats::{Blocked, ClientStats, PortStats, Stats};

/// What to load.
#[derive(Debug, Clone, Copy)]
pub struct Plan<'a> {
    pub config: &'a schema::Kernel,
    /// Data-plane threads, and so listeners in each group; at most [`CORES_MAX`].
    pub cores: usize,
    /// Ports whose connections are counted from the start; [`Kernel::guard`] adds its listeners' own.
    pub ports: &'a [u16],
    /// The state directory, of which the instance's name is made where none is configured.
    pub state: &'a Path,
}

/// The loaded programs. They end when it is dropped, except that `listener` stays on listeners that live on, where it then
/// lets everything through.
pub struct Kernel {
    /// Holds the programs and the cgroup link; dropping it detaches.
    ebpf: Ebpf,
    settings: Mutex<SettingsMap>,
    loads: Mutex<Loads>,
    blocks: Mutex<Blocks>,
    clients: HashMap<MapData, ClientKey, Client>,
    totals: PerCpuArray<MapData, Totals>,
    groups: HashMap<MapData, u64, Listeners>,
    near: near::Ports,
    sockets: ReusePortSockArray<MapData>,
    ports: ports::Ports,
    cpu_cores: Array<MapData, u32>,
    lines: Mutex<EbpfLogger<lines::ToTracing>>,
    /// The socket cookies in each slot of the socket array; empty when free.
    taken: [Vec<u64>; GROUPS_MAX as usize],
    degraded: Vec<String>,
    /// Where XDP is attached, and as what.
    xdp: Option<(String, &'static str)>,
    /// Keeps the instance locked.
    pins: Option<pins::Pins>,
}

/// The settings as they stand in the map.
struct SettingsMap {
    map: Array<MapData, Settings>,
    now: Settings,
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

    /// Counts connections of one more port; one that is counted already goes on. Returns the slot of its counters.
    fn count_port(&mut self, port: u16) -> Result<u32, Off> {
        self.ports
            .add(port)
            .map_err(|e| Off::failed(&format!("counting port {port} (the bound is {PORTS_MAX})"), &e))
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
        let near = match sockets.first().and_then(port) {
            Some(port) => Some(Near {
                port: u32::from(port),
                base,
                count: listeners.count,
                slot: self.count_port(port)?,
            }),
            None => None,
        };
        let stored = self.near.set(group, near);
        stored.map_err(|e| Off::failed("handing the listener group to the kernel", &e))?;
        for cookie in cookies {
            let stored = self.groups.insert(cookie, listeners, 0);
            stored.map_err(|e| Off::failed("handing the listener group to the kernel", &e))?;
        }
        Ok(())
    }

    /// Empties a group's slots. Those of closed sockets the kernel has emptied itself, so absence is no error.
    fn clear(&mut self, group: usize) {
        let base = group as u32 * CORES_MAX;
        let _ = self.near.set(group, None);
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
        locked(&self.blocks).policy().net_of(client)
    }

    /// Whether policy lets `client` be blocked unasked: nobody of its prefix is exempt or this host itself.
    pub fn may_block(&self, client: IpAddr) -> bool {
        locked(&self.blocks).policy().refusal_of_client(client).is_none()
    }

    /// Replaces the exempt networks after a reload, and lifts the blocks that they now forbid. At most 4096, of which the
    /// host's own two addresses are two.
    pub fn set_exempt(&self, exempt: &[IpNet]) {
        let mut blocks = locked(&self.blocks);
        let policy = Policy::new(exempt, blocks.policy().prefixes());
        if let Err(error) = blocks.exempt(policy) {
            tracing::warn!(%error, "cannot tell the kernel which networks are exempt");
        }
        self.show(&blocks);
    }

    /// Replaces the bounds on clients' connections after a reload.
    pub fn set_connections(&self, config: &schema::Connections) {
        self.set(|settings| load::bound(settings, config));
    }

    /// Refuses new connections of a client, as [`Kernel::net_of`] gives it, or of any network, from now on for `hold`. A
    /// longer or shorter hold replaces the one at work and keeps its counts. Open connections are not touched, exempt
    /// addresses in the network are let through.
    ///
    /// Single clients (65,536) and other networks (4096) are bounded: a client more makes the kernel forget the one whose
    /// connections were least recently attempted, a network more is [`BlockError::Full`].
    pub fn block(&self, net: IpNet, hold: Duration) -> Result<(), BlockError> {
        let mut blocks = locked(&self.blocks);
        blocks.block(net, hold)?;
        self.show(&blocks);
        Ok(())
    }

    /// As [`Kernel::block`], of the client that has this address and for what it did: an exempt address in its prefix
    /// protects all of it.
    pub fn block_client(&self, client: IpAddr, hold: Duration) -> Result<(), BlockError> {
        let blocks = locked(&self.blocks);
        if let Some(reason) = blocks.policy().refusal_of_client(client) {
            return Err(BlockError::Exempt(reason));
        }
        let net = blocks.policy().net_of(client);
        drop(blocks);
        self.block(net, hold)
    }

    /// Lifts the block of exactly this network. False: it was not blocked.
    pub fn unblock(&self, net: IpNet) -> Result<bool, BlockError> {
        let mut blocks = locked(&self.blocks);
        let held = blocks.unblock(net)?;
        self.show(&blocks);
        Ok(held)
    }

    /// What is blocked now, the one with the most refusals first. Walks the map: up to some 50 ms when it is full.
    pub fn blocked(&self) -> Vec<Blocked> {
        locked(&self.blocks).blocked()
    }

    /// The totals, summed over the CPUs. Zero when the map cannot be read, which does not happen while it is open.
    pub fn stats(&self) -> Stats {
        let mut stats = Stats::default();
        let Ok(cpus) = self.totals.get(&0, 0) else {
            return stats;
        };
        for cpu in cpus.iter() {
            stats.add(cpu);
        }
        stats.add_ports(&self.ports.sum());
        stats
    }

    /// The connections of each port that is counted, ascending; at most 256.
    pub fn ports(&self) -> Vec<PortStats> {
        let ports = self.ports.list();
        ports
            .map(|(port, counts)| PortStats::new(port, &counts))
            .collect()
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
            .map(|(key, client)| ClientStats::new(&key, &client, now_ns))
            .collect();
        clients.sort_unstable_by_key(|client| (std::cmp::Reverse(client.open()), client.idle));
        clients.truncate(max);
        clients
    }

    /// Forgets what was counted of a client, as when its entry is evicted for others; the totals stay.
    ///
    /// # Errors
    /// The kernel refused; a client of which nothing is known is no error.
    pub fn forget(&mut self, client: IpAddr) -> Result<(), Off> {
        let prefixes = locked(&self.blocks).policy().prefixes();
        match self.clients.remove(&ClientKey::of(client, prefixes)) {
            Err(error) if !blocks::is_absent(&error) => Err(Off::failed("forgetting a client", &error)),
            _ => Ok(()),
        }
    }

    /// Tells the steering how many streams cores have open. Call it a few times a second; in between, the program counts what
    /// it steers. Costs no system call. A core beyond the plan's is ignored.
    pub fn publish_loads(&self, open_streams: impl IntoIterator<Item = (usize, u32)>) {
        locked(&self.loads).publish(open_streams);
    }

    /// True: blocked clients are only counted. False: they are refused.
    pub fn set_observe(&self, observe: bool) {
        self.set(|settings| settings.enforce = u32::from(!observe));
    }

    /// Switches steering; without it the kernel's hash spreads connections over the cores.
    pub fn set_steering(&self, steering: bool) {
        self.set(|settings| settings.steering = u32::from(steering));
    }

    /// Tells the program which maps of blocks it must ask.
    fn show(&self, blocks: &Blocks) {
        let (nets, clients) = (blocks.has_nets(), blocks.has_clients());
        self.set(|settings| (settings.nets, settings.clients) = (u32::from(nets), u32::from(clients)));
    }

    /// Changes the settings, in the map only when they are not so already.
    fn set(&self, change: impl FnOnce(&mut Settings)) {
        let mut settings = locked(&self.settings);
        let mut wanted = settings.now;
        change(&mut wanted);
        let bound = wanted.rate_ns != 0 || wanted.open_max != 0;
        wanted.asks = u32::from(bound || wanted.nets != 0 || wanted.clients != 0);
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

    /// Where XDP is attached: the interface, and `native` or `generic`.
    pub fn xdp(&self) -> Option<(&str, &'static str)> {
        self.xdp
            .as_ref()
            .map(|(interface, mode)| (interface.as_str(), *mode))
    }

    /// Where blocks and counts are pinned.
    pub fn pinned(&self) -> Option<&Path> {
        self.pins.as_ref().map(pins::Pins::directory)
    }

    /// What the XDP program does with an Ethernet frame: true when it drops it. It counts as a frame that came.
    ///
    /// # Errors
    /// XDP is not configured, or the kernel does not run programs on demand (before 4.12, or a frame shorter than 14 bytes).
    pub fn would_driver_drop(&self, frame: &[u8]) -> Result<bool, Off> {
        const XDP_DROP: u32 = 1;
        let program = self
            .ebpf
            .program(names::DRIVER)
            .ok_or_else(|| Off::new("the object has no XDP program"))?;
        let program: &Xdp = program
            .try_into()
            .map_err(|e| Off::failed("finding the XDP program", &e))?;
        let options = TestRunOptions {
            data_in: Some(frame),
            ..TestRunOptions::default()
        };
        let ran = program
            .test_run(options)
            .map_err(|e| Off::failed("running the XDP program", &e))?;
        Ok(ran.return_value == XDP_DROP)
    }

    /// Passes the programs' log lines on to `tracing`, and lets networks in whose block has ended. Does not block: for a
    /// tick, at least once a second (the kernel keeps 128 KiB of lines and drops more).
    pub fn tick(&self) {
        let mut blocks = locked(&self.blocks);
        blocks.sweep();
        self.show(&blocks);
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
