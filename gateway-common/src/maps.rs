//! What the maps hold.

/// Names of programs and maps in the object. The kernel cuts names to 15 bytes (`BPF_OBJ_NAME_LEN`), so none is longer.
pub mod names {
    /// `sk_reuseport` program: early drop, rates and steering.
    pub const LISTENER: &str = "listener";
    /// `sock_ops` program: accounting of connections.
    pub const CONNECTIONS: &str = "connections";
    /// `xdp` program: early drop in an interface's driver.
    pub const DRIVER: &str = "driver";
    /// Array of one [`super::Settings`].
    pub const SETTINGS: &str = "SETTINGS";
    /// Per-CPU array of one [`super::Totals`].
    pub const TOTALS: &str = "TOTALS";
    /// LRU hash [`crate::ClientKey`] → [`super::Block`]: clients that are blocked.
    pub const BLOCKS: &str = "BLOCKS";
    /// LPM trie [`crate::ClientKey`] → [`super::Block`]: other networks that are blocked.
    pub const NETS: &str = "NETS";
    /// LPM trie [`crate::ClientKey`] → unused `u32`: networks that are never refused.
    pub const EXEMPT: &str = "EXEMPT";
    /// LRU hash [`crate::ClientKey`] → [`super::Client`].
    pub const CLIENTS: &str = "CLIENTS";
    /// LRU hash [`crate::ClientKey`] → `u64`: when the client's next connection is due, on CLOCK_MONOTONIC.
    pub const RATES: &str = "RATES";
    /// Array of one `u64`: until when attempts of unknown clients are accounted for, on CLOCK_MONOTONIC.
    pub const HALF_OPEN: &str = "HALF_OPEN";
    /// Array socket cookie modulo [`crate::CONN_SLOTS_NEAR`], or modulo [`crate::CONN_SLOTS`] → [`super::Conn`]: what is known of an
    /// open connection.
    pub const CONNS: &str = "CONNS";
    /// Socket storage of [`super::Conn`], for connections whose slot another one has.
    pub const CONNS_APART: &str = "CONNS_APART";
    /// Hash socket cookie (`u64`) → [`super::Listeners`].
    pub const GROUPS: &str = "GROUPS";
    /// Array port modulo [`crate::NEAR_SLOTS`] → [`super::Near`]: the groups that a port alone tells.
    pub const NEAR: &str = "NEAR";
    /// Socket array, slot `group * CORES_MAX + core`.
    pub const SOCKETS: &str = "SOCKETS";
    /// Array CPU → core (`u32`), [`crate::CORE_NONE`] where there is none.
    pub const CPU_CORES: &str = "CPU_CORES";
    /// Array [`crate::load_slot`] → a core's open streams (`u64`), mapped into user space; slot [`crate::LOAD_LEAST`] is the number of
    /// the core with the fewest.
    pub const LOADS: &str = "LOADS";
    /// Hash local port (`u32`, host order) → its slot in [`PORT_COUNTS`] (`u32`).
    pub const PORTS: &str = "PORTS";
    /// Per-CPU array slot → [`super::Port`]; slot 0 has the sums of ports that are no longer listened on.
    pub const PORT_COUNTS: &str = "PORT_COUNTS";
    /// Lowest log level that the programs write (`u8` of aya-log).
    pub const LOG_LEVEL: &str = "AYA_LOG_LEVEL";
}

/// Declares types that both sides share: `#[repr(C)]`, without padding, with a list of their fields for [`crate::LAYOUT`].
macro_rules! shared {
    ($(
        $(#[$about:meta])*
        pub struct $name:ident { $( $(#[$field_about:meta])* pub $field:ident: $type:ty, )* }
    )*) => {$(
        $(#[$about])*
        #[repr(C)]
        #[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
        pub struct $name { $( $(#[$field_about])* pub $field: $type, )* }

        // The kernel's values are bytes: padding would put uninitialised ones there.
        const _: () = assert!(size_of::<$name>() == 0 $( + size_of::<$type>() )*);

        #[cfg(feature = "user")]
        // SAFETY: #[repr(C)] integers and arrays of integers without padding, as just asserted: any bit pattern is valid and
        // every byte is initialised.
        unsafe impl aya::Pod for $name {}
    )*

        /// Every shared type with its size and its fields: name, offset, size; in bytes.
        pub const TYPES: &[(&str, usize, &[(&str, usize, usize)])] = &[$((
            stringify!($name),
            size_of::<$name>(),
            &[$((stringify!($field), core::mem::offset_of!($name, $field), size_of::<$type>())),*],
        )),*];
    };
}

/// Buckets of a histogram of connections' lives: bucket n counts those that lasted less than 2^n ms and are in no bucket
/// below; the last one, over an hour, has no upper bound.
pub const LIFE_BUCKETS: usize = 24;

shared! {
    /// What user space tells the programs; written as a whole. What every attempt asks for stands together at the head.
    pub struct Settings {
        /// 1: connections are steered to cores; 0: the kernel's hash decides.
        pub steering: u32,
        /// Cores in use, at most [`crate::CORES_MAX`].
        pub cores: u32,
        /// 1: who the client is matters to every attempt, because of blocks or a bound of clients.
        pub asks: u32,
        /// 1: a blocked client's connection is refused; 0: it is only counted (observe).
        pub enforce: u32,
        /// Nanoseconds by which an unknown client's attempt fills the common allowance; 0: no bound.
        pub half_open_ns: u64,
        /// 1: [`names::NETS`] has entries and must be asked.
        pub nets: u32,
        /// 1: [`names::BLOCKS`] may have entries that hold and must be asked.
        pub clients: u32,
        /// Bits of an IPv4 client's key that count.
        pub mask_v4: [u64; 2],
        /// Bits of an IPv6 client's key that count.
        pub mask_v6: [u64; 2],
        /// Open connections that a client may have; 0: no bound.
        pub open_max: u64,
        /// Nanoseconds between two connections of a client at its full rate; 0: no bound.
        pub rate_ns: u64,
        /// How far a client may be ahead of its rate, nanoseconds.
        pub burst_ns: u64,
        /// 1: this host may forward packets, so that XDP must ask whether one is for it.
        pub forwards: u64,
    }

    /// One CPU's counters. All only grow; user space sums them over the CPUs.
    pub struct Totals {
        /// Connection attempts (SYN) refused because the client is blocked.
        pub dropped: u64,
        /// Attempts that were let in because the mode is observe.
        pub would_drop: u64,
        /// Attempts refused because the client opens too many a second.
        pub over_rate: u64,
        /// Attempts refused because the client has too many connections open.
        pub over_open: u64,
        /// Attempts of unknown clients refused because too many of them are unfinished.
        pub over_half_open: u64,
        /// SYNs of blocked clients dropped by XDP.
        pub xdp_dropped: u64,
        /// SYNs that XDP let through because the mode is observe.
        pub xdp_would_drop: u64,
        /// Attempts given to the core of the CPU that took the packet, or spread by hash when that CPU has none.
        pub steered_own: u64,
        /// Attempts given to a less loaded core, because that one was overloaded.
        pub steered_away: u64,
        /// Attempts left to the kernel's hash: steering is off, or the chosen core has no socket in the group.
        pub fallback: u64,
        /// Packets other than a SYN that met the listener: the ACK of a SYN cookie, or strays of dead connections.
        pub stray: u64,
        /// Packets whose client address was asked for and could not be read; they are let through.
        pub unreadable: u64,
        /// Connections whose client got no entry in the map of clients.
        pub untracked: u64,
        /// `bpf_ktime_get_ns` of this CPU's last log line; not a counter.
        pub logged_ns: u64,
    }

    /// A blocked client or network.
    pub struct Block {
        /// The block holds until this moment of CLOCK_MONOTONIC, in nanoseconds (`bpf_ktime_get_ns`).
        pub until_ns: u64,
        /// Attempts refused since the client was blocked.
        pub dropped: u64,
        /// Attempts that were let in because the mode is observe.
        pub would_drop: u64,
        /// 1: some addresses of the client are exempt, so each must be asked for. Of a network it is always asked.
        pub exempt_within: u64,
    }

    /// The connections of one client. What each connection touches comes first: with the map's own head and the key, an
    /// entry is four cache lines, and the first of them here is one of its own.
    pub struct Client {
        /// When the entry was made, CLOCK_MONOTONIC in nanoseconds. A connection that was opened under an earlier entry,
        /// since evicted, does not count down this one's.
        pub born_ns: u64,
        /// Connections established.
        pub opened: u64,
        /// Of those, ended.
        pub closed: u64,
        /// Payload bytes received; open connections' up to a second late.
        pub bytes_in: u64,
        /// Payload bytes sent and acknowledged; as `bytes_in`.
        pub bytes_out: u64,
        /// Smoothed round trip time as last measured, in microseconds.
        pub srtt_us: u64,
        /// CLOCK_MONOTONIC in nanoseconds when a connection last opened or closed.
        pub seen_ns: u64,
        /// Segments sent again; as `bytes_in`.
        pub retransmits: u64,
        /// Lives of ended connections.
        pub life: [u32; LIFE_BUCKETS],
        /// Attempts refused while the entry was there, for whatever reason.
        pub refused: u64,
        /// Fills the third line.
        pub spare: [u64; 3],
    }

    /// One CPU's counters of the connections of the listeners on one port. All only grow; user space sums them over the CPUs.
    pub struct Port {
        /// Connections established.
        pub opened: u64,
        /// Of those, ended.
        pub closed: u64,
        /// Attempts refused, for whatever reason.
        pub refused: u64,
        /// Payload bytes received; open connections' up to a second late.
        pub bytes_in: u64,
        /// Payload bytes sent and acknowledged; as `bytes_in`.
        pub bytes_out: u64,
        /// Segments sent again; as `bytes_in`.
        pub retransmits: u64,
        /// Sum of the lives of ended connections, milliseconds.
        pub life_ms: u64,
        /// Those lives by length.
        pub life: [u64; LIFE_BUCKETS],
    }

    /// What is known of an open connection: a cache line.
    pub struct Conn {
        /// Connections that want this slot. The one that finds itself alone has it, until it ends.
        pub claims: u32,
        /// The slot of its port's counters.
        pub port: u32,
        /// The socket that has this slot, or had it last. A cookie is never used again.
        pub cookie: u64,
        /// CLOCK_MONOTONIC in nanoseconds when it was established.
        pub opened_ns: u64,
        /// `born_ns` of the client's entry that counts it.
        pub born_ns: u64,
        /// When its figures were last added to the counters: the lower bits of CLOCK_MONOTONIC in units of 2^20 ns.
        pub told: u32,
        /// Of its segments sent again, those that are in the counters.
        pub retransmits: u32,
        /// Of its payload bytes received, those that are in the counters.
        pub bytes_in: u64,
        /// Of its payload bytes sent and acknowledged, those that are in the counters.
        pub bytes_out: u64,
        /// Octets received, as the kernel counts them, plus one, when the client had acknowledged the gateway's close; 0 before.
        pub half_closed_in: u64,
    }

    /// The one group that listens on a port; with a count of 0 the port does not tell.
    pub struct Near {
        /// The port, host order.
        pub port: u32,
        /// As [`Listeners::base`].
        pub base: u32,
        /// As [`Listeners::count`].
        pub count: u32,
        /// The slot of the port's counters.
        pub slot: u32,
    }

    /// The group that a listening socket belongs to.
    pub struct Listeners {
        /// Slot of the group's first core in the socket array.
        pub base: u32,
        /// Sockets in the group.
        pub count: u32,
    }
}

const _: () = assert!(size_of::<crate::ClientKey>() == 16);

// A slot of `CONNS` is one cache line; an entry of `CLIENTS` is four, with the kernel's 48 bytes and the key
// (`struct htab_elem`, kernel/bpf/hashtab.c).
const _: () = assert!(size_of::<Conn>() == 64 && size_of::<Client>() == 3 * 64);

#[cfg(feature = "user")]
// SAFETY: an array of bytes in a #[repr(C)] structure.
unsafe impl aya::Pod for crate::ClientKey {}
