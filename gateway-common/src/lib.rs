//! The border between the gateway and its eBPF programs: every map's name, key, value and bound.
//!
//! Both sides are built from this file, for different targets and by different compilers, so every type is
//! `#[repr(C)]`, has no padding, and has its size asserted below. A change here needs `gateway-ebpf/build.sh`.

#![no_std]

mod client;
mod maps;

pub use client::{ClientKey, V4_MAPPED_PREFIX};
pub use maps::{Block, Client, Listeners, Settings, Totals, names};

/// Cores whose listeners may stand in one `SO_REUSEPORT` group. A core's slot in the socket array is
/// `group * CORES_MAX + core`, so the bound also sets the array's stride: 8 bytes a slot.
pub const CORES_MAX: u32 = 256;

/// Listener groups (one per configured address) of one process.
pub const GROUPS_MAX: u32 = 64;

/// CPUs that the steering map knows. What arrives on a CPU above it is spread over the cores by its hash.
pub const CPUS_MAX: u32 = 1024;

/// Clients that can be blocked at the same time; about 7 MiB of kernel memory. The least recently hit goes first.
pub const BLOCKS_MAX: u32 = 65_536;

/// Clients whose connections are counted one by one; about 9 MiB. The least recently seen goes first: the totals
/// stay right, that client's own figures start again.
pub const CLIENTS_MAX: u32 = 65_536;

/// Local ports whose connections are counted.
pub const PORTS_MAX: u32 = 256;

/// No core: the value of a CPU that has none in the steering map.
pub const CORE_NONE: u32 = u32::MAX;

/// A core keeps its own CPU's connections until it has this many more than the least loaded core …
pub const LOAD_SLACK: u64 = 32;

/// … and a quarter more (`1 / 2^LOAD_SHARE_SHIFT`). Staying on the CPU that took the packet saves a cache miss a
/// packet and a wake-up across cores; a quarter more streams costs that core less than the move would.
pub const LOAD_SHARE_SHIFT: u32 = 2;

/// Least time between two log lines of one CPU about dropped clients. A flood must not become a flood of lines.
pub const LOG_PAUSE_NS: u64 = 100_000_000;

/// True when `own` carries so much more than `least` that a new connection should move there.
///
/// Both are open streams. The program and its tests share this one definition.
#[inline(always)]
pub const fn overloaded(own: u64, least: u64) -> bool {
    own > least + (least >> LOAD_SHARE_SHIFT) + LOAD_SLACK
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_core_is_overloaded_only_beyond_slack_and_share() {
        assert!(!overloaded(0, 0));
        assert!(!overloaded(LOAD_SLACK, 0));
        assert!(overloaded(LOAD_SLACK + 1, 0));
        assert!(!overloaded(1250 + LOAD_SLACK, 1000));
        assert!(overloaded(1251 + LOAD_SLACK, 1000));
        assert!(!overloaded(5, 1000), "an idle core never gives work away");
    }
}
