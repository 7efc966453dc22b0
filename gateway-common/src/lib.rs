//! The border between the gateway and its eBPF programs: every map's name, key, value and bound.
//!
//! Both sides are built from this file, for different targets and by different compilers, so every type is
//! `#[repr(C)]`, has no padding, and has its size asserted below. A change here needs `gateway-ebpf/build.sh`.

#![no_std]

mod client;
mod maps;

pub use client::{ClientKey, Mask, Prefixes, V4_MAPPED_PREFIX};
pub use maps::{Block, Client, Conn, LIFE_BUCKETS, Listeners, Near, Port, Settings, TYPES, Totals, names};

/// Cores whose listeners may stand in one `SO_REUSEPORT` group. A core's slot in the socket array is
/// `group * CORES_MAX + core`, so the bound also sets the array's stride: 8 bytes a slot.
pub const CORES_MAX: u32 = 256;

/// Listener groups (one per configured address) of one process.
pub const GROUPS_MAX: u32 = 64;

/// CPUs that the steering map knows. What arrives on a CPU above it is spread over the cores by its hash.
pub const CPUS_MAX: u32 = 1024;

/// Clients that can be blocked at the same time. When the map is full, the one goes whose connections were least recently
/// attempted.
pub const BLOCKS_MAX: u32 = 65_536;

/// Networks other than one client's that can be blocked at the same time: operators' work, a list that a person still reads.
pub const NETS_MAX: u32 = 4096;

/// Exempt networks, the host's own two addresses included.
pub const EXEMPT_MAX: u32 = 4096;

/// Clients whose connections are counted one by one. The least recently seen goes first: the totals stay right, that
/// client's own figures start again.
pub const CLIENTS_MAX: u32 = 65_536;

/// Clients whose rate of new connections is watched. The least recently seen goes first, and has its burst again.
pub const RATES_MAX: u32 = 65_536;

/// Local ports whose connections are counted.
pub const PORTS_MAX: u32 = 256;

/// Slots of open connections, by cookie; a power of two. Cookies are given out in order, so connections meet in one only where
/// one has stayed while that many came; the later one is kept apart, at the cost of an allocation. 4 MiB.
pub const CONN_SLOTS: u32 = 65_536;

/// The slots, the first of all, that a connection tries before the others; a power of two. Short connections use these alone, one
/// after another, so that they stay in the CPUs' caches: 64 KiB. Those of long ones are passed over.
pub const CONN_SLOTS_NEAR: u32 = 1024;

/// Segments with payload, both ways, below which an open connection tells nothing: short ones tell all at their end.
pub const TELL_SEGMENTS: u32 = 8;

/// The slot of the cores' loads that has the number of the least loaded core. The loads follow, so that with up to seven cores
/// all are in one cache line.
pub const LOAD_LEAST: u32 = 0;

/// The slot of a core's load.
#[inline(always)]
pub const fn load_slot(core: u32) -> u32 {
    LOAD_LEAST + 1 + core
}

/// No core: the value of a CPU that has none in the steering map.
pub const CORE_NONE: u32 = u32::MAX;

/// A core keeps its own CPU's connections until it has this many more than another …
pub const LOAD_SLACK: u64 = 4;

/// … and a sixteenth more (`1 / 2^LOAD_SHARE_SHIFT`). Staying on the CPU that took the packet saves a cache miss a packet and
/// a wake-up across cores, so small differences are left alone; from some 100 streams a core on, none is 10 % off the mean.
pub const LOAD_SHARE_SHIFT: u32 = 4;

/// How long an unknown client's unfinished attempt is held to be at work, nanoseconds: the time in which a SYN-ACK is
/// repeated twice (after 1 s and 3 s, RFC 6298), so in which an honest client answers.
pub const HALF_OPEN_NS: u64 = 4_000_000_000;

/// The part of [`HALF_OPEN_NS`] up to which attempts are accounted for without asking who they are from. Beyond it, known and
/// unknown clients are told apart.
pub const CALM_NS: u64 = HALF_OPEN_NS / 2;

/// Slots of the array that finds a listener group by its port; a power of two. Where two ports meet in one, a hash is asked.
pub const NEAR_SLOTS: u32 = 64;

/// How often an open connection's figures are added to the counters at most, in units of 2^20 ns: a second. The last addition
/// is at its end.
pub const TELL_TICKS: u32 = 954;

/// Least time between two log lines of one CPU about dropped clients. A flood must not become a flood of lines.
pub const LOG_PAUSE_NS: u64 = 100_000_000;

/// True when `own` carries so much more than `least` that a new connection should move there.
///
/// Both are open streams. The program and its tests share this one definition.
#[inline(always)]
pub const fn overloaded(own: u64, least: u64) -> bool {
    own > least + (least >> LOAD_SHARE_SHIFT) + LOAD_SLACK
}

/// Identifies the shared types and the bounds of the maps: maps of another layout are not taken over. FNV-1a over the names,
/// offsets and sizes of all fields.
pub const LAYOUT: u64 = layout();

/// Stands in the object before its own [`LAYOUT`], in the byte order of the target.
pub const LAYOUT_MARK: [u8; 8] = *b"GWLAYOUT";

const fn layout() -> u64 {
    let mut hash = 0xcbf2_9ce4_8422_2325;
    let mut at = 0;
    while at < TYPES.len() {
        let (name, size, fields) = TYPES[at];
        hash = fnv(fnv_name(hash, name), size as u64);
        let mut field = 0;
        while field < fields.len() {
            let (name, offset, size) = fields[field];
            hash = fnv(fnv(fnv_name(hash, name), offset as u64), size as u64);
            field += 1;
        }
        at += 1;
    }
    let bounds = [BLOCKS_MAX, NETS_MAX, CLIENTS_MAX, RATES_MAX, PORTS_MAX];
    at = 0;
    while at < bounds.len() {
        hash = fnv(hash, bounds[at] as u64);
        at += 1;
    }
    hash
}

const fn fnv_name(mut hash: u64, name: &str) -> u64 {
    let bytes = name.as_bytes();
    let mut at = 0;
    while at < bytes.len() {
        hash = fnv(hash, bytes[at] as u64);
        at += 1;
    }
    hash
}

const fn fnv(hash: u64, value: u64) -> u64 {
    (hash ^ value).wrapping_mul(0x0000_0100_0000_01b3)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_core_is_overloaded_only_beyond_slack_and_share() {
        assert!(!overloaded(0, 0));
        assert!(!overloaded(LOAD_SLACK, 0));
        assert!(overloaded(LOAD_SLACK + 1, 0));
        assert!(!overloaded(1700 + LOAD_SLACK, 1600));
        assert!(overloaded(1701 + LOAD_SLACK, 1600));
        assert!(!overloaded(5, 1000), "an idle core never gives work away");
    }
}
