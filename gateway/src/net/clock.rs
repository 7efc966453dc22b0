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
