//! Load harness of the gateway: a simulated fleet ([`upstream`]) and a load generator ([`load`]).
//!
//! Both are state machines on `epoll` without a runtime, because a harness has to cost much less than what it measures.

pub mod capacity;
pub mod compare;
pub mod html;
mod http;
pub mod load;
pub mod process;
mod prompt;
mod random;
pub mod scenario;
mod slab;
pub mod soak;
pub mod stand;
pub mod sys;
pub mod target;
pub mod upstream;
mod wheel;
