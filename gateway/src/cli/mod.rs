//! One file a command.

pub mod usage;
