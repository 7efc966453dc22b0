//! `sk_reuseport`: runs once for each connection attempt on the gateway's listeners, before the SYN is answered.
//!
//! The kernel calls it from `reuseport_select_sock` (net/core/sock_reuseport.c) when a packet finds no connection but a listener.
//! SK_DROP makes that look-up fail, so the client gets the RST of a closed port (`tcp_v4_rcv`, label no_tcp_socket).
//! Whatever goes wrong here lets the packet through: user space still refuses what must be refused.

use core::{intrinsics::cold_path, mem::MaybeUninit};

use aya_ebpf::{
    EbpfContext as _,
    bindings::{
        bpf_hdr_start_off::BPF_HDR_START_NET,
        sk_action::{SK_DROP, SK_PASS},
        sk_reuseport_md,
    },
    helpers::{
        bpf_get_smp_processor_id,
        generated::{bpf_get_socket_cookie, bpf_skb_load_bytes_relative},
    },
    macros::sk_reuseport,
    programs::SkReuseportContext,
};
use aya_log_ebpf::info;
use gateway_common::{
    Block, CORES_MAX, ClientKey, LOAD_LEAST, LOG_PAUSE_NS, NEAR_SLOTS, Settings, load_slot, overloaded,
};

use crate::{
    judge::{block_of, is_exempt, is_pressed, may_be_exempt, now_ns, over_half_open, over_open, over_rate},
    maps::{CLIENTS, CPU_CORES, GROUPS, LOADS, NEAR, SETTINGS, SOCKETS, TOTALS, add, count, port_counts},
};

/// EtherTypes (include/uapi/linux/if_ether.h) and where the source address stands (RFC 791, RFC 8200).
const ETH_P_IP: u16 = 0x0800;
const ETH_P_IPV6: u16 = 0x86dd;
const IPV4_SOURCE_OFFSET: u32 = 12;
const IPV6_SOURCE_OFFSET: u32 = 8;

/// Where the TCP header has the destination port and the flags, and the two flags that tell a SYN from a SYN-ACK
/// (RFC 9293 section 3.1).
const TCP_PORT_OFFSET: usize = 2;
const TCP_FLAGS_OFFSET: usize = 13;
const TCP_SYN: u8 = 0x02;
const TCP_ACK: u8 = 0x10;

#[sk_reuseport]
pub fn listener(ctx: SkReuseportContext) -> u32 {
    let Some(settings) = SETTINGS.get(0) else {
        return SK_PASS;
    };
    let port = attempt_at(&ctx);
    if port == NO_ATTEMPT {
        cold_path();
        count!(stray);
    }
    if refuse(&ctx, settings, port) {
        return SK_DROP;
    }
    steer(&ctx, settings, port);
    SK_PASS
}

/// No port: no socket listens on 0.
const NO_ATTEMPT: u32 = 0;

/// The port that a SYN is for. Other packets are judged by blocks alone, are no attempts and are not counted as such.
#[inline(always)]
fn attempt_at(ctx: &SkReuseportContext) -> u32 {
    let data = ctx.data();
    if data + TCP_FLAGS_OFFSET + 1 > ctx.data_end() {
        return NO_ATTEMPT;
    }
    // SAFETY: within the packet's linear data, as just checked.
    let (flags, port) = unsafe {
        (
            *((data + TCP_FLAGS_OFFSET) as *const u8),
            ((data + TCP_PORT_OFFSET) as *const u16).read_unaligned(),
        )
    };
    if flags & (TCP_SYN | TCP_ACK) != TCP_SYN {
        return NO_ATTEMPT;
    }
    u32::from(u16::from_be(port))
}

/// The client, read from the IP header: `data` starts at the TCP header, the helper can look before it.
#[inline(always)]
fn client_of(ctx: &SkReuseportContext) -> Option<ClientKey> {
    match u16::from_be(ctx.eth_protocol() as u16) {
        ETH_P_IP => header::<4>(ctx, IPV4_SOURCE_OFFSET).map(ClientKey::v4),
        ETH_P_IPV6 => header::<16>(ctx, IPV6_SOURCE_OFFSET).map(ClientKey::v6),
        _ => None,
    }
}

/// Not zeroed first: that would call a loop over a stack pointer, which the verifier admits only with CAP_PERFMON.
#[inline(always)]
fn header<const N: usize>(ctx: &SkReuseportContext, offset: u32) -> Option<[u8; N]> {
    let mut bytes = MaybeUninit::<[u8; N]>::uninit();
    // SAFETY: the helper writes N bytes to a buffer of N bytes, also when it fails (then zeroes).
    unsafe {
        let to = bytes.as_mut_ptr().cast();
        let failed = bpf_skb_load_bytes_relative(ctx.as_ptr(), offset, to, N as u32, BPF_HDR_START_NET);
        (failed == 0).then(|| bytes.assume_init())
    }
}

/// Why an attempt is refused.
#[derive(Clone, Copy, PartialEq)]
enum Why {
    Blocked,
    Rate,
    Open,
    HalfOpen,
}

/// True when the packet must be dropped: its client is blocked or over a bound, is not exempt, and the mode is to enforce it.
#[inline(always)]
fn refuse(ctx: &SkReuseportContext, settings: &Settings, port: u32) -> bool {
    // The common case, nobody blocked and no bound reached, costs no look-up of the client: each may be two cache misses.
    if settings.asks == 0 && (port == NO_ATTEMPT || !is_pressed(settings)) {
        return false;
    }
    // What follows stands behind the rest, so that the common case runs through few lines of code: they are cold too, and the
    // program has 15 KiB.
    cold_path();
    let Some(whole) = client_of(ctx) else {
        count!(unreadable);
        return false;
    };
    let whole = &whole;
    let client = whole.cut(settings.mask_v4, settings.mask_v6);
    let block = block_of(settings, whole, &client);
    if port == NO_ATTEMPT {
        return !block.is_null() && settings.enforce != 0 && !(may_be_exempt(block) && is_exempt(whole));
    }
    let why = if !block.is_null() {
        Why::Blocked
    } else if over_open(settings, &client) {
        Why::Open
    } else if over_rate(settings, &client) {
        Why::Rate
    } else if (settings.asks == 0 || is_pressed(settings)) && over_half_open(settings, &client) {
        Why::HalfOpen
    } else {
        return false;
    };
    if may_be_exempt(block) && is_exempt(whole) {
        return false;
    }
    if settings.enforce == 0 {
        if !block.is_null() {
            // SAFETY: a live value of the map; only the address is taken.
            add(unsafe { &raw mut (*block).would_drop }, 1);
        }
        count!(would_drop);
        return false;
    }
    cold_path();
    // Refusal before work: this is the cheapest moment there is, no memory is held for the client yet.
    book(block, &client, port, why);
    tell(ctx, &client, block, why);
    true
}

/// Counts a refused attempt: in all, for the port, for the block and for the client.
#[inline(always)]
fn book(block: *mut Block, client: &ClientKey, port: u32, why: Why) {
    match why {
        Why::Blocked => count!(dropped),
        Why::Rate => count!(over_rate),
        Why::Open => count!(over_open),
        Why::HalfOpen => count!(over_half_open),
    }
    if !block.is_null() {
        // SAFETY: a live value of the map; only the address is taken.
        add(unsafe { &raw mut (*block).dropped }, 1);
    }
    if let Some(entry) = CLIENTS.get_ptr_mut(client) {
        // SAFETY: as above.
        add(unsafe { &raw mut (*entry).refused }, 1);
    }
    let port = port_counts(port);
    if !port.is_null() {
        // SAFETY: as above.
        add(unsafe { &raw mut (*port).refused }, 1);
    }
}

/// Writes a log line, at most one each `LOG_PAUSE_NS` on a CPU; of a blocked client only when its count reaches a power of two.
#[inline(always)]
fn tell(ctx: &SkReuseportContext, client: &ClientKey, block: *mut Block, why: Why) {
    let mut dropped = 0;
    if !block.is_null() {
        // SAFETY: a live value of the map; another CPU may have counted on, which only makes the sample differ.
        dropped = unsafe { (*block).dropped };
        if dropped & dropped.wrapping_sub(1) != 0 {
            return;
        }
    }
    let Some(totals) = TOTALS.get_ptr_mut(0) else {
        return;
    };
    let now_ns = now_ns();
    // SAFETY: this CPU's value, which only this program writes, with bottom halves off.
    let logged_ns = unsafe { &mut (*totals).logged_ns };
    if now_ns.wrapping_sub(*logged_ns) < LOG_PAUSE_NS {
        return;
    }
    *logged_ns = now_ns;
    match (why, client.as_v4()) {
        (Why::Blocked, Some(v4)) => info!(ctx, "refused connections of blocked client {:i}: {}", v4, dropped),
        (Why::Blocked, None) => info!(
            ctx,
            "refused connections of blocked client {:i}: {}", client.0, dropped
        ),
        (Why::Rate, _) => info!(ctx, "refused a connection of {:i}: too many a second", client.0),
        (Why::Open, _) => info!(ctx, "refused a connection of {:i}: too many open", client.0),
        (Why::HalfOpen, _) => info!(
            ctx,
            "refused a connection of {:i}: too many unfinished of new clients", client.0
        ),
    }
}

/// Picks the core: the one of the CPU that took the packet, so that the connection stays in its caches, unless it carries
/// much more than the least loaded. Without a pick the kernel's hash over the group decides.
#[inline(always)]
fn steer(ctx: &SkReuseportContext, settings: &Settings, port: u32) {
    let attempt = port != NO_ATTEMPT;
    if settings.steering == 0 || settings.cores == 0 {
        if attempt {
            count!(fallback);
        }
        return;
    }
    let (core, own) = choose(ctx, settings);
    if !select(ctx, port, core) {
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
    if let Some(load) = LOADS.get_ptr_mut(load_slot(core)) {
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
///
/// Two other cores are looked at: the least loaded when user space last published, which is stale for the rest of that tick,
/// and one by the packet's hash. So a burst within one tick is spread over all cores.
#[inline(always)]
fn choose(ctx: &SkReuseportContext, settings: &Settings) -> (u32, bool) {
    // SAFETY: the helper has no preconditions.
    let cpu = unsafe { bpf_get_smp_processor_id() };
    let any = ctx.hash() % settings.cores;
    let core = match CPU_CORES.get(cpu) {
        Some(core) if *core < settings.cores => *core,
        _ => any,
    };
    let Some(own) = load(load_slot(core)) else {
        return (core, true);
    };
    if let Some(least) = load(LOAD_LEAST) {
        let least = least as u32;
        if least < settings.cores && load(load_slot(least)).is_some_and(|least| overloaded(own, least)) {
            return (least, false);
        }
    }
    if load(load_slot(any)).is_some_and(|any| overloaded(own, any)) {
        return (any, false);
    }
    (core, true)
}

/// A slot of the loads. Volatile, because user space writes it in between.
#[inline(always)]
fn load(slot: u32) -> Option<u64> {
    // SAFETY: a live value of the map, one aligned word.
    LOADS.get_ptr(slot).map(|load| unsafe { load.read_volatile() })
}

/// Selects the core's socket of the group at hand. False: the core has none (any more).
#[inline(always)]
fn select(ctx: &SkReuseportContext, port: u32, core: u32) -> bool {
    if core >= CORES_MAX {
        return false;
    }
    // Should another port's packets be led here, the kernel refuses a socket that is not of the group at hand
    // (sk_select_reuseport, net/core/filter.c).
    if let Some(near) = NEAR.get(port % NEAR_SLOTS)
        && near.count != 0
        && near.port == port
    {
        return core < near.count && SOCKETS.select_reuseport(ctx, near.base + core).is_ok();
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
