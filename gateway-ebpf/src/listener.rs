//! `sk_reuseport`: runs once for each connection attempt on the gateway's listeners, before the SYN is answered.
//!
//! The kernel calls it from `reuseport_select_sock` (net/core/sock_reuseport.c) when a packet finds no connection but a listener.
//! SK_DROP makes that look-up fail, so the client gets the RST of a closed port (`tcp_v4_rcv`, label no_tcp_socket).
//! Whatever goes wrong here lets the packet through: user space still refuses what must be refused.

use core::mem::MaybeUninit;

use aya_ebpf::{
    EbpfContext as _,
    bindings::{
        bpf_hdr_start_off::BPF_HDR_START_NET,
        sk_action::{SK_DROP, SK_PASS},
        sk_reuseport_md,
    },
    helpers::{
        bpf_get_smp_processor_id, bpf_ktime_get_ns,
        generated::{bpf_get_socket_cookie, bpf_skb_load_bytes_relative},
    },
    macros::sk_reuseport,
    programs::SkReuseportContext,
};
use aya_log_ebpf::info;
use gateway_common::{Block, CORES_MAX, ClientKey, LOG_PAUSE_NS, Settings, overloaded};

use crate::maps::{BLOCKS, CPU_CORES, GROUPS, LOADS, SETTINGS, SOCKETS, TOTALS, add, count};

/// EtherTypes (include/uapi/linux/if_ether.h) and where the source address stands (RFC 791, RFC 8200).
const ETH_P_IP: u16 = 0x0800;
const ETH_P_IPV6: u16 = 0x86dd;
const IPV4_SOURCE_OFFSET: u32 = 12;
const IPV6_SOURCE_OFFSET: u32 = 8;

/// Byte of the TCP header with the flags, and the two that tell a SYN from a SYN-ACK (RFC 9293 section 3.1).
const TCP_FLAGS_OFFSET: usize = 13;
const TCP_SYN: u8 = 0x02;
const TCP_ACK: u8 = 0x10;

#[sk_reuseport]
pub fn listener(ctx: SkReuseportContext) -> u32 {
    let Some(settings) = SETTINGS.get(0) else {
        return SK_PASS;
    };
    let attempt = is_attempt(&ctx);
    if !attempt {
        count!(stray);
    }
    match client_of(&ctx) {
        Some(client) => {
            if refuse(&ctx, settings, &client, attempt) {
                return SK_DROP;
            }
        }
        None => count!(unreadable),
    }
    steer(&ctx, settings, attempt);
    SK_PASS
}

/// True for a SYN. Other packets are judged alike, but are no attempts and are not counted as such.
#[inline(always)]
fn is_attempt(ctx: &SkReuseportContext) -> bool {
    let flags = ctx.data() + TCP_FLAGS_OFFSET;
    if flags + 1 > ctx.data_end() {
        return false;
    }
    // SAFETY: within the packet's linear data, as just checked.
    let flags = unsafe { *(flags as *const u8) };
    flags & (TCP_SYN | TCP_ACK) == TCP_SYN
}

/// The client, read from the IP header: `data` starts at the TCP header, the helper can look before it.
#[inline(always)]
fn client_of(ctx: &SkReuseportContext) -> Option<ClientKey> {
    match u16::from_be(ctx.eth_protocol() as u16) {
        ETH_P_IP => load::<4>(ctx, IPV4_SOURCE_OFFSET).map(ClientKey::v4),
        ETH_P_IPV6 => load::<16>(ctx, IPV6_SOURCE_OFFSET).map(ClientKey::v6),
        _ => None,
    }
}

/// Not zeroed first: that would call a loop over a stack pointer, which the verifier admits only with CAP_PERFMON.
#[inline(always)]
fn load<const N: usize>(ctx: &SkReuseportContext, offset: u32) -> Option<[u8; N]> {
    let mut bytes = MaybeUninit::<[u8; N]>::uninit();
    // SAFETY: the helper writes N bytes to a buffer of N bytes, also when it fails (then zeroes).
    unsafe {
        let to = bytes.as_mut_ptr().cast();
        let failed = bpf_skb_load_bytes_relative(ctx.as_ptr(), offset, to, N as u32, BPF_HDR_START_NET);
        (failed == 0).then(|| bytes.assume_init())
    }
}

/// True when the packet must be dropped: its client is blocked, the block still holds, and the mode is to enforce it.
#[inline(always)]
fn refuse(ctx: &SkReuseportContext, settings: &Settings, client: &ClientKey, attempt: bool) -> bool {
    let Some(block) = BLOCKS.get_ptr_mut(client) else {
        return false;
    };
    let now_ns = unsafe { bpf_ktime_get_ns() };
    // SAFETY: a live value of the map. User space may write it at the same time: each field is one aligned word.
    let until_ns = unsafe { (*block).until_ns };
    if now_ns >= until_ns {
        return false;
    }
    if settings.enforce == 0 {
        if attempt {
            // SAFETY: as above; only the address is taken.
            add(unsafe { &raw mut (*block).would_drop }, 1);
            count!(would_drop);
        }
        return false;
    }
    // Refusal before work: this is the cheapest moment there is, no memory is held for the client yet.
    if attempt {
        // SAFETY: as above.
        add(unsafe { &raw mut (*block).dropped }, 1);
        count!(dropped);
        tell(ctx, client, block, now_ns);
    }
    true
}

/// Writes a log line when the client's count reaches a power of two, at most one each `LOG_PAUSE_NS` on a CPU.
#[inline(always)]
fn tell(ctx: &SkReuseportContext, client: &ClientKey, block: *const Block, now_ns: u64) {
    // SAFETY: a live value of the map; another CPU may have counted on, which only makes the sample differ.
    let dropped = unsafe { (*block).dropped };
    if dropped & dropped.wrapping_sub(1) != 0 {
        return;
    }
    let Some(totals) = TOTALS.get_ptr_mut(0) else {
        return;
    };
    // SAFETY: this CPU's value, which only this program writes, with bottom halves off.
    let logged_ns = unsafe { &mut (*totals).logged_ns };
    if now_ns.wrapping_sub(*logged_ns) < LOG_PAUSE_NS {
        return;
    }
    *logged_ns = now_ns;
    match client.as_v4() {
        Some(v4) => info!(ctx, "refused connections of blocked client {:i}: {}", v4, dropped),
        None => info!(
            ctx,
            "refused connections of blocked client {:i}/64: {}", client.0, dropped
        ),
    }
}

/// Picks the core: the one of the CPU that took the packet, so that the connection stays in its caches, unless it carries
/// much more than the least loaded. Without a pick the kernel's hash over the group decides.
#[inline(always)]
fn steer(ctx: &SkReuseportContext, settings: &Settings, attempt: bool) {
    if settings.steering == 0 || settings.cores == 0 {
        if attempt {
            count!(fallback);
        }
        return;
    }
    let (core, own) = choose(ctx, settings);
    if !select(ctx, core) {
        if attempt {
            count!(fallback);
        }
        return;
    }
    if !attempt {
        return;
    }
    // The new connection counts at once: otherwise all of a burst would go to the core that was least loaded when user
    // space last published.
    if let Some(load) = LOADS.get_ptr_mut(core) {
        add(load, 1);
    }
    if own {
        count!(steered_own);
    } else {
        count!(steered_away);
    }
}

/// The core, and whether it is the one the packet came to. A CPU without a core (one that the gateway may not run on) spreads
/// its packets over the cores by their hash.
#[inline(always)]
fn choose(ctx: &SkReuseportContext, settings: &Settings) -> (u32, bool) {
    let cpu = unsafe { bpf_get_smp_processor_id() };
    let core = match CPU_CORES.get(cpu) {
        Some(core) if *core < settings.cores => *core,
        _ => ctx.hash() % settings.cores,
    };
    match (LOADS.get(core), LOADS.get(settings.least_core)) {
        (Some(own), Some(least)) if overloaded(*own, *least) => (settings.least_core, false),
        _ => (core, true),
    }
}

/// Selects the core's socket of the group at hand. False: the core has none (any more).
#[inline(always)]
fn select(ctx: &SkReuseportContext, core: u32) -> bool {
    if core >= CORES_MAX {
        return false;
    }
    let md: *mut sk_reuseport_md = ctx.md;
    // SAFETY: `sk` is the listener that the look-up found first, never null (bpf_run_sk_reuseport, net/core/filter.c).
    let cookie = unsafe { bpf_get_socket_cookie((*md).__bindgen_anon_3.sk.cast()) };
    // SAFETY: the value is copied before anything could remove it.
    let Some(group) = (unsafe { GROUPS.get(&cookie) }).copied() else {
        return false;
    };
    core < group.count && SOCKETS.select_reuseport(ctx, group.base + core).is_ok()
}
