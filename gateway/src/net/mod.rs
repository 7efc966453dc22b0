//! The only door to I/O of the data plane: sockets, TLS, timers, the clock.
//!
//! Sockets are used by readiness: wait until a descriptor is readable, then take what is there with
//! a call that never waits. So a waiting connection owns no buffer, every wait can be dropped without
//! losing a byte, and TLS, which wants to be asked again and again, fits the same shape. The waits
//! go through the runtime (monoio: one io_uring poll entry, or epoll where io_uring is forbidden).
//!
//! Architecture invariant: nothing outside `net/` and `core/` names the runtime.

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

pub use conn::Conn;
pub use race::{Either, race};
pub use runtime::{sleep, spawn};
