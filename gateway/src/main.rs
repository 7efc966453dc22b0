//! Reads the command line and hands over to a command of [`gateway::cli`].

fn main() {}
