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
use gateway_common::{
    CONN_SLOTS, CONN_SLOTS_NEAR, Client, ClientKey, Conn, LIFE_BUCKETS, Port, Settings, TELL_SEGMENTS, TELL_TICKS,
};

use crate::{
    judge::give_back,
    maps::{CLIENTS, CONNS, CONNS_APART, FRESH, PORT_COUNTS, SETTINGS, add, add_u32, count, port_slot},
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
    let Some(slot) = port_slot(ctx.local_port()) else {
        return;
    };
    let (Some(port), Some(settings)) = (PORT_COUNTS.get_ptr_mut(slot), SETTINGS.get(0)) else {
        return;
    };
    let Some(client) = client_of(ctx, settings) else {
        return;
    };
    // Without these flags the kernel does not report the end; other programs' flags are kept.
    if ctx.set_cb_flags((ctx.cb_flags() | WATCHED) as i32).is_err() {
        return;
    }
    let Some(conn) = conn_for(ctx) else {
        count!(untracked);
        return;
    };
    // SAFETY: the helper has no preconditions.
    let now_ns = unsafe { bpf_ktime_get_ns() };
    let entry = entry_for(&client, now_ns);
    // SAFETY: live values of maps; the connection's is its own, with the socket locked, and counters are raised atomically.
    unsafe {
        (*conn).port = slot;
        (*conn).opened_ns = now_ns;
        (*conn).born_ns = entry.map_or(0, |(entry, _)| (*entry).born_ns);
        (*conn).told = (now_ns >> 20) as u32;
        // Volatile, or they become a call of memset, whose loop over a pointer is admitted only with CAP_PERFMON.
        (&raw mut (*conn).retransmits).write_volatile(0);
        (&raw mut (*conn).bytes_in).write_volatile(0);
        (&raw mut (*conn).bytes_out).write_volatile(0);
        (&raw mut (*conn).half_closed_in).write_volatile(0);
        add(&raw mut (*port).opened, 1);
    }
    let Some((entry, known)) = entry else {
        count!(untracked);
        return;
    };
    give_back(settings, known, now_ns);
    // SAFETY: as above; `seen_ns` is one aligned word.
    unsafe {
        add(&raw mut (*entry).opened, 1);
        (*entry).seen_ns = now_ns;
    }
}

/// A round trip was measured: now and then the moment to tell what an open connection has carried so far.
#[inline(always)]
fn measured(ctx: &SockOpsContext) {
    // First what is at hand: most connections end before they have carried much.
    // SAFETY: reads of context fields.
    let (segments, state) = unsafe {
        let segments = (*ctx.ops).data_segs_in.wrapping_add((*ctx.ops).data_segs_out);
        (segments, (*ctx.ops).state)
    };
    if segments < TELL_SEGMENTS || state != BPF_TCP_ESTABLISHED {
        return;
    }
    let Some(conn) = conn_of(ctx) else {
        return;
    };
    // SAFETY: the helper has no preconditions; a live value of the map, with the socket locked.
    let (now, told, slot) = unsafe {
        let now = (bpf_ktime_get_coarse_ns() >> 20) as u32;
        (now, (*conn).told, (*conn).port)
    };
    // The coarse clock may be behind the moment when it was opened.
    let since = now.wrapping_sub(told);
    if since < TELL_TICKS || since > u32::MAX / 2 {
        return;
    }
    let (Some(port), Some(settings)) = (PORT_COUNTS.get_ptr_mut(slot), SETTINGS.get(0)) else {
        return;
    };
    let entry = known(ctx, settings);
    // No FIN either way in this state, so the kernel's figures are payload alone.
    // SAFETY: reads of context fields.
    let payload = unsafe { ((*ctx.ops).bytes_received, (*ctx.ops).bytes_acked) };
    let told = tell(ctx, conn, port, entry, payload);
    // SAFETY: as above.
    unsafe {
        (*conn).told = now;
        (*conn).bytes_in += told.bytes_in;
        (*conn).bytes_out += told.bytes_out;
        (*conn).retransmits += told.retransmits as u32;
    }
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
    let Some(conn) = conn_of(ctx) else {
        return;
    };
    // SAFETY: the helper has no preconditions; a live value of the map, with the socket locked.
    let (now_ns, opened_ns, born_ns, slot) = unsafe {
        (
            bpf_ktime_get_ns(),
            (*conn).opened_ns,
            (*conn).born_ns,
            (*conn).port,
        )
    };
    let (Some(port), Some(settings)) = (PORT_COUNTS.get_ptr_mut(slot), SETTINGS.get(0)) else {
        return;
    };
    let life_ms = now_ns.wrapping_sub(opened_ns) / 1_000_000;
    let bucket = opaque(conn, bucket_of(life_ms));
    if bucket >= LIFE_BUCKETS {
        return;
    }
    let entry = known(ctx, settings);
    if !entry.is_null() {
        // Asks for the entry's two lines at once: an atomic add waits for its own, and then they would come one after the other.
        // SAFETY: a live value of the map; volatile, because nobody uses what is read.
        unsafe {
            (&raw const (*entry).life).cast::<u32>().add(bucket).read_volatile();
            (&raw const (*entry).born_ns).read_volatile();
        }
    }
    tell(ctx, conn, port, entry, payload(ctx, conn, state));
    give_up(conn);
    // SAFETY: live values of maps, raised atomically.
    unsafe {
        add(&raw mut (*port).closed, 1);
        add((&raw mut (*port).life).cast::<u64>().add(bucket), 1);
        add(&raw mut (*port).life_ms, life_ms);
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

/// What was added to the counters.
struct Told {
    bytes_in: u64,
    bytes_out: u64,
    retransmits: u64,
}

/// Adds to the counters what they do not have yet of a connection's payload (in, out) and repeated segments.
#[inline(always)]
fn tell(
    ctx: &SockOpsContext,
    conn: *mut Conn,
    port: *mut Port,
    entry: *mut Client,
    payload: (u64, u64),
) -> Told {
    // SAFETY: reads of context fields, aligned, as the verifier demands; a live value of the map, with the socket locked.
    let (told, srtt_us) = unsafe {
        let repeated = (*ctx.ops).total_retrans;
        let told = Told {
            bytes_in: payload.0.saturating_sub((*conn).bytes_in),
            bytes_out: payload.1.saturating_sub((*conn).bytes_out),
            retransmits: u64::from(repeated.saturating_sub((*conn).retransmits)),
        };
        (told, u64::from((*ctx.ops).srtt_us >> 3))
    };
    // SAFETY: live values of maps, raised atomically; `srtt_us` is one aligned word.
    unsafe {
        add(&raw mut (*port).bytes_in, told.bytes_in);
        add(&raw mut (*port).bytes_out, told.bytes_out);
        if !entry.is_null() {
            add(&raw mut (*entry).bytes_in, told.bytes_in);
            add(&raw mut (*entry).bytes_out, told.bytes_out);
            (*entry).srtt_us = srtt_us;
        }
        // Mostly there are none, and each atomic add is a locked cycle.
        if told.retransmits == 0 {
            return told;
        }
        add(&raw mut (*port).retransmits, told.retransmits);
        if !entry.is_null() {
            add(&raw mut (*entry).retransmits, told.retransmits);
        }
    }
    told
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
        let scratch = &raw mut (*conn).told;
        scratch.write_volatile(number as u32);
        scratch.read_volatile() as usize
    }
}

/// Payload bytes in and out of an ending connection, given its last state.
///
/// The kernel's figures (RFC 4898 ThruOctets) count a FIN as one octet of sequence space; the states tell which FINs there
/// were. One octet wrong at most, where a half-closed connection ends by a reset or by its timeout.
#[inline(always)]
fn payload(ctx: &SockOpsContext, conn: *mut Conn, state: u32) -> (u64, u64) {
    let ops = ctx.ops;
    // SAFETY: reads of context fields, each in its own size, as the verifier demands; a live value of the map.
    let (received, acked, una, next, half_closed_in) = unsafe {
        (
            (*ops).bytes_received,
            (*ops).bytes_acked,
            (*ops).snd_una,
            (*ops).snd_nxt,
            (*conn).half_closed_in,
        )
    };
    let fin_in = match state {
        BPF_TCP_CLOSE_WAIT | BPF_TCP_LAST_ACK | BPF_TCP_CLOSING => true,
        // Nothing has come since the client acknowledged the close, so no FIN either: the kernel ended it by itself.
        BPF_TCP_FIN_WAIT2 => half_closed_in != received + 1,
        _ => false,
    };
    let fin_sent = matches!(state, BPF_TCP_FIN_WAIT2 | BPF_TCP_LAST_ACK | BPF_TCP_CLOSING);
    let fin_acked = fin_sent && una == next;
    (
        received.saturating_sub(u64::from(fin_in)),
        acked.saturating_sub(u64::from(fin_acked)),
    )
}

/// Remembers what a connection had received when the client acknowledged its close. If the gateway has let go of the socket,
/// the kernel may end it in this state without the client's FIN (`tcp_rcv_state_process`, net/ipv4/tcp_input.c).
#[inline(always)]
fn half_closed(ctx: &SockOpsContext) {
    let Some(conn) = conn_of(ctx) else {
        return;
    };
    // SAFETY: a live value of the map, with the socket locked; a read of a context field.
    unsafe { (*conn).half_closed_in = (*ctx.ops).bytes_received + 1 };
}

/// The socket's cookie, by which its slots are found.
#[inline(always)]
fn cookie_of(ctx: &SockOpsContext) -> u64 {
    // SAFETY: the helper takes the program's context.
    unsafe { bpf_get_socket_cookie(ctx.as_ptr()) }
}

/// The slot of a cookie among the first so many.
#[inline(always)]
fn slot_of(cookie: u64, slots: u32) -> Option<*mut Conn> {
    CONNS.get_ptr_mut(cookie as u32 & (slots - 1))
}

/// A place for what is to be known of a connection: one of its two slots, or, where other connections have those, storage of the
/// socket's own, which costs several times as much.
#[inline(always)]
fn conn_for(ctx: &SockOpsContext) -> Option<*mut Conn> {
    let cookie = cookie_of(ctx);
    let near = slot_of(cookie, CONN_SLOTS_NEAR)?;
    if claim(near, cookie) {
        return Some(near);
    }
    let far = slot_of(cookie, CONN_SLOTS)?;
    if claim(far, cookie) {
        return Some(far);
    }
    apart(ctx, u64::from(BPF_SK_STORAGE_GET_F_CREATE))
}

/// Takes a slot that nobody has.
///
/// Claims are counted and not swapped in, because this target has no compare-and-swap that all JITs of 5.15 know. All see the
/// changes of one word in one order, so of several that come at once at most one finds itself alone; the others step back.
#[inline(always)]
fn claim(slot: *mut Conn, cookie: u64) -> bool {
    // SAFETY: a live value of the map; claims are raised atomically, the rest is written by whom the slot belongs to.
    unsafe {
        let claims = &raw mut (*slot).claims;
        // Mostly of a long connection: then its line is only read.
        if claims.read_volatile() != 0 {
            return false;
        }
        add_u32(claims, 1);
        if claims.read_volatile() == 1 {
            (*slot).cookie = cookie;
            return true;
        }
        add_u32(claims, u32::MAX);
    }
    false
}

/// What is known of a connection, if it was counted.
#[inline(always)]
fn conn_of(ctx: &SockOpsContext) -> Option<*mut Conn> {
    let cookie = cookie_of(ctx);
    let near = slot_of(cookie, CONN_SLOTS_NEAR)?;
    // SAFETY: a live value of the map. A slot that has changed hands has another cookie.
    if unsafe { (*near).cookie } == cookie {
        return Some(near);
    }
    let far = slot_of(cookie, CONN_SLOTS)?;
    // SAFETY: as above.
    if unsafe { (*far).cookie } == cookie {
        return Some(far);
    }
    apart(ctx, 0)
}

/// Gives the connection's slot to whoever comes next. Its cookie stays, which no other socket ever has; the state before CLOSE
/// tells that an end is not counted twice. Storage of a socket goes with it, and has no claims.
///
/// Nothing is written to the slot at the end but `told`: such a store may reach the next one's CPU late, and then makes its
/// figures come early.
#[inline(always)]
fn give_up(conn: *mut Conn) {
    // SAFETY: a live value of the map, of this connection.
    unsafe { add_u32(&raw mut (*conn).claims, u32::MAX) };
}

/// The socket's own storage; made when there is none and the flags say so.
#[inline(always)]
fn apart(ctx: &SockOpsContext, flags: u64) -> Option<*mut Conn> {
    // SAFETY: a read of a context field; the helper takes the map and the context's socket, which the verifier wants to see
    // compared with null.
    let conn = unsafe {
        let socket = (*ctx.ops).__bindgen_anon_2.sk;
        if socket.is_null() {
            return None;
        }
        let map = (&raw const CONNS_APART).cast_mut();
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
