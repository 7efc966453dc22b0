//! The program's clocks. Limits and deadlines use the monotonic one, records the wall clock.

use std::{
    sync::OnceLock,
    time::{Instant, SystemTime, UNIX_EPOCH},
};

/// Nanoseconds of the monotonic clock since the process first asked. Never goes back, and
/// starts one hour above zero so that "a while ago" can be written as a subtraction.
pub fn monotonic_ns() -> u64 {
    static START: OnceLock<Instant> = OnceLock::new();
    const HEAD_START_NS: u64 = 3_600_000_000_000;
    HEAD_START_NS + START.get_or_init(Instant::now).elapsed().as_nanos() as u64
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
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the call writes one timespec, which is ours.
    let result = unsafe { libc::clock_gettime(libc::CLOCK_BOOTTIME, &raw mut time) };
    if result != 0 {
        return 0;
    }
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

/// A number that is another after each boot of the machine; 0 where that cannot be known.
pub fn boot_id() -> u64 {
    let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let digits: String = text.chars().filter(char::is_ascii_hexdigit).take(16).collect();
    u64::from_str_radix(&digits, 16).unwrap_or(0)
}
