//! The gateway's eBPF programs. `build.sh` makes `gateway.bpf.o` of them, which the gateway embeds.
//!
//! Minimum kernel 5.15: `sk_reuseport_md.sk` (5.14), `bpf_sk_storage_get` in `sock_ops` (5.3), ring buffer (5.8), atomics
//! without fetch on every JIT. Only stable UAPI contexts are used, so that one object serves every later kernel and both
//! architectures.

#![no_std]
#![no_main]
// The target's only way to an atomic add (maps.rs); the object is built by a compiler that build.sh names.
#![allow(internal_features)]
#![feature(core_intrinsics)]

mod connections;
mod driver;
mod judge;
mod listener;
mod maps;

use gateway_common::{LAYOUT, LAYOUT_MARK};

/// The helpers `bpf_ktime_get_ns` and `bpf_sk_select_reuseport` are open to GPL-compatible programs.
#[unsafe(no_mangle)]
#[unsafe(link_section = "license")]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

/// The layout of the shared types as this side was compiled; a test compares it with the other side's.
#[unsafe(no_mangle)]
#[used]
static STAMP: [u64; 2] = [u64::from_ne_bytes(LAYOUT_MARK), LAYOUT];

/// Never runs: the verifier admits no program that can reach it, and the linker drops it.
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo) -> ! {
    loop {}
}
