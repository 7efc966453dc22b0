//! One file a command.

pub mod check;
pub mod common;
pub mod keys;
pub mod schema;
pub mod usage;
