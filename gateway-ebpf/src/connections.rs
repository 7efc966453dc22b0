//! `sock_ops` on the service's cgroup: what each client's connections were, as TCP itself saw them.
//!
//! Returns 1 always: 0 would override the answers of other programs on the cgroup (`tcp_call_bpf`, include/net/tcp.h).

use core::ptr::null_mut;

use aya_ebpf::{
    EbpfContext as _,
    bindings::{
        BPF_NOEXIST, BPF_SK_STORAGE_GET_F_CREATE, BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB, BPF_SOCK_OPS_RTT_CB,
        BPF_SOCK_OPS_RTT_CB_FLAG, BPF_SOCK_OPS_STATE_CB, BPF_SOCK_OPS_STATE_CB_FLAG, BPF_TCP_CLOSE,
        BPF_TCP_CLOSE_WAIT, BPF_TCP_CLOSING, BPF_TCP_ESTABLISHED, BPF_TCP_FIN_WAIT2, BPF_TCP_LAST_ACK,
        bpf_sock_ops,
    },
    helpers::{
        bpf_ktime_get_ns,
        generated::{bpf_get_socket_cookie, bpf_ktime_get_coarse_ns, bpf_sk_storage_get},
    },
    macros::sock_ops,
    programs::SockOpsContext,
};
use gateway_common::{Client, ClientKey, Conn, LIFE_BUCKETS, Port, Settings, TELL_NS};

use crate::{
    judge::give_back,
    maps::{CLIENTS, CONNS, FRESH, PORTS, SETTINGS, TOTALS, add, add_u32, count},
};

const AF_INET: u32 = 2;
const AF_INET6: u32 = 10;

/// The end of a connection, and once a round trip at most its figures so far (`tcp_rtt_estimator`, net/ipv4/tcp_input.c).
const WATCHED: u32 = BPF_SOCK_OPS_STATE_CB_FLAG as u32 | BPF_SOCK_OPS_RTT_CB_FLAG as u32;

#[sock_ops]
pub fn connections(ctx: SockOpsContext) -> u32 {
    match ctx.op() {
        BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB => opened(&ctx),
        BPF_SOCK_OPS_RTT_CB => measured(&ctx),
        BPF_SOCK_OPS_STATE_CB => state_changed(&ctx),
        _ => {}
    }
    1
}

/// A client's handshake is complete. Connections that the gateway opens itself (to upstreams) come with another
/// operation, those of other services on the cgroup with another local port.
#[inline(always)]
fn opened(ctx: &SockOpsContext) {
    let (Some(port), Some(settings)) = (port_of(ctx), SETTINGS.get(0)) else {
        return;
    };
    let Some(client) = client_of(ctx, settings) else {
        return;
    };
    let Some(conn) = conn_of(ctx, u64::from(BPF_SK_STORAGE_GET_F_CREATE)) else {
        count!(untracked);
        return;
    };
    // Without these flags the kernel does not report the end; other programs' flags are kept.
    if ctx.set_cb_flags((ctx.cb_flags() | WATCHED) as i32).is_err() {
        return;
    }
    // SAFETY: the helper has no preconditions.
    let now_ns = unsafe { bpf_ktime_get_ns() };
    // SAFETY: live values of maps; the connection's is this program's alone, with the socket locked, and counters are raised
    // atomically.
    unsafe {
        (*conn).told_ns = now_ns;
        (*conn).opened_ns = now_ns;
        add(&raw mut (*port).opened, 1);
    }
    count!(opened);
    let Some((entry, known)) = entry_for(&client, now_ns) else {
        count!(untracked);
        return;
    };
    give_back(settings, known, now_ns);
    // SAFETY: as above; `seen_ns` is one aligned word.
    unsafe {
        (*conn).born_ns = (*entry).born_ns;
        add(&raw mut (*entry).opened, 1);
        (*entry).seen_ns = now_ns;
    }
}

/// A round trip was measured: now and then the moment to tell what an open connection has carried so far.
#[inline(always)]
fn measured(ctx: &SockOpsContext) {
    let Some(conn) = conn_of(ctx, 0) else {
        return;
    };
    // SAFETY: the helper has no preconditions; a live value of the map, with the socket locked; a read of a context field.
    let (now_ns, told_ns, state) = unsafe { (bpf_ktime_get_coarse_ns(), (*conn).told_ns, (*ctx.ops).state) };
    if now_ns.saturating_sub(told_ns) < TELL_NS || state != BPF_TCP_ESTABLISHED {
        return;
    }
    let (Some(port), Some(settings)) = (port_of(ctx), SETTINGS.get(0)) else {
        return;
    };
    let entry = known(ctx, settings);
    // No FIN either way in this state, so the kernel's figures are payload alone.
    // SAFETY: reads of context fields.
    let payload = unsafe { ((*ctx.ops).bytes_received, (*ctx.ops).bytes_acked) };
    tell(ctx, conn, port, entry, payload);
    // SAFETY: as above.
    unsafe { (*conn).told_ns = now_ns };
}

#[inline(always)]
fn state_changed(ctx: &SockOpsContext) {
    let (state, next) = (ctx.arg(0), ctx.arg(1));
    if next == BPF_TCP_FIN_WAIT2 {
        half_closed(ctx);
    }
    if next != BPF_TCP_CLOSE || state == BPF_TCP_CLOSE {
        return;
    }
    // Without an entry it was not counted when it opened, or another program asked us to watch it.
    let Some(conn) = conn_of(ctx, 0) else {
        return;
    };
    // SAFETY: the helper has no preconditions; a live value of the map, with the socket locked.
    let (now_ns, opened_ns, born_ns) = unsafe { (bpf_ktime_get_ns(), (*conn).opened_ns, (*conn).born_ns) };
    if opened_ns == 0 {
        return;
    }
    let (Some(port), Some(settings)) = (port_of(ctx), SETTINGS.get(0)) else {
        return;
    };
    let entry = known(ctx, settings);
    tell(ctx, conn, port, entry, payload(ctx, state));
    // SAFETY: as above. A connection ends once: its end is not counted again whatever states follow.
    unsafe { (*conn).opened_ns = 0 };
    let life_ms = now_ns.wrapping_sub(opened_ns) / 1_000_000;
    count!(closed);
    count!(life_ms, life_ms);
    let bucket = opaque(conn, bucket_of(life_ms));
    if bucket >= LIFE_BUCKETS {
        return;
    }
    count_life(bucket);
    // SAFETY: live values of maps, raised atomically.
    unsafe {
        add(&raw mut (*port).closed, 1);
        add((&raw mut (*port).life).cast::<u64>().add(bucket), 1);
    }
    if entry.is_null() {
        return;
    }
    // SAFETY: as above.
    unsafe {
        if (*entry).born_ns != born_ns {
            return;
        }
        add(&raw mut (*entry).closed, 1);
        add_u32((&raw mut (*entry).life).cast::<u32>().add(bucket), 1);
        (*entry).seen_ns = now_ns;
    }
}

/// Adds to the counters what they do not have yet of a connection's payload (in, out) and repeated segments.
#[inline(always)]
fn tell(ctx: &SockOpsContext, conn: *mut Conn, port: *mut Port, entry: *mut Client, payload: (u64, u64)) {
    // SAFETY: reads of context fields, aligned, as the verifier demands; a live value of the map, with the socket locked.
    let (bytes_in, bytes_out, retransmits, srtt_us) = unsafe {
        let repeated = u64::from((*ctx.ops).total_retrans);
        let bytes_in = payload.0.saturating_sub((*conn).bytes_in);
        let bytes_out = payload.1.saturating_sub((*conn).bytes_out);
        let retransmits = repeated.saturating_sub((*conn).retransmits);
        (*conn).bytes_in += bytes_in;
        (*conn).bytes_out += bytes_out;
        (*conn).retransmits += retransmits;
        (
            bytes_in,
            bytes_out,
            retransmits,
            u64::from((*ctx.ops).srtt_us >> 3),
        )
    };
    count!(bytes_in, bytes_in);
    count!(bytes_out, bytes_out);
    // SAFETY: live values of maps, raised atomically; `srtt_us` is one aligned word.
    unsafe {
        add(&raw mut (*port).bytes_in, bytes_in);
        add(&raw mut (*port).bytes_out, bytes_out);
        if !entry.is_null() {
            add(&raw mut (*entry).bytes_in, bytes_in);
            add(&raw mut (*entry).bytes_out, bytes_out);
            (*entry).srtt_us = srtt_us;
        }
        // Mostly there are none, and each atomic add is a locked cycle.
        if retransmits == 0 {
            return;
        }
        add(&raw mut (*port).retransmits, retransmits);
        if !entry.is_null() {
            add(&raw mut (*entry).retransmits, retransmits);
        }
    }
    count!(retransmits, retransmits);
}

/// The bucket of a life: as many bits as its milliseconds have, below `LIFE_BUCKETS`.
#[inline(always)]
fn bucket_of(life_ms: u64) -> usize {
    // By steps, because the target has no instruction to count bits. 49 days are beyond the last bucket anyway.
    let mut rest = life_ms.min(u64::from(u32::MAX)) as u32;
    let mut bits = 0;
    if rest >= 1 << 16 {
        bits += 16;
        rest >>= 16;
    }
    if rest >= 1 << 8 {
        bits += 8;
        rest >>= 8;
    }
    if rest >= 1 << 4 {
        bits += 4;
        rest >>= 4;
    }
    if rest >= 1 << 2 {
        bits += 2;
        rest >>= 2;
    }
    bits += match rest {
        0 => 0,
        1 => 1,
        _ => 2,
    };
    if bits < LIFE_BUCKETS {
        bits
    } else {
        LIFE_BUCKETS - 1
    }
}

/// The same number, as one of which the verifier knows nothing. It follows each path through `bucket_of` with the number that
/// comes out, and without CAP_PERFMON it refuses an offset into a map's value that is a constant on one path and a range on
/// another (`sanitize_ptr_alu`, kernel/bpf/verifier.c).
#[inline(always)]
fn opaque(conn: *mut Conn, number: usize) -> usize {
    // SAFETY: a live value of the map, with the socket locked; the connection is at its end, and this field is of no more use.
    unsafe {
        let scratch = &raw mut (*conn).told_ns;
        scratch.write_volatile(number as u64);
        scratch.read_volatile() as usize
    }
}

#[inline(always)]
fn count_life(bucket: usize) {
    if let Some(totals) = TOTALS.get_ptr_mut(0) {
        // SAFETY: a live value of the map; the bucket is within the array.
        add(unsafe { (&raw mut (*totals).life).cast::<u64>().add(bucket) }, 1);
    }
}

/// Payload bytes in and out of an ending connection, given its last state.
///
/// The kernel's figures (RFC 4898 ThruOctets) count a FIN as one octet of sequence space; the states tell which FINs there
/// were. One octet wrong at most, where a half-closed connection ends by a reset or by its timeout.
#[inline(always)]
fn payload(ctx: &SockOpsContext, state: u32) -> (u64, u64) {
    let ops = ctx.ops;
    // SAFETY: reads of context fields, each in its own size, as the verifier demands.
    let (received, acked, una, next) = unsafe {
        (
            (*ops).bytes_received,
            (*ops).bytes_acked,
            (*ops).snd_una,
            (*ops).snd_nxt,
        )
    };
    let fin_in = match state {
        BPF_TCP_CLOSE_WAIT | BPF_TCP_LAST_ACK | BPF_TCP_CLOSING => true,
        BPF_TCP_FIN_WAIT2 => !is_let_go(ctx, received),
        _ => false,
    };
    let fin_sent = matches!(state, BPF_TCP_FIN_WAIT2 | BPF_TCP_LAST_ACK | BPF_TCP_CLOSING);
    let fin_acked = fin_sent && una == next;
    (
        received.saturating_sub(u64::from(fin_in)),
        acked.saturating_sub(u64::from(fin_acked)),
    )
}

/// Remembers a connection whose close the client has acknowledged. If the gateway let go of the socket and the client's FIN
/// is not in the same packet, the kernel ends it at once, in the same run of its code (`tcp_rcv_state_process`,
/// net/ipv4/tcp_input.c), so one slot a CPU will do.
#[inline(always)]
fn half_closed(ctx: &SockOpsContext) {
    let Some(totals) = TOTALS.get_ptr_mut(0) else {
        return;
    };
    // SAFETY: this CPU's value; the worst of a race is a connection that is not recognised. Reads of context fields.
    unsafe {
        (*totals).half_closed = bpf_get_socket_cookie(ctx.as_ptr());
        (*totals).half_closed_in = (*ctx.ops).bytes_received;
    }
}

/// True when the connection ends right after entering FIN_WAIT2, with nothing received since: no FIN from the client then.
#[inline(always)]
fn is_let_go(ctx: &SockOpsContext, received: u64) -> bool {
    let Some(totals) = TOTALS.get(0) else {
        return false;
    };
    // SAFETY: the helper takes the program's context.
    let cookie = unsafe { bpf_get_socket_cookie(ctx.as_ptr()) };
    totals.half_closed == cookie && totals.half_closed_in == received
}

/// The counters of the port that the connection came in on, when it is one of the gateway's.
#[inline(always)]
fn port_of(ctx: &SockOpsContext) -> Option<*mut Port> {
    PORTS.get_ptr_mut(ctx.local_port())
}

/// What is known of the connection; made when there is nothing and the flags say so.
#[inline(always)]
fn conn_of(ctx: &SockOpsContext, flags: u64) -> Option<*mut Conn> {
    // SAFETY: a read of a context field; the helper takes the map and the context's socket, which the verifier wants to see
    // compared with null.
    let conn = unsafe {
        let socket = (*ctx.ops).__bindgen_anon_2.sk;
        if socket.is_null() {
            return None;
        }
        let map = (&raw const CONNS).cast_mut();
        bpf_sk_storage_get(map.cast(), socket.cast(), null_mut(), flags).cast::<Conn>()
    };
    (!conn.is_null()).then_some(conn)
}

#[inline(always)]
fn client_of(ctx: &SockOpsContext, settings: &Settings) -> Option<ClientKey> {
    let whole = match ctx.family() {
        AF_INET => ClientKey::v4(ctx.remote_ip4().to_ne_bytes()),
        AF_INET6 => ClientKey::v6(remote_ip6(ctx.ops)),
        _ => return None,
    };
    Some(whole.cut(settings.mask_v4, settings.mask_v6))
}

/// Word by word and volatile: the verifier refuses a wider load of this context. Built as a number and not in an array, for
/// the reason of `FRESH`.
#[inline(always)]
fn remote_ip6(ops: *mut bpf_sock_ops) -> [u8; 16] {
    // SAFETY: reads of context words.
    let word = |index: usize| unsafe { u128::from((&raw const (*ops).remote_ip6[index]).read_volatile()) };
    (word(0) | word(1) << 32 | word(2) << 64 | word(3) << 96).to_le_bytes()
}

/// The client's entry; null: none (see `block_of` for why).
#[inline(always)]
fn known(ctx: &SockOpsContext, settings: &Settings) -> *mut Client {
    let Some(client) = client_of(ctx, settings) else {
        return null_mut();
    };
    CLIENTS.get_ptr_mut(&client).unwrap_or(null_mut())
}

/// The client's entry, and whether it was there already. Two CPUs may race to make it: the second insert fails and finds the
/// first's.
#[inline(always)]
fn entry_for(client: &ClientKey, now_ns: u64) -> Option<(*mut Client, bool)> {
    if let Some(entry) = CLIENTS.get_ptr_mut(client) {
        return Some((entry, true));
    }
    let fresh = FRESH.get_ptr_mut(0)?;
    // SAFETY: this CPU's value, of which nothing but `born_ns` is ever written.
    unsafe {
        (*fresh).born_ns = now_ns;
        let _ = CLIENTS.insert(client, &*fresh, u64::from(BPF_NOEXIST));
    }
    CLIENTS.get_ptr_mut(client).map(|entry| (entry, false))
}
