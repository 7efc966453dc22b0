//! Limits: how much a key may use, reserved before a request is sent and settled after it.

pub mod gcra;
pub mod lease;
pub mod leases;
pub mod policy;
pub mod refusals;

pub use policy::{Admission, Denied, Reservation, Table};
