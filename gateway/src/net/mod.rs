//! net

pub mod mapped;
