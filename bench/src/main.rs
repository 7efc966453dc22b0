//! `gateway-bench`: the simulated fleet and the load generator on the command line.

mod args;
mod stands;
mod watch;

use std::process::ExitCode;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    args::run().unwrap_or_else(|error| {
        eprintln!("gateway-bench: {error:#}");
        ExitCode::from(2)
    })
}
