//! One file a command.

pub mod budgets;
pub mod check;
pub mod client;
pub mod common;
pub mod demo;
pub mod kernel;
pub mod keys;
pub mod limits;
pub mod prices;
pub mod reload;
pub mod run;
pub mod schema;
pub mod status;
pub mod top;
pub mod usage;
