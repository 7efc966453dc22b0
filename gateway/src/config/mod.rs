//! The configuration: its schema, how it is loaded, checked and explained.

pub mod schema;
pub mod units;

pub use schema::Config;
