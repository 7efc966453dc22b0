//! The only door to I/O of the data plane: sockets, TLS, timers, the clock.
//!
//! Each data-plane thread has an engine of its own (`engine`): tasks, timers, and sockets on io_uring, or on epoll where
//! io_uring is forbidden or too old. What a socket offers is the same on both: take what has arrived, hand bytes over,
//! and wait until one of them is worth trying. No wait holds a buffer of its own, and every wait can be dropped without
//! losing a byte; so a hang-up, a deadline and a drain can race it, and TLS, which wants to be asked again and again, fits
//! the same shape.
//!
//! Architecture invariant: nothing outside `net/` names io_uring or epoll.

pub mod allocator;
pub mod clock;
pub mod conn;
mod engine;
pub mod mapped;
pub mod process;
pub mod race;
pub mod runtime;
pub mod signal;
pub mod tcp;
pub mod tls;
pub mod words;

pub use conn::Conn;
pub use race::{Either, race};
pub use runtime::{sleep, spawn};
