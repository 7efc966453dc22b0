//! The maps, and how counters in them are raised. Names and bounds: `gateway_common`.

use core::{
    intrinsics::{AtomicOrdering, atomic_xadd},
    ptr::null_mut,
};

use aya_ebpf::{
    bindings::BPF_F_MMAPABLE,
    btf_maps::{Array, HashMap, LpmTrie, LruHashMap, PerCpuArray, ReusePortSockArray, SkStorage},
    macros::btf_map,
};
use gateway_common::{
    BLOCKS_MAX, Block, CLIENTS_MAX, CONN_SLOTS, CORES_MAX, CPUS_MAX, Client, ClientKey, Conn, EXEMPT_MAX,
    GROUPS_MAX, Listeners, NEAR_SLOTS, NETS_MAX, Near, PORTS_MAX, Port, RATES_MAX, Settings, Totals,
};

const SOCKETS_MAX: usize = (GROUPS_MAX * CORES_MAX) as usize;

#[btf_map]
pub static SETTINGS: Array<Settings, 1> = Array::new();

#[btf_map]
pub static TOTALS: PerCpuArray<Totals, 1> = PerCpuArray::new();

#[btf_map]
pub static BLOCKS: LruHashMap<ClientKey, Block, { BLOCKS_MAX as usize }> = LruHashMap::new();

#[btf_map]
pub static NETS: LpmTrie<ClientKey, Block, { NETS_MAX as usize }> = LpmTrie::new();

#[btf_map]
pub static EXEMPT: LpmTrie<ClientKey, u32, { EXEMPT_MAX as usize }> = LpmTrie::new();

#[btf_map]
pub static CLIENTS: LruHashMap<ClientKey, Client, { CLIENTS_MAX as usize }> = LruHashMap::new();

#[btf_map]
pub static RATES: LruHashMap<ClientKey, u64, { RATES_MAX as usize }> = LruHashMap::new();

#[btf_map]
pub static HALF_OPEN: Array<u64, 1> = Array::new();

/// Mappable for its alignment alone: such an array begins at a page, so that a slot is one cache line.
#[btf_map]
pub static CONNS: Array<Conn, { CONN_SLOTS as usize }, { BPF_F_MMAPABLE as usize }> = Array::new();

#[btf_map]
pub static CONNS_APART: SkStorage<Conn> = SkStorage::new();

/// Where `connections` puts together a client's first entry: on the stack, zeroing it would be a loop over a stack pointer,
/// admitted only with CAP_PERFMON.
#[btf_map]
pub static FRESH: PerCpuArray<Client, 1> = PerCpuArray::new();

#[btf_map]
pub static GROUPS: HashMap<u64, Listeners, SOCKETS_MAX> = HashMap::new();

#[btf_map]
pub static NEAR: Array<Near, { NEAR_SLOTS as usize }> = Array::new();

#[btf_map]
pub static SOCKETS: ReusePortSockArray<SOCKETS_MAX> = ReusePortSockArray::new();

#[btf_map]
pub static CPU_CORES: Array<u32, { CPUS_MAX as usize }> = Array::new();

/// Mapped into user space, which publishes by plain stores: no system call a tick.
#[btf_map]
pub static LOADS: Array<u64, { CORES_MAX as usize + 1 }, { BPF_F_MMAPABLE as usize }> = Array::new();

/// Apart from the counters, which all CPUs would otherwise write into the line that each must read to find them.
#[btf_map]
pub static PORTS: HashMap<u32, u32, { PORTS_MAX as usize }> = HashMap::new();

#[btf_map]
pub static PORT_COUNTS: PerCpuArray<Port, { PORTS_MAX as usize + 1 }> = PerCpuArray::new();

/// Adds to a counter in a map.
///
/// Atomic also for per-CPU values: `sock_ops` may run in a process's context and be interrupted by a packet's. Relaxed
/// and with its result unused, it becomes the plain atomic add that the JITs of 5.15 know (arm64 has no fetching
/// form before 5.18). An intrinsic because `AtomicU64::fetch_add` is not offered on this target, which has no compare-and-swap.
#[inline(always)]
pub fn add(counter: *mut u64, count: u64) {
    // SAFETY: callers pass a pointer to an aligned field of a live map value, which the verifier checks again.
    unsafe { atomic_xadd::<u64, u64, { AtomicOrdering::Relaxed }>(counter, count) };
}

/// As [`add`], for counters of 32 bits.
#[inline(always)]
pub fn add_u32(counter: *mut u32, count: u32) {
    // SAFETY: as in `add`.
    unsafe { atomic_xadd::<u32, u32, { AtomicOrdering::Relaxed }>(counter, count) };
}

/// The slot of a port's counters. The hash is asked only where several groups, or ports that meet, share a place in the array.
#[inline(always)]
pub fn port_slot(port: u32) -> Option<u32> {
    if let Some(near) = NEAR.get(port % NEAR_SLOTS)
        && near.count != 0
        && near.port == port
    {
        return Some(near.slot);
    }
    // SAFETY: a live value of the map, one aligned word.
    PORTS.get_ptr(port).map(|slot| unsafe { *slot })
}

/// This CPU's counters of a port; null: it is not counted (see `block_of` for why null).
#[inline(always)]
pub fn port_counts(port: u32) -> *mut Port {
    let Some(slot) = port_slot(port) else {
        return null_mut();
    };
    PORT_COUNTS.get_ptr_mut(slot).unwrap_or(null_mut())
}

/// Raises one field of this CPU's [`Totals`].
macro_rules! count {
    ($field:ident) => {
        count!($field, 1)
    };
    ($field:ident, $count:expr) => {
        if let Some(totals) = $crate::maps::TOTALS.get_ptr_mut(0) {
            // SAFETY: a live value of the map; only the address of the field is taken.
            $crate::maps::add(unsafe { &raw mut (*totals).$field }, $count);
        }
    };
}
pub(crate) use count;
