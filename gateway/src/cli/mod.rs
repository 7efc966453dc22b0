//! One file a command.

pub mod check;
pub mod common;
pub mod demo;
pub mod keys;
pub mod run;
pub mod schema;
pub mod usage;
