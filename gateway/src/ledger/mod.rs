//! The books: one record for every accepted request, on disk before the answer's last byte leaves.

pub mod record;
