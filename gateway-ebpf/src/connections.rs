//! `sock_ops` on the service's cgroup: what each client's connections were, as TCP itself saw them.
//!
//! Returns 1 always: 0 would override the answers of other programs on the cgroup (`tcp_call_bpf`, include/net/tcp.h).

use aya_ebpf::{
    EbpfContext as _,
    bindings::{
        BPF_NOEXIST, BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB, BPF_SOCK_OPS_STATE_CB, BPF_SOCK_OPS_STATE_CB_FLAG,
        BPF_TCP_CLOSE, BPF_TCP_CLOSE_WAIT, BPF_TCP_CLOSING, BPF_TCP_ESTABLISHED, BPF_TCP_FIN_WAIT1,
        BPF_TCP_FIN_WAIT2, BPF_TCP_LAST_ACK, bpf_sock_ops,
    },
    helpers::{bpf_ktime_get_ns, generated::bpf_get_socket_cookie},
    macros::sock_ops,
    programs::SockOpsContext,
};
use gateway_common::{Client, ClientKey};

use crate::maps::{CLIENTS, PORTS, TOTALS, add, count};

const AF_INET: u32 = 2;
const AF_INET6: u32 = 10;

/// What a client's entry starts as. In read-only data and not on the stack, where zeroing it would be a loop over a stack
/// pointer, admitted only with CAP_PERFMON. Its name is kept plain: a mangled one has a hash of where it was built.
#[unsafe(no_mangle)]
static EMPTY: Client = Client {
    opened: 0,
    closed: 0,
    bytes_in: 0,
    bytes_out: 0,
    retransmits: 0,
    srtt_us: 0,
    seen_ns: 0,
};

#[sock_ops]
pub fn connections(ctx: SockOpsContext) -> u32 {
    match ctx.op() {
        BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB => opened(&ctx),
        BPF_SOCK_OPS_STATE_CB => state_changed(&ctx),
        _ => {}
    }
    1
}

/// A client's handshake is complete. Connections that the gateway opens itself (to upstreams) come with another
/// operation, those of other services on the cgroup with another local port.
#[inline(always)]
fn opened(ctx: &SockOpsContext) {
    if !is_ours(ctx) {
        return;
    }
    let Some(client) = client_of(ctx) else {
        return;
    };
    // Without this flag the kernel does not report the end; other programs' flags are kept.
    if ctx
        .set_cb_flags((ctx.cb_flags() | BPF_SOCK_OPS_STATE_CB_FLAG as u32) as i32)
        .is_err()
    {
        return;
    }
    count!(opened);
    let Some(entry) = entry_of(&client) else {
        count!(untracked);
        return;
    };
    // SAFETY: a live value of the map; counters are raised atomically, `seen_ns` is one aligned word.
    unsafe {
        add(&raw mut (*entry).opened, 1);
        (*entry).seen_ns = bpf_ktime_get_ns();
    }
}

#[inline(always)]
fn state_changed(ctx: &SockOpsContext) {
    let (state, next) = (ctx.arg(0), ctx.arg(1));
    if next == BPF_TCP_FIN_WAIT2 {
        half_closed(ctx);
    }
    if next != BPF_TCP_CLOSE || !is_ours(ctx) {
        return;
    }
    // A connection that another program asked us to watch may end before it was ever established.
    if !matches!(
        state,
        BPF_TCP_ESTABLISHED
            | BPF_TCP_FIN_WAIT1
            | BPF_TCP_FIN_WAIT2
            | BPF_TCP_CLOSE_WAIT
            | BPF_TCP_LAST_ACK
            | BPF_TCP_CLOSING
    ) {
        return;
    }
    let Some(client) = client_of(ctx) else {
        return;
    };
    let (bytes_in, bytes_out) = payload(ctx, state);
    // SAFETY: reads of a context field, aligned, as the verifier demands.
    let (retransmits, srtt_us) = unsafe {
        (
            u64::from((*ctx.ops).total_retrans),
            u64::from((*ctx.ops).srtt_us >> 3),
        )
    };
    count!(closed);
    count!(bytes_in, bytes_in);
    count!(bytes_out, bytes_out);
    count!(retransmits, retransmits);
    let Some(entry) = entry_of(&client) else {
        return;
    };
    // SAFETY: as in `opened`.
    unsafe {
        add(&raw mut (*entry).closed, 1);
        add(&raw mut (*entry).bytes_in, bytes_in);
        add(&raw mut (*entry).bytes_out, bytes_out);
        add(&raw mut (*entry).retransmits, retransmits);
        (*entry).srtt_us = srtt_us;
        (*entry).seen_ns = bpf_ktime_get_ns();
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

/// True when the connection came in on one of the gateway's ports.
#[inline(always)]
fn is_ours(ctx: &SockOpsContext) -> bool {
    PORTS.get_ptr(ctx.local_port()).is_some()
}

#[inline(always)]
fn client_of(ctx: &SockOpsContext) -> Option<ClientKey> {
    match ctx.family() {
        AF_INET => Some(ClientKey::v4(ctx.remote_ip4().to_ne_bytes())),
        AF_INET6 => Some(ClientKey::v6(remote_ip6(ctx.ops))),
        _ => None,
    }
}

/// Word by word and volatile: the verifier refuses a wider load of this context. Built as a number and not in an array, for
/// the reason of `EMPTY`.
#[inline(always)]
fn remote_ip6(ops: *mut bpf_sock_ops) -> [u8; 16] {
    // SAFETY: reads of context words.
    let word = |index: usize| unsafe { u128::from((&raw const (*ops).remote_ip6[index]).read_volatile()) };
    (word(0) | word(1) << 32 | word(2) << 64 | word(3) << 96).to_le_bytes()
}

/// The client's entry, made when there is none. Two CPUs may race to make it: the second insert fails and finds the first's.
#[inline(always)]
fn entry_of(client: &ClientKey) -> Option<*mut Client> {
    if let Some(entry) = CLIENTS.get_ptr_mut(client) {
        return Some(entry);
    }
    let _ = CLIENTS.insert(client, &EMPTY, u64::from(BPF_NOEXIST));
    CLIENTS.get_ptr_mut(client)
}
