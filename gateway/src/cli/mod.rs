//! One file a command.

<<<<<<< HEAD
pub mod check;
pub mod common;
pub mod keys;
pub mod schema;
=======
pub mod usage;
>>>>>>> ledger
