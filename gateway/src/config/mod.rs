//! The configuration: its schema, how it is loaded, checked and explained.
//!
//! The way of a file: [`load`] reads it, `tree` notes where each value stands, serde makes a
//! [`Config`], `structure` compares the file with the JSON Schema that `gateway schema` prints,
//! `secrets` resolves `${…}`, and `validate` checks what fields mean together. All that is wrong is
//! reported at once, each with its line, column and path.

pub mod defaults;
mod endpoint;
mod error;
mod key;
mod load;
pub mod schema;
mod secrets;
mod structure;
#[cfg(test)]
mod tests;
pub mod tls;
mod tree;
pub mod units;
mod validate;

pub use endpoint::{Endpoint, parse_endpoint};
pub use error::{Errors, Pos, Problem};
pub use key::{KEY_PREFIX, check_name, generate_key, key_hash, parse_sha256, sha256_hex};
pub use load::{Env, FILE_BYTES_MAX, load, parse, process_env};
pub use schema::Config;
pub use structure::json_schema;
pub use validate::check_budget;
