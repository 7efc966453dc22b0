//! The hot path. To be read top to bottom: [`request`] is the life of a request, [`connection`] what surrounds
//! it, the others its stages in their order.
//!
//! Architecture invariant: nothing here takes a lock, touches the file system except through the journal,
//! or names aya or tokio.

pub mod connection;
pub mod request;

pub mod keys;
pub mod snapshot;

mod account;
mod answer;
mod body;
mod dispatch;
mod ends;
mod preface;
mod relay;
mod tags;
pub mod trust;
mod upstream;
