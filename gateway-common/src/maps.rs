//! What the maps hold.

/// Names of programs and maps in the object. The kernel cuts names to 15 bytes (`BPF_OBJ_NAME_LEN`), so none is longer.
pub mod names {
    /// `sk_reuseport` program: early drop and steering.
    pub const LISTENER: &str = "listener";
    /// `sock_ops` program: accounting of connections.
    pub const CONNECTIONS: &str = "connections";
    /// Array of one [`super::Settings`].
    pub const SETTINGS: &str = "SETTINGS";
    /// Per-CPU array of one [`super::Totals`].
    pub const TOTALS: &str = "TOTALS";
    /// LRU hash [`crate::ClientKey`] → [`super::Block`].
    pub const BLOCKS: &str = "BLOCKS";
    /// LRU hash [`crate::ClientKey`] → [`super::Client`].
    pub const CLIENTS: &str = "CLIENTS";
    /// Hash socket cookie (`u64`) → [`super::Listeners`].
    pub const GROUPS: &str = "GROUPS";
    /// Socket array, slot `group * CORES_MAX + core`.
    pub const SOCKETS: &str = "SOCKETS";
    /// Array CPU → core (`u32`), [`crate::CORE_NONE`] where there is none.
    pub const CPU_CORES: &str = "CPU_CORES";
    /// Array core → open streams (`u64`).
    pub const LOADS: &str = "LOADS";
    /// Hash local port (`u32`, host order) → unused `u32`.
    pub const PORTS: &str = "PORTS";
    /// Lowest log level that the programs write (`u8` of aya-log).
    pub const LOG_LEVEL: &str = "AYA_LOG_LEVEL";
}

/// What user space tells the programs; written as a whole.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Settings {
    /// 1: a blocked client's connection is refused; 0: it is only counted (observe).
    pub enforce: u32,
    /// 1: connections are steered to cores; 0: the kernel's hash decides.
    pub steering: u32,
    /// Cores in use, at most [`crate::CORES_MAX`].
    pub cores: u32,
    /// The core with the least open streams when the loads were last published.
    pub least_core: u32,
}

/// One CPU's counters. All only grow; user space sums them over the CPUs.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Totals {
    /// Connection attempts (SYN) refused because the client is blocked.
    pub dropped: u64,
    /// Attempts of blocked clients that were let in because the mode is observe.
    pub would_drop: u64,
    /// Attempts given to the core of the CPU that took the packet, or spread by hash when that CPU has none.
    pub steered_own: u64,
    /// Attempts given to the least loaded core, because that one was overloaded.
    pub steered_away: u64,
    /// Attempts left to the kernel's hash: steering is off, or the chosen core has no socket in the group.
    pub fallback: u64,
    /// Packets other than a SYN that met the listener: the ACK of a SYN cookie, or strays of dead connections.
    pub stray: u64,
    /// Packets whose client address could not be read; they are let through.
    pub unreadable: u64,
    /// Clients' connections established.
    pub opened: u64,
    /// Of those, ended.
    pub closed: u64,
    /// Payload bytes received on ended connections.
    pub bytes_in: u64,
    /// Payload bytes sent on ended connections and acknowledged by the client.
    pub bytes_out: u64,
    /// Segments sent again on ended connections.
    pub retransmits: u64,
    /// Connections whose client got no entry in the map of clients.
    pub untracked: u64,
    /// `bpf_ktime_get_ns` of this CPU's last log line; not a counter.
    pub logged_ns: u64,
    /// Cookie of the socket that last entered FIN_WAIT2 on this CPU; not a counter.
    pub half_closed: u64,
    /// That socket's octets received by then, as the kernel counts them; not a counter.
    pub half_closed_in: u64,
}

/// A blocked client.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Block {
    /// The block holds until this moment of CLOCK_MONOTONIC, in nanoseconds (`bpf_ktime_get_ns`).
    pub until_ns: u64,
    /// Attempts refused since the client was blocked.
    pub dropped: u64,
    /// Attempts that were let in because the mode is observe.
    pub would_drop: u64,
}

/// The connections of one client.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Client {
    /// Connections established.
    pub opened: u64,
    /// Of those, ended. May exceed `opened` when the entry was evicted in between.
    pub closed: u64,
    /// Payload bytes received on ended connections.
    pub bytes_in: u64,
    /// Payload bytes sent on ended connections and acknowledged.
    pub bytes_out: u64,
    /// Segments sent again on ended connections.
    pub retransmits: u64,
    /// Smoothed round trip time of the connection that ended last, in microseconds.
    pub srtt_us: u64,
    /// CLOCK_MONOTONIC in nanoseconds when a connection last opened or closed.
    pub seen_ns: u64,
}

/// The group that a listening socket belongs to.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Listeners {
    /// Slot of the group's first core in the socket array.
    pub base: u32,
    /// Sockets in the group.
    pub count: u32,
}

/// The kernel's map keys and values are bytes: a padded type would put uninitialised bytes there.
const fn is_packed(size: usize, fields: usize) -> bool {
    size == fields
}
const _: () = assert!(is_packed(size_of::<crate::ClientKey>(), 16));
const _: () = assert!(is_packed(size_of::<Settings>(), 4 * 4));
const _: () = assert!(is_packed(size_of::<Totals>(), 16 * 8));
const _: () = assert!(is_packed(size_of::<Block>(), 3 * 8));
const _: () = assert!(is_packed(size_of::<Client>(), 7 * 8));
const _: () = assert!(is_packed(size_of::<Listeners>(), 2 * 4));

/// Promises to aya that the types are plain bytes.
#[cfg(feature = "user")]
mod pod {
    // SAFETY: #[repr(C)] integers and arrays of integers without padding (sizes asserted above): any bit pattern is
    // valid and every byte is initialised.
    unsafe impl aya::Pod for crate::ClientKey {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::Settings {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::Totals {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::Block {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::Client {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::Listeners {}
}
