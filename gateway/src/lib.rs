//! The gateway as a library: everything but the reading of the command line.
//!
//! Start with `serve/request.rs`, the life of a request, and with ARCHITECTURE.md.

pub mod bounds;
pub mod cli;
pub mod config;
pub mod control;
pub mod core;
pub mod dialect;
pub mod error;
pub mod fleet;
pub mod http;
pub mod kernel;
pub mod ledger;
pub mod net;
pub mod quota;
pub mod serve;
pub mod telemetry;
