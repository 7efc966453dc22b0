//! How a test says that it cannot run here.

use std::io::Write as _;

/// Says why a test is skipped, for people who see only that it passed. To standard error itself: what `println!` and
/// `eprintln!` print in a test that passes, the test harness keeps to itself.
pub fn skipped(reason: impl std::fmt::Display) {
    let test = std::thread::current();
    let test = test.name().unwrap_or("a test");
    let _ = writeln!(std::io::stderr(), "skipped: {test}: {reason}");
}
