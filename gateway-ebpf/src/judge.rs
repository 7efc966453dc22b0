//! Whether a client's connection is to be refused: blocks, rates, caps. What `listener` and `driver` share.

use core::ptr::null_mut;

use aya_ebpf::{
    btf_maps::lpm_trie::Key,
    helpers::{
        bpf_ktime_get_ns,
        generated::{bpf_ktime_get_coarse_ns, bpf_map_lookup_elem},
    },
};
use gateway_common::{Block, CALM_NS, ClientKey, HALF_OPEN_NS, Settings};

use crate::maps::{BLOCKS, CLIENTS, EXEMPT, HALF_OPEN, NETS, RATES, add};

/// The block that holds a client now, given its whole address and its key; null: none. The client's own comes first, then the
/// most specific of the networks; one that has expired does not count.
///
/// Pointers here are null and not `None`: an `Option` of a pointer is two words, of which the second is undefined when there
/// is none, and the verifier refuses to see it stored.
#[inline(always)]
pub fn block_of(settings: &Settings, whole: &ClientKey, client: &ClientKey) -> *mut Block {
    if settings.clients != 0
        && let Some(block) = BLOCKS.get_ptr_mut(client)
    {
        // SAFETY: a live value of the map. User space may write it at the same time: each field is one aligned word.
        if now_ns() < unsafe { (*block).until_ns } {
            return block;
        }
    }
    // The trie costs some 100 ns even when it is empty, and mostly it is.
    if settings.nets == 0 {
        return null_mut();
    }
    let key = Key::new(128, *whole);
    // The helper and not `LpmTrie::get`, whose shared reference cannot be counted in.
    // SAFETY: the map's own key type; the value lives until the program ends (RCU).
    let block = unsafe {
        let trie = (&raw const NETS).cast_mut();
        bpf_map_lookup_elem(trie.cast(), (&raw const key).cast()).cast::<Block>()
    };
    // SAFETY: as above.
    if block.is_null() || now_ns() >= unsafe { (*block).until_ns } {
        return null_mut();
    }
    block
}

/// Whether an address that would be refused must be looked up among the exempt: not where it is for a block of a client none
/// of whose addresses is exempt, which user space knows. The look-up is a third of what a drop costs.
#[inline(always)]
pub fn may_be_exempt(block: *mut Block) -> bool {
    // SAFETY: a live value of the map, or null; one aligned word.
    block.is_null() || unsafe { (*block).exempt_within } != 0
}

/// True for a client that must not be refused. Asked only when it would be, so it costs served clients nothing.
#[inline(always)]
pub fn is_exempt(whole: &ClientKey) -> bool {
    EXEMPT.get(&Key::new(128, *whole)).is_some()
}

/// Takes one connection from the client's allowance, a bucket that fills at its rate; true when it is empty.
///
/// The map holds when the next connection would be due, were they evenly spaced (the generic cell rate algorithm). Two CPUs
/// that take from a full bucket at the same moment may take one for two.
#[inline(always)]
pub fn over_rate(settings: &Settings, client: &ClientKey) -> bool {
    if settings.rate_ns == 0 {
        return false;
    }
    let now_ns = now_ns();
    let Some(due) = RATES.get_ptr_mut(client) else {
        // No room or a race: the client has one connection more.
        let _ = RATES.insert(client, &(now_ns + settings.rate_ns), 0);
        return false;
    };
    take(due, settings.rate_ns, settings.burst_ns, now_ns)
}

/// True when the client has as many connections open as it may. Attempts that are under way do not count.
#[inline(always)]
pub fn over_open(settings: &Settings, client: &ClientKey) -> bool {
    if settings.open_max == 0 {
        return false;
    }
    let Some(entry) = CLIENTS.get_ptr_mut(client) else {
        return false;
    };
    // SAFETY: a live value of the map; two aligned words, which another CPU may raise in between.
    let open = unsafe { (*entry).opened.wrapping_sub((*entry).closed) };
    open >= settings.open_max
}

/// Takes an attempt from the common allowance, whoever it is from, as long as little of it is used. True, and nothing taken,
/// when more is: then [`over_half_open`] decides. So while all is calm the client is not looked up.
#[inline(always)]
pub fn is_pressed(settings: &Settings) -> bool {
    if settings.half_open_ns == 0 {
        return false;
    }
    let Some(until) = HALF_OPEN.get_ptr_mut(0) else {
        return false;
    };
    take(until, settings.half_open_ns, CALM_NS, coarse_ns())
}

/// Takes an unknown client's attempt from the common allowance; true when that is used up. Known clients, those with an
/// entry and so with a finished handshake behind them, are not bound by it.
#[inline(always)]
pub fn over_half_open(settings: &Settings, client: &ClientKey) -> bool {
    if CLIENTS.get_ptr_mut(client).is_some() {
        return false;
    }
    let Some(until) = HALF_OPEN.get_ptr_mut(0) else {
        return false;
    };
    let slack = HALF_OPEN_NS.saturating_sub(settings.half_open_ns);
    take(until, settings.half_open_ns, slack, coarse_ns())
}

/// Gives an attempt back to the common allowance, because its handshake is complete. A known client's was not taken while
/// the allowance was pressed; where that has changed in between, one too few or too many is given back, while all is calm.
#[inline(always)]
pub fn give_back(settings: &Settings, known: bool, now_ns: u64) {
    if settings.half_open_ns == 0 {
        return;
    }
    let Some(until) = HALF_OPEN.get_ptr_mut(0) else {
        return;
    };
    // SAFETY: a live value of the map, one aligned word.
    let until_ns = unsafe { *until };
    // Nothing is taken, for example because the attempt was before this program: below 0 the word would wrap.
    if until_ns <= now_ns || (known && until_ns - now_ns > CALM_NS) {
        return;
    }
    add(until, settings.half_open_ns.wrapping_neg());
}

/// The time. Asked for only where it is needed: it costs more than a look into an array, and a client that is neither blocked
/// nor new has no use for it.
#[inline(always)]
pub fn now_ns() -> u64 {
    // SAFETY: the helper has no preconditions.
    unsafe { bpf_ktime_get_ns() }
}

/// The time of the last timer interrupt, up to 10 ms old: a read of memory, where [`now_ns`] asks the clock. It is
/// CLOCK_MONOTONIC (5.11).
#[inline(always)]
fn coarse_ns() -> u64 {
    // SAFETY: the helper has no preconditions.
    unsafe { bpf_ktime_get_coarse_ns() }
}

/// Takes `each` from a bucket that holds `slack + each`; true when there is not that much in it.
#[inline(always)]
fn take(due: *mut u64, each_ns: u64, slack_ns: u64, now_ns: u64) -> bool {
    // SAFETY: a live value of the map, one aligned word.
    let due_ns = unsafe { *due };
    if due_ns <= now_ns {
        // SAFETY: as above.
        unsafe { *due = now_ns + each_ns };
        return false;
    }
    if due_ns - now_ns > slack_ns {
        return true;
    }
    add(due, each_ns);
    false
}
