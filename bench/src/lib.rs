//! Load harness of the gateway: a simulated fleet ([`upstream`]) and a load generator ([`load`]).
//!
//! Both are state machines on `epoll` without a runtime, because a harness has to cost much less than what it measures.

mod http;
pub mod load;
mod process;
mod slab;
pub mod upstream;
mod wheel;
