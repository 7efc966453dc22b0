//! `xdp` on one interface, where the configuration wants it: drops SYNs of blocked clients before the kernel has a socket
//! buffer for them. Against floods that would keep the network stack itself busy; it sends no reset.
//!
//! Whatever is not plainly a SYN of a blocked client to one of the gateway's ports on this host passes: other protocols
//! and ports, packets of open connections, later fragments, headers that are cut short or make no sense, tunnels. The
//! `listener` program then sees what is for the gateway.

use core::mem::MaybeUninit;

use aya_ebpf::{
    EbpfContext as _,
    bindings::xdp_action::{XDP_DROP, XDP_PASS},
    helpers::generated::{bpf_fib_lookup, bpf_xdp_load_bytes},
    macros::xdp,
    programs::XdpContext,
};
use gateway_common::{ClientKey, Settings};

use crate::{
    judge::{block_of, is_exempt, may_be_exempt},
    maps::{SETTINGS, add, count, port_counts},
};

/// EtherTypes (include/uapi/linux/if_ether.h); 802.1Q tags a frame, 802.1ad tags it a second time.
const ETH_P_IP: u16 = 0x0800;
const ETH_P_IPV6: u16 = 0x86dd;
const ETH_P_8021Q: u16 = 0x8100;
const ETH_P_8021AD: u16 = 0x88a8;
const VLAN_TAGS_MAX: usize = 2;

/// IP protocols and IPv6 extension headers (RFC 8200 section 4).
const HOP_BY_HOP: u8 = 0;
const TCP: u8 = 6;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const OPTIONS: u8 = 60;
/// Extension headers that are looked through; each may stand once in a sensible packet, options twice.
const EXTENSIONS_MAX: usize = 5;

/// The low 13 bits: the place of a fragment, in units of 8 bytes (RFC 791).
const IPV4_OFFSET_MASK: u16 = 0x1fff;
/// The high 13 bits of the fragment header's third and fourth byte (RFC 8200 section 4.5).
const IPV6_OFFSET_MASK: u16 = 0xfff8;

const TCP_SYN: u8 = 0x02;
const TCP_ACK: u8 = 0x10;

const AF_INET: u64 = 2;
const AF_INET6: u64 = 10;
/// Answers of `bpf_fib_lookup` that mean: this packet is forwarded (include/uapi/linux/bpf.h).
const FIB_FORWARDED: i64 = 0;
const FIB_NO_NEIGHBOUR: i64 = 7;
const FIB_FRAGMENTATION_NEEDED: i64 = 8;

#[xdp]
pub fn driver(ctx: XdpContext) -> u32 {
    match judge(&ctx) {
        Some(true) => XDP_DROP,
        _ => XDP_PASS,
    }
}

/// A packet's ends.
struct Packet {
    family: u64,
    source: ClientKey,
    target: ClientKey,
    protocol: u8,
    /// Where the header of the protocol begins, bytes from the frame's start.
    at: usize,
}

/// Some(true) when the packet is to be dropped; None when it is not one to judge.
#[inline(always)]
fn judge(ctx: &XdpContext) -> Option<bool> {
    let settings = SETTINGS.get(0)?;
    // Mostly nobody is blocked: then no packet is looked at.
    if settings.clients == 0 && settings.nets == 0 {
        return None;
    }
    let packet = packet(ctx)?;
    if packet.protocol != TCP {
        return None;
    }
    let tcp: [u8; 14] = read(ctx, packet.at)?;
    if tcp[13] & (TCP_SYN | TCP_ACK) != TCP_SYN {
        return None;
    }
    let listener = port_counts(u32::from(u16::from_be_bytes([tcp[2], tcp[3]])));
    if listener.is_null() {
        return None;
    }
    let client = packet.source.cut(settings.mask_v4, settings.mask_v6);
    let block = block_of(settings, &packet.source, &client);
    if block.is_null() {
        return None;
    }
    if (may_be_exempt(block) && is_exempt(&packet.source)) || is_forwarded(ctx, settings, &packet) {
        return None;
    }
    if settings.enforce == 0 {
        // SAFETY: a live value of the map; only the address is taken.
        add(unsafe { &raw mut (*block).would_drop }, 1);
        count!(xdp_would_drop);
        return None;
    }
    // SAFETY: as above.
    unsafe {
        add(&raw mut (*block).dropped, 1);
        add(&raw mut (*listener).refused, 1);
    }
    count!(xdp_dropped);
    Some(true)
}

/// The frame's IP packet, through VLAN tags.
#[inline(always)]
fn packet(ctx: &XdpContext) -> Option<Packet> {
    let mut at = 12;
    let mut kind = read_u16(ctx, at)?;
    for _ in 0..VLAN_TAGS_MAX {
        if kind != ETH_P_8021Q && kind != ETH_P_8021AD {
            break;
        }
        at += 4;
        kind = read_u16(ctx, at)?;
    }
    match kind {
        ETH_P_IP => ipv4(ctx, at + 2),
        ETH_P_IPV6 => ipv6(ctx, at + 2),
        _ => None,
    }
}

#[inline(always)]
fn ipv4(ctx: &XdpContext, at: usize) -> Option<Packet> {
    let head: [u8; 20] = read(ctx, at)?;
    let words = head[0] & 0x0f;
    let fragment = u16::from_be_bytes([head[6], head[7]]) & IPV4_OFFSET_MASK;
    if head[0] >> 4 != 4 || words < 5 || fragment != 0 {
        return None;
    }
    Some(Packet {
        family: AF_INET,
        source: ClientKey::v4([head[12], head[13], head[14], head[15]]),
        target: ClientKey::v4([head[16], head[17], head[18], head[19]]),
        protocol: head[9],
        at: at + usize::from(words) * 4,
    })
}

#[inline(always)]
fn ipv6(ctx: &XdpContext, at: usize) -> Option<Packet> {
    let head: [u8; 8] = read(ctx, at)?;
    let source: [u8; 16] = read(ctx, at + 8)?;
    let target: [u8; 16] = read(ctx, at + 24)?;
    let (version, next) = (head[0] >> 4, head[6]);
    if version != 6 {
        return None;
    }
    let (mut protocol, mut at) = (next, at + 40);
    for _ in 0..EXTENSIONS_MAX {
        if protocol == TCP {
            break;
        }
        let extension: [u8; 4] = read(ctx, at)?;
        let [next, length, ..] = extension;
        let offset = u16::from_be_bytes([extension[2], extension[3]]);
        at += match protocol {
            HOP_BY_HOP | ROUTING | OPTIONS => 8 * (1 + usize::from(length)),
            FRAGMENT if offset & IPV6_OFFSET_MASK == 0 => 8,
            _ => return None,
        };
        protocol = next;
    }
    Some(Packet {
        family: AF_INET6,
        source: ClientKey::v6(source),
        target: ClientKey::v6(target),
        protocol,
        at,
    })
}

/// True when this host would pass the packet on to another: then its port is not the gateway's.
#[inline(always)]
fn is_forwarded(ctx: &XdpContext, settings: &Settings, packet: &Packet) -> bool {
    if settings.forwards == 0 {
        return false;
    }
    // SAFETY: a read of a context field.
    let interface = unsafe { (*ctx.ctx).ingress_ifindex };
    let (source, target) = (words(&packet.source), words(&packet.target));
    // An IPv4 address stands in the first four bytes of its 16.
    let is_v4 = packet.family == AF_INET;
    let [source_0, source_1] = if is_v4 { [source[1] >> 32, 0] } else { source };
    let [target_0, target_1] = if is_v4 { [target[1] >> 32, 0] } else { target };
    // struct bpf_fib_lookup as words: the family, the interface, the addresses; the rest is for answers. Both architectures
    // that are served are little-endian, and so is the object's target.
    let mut question = MaybeUninit::<[u64; 8]>::uninit();
    let words: *mut u64 = question.as_mut_ptr().cast();
    // SAFETY: eight words within eight. One by one and volatile: a zeroed array would be a loop over a stack pointer. The helper
    // takes the context and 64 bytes, which it may write.
    let answer = unsafe {
        words.write_volatile(packet.family);
        words.add(1).write_volatile(u64::from(interface));
        words.add(2).write_volatile(source_0);
        words.add(3).write_volatile(source_1);
        words.add(4).write_volatile(target_0);
        words.add(5).write_volatile(target_1);
        words.add(6).write_volatile(0);
        words.add(7).write_volatile(0);
        bpf_fib_lookup(ctx.as_ptr(), words.cast(), size_of::<[u64; 8]>() as i32, 0)
    };
    matches!(
        answer,
        FIB_FORWARDED | FIB_NO_NEIGHBOUR | FIB_FRAGMENTATION_NEEDED
    )
}

#[inline(always)]
fn words(key: &ClientKey) -> [u64; 2] {
    let k = &key.0;
    [
        u64::from_ne_bytes([k[0], k[1], k[2], k[3], k[4], k[5], k[6], k[7]]),
        u64::from_ne_bytes([k[8], k[9], k[10], k[11], k[12], k[13], k[14], k[15]]),
    ]
}

#[inline(always)]
fn read_u16(ctx: &XdpContext, at: usize) -> Option<u16> {
    read(ctx, at).map(u16::from_be_bytes)
}

/// Bytes of the packet, when all of them are there. By the helper (5.18) and not by a pointer: pointers into packets may be
/// moved by what is read from them only with CAP_PERFMON.
#[inline(always)]
fn read<const N: usize>(ctx: &XdpContext, at: usize) -> Option<[u8; N]> {
    let mut bytes = MaybeUninit::<[u8; N]>::uninit();
    // SAFETY: the helper writes N bytes to a buffer of N bytes, or fails.
    unsafe {
        let failed = bpf_xdp_load_bytes(ctx.ctx, at as u32, bytes.as_mut_ptr().cast(), N as u32);
        (failed == 0).then(|| bytes.assume_init())
    }
}
