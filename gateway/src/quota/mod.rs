//! Limits and budgets: how much may be used, reserved before a request is sent and settled after it.
//!
//! ```text
//! policy   which limit policies bind a request      ─┐
//! budget   what keys, teams, … may spend             ├─ rule   what is counted, how much, in what window
//! own      a key's own limits, made at run time      ─┘
//! reservation   all that bind a request, at once or not at all; grows while a stream runs; settled once
//! levels        one atomic word for each rule, subject and period ── table   found without locks, bounded
//! window, calendar   the arithmetic of buckets, sliding windows and calendar periods
//! state         levels over restarts
//! inspect       how all that stands, for people
//! lease, leases, shared   what this host may use of levels that several hosts share
//! ```

pub mod budget;
pub mod calendar;
pub mod identity;
pub mod inspect;
pub mod lease;
pub mod leases;
pub mod levels;
pub mod own;
pub mod policy;
pub mod refusals;
pub mod reservation;
pub mod rule;
pub mod shared;
pub mod state;
pub mod table;
pub mod window;

pub use budget::{Budgets, Subject};
pub use levels::Levels;
pub use policy::{Facts, Ids, Policies};
pub use reservation::{Admission, Denied, Report, Reservation};
pub use rule::{Amounts, Rates, Unit};

/// What limits and budgets know besides the configuration: lives as long as the process, over reloads.
#[derive(Default)]
pub struct Quota {
    pub levels: Levels,
    pub budgets: Budgets,
}
