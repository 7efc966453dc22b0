//! The program's clocks. Limits and deadlines use the monotonic one, records the wall clock.

use std::{
    cell::Cell,
    sync::OnceLock,
    time::{SystemTime, UNIX_EPOCH},
};

/// Nanoseconds of the monotonic clock since the process first asked. Never goes back, and
/// starts one hour above zero so that "a while ago" can be written as a subtraction.
pub fn monotonic_ns() -> u64 {
    static START: OnceLock<u64> = OnceLock::new();
    const HEAD_START_NS: u64 = 3_600_000_000_000;
    let now_ns = read_ns(libc::CLOCK_MONOTONIC);
    HEAD_START_NS + now_ns.saturating_sub(*START.get_or_init(|| now_ns))
}

thread_local! {
    /// Zero where no engine runs.
    static TURN_NS: Cell<u64> = const { Cell::new(0) };
}

/// When this thread's engine began its turn, by [`monotonic_ns`]: when what it deals with now had come. For all that needs no
/// more than that, since to read the clock costs as much as many a step of a request. Elsewhere than on a
/// data-plane thread it is [`monotonic_ns`].
pub fn turn_ns() -> u64 {
    match TURN_NS.get() {
        0 => monotonic_ns(),
        turn_ns => turn_ns,
    }
}

/// A turn begins; 0: there are no more.
pub(super) fn set_turn(now_ns: u64) {
    TURN_NS.set(now_ns);
}

/// Milliseconds since the Unix epoch by the wall clock, which may step either way.
#[allow(clippy::disallowed_methods)] // this is the clock
pub fn unix_ms() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_millis() as u64)
}

/// Nanoseconds since the machine's boot, also while it slept (CLOCK_BOOTTIME). Of use between two processes of one
/// boot, which [`boot_id`] tells.
pub fn since_boot_ns() -> u64 {
    read_ns(libc::CLOCK_BOOTTIME)
}

fn read_ns(clock: libc::clockid_t) -> u64 {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the call writes one timespec, which is ours.
    let result = unsafe { libc::clock_gettime(clock, &raw mut time) };
    if result != 0 {
        return 0;
    }
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

/// A number that is another after each boot of the machine; 0 where that cannot be known.
pub fn boot_id() -> u64 {
    static BOOT_ID: OnceLock<u64> = OnceLock::new();
    *BOOT_ID.get_or_init(|| {
        let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        let digits: String = text.chars().filter(char::is_ascii_hexdigit).take(16).collect();
        u64::from_str_radix(&digits, 16).unwrap_or(0)
    })
}
