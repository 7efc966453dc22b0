//! How a test says that it cannot run here.

use std::io::Write as _;

/// What must not be missing: words separated by commas, or `all`. CI sets it (`.ci/run`).
const REQUIRED: &str = "GATEWAY_TESTS_REQUIRED";

/// Says why a test is skipped, for people who see only that it passed. To standard error itself: what `println!` and
/// `eprintln!` print in a test that passes, the test harness keeps to itself.
///
/// # Panics
/// What is missing, in a word (`kernel`, `root`, `sdk`, `openapi`, `jsonschema`, `clickhouse`, `redis`, `tools`), is
/// required.
pub fn skipped(missing: &str, reason: impl std::fmt::Display) {
    let required = std::env::var(REQUIRED).unwrap_or_default();
    let is_required = required.split(',').any(|word| word == missing || word == "all");
    assert!(!is_required, "`{missing}` is required by {REQUIRED}: {reason}");
    let test = std::thread::current();
    let test = test.name().unwrap_or("a test");
    let _ = writeln!(std::io::stderr(), "skipped: {test}: {reason}");
}
