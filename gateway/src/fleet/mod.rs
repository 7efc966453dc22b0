//! Providers and their endpoints, and how one of them is chosen for a request.

pub mod pool;
pub mod provider;
pub mod resolve;
pub mod route;

pub use pool::Pool;
pub use provider::{Endpoint, Endpoints, Provider, Target};
